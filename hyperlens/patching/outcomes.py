"""What a patch did to the decisions: counted per text, so that every comparison can be paired.

Every decision is a next-token prediction of a patched model, seen beside those of the base and the
tuned model at the same place. Sums are kept per text; a statistic is a ratio of two of them with
an interval over texts, and two patches are compared on the same texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..statistics import distances
from ..statistics.significance import Estimate
from .ratios import p_value as p_value
from .ratios import ratio as ratio

CHANGED = ("to_tuned", "to_base", "gap")
EVERY = (
    "agreement_tuned",
    "agreement_base",
    "kl_tuned",
    "kl_base",
    "rank_1",
    "rank_2_10",
    "rank_gt_10",
    "rank_ge_200",
)
METRICS = (*CHANGED, *EVERY)
"""What is measured of a patched model.

Over the decisions that tuning changed: `to_tuned` and `to_base`, the shares that are the tuned
model's and the base model's choice, and `gap`, the logit of the tuned model's choice less that of
the base's. Over all decisions: agreement with each model, KL(tuned ‖ patched) and KL(base ‖
patched) in nats, and the base model's rank of the patched model's choice, in buckets.
"""


class Distribution(NamedTuple):
    """Logits, and what a divergence from them needs.

    Attributes:
        logits: shifted so that the largest of each row is 0.
        log_z: log of the sum of their exponentials, nats.
        pick: the token each row puts first.
    """

    logits: Float[Tensor, "n d_vocab"]
    log_z: Float[Tensor, " n"]
    pick: Int[Tensor, " n"]


class Reference(NamedTuple):
    """The unpatched models at some decisions."""

    base: Distribution
    tuned: Distribution
    base_p: Float[Tensor, "n d_vocab"]
    tuned_p: Float[Tensor, "n d_vocab"]

    @property
    def changed(self) -> Bool[Tensor, " n"]:
        """Where tuning changed the decision."""
        return self.base.pick != self.tuned.pick


def reference(base: Float[Tensor, "n d_vocab"], tuned: Float[Tensor, "n d_vocab"]) -> Reference:
    """The two models' logits (float32), made ready to be compared with many others."""
    first, second = _distribution(base), _distribution(tuned)
    return Reference(first, second, first.logits.softmax(-1), second.logits.softmax(-1))


def measure(
    patched: Float[Tensor, "n d_vocab"], models: Reference
) -> dict[str, Float[Tensor, " n"]]:
    """Every metric at every decision, float64; those over changed decisions are 0 elsewhere."""
    found = _distribution(patched)
    rank = distances.rank_of(models.base.logits, found.pick)
    changed = models.changed
    here = torch.arange(len(rank), device=rank.device)
    gap = found.logits[here, models.tuned.pick] - found.logits[here, models.base.pick]
    values = {
        "to_tuned": changed & (found.pick == models.tuned.pick),
        "to_base": changed & (found.pick == models.base.pick),
        "gap": torch.where(changed, gap, 0.0),
        "agreement_tuned": found.pick == models.tuned.pick,
        "agreement_base": found.pick == models.base.pick,
        "kl_tuned": _divergence(models.tuned, models.tuned_p, found),
        "kl_base": _divergence(models.base, models.base_p, found),
        "rank_1": rank == 1,
        "rank_2_10": (rank >= 2) & (rank <= 10),
        "rank_gt_10": rank > 10,
        "rank_ge_200": rank >= 200,
    }
    return {name: value.to(torch.float64) for name, value in values.items()}


def _distribution(logits: Float[Tensor, "n d_vocab"]) -> Distribution:
    shifted = logits - logits.amax(-1, keepdim=True)
    return Distribution(shifted, shifted.exp().sum(-1).double().log(), distances.winner(logits))


def _divergence(
    of: Distribution, p: Float[Tensor, "n d_vocab"], other: Distribution
) -> Float[Tensor, " n"]:
    """KL(of ‖ other), nats: a weighted sum of differences, so that equal rows give exactly 0."""
    gaps: Tensor = torch.linalg.vecdot(of.logits - other.logits, p).double()
    return (gaps + other.log_z - of.log_z).clamp_min(0.0)


@dataclass(frozen=True)
class Outcome:
    """The sums of one patched model.

    Attributes:
        sums: per metric, its sum over the decisions of each text.
        decisions, changed: per text, how many decisions there are, and how many tuning changed.
    """

    sums: dict[str, Float[Tensor, " text"]]
    decisions: Float[Tensor, " text"]
    changed: Float[Tensor, " text"]

    def counted(self, metric: str) -> Float[Tensor, " text"]:
        """The denominator of a metric."""
        return self.changed if metric in CHANGED else self.decisions

    def estimate(self, metric: str) -> Estimate:
        """The metric with its 95% interval over texts; shares stay between 0 and 1."""
        is_share = metric != "gap" and not metric.startswith("kl")
        found = ratio(self.sums[metric], self.counted(metric), is_share=is_share)
        # max() keeps a NaN that comes first: the absence of an interval.
        return found._replace(low=max(found.low, 0.0)) if metric.startswith("kl") else found

    def difference(self, other: Outcome, metric: str) -> Estimate:
        """This outcome less another one of the same decisions, paired by text."""
        return ratio(self.sums[metric] - other.sums[metric], self.counted(metric))


def combination(terms: list[tuple[float, Outcome]], metric: str) -> Estimate:
    """A weighted sum of outcomes of the same decisions, paired by text."""
    total = sum((weight * one.sums[metric] for weight, one in terms), torch.zeros(()))
    return ratio(total, terms[0][1].counted(metric))


class Tally:
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
        """Add some decisions; `text` says whose they are."""
        ones = torch.ones_like(changed, dtype=torch.float64)
        for name, value in (values | {"decisions": ones, "changed": changed.double()}).items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(self._n, dtype=torch.float64)
            self._sums[name].index_add_(0, text.cpu(), value.to("cpu", torch.float64))

    def outcome(self) -> Outcome:
        """What has been added."""
        sums = dict(self._sums)
        return Outcome(decisions=sums.pop("decisions"), changed=sums.pop("changed"), sums=sums)
