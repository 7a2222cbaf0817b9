"""patch_positions: at which layer, and from which token, does a changed decision come?

A heat map of layers x positions for two models: at one decision that tuning changed, the residual
of one model at one token and layer is put into the other. Where it moves the decision is where
what tuning did sits on its way from the earlier tokens to the last one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from ...checks import check_counts
from ...models.tokenizers import token_names
from ...pair import open_inputs
from ...passes.failures import explaining_out_of_memory
from ...statistics.significance import Estimate, holm, wilson
from ..directions import DIRECTIONS, INTO_BASE
from ..outcomes import p_value, ratio
from .changed import Drawn, draw_changed
from .finding import EVERY, PositionsResult
from .sweep import Cells, map_positions

# Tokens of the example that are shown before those that were patched.
WORDS_BEFORE = 30


def patch_positions(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    offsets: int = 12,
    n_texts: int = 32,
    max_length: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> PositionsResult:
    """Patch one token's residual at every layer and position before a decision tuning changed.

    In each text one such decision is drawn, and the text is cut there. "Tuned into base" asks
    where the tuned model's residual brings its decision about (denoising), "base into tuned"
    where the base's undoes it (noising). Beside the single positions stands a patch of all
    positions up to the decision. What a cell did is the share of decisions that become the
    donor's, and how far the logit of the tuned model's choice less that of the base's moves from
    the host's towards the donor's: 0 for not at all, 1 for all the way.

    Only what comes after a patch is run again, for several positions and texts at a time.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models.
        texts: what `compare_models` takes.
        offsets: how many positions are patched, the last token (offset 0) and those before it.
        n_texts: how many texts, drawn at random, give a decision.
        max_length: tokens per text.
        batch_size: patched texts per forward pass; does not change the result.
        seed: of the choice of texts and decisions.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        PatchError: if tuning changed too few decisions, blocks hand on more than the residual
            stream, or the models keep something other than keys and values.
        ActivationError: if a model, or what a patch makes of it, overflows.
        HyperlensError: if a source cannot be opened, or the texts do not fit the models.
    """
    check_counts(offsets=offsets, n_texts=n_texts, batch_size=batch_size)
    opened = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    pair = opened.pair
    drawn = draw_changed(
        pair,
        opened.corpus,
        n_texts=n_texts,
        offsets=offsets,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    with explaining_out_of_memory(batch_size, ", or max_length"):
        cells = map_positions(pair, drawn.texts, offsets, batch_size, progress)
    meta = pair.describe() | {
        "seed": seed,
        "options": {
            "offsets": offsets,
            "n_texts": len(drawn.texts),
            "max_length": max_length,
        },
        "data": opened.corpus.describe(),
        "notes": [*opened.notes, *drawn.notes(offsets)],
    }
    tokenizer = pair.tokenizer
    extras = {
        "decisions": len(drawn.texts),
        "looked_at": drawn.n_looked_at,
        "too_short": drawn.n_short,
        "unchanged": drawn.n_same,
        "example": _example(cells, drawn, tokenizer),
    }
    return PositionsResult(tuple(_rows(cells)), extras, meta)


def _rows(cells: Cells) -> Iterator[dict[str, Any]]:
    """Both metrics of every cell; p that nothing moves, corrected over a direction's cells."""
    changed = cells.changed
    for direction in DIRECTIONS:
        moved = cells.moved(direction)
        donor = cells.tuned_pick if direction == INTO_BASE else cells.base_pick
        hit = (cells.picks[direction] == donor[:, None, None]) & changed[:, None, None]
        places = [
            (layer, column)
            for layer in range(moved.shape[1])
            for column in range(len(cells.offsets))
        ]
        gaps = [ratio(moved[:, *at] * changed, cells.whole) for at in places]
        for at, gap, p in zip(places, gaps, holm([p_value(gap) for gap in gaps]), strict=True):
            share = _share(int(hit[:, *at].sum()), int(changed.sum()))
            for metric, one, its_p in (("recovered", share, math.nan), ("moved", gap, p)):
                yield (
                    {
                        "direction": direction,
                        "layer": at[0],
                        "offset": cells.offsets[at[1]],
                        "metric": metric,
                    }
                    | one._asdict()
                    | {"p": its_p}
                )


def _share(hits: int, n: int) -> Estimate:
    """Of decisions in different texts, with Wilson's interval."""
    value = hits / n if n else math.nan
    return Estimate(value, *wilson(hits, n), math.sqrt(value * (1 - value) / max(n, 1)), n)


def _example(cells: Cells, drawn: Drawn, tokenizer: Any) -> dict[str, Any]:
    """The first text that was drawn, cell by cell."""
    offsets = [offset for offset in cells.offsets if offset != EVERY]
    ids = drawn.texts[0].tolist()
    picks = [int(cells.base_pick[0]), int(cells.tuned_pick[0])]
    whole = float(cells.whole[0]) or math.nan
    found = []
    for direction in DIRECTIONS:
        moved = cells.moved(direction)[0] / whole
        chosen = cells.picks[direction][0]
        for layer, column in itertools.product(range(len(moved)), range(len(offsets))):
            (choice,) = token_names(tokenizer, [int(chosen[layer, column])])
            found.append(
                {
                    "direction": direction,
                    "layer": layer,
                    "offset": offsets[column],
                    "moved": float(moved[layer, column]),
                    "choice": choice,
                }
            )
    base_pick, tuned_pick = token_names(tokenizer, picks)
    return {
        "before": "".join(
            token_names(tokenizer, ids[-WORDS_BEFORE - len(offsets) : -len(offsets)])
        ),
        "tokens": token_names(tokenizer, ids[-len(offsets) :]),
        "base_pick": base_pick,
        "tuned_pick": tuned_pick,
        "cells": found,
    }
