"""What a reader is told: the audit adds up, the numbers are the table's, nothing is unescaped."""

import math
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_results import (
    NAN,
    change_rows,
    keep_rows,
    make_comparison,
    make_identical,
    partial_comparisons,
)

from hyperlens.compare.audit import audit, largest_change, largest_step, unchanged
from hyperlens.compare.comparison import Comparison
from hyperlens.render import words as report
from hyperlens.results.rows import Row

AUDITED = {"participation_ratio": "delta", "drift": "l2"}
NUMBERS = st.floats(-1e6, 1e6)


def set_values(
    comparison: Comparison, values: dict[tuple[str, str, int, str], float]
) -> Comparison:
    """Another value for the rows of these (probe, metric, layer, view)."""
    return change_rows(
        comparison, lambda row: row._replace(value=values.get((*row[:4],), row.value))
    )


# --- the audit


@given(*[NUMBERS] * 5)
def test_the_parts_add_up_to_what_the_paper_would_read(
    before: float, raw: float, normed: float, sinks: float, bos: float
) -> None:
    for probe, metric in AUDITED.items():
        comparison = set_values(
            make_comparison(4),
            {
                (probe, metric, 3, "raw"): before,
                (probe, metric, 4, "raw"): raw,
                (probe, metric, 4, "final_norm"): normed,
                ("artefact_audit", f"{metric}_with_sinks", 4, "final_norm"): sinks,
                ("artefact_audit", f"{metric}_with_sinks_and_bos", 4, "final_norm"): bos,
            },
        )
        one = next(one for one in audit(comparison) if one.quantity == probe)
        assert one.total == bos
        assert one.block == raw
        assert one.terminal_jump == raw - before
        assert sum(one.parts.values()) == pytest.approx(bos, rel=1e-12, abs=1e-9)


def test_without_sinks_bos_and_a_norm_that_matters_all_is_the_blocks() -> None:
    comparison = change_rows(
        make_comparison(4),
        lambda row: row._replace(value=12.5) if row.layer == 4 and row.n else row,
    )
    for one in audit(comparison):
        assert (one.total, one.block, one.norm, one.sinks, one.bos) == (12.5, 12.5, 0.0, 0.0, 0.0)


def test_a_quantity_with_a_row_missing_is_left_out() -> None:
    comparison = make_comparison(4)
    assert [one.quantity for one in audit(comparison)] == ["participation_ratio", "drift"]
    without = keep_rows(comparison, lambda row: row.metric != "l2_with_sinks")
    assert [one.quantity for one in audit(without)] == ["participation_ratio"]
    nan = set_values(comparison, {("drift", "l2", 4, "raw"): NAN})
    assert [one.quantity for one in audit(nan)] == ["participation_ratio"]
    assert not audit(keep_rows(comparison, lambda row: row.layer < 4))


def test_the_layer_before_the_last_may_be_missing() -> None:
    found = audit(keep_rows(make_comparison(4), lambda row: row.layer == 4))
    assert len(found) == 2
    assert all(math.isnan(one.terminal_jump) for one in found)


def test_a_quantity_over_other_tokens_is_not_taken_apart() -> None:
    comparison = make_comparison(4)
    probes = {"participation_ratio": {"token_set": "all"}}
    other = replace(comparison, meta={**comparison.meta, "probes": probes})
    assert [one.quantity for one in audit(other)] == ["drift"]


def drift(values: dict[int, float]) -> Comparison:
    rows = tuple(Row("drift", "l2", k, "raw", v, NAN, NAN, 9) for k, v in values.items())
    return Comparison(rows, {}, {"n_layers": 9})


@given(st.dictionaries(st.integers(0, 9), NUMBERS, min_size=1))
def test_the_largest_change_and_step_are_the_largest(values: dict[int, float]) -> None:
    comparison = drift(values)
    change = largest_change(comparison, "drift", "l2")
    assert change is not None
    assert abs(change.value) == max(map(abs, values.values()))
    step = largest_step(comparison, "drift", "l2")
    gaps = [abs(values[b] - values[a]) for a, b in pairwise(sorted(values)) if b == a + 1]
    if step is None:
        assert not gaps
    else:
        assert abs(step.change) == max(gaps)
        assert (step.before, step.after) == (values[step.layer - 1], values[step.layer])


def test_a_step_across_a_gap_is_not_one_blocks() -> None:
    step = largest_step(drift({0: 0.0, 1: 1.0, 5: 100.0, 6: 102.0}), "drift", "l2")
    assert step is not None
    assert (step.layer, step.change) == (6, 2.0)
    assert largest_step(drift({}), "drift", "l2") is None
    assert largest_change(drift({}), "drift", "l2") is None


