"""A layer x position map at one decision per text: drawing the decisions, and patching every cell.

A patch at one of the last few tokens leaves all tokens before them as they were, whose keys and
values are kept: of every cell only the last few tokens are run, and only through the blocks after
the patch. Several texts and positions share a pass, and one token is unembedded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..data.corpus import Corpus, pad
from ..errors import PatchError
from ..hooks.partial_forward import beyond_rounding, check_resumes, resume
from ..hooks.patched_generation import takes_past
from ..hooks.surface import (
    HookedModel,
    check_finite,
    check_stream,
    evaluating,
    final_norm,
    float_logits,
    input_device,
    residual_logits,
    run_last_residual,
    run_residuals,
)
from ..models.kinds import plain_model
from ..pair import Pair
from ..passes.streams import logit_rows
from ..statistics.distances import winner
from .outcomes import DIRECTIONS, INTO_BASE, SIDES, SOURCE, TARGET, Side

EVERY = -1
"""Stands for an offset: all positions up to the decision are patched."""


# One decision per text that tuning changed


class DrawnDecisions(NamedTuple):
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
        notes = []
        if self.n_short:
            notes.append(f"{self.n_short} {of} have fewer than {offsets} tokens and were left out")
        if self.n_same:
            notes.append(
                f"{self.n_same} {of} have no changed decision with {offsets} tokens before it and "
                "were left out"
            )
        return notes


def draw_changed(
    pair: Pair,
    corpus: Corpus,
    *,
    n_texts: int,
    offsets: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> DrawnDecisions:
    """Go through the texts in a random order until enough have a changed decision.

    Where a text has several, each is as likely; BOS has none. What is drawn depends on the seed
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
    if corpus.groups is not None:
        # One text of each group, so that decisions are independent.
        _, first = np.unique(np.array(corpus.groups)[order], return_index=True)
        order = order[np.sort(first)]
    long = [int(i) for i in order if len(corpus.sequences[i]) >= offsets]
    found: list[int] = []
    texts: list[np.ndarray] = []
    batch_size = 1 if corpus.unpadded else batch_size
    with tqdm(total=n_texts, desc="drawing", unit="text", disable=not progress) as bar:
        for start in range(0, len(long), batch_size):
            batch = long[start : start + batch_size]
            for i, places in zip(batch, _changed_places(pair, corpus, batch), strict=True):
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
    # Texts after the last one that was needed do not count as looked at, whatever the batches.
    end = len(order) if len(texts) < n_texts else int(np.flatnonzero(order == found[-1])[0]) + 1
    n_short = sum(len(corpus.sequences[i]) < offsets for i in order[:end])
    return DrawnDecisions(texts, end, n_short, end - n_short - len(texts))


def _changed_places(pair: Pair, corpus: Corpus, batch: Sequence[int]) -> list[np.ndarray]:
    """Per text, the positions after which the two models have different top-1 tokens."""
    tokens, mask = pad([corpus.sequences[i] for i in batch])
    real = mask.bool()
    base, tuned = (
        _top_1(name, side.hooked, tokens, mask)
        for name, side in (("base", pair.base), ("tuned", pair.tuned))
    )
    differs = torch.zeros_like(real)
    differs[real] = base != tuned
    differs &= pad([corpus.counted(i) for i in batch])[0].bool()
    return [row.nonzero()[:, 0].numpy() for row in differs]


def _top_1(
    name: str, model: HookedModel, tokens: Int[Tensor, "text pos"], mask: Int[Tensor, "text pos"]
) -> Int[Tensor, " n"]:
    """The model's top-1 token after every real token, one after another, on the CPU."""
    device = input_device(model)
    with evaluating(model):
        last = run_last_residual(model, tokens.to(device), mask.to(device))[mask.bool().to(device)]
        check_finite(f"the {name} model", last)
        pieces = (last[rows] for rows in logit_rows(len(last), model.cfg.d_vocab, last.device))
        return torch.cat([winner(residual_logits(model, piece)).cpu() for piece in pieces])


# Patched passes over the last tokens


