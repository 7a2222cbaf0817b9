"""An interrupted table is gone on with by the same call, and by no other."""

from pathlib import Path

import pytest
from conftest import make_tiny, perturbed
from test_cross_domain import CORPORA, SMALL, as_written, pairs_of

from hyperlens import CrossDomainResult, cross_domain
from hyperlens.errors import ResultsError
from hyperlens.experiments import cross_domain as module
from hyperlens.experiments.kept_rows import KeptRows, model_identity


class Interruption(Exception):
    """Stands for a killed process."""


def stop_after(monkeypatch, rows: int) -> list:
    """Let so many rows be measured, then fail; the list grows with each."""
    measured: list = []
    original = module.measure_row

    def measure(*given):
        if len(measured) == rows:
            raise Interruption
        measured.append(1)
        return original(*given)

    monkeypatch.setattr(module, "measure_row", measure)
    return measured


def test_the_same_call_goes_on(tmp_path: Path, monkeypatch) -> None:
    finding = cross_domain(pairs_of("llama", "gpt2"), CORPORA, **SMALL)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interruption):
            cross_domain(pairs_of("llama", "gpt2"), CORPORA, out=out, **SMALL)
    assert not out.exists()
    assert len(list(partial.iterdir())) == 3
    # What cannot be read is measured again; what is not ours stays.
    next(partial.iterdir()).write_text("{half a li")
    (partial / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        measured = stop_after(patch, 99)
        again = cross_domain(pairs_of("llama", "gpt2"), CORPORA, out=out, **SMALL)
    assert len(measured) == 2
    assert as_written(again) == as_written(finding)
    assert CrossDomainResult.load(out).summary() == finding.summary()
    assert [file.name for file in partial.iterdir()] == ["notes.txt"]
    with pytest.raises(ResultsError, match="already exists"):
        cross_domain(pairs_of("llama"), CORPORA, out=out, **SMALL)


@pytest.mark.parametrize("change", ["seed", "tuned", "texts"])
def test_another_call_takes_none_of_the_rows(tmp_path: Path, monkeypatch, change: str) -> None:
    out, pairs = tmp_path / "out", pairs_of("llama")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Interruption):
            cross_domain(pairs, CORPORA, out=out, **SMALL)
    options, corpora = dict(SMALL), dict(CORPORA)
    if change == "seed":
        options["seed"] = 1
    elif change == "tuned":
        pairs = {"llama": (pairs["llama"][0], perturbed(pairs["llama"][0], 0.3))}
    else:
        corpora["a"] = CORPORA["a"][:-1]
    measured = stop_after(monkeypatch, 99)
    found = cross_domain(pairs, corpora, out=out, **options)
    # Corpus "b" had not been reached.
    assert len(measured) == 2
    assert as_written(found) == as_written(cross_domain(pairs, corpora, **options))


def test_a_folder_is_another_one_when_its_files_change(tmp_path: Path) -> None:
    make_tiny("llama").save_pretrained(tmp_path / "m")
    first = model_identity(tmp_path / "m")
    assert first == model_identity(str(tmp_path / "m"))
    make_tiny("llama", seed=1).save_pretrained(tmp_path / "m")
    assert model_identity(tmp_path / "m") != first
    one, other = make_tiny("llama"), make_tiny("llama", seed=1)
    assert model_identity(one) == model_identity(make_tiny("llama"))
    assert model_identity(one) != model_identity(other)
    assert model_identity((one, None)) != model_identity(one)
    assert KeptRows.beside(None).find({"any": 1}) is None
