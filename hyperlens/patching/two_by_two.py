"""The 2 x 2 of every cut: whose residual enters the late blocks, and whose late blocks they are.

Cut a model before block c. What reaches the cut is the incoming residual; what comes after it
(blocks, final norm, unembedding) are the late blocks. Both may be the base's or the tuned model's.
If late blocks look sufficient with one incoming residual only, they are not: the effect is an
interaction.

The late blocks of a cut have the head behind them (final norm and unembedding), which may do all of
it. So at the last cut its three parts are also put into the base one at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..statistics.shares import holm_p_values
from ..statistics.significance import Estimate
from .outcomes import Outcome, combination

Row = dict[str, Any]

EFFECTS: Mapping[str, tuple[float, float, float, float]] = {
    # weights of (base residual, base blocks), (base, tuned), (tuned, base), (tuned, tuned)
    "incoming_residual": (-0.5, -0.5, 0.5, 0.5),
    "late_blocks": (-0.5, 0.5, -0.5, 0.5),
    "interaction": (1.0, -1.0, -1.0, 1.0),
    # Which of the two brings about more of the tuned model by itself.
    "late_blocks - incoming_residual": (0.0, 1.0, -1.0, 0.0),
}
CUT_METRICS = ("to_tuned", "logit_difference", "kl_tuned", "rank_gt_10")


class Cut(NamedTuple):
    """The four models of one cut.

    Attributes:
        layer: the residual layer at the cut; the late blocks begin with block `layer`.
        base: the base model.
        tuned_late_blocks: the base's residual entering the tuned model's late blocks.
        tuned_incoming_residual: the tuned model's residual entering the base's late blocks.
        tuned: the tuned model.
    """

    layer: int
    base: Outcome
    tuned_late_blocks: Outcome
    tuned_incoming_residual: Outcome
    tuned: Outcome

    def cells(self, metric: str) -> dict[str, Estimate]:
        """All four cells."""
        return {name: getattr(self, name).estimate(metric) for name in self._fields[1:]}

    def effect(self, name: str, metric: str) -> Estimate:
        """A main effect, averaged over the other factor, or the interaction; paired by text."""
        outcomes = (self.base, self.tuned_late_blocks, self.tuned_incoming_residual, self.tuned)
        return combination(list(zip(EFFECTS[name], outcomes, strict=True)), metric)


def cut_effects(cuts: Sequence[Cut]) -> Iterator[Row]:
    """Every effect at every cut, its p corrected over the cuts (Holm)."""
    for metric in CUT_METRICS:
        for name in EFFECTS:
            effects = [cut.effect(name, metric) for cut in cuts]
            for cut, effect, p in zip(cuts, effects, holm_p_values(effects), strict=True):
                row = {"layer": cut.layer, "effect": name, "metric": metric}
                yield row | effect._asdict() | {"p": p}


def cut_cells(cuts: Sequence[Cut]) -> Iterator[Row]:
    """The four cells of every cut."""
    for cut in cuts:
        for metric in CUT_METRICS:
            for name, estimate in cut.cells(metric).items():
                row = {"layer": cut.layer, "cell": name, "metric": metric}
                yield row | estimate._asdict()


# What is put into the base alone at the last cut.
PARTS = ("incoming_residual", "last_block", "head")
BEYOND = "beyond_parts"


def part_effects(base: Outcome, tuned: Outcome, parts: Mapping[str, Outcome]) -> Iterator[Row]:
    """What each part does alone, the difference of any two, and what all do beyond their sum.

    Args:
        base, tuned: the unpatched models.
        parts: the base with one of `PARTS` from the tuned model.
    """
    for metric in CUT_METRICS:
        found = {part: parts[part].estimate(metric) for part in PARTS}
        for one, other in itertools.permutations(PARTS, 2):
            found[f"{one} - {other}"] = parts[one].difference(parts[other], metric)
        # (tuned - base) less every (part - base).
        terms = [(1.0, tuned), (2.0, base), *((-1.0, parts[part]) for part in PARTS)]
        found[BEYOND] = combination(terms, metric)
        for name, estimate in found.items():
            yield {"part": name, "metric": metric} | estimate._asdict()
