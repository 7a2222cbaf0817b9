"""Does the expansion cause the reordering? Rules that turn intervals into words.

Two claims are judged. *Needed*: with the expansion taken away, the tuned model's changed decisions
go, or go back to the base model's, more than with as much taken away at random. *Enough*: the
expansion alone makes the base model decide as the tuned one does, more than its control.

1. Without a changed decision there is nothing to be caused: cannot tell.
2. Where the interval of the change of dimension (raw outputs of the last block) lies above 0, by
   more than rounding, there is an expansion. Where it lies below the smallest effect of interest,
   as a share of the base model's dimension, there is none to be the cause: contradicts, whatever
   else. Otherwise it is unknown whether there is one: cannot tell.
3. A method counts if on the texts that decisions are read on it moves the dimension by at least
   half of the expansion. Its effect is the share of changed decisions that it moves, less its
   control's (paired by text, mean over the random draws), with intervals that hold together over
   the methods and effects of a claim (Bonferroni).
4. A method supports the claim if the interval of an effect lies above the smallest effect of
   interest, and the effect is larger than with every single draw of the control. It contradicts the
   claim if all its effects' intervals lie below the smallest effect, and the control leaves room
   for more.
5. A claim is supported if one of the methods supports it, contradicted if all that count contradict
   it; otherwise it cannot be told.
6. The whole: supports if both claims are supported, contradicts if one is contradicted, cannot tell
   otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ...statistics.ratios import widened
from ...statistics.significance import Estimate

Answer = Literal["supported", "contradicted", "cannot tell"]
Overall = Literal["supports", "contradicts", "cannot tell"]

RULES = """\
Without a changed decision, or where it is unknown whether the dimension grew: cannot tell. Without
an expansion: contradicts. A method counts if it moves the dimension by half of the expansion on the
texts that decisions are read on. Its effect is the share of changed decisions it moves, less that
of its random control, with intervals that hold together over a claim. It supports the claim where
an effect lies above the smallest effect of interest and is larger than with every single random
draw; it contradicts it where all effects lie below and the control leaves room for more. A claim
is supported if one method supports it, contradicted if all that count contradict it. The whole:
supports if both claims are supported, contradicts if one is contradicted, cannot tell otherwise."""

# Least share of the expansion by which a method that counts moves the dimension.
HALF = 0.5
# As a share of the dimension: float32 outputs of equal spectra differ by less.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Evidence:
    """What one method of changing the dimension did, beyond its control.

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
        overall: of the hypothesis that the expansion causes the reordering.
        expansion: whether the dimension grew; None where it cannot be told.
        needed, enough: the two claims.
        methods: what each method says of its claim; None for those that do not count.
    """

    overall: Overall
    expansion: bool | None
    needed: Answer
    enough: Answer
    methods: Mapping[str, Answer | None]


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
        needed, enough: what each method did that bears on the claim, `jointly`.
        smallest: effect of interest, as a share of changed decisions and of the dimension.
    """
    grew = expanded(change, base_dimension, smallest)
    methods = {method: of_method(found, smallest) for method, found in {**needed, **enough}.items()}
    claims = [of_claim([methods[method] for method in claim]) for claim in (needed, enough)]
    overall: Overall = "cannot tell"
    if n_changed and grew is False:
        overall = "contradicts"
    elif n_changed and grew:
        if "contradicted" in claims:
            overall = "contradicts"
        elif claims == ["supported", "supported"]:
            overall = "supports"
    return Verdict(overall, grew, claims[0], claims[1], methods)


def expanded(change: Estimate, base_dimension: float, smallest: float) -> bool | None:
    """Whether the dimension grew; None where the interval allows for both (rule 2)."""
    if change.low > ROUNDING * base_dimension:
        return True
    return False if change.high < smallest * base_dimension else None


def jointly(claim: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """The same evidence with intervals that hold together over a claim's methods and effects."""
    tests = sum(len(found.effects) for found in claim.values())
    return {
        method: replace(
            found, effects={name: widened(one, tests) for name, one in found.effects.items()}
        )
        for method, found in claim.items()
    }


def of_method(found: Evidence, smallest: float) -> Answer | None:
    """What one method says; None if it does not move the dimension (rules 3 and 4)."""
    if not found.moved >= HALF:
        return None
    if not all(math.isfinite(one.low) for one in found.effects.values()):
        return "cannot tell"
    if any(one.low > smallest and found.least[name] > 0 for name, one in found.effects.items()):
        return "supported"
    if all(one.high < smallest for one in found.effects.values()) and found.room.low > smallest:
        return "contradicted"
    return "cannot tell"


def of_claim(methods: Sequence[Answer | None]) -> Answer:
    """What all methods together say (rule 5)."""
    counted = [method for method in methods if method is not None]
    if "supported" in counted:
        return "supported"
    if counted and all(method == "contradicted" for method in counted):
        return "contradicted"
    return "cannot tell"
