"""Differences of arms to a rival in accuracy, paired by seed and question, and verdicts on them.

Model: as for losses (:mod:`~llamafactory_adaptive.comparison.differences`), seeds and questions are two crossed random
effects. The mean over tasks weighs every task alike, however many questions it has.

Answers are right or wrong, so a difference is -1, 0 or 1, and few questions may differ at all. A bootstrap of so few
tells little, and a variance of 0 would make a hundred questions on which two arms agree a proof that they always do.
So its variance over questions is that of two questions more in each task, half of one won and half of one lost twice:
1 / n^2 is added for n questions, which is the adjusted interval for paired proportions (Agresti and Min 2005, Simple
improved confidence intervals for comparing matched proportions). Intervals reach as far as their two parts squared and
added, ``sqrt(t^2 var(seeds) / S + z^2 var(questions) / Q)`` (Banerjee 1960, Sankhya 22). A p value is the largest
level whose interval leaves 0 out, and never below that of the harness's own sign-flip test over questions, which is
exact where few differ.

Shapes: S seeds, Q questions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from llamafactory_adaptive.comparison.differences import variance_components
from llamafactory_adaptive.comparison.losses import FloatArray
from llamafactory_adaptive.comparison.more_seeds import CHANCE, LEVEL, student_quantile
from llamafactory_adaptive.comparison.verdicts import Verdict, holm


MEAN = "mean"  # stands for the mean over tasks, where there are several
SignFlip = Callable[[Sequence[FloatArray]], float]
_LEAST_TAIL = 1e-12


@dataclass(frozen=True, eq=False)
class Answers:
    """What an arm's adapters answered: by task, one value from 0 (wrong) to 1 (right) per seed and question."""

    seeds: tuple[int, ...]
    tasks: Mapping[str, FloatArray]

    @classmethod
    def by_seed(cls, values: Mapping[int, Mapping[str, Sequence[float]]], tasks: Sequence[str]) -> "Answers":
        """Build them from the values of each seed, by task and in the order of the questions."""
        return cls(tuple(values), {task: np.array([each[task] for each in values.values()], float) for task in tasks})

    def of_seeds(self, seeds: Sequence[int]) -> "Answers":
        """Return the answers of these seeds, in their order."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return Answers(tuple(seeds), {task: values_SQ[rows] for task, values_SQ in self.tasks.items()})

    def names(self) -> list[str]:
        """List the tasks, and their mean where there are several."""
        return [*self.tasks, *([MEAN] if len(self.tasks) > 1 else [])]

    def of(self, name: str) -> "Answers":
        """Return the answers of one task, or of all for their mean."""
        return self if name == MEAN else Answers(self.seeds, {name: self.tasks[name]})


@dataclass(frozen=True)
class Accuracy:
    """A mean of accuracies, or of differences of them, with what it varies by.

    Attributes:
        value: the mean over seeds and questions; over tasks, too.
        over_seeds: standard error over seeds; 0 with one seed.
        over_questions: standard error over questions.
        seeds: number of seeds.
        questions: number of questions.
    """

    value: float
    over_seeds: float
    over_questions: float
    seeds: int
    questions: int

    @property
    def standard_error(self) -> float:
        """Return the standard error over seeds and questions."""
        return math.hypot(self.over_seeds, self.over_questions)

    def reach(self, tail: float) -> float:
        """Compute how far the interval reaches to either side that leaves out ``tail`` there."""
        over_questions = -NormalDist().inv_cdf(tail) * self.over_questions
        if self.seeds == 1:
            return over_questions
        return math.hypot(student_quantile(1.0 - tail, self.seeds - 1) * self.over_seeds, over_questions)

    def p_value(self) -> float:
        """Compute the largest two-sided level whose interval leaves 0 out."""
        low, high = _LEAST_TAIL, 0.5
        if self.reach(low) <= abs(self.value):
            return 2.0 * low
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.reach(middle) > abs(self.value) else (low, middle)
        return min(1.0, 2.0 * high)

    def detectable(self, tests: int) -> float:
        """Estimate the difference that four such comparisons in five would show, corrected for ``tests`` tests."""
        return self.reach(LEVEL / tests / 2.0) + NormalDist().inv_cdf(CHANCE) * self.standard_error

    def detectable_by_questions(self, tests: int) -> float:
        """Estimate the same for seeds that do not differ: what so many questions can show at best."""
        return replace(self, over_seeds=0.0).detectable(tests)

    def detectable_by_seeds(self, tests: int) -> float:
        """Estimate the same for any number of questions: what so many seeds can show at best."""
        return replace(self, over_questions=0.0).detectable(tests)


@dataclass(frozen=True)
class TaskJudgement:
    """Verdict on an arm in one task, or in the mean over tasks, and what it rests on.

    Attributes:
        arm: name of the arm.
        rival: name of the rival.
        task: name of the task, or ``MEAN``.
        verdict: better, worse, equivalent or not decided.
        effect: smallest difference that matters, as a share of 1, fixed before.
        difference: arm minus rival; above 0 the arm is better.
        differ: number of questions that not all seeds of both answered alike.
        p_value: two-sided, of no difference.
        p_holm: the same, corrected for ``tests`` tests; None with one seed.
        tests: number of tests that this corrects for.
    """

    arm: str
    rival: str
    task: str
    verdict: Verdict
    effect: float
    difference: Accuracy
    differ: int
    p_value: float
    p_holm: float | None = None
    tests: int = 1

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Compute the interval of the difference; none is larger than 1."""
        reach = self.difference.reach((1.0 - level) / 2.0)
        return max(-1.0, self.difference.value - reach), min(1.0, self.difference.value + reach)


