"""``llamafactory-adaptive`` with runs of a comparison that train nothing: ``python pretended_runs.py compare ...``.

Rows are split in this process; a run has losses by its seed and leaves a folder that looks like an adapter. With the
environment variable PRETENDED_RUNS=N the run after the first N of them never ends and says so, for tests that kill it.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


STARTED, NEVER_ENDS = [], "this run never ends"


def pretend(job, *more):
    """Stand in for ``run_in_own_process``."""
    from llamafactory_adaptive.bridge.comparison_jobs import RunJob
    from llamafactory_adaptive.bridge.merge_job import MergeJob
    from tests.helpers.harness import save_adapter

    if isinstance(job, MergeJob):
        merged = Path(job.folder)
        shutil.rmtree(merged, ignore_errors=True)
        save_adapter(merged)
        (merged / "config.json").write_text("{}")
        return {"folder": job.folder}
    if not isinstance(job, RunJob):
        return job.run()
    losses = np.random.default_rng(job.settings["seed"]).normal(2.0, 0.1, 20).tolist()
    output = Path(job.settings["output_dir"])
    save_adapter(output)
    if os.environ.get("PRETENDED_RUNS") == str(len(STARTED)):
        print(NEVER_ENDS, flush=True)
        time.sleep(3600)
    STARTED.append(output)
    return {"status": "done", "dev": losses, "test": losses, "seconds": 1.0, "training_seconds": 1.0, "steps": 4,
            "parameters": 8, "parameters_of_one_rank": 2, "ranks": {"q_proj": 4}, "adapter": str(output)}  # fmt: skip


if __name__ == "__main__":
    from llamafactory_adaptive import cli
    from llamafactory_adaptive.bridge import comparison, comparison_tasks

    comparison.run_in_own_process = comparison_tasks.run_in_own_process = pretend
    sys.exit(cli.main(sys.argv[1:]))
