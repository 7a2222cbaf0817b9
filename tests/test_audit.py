"""The audit adds up, and finds the block and layer where most changes."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_results import NAN, change_rows, keep_rows, make_comparison, make_identical, with_rows

from hyperlens.compare.audit import audit, largest_step, last_block, unchanged
from hyperlens.compare.comparison import Comparison
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


@given(*[NUMBERS] * 5)
def test_the_parts_add_up_to_what_the_paper_would_read(
    before: float, raw: float, normed: float, sinks: float, bos: float
) -> None:
    for probe, metric in AUDITED.items():
        # Beside the value, the row estimator, which the audit has.
        comparison = set_values(
            make_comparison(4),
            {
                (probe, f"{metric}_row", 4, "final_norm"): normed,
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
