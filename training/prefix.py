"""The prefix cache: compute what the frozen first blocks return only once per sequence.

With the embedding and the first blocks frozen and without dropout, the residual stream that enters
the first trained block depends on the sequence alone. It is stored when a sequence is first seen.
From then on the frozen blocks return their input at once, and the stored residual is put in front
of the first trained block. The model's own code still runs around that, so masks, positions and
attention windows are its own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import ResourceError
from ..hooks.attach import entering_at, residual_given
from . import processes
from .weights import next_numbers, trainers_randomness, training_mode

Place = Literal["memory", "disk"]

# The share of free memory or disk space that the cache may take: training needs some, too.
MEMORY_SHARE = 0.5
DISK_SHARE = 0.9
# Prefix of the names of memory-mapped files.
MAPPED = "prefix-cache-"


@dataclass(frozen=True)
class Plan:
    """How large the cache will be and where it goes.

    Attributes:
        n_bytes: of all residuals.
        place: "memory", or "disk" for a memory-mapped file in `folder`.
        folder: where the file would be.
    """

    n_bytes: int
    place: Place
    folder: Path

    def __str__(self) -> str:
        where = "in memory" if self.place == "memory" else f"in a file under {self.folder}"
        return f"{self.n_bytes / 2**20:,.0f} MiB of residuals {where}"


def plan(shape: tuple[int, int, int], dtype: torch.dtype, folder: Path) -> Plan:
    """Plan where the residuals of all sequences go: in memory if they take at most half of it.

    Every process stores all of them, so the processes on one machine share its memory.

    Args:
        shape: (sequences, pos, d_model).
        dtype: of the residual stream.
        folder: for a file, if they do not fit in memory.

    Raises:
        ResourceError: if they fit neither in memory nor on the disk.
    """
    sequences, pos, d_model = shape
    n_bytes = sequences * pos * d_model * dtype.itemsize
    memory = int(psutil.virtual_memory().available)
    sharing = processes.on_this_machine()
    if n_bytes * sharing <= MEMORY_SHARE * memory:
        return Plan(n_bytes, "memory", folder)
    disk = shutil.disk_usage(folder).free
    if n_bytes * sharing <= DISK_SHARE * disk:
        return Plan(n_bytes, "disk", folder)
    each = f" in each of {sharing} processes" if sharing > 1 else ""
    raise ResourceError(
        f"the prefix cache needs {n_bytes / 2**30:.1f} GiB{each} for {sequences} x {pos} tokens of "
        f"{d_model} numbers; {memory / 2**30:.1f} GiB of memory and {disk / 2**30:.1f} GiB under "
        f"{folder} are free: lower n_sequences or sequence_length, or turn the cache off "
        "(prefix_cache=False, --no-prefix-cache)"
    )


class PrefixCache:
    """Residuals entering the first trained block, by sequence.

    Args:
        blocks: all blocks of the model, in order.
        first: 0-based index of the first trained block; everything before it is frozen.
        n_sequences: how many sequences there are.
        plan: where to store their residuals.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], first: int, n_sequences: int, plan: Plan
    ) -> None:
        self.plan = plan
        self._frozen = tuple(blocks[:first])
        self._entered = blocks[first]
        self._filled: Bool[Tensor, " n"] = torch.zeros(n_sequences, dtype=torch.bool)
        self._residuals: Float[Tensor, "n pos d_model"] | None = None
        self._blocks = tuple(blocks)
        # How many values each frozen block returns besides the residual; None for a plain tensor.
        self._extras: dict[nn.Module, int | None] = {}

    @contextmanager
    def serving(self, index: Int[Tensor, " batch"]) -> Iterator[None]:
        """Inside, the model may run on the sequences `index`, and only on them, in this order.

        If a sequence among them is new, the frozen blocks run and the residuals of all are stored;
        otherwise the frozen blocks are skipped.
        """
        rows = index.cpu()
        if self._residuals is not None and bool(self._filled[rows].all()):
            extras = [self._extras[block] for block in self._frozen]
            with entering_at(self._blocks, extras, len(extras), self._residuals[rows]):
                yield
        else:
            with self._recording(rows):
                yield

    def close(self) -> None:
        """Drop all residuals and release their memory or file."""
        self._residuals = None
        self._filled.zero_()

    @contextmanager
    def _recording(self, rows: Int[Tensor, " batch"]) -> Iterator[None]:
        def store(module: nn.Module, args: Any, kwargs: Any) -> None:
            residual = residual_given(args, kwargs).detach()
            if self._residuals is None:
                self._residuals = self._allocate(residual)
            self._residuals[rows] = residual.to(self._residuals.device)
            self._filled[rows] = True

        def count_extras(module: nn.Module, args: Any, output: Any) -> None:
            # Only their number is stored: their values belong to this batch. A model that needs
            # the values fails `is_exact`.
            self._extras[module] = None if isinstance(output, Tensor) else len(output) - 1

        with contextlib.ExitStack() as hooks:
            hooks.enter_context(self._entered.register_forward_pre_hook(store, with_kwargs=True))
            if not self._extras:
                for block in self._frozen:
                    hooks.enter_context(block.register_forward_hook(count_extras))
            yield

    def _allocate(self, like: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "n pos d_model"]:
        shape = (len(self._filled), *like.shape[1:])
        if self.plan.place == "memory":
            return torch.empty(shape, dtype=like.dtype)
        # A name of its own, as other processes may use the same folder.
        name = f"{MAPPED}{secrets.token_hex(4)}.bin"
        return _mapped(self.plan.folder / name, shape, like.dtype)


def is_exact(model: nn.Module, cache: PrefixCache, tokens: Int[Tensor, "batch pos"]) -> bool:
    """Whether the logits are bit-identical with the prefix from the cache.

    Some architectures pass more than the residual stream from block to block. The cache would
    change what they compute, or make them fail. Some draw random numbers in training mode, which
    the cache would freeze: without those of the frozen blocks, the generators go on otherwise.

    It is empty afterwards, because training may compute other residuals than this check, in mixed
    precision for example.
    """
    try:
        with training_mode(model), torch.no_grad():
            computed, numbers = _outcome(model, cache, tokens)
            try:
                cached, numbers_cached = _outcome(model, cache, tokens)
            except Exception:  # any error of a block that misses an input
                return False
    finally:
        cache.close()
    return torch.equal(computed, cached) and numbers == numbers_cached


def _outcome(
    model: nn.Module, cache: PrefixCache, tokens: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos d_vocab"], tuple[float, ...]]:
    """Logits, and the random numbers that come after them."""
    with trainers_randomness(0, tokens.device), cache.serving(torch.arange(len(tokens))):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits, next_numbers(tokens.device)


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a memory-mapped file that is deleted with it, also when the process is killed.

    The file loses its name at once and its space when the process ends. The space is reserved now:
    on a disk that fills up later, writing to the tensor would kill the process.

    Raises:
        ResourceError: if the file cannot be made that large.
    """
    size = torch.Size(shape).numel()
    try:
        with path.open("wb") as file:
            file.truncate(max(1, size * dtype.itemsize))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        tensor = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
    except OSError as error:
        raise ResourceError(
            f"cannot store the prefix cache in {path} ({error.strerror or error}): free some "
            "space, or turn the cache off (prefix_cache=False, --no-prefix-cache)"
        ) from None
    finally:
        path.unlink(missing_ok=True)
    return tensor
