"""What a reader of a comparison is told: its numbers, whatever was measured, nothing unescaped."""

import math
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from conftest import short
from hypothesis import given
from hypothesis import strategies as st
from test_audit import set_values
from test_results import (
    NAN,
    VIEWS,
    change_rows,
    keep_rows,
    make_comparison,
    make_identical,
    partial_comparisons,
    with_rows,
)

from hyperlens.compare.comparison import MAX_LAYERS, Comparison
from hyperlens.render.blocks import Chart, Table, Verdict, flat
from hyperlens.render.charts import colours
from hyperlens.render.html import to_html
from hyperlens.render.terminal import WIDTH
from hyperlens.results.rows import Row, chosen_layers


def words(text: str) -> str:
    """Text without its line breaks, to look for sentences in."""
    return " ".join(text.split())


def charts(comparison: Comparison) -> list[Chart]:
    return [block for block in flat(comparison.blocks()) if isinstance(block, Chart)]


def example() -> Comparison:
    return set_values(
        make_comparison(22, names=("gpt2", "gpt2-tuned")),
        {
            ("participation_ratio", "delta", 20, "raw"): 1.0,
            ("participation_ratio", "delta", 21, "raw"): -1.5,
            ("participation_ratio", "delta", 22, "raw"): 3.1,
            ("participation_ratio", "delta_naive", 21, "raw"): -1.7,
            ("participation_ratio", "delta_naive_with_sinks", 21, "raw"): -1.7,
            ("participation_ratio", "delta_naive_with_sinks_and_bos", 21, "raw"): -30.5,
            ("participation_ratio", "delta", 22, "final_norm"): 5.3,
            ("participation_ratio", "delta_naive", 22, "final_norm"): 5.0,
            ("participation_ratio", "delta_naive_with_sinks", 22, "final_norm"): 5.6,
            ("participation_ratio", "delta_naive_with_sinks_and_bos", 22, "final_norm"): 4.8,
        },
    )


def test_the_verdicts_come_first_with_their_numbers() -> None:
    comparison = example()
    count = len(comparison.verdicts())
    assert comparison.blocks()[:count] == comparison.verdicts()
    assert all(isinstance(block, Verdict) for block in comparison.verdicts())
    assert comparison.conclusions() == [verdict.answer for verdict in comparison.verdicts()]
    output, where, dimension, real = comparison.conclusions()
    assert "the base's in 60.0% [59.0%, 61.0%] of contexts" in output
    assert "in 10.0% [9.0%, 11.0%] it comes from below the base's rank 10" in output
    assert "in block 21: their relative L2 distance goes from 0.456 to 0.500" in where
    assert "all blocks together; the last block adds +4.6 of it" in dimension
    assert "goes from -30.5 to +4.8 in the last block, a jump of +35.3" in real
    assert "in the raw streams of ordinary tokens from -1.5 to +3.1, by +4.6" in real
    assert "Most of the jump that scripts show is made by the reading" in real
    assert "+28.0 from BOS, +2.2 from the final norm, +0.6 from attention sinks, " in real
    assert "-0.1 from the sample covariance. " in real
    assert "The largest part, BOS, is -28.8 at layer 21 and -0.8 at layer 22" in real


@pytest.mark.parametrize(
    ("before", "last", "words"),
    [
        # The raw jump is +4.6 throughout.
        (-1.5, 3.1, "Both readings agree about the last block, because what the reading adds"),
        (0.0, 8.0, "Part of the jump that scripts show is made by the reading"),
        (0.0, -8.0, "Most of the jump that scripts show is made by the reading"),
        (0.0, 0.5, "The difference is made by the reading"),
    ],
)
def test_how_two_jumps_are_compared(before: float, last: float, words: str) -> None:
    metric = "delta_naive_with_sinks_and_bos"
    changed = {
        ("participation_ratio", metric, 21, "raw"): before,
        ("participation_ratio", metric, 22, "final_norm"): last,
    }
    *_, real = set_values(example(), changed).conclusions()
    assert words in real


def test_both_readings_are_in_one_chart() -> None:
    for comparison, n in ((example(), 23), (keep_rows(example(), lambda r: r.layer > 20), 2)):
        by_title = {chart.title: chart for chart in charts(comparison)}
        ours, read = "gpt2-tuned", "gpt2-tuned, as scripts read it"
        for quantity in ("Δ effective dimension", "L2 distance"):
            chart = by_title[f"{quantity}: raw, ordinary tokens, and as scripts read it"]
            assert chart.series == [ours, read]
            assert len(chart.rows) == 2 * n
        title = "Δ effective dimension: raw, ordinary tokens, and as scripts read it"
        rows = by_title[title].rows
        values = {(row["series"], row["layer"]): row["value"] for row in rows}
        assert [values[read, layer] for layer in (21, 22)] == [-30.5, 4.8]
        assert [values[ours, layer] for layer in (21, 22)] == [-1.5, 3.1]
        assert title in str(comparison.plot().to_dict())


