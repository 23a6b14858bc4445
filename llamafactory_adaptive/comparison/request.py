"""Arguments of ``llamafactory-adaptive compare``, checked before anything starts.

The command line imports this for its help: whatever imports torch or NumPy is imported where it is needed.
"""

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llamafactory_adaptive.comparison.task_request import add_task_arguments
from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.launcher import CPU
from llamafactory_adaptive.options import parse_share
from llamafactory_adaptive.paths import path_argument
from llamafactory_adaptive.reports.learning_rate import TRAINERS_RATE


if TYPE_CHECKING:
    from llamafactory_adaptive.comparison.experiment import Design


_AROUND = (0.25, 0.5, 1.0, 2.0, 4.0)  # factors of the YAML's learning rate


def add_comparison_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("config", type=path_argument, metavar="CFG.yaml",
        help="a LLaMA-Factory training YAML, plain or adaptive, e.g. my.yaml")  # fmt: skip
    add("overrides", nargs="*", metavar="key=value",
        help="settings that replace those of the file, e.g. lora_rank=16")  # fmt: skip
    add("--out", type=path_argument, required=True, metavar="DIR",
        help="folder for rows, runs, ledger and pages, e.g. compared; the same command goes on in it")  # fmt: skip
    add("--arms", default="sensitivity,igu", metavar="NAMES",
        help="arms beside plain lora and random ranks, e.g. igu,rslora,dora (default: %(default)s)")  # fmt: skip
    add("--arm", action="append", default=[], metavar="NAME:key=value,...",
        help='an arm of your own, e.g. "igu_off:adaptive_method=igu,igu_importance=off"; may be repeated')  # fmt: skip
    add("--rates", metavar="NUMBERS",
        help="rates of every arm's first grid, e.g. 1e-4,2e-4,4e-4 (default: around the file's)")  # fmt: skip
    add("--alphas", metavar="NUMBERS",
        help="values of lora_alpha, each with every rate, e.g. 16,32 (default: the file's)")  # fmt: skip
    add("--seeds", type=int, default=5, metavar="N",
        help="seeds at the best rate, by which an arm is judged, e.g. 3 (default: %(default)s)")  # fmt: skip
    add("--rate-seeds", type=int, default=1, metavar="N",
        help="other seeds, by which a rate is chosen, e.g. 2 (default: %(default)s)")  # fmt: skip
    add("--steps", type=int, metavar="N", help="optimizer steps of a run, e.g. 300 (default: the file's)")
    add("--steps-for-rates", type=int, metavar="N",
        help="optimizer steps of the runs that choose a rate, e.g. 100 (default: as many as the others)")  # fmt: skip
    add("--extensions", type=int, default=2, metavar="N",
        help="how often a grid whose end is best is extended by a factor of 2, e.g. 0 (default: 2)")  # fmt: skip
    add("--held-out", type=int, default=400, metavar="N",
        help="held-out rows at most: one half chooses rates, the other judges, e.g. 1000 (default: 400)")  # fmt: skip
    add("--effect", default="0.5%", metavar="SHARE",
        help="smallest difference that matters, as a share of LoRA's loss, e.g. 1%% (default: 0.5%%)")  # fmt: skip
    add("--devices", metavar="NUMBERS",
        help="visible devices, one run on each at a time, e.g. 0,1,2,3, or cpu,cpu for two runs that share the CPU "
        "(default: every GPU that is like the first, or one run on the CPU)")  # fmt: skip
    add("--keep-adapters", action="store_true",
        help="keep the adapters of runs that choose a rate, too, e.g. where the disk is large")  # fmt: skip
    add("--dry-run", action="store_true",
        help="check everything and count the runs without starting any, e.g. before a night's work")  # fmt: skip
    add_task_arguments(parser)


def design_of(arguments: argparse.Namespace, given_rate: Any) -> "Design":
    """Build the design that the arguments ask for.

    Args:
        arguments: parsed arguments.
        given_rate: ``learning_rate`` of the YAML; None for the Trainer's default.

    Raises:
        AdaptiveConfigError: an argument is out of range.
    """
    from llamafactory_adaptive.comparison.differences import FEWEST_ROWS
    from llamafactory_adaptive.comparison.experiment import Design

    base = _rate(given_rate)
    rates = _numbers("--rates", arguments.rates, "1e-4,2e-4,4e-4,8e-4") or tuple(base * factor for factor in _AROUND)
    alphas: tuple[float | None, ...] = _numbers("--alphas", arguments.alphas, "16,32", whole=True) or (None,)
    for key, low in (("seeds", 1), ("rate_seeds", 1), ("steps", 1), ("steps_for_rates", 1), ("extensions", 0),
                     ("held_out", 2 * FEWEST_ROWS)):  # fmt: skip
        value = getattr(arguments, key)
        if value is not None and value < low:
            refuse(f"--{key.replace('_', '-')}", value, f"must be at least {low}", str(max(low, 3)))
    return Design(rates, alphas, arguments.seeds, arguments.rate_seeds, arguments.steps, arguments.steps_for_rates,
                  arguments.extensions)  # fmt: skip


