"""Participation ratio from streamed moments: no eigensolver, no stored activations.

PR = tr(Σ)² / ‖Σ‖²_F counts the directions that share a stream's variance (section 4 of
arXiv 2605.22579 calls it effective dimension). Sums are taken about a fixed origin near the
data, because a stream whose mean is a thousand standard deviations from zero would otherwise
lose its variance to cancellation; PR itself does not depend on the origin.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from einops import einsum
from jaxtyping import Float, Float64
from torch import Tensor

# A row is long if its square is this many times the median square.
LONG = 16.0
# A product of this many stripes is at most 9/16 of the whole; thinner ones multiply slower.
STRIPES = 8
SMALLEST_STRIPE = 64


@dataclass(frozen=True)
class Moments:
    """Sums over n vectors x about an origin, float64; leading dimensions are independent sets.

    Attributes:
        n: number of vectors.
        total: Σx.
        outer: Σxxᵀ.
        square: Σ|x|².
        fourth: Σ|x|⁴.
        cubic: Σx|x|².
    """

    n: Float[Tensor, "*sets"]
    total: Float[Tensor, "*sets d"]
    outer: Float[Tensor, "*sets d d"]
    square: Float[Tensor, "*sets"]
    fourth: Float[Tensor, "*sets"]
    cubic: Float[Tensor, "*sets d"]

    def __add__(self, other: Moments) -> Moments:
        """The sums over both sets of vectors, taken about the same origin."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Moments(**{name: one + another for name, one, another in pairs})

    def shifted(self, step: Float[Tensor, "*sets d"]) -> Moments:
        """The sums after adding `step` to each vector, multiplied out: exact but for rounding."""
        n, step_sq = self.n, step.square().sum(-1)
        along = (self.total * step).sum(-1)
        pushed = einsum(self.outer, step, "... i j, ... j -> ... i")
        cross = einsum(self.total, step, "... i, ... j -> ... i j")
        steps = einsum(step, step, "... i, ... j -> ... i j")
        return Moments(
            n=n,
            total=self.total + n[..., None] * step,
            outer=self.outer + cross + cross.mT + n[..., None, None] * steps,
            square=self.square + 2 * along + n * step_sq,
            fourth=self.fourth
            + 4 * (step * pushed).sum(-1)
            + n * step_sq.square()
            + 4 * (self.cubic * step).sum(-1)
            + 2 * step_sq * self.square
            + 4 * step_sq * along,
            cubic=self.cubic
            + 2 * pushed
            + step_sq[..., None] * self.total
            + (self.square + 2 * along + n * step_sq)[..., None] * step,
        )


def moments_of(x: Float[Tensor, "n d"], origin: Float[Tensor, " d"]) -> Moments:
    """Moments of the rows of `x` about `origin`, as float64 sums.

    >>> m = moments_of(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.zeros(2))
    >>> m.total.tolist(), float(m.square), float(m.fourth)
    ([4.0, 0.0], 10.0, 82.0)
    """
    x = torch.sub(x, origin.to(torch.float64))  # in float64, whatever x is
    squares = x.square().sum(-1)
    # On the CPU float64 products cost little; on accelerators they can be dozens of times slower.
    outer = outer_by_stripes(x) if x.device.type == "cpu" else outer_mostly_float32(x, squares)
    return Moments(
        n=torch.tensor(float(len(x)), dtype=torch.float64, device=x.device),
        total=x.sum(0),
        outer=outer,
        square=squares.sum(),
        fourth=squares.square().sum(),
        cubic=squares @ x,
    )