def test_only_identical_models_are_unchanged() -> None:
    same = make_identical(4)
    assert unchanged(same)
    assert not unchanged(make_comparison(4))
    assert not unchanged(replace(same, rows=()))
    for row in same.rows:
        key = row.probe, row.metric, row.layer, row.view
        if row.metric in ("l2", "kl", "delta", "spearman"):
            assert not unchanged(set_values(same, {key: row.value + 1e-12}))


# --- the summary


def words(text: str) -> str:
    """Text without its line breaks, to look for sentences in."""
    return " ".join(text.split())


@pytest.mark.parametrize("n_layers", [1, 2, 12, 80])
def test_the_summary_is_a_screenful(n_layers: int) -> None:
    long = "an/extremely/long/path/" * 9
    comparison = make_comparison(n_layers, names=(long + "base", long + "tuned"))
    notes = ["a note that goes on and on " * 5] * 9
    for case in (comparison, replace(comparison, meta={**comparison.meta, "notes": notes})):
        lines = case.summary().splitlines()
        assert max(map(len, lines)) <= report.WIDTH
        assert lines == [line.rstrip() for line in lines]
    assert len(comparison.summary().splitlines()) <= 36
    assert "and 5 more in meta['notes']" in words(case.summary())


def test_the_summary_tells_the_tables_numbers() -> None:
    comparison = set_values(
        make_comparison(22, names=("gpt2", "gpt2-tuned")),
        {
            ("participation_ratio", "delta", 20, "raw"): 1.0,
            ("participation_ratio", "delta", 21, "raw"): -1.5,
            ("participation_ratio", "delta", 22, "raw"): 3.1,
            ("participation_ratio", "delta", 22, "final_norm"): 77.3,
            ("artefact_audit", "delta_with_sinks", 22, "final_norm"): 81.8,
            ("artefact_audit", "delta_with_sinks_and_bos", 22, "final_norm"): 80.8,
        },
    )
    text = words(comparison.summary())
    for part in (
        "gpt2 (folder, float32, sha256 aaaaaaaaaaaa)",
        "gpt2-tuned (folder, float32, sha256 bbbbbbbbbbbb)",
        "1,020 tokens, 10 sequences, 22 blocks, backend residual, device cpu, dtype float32",
        "same first token: 60.0% [59.0%, 61.0%]",
        "Spearman ρ of the logits: 0.430 [0.420, 0.440]",
        "base rank 1: 60.0% [59.0%, 61.0%]; 2-10: 30.0% [29.0%, 31.0%]; >10: 10.0% [9.0%, 11.0%]",
        ">=200: 2.0% [1.0%, 3.0%]",
        "KL(tuned ‖ base): 1.25 [1.23, 1.27] nats",
        "entropy, base: 3.00 [2.98, 3.02] nats; entropy, tuned: 1.00 [0.98, 1.02] nats",
        "raw relative L2 moves most in block 21 (layer 21 to 22): +0.044, from 0.456 to 0.500",
        "raw ΔPR moves most in block 21 (layer 21 to 22): +4.60, from -1.50 to +3.10",
        "raw ΔPR is farthest from zero at layer 22: +3.10",
        "ΔPR +80.8 = +3.1 block's raw output, +74.2 final norm, +4.5 attention sinks, -1.0 BOS.",
        "Of +80.8 after the final norm, +3.1 is in the block's raw output (+4.6 since layer 21); "
        "the largest part is the final norm.",
        "L2 55.5 = +20.0 block's raw output, 0.0 final norm, +30.0 attention sinks, +5.5 BOS.",
        "BOS positions (10), empty texts (1), one-token texts (1), the ends of long texts (3), "
        "attention sinks (at most 10 per layer, in layers 1 to 22)",
        "Intervals are 95%, over whole sequences.",
        "may lie to one side of the value",
    ):
        assert part in text


def test_the_layer_table_shows_both_ends_and_its_blocks() -> None:
    table = report.layer_table(make_comparison(22))
    assert table[0][:2] == ["layer", "block"]
    shown = [int(row[0]) for row in table[1:]]
    assert shown[0] == 0
    assert shown[-2:] == [21, 22]
    assert [row[1] for row in table[1:]] == ["embed", *(str(layer - 1) for layer in shown[1:])]
    assert {len(row) for row in table} == {7}


@given(st.sets(st.integers(0, 100)))
def test_chosen_layers_are_few_and_keep_the_ends(layers: set[int]) -> None:
    given_ = sorted(layers)
    chosen = report.chosen_layers(given_)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= layers
    assert len(chosen) == min(len(layers), report.MAX_TABLE_ROWS)
    assert chosen[:1] == given_[:1]
    assert chosen[-2:] == given_[-2:]


