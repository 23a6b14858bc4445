"""Arithmetic of ranks: from a budget and scores to whole ranks per module, and the plan file that holds them."""
