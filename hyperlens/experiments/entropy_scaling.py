"""A base model brought to a tuned model's entropy, and read teacher-forced at every context."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TemperatureLogitsWarper

from ..passes.contexts import Contexts
from ..statistics.distances import winner
from ..statistics.rank_correlation import spearman
from .entropy_matching import (
    EntropyMatched,
    Match,
    entropy_at,
    match_entropy,
    match_mean_entropy,
    scaled,
    tied_maxima,
)
from .temperature_finding import TEACHER_FORCED, VARIANTS

# Generation scales float32 logits, which a temperature beyond these would overflow or flatten.
COLDEST, HOTTEST = 1e-4, 1e4
# Edges of the histogram of per-context temperatures, as log2 T; the ends gather what lies beyond.
EDGES = torch.linspace(-4.0, 4.0, 33, dtype=torch.float64)

Units = dict[tuple[str, str, str], list[float]]
"""Variant, decoding and metric to one value per text or prompt."""


@dataclass(frozen=True)
class Scaling:
    """The ways in which the base model is brought to the tuned model's entropy.

    Attributes:
        target: the tuned model's mean entropy, in nats; every text has the same say in it.
        shared: the one temperature at which the base model's mean entropy is the target.
        own: log T* of each context for the tuned model's entropy in that context.
        own_reached: in how many contexts any temperature has it.
    """

    target: float
    shared: Match
    own: Float[Tensor, " n"]
    own_reached: int

    @property
    def temperature(self) -> float:
        """The shared temperature as generation uses it."""
        return min(max(float(self.shared.temperature), COLDEST), HOTTEST)

    def processors(self, variant: str) -> list[Any]:
        """What makes generation from the base model a variant of it."""
        if variant == "matched":
            return [TemperatureLogitsWarper(self.temperature)]
        return [EntropyMatched(self.target)] if variant == "matched_per_context" else []

    def notes(self) -> list[str]:
        """What a reader should know where no temperature will do."""
        t, low, high = (
            float(x) for x in (self.shared.temperature, self.shared.lowest, self.shared.highest)
        )
        notes = []
        if not bool(self.shared.reached):
            notes.append(
                f"no temperature gives the base model {self.target:.4g} nats (it reaches {low:.4g} "
                f"to {high:.4g}): the nearest was taken"
            )
        if self.temperature != t:
            notes.append(
                f"T* = {t:.3g} is beyond what float32 logits can be scaled by: texts were made "
                f"at {self.temperature:g}"
            )
        return notes


def find_scaling(contexts: Contexts, progress: bool) -> Scaling:
    """Solve for every temperature of the experiment."""
    parts = []
    for _, base, tuned in contexts.rows("matching entropies", progress):
        wanted = entropy_at(tuned, torch.zeros(len(tuned)))
        match = match_entropy(base, wanted)
        parts.append([x.cpu() for x in (wanted, match.log_temperature, match.reached)])
    wanted, own, reached = (torch.cat(part) for part in zip(*parts, strict=True))
    weights = contexts.weights
    target = float((weights * wanted).sum())

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        return ((logits, weights[rows]) for rows, logits in contexts.base_rows())

    return Scaling(target, match_mean_entropy(pieces, target), own, int(reached.sum()))


@dataclass(frozen=True)
class TeacherForced:
    """What both models make of every context.

    Attributes:
        units: agreement, ρ and entropy of every variant, text by text.
        tied: in how many contexts of a variant several tokens share the largest logit.
        changed: in how many its first token is not the original's.
        to_mean: log T* of each context for the *mean* entropy of the tuned model.
    """

    units: Units
    tied: dict[str, int]
    changed: dict[str, int]
    to_mean: Float[Tensor, " n"]


def teacher_forced(contexts: Contexts, scaling: Scaling, progress: bool) -> TeacherForced:
    """Read every variant against the original, as scaled in float32, which is what decoding does.

    In exact arithmetic scaling keeps every rank. In float32 it can merge two neighbouring logits
    into a tie, which is why the variants are measured and not written down as 1.
    """
    parts: dict[tuple[str, str], list[Tensor]] = {
        (v, m): [] for v in VARIANTS for m in TEACHER_FORCED
    }
    tied, changed = dict.fromkeys(VARIANTS, 0), dict.fromkeys(VARIANTS, 0)
    to_mean = []
    for _, base, tuned in contexts.rows("reading ranks", progress):
        first = winner(base)
        target = torch.full((len(base),), scaling.target, dtype=torch.float64)
        per_context = match_entropy(base, target).log_temperature
        to_mean.append(per_context.cpu())
        logits_of = {
            "original": base,
            "matched": base / scaling.temperature,
            "matched_per_context": scaled(base, per_context).float().to(base.device),
            "tuned": tuned,
        }
        for variant, logits in logits_of.items():
            agrees = winner(logits) == first
            tied[variant] += int((tied_maxima(logits) > 1).sum())
            changed[variant] += int((~agrees).sum())
            parts[variant, "top1_agreement"].append(agrees.double().cpu())
            parts[variant, "spearman"].append(spearman(base, logits).cpu())
            parts[variant, "entropy"].append(entropy_at(logits, torch.zeros_like(target)).cpu())
    units = {
        (variant, "teacher-forced", metric): contexts.per_text(torch.cat(values))
        for (variant, metric), values in parts.items()
    }
    return TeacherForced(units, tied, changed, torch.cat(to_mean))


def describe_temperatures(scaling: Scaling, read: TeacherForced) -> dict[str, Any]:
    """Every temperature found, as JSON values."""
    log2 = (scaling.own / math.log(2)).clamp(float(EDGES[0]), float(EDGES[-1]))
    return {
        "shared": float(scaling.shared.temperature),
        "shared_reached": bool(scaling.shared.reached),
        "target_entropy": scaling.target,
        "reachable": [float(scaling.shared.lowest), float(scaling.shared.highest)],
        "own_quantiles": quantiles(scaling.own),
        "own_reached": scaling.own_reached,
        "to_mean_quantiles": quantiles(read.to_mean),
        "n_contexts": len(scaling.own),
        "log2_edges": EDGES.tolist(),
        "own_counts": torch.histogram(log2, EDGES).hist.long().tolist(),
    }


def quantiles(log_temperature: Float[Tensor, " n"]) -> dict[str, float]:
    """Quantiles of temperatures, by the nearest order statistic."""
    ordered = log_temperature.sort().values
    # By hand: torch's own quantile refuses more than 16 million values.
    at = {q: ordered[round(q * (len(ordered) - 1))] for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
    return {f"{q:g}": float(value.exp()) for q, value in at.items()}
