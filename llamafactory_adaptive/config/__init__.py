"""The configuration of an adaptive run, and the checks of its settings."""
