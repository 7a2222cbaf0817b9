"""The folders of a run: the one it works in until it is finished, and the one with the result.

A run that will be saved in `out` works in `out.partial`. Its checkpoints are written under another
name and then moved into place, so a process killed at any moment leaves the last complete one
behind. The same command finds it and continues.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ResultsError, TrainingError
from ..files import new_folder, write_text
from ..models.kinds import is_peft
from . import pissa, processes
from .history import FILE, RUN_FILE
from .prefix import MAPPED

IDENTITY = "run.json"
CHECKPOINT = "checkpoint"
PROGRESS = "progress.json"
FINISHED = "finished"
LOGS = "runs"


@dataclass(frozen=True)
class WorkingFolder:
    """The folder of an unfinished run.

    Attributes:
        folder: its path.
        can_resume: whether checkpoints are kept in it; a run without `out` has a temporary folder.
    """

    folder: Path
    can_resume: bool

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
        """Where the result is written before it is moved to `out`."""
        return self.folder / FINISHED

    @property
    def history(self) -> Path:
        """The records so far, as a table."""
        return self.folder / FILE

    @property
    def checkpoint(self) -> Path | None:
        """The last complete checkpoint, None if there is none yet."""
        # While one replaces another there is a moment when only the old one has a name.
        candidates = (self.folder / name for name in (CHECKPOINT, f"{CHECKPOINT}.old"))
        return next((path for path in candidates if (path / PROGRESS).exists()), None)

    def set_checkpoint(self, written: Path, progress: dict[str, Any]) -> None:
        """Make a folder of weights and states the checkpoint; the previous one is deleted."""
        write_text(written / PROGRESS, json.dumps(progress))
        current, old = self.folder / CHECKPOINT, self.folder / f"{CHECKPOINT}.old"
        if current.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(current, old)
        os.replace(written, current)
        shutil.rmtree(old, ignore_errors=True)

    def publish(self, out: Path) -> None:
        """Move the finished result to `out`.

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
        """Delete what a killed run left besides its checkpoint; everything, if there is none."""
        leftovers = [path for path in self.folder.iterdir() if path.name != IDENTITY]
        if self.checkpoint is not None:
            incomplete = (FINISHED, f".{FINISHED}.", MAPPED)
            leftovers = [path for path in leftovers if path.name.startswith(incomplete)]
            leftovers += self.scratch.glob("checkpoint-*")
        for path in leftovers:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def best(self, epoch: int) -> Path:
        """The file for the weights of an epoch that may turn out best."""
        return self.folder / f"best-{epoch}.safetensors"

    def delete_best_except(self, epoch: int | None) -> None:
        """Delete the weights of all epochs that are no longer the best."""
        for file in self.folder.glob("best-*.safetensors"):
            if epoch is None or file != self.best(epoch):
                file.unlink(missing_ok=True)


@contextmanager
def working_folder(out: Path | None, identity: dict[str, Any]) -> Iterator[WorkingFolder]:
    """The folder to work in: a new one, or that of the same run, interrupted.

    It is deleted when the work is done, and after an error if nothing in it can be resumed from.

    Args:
        out: where the run will be saved, None for nowhere.
        identity: everything that decides the result, as flat JSON values.

    Raises:
        TrainingError: if an unfinished run with other options is in the way.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="hyperlens-") as folder:
            yield WorkingFolder(Path(folder), can_resume=False)
        return
    out = out.absolute()
    working = WorkingFolder(out.with_name(f"{out.name}.partial"), can_resume=True)
    if processes.is_first():
        _prepare(working, identity)
    processes.wait()
    try:
        yield working
    except BaseException:
        has_results = working.checkpoint is not None or working.finished.exists()
        if not has_results and processes.is_first():
            shutil.rmtree(working.folder, ignore_errors=True)
        raise
    processes.wait()
    if processes.is_first():
        shutil.rmtree(working.folder, ignore_errors=True)


def _prepare(working: WorkingFolder, identity: dict[str, Any]) -> None:
    file = working.folder / IDENTITY
    if working.folder.exists():
        if not file.exists() and any(working.folder.iterdir()):
            raise TrainingError(
                f"{working.folder} is in the way: an unfinished run would be kept there; choose "
                "another folder or remove it"
            )
        if file.exists():
            _check_same(working, _read_identity(file), identity)
    else:
        try:
            working.folder.mkdir(parents=True)
        except OSError as error:
            raise TrainingError(
                f"cannot create {working.folder} ({error.strerror or error}): choose another folder"
            ) from None
    working.clear()
    write_text(file, json.dumps(identity, indent=2))


def _read_identity(file: Path) -> dict[str, Any]:
    try:
        identity = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        identity = None
    if not isinstance(identity, dict):
        raise TrainingError(
            f"{file} is damaged, which says what run was begun there: remove {file.parent}, and "
            "the run starts anew"
        )
    return identity


def _check_same(working: WorkingFolder, before: dict[str, Any], now: dict[str, Any]) -> None:
    differences = [
        f"{name} {before.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differences and working.checkpoint is not None:
        raise TrainingError(
            f"{working.folder} holds an unfinished run with other options: "
            f"{'; '.join(differences)}; use the same options to continue it, or remove that folder "
            "to start again"
        )


def save(
    folder: Path,
    model: Any,
    tokenizer: Any,
    record: dict[str, Any],
    history: Path | None = None,
    logs: Path | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a Hugging Face folder, or a PEFT adapter folder, and its history; all or nothing.

    Args:
        folder: a new folder.
        model: plain model or PeftModel; PiSSA's two adapters are joined in it.
        tokenizer: saved too, unless None.
        record: what goes into hyperfit.json.
        history: the table of records, copied as history.csv; None, or no file, if there is none.
        logs: a folder of loggers' files, copied under its own name; None, or no folder, if there
            is none.
        check: called with what was written, before it is moved into place; what it raises leaves
            no folder.

    Raises:
        ResultsError: if the folder exists and is not empty, or cannot be written.
    """
    with new_folder(folder) as staging, _no_progress_bars():
        if is_peft(model):
            pissa.join(model)
            # "auto" would ask the hub whether the vocabulary has grown; it has not.
            model.save_pretrained(str(staging), save_embedding_layers=False)
        else:
            model.save_pretrained(str(staging))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        record_file = staging / RUN_FILE
        record_file.write_text(text, encoding="utf-8")
        if history is not None and history.exists():
            shutil.copyfile(history, staging / FILE)
        if logs is not None and logs.exists():
            shutil.copytree(logs, staging / logs.name)
        # safetensors writes files that only their owner may read.
        for weights in staging.glob("*.safetensors"):
            weights.chmod(record_file.stat().st_mode)
        if check is not None:
            check(staging)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    were_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_enabled:
            logging.enable_progress_bar()
