"""Collectives over the processes of a job; no-ops when there is only one.

Sums over tensors go through the training's own process group, whose time limit is ``ddp_timeout``. Everything else
goes through the key-value store of the launcher's rendezvous: it exists before any process group and any model, needs
no accelerator, and every wait on it has a time limit of its own and an error that names the missing process.
"""

import json
import os
import time
import zlib
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from llamafactory_adaptive.errors import GuardError, OtherProcessError
from llamafactory_adaptive.launcher import launched_number, launched_processes


Result = TypeVar("Result")
LIMIT_SECONDS = 1800.0  # the longest that processes wait for another one of their job
_LINGER_SECONDS = 30.0
_PIECE_BYTES = 4 * 2**20  # torch's store resets the connection on a value of more than 8 MiB
_last_round = -1
_last_keys: list[str] = []


def world_size() -> int:
    """Count the processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number() -> int:
    """Return this process's rank in the training's process group; 0 if there is none."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, in one collective, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_first(tensor: Tensor) -> Tensor:
    """Replace a tensor by that of the first process, in place and in one collective, and return it."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def all_reduce_max(step: int, device: torch.device) -> int:
    """Return the largest ``step`` of any process."""
    if world_size() == 1:
        return step
    number = torch.tensor(step, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number.item())


def gather(what: str, work: Callable[[], Any], seconds: float = LIMIT_SECONDS) -> list[Any]:
    """Call ``work`` on every process and return the results of all, by rank. All processes must call it.

    An error of ``work`` is raised again on its own process.

    Args:
        what: name of this exchange in messages.
        work: returns something that JSON can hold.
        seconds: how long to wait for the other processes.

    Raises:
        OtherProcessError: ``work`` failed on another process, whose message is quoted.
        GuardError: a process did not arrive within the limit.
    """
    if launched_processes() == 1:
        return [work()]
    try:
        mine = {"value": work()}
    except Exception as error:
        _exchange(what, {"error": str(error) or type(error).__name__}, seconds)
        raise
    said = _exchange(what, mine, seconds)
    for rank, answer in enumerate(said):
        if "error" in answer:
            raise OtherProcessError(f"rank {rank}: {answer['error']}")
    return [answer["value"] for answer in said]


def gather_facts(
    what: str, work: Callable[[], Result], facts: Callable[[Result], Any], seconds: float = LIMIT_SECONDS
) -> tuple[Result, list[Any]]:
    """Call ``work`` on every process; return its result here, and the facts about the results of all, by rank.

    Args:
        what: name of this exchange in messages.
        work: returns anything; it stays on its process.
        facts: returns what the processes tell one another of a result, something that JSON can hold.
        seconds: how long to wait for the other processes.

    Raises:
        OtherProcessError, GuardError: as in :func:`gather`.
    """
    results: list[Result] = []

    def tell() -> Any:
        results.append(work())
        return facts(results[0])

    everyone = gather(what, tell, seconds)
    return results[0], everyone


def from_main(what: str, work: Callable[[], Any], seconds: float = LIMIT_SECONDS) -> Any:
    """Call ``work`` on rank 0 alone and return its result on every process; its error stops every process.

    Arguments and errors are those of :func:`gather`; the result may have any size, as the plan of many modules has.
    """
    return gather(what, lambda: work() if launched_number() == 0 else None, seconds)[0]


def gather_digests(digest: str) -> list[str]:
    """Return the digests of all processes, by rank."""
    return gather("a comparison with the other processes", lambda: digest)


def agree_across_ranks(digest: str, difference: str) -> None:
    """Stop every process unless all digests are equal; ``difference`` is what the error says of ranks that differ."""
    refuse_differences(gather_digests(digest), difference)


def refuse_differences(everyone: list[Any], difference: str) -> None:
    """Stop every process unless all entries are equal; ``difference`` is what the error says of the ranks that differ.

    Raises:
        GuardError: entries differ; every process raises it, with the same text.
    """
    different = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if different:
        raise GuardError(f"ranks {different} {difference}")


def wait_for_all(what: str) -> None:
    """Wait until every process has called this; ``what`` names the place in messages."""
    gather(what, lambda: None)


@cache
def _store() -> Any:
    """Open the key-value store of the launcher's rendezvous; the process group that is made later shares it."""
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=LIMIT_SECONDS)))
    except (RuntimeError, ValueError) as error:  # no process arrived, or there is no address
        raise GuardError(
            f"the {launched_processes()} processes of the job did not all meet within {LIMIT_SECONDS:g} s at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {error}"
        ) from error
    # Where torchrun starts workers again, its store may still hold what those before them have sent.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"llamafactory_adaptive/{attempt}", store)  # type: ignore[attr-defined]


def _exchange(what: str, mine: Any, seconds: float) -> list[Any]:
    """Send a document to all processes and return those of all, by rank."""
    global _last_round, _last_keys
    store, rank, deadline = _store(), launched_number(), time.monotonic() + seconds
    _last_round += 1
    old_keys, _last_keys = _last_keys, _send(store, f"{_last_round}/{rank}", mine)
    documents = []
    for other in range(launched_processes()):
        key = f"{_last_round}/{other}"
        try:
            store.wait([key], timedelta(seconds=max(0.1, deadline - time.monotonic())))
            documents.append(_receive(store, key))
        except RuntimeError as error:  # the store's own errors: a timeout, or its host has ended
            raise GuardError(
                f"rank {other} did not come to {what} within {seconds:g} s, or it has ended: see its own messages"
            ) from error
    for old in old_keys:  # all processes are past them
        store.delete_key(old)
    _last_keys.append(f"{_last_round}/{rank}/read")
    store.set(_last_keys[-1], "")  # last: from now on rank 0, and with it the store, may end
    if rank == 0:
        _wait_until_read(store)
    return documents


def _send(store: Any, key: str, document: Any) -> list[str]:
    """Store a document in pieces that the store takes, and return their keys; the one waited for comes last."""
    packed = zlib.compress(json.dumps(document).encode())
    starts = range(0, len(packed), _PIECE_BYTES)
    pieces = [f"{key}/{number}" for number in range(len(starts))]
    for piece, start in zip(pieces, starts, strict=True):
        store.set(piece, packed[start : start + _PIECE_BYTES])
    store.set(key, str(len(pieces)))
    return [*pieces, key]


def _receive(store: Any, key: str) -> Any:
    """Read a document that :func:`_send` has stored."""
    packed = b"".join(store.get(f"{key}/{number}") for number in range(int(store.get(key))))
    return json.loads(zlib.decompress(packed))


def _wait_until_read(store: Any) -> None:
    """Wait on rank 0 until every process has read what was exchanged.

    The store may end with the process of rank 0, and what is exchanged is often why all processes end.
    """
    keys = [f"{_last_round}/{rank}/read" for rank in range(launched_processes())]
    try:
        store.wait(keys, timedelta(seconds=_LINGER_SECONDS))
    except RuntimeError:
        return  # the others have ended, or notice that rank 0 has


def synchronize() -> None:
    """Wait for the accelerator to finish its work, so that time measured next includes it."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
