"""The job that a run sends to its scoring process: settings that the run has checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_adaptive.adapter.eva import InputDirections
from llamafactory_adaptive.bridge.arguments import Args, our_keys, split_names
from llamafactory_adaptive.bridge.checked_run import CheckedRun
from llamafactory_adaptive.bridge.host_check import OTHER_PROCESS
from llamafactory_adaptive.bridge.target_shapes import calibration_rows
from llamafactory_adaptive.calibration.gradient_projections import GradientProjections
from llamafactory_adaptive.calibration.measurement import Measurement
from llamafactory_adaptive.config.run_config import AdaptiveConfig


# Settings that neither base model nor training rows depend on.
TRAINING_ONLY = (*OTHER_PROCESS, "eval_dataset", "eval_strategy",
                 "load_best_model_at_end", "metric_for_best_model", "push_to_hub", "do_eval", "do_predict",
                 "predict_with_generate", "early_stopping_steps", "overwrite_output_dir", "ref_model",
                 "ref_model_adapters", "use_swanlab", "plot_loss", "save_on_each_node", "eval_steps")  # fmt: skip


@dataclass(frozen=True)
class ScoringJob:
    """One measurement in a process of its own, which neither reads nor checks the run's settings again.

    Attributes:
        settings: the host's settings for loading model and rows; sent by a pipe, as they may hold tokens of a hub.
        config: the validated configuration.
        modules: names of the target modules.
        measurement: key of what is measured.
        path: file for the statistics, in an empty folder that is removed if the process that wants them is killed.
        start_rank: the largest rank, where the start of the factors is measured; None for what the method scores by.
    """

    settings: Args
    config: AdaptiveConfig
    modules: tuple[str, ...]
    measurement: str
    path: Path
    start_rank: int | None = None

    @classmethod
    def from_run(cls, run: CheckedRun, modules: Iterable[str], measurement: Measurement, path: Path) -> "ScoringJob":
        """Build the job for one measurement of a run."""
        rank = measurement.rank if isinstance(measurement, (InputDirections, GradientProjections)) else None
        return cls(scoring_settings(run.args), run.config, tuple(modules), measurement.key, path, rank)

    def to_json(self) -> dict[str, Any]:
        """Encode the job as a mapping of JSON values."""
        return {**vars(self), "config": self.config.to_json(), "modules": list(self.modules), "path": str(self.path)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ScoringJob":
        """Build the job from what :meth:`to_json` returned."""
        config, modules = AdaptiveConfig.from_json(values["config"]), tuple(values["modules"])
        path, rank = Path(values["path"]), values["start_rank"]
        return cls(values["settings"], config, modules, values["measurement"], path, rank)


def scoring_settings(args: Args) -> Args:
    """Reduce a run's settings to those that load base model and training split in one process."""
    dropped = {*TRAINING_ONLY, *our_keys(args), "output_dir"}
    kept = {key: value for key, value in args.items() if key not in dropped}
    if not args.get("create_new_adapter"):
        kept.pop("adapter_name_or_path", None)
    rows = calibration_rows(args)
    kept["dataset"] = ",".join(rows.names) or None
    if set(rows.names) != set(split_names(args.get("dataset"))):
        for key in ("interleave_probs", "mix_strategy", "val_size"):  # they are about the training set
            kept.pop(key, None)
    if rows.folder is None:
        kept.pop("tokenized_path", None)  # the host would write it, without the run's evaluation set
    # Rows are scored one by one: packing would add padding that counts, and attention across rows.
    forced = {
        "finetuning_type": "lora",
        "do_train": True,
        "report_to": "none",
        "packing": False,
        "neat_packing": False,
    }
    return kept | forced
