"""The cache of plans and statistics that were computed before, by digest of the request."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llamafactory_adaptive.calibration.measurement import Measurement
from llamafactory_adaptive.config.run_config import AdaptiveConfig
from llamafactory_adaptive.errors import CalibrationError, OutputError, first_of, refuse
from llamafactory_adaptive.files import digest_of, note_checksum, replacing, usable_entry
from llamafactory_adaptive.ranks.plan import (
    SCHEMA_VERSION,
    ModuleShape,
    RankPlan,
    load_plan,
)


CACHE_ENV = "LLAMAFACTORY_ADAPTIVE_CACHE"
logger = logging.getLogger("llamafactory.adaptive")


def cache_folder() -> Path:
    """Return the cache folder, made if missing: ``$LLAMAFACTORY_ADAPTIVE_CACHE``, or one in the user's cache.

    Raises:
        AdaptiveConfigError: the folder cannot be written.
    """
    # An empty variable counts as not set, or files would land wherever the run was started.
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "llamafactory_adaptive")
    folder = Path(os.path.expanduser(os.environ.get(CACHE_ENV) or default))
    try:
        for part in ("plans", "statistics", "quality", "starts"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        if not os.access(folder / "plans", os.W_OK):
            raise PermissionError("it is not writable")
    except OSError as error:
        refuse(CACHE_ENV, str(folder), f"the cache cannot be written ({error})", f"{CACHE_ENV}=<folder>", cause=error)
    return folder


@dataclass(frozen=True)
class PlanRequest:
    """The request for one run's plan: its configuration, and what identifies its model and data.

    Attributes:
        config: the validated configuration.
        identity: everything that determines the statistics (model, data, precision, versions), JSON-able.
        provenance: facts that the plan records of its origin.
    """

    config: AdaptiveConfig
    identity: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def digest(self) -> str:
        """Compute the name of the plan in the cache: equal requests share one plan."""
        asked = {key: value for key, value in asdict(self.config).items() if key not in _NOT_ASKED}
        if asked["granularity"] == "module":
            del asked["granularity"]  # as in caches that are filled already
        asked["course"] = asked.pop("search")  # the name in caches that are filled already
        return digest_of({"identity": self.identity, "config": asked, "schema": SCHEMA_VERSION})

    def plan_path(self) -> Path:
        """Return the cache file of the requested plan."""
        return cache_folder() / "plans" / f"{self.digest()}.json"


# Settings that have no part in a computed plan: with a new one in it, no plan in a filled cache would be found.
_NOT_ASKED = ("max_nonfinite_steps", "asked_alpha", "best_model_from", "given", "init", "init_gamma", "placement")


def statistics_path(request: PlanRequest, measurement: Measurement) -> Path:
    """Return the cache file of a measurement, for every batch size: that must not change the result."""
    calibration = {key: value for key, value in asdict(request.config.calibration).items() if key != "batch_size"}
    key = digest_of({"identity": request.identity, "calibration": calibration, "measurement": measurement.key})
    return cache_folder() / "statistics" / f"{key}.safetensors"


def keep_statistics(fresh: Path, path: Path) -> None:
    """Copy fresh statistics into the cache; warn where they cannot be written there."""
    try:
        with replacing(path) as temporary:
            shutil.copyfile(fresh, temporary)
        note_checksum(path)
    except OutputError as error:
        logger.warning(f"the scores are not kept for later runs: {error}")


def read_statistics(path: Path, shapes: list[ModuleShape]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the statistics of the target modules from a file, and the facts stored with them.

    Raises:
        CalibrationError: the file is of other modules, or holds NaN or infinity.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {shape.name: file.get_tensor(shape.name) for shape in shapes}
            facts = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"the statistics in {path} do not fit this model ({error}); delete the file") from error
    wrong = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise CalibrationError(
            f"the statistics in {path} hold NaN or infinity for {first_of(wrong, most=1)}; "
            "delete the file and run again"
        )
    peak = json.loads(facts.get("peak_memory", "{}"))  # an earlier version did not note it
    return tensors, {
        "calibration_tokens": int(facts.get("tokens", 0)),
        "calibration_samples": int(facts.get("samples", 0)),
        "calibration_rows_sha256": facts.get("rows_sha256", ""),
        "calibration_seconds": float(facts.get("seconds", 0.0)),
        **({"calibration_peak_memory": peak} if peak else {}),
    }


def cached_plan(path: Path) -> RankPlan | None:
    """Read a plan from the cache; return None where it is missing or damaged (see :func:`usable_entry`)."""
    return load_plan(path) if usable_entry(path) else None


def keep_plan(plan: RankPlan, path: Path) -> None:
    """Write a plan into the cache; warn where it cannot be written there."""
    try:
        plan.write(path)
        note_checksum(path)
    except OutputError as error:
        logger.warning(f"the plan is not kept for later runs: {error}")
