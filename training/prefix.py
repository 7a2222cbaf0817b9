"""The frozen prefix, computed once: what enters the first trained block never changes.

With the embedding and the first blocks frozen, the residual entering the first trained block is a
function of the text alone. It is kept from the first time a sequence is seen; from then on the
frozen blocks pass their input on untouched and the kept residual takes its place. Masks,
positions, windows and everything else are still made by the model's own code.
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

Place = Literal["memory", "disk"]

# The share of what is free now that caches may take: the rest of the training needs some too.
MEMORY_SHARE = 0.5
DISK_SHARE = 0.9
# How the names of mapped files begin.
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


def plan(
    shape: tuple[int, int, int], dtype: torch.dtype, folder: Path, free_memory: int | None = None
) -> Plan:
    """Where the residuals of all sequences fit: in memory if they take half of what is free.

    Every process keeps them all, so those on one machine share what is free there.

    Args:
        shape: (sequences, pos, d_model).
        dtype: of the residual stream.
        folder: on the disk to use otherwise.
        free_memory: bytes; None asks the system.

    Raises:
        ResourceError: if they fit neither in memory nor on the disk.
    """
    sequences, pos, d_model = shape
    n_bytes = sequences * pos * d_model * dtype.itemsize
    memory = int(psutil.virtual_memory().available) if free_memory is None else free_memory
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
        plan: where to keep their residuals.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], first: int, n_sequences: int, plan: Plan
    ) -> None:
        self.plan = plan
        self._frozen = tuple(blocks[:first])
        self._entered = blocks[first]
        self._filled: Bool[Tensor, " n"] = torch.zeros(n_sequences, dtype=torch.bool)
        self._kept: Float[Tensor, "n pos d_model"] | None = None
        self._blocks = tuple(blocks)
        # How many values a frozen block returns besides the residual, None for a plain tensor.
        self._extras: dict[nn.Module, int | None] = {}

    @contextmanager
    def serving(self, index: Int[Tensor, " batch"]) -> Iterator[None]:
        """Inside, the model may run on the sequences `index`, and only on them, in this order.

        The first time, their residuals are recorded; from then on the frozen blocks do nothing.
        """
        rows = index.cpu()
        if self._kept is not None and bool(self._filled[rows].all()):
            extras = [self._extras[block] for block in self._frozen]
            with entering_at(self._blocks, extras, len(extras), self._kept[rows]):
                yield
        else:
            with self._recording(rows):
                yield

    def close(self) -> None:
        """Forget everything; memory or file is let go of."""
        self._kept = None
        self._filled.zero_()

    @contextmanager
    def _recording(self, rows: Int[Tensor, " batch"]) -> Iterator[None]:
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            residual = residual_given(args, kwargs).detach()
            if self._kept is None:
                self._kept = self._allocate(residual)
            self._kept[rows] = residual.to(self._kept.device)
            self._filled[rows] = True

        def note(module: nn.Module, args: Any, output: Any) -> None:
            # Nothing of this batch may reach another: where it matters, `is_exact` sees it.
            self._extras[module] = None if isinstance(output, Tensor) else len(output) - 1

        with contextlib.ExitStack() as hooks:
            hooks.enter_context(self._entered.register_forward_pre_hook(keep, with_kwargs=True))
            if not self._extras:
                for block in self._frozen:
                    hooks.enter_context(block.register_forward_hook(note))
            yield

    def _allocate(self, like: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "n pos d_model"]:
        shape = (len(self._filled), *like.shape[1:])
        if self.plan.place == "memory":
            return torch.empty(shape, dtype=like.dtype)
        # Other processes may keep theirs in the same folder.
        name = f"{MAPPED}{secrets.token_hex(4)}.bin"
        return _mapped(self.plan.folder / name, shape, like.dtype)


def is_exact(model: nn.Module, cache: PrefixCache, tokens: Int[Tensor, "batch pos"]) -> bool:
    """Whether the model says the same, bit for bit, when its prefix is served from the cache.

    Some architectures hand more than the residual stream from block to block; a cache would
    change what they compute, or leave them without what they need. The cache is left empty: what
    training computes may differ from what is computed here, in mixed precision for one.
    """
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    index = torch.arange(len(tokens))
    try:
        with torch.no_grad():
            recorded = _logits(model, cache, index, tokens)
            try:
                served = _logits(model, cache, index, tokens)
            except Exception:  # whatever a block says that misses something
                return False
    finally:
        cache.close()
        for module in was_training:
            module.training = True
    return torch.equal(recorded, served)


def _logits(
    model: nn.Module,
    cache: PrefixCache,
    index: Int[Tensor, " batch"],
    tokens: Int[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos d_vocab"]:
    with cache.serving(index):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a memory-mapped file that vanishes with it, also when the process is killed.

    The space is taken at once: a disk that fills up later would kill the process on a write.

    Raises:
        ResourceError: if the file cannot be made that large.
    """
    size = torch.Size(shape).numel()
    try:
        with path.open("wb") as file:
            file.truncate(max(1, size * dtype.itemsize))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        kept = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
    except OSError as error:
        raise ResourceError(
            f"cannot keep the prefix cache in {path} ({error.strerror or error}): free some space, "
            "or turn the cache off (prefix_cache=False, --no-prefix-cache)"
        ) from None
    finally:
        path.unlink(missing_ok=True)
    return kept
