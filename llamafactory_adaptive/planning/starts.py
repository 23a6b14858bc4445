"""What the factors of a fresh adapter start from: measured once per request before training, and kept in the cache."""

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llamafactory_adaptive.adapter.eva import InputDirections
from llamafactory_adaptive.calibration.gradient_projections import GradientProjections
from llamafactory_adaptive.config.run_config import AdaptiveConfig
from llamafactory_adaptive.errors import first_of, refuse
from llamafactory_adaptive.files import digest_of, note_checksum, replacing, usable_entry
from llamafactory_adaptive.planning.cache import cache_folder, read_statistics
from llamafactory_adaptive.planning.compatibility import init_settings
from llamafactory_adaptive.planning.host import HostRun
from llamafactory_adaptive.ranks.module_names import is_routed_expert
from llamafactory_adaptive.ranks.plan import INIT, ModuleShape, RankPlan


logger = logging.getLogger("llamafactory.adaptive")


@dataclass(frozen=True)
class StartFile:
    """A file in the cache with the tensors that factors start from, by module.

    Attributes:
        path: safetensors file, on the node of the process that planned.
        facts: what the plan records of it.
    """

    path: Path
    facts: Mapping[str, Any]

    def recorded_in(self, plan: RankPlan) -> RankPlan:
        """Return the plan with these facts in its provenance."""
        return replace(plan, provenance={**plan.provenance, INIT: dict(self.facts)})


def start_measurement(config: AdaptiveConfig, rank: int) -> InputDirections | GradientProjections:
    """Return what is measured for ``adaptive_init: eva`` or ``gora``, for modules of at most ``rank``."""
    if config.init == "eva":
        return InputDirections(rank)
    return GradientProjections(rank, config.calibration.seed)


def obtain_start(config: AdaptiveConfig, host: HostRun, plan: RankPlan) -> StartFile | None:
    """Measure or re-use what the factors of a fresh adapter start from; None where they start as PEFT starts them.

    Raises:
        AdaptiveError: the modules have no such start, the measurement failed, or the cache cannot be written.
    """
    if config.init == "default":
        return None
    if config.init == "eva":
        _refuse_routed_experts(host.shapes)
    measurement = start_measurement(config, plan.largest_rank)
    path = _start_path(config, host.identity, measurement.key)
    if not usable_entry(path):
        _measure(config, host, measurement, path)
    _, facts = read_statistics(path, host.shapes)
    ours = {**init_settings(config), "rank": plan.largest_rank, "calibration": asdict(config.calibration)}
    return StartFile(path, {**ours, **facts})


def _measure(
    config: AdaptiveConfig, host: HostRun, measurement: InputDirections | GradientProjections, path: Path
) -> None:
    started = time.perf_counter()
    with TemporaryDirectory(prefix="adaptive-") as scratch:
        host.measure(measurement, fresh := Path(scratch) / path.name)
        read_statistics(fresh, host.shapes)  # nothing that is not finite is kept
        with replacing(path) as temporary:
            shutil.copyfile(fresh, temporary)
        note_checksum(path)
    seconds = time.perf_counter() - started
    logger.info(f"adaptive: the start of the factors ({config.init}) was computed in {seconds:.1f} s")


def _refuse_routed_experts(shapes: list[ModuleShape]) -> None:
    """Refuse routed experts with EVA: they read tokens of all samples mixed, so that padding cannot be told apart."""
    if routed := [shape.name for shape in shapes if is_routed_expert(shape.name)]:
        reason = f"lora_target has routed experts, {first_of(routed, ', ', 1)}, which read tokens of all samples mixed"
        refuse("adaptive_init", "eva", reason, "adaptive_init: default, or a lora_target without experts")


def _start_path(config: AdaptiveConfig, identity: Mapping[str, Any], key: str) -> Path:
    """Return the cache file of a start; the batch size is part of its name, since EVA goes batch by batch."""
    request = {"identity": identity, "calibration": asdict(config.calibration), "measurement": key}
    return cache_folder() / "starts" / f"{digest_of(request)}.safetensors"
