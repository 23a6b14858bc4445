"""Models to compare, the form in which each is served for each task, and the servers that this takes."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.errors import EvalError
from eval.protocols import Task
from eval.reading import read_object
from eval.redaction import excerpt


BASE = "base"
LONGEST_NAME = 200  # bytes: it is part of a log's file name, and eval.compare reads no longer one
# The only values that vLLM takes for --max-lora-rank.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Files of a model folder that an answer depends on.
_CONTENT = ("*config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "tokenizer*", "vocab*", "merges.txt",
            "*.model", "*.jinja", "special_tokens_map.json", "added_tokens.json")  # fmt: skip


@dataclass(frozen=True)
class Model:
    """One model to evaluate: ``kind`` is ``base``, ``adapter`` or ``merged``; ``path`` is a folder or a hub name."""

    name: str
    kind: str
    path: str


@dataclass(frozen=True)
class Job:
    """Tasks of one model in one of its forms, asked under the name ``served_as``."""

    model: str
    form: str
    served_as: str
    tokenizer: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Serving:
    """One server: the model that it loads, its adapters, the jobs sent to it, and where its tokenizer is."""

    model: str
    name: str
    adapters: tuple[Model, ...]
    jobs: tuple[Job, ...]
    tokenizer: str


def plan_servings(
    models: Sequence[Model],
    tasks: Sequence[Task],
    on_cpu: bool,
    base_tokenizer: str | None = None,
    base_row: bool = True,
) -> list[Serving]:
    """Divide models and tasks among as few servers as give correct answers.

    vLLM's CPU kernels crash on prompt log-probabilities while LoRA is enabled. There, likelihood tasks of the base go
    to a server without LoRA and those of an adapter to its merged form.

    Args:
        models: the base, adapters and merged models.
        tasks: what each is asked.
        on_cpu: whether our own server runs on vLLM's CPU build.
        base_tokenizer: folder or hub name of the tokenizer that stands in for the base's own.
        base_row: whether the base is asked too; else it only carries the adapters.

    Raises:
        EvalError: an adapter is asked for likelihood tasks on a CPU and has no merged form.
    """
    base = next(model for model in models if model.kind == "base")
    tokenizer = base_tokenizer or base.path
    adapters = tuple(model for model in models if model.kind == "adapter")
    merged = {model.name: model for model in models if model.kind == "merged"}
    likelihood = tuple(task for task in tasks if task.likelihood)
    apart = bool(on_cpu and adapters and likelihood)
    if apart:
        _require_merged([model.name for model in adapters if model.name not in merged], likelihood)
    with_lora = tuple(task for task in tasks if not (apart and task.likelihood))
    asked = (base,) if base_row else ()
    servings = [_serving(base, (), asked, likelihood, tokenizer)] if apart and base_row else []
    if with_lora and (base_row or adapters):
        servings.append(_serving(base, adapters, (*asked, *adapters), with_lora, tokenizer))
    named = {model.name for model in adapters}
    for name, model in merged.items():
        rest = tuple(tasks) if name not in named else (likelihood if apart else ())
        if rest:
            servings.append(_serving(model, (), (model,), rest, tokenizer))
    return servings


def _serving(
    model: Model, adapters: tuple[Model, ...], asked: tuple[Model, ...], tasks: tuple[Task, ...], tokenizer: str
) -> Serving:
    jobs = tuple(Job(one.name, one.kind, one.name, tokenizer_of(one, tokenizer), tasks) for one in asked)
    return Serving(model.path, model.name, adapters, jobs, tokenizer_of(model, tokenizer))


def _require_merged(missing: list[str], likelihood: Sequence[Task]) -> None:
    if missing:
        raise EvalError(
            f"--adapter {', '.join(missing)}: {', '.join(task.name for task in likelihood)} are scored by likelihood, "
            "and vLLM on a CPU cannot compute the likelihood of a prompt while LoRA is enabled; give the merged model "
            f"too, under the same name: --merged {missing[0]}=DIR, or use --protocol llm_adapters"
        )


def tokenizer_of(model: Model, base_tokenizer: str) -> str:
    """Return the place of a model's tokenizer and chat template: its own folder if they are there, else the base's."""
    came_along = model.kind != "base" and os.path.isfile(Path(model.path) / "tokenizer_config.json")
    return model.path if came_along else base_tokenizer


def content_digest(path: str) -> str | None:
    """Compute the SHA-256 of the names and contents of a model folder's files; None for a hub name."""
    folder = Path(path)
    if not os.path.isdir(folder):
        return None
    folder_digest = hashlib.sha256()
    for file in sorted({file for pattern in _CONTENT for file in folder.glob(pattern) if file.is_file()}):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        folder_digest.update(f"{file.name} {digest}\n".encode())
    return folder_digest.hexdigest()


