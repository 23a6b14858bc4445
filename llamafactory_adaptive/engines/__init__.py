"""Access to weights, gradients and optimizer states under one process, DDP and ZeRO; collectives over processes."""
