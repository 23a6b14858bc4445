"""Calibration batches, and scores of modules measured on them."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llamafactory_adaptive.adapter.lora import keep_4bit_unpacked_on_cpu
from llamafactory_adaptive.api.settings import chosen_method, provenance, python_errors
from llamafactory_adaptive.api.targets import find_targets
from llamafactory_adaptive.calibration.batches import Batch, count_tokens, make_batches
from llamafactory_adaptive.calibration.devices import input_device
from llamafactory_adaptive.calibration.measurement import Forward, needs_rows
from llamafactory_adaptive.errors import CalibrationError, refuse
from llamafactory_adaptive.files import digest_of
from llamafactory_adaptive.methods import Scores, ScoringContext, make_method
from llamafactory_adaptive.ranks.plan import ModuleShape


logger = logging.getLogger("llamafactory.adaptive")


@dataclass(frozen=True)
class ModuleScores:
    """Statistics of a model's target modules, from which ranks can be planned for any budget.

    Attributes:
        method: registered name of the method.
        options: every option of the method, as used.
        seed: seed of the methods that draw at random.
        shapes: the target modules in model order: name, ``in_features``, ``out_features``.
        statistics: one tensor on the CPU by module name, as the method measured it; empty where it measures nothing.
        facts: samples, tokens and seconds of the measurement, and where it took place.
    """

    method: str
    options: Mapping[str, Any]
    seed: int
    shapes: tuple[ModuleShape, ...]
    statistics: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def score(self, lora_rank: int = 8) -> Scores:
        """Score every module: non-negative ``values`` by name, and the method's own figures as ``metrics``.

        Args:
            lora_rank: the budget; only ``sensitivity`` with ``allocation="pra"`` uses it.

        Raises:
            CalibrationError: a module's statistics are not finite, are negative, or are zero throughout.
        """
        scores: Scores = make_method(self.method, self.options).score(
            self.statistics, ScoringContext(self.shapes, lora_rank, self.seed)
        )
        return scores


def calibration_batches(rows: Iterable[Mapping[str, Any]], batch_size: int = 8, pad_id: int | None = 0) -> list[Batch]:
    """Pad token rows into batches to score on, rows of similar length together.

    Args:
        rows: mappings with ``input_ids`` and, if not all tokens are trained on, ``labels`` of the same length, with
            -100 where no loss is taken; without ``labels`` the ``input_ids`` are taken. Positions whose
            ``attention_mask`` is 0 are left out. 128 rows of the training data are a good number.
        batch_size: samples per batch.
        pad_id: token with which shorter rows are filled up. It never counts, so any token of the vocabulary will do;
            None (a tokenizer without a padding token) means 0.

    Returns:
        Batches of ``input_ids``, ``attention_mask`` and ``labels``, each of shape (samples, tokens), longest first.

    Raises:
        AdaptiveConfigError: there are no rows, a row has no tokens or labels of another length, or the batch size is
            below 1.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        refuse("batch_size", batch_size, "must be a whole number of at least 1", "batch_size=8")
    plain = [_tokens(number, row) for number, row in enumerate(rows)]
    if not plain:
        refuse("rows", [], "there must be at least one row", "128 tokenised rows of the training data")
    return make_batches(plain, batch_size, pad_id or 0)


def _tokens(number: int, row: Mapping[str, Any]) -> dict[str, list[int]]:
    """Read one row, without the positions that its attention mask leaves out."""
    remedy = "rows such as {'input_ids': [1, 2, 3], 'labels': [-100, 2, 3]}"
    if "input_ids" not in row:
        refuse(f"rows[{number}]", sorted(row), "it has no input_ids", remedy)
    ids = [int(token) for token in row["input_ids"]]
    labels = ids if row.get("labels") is None else [int(label) for label in row["labels"]]
    mask = [1] * len(ids) if row.get("attention_mask") is None else [int(flag) for flag in row["attention_mask"]]
    lengths = {"input_ids": len(ids), "labels": len(labels), "attention_mask": len(mask)}
    if len(set(lengths.values())) > 1:
        refuse(f"rows[{number}]", lengths, "all must have one length", remedy)
    kept = [index for index, flag in enumerate(mask) if flag]
    if not kept:
        refuse(f"rows[{number}]", lengths, "it holds no token", "leaving the row out")
    return {"input_ids": [ids[index] for index in kept], "labels": [labels[index] for index in kept]}


