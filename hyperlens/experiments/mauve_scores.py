"""MAUVE of two sets of vectors, computed by the package `mauve-text` (Pillutla et al. 2021).

Vectors are put into clusters, and the two histograms over the clusters are compared by their
divergences from every mixture of both: 1 for equal histograms, towards 0 for disjoint ones.
`mauve-text` is licensed under the GPL, version 3: it is an optional extra and never imported
unless MAUVE is asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import CorpusError, ProbeError
from ..statistics import significance

# Five are enough to see whether the clustering matters; ours.
SEEDS = (0, 1, 2, 3, 4)
# Its authors use about 5,000 texts a side, and say that few read too high.
ENOUGH = 1000


class Scores(NamedTuple):
    """MAUVE under several seeds of its k-means clustering.

    Attributes:
        values: MAUVE, one per seed, in (0, 1].
        smoothed: the same with smoothed histograms (Pillutla et al. 2023, arXiv 2212.14578).
        curves: the divergence curve of each seed: exp(-5 KL(q ‖ r)) and exp(-5 KL(p ‖ r)) for
            mixtures r of the two histograms p and q.
        n_clusters: how many clusters; a tenth of the texts of the smaller side.
    """

    values: tuple[float, ...]
    smoothed: tuple[float, ...]
    curves: tuple[list[list[float]], ...]
    n_clusters: int

    @property
    def mean(self) -> float:
        """Over seeds."""
        return significance.estimate(self.values).value


def mauve_scores(
    p: Float[Tensor, "n d"], q: Float[Tensor, "m d"], seeds: Sequence[int] = SEEDS
) -> Scores:
    """MAUVE of two sets of vectors, once per seed; all its own settings are left as they are.

    Raises:
        ProbeError: if `mauve-text` is not installed, or the seeds are none.
        CorpusError: below two vectors a side, or if they are all the same.
    """
    compute = compute_mauve()
    check_seeds(seeds)
    if min(len(p), len(q)) < 2:
        raise CorpusError(
            f"MAUVE needs two texts a side at least, and a thousand to mean much; got {len(p)} "
            f"and {len(q)}"
        )
    every = torch.nn.functional.normalize(torch.cat([p, q]).double(), dim=-1)
    if float((every - every[0]).abs().max()) < 1e-6:
        raise CorpusError(
            f"all {len(every)} texts have the same features, so MAUVE has nothing to compare: give "
            "texts that differ"
        )
    found = []
    for seed in seeds:
        with _without_remarks():
            found.append(compute(p_features=p.numpy(), q_features=q.numpy(), seed=seed))
    return Scores(
        values=tuple(float(one.mauve) for one in found),
        smoothed=tuple(float(one.mauve_star) for one in found),
        curves=tuple(one.divergence_curve.tolist() for one in found),
        n_clusters=int(found[0].num_buckets),
    )


def compute_mauve() -> Callable[..., Any]:
    """The function of `mauve-text`.

    Raises:
        ProbeError: if it is not installed.
    """
    try:
        package = import_module("mauve")
    except ImportError as error:
        raise _missing(str(error)) from None
    found: Callable[..., Any] | None = getattr(package, "compute_mauve", None)
    if found is None:  # another package of this name
        raise _missing("the installed package 'mauve' has no compute_mauve")
    return found


def _missing(reason: str) -> ProbeError:
    return ProbeError(
        f"MAUVE needs the package mauve-text, licensed under the GPL ({reason}): "
        "pip install 'hyperlens[mauve]'"
    )


def check_seeds(seeds: Sequence[Any]) -> None:
    """Refuse what are no seeds.

    Raises:
        ProbeError: if there are none, or one is no whole number from 0 on, or is there twice.
    """
    given = list(seeds)
    whole = all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in given)
    if not given or not whole or len(set(given)) < len(given):
        raise ProbeError(
            f"seeds must be different whole numbers from 0 on, one at least; got {seeds}"
        )


def few_texts(*sizes: int) -> tuple[str, ...]:
    """A warning for the reader of a result where sets of texts are this small."""
    fewest, most = min(sizes), max(sizes)
    if fewest >= ENOUGH:
        return ()
    many = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    return (
        f"MAUVE over {many} texts a side: below {ENOUGH:,} it reads too high and depends much on "
        "which texts they are; compare it only with MAUVE of as many texts, read by the same model",
    )


@contextmanager
def _without_remarks() -> Iterator[None]:
    """faiss complains, on the process's standard error, of few texts per cluster.

    It does so for every MAUVE, whose number of clusters is not ours to choose.
    """
    kept = None
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    with suppress(OSError):  # no standard error to be silenced
        kept = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
    try:
        yield
    finally:
        if kept is not None:
            os.dup2(kept, 2)
            os.close(kept)
