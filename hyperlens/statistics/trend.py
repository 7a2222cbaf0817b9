"""Does a quantity go one way as a knob is turned? Spearman's ρ with p values for few settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from ..statistics import significance

# All orders of up to so many settings are tried: 8! = 40,320.
MOST_EXACT = 8


def trend(settings: Sequence[float], columns: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Spearman's ρ between settings and a quantity measured on the same units at each.

    Args:
        settings: of the knob, all different.
        columns: for each setting, one value per unit (prompt).

    Returns:
        rho: of the means over units, as papers report it; NaN where they do not vary.
        p: scipy's, from the t distribution, which is too sure of itself for few settings.
        p_exact: share of all orders of the means with a ρ at least as far from 0; NaN for more
            than 8 settings.
        per_unit: mean over units of each unit's own ρ, with its 95% interval; units that do not
            vary are left out.
    """
    means = [float(np.mean(column)) for column in columns]
    rho, p = spearman(settings, means)
    own = [
        spearman(settings, unit)[0] for unit in zip(*columns, strict=True)
    ]  # one list per prompt
    return {
        "rho": rho,
        "p": p,
        "p_exact": exact_p(settings, means),
        "per_unit": significance.estimate(own)._asdict(),
    }


def spearman(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """ρ and scipy's two-sided p; NaN where either does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan, math.nan
    found = stats.spearmanr(x, y)
    return float(found.statistic), float(found.pvalue)


def exact_p(x: Sequence[float], y: Sequence[float]) -> float:
    """Two-sided p of Spearman's ρ over all pairings; NaN where either does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2 or len(x) > MOST_EXACT:
        return math.nan
    ranks = stats.rankdata(y) - (len(y) + 1) / 2

    def statistic(ranks_of_x: np.ndarray, axis: int = -1) -> Any:
        return np.abs((ranks_of_x * ranks).sum(axis=axis))

    test = stats.permutation_test(
        (stats.rankdata(x) - (len(x) + 1) / 2,),
        statistic,
        permutation_type="pairings",
        alternative="greater",
        n_resamples=math.inf,
        vectorized=True,
    )
    return float(test.pvalue)
