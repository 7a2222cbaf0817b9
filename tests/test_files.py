"""Whole or not at all: what a reader finds after success, failure and interruption."""

import os
import stat
from pathlib import Path

import pytest

from hyperlens.errors import ResultsError
from hyperlens.files import (
    check_new_folder,
    expand_user,
    new_folder,
    write_text,
)


def fails(call, *expected: str) -> None:
    with pytest.raises(ResultsError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for words in expected:
        assert words in message


def test_text_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(path, "neu: ü\n")
    assert path.read_bytes() == "neu: ü\n".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with new_folder(tmp_path / "out") as staging:
            write_text(staging / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out" / "a.txt").stat().st_mode) == 0o644


def test_text_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    fails(lambda: write_text(tmp_path / "a", "x"), "cannot write", "choose another")
    fails(lambda: write_text(tmp_path / "none" / "b", "x"), "cannot write", "No such file")
    assert os.listdir(tmp_path) == ["a"]


def test_half_characters_become_question_marks(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "a name \udcff of ü\ud800\n")
    assert (tmp_path / "a.txt").read_bytes() == "a name ? of ü?\n".encode()


def test_home_is_meant_as_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert expand_user("~/a") == tmp_path / "a"
    assert expand_user("a/~") == Path("a/~")
    assert expand_user("~nobody-of-this-name/a") == Path("~nobody-of-this-name/a")
    with new_folder(Path("~/out")) as staging:
        (staging / "a").touch()
    assert os.listdir(tmp_path) == ["out"]
    fails(lambda: check_new_folder(Path("~/out")), "already exists")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as staging:
        (staging / "a").write_text("x")
        assert not out.exists()
        assert staging.parent == out.parent
    assert os.listdir(out) == ["a"]
    assert os.listdir(out.parent) == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out) as staging:
        (staging / "a").write_text("x")
    assert os.listdir(out) == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def break_off() -> None:
        with new_folder(tmp_path / "out") as staging:
            (staging / "a").write_text("x")
            raise error

    with pytest.raises(error):
        break_off()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "out"):
            raise OSError(28, "No space left on device")

    fails(fill, "cannot write", "No space left on device", "free some space")
    assert os.listdir(tmp_path) == []


def test_someone_elses_folder_is_never_replaced(tmp_path: Path) -> None:
    def race() -> None:
        with new_folder(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("x")

    fails(race, "cannot write")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["theirs"]


def refused(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    return {
        "a folder with files": (tmp_path / "full", "already exists: choose a new folder"),
        "a file": (tmp_path / "file", "already exists"),
        "a link to nowhere": (tmp_path / "dangling", "already exists"),
        "a link to an empty folder": (tmp_path / "link", "already exists"),
        "below a file": (tmp_path / "file" / "out", "file is not a writable folder"),
        "far below a file": (tmp_path / "file" / "a" / "b", "not a writable folder"),
        "too long a name": (tmp_path / ("x" * 300), "choose another folder"),
        "the root": (Path("/"), "already exists"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "a folder with files",
        "a file",
        "a link to nowhere",
        "a link to an empty folder",
        "below a file",
        "far below a file",
        "too long a name",
        "the root",
    ],
)
def test_bad_folders_are_refused_early(tmp_path: Path, case: str) -> None:
    folder, expected = refused(tmp_path)[case]
    before = sorted(tmp_path.rglob("*"))
    fails(lambda: check_new_folder(folder), expected)
    with pytest.raises(ResultsError), new_folder(folder):
        raise AssertionError("nothing may be started")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_current_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fails(lambda: check_new_folder(Path()), "cannot replace .", "name a new folder inside it")
    fails(lambda: check_new_folder(tmp_path), "name a new folder inside it")
    check_new_folder(Path("out"))
    with new_folder(Path("out")) as staging:
        (staging / "a").write_text("x")
    assert os.listdir(tmp_path / "out") == ["a"]


def test_no_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Simulated, because root may write anywhere.
    monkeypatch.setattr(os, "access", lambda *_: False)
    fails(lambda: check_new_folder(tmp_path / "out"), "not a writable folder")
    assert os.listdir(tmp_path) == []