def base_warnings(models: Sequence[Model]) -> Iterator[str]:
    """Warn of every adapter whose config names another base than the one it is served on, one sentence each."""
    base = next(model for model in models if model.kind == "base")
    known = {name for name in (_model_name(base.path), _model_name(_own_name(base.path))) if name}
    for model in models:
        if model.kind != "adapter" or not (Path(model.path) / "adapter_config.json").is_file():
            continue
        trained = read_object(Path(model.path) / "adapter_config.json").get("base_model_name_or_path")
        if isinstance(trained, str) and _model_name(trained) and _model_name(trained) not in known:
            yield (
                f"{model.name} was trained on {excerpt(trained, 200)}, as its adapter_config.json says, and is served "
                f"on {base.path}: unless these are the same model, its figures mean nothing"
            )


def _model_name(path: str) -> str:
    """Return the last part of a folder or hub name in lower case; in the hub's cache, the model's name."""
    cached = re.search(r"models--(?:[^/\\]*--)?([^/\\]+)[/\\]+snapshots", path)
    return (cached.group(1) if cached else re.split(r"[/\\]", path.rstrip("/\\"))[-1]).lower()


def _own_name(folder: str) -> str:
    """Read the name in a model folder's config.json; empty where there is none."""
    try:
        name = read_object(Path(folder) / "config.json").get("_name_or_path")
    except EvalError:
        return ""
    return name if isinstance(name, str) else ""


def lora_rank_to_reserve(adapters: Sequence[Path]) -> int:
    """Return the smallest ``--max-lora-rank`` that fits every adapter."""
    largest = max(largest_rank(adapter) for adapter in adapters)
    return next(rank for rank in LORA_RANKS if rank >= largest)


def largest_rank(adapter: Path) -> int:
    """Return the largest rank in an adapter's config.

    Raises:
        EvalError: the config cannot be read, or a rank in it is no whole number from 1.
    """
    config = read_object(adapter / "adapter_config.json")
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise EvalError(f"rank_pattern must map module names to ranks, this is {type(pattern).__name__}")
    ranks: dict[str, Any] = {"r": config.get("r"), **pattern}
    for name, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            raise EvalError(f"{name[:80]} is {str(rank)[:40]}: a rank must be a whole number from 1")
    return int(max(ranks.values()))


def problem_with(model: Model) -> str | None:
    """Describe what is wrong with a model's path; None when nothing is.

    A base may be a hub name; adapters and merged models must be folders.
    """
    folder, option = Path(model.path), f"--{model.kind} {model.name}={model.path}"
    if model.kind == "base":
        if not model.path or model.path.startswith("-"):  # vLLM would take it for an option
            return f"--base {model.path!r}: it must be a folder or a hub name; try ./FOLDER"
        looks_local = model.path.startswith((".", "/", "~"))
        bad = looks_local and not os.path.isfile(folder / "config.json")
        return f"--base {model.path}: there is no config.json in that folder" if bad else None
    needed = "adapter_config.json" if model.kind == "adapter" else "config.json"
    if not os.path.isfile(folder / needed):
        what = "the output_dir of a training run" if model.kind == "adapter" else "the export_dir of a merge"
        return f"{option}: there is no {needed} in that folder; give {what}"
    if not any(folder.glob("*.safetensors")):
        return f"{option}: there are no weights (*.safetensors) in that folder"
    return _problem_with_config(model, option) if model.kind == "adapter" else None


def _problem_with_config(model: Model, option: str) -> str | None:
    try:
        rank = largest_rank(Path(model.path))
    except EvalError as error:
        return f"{option}: its adapter_config.json cannot be read ({error})"
    if rank > LORA_RANKS[-1]:
        return f"{option}: its largest rank {rank} is above {LORA_RANKS[-1]}, the most vLLM serves; give --merged"
    return None
