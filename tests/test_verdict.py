"""The rules that turn intervals into words, one by one."""

import math

import pytest

from hyperlens.patching.expansion.result import (
    Evidence,
    Expansion,
    Single,
    expanded,
    jointly,
    judge,
    of_claim,
    of_method,
)
from hyperlens.statistics.shares import NOTHING
from hyperlens.statistics.significance import Estimate

GROWN, SHRUNK = Estimate(30, 25, 35, math.nan, 9), Estimate(-3, -5, -1, math.nan, 9)
UNKNOWN = Estimate(3, -20, 25, math.nan, 9)
NONE = Estimate(math.nan, math.nan, math.nan, math.nan, 1)
ROOM = Estimate(0.8, 0.7, 0.9, 0.05, 20)


def about(value, half=0.05):
    return Estimate(value, value - half, value + half, half / 2.093, 20)


def one(moved=1.0, least=0.01, room=ROOM, share=0.5, **effects):
    found = {name: about(value) for name, value in effects.items()}
    shares = {name: about(share) for name in found}
    return Evidence(moved, found, dict.fromkeys(found, least), room, shares)


STRONG, WEAK, UNSURE = one(lost=0.5), one(lost=0.0), one(lost=0.1)


def whole(needed, enough, change=GROWN, n_changed=100, read=GROWN, singles=()):
    raw, of_logits = Expansion(change, 40.0), Expansion(read, 40.0)
    return judge(raw, of_logits, n_changed, needed, enough, singles, 0.1)


@pytest.mark.parametrize(
    ("found", "answer"),
    [
        (STRONG, "supported"),
        (WEAK, "contradicted"),
        (UNSURE, "cannot tell"),
        # No more than half of the expansion was moved, or nobody knows.
        (one(lost=0.5, moved=0.4), None),
        (one(lost=0.5, moved=math.nan), None),
        # One effect is enough to support, all are needed to contradict.
        (one(lost=0.0, returned=0.5), "supported"),
        (one(lost=0.0, returned=0.1), "cannot tell"),
        (one(lost=0.0, returned=0.0), "contradicted"),
        # A single random draw does as much.
        (one(lost=0.5, least=-0.01), "cannot tell"),
        # The control has taken away nearly all there is: more could not be.
        (one(lost=0.0, room=Estimate(0.12, 0.05, 0.2, 0.04, 20)), "cannot tell"),
        # Whatever is in reach is no more than the control does and the smallest effect.
        (one(lost=0.0, room=Estimate(0.08, 0.05, 0.11, 0.01, 20)), None),
        (one(lost=-0.2, room=Estimate(-0.1, -0.2, 0.0, 0.04, 20)), None),
        # ... but nothing was lost at all, the control's part not subtracted.
        (one(lost=-0.9, room=Estimate(0.02, 0.0, 0.04, 0.01, 20), share=0.02), "contradicted"),
        (one(lost=-0.9, room=Estimate(0.02, 0.0, 0.04, 0.01, 20), share=0.08), None),
        # Less than the control does is no support either.
        (one(lost=-0.5), "contradicted"),
        (Evidence(1.0, {"lost": NONE}, {"lost": 0.5}, ROOM), "cannot tell"),
    ],
)
def test_one_way(found, answer):
    assert of_method(found, 0.1) == answer


def test_a_small_effect_is_no_support_however_sure():
    assert of_method(Evidence(1.0, {"lost": about(0.05, 0.001)}, {"lost": 0.04}, ROOM), 0.1) == (
        "contradicted"
    )
    assert of_method(Evidence(1.0, {"lost": about(0.05, 0.001)}, {"lost": 0.04}, ROOM), 0.02) == (
        "supported"
    )


