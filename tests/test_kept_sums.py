"""A comparison that was stopped goes on with the sums it kept, and ends with the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import perturbed
from safetensors.torch import load_file

from hyperlens import Comparison, compare_models
from hyperlens.errors import ResultsError
from hyperlens.files import write_tensors
from hyperlens.passes import kept_sums, streaming

OPTIONS = {"batch_size": 2, "progress": False}


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_sums, "EVERY", 0.0)
    monkeypatch.setattr(kept_sums, "LARGEST_SHARE", 1e9)


def stopping_at(monkeypatch: pytest.MonkeyPatch, n: int) -> list[int]:
    """Stop as Ctrl-C does before batch n; returns a list with an entry per batch that is read."""
    read: list[int] = []
    reading = streaming.read_pair

    def counting(*args: Any) -> Any:
        if len(read) == n:
            raise KeyboardInterrupt
        read.append(1)
        return reading(*args)

    monkeypatch.setattr(streaming, "read_pair", counting)
    return read


@pytest.mark.parametrize("at", [0, 1, 4])
def test_it_goes_on_with_the_same_numbers(
    tiny, ids_file: Path, tmp_path: Path, often, monkeypatch, at: int
) -> None:
    tuned, ids, out = perturbed(tiny), json.loads(ids_file.read_text()), tmp_path / "out"
    whole = compare_models(tiny, tuned, ids, **OPTIONS)
    with monkeypatch.context() as patch:
        stopping_at(patch, at)
        with pytest.raises(KeyboardInterrupt):
            compare_models(tiny, tuned, ids, out=out, **OPTIONS)
    assert not out.exists()
    read = stopping_at(monkeypatch, 99)
    again = compare_models(tiny, tuned, ids, out=out, **OPTIONS)
    assert len(read) == len(ids) / OPTIONS["batch_size"] - at
    assert again.to_dict() == whole.to_dict()
    assert Comparison.load(out).to_dict() == whole.to_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_taken_of_another_comparison_or_of_a_cut_file(
    tiny, ids_file: Path, tmp_path: Path, often, monkeypatch
) -> None:
    tuned, ids, out = perturbed(tiny), json.loads(ids_file.read_text()), tmp_path / "out"
    whole = compare_models(tiny, tuned, ids, **OPTIONS)
    for seed in (0, 1):
        with monkeypatch.context() as patch:
            stopping_at(patch, 3)
            with pytest.raises(KeyboardInterrupt):
                compare_models(tiny, tuned, ids, out=out, seed=seed, **OPTIONS)
    files = list((tmp_path / "out.partial").iterdir())
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:-9])
    assert compare_models(tiny, tuned, ids, out=out, **OPTIONS).to_dict() == whole.to_dict()


def test_a_full_disk_ends_nothing(
    tiny, ids_file: Path, tmp_path: Path, often, monkeypatch, capsys
) -> None:
    def full(*_: object) -> None:
        raise ResultsError("cannot write sums (No space left on device): free some space")

    monkeypatch.setattr(kept_sums, "write_tensors", full)
    ids = json.loads(ids_file.read_text())
    compare_models(tiny, perturbed(tiny), ids, out=tmp_path / "out", **OPTIONS)
    assert capsys.readouterr().err.count("going on without keeping what is done") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tensors_are_written_as_the_library_reads_them(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4, dtype=torch.float64),
        "b": torch.randn(2, 5).T,
        "c": torch.arange(7),
        "none": torch.zeros(0, 3),
    }
    write_tensors(tmp_path / "x.safetensors", tensors, {"batches": "3"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
