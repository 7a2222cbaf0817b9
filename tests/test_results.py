"""The table, its folder, and made-up comparisons for the tests of everything that reads one."""

import json
import math
import os
import random
import struct
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperlens.compare.comparison import Comparison
from hyperlens.errors import ResultsError
from hyperlens.results.rows import COLUMNS, Row

VIEWS = ("raw", "unit_rms", "final_norm")
NAN = math.nan


def make_comparison(n_layers: int = 4, *, names: tuple[str, str] = ("base", "tuned")) -> Comparison:
    """Every row a full run gives, with made-up numbers."""
    rng = random.Random(n_layers)
    last = n_layers
    rows: list[Row] = []

    def add(probe: str, metric: str, layer: int, view: str, value: float, width: float) -> None:
        rows.append(Row(probe, metric, layer, view, value, value - width, value + width, 1000))

    for layer in range(n_layers + 1):
        t = layer / n_layers
        for view in ("raw", "final_norm") if layer == last else ("raw",):
            rows += [
                Row(probe, f"{metric}_{words}", layer, view, value, NAN, NAN, 1010)
                for words, more in (("with_sinks", 0.0), ("with_sinks_and_bos", 5.0))
                for probe, metric, value in (
                    ("drift", "l2", 20 * t**2 + more),
                    *(
                        ("participation_ratio", f"{side}_naive", 2.0 + more)
                        for side in ("base", "tuned", "delta")
                    ),
                )
            ]
        for view in VIEWS:
            add("drift", "cosine", layer, view, 1 - 0.2 * t, 0.01)
            add("drift", "l2", layer, view, 20 * t**2, 0.1)
            add("drift", "relative_l2", layer, view, 0.5 * t**2, 0.01)
            delta = rng.uniform(-2, 2) + (75 if layer == last and view != "raw" else 0)
            for metric, value in (("base", 30.0), ("tuned", 30.0 + delta)):
                add("participation_ratio", metric, layer, view, value, 1.0)
            # Wholly above the value: what an interval of the participation ratio may look like.
            ends = {"delta": (delta + 0.1, delta + 1)}
            plain = (
                f"{side}_{kind}" for kind in ("row", "naive") for side in ("base", "tuned", "delta")
            )
            ends |= dict.fromkeys(plain, (NAN, NAN))
            rows += [
                Row("participation_ratio", metric, layer, view, delta, low, high, 1000)
                for metric, (low, high) in ends.items()
            ]
        for metric, value in (
            ("top1_agreement", 1 - 0.4 * t),
            ("kl", 1.25 * t),
            ("base_entropy", 4 - t),
            ("tuned_entropy", 4 - 3 * t),
            ("median_base_rank", 9.0),
        ):
            add("logit_lens", metric, layer, "final_norm", value, 0.02)
    for metric, value in (
        ("top1_agreement", 0.6),
        ("spearman", 0.43),
        ("rank_1", 0.6),
        ("rank_2_10", 0.3),
        ("rank_gt_10", 0.1),
        ("rank_ge_200", 0.02),
    ):
        add("rank_reordering", metric, last, "final_norm", value, 0.01)
    models = [
        {"name": name, "source": name, "kind": "folder", "sha256": digit * 64, "dtype": "float32"}
        for name, digit in zip(names, "ab", strict=True)
    ]
    counts = (600, 150, 100, 80, 50, 20)
    meta: dict[str, Any] = {
        "n_layers": n_layers,
        "base": models[0],
        "tuned": models[1],
        "options": {"batch_size": 8, "sink_threshold": 10.0},
        "versions": {"hyperlens": "0.1.0"},
        "seed": 0,
        "backend": "residual",
        "device": "cpu",
        "dtype": "float32",
        "corpus": {
            "n_texts": 12,
            "n_sequences": 10,
            "n_tokens": 1020,
            "n_bos": 10,
            "n_cut": 3,
            "n_short": 1,
            "n_empty": 1,
            "n_duplicates": 0,
            "sha256": "c" * 64,
        },
        "excluded": {"bos": 10, "sinks_per_layer": [0, *[10] * n_layers]},
        "notes": [],
        "probes": {"participation_ratio": {"token_set": "geometry"}},
    }
    bins = [(1, 1), (2, 2), (3, 5), (6, 10), (11, 20), (21, 50)]
    histogram = [
        {"low": low, "high": high, "count": count}
        for (low, high), count in zip(bins, counts, strict=True)
    ]
    extras = {"rank_reordering": {"rank_histogram": histogram, "tied_winners": 0}}
    return Comparison.of(rows, extras, meta)


def make_identical(n_layers: int = 4) -> Comparison:
    """What a model compared with itself reads."""
    at_one = ("cosine", "spearman", "top1_agreement", "rank_1")

    def at_rest(row: Row) -> Row:
        value = 1.0 if row.metric in at_one else 0.0
        return row._replace(value=value, low=value, high=value)

    return change_rows(make_comparison(n_layers), at_rest)


