"""Does the expansion cause the reordering? Rules that turn intervals into words.

Two claims are judged. *Needed*: with the expansion taken away, the tuned model's changed decisions
go, or go back to the base model's, more than with as much taken away at random. *Enough*: the
expansion alone makes the base model decide as the tuned one does, more than its control.

1. Without a changed decision there is nothing to be caused: cannot tell.
2. Where the interval of the change of dimension (raw outputs of the last block) lies above 0, by
   more than rounding, there is an expansion. Where it lies below the smallest effect of interest,
   as a share of the base model's dimension, there is none to be the cause: contradicts, whatever
   else. Otherwise nobody knows whether there is one: cannot tell.
3. A way counts if on the texts that decisions are read on it moves the dimension by at least half
   of the expansion. Its effect is the share of changed decisions that it moves, less its control's
   (paired by text, mean over the random draws), with intervals that hold together over the ways
   and effects of a claim (Bonferroni).
4. A way supports the claim if the interval of an effect lies above the smallest effect of interest,
   and the effect is larger than with every single draw of the control. It contradicts the claim if
   all its effects' intervals lie below the smallest effect, and the control leaves room for more.
5. A claim is supported if one of the ways supports it, contradicted if all that count contradict
   it; otherwise nobody can tell.
6. The whole: supports if both claims are supported, contradicts if one is contradicted, cannot tell
   otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ...statistics.significance import Estimate
from ..ratios import widened

Answer = Literal["supported", "contradicted", "cannot tell"]
Whole = Literal["supports", "contradicts", "cannot tell"]

RULES = """\
Without a changed decision, or where nobody knows whether the dimension grew: cannot tell. Without
an expansion: contradicts. A way counts if it moves the dimension by half of the expansion on the
texts that decisions are read on. Its effect is the share of changed decisions it moves, less that
of its random control, with intervals that hold together over a claim. It supports the claim where
an effect lies above the smallest effect of interest and is larger than with every single random
draw; it contradicts it where all effects lie below and the control leaves room for more. A claim
is supported if one way supports it, contradicted if all that count contradict it. The whole:
supports if both claims are supported, contradicts if one is contradicted, cannot tell otherwise."""

# What counts as moving the dimension.
HALF = 0.5
# As a share of the dimension: float32 outputs of equal spectra differ by less.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Evidence:
    """What one way of changing the dimension did, beyond its control.

    Attributes:
        moved: by how much of the expansion it moved the dimension (1: all of it).
        effects: shares of changed decisions moved as the claim says, less the control's.
        least: the same less the draw of the control that does most, without an interval.
        room: the share of changed decisions that the control leaves to be moved.
    """

    moved: float
    effects: Mapping[str, Estimate]
    least: Mapping[str, float]
    room: Estimate


@dataclass(frozen=True)
class Verdict:
    """What may be said.

    Attributes:
        whole: of the hypothesis that the expansion causes the reordering.
        expansion: whether the dimension grew; None where nobody can tell.
        needed, enough: the two claims.
        ways: what each way says of its claim; None for those that do not count.
    """

    whole: Whole
    expansion: bool | None
    needed: Answer
    enough: Answer
    ways: Mapping[str, Answer | None]


def judge(
    change: Estimate,
    base_dimension: float,
    n_changed: int,
    needed: Mapping[str, Evidence],
    enough: Mapping[str, Evidence],
    smallest: float,
) -> Verdict:
    """Apply the rules of this module.

    Args:
        change: of the dimension of the last block's raw outputs, tuned - base.
        base_dimension: what it grew from.
        n_changed: how many decisions tuning changed.
        needed, enough: what each way did that bears on the claim, `jointly`.
        smallest: effect of interest, as a share of changed decisions and of the dimension.
    """
    grew = expanded(change, base_dimension, smallest)
    ways = {way: of_way(found, smallest) for way, found in {**needed, **enough}.items()}
    claims = [of_claim([ways[way] for way in claim]) for claim in (needed, enough)]
    whole: Whole = "cannot tell"
    if n_changed and grew is False:
        whole = "contradicts"
    elif n_changed and grew:
        if "contradicted" in claims:
            whole = "contradicts"
        elif claims == ["supported", "supported"]:
            whole = "supports"
    return Verdict(whole, grew, claims[0], claims[1], ways)


def expanded(change: Estimate, base_dimension: float, smallest: float) -> bool | None:
    """Whether the dimension grew; None where the interval allows for both (rule 2)."""
    if change.low > ROUNDING * base_dimension:
        return True
    return False if change.high < smallest * base_dimension else None


def jointly(claim: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """The same evidence with intervals that hold together over all ways and effects of a claim."""
    tests = sum(len(found.effects) for found in claim.values())
    return {
        way: replace(
            found, effects={name: widened(one, tests) for name, one in found.effects.items()}
        )
        for way, found in claim.items()
    }


def of_way(found: Evidence, smallest: float) -> Answer | None:
    """What one way says; None if it does not move the dimension (rules 3 and 4)."""
    if not found.moved >= HALF:
        return None
    if not all(math.isfinite(one.low) for one in found.effects.values()):
        return "cannot tell"
    if any(one.low > smallest and found.least[name] > 0 for name, one in found.effects.items()):
        return "supported"
    if all(one.high < smallest for one in found.effects.values()) and found.room.low > smallest:
        return "contradicted"
    return "cannot tell"


def of_claim(ways: Sequence[Answer | None]) -> Answer:
    """What all ways together say (rule 5)."""
    counted = [way for way in ways if way is not None]
    if "supported" in counted:
        return "supported"
    if counted and all(way == "contradicted" for way in counted):
        return "contradicted"
    return "cannot tell"
