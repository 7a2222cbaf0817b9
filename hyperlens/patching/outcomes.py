"""What a patch did to the decisions: counted per text, so that every comparison can be paired.

Every decision is a next-token prediction of a patched model, compared with those of the base and
the tuned model at the same place. Sums are kept per text; a statistic is a ratio of two of them
with an interval over texts, and two patches are compared on the same texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..statistics import distances
from ..statistics.rank_buckets import DEEP_TAIL, RANK_BUCKETS
from ..statistics.shares import ratio
from ..statistics.significance import Estimate

Side = Literal["base", "tuned"]
SIDES: tuple[Side, Side] = ("base", "tuned")

INTO_BASE, INTO_TUNED = "tuned into base", "base into tuned"
DIRECTIONS = (INTO_BASE, INTO_TUNED)
"""Whose activations or weights go into whom: from the source model into the target model."""

TARGET: dict[str, Side] = {INTO_BASE: "base", INTO_TUNED: "tuned"}
SOURCE: dict[str, Side] = {INTO_BASE: "tuned", INTO_TUNED: "base"}

# The metric that counts what a direction is meant to bring about, and what that is.
TOWARDS = {INTO_BASE: "to_tuned", INTO_TUNED: "to_base"}
BROUGHT = {
    INTO_BASE: "changed decisions that become the tuned model's",
    INTO_TUNED: "changed decisions that become the base's again",
}

CHANGED = ("to_tuned", "to_base", "logit_difference")
BUCKETS = (*RANK_BUCKETS, DEEP_TAIL)
EVERY = (
    *("agreement_tuned", "agreement_base", "kl_tuned", "kl_base"),
    *(bucket.metric for bucket in BUCKETS),
)
METRICS = (*CHANGED, *EVERY)
"""What is measured of a patched model.

Over the decisions that tuning changed: `to_tuned` and `to_base`, the shares for which the patched
model's top-1 token is the tuned model's and the base model's, and `logit_difference`, the logit of
the tuned model's top-1 token less that of the base's. Over all decisions: agreement with each
model, KL(tuned ‖ patched) and KL(base ‖ patched) in nats, and the base model's rank of the patched
model's top-1 token, in buckets.
"""

# Names of version 0.1, for its folders.
RENAMED = {"gap": "logit_difference"}


class Distribution(NamedTuple):
    """Logits, and what a divergence from them needs.

    Attributes:
        logits: shifted so that the largest of each row is 0.
        log_z: log of the sum of their exponentials, nats.
        top_1: the token with the largest logit of each row.
    """

    logits: Float[Tensor, "n d_vocab"]
    log_z: Float[Tensor, " n"]
    top_1: Int[Tensor, " n"]


class Reference(NamedTuple):
    """The unpatched models at some decisions."""

    base: Distribution
    tuned: Distribution
    base_p: Float[Tensor, "n d_vocab"]
    tuned_p: Float[Tensor, "n d_vocab"]

    @property
    def changed(self) -> Bool[Tensor, " n"]:
        """Where tuning changed the decision."""
        return self.base.top_1 != self.tuned.top_1


def reference(base: Float[Tensor, "n d_vocab"], tuned: Float[Tensor, "n d_vocab"]) -> Reference:
    """Prepare the two models' logits (float32) for comparison with many others."""
    first, second = _distribution(base), _distribution(tuned)
    return Reference(first, second, first.logits.softmax(-1), second.logits.softmax(-1))


def measure(
    patched: Float[Tensor, "n d_vocab"], models: Reference
) -> dict[str, Float[Tensor, " n"]]:
    """Every metric at every decision, float64; those over changed decisions are 0 elsewhere.

    >>> models = reference(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    >>> found = measure(torch.tensor([[0.0, 2.0]]), models)
    >>> float(found["to_tuned"]), float(found["kl_tuned"]), float(found["logit_difference"])
    (1.0, 0.0, 2.0)
    """
    made = _distribution(patched)
    rank = distances.rank_of(models.base.logits, made.top_1)
    changed = models.changed
    row = torch.arange(len(rank), device=rank.device)
    difference = made.logits[row, models.tuned.top_1] - made.logits[row, models.base.top_1]
    values = {
        "to_tuned": changed & (made.top_1 == models.tuned.top_1),
        "to_base": changed & (made.top_1 == models.base.top_1),
        "logit_difference": torch.where(changed, difference, 0.0),
        "agreement_tuned": made.top_1 == models.tuned.top_1,
        "agreement_base": made.top_1 == models.base.top_1,
        "kl_tuned": _divergence(models.tuned, models.tuned_p, made),
        "kl_base": _divergence(models.base, models.base_p, made),
    } | {bucket.metric: bucket.holds(rank) for bucket in BUCKETS}
    return {name: value.to(torch.float64) for name, value in values.items()}


