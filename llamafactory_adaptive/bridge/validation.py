"""All checks of a run's settings that need neither model nor data, with every problem found in one go.

The host would report part of them too, but only after the model has been scored.
"""

import dataclasses
import difflib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamafactory_adaptive.bridge.arguments import Args, flag_parser, our_keys, own_names, run_seed, split_names
from llamafactory_adaptive.bridge.host_check import host_value_problems
from llamafactory_adaptive.bridge.host_texts import text_problems
from llamafactory_adaptive.config.arguments import AdaptiveArguments
from llamafactory_adaptive.config.deepspeed_settings import is_inline
from llamafactory_adaptive.config.host_conflicts import (
    check_conflicts,
    check_sampling_conflicts,
)
from llamafactory_adaptive.config.host_environment import check_environment
from llamafactory_adaptive.config.init_checks import check_init
from llamafactory_adaptive.config.key_checks import (
    check_budget,
    check_given,
    check_kind,
    check_search,
    check_without_plan,
    unknown_key_problems,
)
from llamafactory_adaptive.config.placement import check_placement
from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.errors import PlanError, Problem, refuse_all
from llamafactory_adaptive.files import read_mapping
from llamafactory_adaptive.launcher import decides
from llamafactory_adaptive.methods import get_method, is_dynamic, make_method, methods, nearest
from llamafactory_adaptive.options import check_fields, contradictions
from llamafactory_adaptive.ranks.search_config import GivenRanksConfig, SearchConfig


def parse_config(args: Mapping[str, Any]) -> AdaptiveConfig:
    """Validate everything that can be checked before model or data are touched.

    Raises:
        AdaptiveConfigError: settings are invalid; the message gives every problem found.
    """
    problems = _unknown_keys(args) + text_problems(args)
    told = {problem.key for problem in problems}
    args = {key: value for key, value in args.items() if key not in told}
    common, faults = check_fields(AdaptiveArguments, "", args)
    problems += faults
    options: Mapping[str, Any] = {}
    if common["adaptive_method"] not in methods():
        name = common["adaptive_method"]
        problems.append(
            Problem(
                "adaptive_method",
                name,
                f"must be one of {', '.join(sorted(methods()))}",
                f"adaptive_method: {nearest(name)}",
            )
        )
    else:
        method = common["adaptive_method"]
        options, faults = check_fields(get_method(method).Options, f"{method}_", args)
        problems += faults + _foreign_options(args, method)
    lora_rank, lora_alpha, max_rank, faults = check_budget(args, common)
    problems += faults + check_placement(common)
    search: SearchConfig | None = None
    given: GivenRanksConfig | None = None
    if common["adaptive_method"] in methods():
        search, given, faults = _in_training(args, common, options, lora_rank, max_rank)
        problems += faults
    problems += check_conflicts(args) + check_environment(args) + _wrong_choices(args)
    problems += [problem for problem in _missing_files(args, common) if problem.key not in told]
    told = {problem.key for problem in problems}
    problems += [problem for problem in host_value_problems(args) if problem.key not in told]
    refuse_all(*problems)
    seed = common["adaptive_calibration_seed"]
    calibration = CalibrationConfig(
        dataset=common["adaptive_calibration_dataset"],
        samples=common["adaptive_calibration_samples"],
        batch_size=common["adaptive_calibration_batch_size"],
        seed=run_seed(args) if seed is None else seed,
    )
    method, budget = common["adaptive_method"], (lora_rank, lora_alpha, max_rank)
    by_start = make_method(method, options).traits.scales_by_start
    return AdaptiveConfig.from_checked(common, method, options, budget, calibration, search, by_start, given)


def _in_training(
    args: Mapping[str, Any], common: Mapping[str, Any], options: Mapping[str, Any], lora_rank: int, max_rank: int
) -> tuple[SearchConfig | None, GivenRanksConfig | None, list[Problem]]:
    """Return how the method changes ranks or trains given ones, and the settings that cannot go with that."""
    name, cls = common["adaptive_method"], get_method(common["adaptive_method"])
    made = make_method(name, options)
    problems = contradictions(cls.Options(**options))
    problems += check_kind(args, name, is_dynamic(cls), made.traits.strategy, made.traits.spectral)
    given = common["adaptive_plan"] is not None
    problems += check_init(args, common, name, made.traits.triplets_with_plan if given else is_dynamic(cls))
    if made.traits.samples:
        problems += check_sampling_conflicts(args)
    if given:
        stage, faults = check_given(args, made, run_seed(args))
        return None, stage, problems + faults
    problems += check_without_plan(args, name, made)
    if not made.traits.dynamic:
        return None, None, problems
    search, faults = check_search(args, common, name, made, lora_rank, max_rank, run_seed(args))
    return search, None, problems + faults


