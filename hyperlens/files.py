"""Atomic writing: a reader sees a whole file or folder, or none."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ResultsError

if TYPE_CHECKING:
    from torch import Tensor


def expand_user(path: str | Path) -> Path:
    """Expand `~`; an unknown `~user` is left unchanged."""
    return Path(os.path.expanduser(path))


def partial_folder(out: str | Path) -> Path:
    """Where work on `out` is kept until it is done: `out.partial`, beside it.

    >>> partial_folder("/results/comparison").name
    'comparison.partial'
    """
    place = expand_user(out).absolute()
    return place.with_name(f"{place.name}.partial")


def remedy(error: Exception) -> str:
    """What to do when something cannot be written.

    >>> remedy(OSError(errno.ENOSPC, "No space left on device"))
    'free some space'
    """
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return "free some space" if is_full else "choose another folder"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text through a temporary file in the same folder.

    Lone surrogates, as in file names that are not UTF-8 and in generated text, become question
    marks, because UTF-8 cannot hold them.

    Raises:
        ResultsError: if the folder cannot be written.
    """
    with (
        _replacing(path) as temporary,
        temporary.open("x", encoding="utf-8", errors="replace") as file,
    ):
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file through a temporary one in the same folder, tensor by tensor.

    The library's own writer makes a copy of all tensors first.

    Raises:
        ResultsError: if the folder cannot be written.
    """
    names = {"float64": "F64", "float32": "F32", "int64": "I64"}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = names[str(tensor.dtype).removeprefix("torch.")]
        offsets = [start, end]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    start_of_file = json.dumps(header).encode()
    start_of_file += b" " * (-len(start_of_file) % 8)
    with _replacing(path) as temporary, temporary.open("xb") as file:
        file.write(len(start_of_file).to_bytes(8, "little") + start_of_file)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().numpy().reshape(-1).data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which then takes the place of `path`."""
    temporary = _beside(path)
    try:
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:  # a ValueError: no file can have such a name
        raise ResultsError(
            f"cannot write {path} ({getattr(error, 'strerror', None) or error}): {remedy(error)}"
        ) from None


def check_new_folder(folder: Path) -> None:
    """Raise before the work for a folder that `new_folder` would refuse after it.

    Raises:
        ResultsError: if it exists and is not empty, or cannot be created or replaced.
    """
    folder = expand_user(folder)
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # `exists` and the like pass over names that no file can have
        # An empty folder is replaced, which fails for the working directory and for mount points.
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            if os.path.samefile(folder, Path.cwd()) or os.path.ismount(folder):
                raise ResultsError(f"cannot replace {folder}: name a new folder inside it")
        elif os.path.lexists(folder):
            raise ResultsError(f"{folder} already exists: choose a new folder or remove it first")
        parent = next(p for p in folder.absolute().parents if p.exists())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResultsError(f"cannot create {folder} ({reason}): choose another folder") from None
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ResultsError(
            f"cannot create {folder}: {parent} is not a writable folder; choose another folder"
        )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a staging folder beside `folder`, then move it into place in one step.

    Raises:
        ResultsError: if `folder` exists and is not empty, or cannot be written.
    """
    folder = expand_user(folder)
    check_new_folder(folder)
    staging = _beside(folder)
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise ResultsError(
            f"cannot create {folder} ({error.strerror or error}): {remedy(error)}"
        ) from None
    try:
        yield staging
        if folder.is_dir():
            folder.rmdir()
        os.replace(staging, folder)
    except OSError as error:
        raise ResultsError(
            f"cannot write {folder} ({error.strerror or error}): {remedy(error)}"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A hidden, unused name in the same folder."""
    path = path.absolute()
    return path.with_name(f".{path.name[:60]}.{secrets.token_hex(4)}")
