"""Two processes as torchrun would start them, forked from a server that has imported everything: seconds, not half a
minute each."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamafactory_adaptive.errors import AdaptiveError
from llamafactory_adaptive.planning.cache import CACHE_ENV
from tests.helpers.cpu_devices import read_numbered_cpus
from tests.helpers.fsdp import shard_on_cpu


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "deepspeed", "llamafactory_adaptive.training.callback", "llamafactory.train.tuner"]
)


def train_on_two(args: dict[str, Any], logs: Path, **more: str) -> None:
    """Run the host's training function in two processes, with more in their environment.

    Raises with their last words if one fails.
    """
    _train([{"LOCAL_RANK": str(rank), **more} for rank in range(2)], args, logs)


def train_on_two_nodes(args: dict[str, Any], folder: Path) -> list[Path]:
    """The same, each process the only one of a node with a home, a cache and a working directory of its own."""
    nodes = [folder / f"node{rank}" for rank in range(2)]
    _train([of_node(node) | {"LOCAL_WORLD_SIZE": "1"} for node in nodes], args, folder / "logs")
    return nodes


def of_node(node: Path) -> dict[str, str]:
    """The environment of the first process of a node that shares no folder with others."""
    return {"LOCAL_RANK": "0", "NODE_RANK": node.name[-1], "HOME": str(node), CACHE_ENV: str(node / "cache")}


def _train(by_rank: list[dict[str, str]], args: dict[str, Any], logs: Path) -> None:
    logs.mkdir(parents=True, exist_ok=True)
    common = _environment()
    processes = [
        _context.Process(target=_work, args=(args, rank, {**common, **own}, str(logs / f"{rank}.log")))
        for rank, own in enumerate(by_rank)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0], f"exit codes {codes}\n" + "\n".join(p.read_text()[-4000:] for p in logs.glob("*.log"))


def said_by_two(work: Callable[..., Any], *arguments: Any) -> list[str]:
    """Run ``work(rank, *arguments)`` in two processes that meet before any process group; what each says, by rank.

    That is what ``work`` returns, as a text, or the class and text of the AdaptiveError it ends with.
    """
    answers, heard, environment = _context.Queue(), _context.Event(), _environment()
    processes = [
        _context.Process(target=_say, args=(rank, environment, answers, heard, work, arguments), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    by_rank = dict(answers.get(timeout=120) for _ in processes)
    heard.set()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [by_rank[0], by_rank[1]]


def _say(
    rank: int,
    environment: dict[str, str],
    answers: Any,
    heard: Any,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    try:
        said = str(work(rank, *arguments))
    except AdaptiveError as error:  # the process ends, as that of a run would
        answers.put((rank, f"{type(error).__name__}: {error}"))
    except BaseException:  # told to the test, which would wait for an answer otherwise
        answers.put((rank, traceback.format_exc()))
    else:
        answers.put((rank, said))
        heard.wait(120)  # a run would go on, and with it the store where the others read


def _environment() -> dict[str, str]:
    """What both processes have in theirs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}  # fmt: skip


def _work(args: dict[str, Any], rank: int, environment: dict[str, str], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update({**environment, "RANK": str(rank)})
    code = 1
    try:
        if "NODE_RANK" in environment:
            os.makedirs(environment["HOME"], exist_ok=True)
            os.chdir(environment["HOME"])
        import torch

        torch.set_num_threads(1)
        read_numbered_cpus()
        from llamafactory_adaptive import _bootstrap

        _bootstrap.install()
        if "FSDP_VERSION" in environment:
            shard_on_cpu()
        from llamafactory.train.tuner import run_exp

        run_exp(args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of gloo may abort an interpreter that is torn down
