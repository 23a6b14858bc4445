"""The part of a comparison's result that is about tasks: accuracies of arms, and verdicts against LoRA and chance."""

import math
from collections.abc import Mapping
from typing import Any

from llamafactory_adaptive.comparison.arms import CONTROL, PLAIN
from llamafactory_adaptive.comparison.task_request import points
from llamafactory_adaptive.comparison.task_scores import (
    Accuracy,
    Answers,
    SignFlip,
    TaskJudgement,
    accuracy,
    judge_tasks,
)


def task_document(
    answers: Mapping[str, Answers],
    failed: Mapping[str, str],
    effect: float,
    sign_flip: SignFlip,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Build what ``compare.json`` holds under ``tasks``.

    Args:
        answers: what the adapters of each arm answered, by name of the arm.
        failed: why an arm could not be evaluated, or not with all seeds, by name of the arm.
        effect: smallest difference that matters, as a share of 1.
        sign_flip: as for :func:`~llamafactory_adaptive.comparison.task_scores.judge_tasks`.
        facts: how the questions were put.
    """
    others = {name: each for name, each in answers.items() if name != PLAIN}
    judged = [
        judgement
        for rival, each in ((PLAIN, answers), (CONTROL, others))
        if rival in each
        for judgement in judge_tasks(each, rival, effect, sign_flip)
    ]
    names = dict.fromkeys((*answers, *failed))
    return {
        **facts,
        "smallest_effect": effect,
        "arms": [_arm(name, answers.get(name), failed.get(name), judged) for name in names],
    }


def _arm(name: str, answers: Answers | None, failed: str | None, judged: list[TaskJudgement]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name} | ({} if failed is None else {"failed": failed})
    if answers is None:
        return entry
    verdicts: dict[str, dict[str, Any]] = {}
    for judgement in judged:
        if judgement.arm == name:
            verdicts.setdefault(judgement.task, {})[judgement.rival] = _verdict(judgement)
    reached = {task: _figures(accuracy(answers.of(task))) for task in answers.names()}
    return {**entry, "seeds": list(answers.seeds), "accuracy": reached, "verdicts": verdicts}


def _figures(reached: Accuracy) -> dict[str, Any]:
    return {"value": reached.value, "standard_error": reached.standard_error, "questions": reached.questions}


def _verdict(judgement: TaskJudgement) -> dict[str, Any]:
    difference, (low, high), (low_90, high_90) = judgement.difference, judgement.interval(), judgement.interval(0.9)
    return {
        "verdict": judgement.verdict,
        "difference": {"value": difference.value, "low": low, "high": high, "low_90": low_90, "high_90": high_90},
        "standard_error": difference.standard_error,
        "over_seeds": difference.over_seeds,
        "over_questions": difference.over_questions,
        "seeds": difference.seeds,
        "questions": difference.questions,
        "questions_that_differ": judgement.differ,
        "p_value": judgement.p_value,
        "p_holm": judgement.p_holm,
        "tests": judgement.tests,
        "detectable": difference.detectable(judgement.tests),
        "detectable_by_questions": difference.detectable_by_questions(judgement.tests),
        "what_would_decide": what_would_decide(judgement),
        "words": judgement_in_words(judgement),
    }


def judgement_in_words(judgement: TaskJudgement) -> str:
    """Describe a judgement: the verdict, the difference in percentage points with its interval, and what follows."""
    relation = {"better": "better than", "worse": "worse than", "equivalent": "equivalent to"}
    where = "the mean over tasks" if judgement.task == "mean" else judgement.task
    start = f"{judgement.arm} in {where}: {relation.get(judgement.verdict, 'not decided against')} {judgement.rival}"
    level = 0.9 if judgement.verdict == "equivalent" else 0.95
    digits = digits_of(judgement.effect)
    value, low, high = (
        f"{100 * each:+z.{digits}f}" for each in (judgement.difference.value, *judgement.interval(level))
    )
    alone = " over questions alone" if judgement.difference.seeds == 1 else ""
    return f"{start}: {value} points ({100 * level:.0f} % interval{alone} {low} to {high}){_consequence(judgement)}"


def digits_of(effect: float) -> int:
    """Return how many decimals of percentage points tell a tenth of the effect."""
    return max(1, 1 - math.floor(math.log10(100 * effect) + 1e-9))


def _consequence(judgement: TaskJudgement) -> str:
    if judgement.verdict == "equivalent":
        return f", within the {points(judgement.effect)} that were to matter"
    return f"; {remedy}" if (remedy := what_would_decide(judgement)) else ""


def what_would_decide(judgement: TaskJudgement) -> str:
    """Describe what there is too little of where a judgement is not decided; empty for other verdicts."""
    if judgement.verdict != "not decided":
        return ""
    if judgement.difference.seeds == 1:
        return "seeds were not varied, and another seed may tell otherwise: give at least 3"
    return _power(judgement)


def _power(judgement: TaskJudgement) -> str:
    """Tell which difference so many questions and seeds would have shown, and what there is too little of."""
    difference, tests, digits = judgement.difference, judgement.tests, digits_of(judgement.effect)
    shown, at_best = difference.detectable(tests), difference.detectable_by_questions(tests)
    shows = "could not show even 100 points"
    if shown < 1.0:
        shows = f"show {100 * shown:.{digits}f} points four times in five"
    return (
        f"{difference.questions} questions and {difference.seeds} seeds {shows} ({100 * at_best:.{digits}f} points "
        f"were seeds all alike): more {_lacking(judgement)} are needed"
    )


def _lacking(judgement: TaskJudgement) -> str:
    """Tell what would have to grow until the smallest difference that matters is shown: one alone, if it suffices."""
    difference, tests = judgement.difference, judgement.tests
    if difference.detectable_by_questions(tests) <= judgement.effect:
        return "seeds"
    return "questions" if difference.detectable_by_seeds(tests) <= judgement.effect else "questions and seeds"