def change_rows(comparison: Comparison, change: Callable[[Row], Row]) -> Comparison:
    return with_rows(comparison, map(change, comparison.long))


def keep_rows(comparison: Comparison, keep: Callable[[Row], bool]) -> Comparison:
    return with_rows(comparison, filter(keep, comparison.long))


def with_rows(comparison: Comparison, rows: Iterable[Row]) -> Comparison:
    return Comparison.of(rows, comparison.extras, comparison.meta)


def partial_comparisons() -> dict[str, Comparison]:
    """Comparisons with parts missing, as after a run with fewer probes, layers or views."""
    whole = make_comparison(12)
    probes = {row.probe for row in whole.long}

    def only(**fields: Collection[Any]) -> Comparison:
        return keep_rows(whole, lambda row: all(getattr(row, k) in v for k, v in fields.items()))

    custom = Row("my_probe", "norm <b>", 3, "sideways", 1.0, NAN, NAN, 5)
    return {
        "nothing": only(probe=()),
        "custom probe": with_rows(whole, [custom]),
        "whole and custom probe": with_rows(whole, [*whole.long, custom]),
        **{f"only {probe}": only(probe=[probe]) for probe in sorted(probes)},
        **{f"without {probe}": only(probe=probes - {probe}) for probe in sorted(probes)},
        **{f"only {view}": only(view=[view]) for view in VIEWS},
        "last layer": only(layer=[12]),
        "first layer": only(layer=[0]),
        "layers apart": only(layer=[0, 5, 12]),
        "without the last": only(layer=range(12)),
        "all NaN": change_rows(whole, lambda row: row._replace(value=NAN, low=NAN, high=NAN)),
        "no intervals": change_rows(whole, lambda row: row._replace(low=NAN, high=NAN)),
        "infinite": change_rows(whole, lambda row: row._replace(value=math.inf)),
        "bare meta": replace(whole, meta={"n_layers": 12}, extras={}),
        "one block": make_comparison(1),
        "two blocks": make_comparison(2),
        "identical": make_identical(),
    }


def bits(row: Row) -> tuple[Any, ...]:
    """A row in a form that tells -0.0 from 0.0 and holds NaN equal to NaN."""
    # NaN has many bit patterns; one stands for all.
    return tuple(
        ("nan" if math.isnan(v) else struct.pack("<d", v)) if isinstance(v, float) else v
        for v in row
    )


def test_frame_has_the_promised_columns() -> None:
    comparison = make_comparison()
    frame = comparison.to_frame()
    assert list(frame.columns) == list(COLUMNS)
    assert " ".join(COLUMNS) == "probe metric layer view value low high n"
    assert len(frame) == len(comparison.long)
    assert list(with_rows(comparison, ()).to_frame().columns) == list(COLUMNS)


def test_select_is_in_order_of_layer() -> None:
    comparison = make_comparison(6)
    shuffled = list(comparison.long)
    random.Random(0).shuffle(shuffled)
    mixed = with_rows(comparison, shuffled)
    assert mixed.select("drift", "l2", "raw") == comparison.select("drift", "l2", "raw")
    assert [row.layer for row in mixed.select("drift", "l2", "raw")] == list(range(7))
    assert mixed.value("rank_reordering", "spearman", 6, "final_norm") == 0.43
    assert mixed.value("drift", "l2", -1, "raw") == mixed.value("drift", "l2", 6, "raw")


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (("drfit",), "no probe 'drfit'.*did you mean 'drift'"),
        (("drift", "cosin"), "no metric 'cosin'.*did you mean 'cosine'"),
        (("drift", "l2", "rwa"), "no view 'rwa'.*did you mean 'raw'"),
    ],
)
def test_a_mistyped_name_is_an_error_that_knows_better(
    given_: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ResultsError, match=message):
        make_comparison().select(*given_)


def test_a_layer_that_was_not_measured_is_an_error() -> None:
    for layer in (5, -6, 99):
        with pytest.raises(ResultsError, match=f"layer {layer} was not measured"):
            make_comparison(4).value("drift", "l2", layer, "raw")


def test_a_saved_comparison_comes_back_bit_for_bit(tmp_path: Path) -> None:
    comparison = make_comparison(names=("modèle ∆", "a/b"))
    folder = comparison.save(tmp_path / "deep" / "result")
    loaded = Comparison.load(folder)
    assert list(map(bits, loaded.long)) == list(map(bits, comparison.long))
    assert loaded.extras == comparison.extras
    assert loaded.meta == comparison.meta
    assert loaded.summary() == comparison.summary()
    files = {"comparison.json", "layers.csv", "summary.txt", "report.html"}
    assert {path.name for path in folder.iterdir()} == files


def test_figures_are_saved_where_asked_for(tmp_path: Path) -> None:
    folder = make_comparison().save(tmp_path / "result", figures=True)
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "comparison.svg").read_text(encoding="utf-8").startswith("<svg")


