"""Reports for people: tables, plots, the model card, data quality, finished runs."""