def effect_of(text: str) -> float:
    """Read the smallest difference that matters: ``0.5%`` or ``0.005``.

    Raises:
        AdaptiveConfigError: it is no number between 0 and 0.5.
    """
    try:
        value = parse_share(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value <= 0.5:
        refuse("--effect", text, "must be between 0 and 50%", "--effect 0.5%")
    return value


def devices_of(
    text: str | None, visible: Sequence[str], kinds: Sequence[object] = (), threads: int = 1
) -> Sequence[str | None]:
    """Read the devices: where none is named all that are like the first, or (None,) where that leaves no choice.

    Args:
        text: numbers that count within the visible devices, or names of them, with commas between; or ``cpu`` for
            every run that is to have its share of the CPU.
        visible: devices that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them.
        kinds: what each of them is that runs could take.
        threads: threads of the CPU, which such runs share.

    Returns:
        The devices as ``CUDA_VISIBLE_DEVICES`` names them; ``cpu:N`` for N threads of the CPU.

    Raises:
        AdaptiveConfigError: a device is there twice, or not visible; more runs share the CPU than it has threads.
    """
    names = [word.strip() for word in (text or "").split(",") if word.strip()]
    if CPU in names:
        return _shares_of_cpu(names, threads)
    devices: list[str | None] = []
    for name in names:
        device = visible[int(name)] if name.isdecimal() and int(name) < len(visible) else name
        if device not in visible or (name.isdecimal() and int(name) >= len(visible)):
            there = f"there are {len(visible)}, numbered from 0" if visible else "there is no GPU"
            try_ = "--devices 0, or leaving it out" if visible else "leaving it out, or --devices cpu,cpu"
            refuse("--devices", text, f"{name} is no visible device: {there}", try_)
        if device in devices:
            refuse("--devices", text, "names a device twice", "--devices 0,1")
        devices.append(device)
    alike = [device for device, kind in zip(visible, kinds, strict=False) if kind == kinds[0]]
    return devices or (alike if len(alike) > 1 else (None,))


def devices_in_words(text: str | None, devices: Sequence[str | None], gpus: int) -> str:
    """Tell which GPUs are taken where none is named; empty where that is no news.

    Args:
        text: the devices that are named, if any.
        devices: the devices that are taken.
        gpus: number of GPUs that runs could take.
    """
    if text or gpus < 2:
        return ""
    if len(devices) < gpus:
        return f"runs take {len(devices)} of {gpus} GPUs: others differ from the first; --devices names any of them"
    return f"runs take all {gpus} GPUs, one each at a time; --devices 0 keeps them on the first"


def _shares_of_cpu(names: Sequence[str], threads: int) -> list[str | None]:
    text = ",".join(names)
    if set(names) != {CPU}:
        refuse("--devices", text, "names the CPU and others: the slowest device would end last by far", "--devices 0")
    if len(names) > threads:
        refuse("--devices", text, f"the CPU has {threads} threads", f"--devices {','.join([CPU] * threads)}")
    return [f"{CPU}:{threads // len(names)}"] * len(names)


def _rate(given: Any) -> float:
    try:
        rate = float(TRAINERS_RATE if given is None else given)
    except (TypeError, ValueError):
        rate = math.nan
    if not (math.isfinite(rate) and rate > 0.0):
        refuse("learning_rate", given, "must be a positive number", "learning_rate: 1.0e-4")
    return rate


def _numbers(key: str, text: str | None, example: str, whole: bool = False) -> tuple[float, ...]:
    if not text:
        return ()
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = [math.nan]
    fits = all(math.isfinite(value) and value > 0.0 and not (whole and value % 1) for value in values)
    if not fits or len(set(values)) < len(values):
        kind = "whole numbers" if whole else "numbers"
        refuse(key, text, f"must be positive {kind}, each once, with commas between them", f"{key} {example}")
    return tuple(values)