def accuracy(answers: Answers) -> Accuracy:
    """Compute the accuracy in a task, or the unweighted mean over tasks, with its own standard errors.

    Answers of several seeds to one question are a cluster (Miller 2024, Adding Error Bars to Evals): they do not count
    as so many questions. With one seed the error is that of the harness's table.
    """
    tasks, S = answers.tasks, len(answers.seeds)
    value = float(np.mean([values_SQ.mean() for values_SQ in tasks.values()]))
    by_seed_S = np.mean([values_SQ.mean(axis=1) for values_SQ in tasks.values()], axis=0)
    rows = sum(_variance_over_questions(values_SQ) for values_SQ in tasks.values())
    over_seeds = float(by_seed_S.std(ddof=1)) / math.sqrt(S) if S > 1 else 0.0
    questions = sum(values_SQ.shape[1] for values_SQ in tasks.values())
    return Accuracy(value, over_seeds, math.sqrt(rows) / len(tasks), S, questions)


def _variance_over_questions(values_SQ: FloatArray) -> float:
    """Estimate the variance that a task's mean has over questions; 0 for a lone one."""
    Q: int = values_SQ.shape[1]
    return variance_components(values_SQ)[1] / Q if Q > 1 else 0.0


def mean_difference(gaps: Answers) -> Accuracy:
    """Compute the mean of paired differences, with standard errors as of two questions more in each task."""
    found, tasks = accuracy(gaps), gaps.tasks.values()
    more = math.hypot(*(1.0 / values_SQ.shape[1] for values_SQ in tasks)) / len(tasks)
    return replace(found, over_questions=math.hypot(found.over_questions, more))


def judge_tasks(answers: Mapping[str, Answers], rival: str, effect: float, sign_flip: SignFlip) -> list[TaskJudgement]:
    """Compare every arm with the rival in each task and, where there are several, in their mean.

    Verdicts are those of losses (:func:`~llamafactory_adaptive.comparison.verdicts.judge`), with absolute differences.
    Holm's correction is over all arms and tasks; the mean over tasks has one of its own, over arms.

    Args:
        answers: of every arm and of the rival, by name, to the same questions.
        rival: name of the arm that the others are compared with.
        effect: smallest difference that matters, as a share of 1.
        sign_flip: computes the p value of paired differences of questions, one array per task.

    Returns:
        One judgement per task and arm that shares a seed with the rival.
    """
    lines = [
        (arm, name)
        for name in answers[rival].names()
        for arm in answers
        if arm != rival and set(answers[arm].seeds) & set(answers[rival].seeds)
    ]
    compared = [_compared(answers[arm].of(name), answers[rival].of(name), sign_flip) for arm, name in lines]
    corrected: dict[int, tuple[float, int]] = {}
    for mean in (False, True):
        family = [i for i, (_, name) in enumerate(lines) if (name == MEAN) == mean and compared[i][0].seeds > 1]
        p_values = holm([compared[i][2] for i in family])
        corrected |= {i: (p, len(family)) for i, p in zip(family, p_values, strict=True)}
    return [
        _judgement(arm, rival, name, effect, *compared[i], *corrected.get(i, (None, 1)))
        for i, (arm, name) in enumerate(lines)
    ]


def _compared(arm: Answers, rival: Answers, sign_flip: SignFlip) -> tuple[Accuracy, int, float]:
    """Return the difference, the number of questions that differ, and the p value."""
    common = sorted(set(arm.seeds) & set(rival.seeds))
    ours, theirs = arm.of_seeds(common), rival.of_seeds(common)
    gaps = {task: values_SQ - theirs.tasks[task] for task, values_SQ in ours.tasks.items()}
    difference = mean_difference(Answers(tuple(common), gaps))
    differ = sum(int(np.count_nonzero(gap_SQ.any(axis=0))) for gap_SQ in gaps.values())
    flipped = sign_flip([gap_SQ.mean(axis=0) for gap_SQ in gaps.values()])
    return difference, differ, max(difference.p_value(), flipped)


def _judgement(
    arm: str,
    rival: str,
    task: str,
    effect: float,
    difference: Accuracy,
    differ: int,
    p_value: float,
    p_holm: float | None,
    tests: int,
) -> TaskJudgement:
    verdict: Verdict = "not decided"
    if p_holm is not None:
        if abs(difference.value) + difference.reach(LEVEL) < effect:
            verdict = "equivalent"
        elif p_holm <= LEVEL:
            verdict = "better" if difference.value > 0.0 else "worse"
    return TaskJudgement(arm, rival, task, verdict, effect, difference, differ, p_value, p_holm, tests)
