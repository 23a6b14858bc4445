"""Measurement, weighting and drawing of training samples, independent of the Trainer."""
