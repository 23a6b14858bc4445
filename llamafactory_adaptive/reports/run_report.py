"""Reports on one or several runs from the files in their ``output_dir``: ranks, losses, cost, training data."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import CUT_FILE, LOG_FILE, PLAN_FILE, TRAINER_STATE, read_lines, read_mapping
from llamafactory_adaptive.ranks.plan import RankPlan, load_plan
from llamafactory_adaptive.reports.data_report import DATA_REPORT_FILE, data_report_of, data_table, read_data_report
from llamafactory_adaptive.reports.plaintext import plain
from llamafactory_adaptive.reports.rank_history import parsed_lines
from llamafactory_adaptive.reports.tables import align, rank_table
from llamafactory_adaptive.reports.values import is_number, number


NOISE = "differences below two standard errors are noise; compare runs of equal parameters, with several seeds"
# Errors of reading files that belong to no run, or are damaged.
_NO_RUN = (PlanError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError,
           RecursionError)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Results of one finished run.

    Attributes:
        folder: its ``output_dir``.
        plan: the ranks it ended with.
        steps: number of optimizer steps.
        train_loss, eval_loss: mean of the training, and last of the evaluations; None if there is none.
        train_seconds: seconds of the whole training; None if that was not logged.
        overhead_seconds: seconds of finding ranks and scoring samples.
        losses, eval_losses: the losses in the order in which they were logged.
        history: what the Trainer logged.
        log: parsed lines of the run's own log.
    """

    folder: Path
    plan: RankPlan
    steps: int
    train_loss: float | None
    eval_loss: float | None
    train_seconds: float | None
    overhead_seconds: float
    losses: tuple[float, ...] = ()
    eval_losses: tuple[float, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    log: tuple[Mapping[str, Any], ...] = ()

    def curve(self, key: str) -> list[tuple[int, float]]:
        """List optimizer steps with the figure that was logged there."""
        return [
            (int(step), value)
            for entry in self.history
            if (step := number(entry.get("step"))) is not None and (value := number(entry.get(key))) is not None
        ]


def read_run(folder: Path) -> Run:
    """Read the results of a finished run from its ``output_dir``.

    Raises:
        PlanError: there is no run in ``folder``, or it has not ended.
    """
    if not (folder / PLAN_FILE).is_file():
        raise PlanError(f"there is no run in {folder}: {PLAN_FILE} is missing; give the output_dir of a training")
    if not (folder / TRAINER_STATE).is_file():
        raise PlanError(
            f"the run in {folder} has not ended: it still trains, or was broken off ({TRAINER_STATE}, which is "
            "written at its end, is missing)"
        )
    try:
        state = read_mapping(folder / TRAINER_STATE, TRAINER_STATE, finite=False)
        lines = read_lines(folder / LOG_FILE)
        last = json.loads(lines[-1])
        history = [entry for entry in state["log_history"] if isinstance(entry, dict)]
        steps, overhead = int(state["global_step"]), float(last.get("overhead_seconds", 0.0))
    except _NO_RUN as error:
        raise PlanError(f"the run in {folder} has not ended: {type(error).__name__}: {error}") from error
    return Run(
        folder=folder,
        plan=load_plan(folder / PLAN_FILE),
        steps=steps,
        train_loss=_last(history, "train_loss"),
        eval_loss=_last(history, "eval_loss"),
        train_seconds=_last(history, "train_runtime"),
        overhead_seconds=overhead,
        losses=_all(history, "loss"),
        eval_losses=_all(history, "eval_loss"),
        history=tuple(history),
        log=tuple(parsed_lines(lines)),
    )


def _all(history: Sequence[dict[str, Any]], key: str) -> tuple[float, ...]:
    return tuple(float(entry[key]) for entry in history if is_number(entry.get(key)))


def _last(history: Sequence[dict[str, Any]], key: str) -> float | None:
    values = _all(history, key)
    return values[-1] if values else None


def data_of_unfinished_run(folder: Path) -> str | None:
    """Format the data summary of a run that has not ended; None if it has ended or has no summary."""
    if (folder / TRAINER_STATE).is_file() or not (folder / DATA_REPORT_FILE).is_file():
        return None
    return f"{folder} (not finished)\n\nTraining data\n" + data_table(read_data_report(folder))


def text_of_cut_adapter(folder: Path) -> str | None:
    """Format the ranks and the kept energy of an adapter that was cut to a budget; None if it is none, or a run."""
    if (folder / TRAINER_STATE).is_file() or not (folder / CUT_FILE).is_file():
        return None
    facts = read_mapping(folder / CUT_FILE, str(folder / CUT_FILE))
    before, kept = (facts.get(key) for key in ("parameters_before", "kept_energy"))
    if not (is_number(before) and is_number(kept)):
        raise PlanError(f"{folder / CUT_FILE} is no complete certificate of a cut")
    words = f"cut after training    from {before:,} parameters; {kept:.2%} of the squared singular values kept"
    return "\n\n".join([f"{folder} (cut by shrink)", rank_table(load_plan(folder / PLAN_FILE)), words])


def run_text(run: Run) -> str:
    """Format a run as text: its ranks, steps, losses and seconds, and its training data if they were scored."""
    return "\n\n".join([f"{run.folder}", rank_table(run.plan), *texts_below_ranks(run)])


def texts_below_ranks(run: Run) -> list[str]:
    """Format what is told of a run besides its ranks: steps, losses and seconds, and its training data."""
    data = data_report_of(run.folder, run.plan)
    return [_search_of(run), *([] if data is None else ["Training data\n" + data_table(data)])]


def _search_of(run: Run) -> str:
    """Format steps, losses and seconds of one run, a line each."""
    lines = [f"steps                 {run.steps:,}"]
    if run.losses:
        lines.append(
            f"training loss         first {run.losses[0]:.4f}, last {run.losses[-1]:.4f}, "
            f"lowest {min(run.losses):.4f}, mean {_number(run.train_loss) or 'unknown'}"
        )
    if run.eval_losses:
        lines.append(f"evaluation loss       last {run.eval_losses[-1]:.4f}, lowest {min(run.eval_losses):.4f}")
    if run.train_seconds:
        share = run.overhead_seconds / run.train_seconds
        lines.append(
            f"seconds               {run.train_seconds:.1f}, what plain LoRA has not {run.overhead_seconds:.1f} "
            f"({share:.1%} of it)"
        )
    return "\n".join(lines)


def comparison(runs: Sequence[Run]) -> str:
    """Compare runs: a line for each, then a line per method with mean and standard error over its runs."""
    return "\n".join([*align(comparison_rows(runs)), "", *align(method_rows(runs)), NOISE])


def same_modules(one: Run, other: Run) -> bool:
    """Tell whether two runs have ranks for the same modules, without which differences in rank mean nothing."""
    return one.plan.ranks().keys() == other.plan.ranks().keys()


def comparison_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Build the table of runs, a row for each, below its head."""
    rows = [["run", "method", "parameters", "ranks", "steps", "train loss", "eval loss", "seconds", "overhead"]]
    for run in runs:
        ranks = [module.rank for module in run.plan.modules]
        rows.append(
            [
                plain(run.folder.name),
                plain(run.plan.method),
                f"{run.plan.budget()['used_parameters']:,}",
                f"{min(ranks)}-{max(ranks)}",
                str(run.steps),
                _number(run.train_loss),
                _number(run.eval_loss),
                "" if run.train_seconds is None else f"{run.train_seconds:.0f}",
                f"{run.overhead_seconds:.1f} s",
            ]
        )
    return rows


def method_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Build the table of methods, with mean and standard error of the loss over the runs of each, below its head."""
    rows = [["method", "runs", "mean loss", "standard error"]]
    for entry in by_method(runs):
        error = "one run: unknown" if entry["standard_error"] is None else f"{entry['standard_error']:.4f}"
        rows.append([plain(entry["method"]), str(entry["runs"]), f"{entry['mean_loss']:.4f}", error])
    return rows


def by_method(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Average the loss over the runs of each method: of the last evaluation, or of training where there is none."""
    groups: dict[str, list[float]] = {}
    for run in runs:
        loss = run.train_loss if run.eval_loss is None else run.eval_loss
        if loss is not None:
            groups.setdefault(run.plan.method, []).append(loss)
    return [
        {
            "method": method,
            "runs": len(losses),
            "mean_loss": statistics.fmean(losses),
            "standard_error": statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else None,
        }
        for method, losses in groups.items()
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