def _unknown_keys(args: Mapping[str, Any]) -> list[Problem]:
    from llamafactory.extras.misc import is_env_enabled
    from llamafactory.hparams import RayArguments
    from llamafactory.hparams import parser as host

    if is_env_enabled("ALLOW_EXTRA_ARGS"):
        return unknown_key_problems({key: args[key] for key in our_keys(args)}, own_names())
    owners = [*host._TRAIN_ARGS, RayArguments]
    known = {entry.name for owner in owners for entry in dataclasses.fields(owner) if entry.init}
    return unknown_key_problems(args, known)


def _wrong_choices(args: Mapping[str, Any]) -> list[Problem]:
    """Find the host's own keys whose value is none of their few words; the host fails on them after scoring."""
    problems, own = [], own_names()
    for action in flag_parser()._actions:
        value, allowed = args.get(action.dest), [str(choice) for choice in action.choices or ()]
        if not allowed or action.nargs or action.dest in own or value is None:
            continue
        if value not in allowed and str(value) not in allowed:
            words = f"must be one of {', '.join(allowed)}"
            # What YAML makes of the bare word.
            shown = '"no"' if value is False and "no" in allowed else allowed[0]
            problems.append(Problem(action.dest, value, words, f"{action.dest}: {shown}"))
    return problems


def _foreign_options(args: Mapping[str, Any], method: str) -> list[Problem]:
    """Find options of methods other than the chosen one, where they would have no effect."""
    return [
        Problem(
            key,
            args[key],
            f"it belongs to adaptive_method: {other}, and this run uses {method}",
            f"adaptive_method: {other}",
        )
        for other in methods()
        if other != method
        for key in args
        if key in {f"{other}_{entry.name}" for entry in dataclasses.fields(get_method(other).Options)}
    ]


def _missing_files(args: Mapping[str, Any], common: Mapping[str, Any]) -> list[Problem]:
    """Find required keys without a value, and files, folders, packages and templates that do not exist."""
    problems = [
        Problem(key, args.get(key), "it is required", f"{key}: <path>")
        for key in ("model_name_or_path", "output_dir")
        if not args.get(key)
    ]
    if args.get("lora_target") in ("", []):
        problems.append(Problem("lora_target", args["lora_target"], "it names no layer", "lora_target: all"))
    if args.get("do_train") and not args.get("dataset"):
        problems.append(Problem("dataset", None, "training needs one", "dataset: alpaca_en_demo"))
    for key, path, remedy in (
        ("adaptive_plan", common["adaptive_plan"], "writing one with `llamafactory-adaptive plan`"),
        ("deepspeed", args.get("deepspeed"), "deepspeed: examples/deepspeed/ds_z2_config.json"),
    ):
        if key == "adaptive_plan" and not decides():
            continue  # rank 0 reads it and sends it to the other nodes
        if isinstance(path, str) and not is_inline(path) and not Path(path).is_file():
            problems.append(Problem(key, path, "there is no such file", remedy))
    if args.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        problems.append(
            Problem("deepspeed", args["deepspeed"], "the package is not installed", "pip install deepspeed")
        )
    template = args.get("template")
    if isinstance(template, str) and template not in _templates():
        near = difflib.get_close_matches(template, _templates(), n=1, cutoff=0.0)[0]
        problems.append(Problem("template", template, "LLaMA-Factory has no such template", f"template: {near}"))
    model = str(args.get("model_name_or_path") or "")
    if model.startswith((".", "/", "~")) and not os.path.exists(os.path.expanduser(model)):
        problems.append(Problem("model_name_or_path", model, "there is no such folder", "a folder or a hub name"))
    if _same_folder(model, args.get("output_dir")):
        reason = "it is the base model's folder, whose tokenizer and model card would be written over"
        problems.append(Problem("output_dir", args["output_dir"], reason, "a folder of its own"))
    return problems + _dataset_problems(args, common["adaptive_calibration_dataset"])


