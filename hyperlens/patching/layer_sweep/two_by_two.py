"""The 2 x 2 of every cut: whose state enters the late blocks, and whose late blocks they are.

Cut a model before block c: what reaches the cut is the state, what comes after it (blocks, final
norm, unembedding) the stack. Both may be the base's or the tuned model's. If late blocks look
sufficient in one column only, they are not: the effect is an interaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ...statistics.significance import Estimate, holm
from ..outcomes import Outcome, combination, p_value

EFFECTS: Mapping[str, tuple[float, float, float, float]] = {
    # weights of (base state, base stack), (base, tuned), (tuned, base), (tuned, tuned)
    "state": (-0.5, -0.5, 0.5, 0.5),
    "stack": (-0.5, 0.5, -0.5, 0.5),
    "interaction": (1.0, -1.0, -1.0, 1.0),
    # Which of the two brings about more of the tuned model by itself.
    "stack - state": (0.0, 1.0, -1.0, 0.0),
}
METRICS = ("to_tuned", "gap", "kl_tuned", "rank_gt_10")


class Cut(NamedTuple):
    """The four models of one cut.

    Attributes:
        layer: the residual layer that is handed over; the stack begins with block `layer`.
        base: the base model.
        tuned_stack: the base's state in the tuned model's late blocks.
        tuned_state: the tuned model's state in the base's late blocks.
        tuned: the tuned model.
    """

    layer: int
    base: Outcome
    tuned_stack: Outcome
    tuned_state: Outcome
    tuned: Outcome

    def cell(self, metric: str) -> dict[str, Estimate]:
        """All four cells."""
        return {name: getattr(self, name).estimate(metric) for name in self._fields[1:]}

    def effect(self, name: str, metric: str) -> Estimate:
        """A main effect, averaged over the other factor, or the interaction; paired by text."""
        outcomes = (self.base, self.tuned_stack, self.tuned_state, self.tuned)
        return combination(list(zip(EFFECTS[name], outcomes, strict=True)), metric)


def effects(cuts: Sequence[Cut]) -> Iterator[dict[str, Any]]:
    """Every effect at every cut, its p corrected over the cuts (Holm)."""
    for metric in METRICS:
        for name in EFFECTS:
            found = [cut.effect(name, metric) for cut in cuts]
            corrected = holm([p_value(one) for one in found])
            for cut, one, p in zip(cuts, found, corrected, strict=True):
                yield (
                    {"layer": cut.layer, "effect": name, "metric": metric}
                    | one._asdict()
                    | {"p": p}
                )


def cells(cuts: Sequence[Cut]) -> Iterator[dict[str, Any]]:
    """The four cells of every cut."""
    for cut in cuts:
        for metric in METRICS:
            for name, one in cut.cell(metric).items():
                yield {"layer": cut.layer, "cell": name, "metric": metric} | one._asdict()
