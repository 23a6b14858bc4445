"""Checkpoints of DDP on CPUs, which the Trainer cannot load by itself."""

import torch


def read_numbered_cpus() -> None:
    """Make torch.load take the device "cpu:0", onto which the Trainer resumes DDP (transformers 5.5.4)."""
    torch.serialization.register_package(
        5, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )
