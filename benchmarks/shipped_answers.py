"""Answers to tasks in ledgers of comparisons as they are shipped: one list of values for each adapter and task.

They stand in the line of the run whose adapter gave them. Accuracies and verdicts are made from them by the
comparison's own code, as losses are.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.stats import sign_flip_p
from llamafactory_adaptive.comparison.task_results import task_document
from llamafactory_adaptive.comparison.task_scores import Answers
from llamafactory_adaptive.files import digest_of


ValuesByTask = Mapping[str, Sequence[float]]  # from 0, wrong, to 1, right
ASKED = ("form", "questions")  # what answers depend on besides the run
JUDGED = ("smallest_effect", "arms")  # what is made from answers; the rest of a document says how they were asked


def answers_in(entries: Iterable[Mapping[str, Any]], digest: str) -> dict[str, ValuesByTask]:
    """Find the answers to the questions of that digest, by the digest of the run that gave them.

    Args:
        entries: lines of the ledger of the command.
        digest: of the questions of its document.
    """
    found = {}
    for entry in entries:
        settings = entry["settings"]
        if digest_of({key: settings[key] for key in ASKED if key in settings}) == digest:
            found[settings["run"]] = {task: given["values"] for task, given in entry["result"]["answers"].items()}
    return found


def answers_of(line: Mapping[str, Any], answers: Mapping[str, ValuesByTask]) -> dict[str, Any]:
    """Give what the line of a run ships of its answers; nothing where its adapter was not asked."""
    values = answers.get(digest_of(line["settings"]))
    return {} if values is None else {"answers": {task: _whole(each) for task, each in values.items()}}


def _whole(values: Sequence[float]) -> list[float]:
    """Write right and wrong as 1 and 0, which are shorter."""
    return [int(value) if value in (0, 1) else value for value in values]


def tasks_anew(tasks: Mapping[str, Any], finals: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Make what a document holds of tasks anew.

    Args:
        tasks: what it holds; how questions were put stays, and why an arm could not be asked.
        finals: shipped results of the runs that judge, by arm and seed.
    """
    given = {
        arm: {seed: result["answers"] for seed, result in by_seed.items() if "answers" in result}
        for arm, by_seed in finals.items()
    }
    answers = {arm: Answers.by_seed(values, list(tasks["questions"])) for arm, values in given.items() if values}
    failed = {arm["name"]: arm["failed"] for arm in tasks["arms"] if "failed" in arm}
    facts = {key: value for key, value in tasks.items() if key not in JUDGED}
    return task_document(answers, failed, tasks["smallest_effect"], sign_flip_p, facts)