def test_results_of_earlier_versions_are_told_without_the_layers_they_lack() -> None:
    """They took the last layer alone apart, in rows of a probe of their own."""
    measured = keep_rows(example(), lambda row: "_with_" not in row.metric)
    rows = [Row("artefact_audit", "delta_with_sinks", 22, "final_norm", 9.0, NAN, NAN, 1010)]
    old = with_rows(measured, [*measured.long, *rows])
    assert len(old.conclusions()) == 3
    text = words(old.summary())
    assert "by this version: compare the models again" in text
    assert "Also in the table: artefact_audit" in text


def test_the_summary_tells_the_tables_numbers() -> None:
    text = words(example().summary())
    for part in (
        "1,020 tokens, 10 sequences, 22 blocks, backend residual, device cpu, dtype float32",
        "(base rank 1) 60.0% [59.0%, 61.0%]",
        "base ranks 2-10 30.0% [29.0%, 31.0%]",
        "Spearman's ρ of the logits over the vocabulary 0.430 [0.420, 0.440]",
        "rank 200 or lower 2.0% [1.0%, 3.0%]",
        "KL(tuned ‖ base) 1.25 [1.23, 1.27] nats",
        "entropy of the base 3.00 [2.98, 3.02] nats",
        "entropy of the tuned model 1.00 [0.98, 1.02] nats",
        "22 +4.8 +3.1 +2.2 -0.3 +0.6 -0.8",
        "jump +35.3 +4.6 +2.2 -0.1 +0.6 +28.0",
        "if both are read after the final norm",
        "10 BOS positions, 1 empty text, 1 one-token text, the ends of 3 long texts",
        "attention sinks (at most 10 in a layer)",
        "from pairs of tokens of different texts",
    ):
        assert part in text, part


@pytest.mark.parametrize("n_layers", [1, 2, 12, 80])
def test_the_summary_fits_the_terminal(n_layers: int) -> None:
    long = "an/extremely/long/path/" * 9
    comparison = make_comparison(n_layers, names=(long + "base", long + "tuned"))
    notes = ["a note that goes on and on " * 5] * 9
    for case in (comparison, replace(comparison, meta={**comparison.meta, "notes": notes})):
        lines = case.summary().splitlines()
        assert max(map(len, lines)) <= WIDTH
        assert lines == [line.rstrip() for line in lines]


def test_the_layer_table_shows_both_ends_and_its_blocks() -> None:
    (table,) = (
        block
        for block in make_comparison(22).blocks()
        if isinstance(block, Table) and block.head[:2] == ["layer", "block"]
    )
    shown = [int(row[0]) for row in table.rows]
    assert shown[0] == 0
    assert shown[-2:] == [21, 22]
    assert [row[1] for row in table.rows] == ["embedding", *(str(n - 1) for n in shown[1:])]
    assert "to_frame()" in table.caption


@given(st.sets(st.integers(0, 100)))
def test_chosen_layers_are_few_and_keep_the_ends(layers: set[int]) -> None:
    given_ = sorted(layers)
    chosen = chosen_layers(given_, MAX_LAYERS)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= layers
    assert len(chosen) == min(len(layers), MAX_LAYERS)
    assert chosen[:1] == given_[:1]
    assert chosen[-2:] == given_[-2:]


def test_identical_models_read_as_no_change() -> None:
    comparison = make_identical(4)
    (verdict,) = comparison.conclusions()
    assert verdict.startswith("No change")
    assert "No change" in comparison._repr_html_()
    assert not any("No change" in answer for answer in make_comparison(4).conclusions())


def test_a_stream_that_stands_still_is_not_no_change() -> None:
    # Only the unembedding was tuned: the stream is the same, the output is not.
    still = change_rows(
        make_comparison(4),
        lambda row: (
            row._replace(value=0.0, low=0.0, high=0.0)
            if row.probe in ("drift", "participation_ratio")
            else row
        ),
    )
    answers = still.conclusions()
    assert not any("diverge most" in answer or "No change" in answer for answer in answers)
    assert any("changed by +0.0 [+0.0, +0.0]" in answer for answer in answers)


