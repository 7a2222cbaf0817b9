"""Atomic writing: a reader sees a whole file or folder, or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ResultsError


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text through a temporary file in the same folder.

    Raises:
        ResultsError: if the folder cannot be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror or error}") from None


def check_new_folder(folder: Path) -> None:
    """Refuse early a folder that `new_folder` would refuse after the work is done.

    Raises:
        ResultsError: if it exists and is not empty, or could not be created.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise ResultsError(f"{folder} already exists: choose a new folder or remove it first")
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ResultsError(f"cannot create {folder}: {parent} is not a writable folder")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a staging folder beside `folder`, then move it into place in one step.

    Raises:
        ResultsError: if `folder` exists and is not empty, or cannot be written.
    """
    check_new_folder(folder)
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise ResultsError(f"cannot create {folder}: {error.strerror or error}") from None
    try:
        yield staging
        staging.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        os.replace(staging, folder)
    except OSError as error:
        raise ResultsError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
