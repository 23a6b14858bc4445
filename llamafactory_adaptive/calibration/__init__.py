"""Measurements of the target modules by passes over a model and calibration data."""
