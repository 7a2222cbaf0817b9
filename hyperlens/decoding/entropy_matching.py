"""The temperature at which a row of logits has a given entropy (arXiv 2605.22579, section 3.2).

The entropy of softmax(z / T) grows with T: from log(tied maxima) as T goes to 0 to log(unmasked
tokens) as T goes to infinity. Its slope over log T is the variance of z / T, which gives Newton's
method its step; a bracket around the solution takes over where the curve is flat. Everything is
computed in float64 and over log T, because T itself may leave the range of floats while its
logarithm does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from ..errors import ProbeError

# A match is one within this many nats; the search goes on to a far smaller gap.
MATCHED = 1e-4
TOLERANCE = 1e-9
# Newton halves the error or a bisection halves the bracket: about 80 steps at the very worst.
MAX_STEPS = 200
# exp(-x) is exactly 0 in float64 from here on.
NO_WEIGHT = 800.0

Slope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Chunks = Callable[[], Iterable[tuple[Tensor, Tensor]]]


class Match(NamedTuple):
    """Temperatures, and the entropies that they give, in nats.

    Attributes:
        log_temperature: natural logarithm of T*; the nearest end where the target is out of reach.
        entropy: at T*.
        lowest, highest: the entropies between which temperature can choose: log of the number of
            tied maxima, and log of the number of unmasked tokens.
        reached: whether the entropy is within 1e-4 nats of the target.
    """

    log_temperature: Float[Tensor, " n"]
    entropy: Float[Tensor, " n"]
    lowest: Float[Tensor, " n"]
    highest: Float[Tensor, " n"]
    reached: Bool[Tensor, " n"]

    @property
    def temperature(self) -> Float[Tensor, " n"]:
        """T*; 0 or infinite where it is no float64."""
        return self.log_temperature.exp()


class _Gaps(NamedTuple):
    """How far each logit lies below its row's maximum, times exp(-shift); inf where masked."""

    gap: Float[Tensor, "n d_vocab"]
    shift: Float[Tensor, " n"]
    low: Float[Tensor, " n"]
    high: Float[Tensor, " n"]
    lowest: Float[Tensor, " n"]
    highest: Float[Tensor, " n"]


