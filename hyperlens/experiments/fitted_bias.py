"""The most that one bias can do: fitted to the tuned model's probabilities, read on other texts.

Of all biases b, the one that minimises the mean KL(tuned ‖ base + b) makes the base's mean
probability of every token the tuned model's. So the mean probabilities are all that a fit has to
know of the tuned model, and a step towards it needs one pass over the base's logits.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int
from scipy.special import wrightomega
from torch import Tensor

from ..passes.contexts import Contexts

# Standard deviation in nats of a bias before any text is read (Gaussian prior): wide enough for
# what tuning does to common tokens, narrow enough that tokens nobody expects keep theirs.
PRIOR = 3.0
# A fit ends when its mean probabilities are this close to their targets (sum over tokens).
CLOSE = 2e-3
MOST_PASSES = 12
# Stands for a mean probability of 0, of which there is no logarithm.
SMALLEST = 1e-30


def halves(text: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Which half of the texts each context belongs to; long and short texts are in both."""
    return text % 2


def fit_biases(contexts: Contexts, progress: bool) -> Float[Tensor, "2 d_vocab"] | None:
    """For either half of the texts, the bias that was fitted on the other; None if one is empty.

    It minimises the mean KL(tuned ‖ base + b) over the contexts plus |b|² / (2 σ² n), with σ 3
    nats and n contexts: the most probable bias if each token's has that deviation beforehand.
    """
    other = 1 - halves(contexts.text)
    n = torch.bincount(other, minlength=2).double()
    if not bool(n.all()):
        return None
    target, mean = (torch.zeros(2, contexts.d_vocab, dtype=torch.float64) for _ in range(2))
    for rows, base, tuned in contexts.rows("mean probabilities", progress):
        _add(target, tuned, other[rows])
        _add(mean, base, other[rows])
    target /= n[:, None]
    mean /= n[:, None]
    penalty = (1 / (PRIOR**2 * n))[:, None]
    bias = torch.zeros_like(mean)
    for _ in range(MOST_PASSES):
        bias = next_bias(bias, mean, target, penalty)
        mean = torch.zeros_like(mean)
        for rows, base in contexts.base_rows():
            _add(mean, base + bias[other[rows]].to(base), other[rows])
        mean /= n[:, None]
        if float((target - mean - penalty * bias).abs().sum(-1).max()) < CLOSE:
            break
    return bias


def _add(
    total: Float64[Tensor, "2 d_vocab"], logits: Float[Tensor, "n d_vocab"], of: Int[Tensor, " n"]
) -> None:
    """Add the probabilities of each row to the total it belongs to."""
    p = logits.softmax(-1)
    of = of.to(p.device)
    total += torch.stack([p[of == i].sum(0) for i in (0, 1)]).cpu()


def next_bias(
    bias: Float64[Tensor, "*fit d_vocab"],
    mean: Float64[Tensor, "*fit d_vocab"],
    target: Float64[Tensor, "*fit d_vocab"],
    penalty: Float64[Tensor, "*fit 1"],
) -> Float64[Tensor, "*fit d_vocab"]:
    """A step of iterative scaling (Darroch and Ratcliff 1972) with a quadratic penalty.

    Without a penalty a token's bias grows by log(target / mean). With one, the step d solves
    target - mean exp(d) - penalty (bias + d) = 0 for each token, and the penalised divergence
    falls with every step.

    Args:
        bias: so far.
        mean: mean probability of every token in the base with this bias.
        target: that in the tuned model.
        penalty: of half the squared bias.

    >>> weak = torch.tensor([1e-9], dtype=torch.float64)
    >>> mean, target = (torch.tensor(x, dtype=torch.float64) for x in ([0.5, 0.5], [0.75, 0.25]))
    >>> [round(x, 3) for x in next_bias(torch.zeros_like(mean), mean, target, weak).tolist()]
    [0.405, -0.693]
    """
    scale = (mean.clamp_min(SMALLEST) / penalty).log()
    # With w = mean exp(d) / penalty the equation is w + log w = target / penalty - bias + scale.
    w = torch.from_numpy(wrightomega((target / penalty - bias + scale).numpy()))
    return bias + w.log() - scale