def _same_folder(model: str, output: Any) -> bool:
    places = [os.path.realpath(os.path.expanduser(name)) for name in (model, output or "") if name]
    return len(places) == 2 and places[0] == places[1] and os.path.isdir(places[0])


def _templates() -> list[str]:
    from llamafactory.data.template import TEMPLATES

    return list(TEMPLATES)


def _dataset_problems(args: Mapping[str, Any], calibration: str | None) -> list[Problem]:
    """Find unknown data sets, and calibration data that is no training split or overlaps held-out rows."""
    held_out, trained, scored = (split_names(v) for v in (args.get("eval_dataset"), args.get("dataset"), calibration))
    problems = [
        Problem("adaptive_calibration_dataset", name, "it is the eval_dataset; scores may use training data only",
                "leaving it out")
        for name in scored
        if name in held_out
    ]  # fmt: skip
    if args.get("val_size") and set(scored) & set(trained) and set(scored) != set(trained):
        reason = "val_size holds rows of the merged training set out, which a part of it would bring back"
        problems.append(Problem("adaptive_calibration_dataset", calibration, reason, "leaving it out"))
    return problems + names_not_in_info(args, {"dataset": trained, "eval_dataset": held_out,
                                                "adaptive_calibration_dataset": scored})  # fmt: skip


def names_not_in_info(args: Mapping[str, Any], names: Mapping[str, list[str]]) -> list[Problem]:
    """Find names of data sets that ``dataset_info.json`` does not have, by the key that they were given under."""
    folder = args.get("dataset_dir")
    named = [(key, name) for key, listed in names.items() for name in listed]
    if args.get("tokenized_path") or str(folder).startswith(("ONLINE", "REMOTE:")):
        return []  # tables of a hub are the host's to judge
    if isinstance(folder, dict):
        trained = names["dataset"]
        return [problem for key, name in named for problem in _entry_problems(key, name, folder, None, trained)]
    folder = str(folder or "data")
    info_path = Path(folder) / "dataset_info.json"
    if not os.path.isfile(info_path):
        lost = [Problem("dataset_dir", folder, f"there is no {info_path}", "dataset_dir: examples/data")]
        return lost if named else []
    try:
        info = read_mapping(info_path, str(info_path), finite=False)
    except PlanError as error:
        return [Problem("dataset_dir", folder, str(error), "mending the file")]
    return [
        problem for key, name in named for problem in _entry_problems(key, name, info, info_path, names["dataset"])
    ]


_FROM_A_HUB = ("hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name")


def _entry_problems(key: str, name: str, info: Args, info_path: Path | None, trained: list[str]) -> list[Problem]:
    """Find what is wrong with one entry of a table of data sets, for the key that names it.

    Args:
        info: the table: a ``dataset_info.json``, or ``dataset_dir`` itself where that is a mapping.
        info_path: where it was read from; None for a mapping.
    """
    where = info_path or "dataset_dir"
    if name not in info:
        known = ", ".join(sorted(map(str, info))[:5])
        return [Problem(key, name, f"it is not in {where}", f"one of {known}" if known else "an entry for it there")]
    entry, problems = info[name], []
    if not isinstance(entry, dict):
        return [Problem(key, name, f"its entry in {where} is no mapping", '{"file_name": "<file>"} there')]
    if info_path is None and not any(place in entry for place in _FROM_A_HUB):
        reason = "its entry in dataset_dir names nothing on a hub; the host finds local files only from a folder"
        return [Problem(key, name, reason, f"{' or '.join(_FROM_A_HUB)} there, or dataset_dir: <folder>")]
    if info_path and "file_name" in entry and not os.path.exists(info_path.parent / str(entry["file_name"])):
        lost = info_path.parent / str(entry["file_name"])
        problems.append(Problem(key, name, f"its file {lost} does not exist", "writing or downloading the file"))
    split = str(entry.get("split", "train"))
    if key == "adaptive_calibration_dataset" and name not in trained and not split.startswith("train"):
        reason = f"its split is {split!r}; scores may use training data only"
        problems.append(Problem(key, name, reason, "an entry with split: train"))
    return problems