def match_entropy(logits: Float[Tensor, "n d_vocab"], target: Float[Tensor, " n"]) -> Match:
    """The temperature of each row at which its softmax has the target entropy.

    Args:
        logits: any floats; -inf masks a token.
        target: entropies in nats.

    Raises:
        ProbeError: if a logit is NaN or +inf, or a row has no unmasked token.

    >>> logits = torch.tensor([[4.0, 2.0, 1.0, 0.0], [3.0, 3.0, 0.0, 0.0]])
    >>> match = match_entropy(logits, torch.tensor([0.5, 0.5]))
    >>> [round(t, 3) for t in match.temperature.tolist()], match.reached.tolist()
    ([0.899, 0.124], [True, False])
    """
    gaps = _gaps(logits)
    wanted = target.to(gaps.gap)

    def curve(u: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        all_rows = len(rows) == len(gaps.gap)
        return _entropy(gaps.gap if all_rows else gaps.gap[rows], u)

    goal = wanted.clamp(gaps.lowest, gaps.highest)
    start = (-gaps.shift).clamp(gaps.low, gaps.high)
    u, entropy = _solve(curve, goal, gaps.low, gaps.high, start)
    reached = (entropy - wanted).abs() < MATCHED
    return Match(u + gaps.shift, entropy, gaps.lowest, gaps.highest, reached)


def match_mean_entropy(chunks: Chunks, target: float) -> Match:
    """The single temperature at which the weighted mean entropy of many rows is the target.

    Args:
        chunks: yields all rows in pieces, logits [n, d_vocab] and weights [n], which sum to 1 over
            all pieces; called anew at every step of the search (about ten).
        target: mean entropy in nats.

    Returns:
        A match of one row.

    Raises:
        ProbeError: as `match_entropy` does.
    """
    lows, highs, lowest, highest = [], [], 0.0, 0.0
    for logits, weights in chunks():
        gaps = _gaps(logits)
        lows.append((gaps.low + gaps.shift).min())
        highs.append((gaps.high + gaps.shift).max())
        lowest += float((gaps.lowest * weights.to(gaps.lowest)).sum())
        highest += float((gaps.highest * weights.to(gaps.highest)).sum())
    low, high = torch.stack(lows).min()[None], torch.stack(highs).max()[None]
    bounds = low.new_tensor([lowest]), low.new_tensor([highest])

    def curve(u: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        mean, slope = torch.zeros_like(low), torch.zeros_like(low)
        for logits, weights in chunks():
            gaps = _gaps(logits)
            share = weights.to(gaps.gap)
            h, dh = _entropy(gaps.gap, u - gaps.shift)
            mean += (h * share).sum()
            slope += (dh * share).sum()
        return mean, slope

    wanted = low.new_tensor([target])
    start = torch.zeros_like(low).clamp(low, high)
    u, entropy = _solve(curve, wanted.clamp(*bounds), low, high, start)
    return Match(u, entropy, *bounds, (entropy - wanted).abs() < MATCHED)


def scaled(
    logits: Float[Tensor, "n d_vocab"], log_temperature: Float[Tensor, " n"]
) -> Float[Tensor, "n d_vocab"]:
    """z / T in float64, each row shifted so that its maximum is 0; never NaN."""
    gaps = _gaps(logits)
    return -_over(gaps.gap, log_temperature.to(gaps.gap) - gaps.shift)


def entropy_at(
    logits: Float[Tensor, "n d_vocab"], log_temperature: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Entropy of softmax(z / T) of each row, in nats.

    >>> entropy_at(torch.zeros(1, 4), torch.zeros(1)).exp().round(decimals=6).tolist()
    [4.0]
    """
    gaps = _gaps(logits)
    return _entropy(gaps.gap, log_temperature.to(gaps.gap) - gaps.shift)[0]


def tied_maxima(logits: Float[Tensor, "n d_vocab"]) -> Int[Tensor, " n"]:
    """How many tokens share the largest logit of each row.

    >>> tied_maxima(torch.tensor([[2.0, 2.0, 1.0], [0.0, 1.0, 2.0]])).tolist()
    [2, 1]
    """
    return (logits == logits.amax(-1, keepdim=True)).sum(-1)


class EntropyMatched(LogitsProcessor):
    """Generate at the temperature that gives every single context the same target entropy.

    Works in plain transformers (`model.generate(..., logits_processor=[EntropyMatched(3.0)])`) and
    keeps no state. Where the target is out of reach, the closest temperature is taken.

    Args:
        target: entropy in nats; the paper takes the tuned model's mean.
    """

    def __init__(self, target: float) -> None:
        if not (math.isfinite(target) and target >= 0):
            raise ProbeError(f"target must be an entropy of 0 nats or more, got {target}")
        self.target = target

    def __call__(
        self, input_ids: Int[Tensor, "batch pos"], scores: Float[Tensor, "batch d_vocab"]
    ) -> Float[Tensor, "batch d_vocab"]:
        wanted = torch.full((len(scores),), self.target, dtype=torch.float64)
        return scaled(scores, match_entropy(scores, wanted).log_temperature).to(scores)


def _gaps(logits: Float[Tensor, "n d_vocab"]) -> _Gaps:
    # Apple's accelerator has no float64.
    z = (logits.cpu() if logits.device.type == "mps" else logits).to(torch.float64)
    top = z.amax(-1, keepdim=True)
    # The maximum of a row is NaN if any entry is, and infinite for +inf or where all are -inf.
    if not bool(torch.isfinite(top).all()):
        raise ProbeError(
            "cannot match entropies: expected finite logits, or -inf for a masked token, with one "
            "unmasked token in every row; got NaN, +inf or a row of -inf"
        )
    gap = top - z
    # Logits further apart than the largest float64 are halved; `shift` remembers it.
    halved = (torch.isinf(gap) & torch.isfinite(z)).any(-1)
    if bool(halved.any()):
        gap = torch.where(halved[:, None], top / 2 - z / 2, gap)
    open_ = torch.isfinite(gap)
    n_open, n_tied = open_.sum(-1), (gap == 0).sum(-1)
    flat = n_open == n_tied
    least = torch.where(gap > 0, gap, torch.inf).amin(-1)
    most = torch.where(open_, gap, 0.0).amax(-1)
    highest = n_open.to(torch.float64).log()
    # Beyond these ends nothing changes by 1e-12 nats. A flat row has no temperature: take 1.
    low = torch.where(flat, 0.0, least.log() - (40 + highest).log())
    high = torch.where(flat, 0.0, most.log() + math.log(1e7))
    shift = halved.to(torch.float64) * math.log(2)
    return _Gaps(gap, shift, low, high, n_tied.to(torch.float64).log(), highest)


def _over(
    gap: Float[Tensor, "n d_vocab"], log_temperature: Float[Tensor, "#n"]
) -> Float[Tensor, "n d_vocab"]:
    """gap / T as two divisions by the square root of T, which may itself be no float."""
    root = (-log_temperature / 2).exp()[:, None]
    return (gap * root).mul_(root)


def _entropy(
    gap: Float[Tensor, "n d_vocab"], log_temperature: Float[Tensor, "#n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Entropy of every row, and its slope over log T: the variance of z / T."""
    x = _over(gap, log_temperature).clamp_(max=NO_WEIGHT)
    weight = x.neg().exp_()
    z = weight.sum(-1)
    mean = weight.mul_(x).sum(-1) / z
    square = weight.mul_(x).sum(-1) / z
    return z.log() + mean, (square - mean.square()).clamp_min(0.0)


def _solve(
    curve: Slope,
    goal: Float[Tensor, " n"],
    low: Float[Tensor, " n"],
    high: Float[Tensor, " n"],
    start: Float[Tensor, " n"],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Where an increasing curve meets the goal, and its height there; solved rows drop out."""
    solution, height = start.clone(), torch.full_like(goal, torch.nan)
    rows = torch.arange(len(goal), device=goal.device)
    u, before = start, torch.full_like(goal, torch.inf)
    for _ in range(MAX_STEPS):
        value, slope = curve(u, rows)
        solution[rows], height[rows] = u, value
        error = value - goal
        unsolved = (error.abs() > TOLERANCE) & (high > low)
        if not bool(unsolved.any()):
            break
        low = torch.where(error < 0, u, low)
        high = torch.where(error > 0, u, high)
        newton = u - error / slope
        # Comparisons with NaN are false, so that a step from a flat curve becomes a bisection.
        trusted = (newton > low) & (newton < high) & (error.abs() <= before / 2)
        u = torch.where(trusted, newton, (low + high) / 2)
        before = error.abs()
        rows, u, before, goal, low, high = (x[unsolved] for x in (rows, u, before, goal, low, high))
    return solution, height
