"""Arms of a comparison: ways to fine-tune by name, and the settings of each run that follow from the user's YAML."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.methods import methods


Settings = dict[str, Any]
PLAIN = "lora"  # tuned plain LoRA, the rival of all others; always in
CONTROL = "random"  # what unequal ranks cost or bring by themselves; always in
GIVEN = "yaml"  # the settings of the YAML as they are
# LLaMA-Factory's own variants of LoRA.
_VARIANTS: dict[str, Settings] = {
    PLAIN: {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "loraplus": {"loraplus_lr_ratio": 16.0},
    "pissa": {"pissa_init": True, "pissa_convert": True},
}
_HALVES: dict[str, Settings] = {
    "tsq_ranks": {"adaptive_method": "tsq", "tsq_sampling": False},
    "tsq_samples": {"adaptive_method": "tsq", "tsq_reallocation": False},
}
# Keys of a variant, which an arm that does not name them is without, whatever the YAML says.
_KEYS_OF_VARIANTS = (*dict.fromkeys(key for keys in _VARIANTS.values() for key in keys), "loraplus_lr_embedding",
                     "pissa_iter")  # fmt: skip
# What every adaptive arm takes from the YAML. Its other adaptive keys suit the method that it names, and no other.
_SHARED = ("adaptive_budget_unit", "adaptive_min_rank", "adaptive_max_rank")
# What a run of a comparison does alike in every arm: no evaluation, no checkpoints, one process, rows on the disk.
_FORCED: Settings = {
    "do_train": True, "do_eval": False, "do_predict": False, "eval_strategy": "no", "save_strategy": "no",
    "load_best_model_at_end": False, "report_to": "none", "plot_loss": False, "overwrite_output_dir": True,
    "push_to_hub": False, "disable_tqdm": True,
}  # fmt: skip
# Keys that are about evaluation or checkpoints, or whose rows were split before.
_LEFT_OUT = ("eval_dataset", "val_size", "eval_steps", "eval_on_each_dataset", "early_stopping_steps",
             "metric_for_best_model", "greater_is_better", "resume_from_checkpoint", "save_steps", "save_total_limit",
             "predict_with_generate", "compute_accuracy", "run_name", "output_dir", "logging_dir",
             "adaptive_best_model_from", "adapter_name_or_path", "create_new_adapter", "streaming")  # fmt: skip
# What the command itself sets, by its own arguments.
_ONE_FOR_ALL = ("learning_rate", "lora_alpha", "lora_rank", "seed", "max_steps", "num_train_epochs", "output_dir",
                "dataset", "model_name_or_path", "stage", *_FORCED)  # fmt: skip
_SECRET = re.compile(r"(_token|api_key|password|secret)$")
_NAME = re.compile(r"[\w][\w.\- ]{0,60}")


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        name: what tables and plots call it.
        settings: keys that replace those of the YAML; ``finetuning_type`` is one of them.
        all_of_yaml: whether all adaptive keys of the YAML stay.
    """

    name: str
    settings: Settings = field(default_factory=dict)
    all_of_yaml: bool = False


@dataclass(frozen=True)
class GridPoint:
    """What is tuned for every arm on its own.

    Attributes:
        rate: ``learning_rate``.
        alpha: ``lora_alpha``; None for that of the YAML.
    """

    rate: float
    alpha: float | None = None

    def settings(self) -> Settings:
        """Return the keys of LLaMA-Factory that this point sets."""
        return {"learning_rate": self.rate} | ({} if self.alpha is None else {"lora_alpha": self.alpha})

    def __str__(self) -> str:
        return f"{self.rate:g}" + ("" if self.alpha is None else f", alpha {self.alpha:g}")


