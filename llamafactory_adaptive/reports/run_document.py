"""A finished run as one document: what ``report --json`` prints, and what the page of a run shows."""

from collections.abc import Mapping, Sequence
from typing import Any

from llamafactory_adaptive.reports.data_report import data_report_of
from llamafactory_adaptive.reports.proofs import certificates, evaluations
from llamafactory_adaptive.reports.run_costs import run_costs
from llamafactory_adaptive.reports.run_report import Run, by_method
from llamafactory_adaptive.reports.tables import ranks_by_type
from llamafactory_adaptive.reports.values import number, texts


REPORT_SCHEMA = 1


def report_document(runs: Sequence[Run]) -> dict[str, Any]:
    """Build the document on several runs; its keys are described in ``docs/reports.md``."""
    documents = [run_document(run) for run in runs]
    return {"schema_version": REPORT_SCHEMA, "runs": documents, "methods": by_method(runs)}


def run_document(run: Run) -> dict[str, Any]:
    """Build the document on one run."""
    plan, provenance = run.plan, run.plan.provenance
    last = run.log[-1] if run.log else {}
    return {
        "folder": str(run.folder),
        "method": plan.method,
        "options": dict(plan.options),
        "asked": {
            **{key: provenance.get(key) for key in ("base_model", "quantization_bit", "seed", "bounds")},
            "dataset": provenance.get("calibration_dataset"),
            **_training(run),
            "search": provenance.get("course"),
            "lora_rank": plan.lora_rank,
            "lora_alpha": plan.lora_alpha,
        },
        "budget": {"unit": plan.budget_unit, **plan.budget()},
        "ranks": {
            "modules": len(plan.modules),
            "with_adapter": len(plan.active),
            "smallest": min(module.rank for module in plan.modules),
            "largest": plan.largest_rank,
            "by_type": ranks_by_type(plan),
            "digest": plan.digest(),
        },
        "steps": run.steps,
        "train_loss": number(run.train_loss),
        "eval_loss": number(run.eval_loss),
        "losses": run.curve("loss"),
        "eval_losses": run.curve("eval_loss"),
        "costs": run_costs(run.log or ({},), provenance, run.train_seconds),
        "warnings": texts(last.get("warnings")),
        "data_quality": data_report_of(run.folder, plan),
        "certificates": certificates(run.folder),
        "evaluations": evaluations(run.folder),
    }


def _training(run: Run) -> dict[str, Any]:
    """Return the settings of the training that the end of the log holds, which earlier versions did not write."""
    held: Mapping[str, Any] = next(
        (line["training"] for line in reversed(run.log) if isinstance(line.get("training"), Mapping)), {}
    )
    return {
        "training_dataset": texts(held.get("dataset")),
        "learning_rate": number(held.get("learning_rate")),
        "batch_size": number(held.get("batch_size")),
    }
