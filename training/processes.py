"""Training in several processes: how many there are, which is first, and what they share.

`torchrun` and `accelerate launch` start the same command several times and number the processes
in environment variables. Only the first process writes files.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_this_machine() -> int:
    """How many of them share this machine's memory and disk."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count()))


def number() -> int:
    """Which of them this process is, from 0."""
    return int(os.environ.get("RANK", "0"))


def number_here() -> int:
    """Which of this machine's processes this one is, from 0."""
    return int(os.environ.get("LOCAL_RANK", number()))


def machine() -> int:
    """Which machine this is, from 0."""
    return int(os.environ.get("GROUP_RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return number() == 0


def is_first_here() -> bool:
    """Whether this process is the first one of its machine."""
    return number_here() == 0


def default_device(device: torch.device | None) -> torch.device | None:
    """The device given, or else this process's own GPU if several processes train together."""
    if device is None and count() > 1 and torch.cuda.is_available():
        return torch.device("cuda", number_here())
    return device


def join(device: torch.device) -> None:
    """Connect to the other processes; needed before anything is shared."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu")


def wait() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        torch.distributed.barrier()


def summed(*numbers: float) -> tuple[float, ...]:
    """Each number summed over all processes, float64."""
    if count() == 1:
        return numbers
    backend = torch.distributed.get_backend()
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return tuple(total.tolist())


def from_first(value: Any) -> Any:
    """The first process's value, in every process."""
    if count() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: Any) -> list[Any]:
    """Every process's value, in their order, in every process."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    torch.distributed.all_gather_object(values, value)
    return values


def from_first_here(value: Any) -> Any:
    """The value of the first process of this machine, in every process of it."""
    # Launchers number the processes machine by machine.
    return from_all(value)[number() - number_here()]