@pytest.mark.parametrize(
    ("methods", "answer"),
    [
        (["contradicted", "supported", None], "cannot tell"),
        (["supported", "supported", None], "supported"),
        (["supported", "cannot tell"], "cannot tell"),
        (["contradicted", "contradicted", None], "contradicted"),
        (["contradicted", "cannot tell"], "cannot tell"),
        ([None, None], "cannot tell"),
        ([], "cannot tell"),
    ],
)
def test_a_claim(methods, answer):
    assert of_claim(methods) == answer


@pytest.mark.parametrize(
    ("change", "there_is"),
    [
        (GROWN, True),
        (SHRUNK, False),
        (UNKNOWN, None),
        (NONE, None),
        # Too small to be of interest: below a tenth of the base's 40.
        (Estimate(0.5, -1, 2, math.nan, 9), False),
        # Equal spectra in float32.
        (Estimate(1e-7, 9e-9, 2e-7, math.nan, 9), False),
    ],
)
def test_whether_the_dimension_grew(change, there_is):
    assert expanded(change, 40.0, 0.1) is there_is


def test_the_whole():
    assert whole({"a": STRONG}, {"b": STRONG}).overall == "supports"
    assert whole({"a": STRONG}, {"b": WEAK}).overall == "contradicts"
    assert whole({"a": WEAK}, {"b": UNSURE}).overall == "contradicts"
    assert whole({"a": STRONG}, {"b": UNSURE}).overall == "cannot tell"
    # Whatever else: there is nothing that could be the cause.
    assert whole({"a": STRONG}, {"b": STRONG}, SHRUNK).overall == "contradicts"
    assert whole({"a": STRONG}, {"b": STRONG}, UNKNOWN).overall == "cannot tell"
    # What spreads must be read.
    for read in (SHRUNK, UNKNOWN):
        assert whole({"a": STRONG}, {"b": STRONG}, read=read).overall == "cannot tell"
        assert whole({"a": WEAK}, {"b": STRONG}, read=read).overall == "contradicts"
    # Nothing to be caused comes first.
    assert whole({"a": STRONG}, {"b": STRONG}, SHRUNK, n_changed=0).overall == "cannot tell"
    found = whole({"a": STRONG, "c": one(moved=0.0, lost=0.5)}, {"b": WEAK})
    assert (found.needed, found.enough) == ("supported", "contradicted")
    assert found.methods == {"a": "supported", "c": None, "b": "contradicted"}


def test_more_ways_need_wider_intervals():
    barely = Evidence(1.0, {"lost": about(0.155)}, {"lost": 0.1}, ROOM)
    assert of_method(barely, 0.1) == "supported"
    alone = jointly({"a": barely})
    assert alone["a"].effects == barely.effects
    three = jointly({"a": barely, "b": barely, "c": Evidence(math.nan, {}, {}, NOTHING)})
    assert three["a"].effects["lost"].low < barely.effects["lost"].low
    assert of_method(three["a"], 0.1) == "cannot tell"


RETURNED = one(returned=0.6)


@pytest.mark.parametrize(
    ("single", "vetoes"),
    [
        (Single(3, 0.0, about(0.9)), True),
        # The dimension rises.
        (Single(3, -2.0, about(0.9)), True),
        # It falls: the direction is part of the expansion.
        (Single(3, 0.2, about(0.9)), False),
        # Less than half of what the expansion returns, or of no interest.
        (Single(3, 0.0, about(0.25)), False),
        (Single(3, 0.0, about(0.14)), False),
    ],
)
def test_a_single_direction_that_does_not_expand_vetoes_that_the_expansion_is_needed(
    single, vetoes
):
    others = [Single(1, 0.0, about(0.0)), Single(2, 0.5, about(0.95))]
    judged = whole({"a": RETURNED}, {"b": STRONG}, singles=[*others, single])
    assert (judged.needed == "cannot tell") is vetoes
    assert judged.veto == (3 if vetoes else None)
    assert judged.overall == ("cannot tell" if vetoes else "supports")
    # It cannot turn a contradiction into a doubt.
    assert whole({"a": WEAK}, {"b": STRONG}, singles=[single]).needed == "contradicted"
