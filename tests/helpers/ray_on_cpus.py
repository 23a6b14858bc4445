"""LLaMA-Factory's command line whose Ray launcher finds room on a machine without accelerators.

It counts the cluster's CPUs as devices, and asks for ten CPUs for each of them, so that no cluster of CPUs ever has
room. Here as many places are asked for as there are workers: ``python ray_on_cpus.py train X.yaml ray_num_workers=2``.
"""

import sys
from typing import Any

from llamafactory.cli import main
from llamafactory.train import tuner
from ray.util.placement_group import placement_group


def places(devices: int) -> tuple[Any, dict[str, int]]:
    """Reserve what the workers ask for, whatever number of devices was counted."""
    workers = next(int(word.partition("=")[2]) for word in sys.argv if word.startswith("ray_num_workers="))
    bundle = {"CPU": 10}
    return placement_group([bundle] * workers, strategy="PACK"), bundle


if __name__ == "__main__":
    tuner.get_placement_group = places
    main()
