"""As much of a run's ``output_dir`` as reports read."""

import json

import torch

from llamafactory_adaptive.files import CERTIFICATE_FILE, LOG_FILE, PLAN_FILE
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from llamafactory_adaptive.reports.data_report import DataQuality, save_data_report
from tests.helpers.plans import make_plan


HISTORY = [
    {"loss": 3.0, "step": 1},
    {"eval_loss": 2.5, "step": 1},
    {"loss": 2.0, "step": 2},
    {"eval_loss": 1.5, "step": 2},
    {"train_loss": 2.4, "train_runtime": 40.0, "step": 2},
]


def save_run(folder, plan=None, history=HISTORY, overhead=4.0):
    """As much of an output_dir as a report reads."""
    folder.mkdir(parents=True)
    (plan or make_plan()).write(folder / PLAN_FILE)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 2}))
    lines = [{"overhead_seconds": overhead / 2}, {"overhead_seconds": overhead}]
    (folder / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def save_data(folder, plan):
    some = torch.ones(3, dtype=torch.float64)
    data = DataQuality(
        {"loss": some, "gradient_norm": some}, some, some / 3, some > 0, some.long(), ["a", "b", "c"], 3, 3.0
    )
    save_data_report(folder, plan, data, 2, None)


NASTY = "<script>alert(1)</script><img src=http://evil.test/x onerror=alert(2)>"


def save_whole_run(folder, text=NASTY, ranks=((2, 6), (4, 0))):
    """A run with all that a page shows of one, and ``text`` wherever a file of others may hold one."""
    modules = tuple(
        ModulePlan(f"model.layers.{layer}.mlp.{kind}", 8, 16, rank, 0.1, 0.25)
        for layer, row in enumerate(ranks)
        for kind, rank in zip(("up_proj", "down_proj"), row, strict=True)
    )
    provenance = {"base_model": f"models/{text}", "seed": 1, "calibration_dataset": [text], "planning_seconds": 9.5}
    plan = RankPlan("igu", {"variant": text}, "params", 4, 8.0, modules, provenance)
    save_run(folder, plan, [*HISTORY, {"loss": float("nan"), "step": 3}])
    peak = {"host": 3 * 2**30, "device": 2**30}
    common = {"overhead_seconds": 4.0, "overhead": {"planning": 1.0, "observing": 3.0}, "peak_memory": peak}
    begin = {"step": 0, "event": "begin", "modules": list(plan.ranks()), "ranks": [6] * len(modules)}
    change = {"step": 1, "event": "allocation", "budget_asked": 500, "budget_used": 480, "ranks": [5] * len(modules)}
    final = {**change, "step": 2, "budget_used": 288, "ranks": list(plan.ranks().values())}
    end = {"event": "end", "seconds": 49.0, "warnings": [text]}
    lines = [json.dumps({**line, **common}) for line in (begin, change, final, end)]
    (folder / LOG_FILE).write_text("\n".join(lines) + "\n")
    _save_proofs(folder, text)
    some = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    data = DataQuality({"loss": some, "gradient_norm": some}, some, some / 6, some > 1, some.long(), ["a", "b", "b"],
                       3, 3.0)  # fmt: skip
    save_data_report(folder, plan, data, 2, lambda index: (f"question {index} {text}", text))
    return folder


def _save_proofs(folder, text):
    check = {"name": "parity", "max_difference": 2.5e-6, "tolerance": 1e-3, "unit": "nats", "passed": True}
    served = folder / "served"
    served.mkdir()
    document = {"server": f"vllm {text}", "date": "2026-01-01", "checks": [check]}
    (served / CERTIFICATE_FILE).write_text(json.dumps(document))
    score = {"model": text, "task": "gsm8k", "metric": "exact", "headline": True, "value": 0.5, "stderr": None, "n": 9}
    difference = {"value": 0.125, "low": -0.01, "high": 0.26, "p_value": 0.07}
    pairs = [{"first": "base", "second": text, "mean_difference": difference}]
    scores = {"schema_version": 3, "protocol": "lm_eval", "scores": [score], "comparisons": pairs}
    (served / "eval_results.json").write_text(json.dumps(scores))
    (folder / "eval_results.json").write_text('{"eval_loss": 1.0}')