@dataclass(frozen=True)
class TextEndings:
    """Texts that end with the token before a decision, as a model reads them.

    Attributes:
        model: a `ResidualModel`.
        tokens, mask: padded on the left, so that all end together.
        stream: the L + 1 residual layers.
        n_last: how many tokens at the end may be patched one by one.
        past: keys and values of the tokens before these; None if there are none.
    """

    model: HookedModel
    tokens: Int[Tensor, "text pos"]
    mask: Int[Tensor, "text pos"]
    stream: Sequence[Float[Tensor, "text pos d_model"]]
    n_last: int
    past: Any

    @property
    def unpatched(self) -> Float[Tensor, "text d_model"]:
        """The output of the final norm at the last token."""
        return self.normed(self.stream[-1][:, -1])

    def normed(self, last: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """The model's final norm."""
        with evaluating(self.model):
            return final_norm(self.model, last)


def read_endings(
    name: str,
    model: HookedModel,
    tokens: Int[Tensor, "text pos"],
    mask: Int[Tensor, "text pos"],
    n_last: int,
) -> TextEndings:
    """Read texts, and keep what cells need.

    Args:
        name: how errors call the model.
        model: a `ResidualModel`.
        tokens, mask: padded on the left; `n_last` real tokens at least in each.
        n_last: how many positions will be patched.

    Raises:
        ActivationError: if the model overflows.
        PatchError: if it keeps something other than keys and values.
    """
    with evaluating(model):
        stream = run_residuals(model, tokens, mask)
        check_stream(name, stream, mask.bool())
        past = _past(model, tokens[:, :-n_last], mask[:, :-n_last])
    return TextEndings(model, tokens, mask, stream, n_last, past)


def patched_everywhere(
    target: TextEndings, source: Float[Tensor, "text pos d_model"], layer: int
) -> Float[Tensor, "text d_model"]:
    """The output of the target's final norm at the last token, all positions of a layer patched."""
    return target.normed(resume(target.model, target.tokens, target.mask, layer, source)[:, -1])


def patched_singly(
    target: TextEndings, source: Float[Tensor, "text pos d_model"], layer: int, batch_size: int
) -> Float[Tensor, "text offset d_model"]:
    """`patched_everywhere`, but one position at a time: offset 0 is the last token.

    Args:
        target: the model that is patched.
        source: the source model's residual at the layer.
        layer: 0 for the embedding output, l for the output of block l - 1.
        batch_size: (text, offset) pairs per forward pass.
    """
    own, new = (x[:, -target.n_last :] for x in (target.stream[layer], source))
    n = len(own) * target.n_last
    place = torch.arange(target.n_last, device=own.device)
    found = []
    for start in range(0, n, batch_size):
        pairs = torch.arange(start, min(start + batch_size, n), device=own.device)
        text, offset = pairs // target.n_last, pairs % target.n_last
        here = place == target.n_last - 1 - offset[:, None]
        put = torch.where(here[..., None], new[text], own[text])
        found.append(target.normed(_last_tokens(target, text, layer, put)[:, -1]))
    return torch.cat(found).view(len(own), target.n_last, -1)


def check_continues(target: TextEndings) -> None:
    """Raise unless a model that continues from kept keys and values ends where it ended.

    Raises:
        PatchError: where it does not.
    """
    middle = (target.model.cfg.n_layers + 1) // 2
    every = torch.arange(len(target.tokens), device=target.tokens.device)
    again = _last_tokens(target, every, middle, target.stream[middle][:, -target.n_last :])
    before = target.stream[-1][:, -target.n_last :]
    difference = beyond_rounding(target.model, again, before)
    if difference is not None:
        raise PatchError(
            f"{target.model.cfg.model_name} does not read on from kept keys and values as it reads "
            f"at once (it ends {difference:.2g} away from where it ended): use patch_hooks with "
            "whole forward passes"
        )


def _past(model: Any, tokens: Int[Tensor, "text pos"], mask: Int[Tensor, "text pos"]) -> Any:
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionCacheLayerMixin as State

    if not tokens.shape[1]:
        return None
    plain = plain_model(model.model)
    past = DynamicCache(config=plain.config)
    if not takes_past(plain) or any(isinstance(layer, State) for layer in past.layers):
        raise PatchError(
            f"{type(plain).__name__} keeps something other than keys and values of what it has "
            "read: use patch_hooks with whole forward passes"
        )
    model.run_with_hooks(tokens, attention_mask=mask, return_type=None, past_key_values=past)
    return past


def _last_tokens(
    target: TextEndings,
    text: Int[Tensor, " row"],
    block: int,
    residual: Float[Tensor, "row last d_model"],
) -> Float[Tensor, "row last d_model"]:
    """The last block's output if `residual` enters a block at the last tokens of some texts."""
    return resume(
        target.model,
        target.tokens[text][:, -target.n_last :],
        target.mask[text],
        block,
        residual,
        past=_of_rows(target.past, text, block),
    )


def _of_rows(past: Any, text: Int[Tensor, " row"], block: int) -> Any:
    """A cache of their own for some rows, which the pass may write on; the kept one stays."""
    if past is None:
        return None
    rows = copy.copy(past)
    rows.layers = [copy.copy(layer) for layer in past.layers]
    for layer in rows.layers[block:]:  # those before it do not run
        layer.batch_select_indices(text)
    return rows


# Every cell of the map


@dataclass(frozen=True)
class MapCells:
    """What every cell did, text by text.

    Attributes:
        offsets: of the columns; `EVERY` is last.
        base_top_1, tuned_top_1: the unpatched models' top-1 tokens.
        unpatched: logit difference of each unpatched model: the logit of the tuned model's top-1
            token less that of the base's.
        top_1, differences: the patched models' top-1 tokens and logit differences, by direction.
    """

    offsets: Sequence[int]
    base_top_1: Int[Tensor, " text"]
    tuned_top_1: Int[Tensor, " text"]
    unpatched: Mapping[Side, Float[Tensor, " text"]]
    top_1: Mapping[str, Int[Tensor, "text layer offset"]]
    differences: Mapping[str, Float[Tensor, "text layer offset"]]

    @property
    def changed(self) -> Bool[Tensor, " text"]:
        """Where the models still differ on the text that was cut; rounding may undo a tie."""
        return self.base_top_1 != self.tuned_top_1

    def moved(self, direction: str) -> Float[Tensor, "text layer offset"]:
        """How far the logit difference moves from the target's towards the source's."""
        sign = 1.0 if direction == INTO_BASE else -1.0
        before = self.unpatched[TARGET[direction]][:, None, None]
        return sign * (self.differences[direction] - before)

    @property
    def distance(self) -> Float[Tensor, " text"]:
        """From the base's logit difference to the tuned model's; 0 where nothing changed."""
        return torch.where(self.changed, self.unpatched["tuned"] - self.unpatched["base"], 0.0)


def map_positions(
    pair: Pair, texts: Sequence[np.ndarray], n_offsets: int, batch_size: int, progress: bool
) -> MapCells:
    """Patch every layer and position of every text.

    Args:
        pair: the two models.
        texts: token ids that end with the token before the decision.
        n_offsets: how many positions, counted back from the last token.
        batch_size: patched texts per forward pass.
        progress: show a progress bar.

    Raises:
        ActivationError: if a model, or a patched one, overflows.
        PatchError: if a model's blocks pass on more than the residual stream, or it keeps something
            other than keys and values.
    """
    models: dict[Side, HookedModel] = {"base": pair.base.hooked, "tuned": pair.tuned.hooked}
    device = input_device(pair.base.hooked)
    n, n_layers = len(texts), pair.base.hooked.cfg.n_layers
    offsets = (*range(n_offsets), EVERY)
    shape = (n, n_layers + 1, len(offsets))
    cells = MapCells(
        offsets,
        torch.zeros(n, dtype=torch.long),
        torch.zeros(n, dtype=torch.long),
        {side: torch.zeros(n, dtype=torch.float64) for side in SIDES},
        {direction: torch.zeros(shape, dtype=torch.long) for direction in DIRECTIONS},
        {direction: torch.zeros(shape, dtype=torch.float64) for direction in DIRECTIONS},
    )
    order = sorted(range(n), key=lambda i: (-len(texts[i]), i))
    n_texts = 1 if pair.unpadded else batch_size
    with tqdm(total=n, desc="patching", unit="text", disable=not progress) as bar:
        for start in range(0, n, n_texts):
            batch = order[start : start + n_texts]
            # On the left, so that all texts end together.
            tokens, mask = (x.to(device) for x in pad([texts[i] for i in batch], side="left"))
            endings = {
                side: read_endings(side, model, tokens, mask, n_offsets)
                for side, model in models.items()
            }
            if start == 0:
                for ending in endings.values():
                    check_resumes(ending.model, tokens, mask, ending.stream)
                    check_continues(ending)
            _fill(cells, torch.tensor(batch), endings, batch_size)
            bar.update(len(batch))
    return cells


def _fill(
    cells: MapCells,
    text: Int[Tensor, " text"],
    endings: Mapping[Side, TextEndings],
    batch_size: int,
) -> None:
    """Both unpatched models, then all cells, of some texts."""
    logits = {side: _logits(ending, ending.unpatched) for side, ending in endings.items()}
    top_1 = {side: winner(logits[side]).cpu() for side in SIDES}
    cells.base_top_1[text], cells.tuned_top_1[text] = top_1["base"], top_1["tuned"]
    for side in SIDES:
        cells.unpatched[side][text] = _logit_difference(logits[side], top_1)
    for direction in DIRECTIONS:
        side = TARGET[direction]
        target, source = endings[side], endings[SOURCE[direction]]
        for layer, (own, new) in enumerate(zip(target.stream, source.stream, strict=True)):
            if torch.equal(own, new):  # below the first block that tuning changed
                cells.top_1[direction][text, layer] = top_1[side][:, None]
                cells.differences[direction][text, layer] = cells.unpatched[side][text][:, None]
                continue
            columns = [
                *patched_singly(target, new, layer, batch_size).unbind(1),
                patched_everywhere(target, new, layer),
            ]
            for column, normed in enumerate(columns):
                check_finite(f"the patched model ({direction}, layer {layer})", normed)
                made = _logits(target, normed)
                cells.top_1[direction][text, layer, column] = winner(made).cpu()
                cells.differences[direction][text, layer, column] = _logit_difference(made, top_1)


def _logits(
    ending: TextEndings, normed: Float[Tensor, "text d_model"]
) -> Float[Tensor, "text d_vocab"]:
    with evaluating(ending.model):
        return float_logits(ending.model, normed)


def _logit_difference(
    logits: Float[Tensor, "text d_vocab"], top_1: Mapping[Side, Int[Tensor, " text"]]
) -> Float[Tensor, " text"]:
    """The logit of the tuned model's top-1 token less that of the base's, float64, on the CPU."""
    base, tuned = (logits.cpu().gather(-1, top_1[side][:, None])[:, 0] for side in SIDES)
    return tuned.double() - base.double()
