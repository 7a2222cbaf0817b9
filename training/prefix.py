"""The prefix cache: compute what the frozen first blocks return only once per sequence.

With the embedding and the first blocks frozen and without dropout, the residual stream that enters
the first trained block depends on the sequence alone. It is computed for all sequences before the
first step. From then on the frozen blocks return their input at once, and the stored residual is
put in front of the first trained block. The model's own code still runs around that, so masks,
positions and attention windows are its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import processes
from ..errors import ResourceError
from ..hooks.attach import entering_at, residual_given, skipped
from ..models.structure import find_structure
from .token_loss import last_position_only
from .weights import next_numbers, trainers_randomness, training_mode

Place = Literal["memory", "disk"]

# The share of free memory or disk space that the cache may take: training needs some, too.
MEMORY_SHARE = 0.5
DISK_SHARE = 0.9
# Up to this share of it, a file is taken where memory would do.
SPARE_DISK_SHARE = 0.5
# Prefix of the names of memory-mapped files.
MAPPED = "prefix-cache-"


@dataclass(frozen=True)
class Plan:
    """How large the cache will be and where it goes.

    Attributes:
        n_bytes: of all residuals.
        place: "memory", or "disk" for a memory-mapped file in `folder`.
        folder: where the file would be.
        keep: leave the file in the folder, so that a resumed run finds it.
    """

    n_bytes: int
    place: Place
    folder: Path
    keep: bool = False

    def __str__(self) -> str:
        where = "in memory" if self.place == "memory" else f"in a file under {self.folder}"
        return f"{self.n_bytes / 2**20:,.0f} MiB of residuals {where}"


def plan(
    shape: tuple[int, int, int], dtype: torch.dtype, folder: Path, *, keep: bool = False
) -> Plan:
    """Plan where the residuals of all sequences go.

    A file is shared by the processes of one machine, and found again by a resumed run: it comes
    first where either is of use, and memory otherwise, up to half of what is free. In memory every
    process of the machine has its own.

    Args:
        shape: (sequences, pos, d_model).
        dtype: of the residual stream.
        folder: for a file.
        keep: whether a resumed run would find the file.

    Raises:
        ResourceError: if they fit neither in memory nor on the disk.
    """
    sequences, pos, d_model = shape
    n_bytes = sequences * pos * d_model * dtype.itemsize
    memory = int(psutil.virtual_memory().available)
    disk = shutil.disk_usage(folder).free
    sharing = processes.on_this_machine()
    if (keep or sharing > 1) and n_bytes <= SPARE_DISK_SHARE * disk:
        return Plan(n_bytes, "disk", folder, keep)
    if n_bytes * sharing <= MEMORY_SHARE * memory:
        return Plan(n_bytes, "memory", folder)
    if n_bytes <= DISK_SHARE * disk:
        return Plan(n_bytes, "disk", folder, keep)
    raise ResourceError(
        f"the prefix cache needs {n_bytes / 2**30:.1f} GiB for {sequences} x {pos} tokens of "
        f"{d_model} numbers; {memory / 2**30:.1f} GiB of memory and {disk / 2**30:.1f} GiB under "
        f"{folder} are free: lower n_sequences or sequence_length, or turn the cache off "
        "(prefix_cache=False, --no-prefix-cache)"
    )


@dataclass
class LastResiduals:
    """The residuals of the last run, for the next one on the same sequences of the same base.

    A run whose first trained block is the same takes them as they are; for one that freezes more
    blocks, only the blocks between have to be run.

    Attributes:
        first: 0-based index of the block that they enter.
        residuals: of all sequences; None before the first run.
    """

    first: int = 0
    residuals: Float[Tensor, "n pos d_model"] | None = None


@dataclass(frozen=True)
class SharedPrefixes:
    """What several runs on one base and the same sequences hand on to each other.

    Attributes:
        training: of the sequences that are trained on.
        held_out: of those that are measured on.
    """

    training: LastResiduals = field(default_factory=LastResiduals)
    held_out: LastResiduals = field(default_factory=LastResiduals)


class PrefixCache:
    """Residuals entering the first trained block, by sequence.

    Args:
        model: plain model or PeftModel.
        first: 0-based index of the first trained block; everything before it is frozen.
        plan: where to store the residuals.
        last: those of the last run on the same sequences; None if there is none to share with.
    """

    def __init__(
        self, model: nn.Module, first: int, plan: Plan, last: LastResiduals | None = None
    ) -> None:
        self.plan = plan
        self._first = first
        self._last = last
        self._structure = find_structure(model)
        self._residuals: Float[Tensor, "n pos d_model"] | None = None

    @contextmanager
    def serving(self, index: Int[Tensor, " batch"]) -> Iterator[None]:
        """Inside, the model may run on the sequences `index`, and only on them, in this order."""
        assert self._residuals is not None  # noqa: S101 - filled before anything is served
        blocks, extras = self._structure.blocks, self._structure.extras
        with entering_at(blocks, extras, self._first, self._residuals[index.cpu()]):
            yield

    def fill(
        self,
        model: nn.Module,
        tokens: Int[Tensor, "n pos"],
        rows: int,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """Compute the residuals of all sequences, or find them in the file of an earlier run.

        The processes of a machine share the work where they share a file. A file is taken for that
        of the same residuals only if its name says so, by a hash of everything that decides them,
        and if the first of them are the same, bit for bit.

        Args:
            model: as it will run; mixed precision is the caller's.
            tokens: all sequences.
            rows: sequences per forward pass.
            identity: what decides the residuals besides their type and shape, as JSON values.

        Raises:
            ResourceError: if the file cannot be made.
        """
        last = self._last
        if last is not None and last.residuals is not None and last.first == self._first:
            self._residuals = last.residuals
            return
        self._fill_anew(model, tokens, rows, identity)
        if last is not None:
            last.first, last.residuals = self._first, self._residuals

    def close(self) -> None:
        """Drop all residuals and release their memory or file."""
        self._residuals = None

    def _fill_anew(
        self, model: nn.Module, tokens: Tensor, rows: int, identity: Mapping[str, Any] | None
    ) -> None:
        batches = torch.split(tokens, rows)
        first = self._compute(model, batches[0], self._entering(0, len(batches[0])))
        shape = (len(tokens), *first.shape[1:])
        if self.plan.place == "memory":
            self._residuals = torch.empty(shape, dtype=first.dtype)
            self._fill(model, batches, first, range(len(batches)))
            return
        about = {**(identity or {}), "rows": rows, "shape": shape, "dtype": str(first.dtype)}
        file = ResidualFile.named(self.plan.folder, about)
        self._residuals, is_complete = file.open(shape, first, keep=self.plan.keep)
        if not is_complete:
            own = range(processes.number_here(), len(batches), processes.on_this_machine())
            self._fill(model, batches, first, own)
            file.close(self._residuals, keep=self.plan.keep)

    def _fill(
        self,
        model: nn.Module,
        batches: tuple[Tensor, ...],
        first: Float[Tensor, "rows pos d_model"],
        own: range,
    ) -> None:
        """Compute the batches that are this process's; the first one is there already."""
        assert self._residuals is not None  # noqa: S101
        for i in own:
            start = i * len(first)
            entering = self._entering(start, len(batches[i]))
            residuals = first if i == 0 else self._compute(model, batches[i], entering)
            self._residuals[start : start + len(residuals)] = residuals

    def _entering(self, start: int, rows: int) -> AbstractContextManager[None]:
        """Inside, the blocks that the last run had frozen are not run on these sequences again."""
        last = self._last
        if last is None or last.residuals is None or not 0 < last.first < self._first:
            return contextlib.nullcontext()
        blocks, extras = self._structure.blocks, self._structure.extras
        return entering_at(blocks, extras, last.first, last.residuals[start : start + rows])

    def _compute(
        self,
        model: nn.Module,
        tokens: Int[Tensor, "batch pos"],
        entering: AbstractContextManager[None],
    ) -> Float[Tensor, "batch pos d_model"]:
        """What enters the first trained block, in main memory; the later blocks are not run."""
        blocks, extras = self._structure.blocks, self._structure.extras
        residuals: list[Tensor] = []

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            residuals.append(residual_given(args, kwargs).detach().cpu())

        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        with contextlib.ExitStack() as changes:
            changes.enter_context(
                blocks[self._first].register_forward_pre_hook(keep, with_kwargs=True)
            )
            changes.enter_context(entering)
            changes.enter_context(skipped(blocks[self._first :], extras[self._first :]))
            changes.enter_context(last_position_only(self._structure.head))
            changes.enter_context(torch.no_grad())
            model(input_ids=tokens.to(device), use_cache=False)
        return residuals[0]


