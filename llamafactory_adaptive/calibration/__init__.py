"""Passes over a model and data that measure the target modules."""
