"""Some of the texts of a corpus: so many at random, or one half of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from ..data.corpus import Corpus
from ..errors import CorpusError
from ..pair import Inputs


def only(corpus: Corpus, chosen: Bool[Tensor, " text"]) -> Corpus:
    """These texts alone, in the corpus's order; the hash stays that of all."""
    kept = [one for one, is_in in zip(corpus.sequences, chosen.tolist(), strict=True) if is_in]
    counts = replace(
        corpus.counts,
        n_sequences=len(kept),
        n_tokens=sum(map(len, kept)),
        n_bos=sum(int((one == corpus.bos_id).sum()) for one in kept if corpus.bos_id is not None),
    )
    return replace(corpus, sequences=tuple(kept), counts=counts)


def drawn(opened: Inputs, n_texts: int, seed: int) -> Inputs:
    """At most so many of the texts, drawn at random; a note says so."""
    n = len(opened.corpus.sequences)
    if n <= n_texts:
        return opened
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[torch.from_numpy(np.random.default_rng(seed).permutation(n)[:n_texts])] = True
    note = f"{n_texts} of {n} texts were drawn at random (n_texts)"
    return Inputs(opened.pair, only(opened.corpus, chosen), (*opened.notes, note))


def second_half(corpus: Corpus, seed: int) -> Bool[Tensor, " text"]:
    """A random half of the texts, one fewer where they are odd.

    Raises:
        CorpusError: if there are fewer than four texts: intervals need two on each half.
    """
    n = len(corpus.sequences)
    if n < 4:
        raise CorpusError(
            "expected at least 4 texts, two to fit directions on and two to read decisions on, "
            f"got {n}: give more texts"
        )
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 2]
    half = torch.zeros(n, dtype=torch.bool)
    half[chosen] = True
    return half
