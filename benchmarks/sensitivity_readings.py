"""Readings of Sensitivity-LoRA's metrics for sensitivity_transforms.py: scores, what they spend, how they agree."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import short_runs
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor, nn

from llamafactory_adaptive.api.targets import find_targets
from llamafactory_adaptive.calibration.batches import Batch, count_tokens, make_batches
from llamafactory_adaptive.calibration.input_moments import InputSecondMoments
from llamafactory_adaptive.methods import ScoringContext, make_method
from llamafactory_adaptive.methods._module_metrics import log_compress
from llamafactory_adaptive.methods.sensitivity import Sensitivity, SensitivityOptions
from llamafactory_adaptive.ranks.allocation import Bounds, allocate
from llamafactory_adaptive.ranks.module_names import module_type
from llamafactory_adaptive.ranks.plan import ModuleShape


ELIGIBLE = ("none", "log", "per_type", "log_per_type")
READINGS = (*ELIGIBLE, "no_first_token")
CONTROLS = ("uniform", "random")
Moments = dict[str, dict[str, Tensor]]


class LogPerType(Sensitivity):
    """log(1 + metric / median of the modules of its type)."""

    def _transform(self, metric_M: Tensor, names: list[str]) -> Tensor:
        types = [module_type(name) for name in names]
        result_M = metric_M.clone()
        for kind in dict.fromkeys(types):
            members = torch.tensor([each == kind for each in types])
            result_M[members] = log_compress(metric_M[members])
        return result_M


def scores(reading: str, moments: Moments, shapes: Sequence[ModuleShape], rank: int, seed: int = 0) -> list[float]:
    """Scores of all modules, from ``moments`` of all tokens and of those that are not first in their row."""
    context = ScoringContext(tuple(shapes), rank, seed)
    if reading in CONTROLS:
        return list(make_method(reading, {}).score({}, context).values.values())
    options = SensitivityOptions(transform="none" if reading in ("log_per_type", "no_first_token") else reading)
    method = (LogPerType if reading == "log_per_type" else Sensitivity)(options)
    kept = moments["later" if reading == "no_first_token" else "all"]
    return list(method.score(kept, context).values.values())


def bounds(shapes: Sequence[ModuleShape], rank: int) -> Bounds:
    """Budget and limits as a run has them by default."""
    costs = [shape.in_features + shape.out_features for shape in shapes]
    upper = [min(4 * rank, shape.in_features, shape.out_features) for shape in shapes]
    return Bounds(costs, rank * sum(costs), [1] * len(costs), upper)


def spending(values: Sequence[float], limits: Bounds) -> dict[str, float]:
    ranks = allocate(values, limits).ranks
    spent = sorted((rank * cost for rank, cost in zip(ranks, limits.costs, strict=True)), reverse=True)
    shares = [rank / sum(ranks) for rank in ranks]
    return {
        "top_three": sum(sorted(values)[-3:]) / sum(values),
        "top_three_spent": sum(spent[:3]) / sum(spent),
        "at_cap": sum(rank == high for rank, high in zip(ranks, limits.upper, strict=True)),
        "at_floor": sum(rank == 1 for rank in ranks),
        "median_rank": statistics.median(ranks),
        "entropy": -sum(share * math.log(share) for share in shares) / math.log(len(shares)),
    }


def agreement(first: Sequence[float], second: Sequence[float], limits: Bounds) -> dict[str, float]:
    one, other = (allocate(values, limits).ranks for values in (first, second))
    apart = sum(abs(a - b) for a, b in zip(one, other, strict=True))
    return {
        "scores": float(spearmanr(first, second).statistic),
        "ranks": float(spearmanr(one, other).statistic),
        "moved": apart / (sum(one) + sum(other)),
    }


def moments_of(model: nn.Module, parts: Mapping[str, Sequence[short_runs.Row]], file: Path) -> dict[str, Moments]:
    """Moments of every part of the rows, and of both halves together; read from the file where it is there."""
    if not file.exists():
        flat = {}
        for part, rows in parts.items():
            for kind in ("all", "later"):
                sums, tokens = _measure(model, rows, kind == "all")
                flat |= {f"{part}/{kind}/{name}": value for name, value in sums.items()}
                flat[f"{part}/{kind}/tokens"] = torch.tensor(tokens)
        save_file(flat, file)
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, value in load_file(file).items():
        part, kind, name = key.split("/")
        found.setdefault(part, {}).setdefault(kind, {})[name] = value
    return {**found, "both": {kind: _together(found, kind) for kind in ("all", "later")}}


def _measure(model: nn.Module, rows: Sequence[short_runs.Row], first: bool) -> tuple[dict[str, Tensor], int]:
    """Moments and how many tokens they are of; without the first token of every row unless ``first``."""
    counted = make_batches(rows, 8, 0)
    for batch in counted:
        batch.attention_mask[:, 0] = int(first)

    def forward(model: nn.Module, batch: Batch) -> None:
        seen = batch.attention_mask.clone()
        seen[:, 0] = 1  # it is read all the same
        model.base_model(input_ids=batch.input_ids, attention_mask=seen, use_cache=False)

    tokens = count_tokens(counted)
    return InputSecondMoments()(model, find_targets(model, "all-linear"), counted, forward), tokens


def _together(found: Mapping[str, Moments], kind: str) -> dict[str, Tensor]:
    one, other = (found[half][kind] for half in ("first_half", "second_half"))
    return {name: (one["tokens"] * one[name] + other["tokens"] * other[name]) / (one["tokens"] + other["tokens"])
            for name in one if name != "tokens"}  # fmt: skip


def figures(moments: Mapping[str, Moments], shapes: Sequence[ModuleShape], rank: int) -> dict[str, Any]:
    limits = bounds(shapes, rank)
    result = {}
    for reading in READINGS:
        values = {part: scores(reading, each, shapes, rank) for part, each in moments.items()}
        result[reading] = {
            **spending(values["both"], limits),
            "halves": agreement(values["first_half"], values["second_half"], limits),
            **({"data_sets": agreement(values["both"], values["other"], limits)} if "other" in values else {}),
        }
    return result
