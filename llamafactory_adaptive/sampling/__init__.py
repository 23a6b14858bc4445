"""Training samples: measured, weighed and drawn. Knows no Trainer."""
