"""A lock on a folder, so that two runs never work in it at the same time.

The kernel's lock on the file ends with the process that holds it, however that ends; the file says
which process it is. Another host's kernel cannot be asked: there the file alone decides.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from ..errors import TrainingError
from ..files import remedy

# Windows has none.
fcntl: Any = import_module("fcntl") if find_spec("fcntl") else None

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
HELD = (errno.EWOULDBLOCK, errno.EACCES)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock on a file's folder, which is made if it does not exist.

    A lock that a killed process left on this host is taken over. Afterwards the file is deleted,
    and its folder if that is empty.

    Raises:
        TrainingError: if another process holds it, or the folder cannot be written.
    """
    try:
        descriptor = _opened(file)
        while descriptor is None:
            descriptor = _opened(file)
    except OSError as error:
        raise TrainingError(
            f"cannot create {file.parent} ({error.strerror or error}): {remedy(error)}"
        ) from None
    try:
        yield
    finally:
        # Deleted before it is unlocked: whoever locks it after that sees that it has no name.
        file.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # there is more in it, or it is gone already
            file.parent.rmdir()


def _opened(file: Path) -> int | None:
    """The locked file's descriptor; None if its last holder has deleted it meanwhile.

    Raises:
        TrainingError: if another process holds the lock.
        OSError: if the file cannot be made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        return None
    try:
        is_free = _lock(descriptor)
        if is_free and not _is_still(file, descriptor):
            os.close(descriptor)
            return None
        _check_holder(file, _holder(descriptor), is_free)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int) -> bool | None:
    """Whether the kernel has given us the lock; None if it cannot tell."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some network file systems have no locks
        return False if error.errno in HELD else None
    return True


def _is_still(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> dict[str, Any]:
    """Process and host that wrote the file, empty if none did."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # nothing is written yet, or half of it
        return {}
    return holder if isinstance(holder, dict) else {}


def _check_holder(file: Path, holder: dict[str, Any], is_free: bool | None) -> None:
    """Raise if the lock is another's.

    Args:
        file: that is locked.
        holder: what it says.
        is_free: whether the kernel has given us the lock; None if it cannot tell.
    """
    who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'this host')}"
    here = _this_process()
    same_kernel = bool(here["boot"]) and holder.get("boot") == here["boot"]
    if holder and not same_kernel and holder.get("host") != here["host"]:
        raise TrainingError(
            f"{who} is working in {file.parent}, or was killed there: choose another folder; or, "
            f"if that process has ended, remove {file}, and the same call continues its run"
        )
    if is_free is None and holder:
        is_free = holder.get("pid") == here["pid"] or not psutil.pid_exists(holder.get("pid", 0))
    if is_free is False:
        raise TrainingError(
            f"{who} is working in {file.parent}: wait until it has ended, or choose another folder"
        )


def _this_process() -> dict[str, Any]:
    try:
        boot = BOOT_ID.read_text().strip()
    except OSError:
        boot = ""
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": boot}
