"""What a person reads: tables, plots, the model card, data quality, finished runs."""