def score_modules(
    model: nn.Module,
    batches: Sequence[Batch],
    method: str = "sensitivity",
    target_modules: str | Sequence[str] = "all-linear",
    forward: Forward | None = None,
    seed: int = 0,
    **options: Any,
) -> ModuleScores:
    """Measure how much each module of a base model matters, before any adapter is attached.

    The model is left as it was: no hooks, the same training mode and ``requires_grad``, also after an exception.

    Args:
        model: any decoder whose targets are ``nn.Linear`` (8- and 4-bit ones of bitsandbytes are), on its device.
        batches: batches from :func:`calibration_batches`; they are moved to the model's device. An empty list will do
            for ``"srlora"``, which looks at weights alone, and for methods that measure nothing.
        method: ``"sensitivity"``, ``"fisher"``, ``"gora_ranks"`` or ``"srlora"``; or ``"prilora"``, ``"by_type"`` and
            the controls ``"uniform"`` and ``"random"``, which measure nothing.
        target_modules: ``"all-linear"`` for every linear layer but the output head, or names of modules: whole ones
            or their last parts, as in ``["q_proj", "v_proj"]``.
        forward: ``forward(model, batch)`` runs the model on a batch, where its signature is not
            ``model(input_ids=..., attention_mask=..., use_cache=False)``. It returns logits of shape (samples,
            tokens, vocabulary) or an output that has them as ``logits``; they are read by ``weighting="gradient"``
            alone.
        seed: seed of the methods that draw at random.
        **options: options of the method: its YAML keys without ``sensitivity_``, such as ``transform="log"``.

    Returns:
        What was measured, for :func:`plan_ranks`.

    Raises:
        AdaptiveConfigError: the method or an option is unknown, or the model does not have the targets.
        CalibrationError: a module saw no token, its inputs are not finite, or memory ran out.
    """
    _, values = chosen_method(method, options, dynamic=False)
    targets = find_targets(model, target_modules)
    measurement, started = make_method(method, values).measurement(), time.perf_counter()
    statistics: dict[str, Tensor] = {}
    _check_batches(batches, needed=needs_rows(measurement))
    if measurement is not None:
        keep_4bit_unpacked_on_cpu(model)
        device = input_device(model)
        there = [batch.to(device) for batch in batches]
        try:
            with python_errors(method):
                statistics = measurement(model, targets, there, *([] if forward is None else [forward]))
        except torch.OutOfMemoryError as error:
            raise CalibrationError(
                "out of memory while scoring: lower batch_size, or load the model in 4-bit"
            ) from error
    shapes = tuple(ModuleShape(name, module.in_features, module.out_features) for name, module in targets.items())
    facts = {**provenance(model, seed), **_facts(batches, started)}
    return ModuleScores(method, values, seed, shapes, statistics, facts)


def _check_batches(batches: Sequence[Batch], needed: bool) -> None:
    """Refuse what is no batch, and an empty list where batches are ``needed`` to measure."""
    wrong = [type(batch).__name__ for batch in batches if not isinstance(batch, Batch)]
    if wrong or (needed and not batches):
        reason = "these must be what calibration_batches returns"
        refuse("batches", wrong[:1], reason, "batches=calibration_batches(rows, batch_size=8)")


def _facts(batches: Sequence[Batch], started: float) -> dict[str, Any]:
    return {
        "calibration_tokens": count_tokens(batches),
        "calibration_samples": sum(len(batch.input_ids) for batch in batches),
        "calibration_batch_size": max((len(batch.input_ids) for batch in batches), default=0),
        "calibration_rows_sha256": digest_of([batch.input_ids.tolist() for batch in batches]),
        "calibration_seconds": round(time.perf_counter() - started, 3),
    }
