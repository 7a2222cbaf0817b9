"""The folders of a run: the one it works in until it is finished, and the one with the result.

A run that will be saved in `out` works in `out.partial`. Its checkpoints are written under another
name and then moved into place, so a process killed at any moment leaves the last complete one
behind. The same command finds it and continues. The run holds a lock on the folder while it works.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .. import processes
from ..errors import HyperlensError, ResourceError, ResultsError, TrainingError, first_line
from ..files import check_new_folder, new_folder, remedy, write_text
from ..models.kinds import is_peft
from ..models.training_steps import CHECKPOINTS, TRAINER_STATE
from . import pissa
from .cards import CARD, model_card
from .history import FILE
from .locks import locked
from .prefix import MAPPED
from .recipes import RUN_FILE

IDENTITY = "run.json"
CHECKPOINT = "checkpoint"
PROGRESS = "progress.json"
FINISHED = "finished"
LOGS = "runs"
LOCK = "lock.json"
RESERVED = "reserved"
# Empty files: the result has been moved to `out`; the run failed, and other options are advised.
PUBLISHED, FAILED = "published", "failed"
# Errors of the operating system that say that something cannot be written.
WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)


def is_ended(checkpoint: Path) -> bool:
    """Whether a checkpoint is of a run whose training has ended."""
    return "ending" in json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))


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
    def way_on(self) -> str:
        """What the same command will do after an error, once its cause is gone."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            return "nothing was kept, so the same command starts again"
        if is_ended(checkpoint):
            return f"the same command then saves the trained weights, kept in {self.folder}"
        state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
        return f"the same command then continues after step {state['global_step']}"

    @property
    def kept(self) -> Path:
        """Where the checkpoints are that will be part of the result."""
        return self.folder / "kept"

    def keep(self, model: Any, tokenizer: Any, step: int, epoch: int) -> None:
        """Keep a model as it is after a step, for the result; one of the same step is replaced.

        Args:
            model: plain model or PeftModel that nobody else uses.
            tokenizer: saved too, unless None.
            step: of the optimiser.
            epoch: that ends with it.
        """
        self.release()
        folder = self.kept / f"checkpoint-{step}"
        # A run that goes on from an earlier step trains up to here once more.
        shutil.rmtree(folder, ignore_errors=True)
        with new_folder(folder) as staging, _no_progress_bars():
            _write_model(staging, model, tokenizer)
            state = json.dumps({"global_step": step, "epoch": float(epoch)}) + "\n"
            (staging / TRAINER_STATE).write_text(state, encoding="utf-8")

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

    def reserve(self, n_bytes: int) -> None:
        """Take disk space for the first checkpoint and the result, so that both can be written.

        Raises:
            ResourceError: if that much is not free.
        """
        file = self.folder / RESERVED
        try:
            free = shutil.disk_usage(self.folder).free
            if free < n_bytes:
                raise OSError(errno.ENOSPC, f"{free / 2**20:,.1f} MiB are free")
            if hasattr(os, "posix_fallocate"):
                with file.open("wb") as reserved:
                    os.posix_fallocate(reserved.fileno(), 0, n_bytes)
        except OSError as error:
            file.unlink(missing_ok=True)
            raise ResourceError(
                f"a checkpoint and the result take {n_bytes / 2**20:,.1f} MiB in {self.folder} "
                f"({error.strerror}): free some space, or choose another folder"
            ) from None

    def release(self) -> None:
        """Give back what `reserve` took, just before it is needed."""
        (self.folder / RESERVED).unlink(missing_ok=True)

    @property
    def is_published(self) -> bool:
        """Whether the result has been moved away, so that the rest is of no use."""
        return (self.folder / PUBLISHED).exists() and not self.finished.exists()

    def publish(self, out: Path) -> None:
        """Move the finished result to `out`.

        Raises:
            ResultsError: if something is in the way; the result stays where it is.
        """
        try:
            (self.folder / PUBLISHED).touch()
            if out.is_dir():
                out.rmdir()
            os.replace(self.finished, out)
        except OSError as error:
            raise ResultsError(
                f"cannot write {out} ({error.strerror or error}): the finished run is in "
                f"{self.finished}, move it from there"
            ) from error

    def clear(self) -> None:
        """Delete what a killed run left besides its checkpoint; everything, if there is none.

        A prefix cache stays: its name says what it is of, and it may be what takes longest.
        """
        leftovers = [path for path in self._files() if not path.name.startswith((IDENTITY, MAPPED))]
        if self.checkpoint is not None:
            incomplete = (FINISHED, f".{FINISHED}.", RESERVED, PUBLISHED, FAILED)
            leftovers = [path for path in leftovers if path.name.startswith(incomplete)]
            leftovers += self.scratch.glob("checkpoint-*")
        _delete(leftovers)

    def remove(self) -> None:
        """Delete everything but the lock.

        What says that the result is published goes last: if this process is killed meanwhile, the
        next one goes on with it.
        """
        _delete(path for path in self._files() if path.name != PUBLISHED)
        (self.folder / PUBLISHED).unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.name != LOCK]

    def best(self, epoch: int) -> Path:
        """The file for the weights of an epoch that may turn out best."""
        return self.folder / f"best-{epoch}.safetensors"

    def delete_best_except(self, epoch: int | None) -> None:
        """Delete the weights of all epochs that are no longer the best."""
        for file in self.folder.glob("best-*.safetensors"):
            if epoch is None or file != self.best(epoch):
                file.unlink(missing_ok=True)


