"""Two training processes as torchrun would start them, forked from a server that has imported everything: seconds, not
half a minute each."""

import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "deepspeed", "llamafactory_adaptive.training.search_callback", "llamafactory.train.tuner"]
)


def train_on_two(args: dict[str, Any], logs: Path) -> None:
    """Run the host's training function in two processes; raises with their last words if one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                   "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}  # fmt: skip
    processes = [
        _context.Process(target=_work, args=(args, rank, environment, str(logs / f"{rank}.log"))) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0], f"exit codes {codes}\n" + "\n".join(p.read_text()[-4000:] for p in logs.glob("*.log"))


def _work(args: dict[str, Any], rank: int, environment: dict[str, str], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    code = 1
    try:
        import torch

        torch.set_num_threads(1)
        # The Trainer resumes DDP onto the device "cpu:0", which torch.load does not know (transformers 5.5.4).
        torch.serialization.register_package(
            5, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
        )
        from llamafactory_adaptive import _bootstrap

        _bootstrap.install()
        from llamafactory.train.tuner import run_exp

        run_exp(args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of gloo may abort an interpreter that is torn down
