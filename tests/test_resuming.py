"""Work that was interrupted is gone on with by the same call, and by no other."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_tiny
from test_files import fails, refused

from hyperlens.errors import ResultsError
from hyperlens.results.resume import KeptRecords, WorkFolder, source_identity

IDENTITY = {"seed": 0, "layers": (1, 2)}


def test_a_record_is_found_by_everything_that_decides_it(tmp_path: Path) -> None:
    records = KeptRecords.beside(tmp_path / "out")
    assert records.find(IDENTITY) is None
    assert os.listdir(tmp_path) == []
    records.keep(IDENTITY, {"value": 0.1 + 0.2, "p": math.nan})
    again = KeptRecords.beside(str(tmp_path / "out"))
    found = again.find(IDENTITY)
    assert found["value"] == 0.1 + 0.2
    assert math.isnan(found["p"])
    assert again.find(IDENTITY | {"seed": 1}) is None
    assert os.listdir(tmp_path) == ["out.partial"]


@pytest.mark.parametrize("content", ["{half a li", "[1]", "{}", '{"record": 3}', "[" * 99_999])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    records = KeptRecords(tmp_path)
    records.keep(IDENTITY, {"value": 1})
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert records.find(IDENTITY) is None


def test_records_are_forgotten_and_other_files_stay(tmp_path: Path) -> None:
    records = KeptRecords(tmp_path / "kept")
    records.keep(IDENTITY, {"value": 1})
    records.keep({"seed": 2}, {"value": 2})
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    records.forget([IDENTITY, {"seed": 2}, {"seed": 3}])
    assert os.listdir(tmp_path / "kept") == ["notes.txt"]
    (tmp_path / "kept" / "notes.txt").unlink()
    records.forget([])
    assert os.listdir(tmp_path) == []


def test_nothing_is_kept_without_a_folder() -> None:
    records = KeptRecords.beside(None)
    records.keep({"any": 1}, {"value": 1})
    assert records.find({"any": 1}) is None
    records.forget([{"any": 1}])


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("a file")
    records = KeptRecords.beside(tmp_path / "out")
    fails(lambda: records.keep(IDENTITY, {"value": 1}), "cannot", "choose another")


STAMP = {"hyperlens": "1", "seed": 0}


def work(folder: Path, seed: int = 0) -> WorkFolder:
    return WorkFolder(folder, "stamp.json", STAMP | {"seed": seed}, "a run")


def test_the_same_work_goes_on_and_other_work_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert not work(out).check()
    assert os.listdir(tmp_path) == []
    work(out).claim()
    assert json.loads((out / "stamp.json").read_text()) == STAMP
    assert work(out).check()
    (out / "part").mkdir()
    when = (out / "stamp.json").stat().st_mtime_ns
    work(out).claim()
    assert (out / "stamp.json").stat().st_mtime_ns == when
    fails(work(out, seed=1).claim, "with other inputs", "choose a new folder")
    fails(work(tmp_path / "deep").claim, "is not empty and not a run")
    assert json.loads((out / "stamp.json").read_text()) == STAMP


def test_a_stamp_with_nothing_beside_it_is_replaced(tmp_path: Path) -> None:
    work(tmp_path).claim()
    work(tmp_path, seed=1).claim()
    assert json.loads((tmp_path / "stamp.json").read_text()) == STAMP | {"seed": 1}


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"mine", b"\xff", b"[" * 99_999])
def test_a_file_of_someone_elses_is_no_stamp(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "stamp.json").write_bytes(content)
    fails(work(tmp_path).claim, "choose")
    assert (tmp_path / "stamp.json").read_bytes() == content


@pytest.mark.parametrize("case", ["a file", "a link to nowhere", "below a file"])
def test_a_folder_that_cannot_be_claimed_is_one_line(tmp_path: Path, case: str) -> None:
    folder, _ = refused(tmp_path)[case]
    for call in (work(folder).check, work(folder).claim):
        fails(call, "choose another folder")


class Part:
    """A result, as far as a folder for work is concerned."""

    def save(self, folder: str | Path) -> Path:
        Path(folder).mkdir()
        return Path(folder)


def made(calls: list[str]) -> Callable[[], Part]:
    def make() -> Part:
        calls.append("made")
        return Part()

    return make


def test_a_part_is_made_once_and_a_failure_leaves_the_folder_free(tmp_path: Path) -> None:
    def fail() -> Part:
        raise ResultsError("no such layer")

    folder, calls = tmp_path / "out", []
    with pytest.raises(ResultsError, match="no such layer"):
        work(folder).part("first", lambda place: Part(), fail)
    assert not folder.exists()
    for _ in range(2):
        work(folder, seed=1).part("first", lambda place: Part(), made(calls))
    assert calls == ["made"]
    assert sorted(os.listdir(folder)) == ["first", "stamp.json"]
    fails(lambda: work(folder).part("second", lambda place: Part(), made(calls)), "other inputs")


def test_a_folder_is_another_source_when_its_files_change(tmp_path: Path) -> None:
    make_tiny("llama").save_pretrained(tmp_path / "m")
    first = source_identity(tmp_path / "m")
    assert first == source_identity(str(tmp_path / "m"))
    make_tiny("llama", seed=1).save_pretrained(tmp_path / "m")
    assert source_identity(tmp_path / "m") != first
    one, other = make_tiny("llama"), make_tiny("llama", seed=1)
    assert source_identity(one) == source_identity(make_tiny("llama"))
    assert source_identity(one) != source_identity(other)
    assert source_identity((one, None)) != source_identity(one)
