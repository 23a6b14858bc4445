"""The proof that a run did what was asked, and the counters it quotes."""

from dataclasses import asdict, dataclass


@dataclass
class Counters:
    """What really happened, quoted by the guard when something did not."""

    configs_injected: int = 0
    modules_checked: int = 0
    steps: int = 0
    gradients_missing: int = 0
    observations: int = 0
    probes: int = 0
    allocations: int = 0
    largest_learning_rate: float = 0.0

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self).items())
