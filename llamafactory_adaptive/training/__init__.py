"""A run under any transformers.Trainer: callbacks, rank search, sample selection, checkpoints."""
