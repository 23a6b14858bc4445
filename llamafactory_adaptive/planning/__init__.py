"""Where a run's plan comes from: scored, cached, given or resumed."""
