"""As much of a run's ``output_dir`` as reports read."""

import json

import torch

from llamafactory_adaptive.files import LOG_FILE, PLAN_FILE
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