@given(st.lists(st.floats(width=64), min_size=3, max_size=3))
def test_any_number_survives_json(numbers: list[float]) -> None:
    # Only the file itself: a folder with its page for every example would take minutes.
    row = Row("probe", "metric", 1, "raw", *numbers, n=7)
    with TemporaryDirectory() as folder:
        Comparison.of([row], {}, {"n_layers": 1}).write(Path(folder))
        (loaded,) = Comparison.load(folder).long
    assert bits(loaded) == bits(row)


def test_what_is_not_json_is_one_error(tmp_path: Path) -> None:
    broken = Comparison.of((), {"mine": {"count": object()}}, make_comparison().meta)
    with pytest.raises(ResultsError, match="not JSON"):
        broken.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"table": ["abcdefgh"]}, {"meta": []}, {"table": [[1, 2]]}])
def test_a_result_of_another_shape_is_one_error(tmp_path: Path, change: dict[str, object]) -> None:
    good = json.loads(make_comparison().write(tmp_path).read_text())
    (tmp_path / "comparison.json").write_text(json.dumps(good | change))
    with pytest.raises(ResultsError, match="not readable as comparison"):
        Comparison.load(tmp_path)


def test_a_folder_of_version_0_1_still_loads(tmp_path: Path) -> None:
    comparison = make_comparison()
    plain = [
        [None if isinstance(v, float) and math.isnan(v) else v for v in row]
        for row in comparison.long
    ]
    old = {"format": 1, "meta": comparison.meta, "extras": comparison.extras, "rows": plain}
    (tmp_path / "comparison.json").write_text(json.dumps(old))
    loaded = Comparison.load(tmp_path)
    assert list(map(bits, loaded.long)) == list(map(bits, comparison.long))
    assert loaded.meta == comparison.meta
    assert loaded.summary() == comparison.summary()


def test_a_home_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    comparison = make_comparison(2)
    assert comparison.save("~/out") == tmp_path / "out"
    assert os.listdir(tmp_path) == ["out"]
    assert Comparison.load("~/out").meta == comparison.meta


def test_a_name_that_is_not_utf8_loses_nothing(tmp_path: Path) -> None:
    # What Python makes of a folder's name in another encoding.
    comparison = make_comparison(2, names=("b\udcffase", "tuned"))
    folder = comparison.save(tmp_path / "out")
    assert Comparison.load(folder).meta["base"]["name"] == "b\udcffase"
    assert (folder / "summary.txt").read_text(encoding="utf-8").startswith("What did")
    assert "b?ase" in (folder / "summary.txt").read_text(encoding="utf-8")


def test_saving_twice_writes_the_same_files(tmp_path: Path) -> None:
    comparison = make_comparison()
    for name in ("a", "b"):
        comparison.save(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "report.html" in names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_csv_holds_the_table(tmp_path: Path) -> None:
    import pandas as pd

    comparison = make_comparison()
    frame = pd.read_csv(comparison.save(tmp_path / "result") / "layers.csv")
    pd.testing.assert_frame_equal(frame, comparison.to_frame(), check_exact=True)


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ResultsError, match="already exists"):
        make_comparison().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    assert Comparison.load(make_comparison().save(folder)).n_layers == 4


def test_a_failed_save_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Comparison) -> str:
        raise RuntimeError("stop")

    monkeypatch.setattr(Comparison, "summary", fail)
    with pytest.raises(RuntimeError, match="stop"):
        make_comparison().save(tmp_path / "result")
    assert not list(tmp_path.iterdir())


def test_loading_nothing_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"no comparison\.json"):
        Comparison.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"format": 1}',
        b'{"format": 1, "meta": {}, "extras": {}, "rows": 3}',
        b'{"format": 1, "meta": {}, "extras": {}, "rows": [[1, 2]]}',
    ],
)
def test_an_unreadable_file_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "comparison.json").write_bytes(content)
    with pytest.raises(ResultsError, match="not readable as comparison"):
        Comparison.load(tmp_path)


def test_another_format_says_which_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text('{"format": 99}')
    with pytest.raises(ResultsError, match="format 99, this version reads formats 1 and 2"):
        Comparison.load(tmp_path)


@pytest.mark.parametrize("name", ["nothing", "custom probe", "all NaN", "infinite", "bare meta"])
def test_partial_comparisons_can_be_saved(tmp_path: Path, name: str) -> None:
    comparison = partial_comparisons()[name]
    loaded = Comparison.load(comparison.save(tmp_path / "result"))
    assert list(map(bits, loaded.long)) == list(map(bits, comparison.long))


def test_a_comparison_prints_as_its_summary() -> None:
    comparison = make_comparison(names=("gpt2", "gpt2-tuned"))
    assert str(comparison) == comparison.summary()
    assert repr(comparison) == f"Comparison(gpt2 → gpt2-tuned, {len(comparison.table)} rows)"
