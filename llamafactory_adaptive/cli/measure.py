"""``llamafactory-adaptive measure``: the internal command of the process that loads a model for other commands."""

import argparse
import json

from llamafactory_adaptive.cli.host import require_enabled
from llamafactory_adaptive.errors import AdaptiveError


def measure(arguments: argparse.Namespace) -> int:
    """Run the measurement whose job is a line of standard input; write a user error to the answer file."""
    require_enabled()
    from llamafactory_adaptive.bridge.child import end_with_parent, read_job
    from llamafactory_adaptive.bridge.held_out import HeldOutJob, run_held_out_job
    from llamafactory_adaptive.bridge.measure_process import run_measurement_job
    from llamafactory_adaptive.bridge.scoring_job import ScoringJob

    values = json.loads(read_job())
    end_with_parent(arguments.answer.parent)
    try:
        if "cuts" in values:
            run_held_out_job(HeldOutJob.from_json(values))
        else:
            run_measurement_job(ScoringJob.from_json(values))
    except AdaptiveError as error:
        arguments.answer.write_text(json.dumps({"error": str(error)}), encoding="utf-8")
        return 2
    return 0
