"""A folder is locked by one process at a time, and never by one that has ended."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hyperlens.errors import TrainingError
from hyperlens.training import locks
from hyperlens.training.locks import BOOT_ID, locked


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "run.partial" / "lock.json"


def refusal(file: Path) -> str:
    with pytest.raises(TrainingError) as refused, locked(file):
        pytest.fail("not locked")
    return str(refused.value)


def written(file: Path, **changes: Any) -> None:
    """A lock that a process, ended by now, has left behind."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    holder = {"pid": ended.pid, "host": socket.gethostname(), "boot": boot}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(holder | changes))


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems."""

    def unsupported(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)


def test_one_process_at_a_time(file: Path) -> None:
    with locked(file):
        line = refusal(file)
        assert f"process {os.getpid()} on {socket.gethostname()} is working in" in line
        assert "wait" in line
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.parent.exists()
    with locked(file):
        (file.parent / "mine.txt").write_text("mine")
    assert os.listdir(file.parent) == ["mine.txt"]


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("left", [{}, {"boot": "before the machine was started again"}])
def test_a_lock_of_an_ended_process_is_taken_over(
    file: Path, monkeypatch: pytest.MonkeyPatch, supported: bool, left: dict[str, str]
) -> None:
    if not supported:
        without_locks(monkeypatch)
    written(file, **left)
    with locked(file):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_where_the_file_system_knows_no_locks_the_process_decides(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    written(file, pid=os.getppid())
    assert f"process {os.getppid()}" in refusal(file)


def test_a_lock_of_another_host_is_named_with_what_to_do(file: Path) -> None:
    written(file, host="node7", boot="another")
    line = refusal(file)
    assert "on node7" in line
    assert f"remove {file}" in line
    # Another container on this machine has another name, but the same kernel.
    written(file, host="pod-1")
    if BOOT_ID.exists():
        with locked(file):
            pass
    file.unlink(missing_ok=True)
    with locked(file):
        pass


@pytest.mark.parametrize("content", ["", "{half", "[1]"])
def test_a_lock_that_cannot_be_read_is_nobodys(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with locked(file):
        pass


def test_a_lock_that_loses_its_name_meanwhile_is_taken_anew(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder ends between our opening of the file and our lock on it."""
    lock, times = locks._lock, []

    def deleted_before(descriptor: int) -> bool | None:
        if not times:
            file.unlink()
        times.append(descriptor)
        return lock(descriptor)

    monkeypatch.setattr(locks, "_lock", deleted_before)
    with locked(file):
        assert file.exists()
    assert len(times) == 2


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "choose another folder" in refusal(tmp_path / "file" / "lock.json")
