"""Entry point of the command line: ``llamafactory-adaptive plan | train | compare | report | export | shrink | ...``.

Exit codes: 0 done, 2 user error (one message on stderr, no traceback), 1 a bug.
"""

import os
import sys

from llamafactory_adaptive.cli.compare import compare
from llamafactory_adaptive.cli.comparison_job import comparison_job
from llamafactory_adaptive.cli.doctor import doctor
from llamafactory_adaptive.cli.examples import init
from llamafactory_adaptive.cli.export import export
from llamafactory_adaptive.cli.measure import measure
from llamafactory_adaptive.cli.parser import COMPARISON_JOB, MEASURE, parse_command_line
from llamafactory_adaptive.cli.plan import plan
from llamafactory_adaptive.cli.report import report
from llamafactory_adaptive.cli.shrink import shrink
from llamafactory_adaptive.cli.train import train
from llamafactory_adaptive.errors import AdaptiveError
from llamafactory_adaptive.reports.plaintext import tell


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = parse_command_line(argv)
    handlers = {
        "plan": plan, "train": train, "compare": compare, "report": report, "export": export, "shrink": shrink,
        "doctor": doctor, "init": init, MEASURE: measure, COMPARISON_JOB: comparison_job,
    }  # fmt: skip
    try:
        code = handlers[arguments.command](arguments)
        sys.stdout.flush()
        return code
    except AdaptiveError as error:
        tell(f"error: {error}")
        return 2
    except BrokenPipeError:  # `head` and the like read no further; Python would flush once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\nllamafactory-adaptive: interrupted", file=sys.stderr)
        return 130
