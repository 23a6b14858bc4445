"""Comparison of ways to fine-tune: the same data, budget and seeds for each, at the learning rate that suits it."""
