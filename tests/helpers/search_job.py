"""A rank search by the Python API as one process of a job: ``torchrun ... search_job.py FOLDER BATCH_SIZE``.

Every process calls what a user's script calls, and writes what it has found to ``FOLDER/process_<rank>.json``.
"""

import json
import os
import sys
from pathlib import Path

import torch

from llamafactory_adaptive import check_adapter
from tests.helpers.searches import searching, trainer_of


def search_in(folder, batch_size):
    """Search, save and check; returns what is found, and how many processes trained."""
    search, backend = searching(), "gloo" if "RANK" in os.environ else None
    trainer = trainer_of(search, folder, per_device_train_batch_size=batch_size, ddp_backend=backend)
    trainer.train()
    trainer.save_model(str(folder))
    plan = search.finalize(folder)
    untrained = check_adapter(folder, plan)
    return {"ranks": plan.ranks(), "untrained": untrained, "processes": trainer.args.world_size}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    found = search_in(target, int(sys.argv[2]))
    (target / f"process_{os.environ['RANK']}.json").write_text(json.dumps(found))
