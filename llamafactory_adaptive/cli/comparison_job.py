"""``llamafactory-adaptive comparison-job``: the internal command of the processes in which ``compare`` trains."""

import argparse
import json
from typing import Any

from llamafactory_adaptive.cli.host import require_enabled
from llamafactory_adaptive.errors import AdaptiveError


def comparison_job(arguments: argparse.Namespace) -> int:
    """Do the job that is a line of standard input; write its result, or a user error, to the answer file."""
    require_enabled()
    from llamafactory_adaptive.bridge.child import end_with_parent, read_job
    from llamafactory_adaptive.bridge.comparison_jobs import decode_job

    job = decode_job(read_job())
    end_with_parent(arguments.answer.parent)
    answer: dict[str, Any]
    try:
        answer = {"result": job.run()}
    except AdaptiveError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    arguments.answer.write_text(json.dumps(answer), encoding="utf-8")
    return 2 if "error" in answer else 0
