"""Which models are compared, in which form each is served for which task, and which servers that takes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.errors import EvalError
from eval.protocols import Task


BASE = "base"
# The only values that vLLM takes for --max-lora-rank.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Model:
    """One row of the table: ``kind`` is ``base``, ``adapter`` or ``merged``; ``path`` a folder or a hub name."""

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
    """One server: a model under a name, adapters beside it, the jobs it gets, and where its tokenizer lies."""

    model: str
    name: str
    adapters: tuple[Model, ...]
    jobs: tuple[Job, ...]
    tokenizer: str


def plan_servings(models: Sequence[Model], tasks: Sequence[Task], on_cpu: bool) -> list[Serving]:
    """Divide models and tasks among as few servers as give right answers.

    vLLM's CPU kernels crash on prompt log-probabilities while LoRA is enabled. There, likelihood tasks of the base go
    to a server without LoRA and those of an adapter to its merged form.

    Raises:
        EvalError: an adapter is asked for likelihood tasks on a CPU and has no merged form.
    """
    base = next(model for model in models if model.kind == "base")
    adapters = tuple(model for model in models if model.kind == "adapter")
    merged = {model.name: model for model in models if model.kind == "merged"}
    likelihood = tuple(task for task in tasks if task.likelihood)
    apart = bool(on_cpu and adapters and likelihood)
    if apart:
        _require_merged([model.name for model in adapters if model.name not in merged], likelihood)
    with_lora = tuple(task for task in tasks if not (apart and task.likelihood))
    servings = [_serving(base, (), likelihood, base)] if apart else []
    if with_lora:
        servings.append(_serving(base, adapters, with_lora, base))
    named = {model.name for model in adapters}
    for name, model in merged.items():
        rest = tuple(tasks) if name not in named else (likelihood if apart else ())
        if rest:
            servings.append(_serving(model, (), rest, base))
    return servings


def _serving(model: Model, adapters: tuple[Model, ...], tasks: tuple[Task, ...], base: Model) -> Serving:
    jobs = [
        Job(served.name, served.kind, served.name, tokenizer_of(served, base.path), tasks)
        for served in (model, *adapters)
    ]
    return Serving(model.path, model.name, adapters, tuple(jobs), jobs[0].tokenizer)


def _require_merged(missing: list[str], likelihood: Sequence[Task]) -> None:
    if missing:
        raise EvalError(
            f"--adapter {', '.join(missing)}: {', '.join(task.name for task in likelihood)} are scored by likelihood, "
            "and vLLM on a CPU cannot compute the likelihood of a prompt while LoRA is enabled; give the merged model "
            f"too, under the same name: --merged {missing[0]}=DIR, or use --protocol llm_adapters"
        )


def tokenizer_of(model: Model, base: str) -> str:
    """Where a model's tokenizer and chat template lie: in its own folder when they came along, else the base's."""
    return model.path if (Path(model.path) / "tokenizer_config.json").is_file() else base


def lora_rank_to_reserve(adapters: Sequence[Path]) -> int:
    """The smallest ``--max-lora-rank`` that fits every adapter."""
    largest = max(largest_rank(adapter) for adapter in adapters)
    return next(rank for rank in LORA_RANKS if rank >= largest)


def largest_rank(adapter: Path) -> int:
    """The largest rank an adapter's config names."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return max(int(config["r"]), *(int(rank) for rank in (config.get("rank_pattern") or {}).values()), 0)


def problem_with(model: Model) -> str | None:
    """What is wrong with a model's path, or None. A base may be a hub name, adapters and merged models are folders."""
    folder, option = Path(model.path), f"--{model.kind} {model.name}={model.path}"
    if model.kind == "base":
        looks_local = model.path.startswith((".", "/", "~"))
        bad = looks_local and not (folder / "config.json").is_file()
        return f"--base {model.path}: there is no config.json in that folder" if bad else None
    needed = "adapter_config.json" if model.kind == "adapter" else "config.json"
    if not (folder / needed).is_file():
        what = "the output_dir of a training run" if model.kind == "adapter" else "the export_dir of a merge"
        return f"{option}: there is no {needed} in that folder; give {what}"
    if not any(folder.glob("*.safetensors")):
        return f"{option}: there are no weights (*.safetensors) in that folder"
    return _problem_with_config(model, option) if model.kind == "adapter" else None


def _problem_with_config(model: Model, option: str) -> str | None:
    try:
        rank = largest_rank(Path(model.path))
    except (ValueError, KeyError, TypeError) as error:
        return f"{option}: its adapter_config.json cannot be read ({error!r})"
    if rank > LORA_RANKS[-1]:
        return f"{option}: its largest rank {rank} is above {LORA_RANKS[-1]}, the most vLLM serves; give --merged"
    return None
