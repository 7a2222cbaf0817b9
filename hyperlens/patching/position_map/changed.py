"""One decision per text that tuning changed, and the text up to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from ...data.corpus import Corpus
from ...errors import PatchError
from ...hooks.surface import (
    HookedModel,
    evaluating,
    final_norm,
    input_device,
    run_last_residual,
    unembed,
)
from ...pair import Pair
from ...passes.streams import logit_rows
from ...statistics.distances import winner
from ..logits import check_finite


class Drawn(NamedTuple):
    """Texts that end where their decision is taken.

    Attributes:
        texts: token ids, the last of which the decision follows; in the order they were drawn.
        n_looked_at: how many texts it took to find them.
        n_short: of these, with too few tokens.
        n_same: of these, long enough but without a changed decision that far in.
    """

    texts: list[np.ndarray]
    n_looked_at: int
    n_short: int
    n_same: int

    def notes(self, offsets: int) -> list[str]:
        """What a reader should know of the texts that were left out."""
        of = f"of {self.n_looked_at} texts"
        said = []
        if self.n_short:
            said.append(f"{self.n_short} {of} have fewer than {offsets} tokens and were left out")
        if self.n_same:
            said.append(
                f"{self.n_same} {of} have no changed decision with {offsets} tokens before it and "
                "were left out"
            )
        return said


def draw_changed(
    pair: Pair,
    corpus: Corpus,
    *,
    n_texts: int,
    offsets: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> Drawn:
    """Go through the texts in a random order until enough have a changed decision.

    Where a text has several, each is as likely; BOS takes none. What is drawn depends on the seed
    and the texts, not on the batches.

    Args:
        pair: the two models.
        corpus: the texts.
        n_texts: how many to find at most.
        offsets: how many tokens must stand before the decision.
        batch_size: texts per forward pass.
        seed: of the order of texts and of the choice among decisions.
        progress: show a progress bar.

    Raises:
        PatchError: if fewer than two texts are found.
        ActivationError: if a model overflows.
    """
    order = np.random.default_rng(seed).permutation(len(corpus.sequences))
    long = [int(i) for i in order if len(corpus.sequences[i]) >= offsets]
    found: list[int] = []
    texts: list[np.ndarray] = []
    with tqdm(total=n_texts, desc="drawing", unit="text", disable=not progress) as bar:
        for start in range(0, len(long), batch_size):
            batch = long[start : start + batch_size]
            for i, places in zip(batch, _changed(pair, corpus, batch), strict=True):
                far = places[places >= offsets - 1]
                if len(far) and len(texts) < n_texts:
                    chosen = int(np.random.default_rng((seed, i)).choice(far))
                    texts.append(corpus.sequences[i][: chosen + 1])
                    found.append(i)
                    bar.update()
            if len(texts) == n_texts:
                break
    if len(texts) < 2:
        raise PatchError(
            f"tuning changed a decision with {offsets} tokens before it in {len(texts)} of "
            f"{len(order)} texts, and intervals need two: give more or longer texts, or fewer "
            "offsets"
        )
    # Those after the last one that was needed were not looked at, whatever the batches.
    end = len(order) if len(texts) < n_texts else int(np.flatnonzero(order == found[-1])[0]) + 1
    n_short = sum(len(corpus.sequences[i]) < offsets for i in order[:end])
    return Drawn(texts, end, n_short, end - n_short - len(texts))


def _changed(pair: Pair, corpus: Corpus, batch: Sequence[int]) -> list[np.ndarray]:
    """Per text, the positions after which the two models choose different tokens."""
    sequences = [corpus.sequences[i] for i in batch]
    width = max(map(len, sequences))
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)], mask[row, : len(ids)] = torch.from_numpy(ids), 1
    real = mask.bool()
    picks = [
        _picks(name, side.hooked, tokens, mask)
        for name, side in (("base", pair.base), ("tuned", pair.tuned))
    ]
    differs = torch.zeros_like(real)
    differs[real] = picks[0] != picks[1]
    if corpus.bos_id is not None:
        differs &= tokens != corpus.bos_id
    return [row.nonzero()[:, 0].numpy() for row in differs]


def _picks(
    name: str, model: HookedModel, tokens: Int[Tensor, "text pos"], mask: Int[Tensor, "text pos"]
) -> Int[Tensor, " n"]:
    """The model's choice after every real token, one after another, on the CPU."""
    device = input_device(model)
    with evaluating(model):
        last = run_last_residual(model, tokens.to(device), mask.to(device))[mask.bool().to(device)]
        check_finite(f"the {name} model", last)
        pieces = (last[rows] for rows in logit_rows(len(last), model.cfg.d_vocab, last.device))
        return torch.cat(
            [winner(unembed(model, final_norm(model, piece)).float()).cpu() for piece in pieces]
        )
