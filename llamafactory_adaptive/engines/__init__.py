"""Where weights, gradients and optimizer states live: one process, DDP, ZeRO; and how processes agree."""
