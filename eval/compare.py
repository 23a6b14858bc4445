"""Comparison of finished runs, without a new one: ``python -m eval.compare A B [C ...] [--out FILE]``.

Models of different folders are compared row by row, with the statistics of a run (:mod:`eval.stats`). Runs must
agree in how their models were asked and in the rows: protocol, template, decoding, seeds, limit, tasks with their
versions and numbers of examples, and the digest of the rows that were scored. What may differ: the models, in which
form they were served, the tokenizer that stands in for the base's own, versions of the software (listed in a note),
and when and where the runs were made.

Exit codes: 0 done, 2 user error (one message on stderr), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from eval import report, results
from eval.errors import EvalError, UsageError
from eval.exits import exit_code
from eval.finished import Finished, read_finished
from eval.reading import field


# Every other key of a results file describes how the models were asked, and must be the same.
_MAY_DIFFER = frozenset(
    ("scores", "means", "comparisons", "data", "models", "timings", "warnings", "contamination_checked_against",
     "command", "date", "versions", "base_tokenizer")
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the runs named on the command line, print the result, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare", description="Compare finished evaluations row by row, without a new run."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's --out, with samples.jsonl")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the comparison as JSON")
    given = parser.parse_args(argv)
    return exit_code((), lambda: _compare(given.folders, given.out))  # names of folders are others' texts


def _compare(folders: Sequence[Path], out: Path | None) -> None:
    if out is not None and os.path.lexists(out):
        raise UsageError([f"--out: {out} exists already, nothing was overwritten; try another name"])
    runs = read_runs(folders)
    document = compared(runs)
    scores = [score for run in runs for score in run.scores]
    print(report.table(scores, document["means"], _common(runs)))
    print("\n" + report.comparison_text(document["comparisons"]))
    for note in document["notes"]:
        print(f"NOTE: {note}")
    if out is not None:
        try:
            results.write_json(out, document)
        except OSError as error:
            raise EvalError(f"--out: {out} cannot be written ({error.strerror}); give another file") from error
        print(f"\nwritten to {out}")


def read_runs(folders: Sequence[Path]) -> list[Finished]:
    """Read the folders of runs, and check that they can be compared.

    Raises:
        EvalError: there are fewer than two folders, one cannot be read, or the runs cannot be compared (all reasons).
    """
    paths = [Path(os.path.realpath(folder)) for folder in folders]  # Path.resolve raises where links go in a circle
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise UsageError(["FOLDER: two or more different folders are compared; give the --out of each run"])
    names = [_printable(path.name) for path in paths]
    labels = names if len(set(names)) == len(names) else [_printable(str(path)) for path in paths]
    runs = [read_finished(folder, label) for folder, label in zip(folders, labels, strict=True)]
    reasons = [reason for other in runs[1:] for reason in _reasons(runs[0], other)]
    if reasons:
        raise UsageError(reasons)
    return runs


def _printable(name: str) -> str:
    """Escape line ends, direction marks and the like in a folder's name, so that it fits a line of a table."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def compared(runs: Sequence[Finished]) -> dict[str, Any]:
    """Compare every pair of models of different folders; return a document like the results of a run."""
    answers = [a for run in runs for model, tasks in run.answers.items() for a in _called(model, tasks)]
    pairs = [
        results.compare(first, second)
        for one, other in combinations(runs, 2)
        for first in one.answers.items()
        for second in other.answers.items()
    ]
    return {
        "schema_version": results.SCHEMA_VERSION,
        "folders": {run.label: str(run.path) for run in runs},
        **{key: value for key, value in runs[0].document.items() if key not in {*_MAY_DIFFER, "schema_version"}},
        "scores": [asdict(score) for run in runs for score in run.scores],
        "means": results.means(answers),
        "comparisons": pairs,
        "notes": list(_notes(runs)),
    }


def _called(model: str, tasks: Mapping[str, results.Answers]) -> Iterator[results.Answers]:
    for a in tasks.values():
        yield results.Answers(model, a.form, a.task, a.values, a.n_cut, a.repeats)


def _reasons(one: Finished, other: Finished) -> Iterator[str]:
    """Find the reasons why two runs cannot be compared, each with the values of both."""
    pair = f"{one.path} and {other.path}"
    for key in sorted((one.document.keys() | other.document.keys()) - _MAY_DIFFER):
        ours, theirs = one.document.get(key), other.document.get(key)
        if ours != theirs:
            yield f"{pair}: {key} differs, {ours!r:.100} and {theirs!r:.100}; run one of them again with the other's"
    asked, also = _asked(one), _asked(other)
    if asked.keys() != also.keys():
        yield f"{pair}: other tasks were asked, {', '.join(asked)} and {', '.join(also)}; run both with one --tasks"
        return
    for task, facts in asked.items():
        for name, ours in facts.items():
            if ours != (theirs := also[task][name]):
                yield f"{pair}: {task} has another {name}, {ours!r:.100} and {theirs!r:.100}"


def _asked(run: Finished) -> dict[str, dict[str, Any]]:
    """Collect what was asked in each task, and check that every model of a run was asked the same."""
    sets = field(field(run.document, "data", dict, str(run.path)), "sets", dict, str(run.path))
    asked: dict[str, dict[str, Any]] = {}
    for score in run.scores:
        if score.headline:
            rows = field(sets, score.task, dict, f"{run.path}: data.sets")
            facts = {
                "version": score.task_version,
                "headline metric": score.metric,
                "number of examples": score.fewshot,
                "number of rows": score.n,
                "number of answers to a row": score.repeats,
                "set of rows (scored_sha256)": field(rows, "scored_sha256", str, f"{run.path}: {score.task}"),
            }
            if asked.setdefault(score.task, facts) != facts:
                raise EvalError(f"{run.path}: {score.task} was asked of its models in different ways; it is damaged")
    if any(tasks.keys() != asked.keys() for tasks in run.answers.values()):
        raise EvalError(f"{run.path}: not every model was asked every task; it is damaged")
    return asked


def _notes(runs: Sequence[Finished]) -> Iterator[str]:
    versions = [_versions(run) for run in runs]
    for name in sorted({name for run_versions in versions for name in run_versions}):
        said = [run_versions.get(name, "unknown") for run_versions in versions]
        if len(set(said)) > 1:
            yield f"{name} differs: {', '.join(f'{v} in {run.label}' for v, run in zip(said, runs, strict=True))}"


def _common(runs: Sequence[Finished]) -> dict[str, str]:
    first, *others = (_versions(run) for run in runs)
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _versions(run: Finished) -> dict[str, str]:
    versions = run.document.get("versions")
    items = versions.items() if isinstance(versions, dict) else ()
    return {name: value[:40] for name, value in items if isinstance(value, str) and (name + value).isprintable()}


if __name__ == "__main__":
    sys.exit(main())