def outer_by_stripes(x: Float64[Tensor, "n d"]) -> Float64[Tensor, "d d"]:
    """Σxxᵀ, without most of the products below the diagonal: what is above it is mirrored."""
    d = x.shape[-1]
    outer = torch.empty(d, d, dtype=x.dtype)
    height = max(SMALLEST_STRIPE, -(-d // STRIPES))
    for top in range(0, d, height):
        stripe = slice(top, top + height)
        torch.mm(x[:, stripe].T, x[:, top:], out=outer[stripe, top:])
        outer[top + height :, stripe] = outer[stripe, top + height :].T
    return outer


def outer_mostly_float32(
    x: Float64[Tensor, "n d"], squares: Float64[Tensor, " n"]
) -> Float64[Tensor, "d d"]:
    """Σxxᵀ by float32 products, but float64 ones for rows far longer than most.

    The row estimator subtracts Σ|x|⁴ from ‖Σxxᵀ‖². Where one attention sink is a thousand times
    as long as other tokens, nearly all of both terms is that token's own and cancels; rounded to
    float32, its products would leave a participation ratio that is off by 0.1% or more.
    """
    long = squares > LONG * squares.median() if len(x) else squares > 0
    short = torch.where(long[:, None], 0.0, x).to(torch.float32)
    with in_full_float32():
        product = short.T @ short
    return product.to(torch.float64) + x[long].T @ x[long]


@contextmanager
def in_full_float32() -> Iterator[None]:
    """Turn TensorFloat-32 off inside, and restore the caller's setting afterwards.

    TensorFloat-32 rounds the factors of a product to 11 bits. That is the caller's choice for the
    models; in a statistic an error of one in a thousand would be taken for a result.
    """
    matmul = torch.backends.cuda.matmul
    # The older name cannot be read where the caller used the newer one, nor the other way round.
    name, full = (
        ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    )
    before = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        yield
    finally:
        setattr(matmul, name, before)


@dataclass(frozen=True)
class TraceEstimates:
    """Estimates of tr(Σ)² and tr(Σ²); their quotient is a participation ratio."""

    trace_squared: Float[Tensor, "*sets"]
    square_trace: Float[Tensor, "*sets"]

    @property
    def ratio(self) -> Float[Tensor, "*sets"]:
        """The participation ratio; NaN where there is no variance."""
        return torch.where(self.square_trace > 0, self.trace_squared / self.square_trace, torch.nan)


def naive_traces(m: Moments) -> TraceEstimates:
    """Plug-in estimates from the sample covariance (divisor n); biased low for few tokens.

    Four points at the corners of a square vary alike in two directions:

    >>> corners = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    >>> float(naive_traces(moments_of(corners, torch.zeros(2))).ratio)
    2.0
    """
    # With S = Σxxᵀ and s = Σx, the covariance is C = S/n - ssᵀ/n². Then
    # tr(C)² = (Σ|x|²/n - |s|²/n²)² and tr(C²) = (‖S‖² - 2 sᵀSs/n + |s|⁴/n²) / n².
    t1, t5, t6, t7, t9 = _terms(m)
    n = m.n
    return TraceEstimates(
        (t6 - 2 * t7 / n + t9 / n**2) / n**2,
        (t1 - 2 * t5 / n + t9 / n**2) / n**2,
    )


def corrected_traces(m: Moments) -> TraceEstimates:
    """The row estimator of Chun et al. 2025 (arXiv 2509.26560): unbiased for independent tokens.

    The plug-in estimate of tr(Σ²) averages the squared products of all pairs of tokens, each
    token's with itself included; these inflate it, and so the ratio is too low. Here every product
    is of distinct tokens: with x_i - x_k and x_j - x_l for four different tokens the unknown mean
    cancels as well. These U-statistics over quadruples are summed in closed form from the quartic
    sums below. All columns are observed, so there is no correction over them. NaN below four
    tokens.
    """
    t1, t5, t6, t7, t9 = _terms(m)
    n, t2 = m.n, m.fourth
    t3 = (m.total * m.cubic).sum(-1)
    pairs = (n - 1) * (n - 2)
    a = t6 - 2 * t7 / (n - 1) + (4 * t3 - n * t2) / (n - 2) + (t9 - 4 * t5 + 2 * t1 - t6) / pairs
    b = t1 - n * t2 / (n - 2) + 2 * (2 * t3 - t5) / (n - 2) + (t6 - 2 * t7 + t9) / pairs
    enough = torch.where(n >= 4, n * (n - 3), torch.nan)
    return TraceEstimates(a / enough, b / enough)


def _terms(m: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sums over pairs, triples and quadruples of tokens that both estimators are made of.

    Numbered as in Chun et al.: t1 = Σᵢⱼ(xᵢ·xⱼ)² = ‖Σxxᵀ‖², t5 = Σᵢ(xᵢ·s)², t6 = (Σ|x|²)²,
    t7 = Σ|x|²·|s|² and t9 = |s|⁴ with s = Σx; `corrected_traces` adds t2 = Σ|x|⁴ and
    t3 = Σ|xᵢ|²(xᵢ·s), where indices coincide.
    """
    s = m.total
    s_sq = s.square().sum(-1)
    t1 = m.outer.square().sum((-1, -2))
    t5 = (s * einsum(m.outer, s, "... i j, ... j -> ... i")).sum(-1)
    return t1, t5, m.square**2, m.square * s_sq, s_sq**2
