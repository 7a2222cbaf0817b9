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

from ...decoding.prompts import as_text
from ...errors import CorpusError, ProbeError
from ...models.sources import check_source
from ...render.format import count
from ...statistics import significance
from .features import Features, Featurizer, feature_notes

# Five are enough to see whether the clustering matters; ours.
SEEDS = (0, 1, 2, 3, 4)
# Its authors use about 5,000 texts in each set, and say that few texts make MAUVE too high.
ENOUGH_TEXTS = 1000

Tokens = Sequence[Sequence[int]]


class Scores(NamedTuple):
    """MAUVE under several seeds of its k-means clustering.

    Attributes:
        values: MAUVE, one per seed, in (0, 1].
        smoothed: the same with smoothed histograms (Pillutla et al. 2023, arXiv 2212.14578).
        curves: the divergence curve of each seed: exp(-5 KL(q ‖ r)) and exp(-5 KL(p ‖ r)) for
            mixtures r of the two histograms p and q.
        n_clusters: how many clusters; a tenth of the texts of the smaller set.
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
        ProbeError: if `mauve-text` is not installed, or the seeds make no sense.
        CorpusError: below two vectors in a set, or if all of them are the same.
    """
    compute = compute_mauve()
    check_seeds(seeds)
    if min(len(p), len(q)) < 2:
        raise CorpusError(
            f"MAUVE needs at least two texts in each set, and a thousand to mean much; got "
            f"{len(p)} and {len(q)}"
        )
    normalized = torch.nn.functional.normalize(torch.cat([p, q]).double(), dim=-1)
    if float((normalized - normalized[0]).abs().max()) < 1e-6:
        raise CorpusError(
            f"all {len(normalized)} texts have the same features, so MAUVE has nothing to compare: "
            "give texts that differ"
        )
    answers = []
    for seed in seeds:
        with _without_remarks():
            answers.append(compute(p_features=p.numpy(), q_features=q.numpy(), seed=seed))
    return Scores(
        values=tuple(float(answer.mauve) for answer in answers),
        smoothed=tuple(float(answer.mauve_star) for answer in answers),
        curves=tuple(answer.divergence_curve.tolist() for answer in answers),
        n_clusters=int(answers[0].num_buckets),
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
    function: Callable[..., Any] | None = getattr(package, "compute_mauve", None)
    if function is None:  # another package of this name
        raise _missing("the installed package 'mauve' has no compute_mauve")
    return function


def _missing(reason: str) -> ProbeError:
    return ProbeError(
        f"MAUVE needs the package mauve-text, licensed under the GPL ({reason}): "
        "pip install 'hyperlens[mauve]'"
    )


def check_seeds(seeds: Sequence[Any]) -> None:
    """Raise unless `seeds` are different integers of at least 0.

    Raises:
        ProbeError: if there are none, or one is no such number, or is there twice.
    """
    values = list(seeds)
    are_seeds = all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in values)
    if not values or not are_seeds or len(set(values)) < len(values):
        raise ProbeError(
            f"seeds must be at least one whole number from 0 on, each given once; got {seeds}"
        )


def few_texts_notes(*sizes: int) -> list[str]:
    """A note for the reader of a result where sets of texts are small.

    >>> few_texts_notes(1000, 2000)
    []
    """
    fewest, most = min(sizes), max(sizes)
    if fewest >= ENOUGH_TEXTS:
        return []
    size = count(most, "text") if fewest == most else f"{fewest:,} to {count(most, 'text')}"
    return [
        f"MAUVE over {size} in each set: below {ENOUGH_TEXTS:,} it is too high and depends much on "
        "which texts they are; compare it only with MAUVE of equally many texts, read by the same "
        "model"
    ]


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence what faiss prints on the process's standard error about few texts per cluster.

    It does so for every MAUVE, whose number of clusters is not ours to choose.
    """
    stderr = None
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    with suppress(OSError):  # no standard error to be silenced
        stderr = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
    try:
        yield
    finally:
        if stderr is not None:
            os.dup2(stderr, 2)
            os.close(stderr)


def check_mauve(features: Any) -> None:
    """Raise what can be told before anything is opened.

    Args:
        features: whatever reads the texts.

    Raises:
        ProbeError: if `mauve-text` is not installed.
        LoadingError: if the reader is no model.
    """
    compute_mauve()
    if not isinstance(features, Featurizer):
        check_source(features)


def check_has_tokenizer(tokenizer: Any) -> None:
    """Raise unless the pair's tokens can be read as text.

    Raises:
        CorpusError: saying what to pass.
    """
    if tokenizer is None:
        raise CorpusError(
            "MAUVE compares texts, and the pair has no tokenizer to turn tokens into text: pass "
            "(model, tokenizer), or leave MAUVE out"
        )


class ReferenceTexts:
    """How texts go on after their prompts by themselves, to compare generations with.

    Args:
        reader: the model that reads the texts.
        tokenizer: of the pair that generates.
        continuations: for each text its own token ids after the prompt.

    Attributes:
        notes: which texts could not be read, for the reader of the result.
    """

    def __init__(self, reader: Featurizer, tokenizer: Any, continuations: Tokens) -> None:
        check_has_tokenizer(tokenizer)
        self._reader, self._tokenizer = reader, tokenizer
        self.notes: list[str] = []
        self._own = self._features("the texts themselves", [continuations])[0]

    def scores(self, who: str, samples: Sequence[Tokens]) -> list[Scores]:
        """MAUVE of each sample; none at all where a set has fewer than two texts to read.

        Args:
            who: generated them, as a note names it.
            samples: for each run over the prompts the tokens that were added, without the prompts.
        """
        features = self._features(who, samples)
        if min(len(one.vectors) for one in (self._own, *features)) < 2:
            self.notes.append(f"MAUVE of {who} is unknown: it needs two texts to read in each set")
            return []
        return [mauve_scores(self._own.vectors, one.vectors) for one in features]

    def _features(self, who: str, samples: Sequence[Tokens]) -> list[Features]:
        features = [
            self._reader.features([as_text(self._tokenizer, ids) for ids in tokens])
            for tokens in samples
        ]
        self.notes += feature_notes(f"MAUVE of {who}", *features)
        return features