def is_exact(model: nn.Module, cache: PrefixCache, tokens: Int[Tensor, "batch pos"]) -> bool:
    """Whether the logits are bit-identical with the prefix from the cache.

    Some architectures pass more than the residual stream from block to block. The cache would
    change what they compute, or make them fail. Some draw random numbers in training mode, which
    the cache would freeze: without those of the frozen blocks, the generators go on otherwise.

    It is empty afterwards, because training may compute other residuals than this check, in mixed
    precision for example.
    """
    index = torch.arange(len(tokens))
    with training_mode(model), torch.no_grad():
        try:
            # First, so that what a block leaves for later ones is not there when they are checked.
            cache._residuals = cache._compute(model, tokens, contextlib.nullcontext())
            computed, numbers = _outcome(model, tokens, contextlib.nullcontext())
            cached, numbers_cached = _outcome(model, tokens, cache.serving(index))
        except Exception:  # any error of a block that misses an input
            return False
        finally:
            cache.close()
    return torch.equal(computed, cached) and numbers == numbers_cached


def _outcome(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    serving: contextlib.AbstractContextManager[None],
) -> tuple[Float[Tensor, "batch pos d_vocab"], tuple[float, ...]]:
    """Logits, and the random numbers that come after them."""
    with trainers_randomness(0, tokens.device), serving:
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits, next_numbers(tokens.device)


