"""A finished comparison as the command leaves it in its folder, without the runs: outcomes are made up."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from eval.stats import sign_flip_p
from llamafactory_adaptive.comparison.arms import Arm, run_settings
from llamafactory_adaptive.comparison.experiment import Design, Progress
from llamafactory_adaptive.comparison.ledger import Ledger
from llamafactory_adaptive.comparison.results import arm_results, document
from llamafactory_adaptive.comparison.task_results import task_document
from llamafactory_adaptive.comparison.task_scores import Answers
from llamafactory_adaptive.files import digest_of


GIVEN = {"model_name_or_path": "/home/me/model", "dataset_dir": "/home/me/rows", "finetuning_type": "lora",
         "lora_rank": 1, "max_steps": 4, "adaptive_min_rank": 0}  # fmt: skip
ARMS = [Arm("lora", {"finetuning_type": "lora"}), Arm("random", {"finetuning_type": "adaptive"}),
        Arm("igu", {"finetuning_type": "adaptive", "adaptive_method": "igu"})]  # fmt: skip
DESIGN = Design((1.0, 2.0), seeds=3, extensions=1)
SPLIT = {"train": 9, "dev": 30, "test": 30}
OWN_KEYS = ["adaptive_min_rank"]  # those of GIVEN that are the plugin's


def outcome(run):
    """The best rate is 4, beyond the grid; igu diverges at 1."""
    if run.arm == "igu" and run.point.rate == 1.0:
        return {"status": "diverged", "why": "the loss is not finite"}
    rng = np.random.default_rng((run.seed, len(run.arm), int(run.point.rate)))
    losses = {half: (rng.normal(5.0 - run.point.rate, 0.1, 30).round(5)).tolist() for half in ("dev", "test")}
    ranks = {"model.layers.0.q_proj": 1} | ({} if run.arm == "igu" else {"model.layers.1.q_proj": 1})
    return {"status": "done", **losses, "seconds": 3.0, "training_seconds": 2.0, "steps": 4, "ranks": ranks,
            "parameters": 100, "parameters_of_one_rank": 60, "adapter": "/home/me/out/runs/x"}  # fmt: skip


# Questions that all seeds of an arm answer rightly, of twenty.
RIGHT = {"lora": 10, "random": 10, "igu": 20}
ASKED = {"form": "merged", "questions": {"protocol": "llm_adapters", "limit": 20, "template": "training"}}
TASKS = {"digest": digest_of(ASKED), "protocol": "llm_adapters", "limit": 20, "form": "merged",
         "questions": {"boolq": 20}, "commonest_answer": {"boolq": 0.55}, "metrics": {"boolq": "acc"},
         "notes": ["all: a note"]}  # fmt: skip


def answers_in_tasks(progress, ledger, key):
    """Write what adapters answered into the ledger as the command does, and return what it tells of that."""
    others = [{**ASKED, "form": "adapter"}] + [
        {**ASKED, "questions": {**ASKED["questions"], **asked}} for asked in ({"limit": 5}, {"template": "none"})
    ]  # of other starts, all with as many values
    answers = {}
    for arm, right in RIGHT.items():
        values = [1.0] * right + [0.0] * (20 - right)
        for run in progress.design.final(arm, progress.choice(arm).best):
            for asked in (ASKED, *others):
                given = values if asked is ASKED else [1.0] * 20
                settings = {"run": digest_of(key(run)), **asked}
                ledger.add(settings, {"answers": {"boolq": {"values": given}}, "notes": []})
        answers[arm] = Answers((1, 2, 3), {"boolq": np.array([values] * 3)})
    return task_document(answers, {}, 0.01, sign_flip_p, TASKS)


def write_comparison(folder: Path, tasks: bool = False) -> dict[str, Any]:
    """Write ledger, rows and ``compare.json`` of a comparison of ``ARMS`` into a folder; return the document."""
    ledger = Ledger(folder / "ledger.jsonl")

    def key(run):
        arm = next(arm for arm in ARMS if arm.name == run.arm)
        settings = run_settings(GIVEN, arm, run.point, run.seed, run.steps, OWN_KEYS)
        return {"settings": settings, "rows": SPLIT}

    tokens = {half: [2 + index % 3 for index in range(30)] for half in ("dev", "test")}
    progress = Progress(DESIGN, ARMS, lambda run: ledger.get(key(run)),
                        lambda found, half: float(np.average(found[half], weights=tokens[half])))  # fmt: skip
    ledger.add({"probe": key(DESIGN.final("lora", DESIGN.grid[0])[0])}, {"seconds": 1.0})
    while due := progress.due():
        ledger.add(key(due[0]), outcome(due[0]))
    facts = {"command": "compare /home/me/x.yaml", "settings": GIVEN, "design": asdict(DESIGN), "training_rows": 9}
    if tasks:
        facts["tasks"] = answers_in_tasks(progress, ledger, key)
    made = json.loads(json.dumps(document(arm_results(progress), tokens, 0.005, facts)))
    (folder / "compare.json").write_text(json.dumps(made))
    rows = folder / "rows" / "0"
    rows.mkdir(parents=True)
    (rows / "split.json").write_text(json.dumps(SPLIT))
    halves = {half: [{"labels": [-100] + [7] * count} for count in counts] for half, counts in tokens.items()}
    (rows / "held_out.json").write_text(json.dumps(halves))
    return made
