"""LLaMA-Factory's arguments with the plugin's keys: the generated dataclass, and settings as one flat mapping."""

import argparse
import dataclasses
import os
import re
import sys
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from llamafactory_adaptive.config.arguments import AdaptiveArguments
from llamafactory_adaptive.config.key_checks import unknown_key_problems
from llamafactory_adaptive.errors import refuse, refuse_all
from llamafactory_adaptive.methods import get_method, methods
from llamafactory_adaptive.options import coerce


Args = dict[str, Any]


def _generated_fields() -> list[tuple[str, Any, Any]]:
    """List the plugin's keys as dataclass fields with plain help: argparse rejects other metadata."""
    owners = [("", AdaptiveArguments)] + [(f"{name}_", get_method(name).Options) for name in methods()]
    fields = []
    for prefix, owner in owners:
        hints = typing.get_type_hints(owner)
        for entry in dataclasses.fields(owner):
            metadata = {"help": entry.metadata["help"]}
            fields.append(
                (prefix + entry.name, hints[entry.name], dataclasses.field(default=entry.default, metadata=metadata))
            )
    return fields


@cache
def adaptive_finetuning_arguments() -> type:
    """Build the FinetuningArguments class that has ``finetuning_type: adaptive`` and every key of the plugin.

    The attribute ``adaptive`` records the choice, and the type is set to ``lora`` before upstream reads it, so that
    all of its LoRA logic (resume, quantisation, DPO reference, export) applies.
    """
    from llamafactory.hparams.finetuning_args import FinetuningArguments

    def __post_init__(self: Any) -> None:  # noqa: N807
        self.adaptive = self.finetuning_type == "adaptive"
        if self.adaptive:
            self.finetuning_type = "lora"
        FinetuningArguments.__post_init__(self)

    upstream = FinetuningArguments.__dataclass_fields__["finetuning_type"]
    kind = (
        "finetuning_type",
        Literal["lora", "oft", "freeze", "full", "adaptive"],
        dataclasses.field(default="lora", metadata=dict(upstream.metadata)),
    )
    return dataclasses.make_dataclass(
        "FinetuningArguments",
        [kind, *_generated_fields()],
        bases=(FinetuningArguments,),
        namespace={"__post_init__": __post_init__, "__module__": __name__},
    )


def to_mapping(args: Mapping[str, Any] | list[str]) -> Args:
    """Convert the settings that the user gave, as YAML or as ``--key value``, to one flat mapping.

    Booleans written as text become booleans, so that ``"false"`` means one thing everywhere.

    Raises:
        AdaptiveConfigError: a flag is known to neither the host nor this plugin.
    """
    if not isinstance(args, Mapping):
        from llamafactory.extras.misc import is_env_enabled

        parser = flag_parser()
        given, unknown = parser.parse_known_args(args)
        names = [action.dest for action in parser._actions]
        stray = {word.lstrip("-").partition("=")[0]: word for word in unknown if word.startswith("--")}
        if stray and not is_env_enabled("ALLOW_EXTRA_ARGS"):
            refuse_all(*unknown_key_problems(stray, names))
        settings = vars(given)
    else:
        settings = dict(args)
    words = {"true": True, "false": False}
    settings = {k: words.get(v.lower(), v) if isinstance(v, str) else v for k, v in settings.items()}
    if isinstance(settings.get("output_dir"), str):
        settings["output_dir"] = os.path.expanduser(settings["output_dir"])  # as the host does
    return settings


def flag_parser() -> Any:
    """Build the host's argument parser without defaults or abbreviations: it returns only what was given."""
    from llamafactory.hparams import parser as host
    from transformers import HfArgumentParser

    parser = HfArgumentParser(host._TRAIN_ARGS, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser


def asks_for_adaptive(args: Mapping[str, Any] | list[str]) -> bool:
    """Tell whether the settings contain ``finetuning_type: adaptive``; cheap, without the host's parser."""
    if isinstance(args, Mapping):
        return args.get("finetuning_type") == "adaptive"
    text = " ".join(args)
    return re.search(r"--finetuning[_-]type[= ]adaptive\b", text) is not None


def our_keys(args: Mapping[str, Any] | list[str]) -> list[str]:
    """List the plugin's keys among the settings, misspelt ``adaptive_*`` keys included."""
    if isinstance(args, Mapping):
        words = [str(key) for key in args]  # YAML has keys of other types, too
    else:
        words = [word.lstrip("-").partition("=")[0] for word in args if word.startswith("--")]
    own = own_names()
    return [word for word in words if word in own or word.startswith("adaptive_")]


def own_names() -> set[str]:
    """Return the names that the plugin added to the host's argument class; none where that seam is not in place."""
    from llamafactory.hparams import parser as host
    from llamafactory.hparams.finetuning_args import FinetuningArguments

    names = {name for owner in host._TRAIN_ARGS if issubclass(owner, FinetuningArguments)
             for name in owner.__dataclass_fields__}  # fmt: skip
    return names - set(FinetuningArguments.__dataclass_fields__)


def check_config_file(path: Path) -> None:
    """Refuse a file of settings that the host cannot read.

    Raises:
        AdaptiveConfigError: there is no such file, or its name ends in neither ``.yaml`` nor ``.yml``.
    """
    why, suggestion = "", "the path of a YAML file"
    if path.suffix == ".json":  # the host's own reader of JSON fails on every file
        why, suggestion = "LLaMA-Factory reads settings as YAML", "a copy named .yaml: JSON is YAML, too"
    elif path.suffix not in (".yaml", ".yml"):
        why, suggestion = "must be a YAML file", "a name ending in .yaml"
    elif not os.path.isfile(path):
        why = "there is no such file"
    if why:
        refuse("config", str(path), why, suggestion)


def command_line_settings() -> Args | list[str]:
    """Read the settings of this process's command line as the host does: a mapping, or the words themselves.

    Raises:
        AdaptiveConfigError: the file is missing or no YAML mapping.
    """
    from llamafactory.hparams import read_args

    path = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if path is not None and path.suffix in (".yaml", ".yml", ".json"):
        check_config_file(path)
    try:
        settings: Args | list[str] = read_args()
    except Exception as error:  # omegaconf raises many kinds for text that is no YAML mapping
        refuse("config", str(path), f"it cannot be read ({error})", "a YAML file of `key: value` lines", cause=error)
    return settings


def split_names(value: Any) -> list[str]:
    """Split a comma-separated setting or a list into names without surrounding blanks."""
    if not value:
        return []
    names = value if isinstance(value, (list, tuple)) else str(value).split(",")
    return [str(name).strip() for name in names]


def adapter_to_go_on_with(args: Args) -> Path | None:
    """Return the trained adapter that the host loads, where it makes no new LoRA configuration; None for a new one."""
    named = [] if args.get("create_new_adapter") else split_names(args.get("adapter_name_or_path"))
    return Path(named[-1]) if named else None


def run_seed(args: Mapping[str, Any]) -> int:
    """Return the run's seed; the Trainer's default where none is set, or one that other checks report as wrong."""
    try:
        return int(coerce(args.get("seed"), int))
    except (ValueError, TypeError, OverflowError):
        return 42