@dataclass(frozen=True)
class ResidualFile:
    """A file of residuals that the processes of one machine map into their memory.

    While it is being filled it has another name, so a killed run leaves no file that looks
    complete. A machine deletes only files of its own: several may use one folder.

    Attributes:
        path: of the complete file.
    """

    path: Path

    @classmethod
    def named(cls, folder: Path, identity: Mapping[str, Any]) -> ResidualFile:
        """The file for these residuals, by the hash of everything that decides them."""
        text = json.dumps(identity, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        return cls(folder / f"{MAPPED}{digest}-{processes.machine()}.bin")

    @property
    def unfinished(self) -> Path:
        """Its name while it is being filled."""
        return self.path.with_suffix(".unfinished")

    def open(
        self, shape: tuple[int, ...], first: Float[Tensor, "rows pos d_model"], *, keep: bool
    ) -> tuple[Float[Tensor, "n pos d_model"], bool]:
        """The residuals, and whether they are all there already.

        Args:
            shape: of all residuals.
            first: the first of them, computed just now.
            keep: whether a file may have been left by an earlier run.

        Raises:
            ResourceError: if the file cannot be made that large.
        """
        made: Any = None
        if processes.is_first_here():
            try:
                made = self._find(shape, first) or self._make(shape, first.dtype)
            except ResourceError as error:
                made = error
        made = processes.from_first_here(made)
        if isinstance(made, ResourceError):
            raise made
        residuals = _mapped(made, shape, first.dtype)
        processes.wait()
        if not keep and processes.is_first_here():
            # It loses its name now, and its space when the processes end, however they end.
            made.unlink()
        return residuals, made == self.path

    def close(self, residuals: Tensor, *, keep: bool) -> None:
        """Wait for the other processes, and give the filled file its name."""
        processes.wait()
        if keep and processes.is_first_here():
            try:
                with self.unfinished.open("rb+") as file:
                    os.fsync(file.fileno())
                os.replace(self.unfinished, self.path)
            except OSError as error:
                raise _cannot_store(self.path, error) from None

    def _find(self, shape: tuple[int, ...], first: Tensor) -> Path | None:
        """The complete file of an earlier run, if it begins as it should; others are deleted."""
        n_bytes = torch.Size(shape).numel() * first.dtype.itemsize
        if self.path.exists() and self.path.stat().st_size == n_bytes:
            known = _mapped(self.path, shape, first.dtype)[: len(first)]
            if torch.equal(known.view(torch.uint8), first.contiguous().view(torch.uint8)):
                return self.path
        for path in self.path.parent.glob(f"{MAPPED}*-{processes.machine()}.*"):
            path.unlink(missing_ok=True)
        return None

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype) -> Path:
        """An empty file of that size.

        Its space is reserved now: on a disk that fills up later, writing to a mapped file would
        kill the process.
        """
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        try:
            with self.unfinished.open("wb") as file:
                file.truncate(n_bytes)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
        except OSError as error:
            self.unfinished.unlink(missing_ok=True)
            raise _cannot_store(self.path, error) from None
        return self.unfinished


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A file as a tensor."""
    size = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)


def _cannot_store(path: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"cannot store the prefix cache in {path.parent} ({error.strerror or error}): free some "
        "space, or turn the cache off (prefix_cache=False, --no-prefix-cache)"
    )
