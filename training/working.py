"""The folder of an unfinished run: what is being trained, how far it has come, and its weights.

A run that will be saved in `out` works in `out.partial`. Nothing in there is ever half true: a
checkpoint is written under another name and then moved into place, so that a process killed at
any moment leaves the last whole one behind. The same command finds it and goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ResultsError, TrainingError
from ..files import write_text
from . import processes
from .history import FILE
from .prefix import MAPPED

IDENTITY = "run.json"
CHECKPOINT = "checkpoint"
PROGRESS = "progress.json"
FINISHED = "finished"
LOGS = "runs"


@dataclass(frozen=True)
class Working:
    """An unfinished run on disk.

    Attributes:
        folder: where it works.
        keeps: whether its checkpoints can be gone on from; a run without `out` has nowhere to.
    """

    folder: Path
    keeps: bool

    @property
    def scratch(self) -> Path:
        """Where things are written before they are moved into place."""
        return self.folder / "writing"

    @property
    def logs(self) -> Path:
        """Where TensorBoard's logs go, by transformers' choice."""
        return self.scratch / LOGS

    @property
    def finished(self) -> Path:
        """Where the result is written, before it is moved to where it was asked for."""
        return self.folder / FINISHED

    @property
    def history(self) -> Path:
        """The record so far, as a table."""
        return self.folder / FILE

    @property
    def checkpoint(self) -> Path | None:
        """The last whole checkpoint, None if there is none yet."""
        # While one replaces another there is a moment when only the old one has a name.
        found = (self.folder / name for name in (CHECKPOINT, f"{CHECKPOINT}.old"))
        return next((path for path in found if (path / PROGRESS).exists()), None)

    def promote(self, written: Path, progress: dict[str, Any]) -> None:
        """Make a folder of weights and states the checkpoint; the one before it goes."""
        write_text(written / PROGRESS, json.dumps(progress))
        current, old = self.folder / CHECKPOINT, self.folder / f"{CHECKPOINT}.old"
        if current.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(current, old)
        os.replace(written, current)
        shutil.rmtree(old, ignore_errors=True)

    def publish(self, out: Path) -> None:
        """Move the result to where it was asked for.

        Raises:
            ResultsError: if something is in the way; the result stays where it is.
        """
        try:
            if out.is_dir():
                out.rmdir()
            os.replace(self.finished, out)
        except OSError as error:
            raise ResultsError(
                f"cannot write {out} ({error.strerror or error}): the finished run is in "
                f"{self.finished}, move it from there"
            ) from error

    def clear(self) -> None:
        """Drop what a killed run has left besides its checkpoint; all, if there is none."""
        left = [path for path in self.folder.iterdir() if path.name != IDENTITY]
        if self.checkpoint is not None:
            halves = (FINISHED, f".{FINISHED}.", MAPPED)
            left = [path for path in left if path.name.startswith(halves)]
            left += self.scratch.glob("checkpoint-*")
        for path in left:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def best(self, epoch: int) -> Path:
        """Where the weights of an epoch that may turn out best are kept."""
        return self.folder / f"best-{epoch}.safetensors"

    def keep_only_best(self, epoch: int | None) -> None:
        """Drop the weights that are no longer the best."""
        for file in self.folder.glob("best-*.safetensors"):
            if epoch is None or file != self.best(epoch):
                file.unlink(missing_ok=True)


def partial_folder(out: Path) -> Path:
    """Where a run that will be saved in `out` works."""
    out = out.absolute()
    return out.with_name(f"{out.name}.partial")


@contextmanager
def working_folder(out: Path | None, identity: dict[str, Any]) -> Iterator[Working]:
    """The folder to work in: a new one, or that of the same run, interrupted.

    It goes when the work is done, and when nothing in it is worth keeping.

    Args:
        out: where the run will be saved, None for nowhere.
        identity: everything that decides the result, as flat JSON values.

    Raises:
        TrainingError: if an unfinished run with other options is in the way.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="hyperlens-") as folder:
            yield Working(Path(folder), keeps=False)
        return
    working = Working(partial_folder(out), keeps=True)
    if processes.is_first():
        _prepare(working, identity)
    processes.wait()
    try:
        yield working
    except BaseException:
        kept = working.checkpoint is not None or working.finished.exists()
        if not kept and processes.is_first():
            shutil.rmtree(working.folder, ignore_errors=True)
        raise
    processes.wait()
    if processes.is_first():
        shutil.rmtree(working.folder, ignore_errors=True)


def _prepare(working: Working, identity: dict[str, Any]) -> None:
    file = working.folder / IDENTITY
    if working.folder.exists():
        if not file.exists() and any(working.folder.iterdir()):
            raise TrainingError(
                f"{working.folder} is in the way: an unfinished run would be kept there; choose "
                "another folder or remove it"
            )
        if file.exists():
            _check_same(working, json.loads(file.read_text(encoding="utf-8")), identity)
    else:
        try:
            working.folder.mkdir(parents=True)
        except OSError as error:
            raise TrainingError(
                f"cannot create {working.folder} ({error.strerror or error}): choose another folder"
            ) from None
    working.clear()
    write_text(file, json.dumps(identity, indent=2))


def _check_same(working: Working, before: dict[str, Any], now: dict[str, Any]) -> None:
    names = sorted(before.keys() | now.keys())
    changed = [
        f"{name} {before.get(name)!r} there, {now.get(name)!r} here"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if changed and working.checkpoint is not None:
        raise TrainingError(
            f"{working.folder} holds an unfinished run with other options: {'; '.join(changed)}; "
            "use the same to go on with it, or remove that folder to start anew"
        )
