"""Several processes of one command: how many there are, which is first, and what they share.

`torchrun` and `accelerate launch` start the same command several times and number the processes
in environment variables. Only the first process writes files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import HyperlensError, PairError, ResourceError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Found = TypeVar("Found")


def count() -> int:
    """How many processes run this command together."""
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
    """The device given, or else this process's own GPU if there are several processes."""
    import torch

    if device is None and count() > 1 and torch.cuda.is_available():
        return torch.device("cuda", number_here())
    return device


def join(device: torch.device) -> None:
    """Connect to the processes that train together; needed before anything is shared."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu")


def sharded_by() -> str | None:
    """What `accelerate launch` was told to divide the model's weights by; None for whole models."""
    for name, variable in (
        ("FSDP", "ACCELERATE_USE_FSDP"),
        ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"),
    ):
        if count() > 1 and os.environ.get(variable, "false").lower() == "true":
            return name
    return None


def wait() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        import torch

        torch.distributed.barrier()


def summed(*numbers: float) -> tuple[float, ...]:
    """Each number summed over all processes, float64."""
    if count() == 1:
        return numbers
    import torch

    backend = torch.distributed.get_backend()
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return tuple(total.tolist())


def from_first(value: Any) -> Any:
    """The first process's value, in every process."""
    if count() == 1:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: Any) -> list[Any]:
    """Every process's value, in their order, in every process."""
    if count() == 1:
        return [value]
    import torch

    values: list[Any] = [None] * count()
    torch.distributed.all_gather_object(values, value)
    return values


def from_first_here(value: Any) -> Any:
    """The value of the first process of this machine, in every process of it."""
    # Launchers number the processes machine by machine.
    return from_all(value)[number() - number_here()]


# Whether the processes divide the work of measuring, rather than each doing all of it.
_sharing: ContextVar[bool] = ContextVar("sharing work", default=False)
# Whether all of them are at the same step, with the same sums, and so can divide that one too.
_in_step: ContextVar[bool] = ContextVar("in step", default=False)


class FailedElsewhere(ResourceError):
    """Another process has failed, and says why."""


@contextmanager
def share_work() -> Iterator[None]:
    """Divide what is measured inside among the processes that `torchrun` has started.

    Each process reads its share of the texts, and continues its share of the prompts, on a GPU of
    its own where there are any; the sums are added up, so that all of them return the same result:
    what one process would return, up to the rounding of sums. Every process has to make the same
    calls; let only the first one (`RANK` 0) save. The command line does all of that. With a single
    process nothing changes.

    `compare_models` shares its texts, and whatever generates greedily its prompts; anything else
    is computed by every process for itself.

    Raises:
        ResourceError: if another process fails or ends before its share is done.
        PairError: if the processes do not read the same models and texts.

    In a script for `torchrun --nproc-per-node 4 script.py`; alone it changes nothing:

    >>> with share_work():
    ...     sharing()
    False
    """
    if count() == 1 or sharing():
        yield
        return
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    store = None
    if not distributed.is_initialized():
        store, rank, size = next(rendezvous("env://"))
        # Each kind of device by its own means: sums on the CPU beside models on GPUs.
        distributed.init_process_group(store=store, rank=rank, world_size=size)
    token = _sharing.set(True)
    try:
        yield
    except Exception as error:
        if store is not None and not _is_first_to_fail(store):
            raise FailedElsewhere("another process failed: see what it says") from None
        if not _is_loss_of_another(error):
            raise
        raise ResourceError(
            f"another process ended before its share was done (this is number {number()} of "
            f"{count()}, from 0): see whether it ran out of memory, and run the command again"
        ) from None
    finally:
        _sharing.reset(token)
        if store is not None:
            distributed.destroy_process_group()


def _is_first_to_fail(store: Any) -> bool:
    from torch import distributed

    own = str(number())
    try:
        return bool(store.compare_set("hyperlens/failed", "", own).decode() == own)
    except distributed.DistError:  # kept by a process that is gone
        return True


def _is_loss_of_another(error: Exception) -> bool:
    """Whether an error says that a process that was waited for is gone."""
    from torch import distributed

    if isinstance(error, HyperlensError) or not isinstance(error, RuntimeError):
        return False
    words = ("connection closed by peer", "connection reset by peer", "gloo")
    known = isinstance(error, distributed.DistError)
    return known or any(word in str(error).lower() for word in words)


def sharing() -> bool:
    """Whether this process does only its share of what is measured."""
    return _sharing.get()


def sharing_here() -> int:
    """How many processes take memory of this machine for their shares."""
    return on_this_machine() if sharing() else 1


def share() -> tuple[int, int]:
    """Which of how many shares of the work is this process's: (0, 1) is all of it."""
    return (number(), count()) if sharing() else (0, 1)


@contextmanager
def in_step() -> Iterator[None]:
    """Where all processes make the same calls on the same numbers: `divided` shares them there."""
    token = _in_step.set(True)
    try:
        yield
    finally:
        _in_step.reset(token)


def divided(function: Callable[[T], Found], items: Sequence[T]) -> list[Found]:
    """What a function returns for each item; `in_step`, each process calls it for its share.

    Args:
        function: returns the same in every process.
        items: the same in every process.
    """
    if not (sharing() and _in_step.get()):
        return [function(item) for item in items]
    first, step = share()
    shares = from_all([function(item) for item in items[first::step]])
    return [shares[i % step][i // step] for i in range(len(items))]


def is_heard() -> bool:
    """Whether this process shows progress: the first of those that share work, or each."""
    return is_first() or not sharing()


def check_same(what: str, value: Any) -> None:
    """Raise unless all processes that share work have the same value.

    Args:
        what: what the value stands for, in the plural.
        value: a hash, say.

    Raises:
        PairError: naming the processes that differ.
    """
    if not sharing():
        return
    values = from_all(value)
    others = [i for i, other in enumerate(values) if other != values[0]]
    if others:
        raise PairError(
            f"process {others[0]} reads other {what} than the first one: give all processes the "
            "same models, texts and options"
        )
