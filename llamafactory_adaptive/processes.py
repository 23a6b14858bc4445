"""What the processes of a job tell each other. Alone, every call is free."""

import torch
from torch import Tensor
from torch import distributed as dist


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number() -> int:
    """This process's rank."""
    return dist.get_rank() if processes() > 1 else 0


def add_up(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place, in one collective."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_digests(digest: str, device: torch.device) -> list[str]:
    """A hexadecimal digest of every process, by rank."""
    if processes() == 1:
        return [digest]
    mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=device)
    everyone = [torch.empty_like(mine) for _ in range(processes())]
    dist.all_gather(everyone, mine)
    return [bytes(theirs.tolist()).hex() for theirs in everyone]


def latest(step: int, device: torch.device) -> int:
    """The largest number any process has."""
    if processes() == 1:
        return step
    number = torch.tensor(step, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number.item())


def wait_for_all() -> None:
    """Until every process is here."""
    if processes() > 1:
        dist.barrier()


def synchronize() -> None:
    """Wait for the accelerator, so that a clock read next is true."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
