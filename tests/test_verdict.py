"""The rules that turn intervals into words, one by one."""

import math

import pytest

from hyperlens.patching.expansion.result import (
    Evidence,
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


def one(moved=1.0, least=0.01, room=ROOM, **effects):
    found = {name: about(value) for name, value in effects.items()}
    return Evidence(moved, found, dict.fromkeys(found, least), room)


STRONG, WEAK, UNSURE = one(lost=0.5), one(lost=0.0), one(lost=0.1)


def whole(needed, enough, change=GROWN, n_changed=100):
    return judge(change, 40.0, n_changed, needed, enough, 0.1)


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
        (["contradicted", "supported", None], "supported"),
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
