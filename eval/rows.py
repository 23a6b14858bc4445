"""The command ``python -m eval.rows FOLDER``, which prints how a finished run's models did on every question.

Its last line is a JSON object: ``answers`` holds per model and task the headline ``metric``, ``values`` (one per
question, in their order; the mean over seeds and repeats) and ``n_cut``; ``warnings`` and ``versions`` are those of
the run. Folders are read and checked as by ``eval.compare``, so the run needs ``--log-samples``.

Exit codes: 0 done, 2 user error (one message on stderr), 130 interrupted.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.exits import exit_code
from eval.finished import Finished, read_finished


_LABEL = "run"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the values of the run in the folder on the command line, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.rows", description="Print a finished run's headline values, question by question."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run's --out, with samples.jsonl")
    folder = parser.parse_args(argv).folder
    return exit_code((), lambda: print(json.dumps(values_by_question(read_finished(folder, _LABEL))), flush=True))


def values_by_question(run: Finished) -> dict[str, Any]:
    """Collect the headline values of every model and task, one per question."""
    answers = {
        model.removeprefix(f"{_LABEL}:"): {
            name: {
                "metric": each.task.headline,
                "values": each.per_row(each.task.headline),
                "n_cut": _cut(run, model, name),
            }
            for name, each in tasks.items()
        }
        for model, tasks in run.answers.items()
    }
    said = {key: run.document.get(key) for key in ("warnings", "versions")}
    return {"answers": answers, **said}


def _cut(run: Finished, model: str, task: str) -> int:
    return next(
        score.n_cut for score in run.scores if (score.model, score.task, score.headline) == (model, task, True)
    )


if __name__ == "__main__":
    sys.exit(main())