@pytest.mark.parametrize(
    "name",
    short(
        partial_comparisons(),
        "nothing",
        "custom probe",
        "without drift",
        "without logit_lens",
        "layers apart",
        "without the last",
        "all NaN",
        "no intervals",
        "bare meta",
        "one block",
        "identical",
    ),
)
def test_partial_comparisons_are_told_too(name: str) -> None:
    comparison = partial_comparisons()[name]
    text = comparison.summary()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "nan" not in text
    blocks = comparison.blocks()
    assert "nan" not in to_html(blocks, colours(blocks))
    figure = comparison.plot()
    assert (figure is None) == (not any(isinstance(b, Chart) for b in flat(shown(comparison))))


@pytest.mark.parametrize("name", ["nothing", "custom probe", "infinite", "one block"])
def test_notebooks_show_partial_comparisons(name: str) -> None:
    assert partial_comparisons()[name]._repr_html_().isascii()


def shown(comparison: Comparison) -> list[Any]:
    """Blocks that are not folded away."""
    return [block for block in comparison.blocks() if type(block).__name__ != "Details"]


def test_what_is_missing_is_said() -> None:
    cases = {name: words(one.summary()) for name, one in partial_comparisons().items()}
    assert "Not measured: logit lens" in cases["without logit_lens"]
    assert "Neither output ranks nor the logit lens was measured" in cases["only drift"]
    assert "None of drift, effective dimension and logit lens" in cases["only rank_reordering"]
    assert (
        "The audit needs" not in cases["only rank_reordering"]
    )  # nothing that it reads was asked for
    assert "Also in the table: my_probe" in cases["whole and custom probe"]


# --- charts


@pytest.mark.parametrize("n_layers", [1, 5, 80])
def test_every_layer_of_every_view_is_in_a_chart(n_layers: int) -> None:
    comparison = make_comparison(n_layers)
    by_title = {chart.title: chart for chart in charts(comparison)}
    for view, title in zip(
        VIEWS, ("raw residual stream", "scaled to unit RMS", "after the final norm"), strict=True
    ):
        drawn = by_title[f"Δ effective dimension, {title}"]
        rows = comparison.select("participation_ratio", "delta", view)
        assert [(r["layer"], r["value"], r["low"], r["high"]) for r in drawn.rows] == [
            (row.layer, row.value, row.low, row.high) for row in rows
        ]
    cosine = by_title["cosine of the raw streams"]
    rows = comparison.select("drift", "cosine", "raw")
    assert [r["value"] for r in cosine.rows] == [row.value for row in rows]


def test_the_histogram_of_ranks() -> None:
    (chart,) = (chart for chart in charts(make_comparison(5)) if chart.kind == "bars")
    assert [row["value"] for row in chart.rows] == pytest.approx([60, 15, 10, 8, 5, 2])
    assert [row["rank"] for row in chart.rows] == ["1", "2", "3-5", "6-10", "11-20", "21-50"]
    assert make_comparison(5).plot_ranks().to_dict()
    for extras in ({}, {"rank_reordering": {"rank_histogram": []}}):
        assert replace(make_comparison(5), extras=extras).plot_ranks() is None


def test_numbers_that_are_not_finite_are_not_drawn() -> None:
    infinite = change_rows(make_comparison(3), lambda row: row._replace(value=math.inf))
    assert all(chart.kind == "bars" for chart in charts(infinite))


# --- HTML


class Tags(HTMLParser):
    """Opens and closes, and the tags met on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


EVIL = '<script>alert("x")</script>&\n\x1b[31m$\\frac$ \ud800 模型'


def test_html_escapes_what_others_wrote() -> None:
    comparison = make_comparison(4, names=(EVIL, "<img src=x onerror=y>"))
    probe = Row("<script>p</script>", "m", 1, "raw", 1.0, NAN, NAN, 1)
    evil = replace(
        with_rows(comparison, [*comparison.long, probe]),
        meta={**comparison.meta, "notes": [EVIL], "backend": EVIL},
    )
    html = evil._repr_html_()
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert not tags.open
    assert not {"script", "img"} & tags.seen
    assert tags.sources == []
    assert "&lt;script&gt;" in html
    assert html.isascii()
    # Nothing that moves a terminal's cursor, and nothing that UTF-8 cannot hold.
    assert all(line.isprintable() for line in evil.summary().splitlines())


def test_a_comparison_without_some_layers_keeps_its_charts() -> None:
    comparison = keep_rows(make_comparison(12), lambda row: row.layer in (0, 5, 6, 12))
    drawn = {
        tuple(row["layer"] for row in chart.rows if row["series"] == name)
        for chart in charts(comparison)
        if chart.kind == "lines"
        for name in chart.series
    }
    assert drawn == {(0, 5, 6, 12)}
