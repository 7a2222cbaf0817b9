"""Folders of version 0.1 are read: old file names, columns, labels and keys, in today's words."""

import json
from pathlib import Path
from typing import Any

import pytest

from hyperlens.errors import ResultsError
from hyperlens.patching import (
    BlocksResult,
    ExpansionResult,
    NormResult,
    PositionsResult,
    WeightsResult,
)
from hyperlens.questions import read_results
from hyperlens.results.result import Result

ESTIMATE = {"value": 0.25, "low": {"float": "nan"}, "high": {"float": "nan"}, "se": 0.1, "n": 3}
META = {"data": {"n_sequences": 3}, "options": {}, "notes": []}


def written(folder: Path, file: str, table: list[Any], **parts: Any) -> Path:
    """A file as version 0.1 wrote it."""
    data = {"format": 1, "name": file, "meta": META, "extras": {}, "table": table} | parts
    folder.mkdir(exist_ok=True)
    (folder / f"{file}.json").write_text(json.dumps(data))
    return folder


def blocks_row(activation: str, metric: str = "gap") -> dict[str, Any]:
    place = {"direction": "tuned into base", "layer": 1, "site": "resid_post", "block": 0}
    return place | {"activation": activation, "metric": metric} | ESTIMATE


def test_a_layer_sweep(tmp_path: Path) -> None:
    extras = {
        "contrasts": [blocks_row("rotation") | {"p": 0.5}],
        "effects": [{"layer": 1, "effect": "stack - state", "metric": "gap", "p": 1.0} | ESTIMATE],
        "two_by_two": [{"layer": 1, "cell": "tuned_stack", "metric": "to_tuned"} | ESTIMATE],
    }
    rows = [blocks_row("donor"), blocks_row("noise", "to_tuned")]
    meta = META | {"options": {"placebos": True, "site": "resid_post"}}
    written(tmp_path / "old", "patching", rows, extras=extras, meta=meta)
    found = BlocksResult.load(tmp_path / "old")
    assert found.activations == ["source", "random_direction"]
    (row,) = found.along("tuned into base", "logit_difference")
    assert (row["value"], row["n"]) == (0.25, 3)
    assert row["low"] != row["low"]
    assert found.contrasts("tuned into base", "logit_difference")[0]["activation"] == "rotated"
    assert found.effect("late_blocks - incoming_residual", "logit_difference")
    assert found.extras["two_by_two"][0]["cell"] == "tuned_late_blocks"
    assert found.meta["options"] == {"controls": True, "site": "resid_post"}
    assert found.meta["corpus"] == {"n_sequences": 3}
    (read,) = read_results([tmp_path])
    assert isinstance(read, BlocksResult)


def test_a_weight_transplant(tmp_path: Path) -> None:
    place = {"direction": "tuned into base", "kind": "suffix", "number": 1, "metric": "ttr"}
    change = place | {"kind": "donor", "number": -1, "against": "host", "p": 0.5} | ESTIMATE
    extras = {"contrasts": [change, place | {"against": "donor", "p": 1.0} | ESTIMATE]}
    written(tmp_path / "old", "transplant", [place | {"metric": "gap"} | ESTIMATE], extras=extras)
    found = WeightsResult.load(tmp_path / "old")
    assert found.along("tuned into base", "suffix", "logit_difference")[0]["value"] == 0.25
    first, second = found.extras["contrasts"]
    assert (first["kind"], first["against"], second["against"]) == ("source", "target", "source")


def test_an_expansion(tmp_path: Path) -> None:
    row = {"way": "base_spectrum", "dose": 4, "arm": "dealt_gains", "metric": "gap"}
    extras = {
        "verdict": {"whole": "supports", "ways": {"base_spectrum": "supported"}},
        "contrasts": [
            {"way": "base_spectrum", "dose": 4, "against": "dealt_gains", "metric": "ttr"}
            | ESTIMATE
        ],
    }
    meta = META | {"options": {"doses": [4]}}
    written(tmp_path / "old", "expansion", [row | ESTIMATE], extras=extras, meta=meta)
    found = ExpansionResult.load(tmp_path / "old")
    place = {"method": "base_spectrum", "n_directions": 4}
    assert found.value(**place, condition="shuffled_gains", metric="logit_difference") == 0.25
    (contrast,) = found.extras["contrasts"]
    assert contrast == place | {"against": "shuffled_gains", "metric": "ttr"} | contrast
    assert found.extras["verdict"] == {
        "overall": "supports",
        "methods": {"base_spectrum": "supported"},
    }
    assert found.meta["options"] == {"n_directions": [4]}


def test_a_norm_and_a_map(tmp_path: Path) -> None:
    row = {"what": "decisions", "name": "norm into base", "metric": "gap", "naive": 1.0} | ESTIMATE
    row.pop("se")
    written(tmp_path / "norm", "final_norm", [row])
    assert NormResult.load(tmp_path / "norm").decided("norm into base", "logit_difference")
    # Tokens of a text are the text's own, whatever they read.
    example = {"base_pick": "choice", "tuned_pick": " gap", "tokens": ["choice", "base_pick"]}
    example["cells"] = [{"layer": 0, "offset": 0, "moved": 0.5, "choice": "choice"}]
    written(tmp_path / "map", "patch_positions", [], extras={"example": example})
    assert PositionsResult.load(tmp_path / "map").extras["example"] == {
        "base_top_1": "choice",
        "tuned_top_1": " gap",
        "tokens": ["choice", "base_pick"],
        "cells": [{"layer": 0, "offset": 0, "moved": 0.5, "top_1": "choice"}],
    }


def test_what_is_written_now_has_format_2_and_keeps_its_words(tmp_path: Path) -> None:
    found = BlocksResult((blocks_row("source", "gap") | {"value": 0.5, "low": 0.0, "high": 1.0},))
    path = found.write(tmp_path)
    assert path.name == "patch_blocks.json"
    assert json.loads(path.read_text())["format"] == 2
    assert BlocksResult.load(tmp_path) == found


@pytest.mark.parametrize("kind", [BlocksResult, NormResult])
def test_other_formats_and_names_are_refused(kind: type[Result], tmp_path: Path) -> None:
    written(tmp_path, kind.old_names[0], [], name="other")
    with pytest.raises(ResultsError, match="a file of 'other', expected"):
        kind.load(tmp_path)
    written(tmp_path, kind.name, [], format=3)
    with pytest.raises(ResultsError, match="has format 3"):
        kind.load(tmp_path)