def test_identical_models_read_as_no_change() -> None:
    comparison = make_identical(4)
    text = comparison.summary()
    assert "No change" in text
    assert "moves most" not in text
    assert "No change" not in make_comparison(4).summary()
    assert "No change" in comparison._repr_html_()


def test_a_metric_that_stands_still_is_said_to() -> None:
    # Only the unembedding was tuned: the stream is the same, the output is not.
    still = change_rows(
        make_comparison(4),
        lambda row: (
            row._replace(value=0.0)
            if row.probe in ("drift", "participation_ratio", "artefact_audit")
            else row
        ),
    )
    text = words(still.summary())
    assert "raw relative L2 is the same at every layer" in text
    assert "raw ΔPR is the same at every layer" in text
    assert "ΔPR 0 in every part." in text
    assert "No change" not in text


@pytest.mark.parametrize("name", partial_comparisons())
def test_partial_comparisons_are_told_too(name: str) -> None:
    comparison = partial_comparisons()[name]
    text = comparison.summary()
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert "nan" not in text
    assert comparison._repr_html_().isascii()


def test_what_is_missing_is_said() -> None:
    cases = {name: words(one.summary()) for name, one in partial_comparisons().items()}
    assert "Not measured: logit lens" in cases["without logit_lens"]
    assert "neither output ranks nor the logit lens was measured" in cases["only drift"]
    assert "none of drift, effective dimension and logit lens" in cases["only rank_reordering"]
    assert "audit left out: it needs" in cases["without artefact_audit"]
    assert "Not measured: cosine, relative L2, ΔPR raw" in cases["only final_norm"]
    assert "no two neighbouring layers were measured raw" in cases["only logit_lens"]
    assert "Also in the table: my_probe" in cases["whole and custom probe"]


@pytest.mark.parametrize(
    ("form", "value", "expected"),
    [
        (report.number, 0.0, "0"),
        (report.number, 655.34, "655"),
        (report.number, 80.84, "80.8"),
        (report.number, 9.996, "10.0"),
        (report.number, 0.012345, "0.0123"),
        (report.number, 25612.0, "25,612"),
        (report.number, 1.5e9, "1.5e+09"),
        (report.number, -2e-9, "-2.0e-09"),
        (report.number, NAN, "n/a"),
        (report.number, math.inf, "n/a"),
        (report.signed, 3.14159, "+3.14"),
        (report.signed, -3.14159, "-3.14"),
        (report.bounded, 0.99996, ">0.999"),
        (report.bounded, 1.0, "1.000"),
        (report.bounded, -0.00001, "0.000"),
        (report.percent, 1.0, "100.0%"),
        (report.percent, 0.9999, ">99.9%"),
        (report.percent, 0.0001, "<0.1%"),
        (report.percent, 0.0, "0.0%"),
    ],
)
def test_numbers_read_well(form: Callable[[float], str], value: float, expected: str) -> None:
    assert form(value) == expected


def test_interval_ends_have_the_decimals_of_the_largest() -> None:
    row = Row("participation_ratio", "delta", 1, "raw", 0.2349, 0.0498, 12.673, 5)
    assert report.with_interval(row) == "+0.2 [+0.0, +12.7]"
    assert report.with_interval(row._replace(low=NAN, high=NAN)) == "+0.235"


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
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


EVIL = '<script>alert("x")</script>&\n\x1b[31m$\\frac$ \ud800 模型'


def test_html_escapes_what_others_wrote() -> None:
    comparison = make_comparison(4, names=(EVIL, "<img src=x onerror=y>"))
    probe = Row("<script>p</script>", "m", 1, "raw", 1.0, NAN, NAN, 1)
    evil = replace(
        comparison,
        rows=(*comparison.rows, probe),
        meta={**comparison.meta, "notes": [EVIL], "backend": EVIL},
    )
    html = evil._repr_html_()
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert not tags.open
    assert "script" not in tags.seen
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    assert len(tags.sources) == 1
    assert "&lt;script&gt;" in html
    assert html.isascii()
    # Nothing that moves a terminal's cursor, and nothing that UTF-8 cannot hold.
    assert all(line.isprintable() for line in evil.summary().splitlines())


def test_html_has_the_headline_and_the_layers() -> None:
    html = make_comparison(4)._repr_html_()
    assert "<td>same first token</td><td>60.0% [59.0%, 61.0%]</td>" in html
    assert "<td>4</td><td>3</td><td>0.800</td>" in html