def choose_arms(names: Iterable[str], own: Iterable[str], given: Mapping[str, Any]) -> list[Arm]:
    """Build the arms that a user asks for: plain LoRA first, then the random control, then the others.

    Args:
        names: names of built-in arms.
        own: arms of the user, ``NAME:key=value,...``.
        given: settings of the YAML. Where they are adaptive, they are an arm of their own.

    Raises:
        AdaptiveConfigError: an arm is unknown, or what is written is none.
    """
    built_in = built_in_arms()
    chosen = [PLAIN, CONTROL, *names]
    for name in chosen:
        if name not in built_in:
            refuse("--arms", name, f"must be one of {', '.join(built_in)}", "--arms lora,random,sensitivity,igu")
    arms = {name: built_in[name] for name in chosen}
    if given.get("finetuning_type") == "adaptive":
        arms[GIVEN] = Arm(GIVEN, {"finetuning_type": "adaptive"}, all_of_yaml=True)
    for text in own:
        arm = parse_arm(text)
        if arm.name in arms:
            refuse("--arm", text, f"there is an arm called {arm.name} already", "another name before the colon")
        arms[arm.name] = arm
    return list(arms.values())


def built_in_arms() -> dict[str, Arm]:
    """Return the arms that have a name: variants of LoRA, every registered method, and the two halves of TsqLoRA."""
    kinds = {name: {"finetuning_type": "lora", **settings} for name, settings in _VARIANTS.items()}
    adaptive = {name: {"adaptive_method": name} for name in methods()} | _HALVES
    kinds |= {name: {"finetuning_type": "adaptive", **settings} for name, settings in adaptive.items()}
    return {name: Arm(name, settings) for name, settings in kinds.items()}


def parse_arm(text: str) -> Arm:
    """Build an arm from ``NAME:key=value,key=value``; values are read as YAML.

    An arm that names an ``adaptive_method`` is adaptive. One that names neither a method nor a ``finetuning_type`` is
    plain LoRA with other settings.

    Raises:
        AdaptiveConfigError: the text has another form.
    """
    name, colon, rest = text.partition(":")
    example = '--arm "igu_off:adaptive_method=igu,igu_importance=off"'
    if not colon or not _NAME.fullmatch(name):
        refuse("--arm", text, "must be NAME:key=value,...", example)
    pairs = [part.partition("=") for part in rest.split(",") if part.strip()]
    if wrong := [key for key, equals, _ in pairs if not equals or not key.strip().isidentifier()]:
        refuse("--arm", text, f"{wrong[0]!r} is no key=value", example)
    settings = {key.strip(): yaml.safe_load(value) for key, _, value in pairs}
    if tuned := [key for key in settings if key in _ONE_FOR_ALL]:
        refuse(
            "--arm", text, f"{tuned[0]} is the same for all arms, or tuned for each", "--rates, --alphas or --steps"
        )
    kind = "adaptive" if "adaptive_method" in settings else "lora"
    return Arm(name, {"finetuning_type": kind, **settings})


def run_settings(
    given: Mapping[str, Any], arm: Arm, point: GridPoint, seed: int, steps: int | None, own_keys: Iterable[str]
) -> Settings:
    """Build the settings of one run, without ``output_dir`` and ``tokenized_path``.

    Args:
        given: settings of the YAML.
        arm: way to fine-tune.
        point: what is tuned.
        seed: seed of the run: start of the adapter, order of the rows, dropout.
        steps: optimizer steps; None for those of the YAML.
        own_keys: those of the YAML's keys that are the plugin's.
    """
    plugin = set(own_keys)
    dropped = {*_LEFT_OUT, *_KEYS_OF_VARIANTS}
    if not arm.all_of_yaml:
        same = arm.settings.get("adaptive_method") == given.get("adaptive_method") is not None
        shared = arm.settings["finetuning_type"] == "adaptive"
        dropped |= {key for key in plugin if not same and not (shared and key in _SHARED)}
    kept = {key: value for key, value in given.items() if key not in dropped}
    length = {} if steps is None else {"max_steps": steps}
    return {**kept, **_FORCED, **length, "seed": seed, **point.settings(), **arm.settings}


def without_secrets(settings: Mapping[str, Any]) -> Settings:
    """Return settings without tokens and keys of services, on which no result depends, for files."""
    return {key: value for key, value in settings.items() if not _SECRET.search(key)}