def check_out(out: Path) -> None:
    """Check that a run can be saved in `out`; a killed one that already is gets cleaned up.

    Raises:
        ResultsError: if `out` is not a new folder, or cannot be created.
    """
    working = _working(out)
    if working.is_published and processes.is_first():
        with suppress(TrainingError), locked(working.folder / LOCK):  # it may be cleaning up now
            working.remove()
    check_new_folder(out)


@contextmanager
def working_folder(out: Path | None, identity: dict[str, Any]) -> Iterator[WorkingFolder]:
    """The folder to work in: a new one, or that of the same run, interrupted.

    It is deleted when the work is done, and after an error if nothing in it can be resumed from.

    Args:
        out: where the run will be saved, None for nowhere.
        identity: everything that decides the result, as flat JSON values.

    Raises:
        TrainingError: if an unfinished run with other options, or another process, is in the way.
        ResultsError: if something cannot be written, with what the same command will do then.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="hyperlens-") as folder:
            working = WorkingFolder(Path(folder), can_resume=False)
            with _errors_of_writing(working):
                yield working
        return
    working = _working(out)
    writes = processes.is_first()
    with locked(working.folder / LOCK) if writes else nullcontext():
        if writes:
            _prepare(working, identity)
        processes.wait()
        try:
            with _errors_of_writing(working):
                yield working
        except BaseException as error:
            if writes:
                _keep_what_is_of_use(working, error)
            raise
        processes.wait()
        if writes:
            working.remove()


def _working(out: Path) -> WorkingFolder:
    out = out.absolute()
    return WorkingFolder(out.with_name(f"{out.name}.partial"), can_resume=True)


def _keep_what_is_of_use(working: WorkingFolder, error: BaseException) -> None:
    working.release()
    if working.checkpoint is None and not working.finished.exists():
        working.remove()
    elif isinstance(error, TrainingError | ResourceError):
        # Such an error advises other options, and with the same ones it would come again.
        with suppress(OSError):
            (working.folder / FAILED).touch()


@contextmanager
def _errors_of_writing(working: WorkingFolder) -> Iterator[None]:
    """Turn errors of writing into one line that says what the same command will do."""
    try:
        yield
    except ResultsError as error:
        if working.finished.exists():  # it says where the result is
            raise
        raise ResultsError(f"{error}; {working.way_on}") from error
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in WRITING:
            raise
        advice = remedy(error) if isinstance(error, OSError) else "free some space"
        raise ResultsError(
            f"cannot write in {working.folder} ({first_line(error)}): {advice}; {working.way_on}"
        ) from error


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _prepare(working: WorkingFolder, identity: dict[str, Any]) -> None:
    file = working.folder / IDENTITY
    if file.exists():
        _check_same(working, _read_identity(file), identity)
    elif working._files():
        raise TrainingError(
            f"{working.folder} is in the way: an unfinished run would be kept there; choose "
            "another folder or remove it"
        )
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
    if differences and (working.folder / FAILED).exists():
        working.remove()
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
    kept: Path | None = None,
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
        kept: a folder of checkpoints, which become part of what is written; None, or no folder, if
            there are none.

    Raises:
        ResultsError: if the folder exists and is not empty, or cannot be written.
    """
    with new_folder(folder) as staging:
        try:
            with _no_progress_bars():
                _write(staging, model, tokenizer, record, history, logs)
                if kept is not None and kept.exists():
                    shutil.copytree(kept, staging / CHECKPOINTS, copy_function=_linked)
        except (OSError, HyperlensError):  # new_folder says what to do about an OSError
            raise
        except Exception as error:  # tokenizers and safetensors have errors of their own
            raise ResultsError(
                f"cannot write {folder} ({first_line(error)}): free some space, or choose another "
                "folder"
            ) from error
        if check is not None:
            check(staging)


def _write(
    folder: Path,
    model: Any,
    tokenizer: Any,
    record: dict[str, Any],
    history: Path | None,
    logs: Path | None,
) -> None:
    _write_model(folder, model, tokenizer)
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (folder / RUN_FILE).write_text(text, encoding="utf-8")
    if "recipe" in record:  # else another library trained it
        (folder / CARD).write_text(model_card(record), encoding="utf-8")
    if history is not None and history.exists():
        shutil.copyfile(history, folder / FILE)
    if logs is not None and logs.exists():
        shutil.copytree(logs, folder / logs.name)


def _write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a Hugging Face folder, or a PEFT adapter folder."""
    if is_peft(model):
        pissa.join(model)
        # "auto" would ask the hub whether the vocabulary has grown; it has not.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        model.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    # safetensors writes files that only their owner may read.
    mode = next(folder.glob("*config.json")).stat().st_mode
    for weights in folder.glob("*.safetensors"):
        weights.chmod(mode)


def _linked(file: str, copy: str) -> None:
    """A second name for a file, or a copy where the file system has no such names."""
    try:
        os.link(file, copy)
    except OSError:
        shutil.copy2(file, copy)


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
