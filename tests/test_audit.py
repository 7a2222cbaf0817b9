"""The audit adds up, and finds the block and layer where most changes."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_results import NAN, change_rows, keep_rows, make_comparison, make_identical, with_rows

from hyperlens.compare.audit import (
    LayerReading,
    audit,
    largest_step,
    last_block,
    readings_agree,
    unchanged,
)
from hyperlens.compare.comparison import Comparison
from hyperlens.results.rows import Row

NUMBERS = st.floats(-1e6, 1e6)


def set_values(
    comparison: Comparison, values: dict[tuple[str, str, int, str], float]
) -> Comparison:
    """Another value for the rows of these (probe, metric, layer, view)."""
    return change_rows(
        comparison, lambda row: row._replace(value=values.get((*row[:4],), row.value))
    )


# A layer's numbers by metric: over ordinary tokens, by the scripts' estimator, with more tokens.
STEPS = {
    "participation_ratio": (
        "delta",
        "delta_naive",
        "delta_naive_with_sinks",
        "delta_naive_with_sinks_and_bos",
    ),
    "drift": ("l2", "l2", "l2_with_sinks", "l2_with_sinks_and_bos"),
}
READINGS = ("participation_ratio", "drift")


def numbers_at(
    probe: str, layer: int, view: str, values: tuple[float, ...]
) -> dict[tuple[str, str, int, str], float]:
    """Rows of one layer in the order of STEPS; of the drift, without an estimator of its own."""
    return {
        (probe, metric, layer, view): value
        for metric, value in zip(STEPS[probe], values, strict=True)
    }


FOUR = st.tuples(*[NUMBERS] * 4)


@given(NUMBERS, FOUR, FOUR)
def test_the_parts_add_up_to_what_a_script_reads(
    raw: float, before: tuple[float, ...], last: tuple[float, ...]
) -> None:
    for probe in READINGS:
        metric = STEPS[probe][0]
        comparison = set_values(
            make_comparison(4),
            {
                (probe, metric, 4, "raw"): raw,
                **numbers_at(probe, 3, "raw", before),
                **numbers_at(probe, 4, "final_norm", last),
            },
        )
        one = next(one for one in audit(comparison) if one.quantity == probe)
        below, at, jump = one.before, one.last, one.jump
        assert below is not None
        assert jump is not None
        assert (below.as_read, at.as_read) == (before[-1], last[-1])
        assert (below.norm, at.blocks) == (0.0, raw)
        assert below.blocks == (before[0] if probe == "participation_ratio" else before[1])
        assert jump.as_read == last[-1] - before[-1]
        for reading in (*one.layers, jump):
            parts = reading.blocks + sum(reading.reading.values())
            assert parts == pytest.approx(reading.as_read, rel=1e-9, abs=1e-8)


def test_each_part_is_the_step_that_its_name_says() -> None:
    comparison = set_values(
        make_comparison(4),
        {
            ("participation_ratio", "delta", 4, "raw"): 1.0,
            **numbers_at("participation_ratio", 3, "raw", (2.0, 2.5, 2.25, -7.75)),
            **numbers_at("participation_ratio", 4, "final_norm", (11.0, 10.5, 40.5, 340.5)),
            ("participation_ratio", "delta", 3, "final_norm"): 6.0,
        },
    )
    one = audit(comparison)[0]
    assert one.last == LayerReading(4, 1.0, 10.0, -0.5, 30.0, 300.0, 340.5)
    assert one.before == LayerReading(3, 2.0, 0.0, 0.5, -0.25, -10.0, -7.75)
    assert one.jump == LayerReading(4, -1.0, 10.0, -1.0, 30.25, 310.0, 348.25)
    assert one.jump_normed == 5.0


def test_a_quantity_with_a_row_missing_at_the_last_layer_is_left_out() -> None:
    comparison = make_comparison(4)
    assert [one.quantity for one in audit(comparison)] == list(READINGS)
    without = keep_rows(comparison, lambda row: row.metric != "l2_with_sinks")
    assert [one.quantity for one in audit(without)] == ["participation_ratio"]
    nan = set_values(comparison, {("drift", "l2", 4, "raw"): NAN})
    assert [one.quantity for one in audit(nan)] == ["participation_ratio"]
    assert not audit(keep_rows(comparison, lambda row: row.layer < 4))


def test_layers_below_the_last_may_be_missing() -> None:
    found = audit(keep_rows(make_comparison(4), lambda row: row.layer in (0, 4)))
    assert [[at.layer for at in one.layers] for one in found] == [[0, 4]] * 2
    for one in found:
        assert one.jump is None
        assert math.isnan(one.jump_normed)


def test_a_quantity_over_other_tokens_is_not_taken_apart() -> None:
    comparison = make_comparison(4)
    probes = {"participation_ratio": {"token_set": "all"}}
    other = replace(comparison, meta={**comparison.meta, "probes": probes})
    assert [one.quantity for one in audit(other)] == ["drift"]


@pytest.mark.parametrize(
    ("as_read", "blocks", "agree"),
    [(20.0, 20.0, True), (26.5, 4.1, False), (20.0, 24.0, True), (24.0, 17.0, False),
     (0.9, 0.0, True), (-0.6, 0.6, False), (10.0, -2.4, False)],
)  # fmt: skip
def test_when_two_readings_agree(as_read: float, blocks: float, agree: bool) -> None:
    assert (
        readings_agree(LayerReading(4, blocks, 0.0, 0.0, 0.0, as_read - blocks, as_read)) == agree
    )


def drift(values: dict[int, float]) -> Comparison:
    rows = tuple(Row("drift", "l2", k, "raw", v, NAN, NAN, 9) for k, v in values.items())
    return Comparison.of(rows, {}, {"n_layers": 9})


@given(st.dictionaries(st.integers(0, 9), NUMBERS, min_size=1))
def test_the_largest_step_is_the_largest(values: dict[int, float]) -> None:
    step = largest_step(drift(values), "drift", "l2")
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


def test_only_identical_models_are_unchanged() -> None:
    same = make_identical(4)
    assert unchanged(same)
    assert not unchanged(make_comparison(4))
    assert not unchanged(with_rows(same, ()))
    for row in same.long:
        key = row.probe, row.metric, row.layer, row.view
        if row.metric in ("l2", "kl", "delta", "spearman"):
            assert not unchanged(set_values(same, {key: row.value + 1e-12}))


def test_what_the_last_block_adds() -> None:
    values = {("participation_ratio", "delta", 3, "raw"): 2.0,
              ("participation_ratio", "delta", 4, "raw"): 5.5}  # fmt: skip
    assert last_block(set_values(make_comparison(4), values)) == 3.5
    assert last_block(keep_rows(make_comparison(4), lambda row: row.layer == 4)) is None
