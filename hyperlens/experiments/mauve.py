"""How near is one set of texts to another? MAUVE with the features of any causal model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..data.texts import Texts, read_texts
from ..errors import CorpusError
from ..results.fingerprint import texts_sha256, versions
from .mauve_finding import MauveResult
from .mauve_scores import SEEDS, check_seeds, compute_mauve, few_texts, mauve_scores
from .text_features import Features, open_featurizer, reading_notes


def measure_mauve(
    p_texts: Any,
    q_texts: Any,
    features: Any,
    *,
    seeds: Sequence[int] = SEEDS,
    max_length: int = 1024,
    batch_size: int = 16,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> MauveResult:
    """MAUVE of two sets of texts (Pillutla et al. 2021, arXiv 2102.01454).

    Needs `pip install 'hyperlens[mauve]'`. Nothing is downloaded unless a hub name is given. The
    result has one value per seed of the k-means clustering inside MAUVE and no interval: resampled
    texts hold repetitions, which move MAUVE by themselves.

    Args:
        p_texts, q_texts: what `compare_models` takes, but no token ids; human texts and a model's,
            say. Both should have about the same length: MAUVE sees length, too.
        features: the model that reads the texts: hub id, folder, model, pair (model, tokenizer),
            or an open `Featurizer`, whose own options then count. The paper of MAUVE takes GPT-2
            large; values of different models cannot be compared.
        seeds: of the clustering.
        max_length: tokens per text; a longer one is read up to there.
        batch_size: texts per forward pass.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        ProbeError: if `mauve-text` is not installed, or the seeds are none.
        HyperlensError: if a source cannot be opened, or the texts leave nothing to compare.
    """
    compute_mauve()
    check_seeds(seeds)
    sides = {"p": read_texts(p_texts), "q": read_texts(q_texts)}
    featurizer = open_featurizer(
        features, max_length=max_length, batch_size=batch_size, device=device, dtype=dtype
    )
    read = {side: featurizer.features(texts, progress) for side, texts in sides.items()}
    for one in read.values():
        if not len(one.vectors):
            raise CorpusError(
                f"none of the {one.n_empty} texts has a token: there is nothing to read"
            )
    found = mauve_scores(read["p"].vectors, read["q"].vectors, seeds)
    names = {side: str(texts.source.get("name", side.upper())) for side, texts in sides.items()}
    meta = {
        "title": f"{names['p']} and {names['q']}",
        **{side: _describe(texts, read[side]) for side, texts in sides.items()},
        "features": featurizer.describe(),
        "options": {"seeds": list(seeds), "n_clusters": found.n_clusters},
        "versions": versions(),
        "notes": [
            *few_texts(*(len(one.vectors) for one in read.values())),
            *(note for side in sides for note in reading_notes(names[side], read[side])),
        ],
    }
    rows = zip(seeds, found.values, found.smoothed, strict=True)
    return MauveResult(
        table=tuple({"seed": s, "value": v, "smoothed": smooth} for s, v, smooth in rows),
        extras={"curves": list(found.curves)},
        meta=meta,
    )


def _describe(texts: Texts, read: Features) -> dict[str, Any]:
    return dict(texts.source) | {
        "n": len(read.vectors),
        "n_empty": read.n_empty,
        "n_cut": read.n_cut,
        "texts_sha256": texts_sha256(texts),
    }