def _distribution(logits: Float[Tensor, "n d_vocab"]) -> Distribution:
    shifted = logits - logits.amax(-1, keepdim=True)
    return Distribution(shifted, shifted.exp().sum(-1).double().log(), distances.winner(logits))


def _divergence(
    of: Distribution, p: Float[Tensor, "n d_vocab"], other: Distribution
) -> Float[Tensor, " n"]:
    """KL(of ‖ other), nats: a weighted sum of differences, so that equal rows give exactly 0."""
    differences: Tensor = torch.linalg.vecdot(of.logits - other.logits, p).double()
    return (differences + other.log_z - of.log_z).clamp_min(0.0)


@dataclass(frozen=True)
class Outcome:
    """The sums of one patched model.

    Attributes:
        sums: per metric, its sum over the decisions of each text, or group of texts.
        decisions, changed: per text, how many decisions there are, and how many tuning changed.
    """

    sums: dict[str, Float[Tensor, " text"]]
    decisions: Float[Tensor, " text"]
    changed: Float[Tensor, " text"]

    def denominator(self, metric: str) -> Float[Tensor, " text"]:
        """Per text, over how many decisions a metric is summed."""
        return self.changed if metric in CHANGED else self.decisions

    def estimate(self, metric: str) -> Estimate:
        """The metric with its 95% interval over texts; shares stay between 0 and 1."""
        mean = ratio(self.sums[metric], self.denominator(metric), within=_range([1.0], metric))
        # max() keeps a NaN that comes first: the absence of an interval.
        return mean._replace(low=max(mean.low, 0.0)) if metric.startswith("kl") else mean

    def difference(self, other: Outcome, metric: str) -> Estimate:
        """This outcome less another one of the same decisions, paired by text."""
        return combination([(1.0, self), (-1.0, other)], metric)

    def counts(self) -> dict[str, int]:
        """How many `decisions` there are, and how many of them tuning `changed`."""
        return {"decisions": int(self.decisions.sum()), "changed": int(self.changed.sum())}


def combination(terms: list[tuple[float, Outcome]], metric: str) -> Estimate:
    """A weighted sum of outcomes of the same decisions, paired by text."""
    total = sum((weight * outcome.sums[metric] for weight, outcome in terms), torch.zeros(()))
    within = _range([weight for weight, _ in terms], metric)
    return ratio(total, terms[0][1].denominator(metric), within=within)


def _range(weights: list[float], metric: str) -> tuple[float, float] | None:
    """Between what a weighted sum of shares lies; None for metrics that are no shares."""
    if metric == "logit_difference" or metric.startswith("kl"):
        return None
    return -sum((max(-w, 0.0) for w in weights), 0.0), sum((max(w, 0.0) for w in weights), 0.0)


class Accumulator:
    """Adds up outcomes batch by batch.

    Args:
        n_texts: how many texts there are in all.
    """

    def __init__(self, n_texts: int) -> None:
        self._n = n_texts
        self._sums: dict[str, Tensor] = {}

    def add(
        self,
        values: dict[str, Float[Tensor, " n"]],
        changed: Bool[Tensor, " n"],
        text: Int[Tensor, " n"],
    ) -> None:
        """Add some decisions; `text` is the index of each decision's text."""
        ones = torch.ones_like(changed, dtype=torch.float64)
        for name, value in (values | {"decisions": ones, "changed": changed.double()}).items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(self._n, dtype=torch.float64)
            self._sums[name].index_add_(0, text.cpu(), value.to("cpu", torch.float64))

    def outcome(self, groups: Sequence[int] | None = None) -> Outcome:
        """The sums so far; of each group of texts where they have groups, as if it were one."""
        sums = dict(self._sums)
        if groups is not None:
            unit = torch.tensor(groups)
            sums = {
                name: torch.zeros(int(unit.max()) + 1, dtype=torch.float64).index_add_(0, unit, of)
                for name, of in sums.items()
            }
        return Outcome(decisions=sums.pop("decisions"), changed=sums.pop("changed"), sums=sums)
