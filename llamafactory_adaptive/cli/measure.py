"""``llamafactory-adaptive measure``: the internal command of the process in which ``plan`` and ``train`` score."""

import argparse
import json

from llamafactory_adaptive.cli.host import require_enabled
from llamafactory_adaptive.errors import AdaptiveError


def measure(arguments: argparse.Namespace) -> int:
    """Run the measurement whose job is a line of standard input; write a user error to the answer file."""
    require_enabled()
    from llamafactory_adaptive.bridge.child import end_with_parent, read_job
    from llamafactory_adaptive.bridge.measure_process import run_measurement_job
    from llamafactory_adaptive.bridge.scoring_job import ScoringJob

    job = ScoringJob.from_json(json.loads(read_job()))
    end_with_parent(arguments.answer.parent)
    try:
        run_measurement_job(job)
    except AdaptiveError as error:
        arguments.answer.write_text(json.dumps({"error": str(error)}), encoding="utf-8")
        return 2
    return 0
