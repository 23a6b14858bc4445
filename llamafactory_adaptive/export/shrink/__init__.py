"""Cutting of a trained LoRA adapter to a budget by the singular values of all its modules' updates."""
