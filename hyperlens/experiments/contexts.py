"""Two models' logits at every context of some texts, without keeping the logits.

A context is a token of a text with all before it; what follows it is what models predict. Kept
are only the residuals after the last block, from which logits are made a few rows at a time, as
often as an experiment needs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..data.corpus import Corpus
from ..errors import ActivationError
from ..hooks.surface import (
    HookedModel,
    evaluating,
    final_norm,
    run_last_residual,
    run_logits,
    unembed,
)
from ..models.kinds import plain_model
from ..pair import Inputs, Pair
from ..statistics import distances

# The tokenizers are held against each other on this many texts.
COMPARED_TEXTS = 64
# Logits of so many bytes exist at a time, per model.
CHUNK_BYTES = 8 * 2**20

LogitRows = tuple[slice, Float[Tensor, "n d_vocab"], Float[Tensor, "n d_vocab"]]


@dataclass(frozen=True)
class Contexts:
    """Every context of a corpus, as both models see it.

    Attributes:
        pair: the two models.
        corpus: the texts.
        base, tuned: residuals after the last block, before the final norm.
        text: which sequence of the corpus each context belongs to.
        notes: what a reader of the result should know.
    """

    pair: Pair
    corpus: Corpus
    base: Float[Tensor, "n d_model"]
    tuned: Float[Tensor, "n d_model"]
    text: Int[Tensor, " n"]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.text)

    @property
    def weights(self) -> Float[Tensor, " n"]:
        """Weights that sum to 1 and give every text the same say, whatever its length."""
        lengths = torch.bincount(self.text, minlength=len(self.corpus.sequences))
        counted = (lengths > 0).sum()
        return 1.0 / (lengths[self.text].to(torch.float64) * counted)

    def per_text(self, values: Float[Tensor, " n"]) -> list[float]:
        """The mean over the contexts of each text; texts without any are left out."""
        n = len(self.corpus.sequences)
        lengths = torch.bincount(self.text, minlength=n)
        sums = torch.zeros(n, dtype=torch.float64).index_add_(
            0, self.text, values.to("cpu", torch.float64)
        )
        means: list[float] = (sums[lengths > 0] / lengths[lengths > 0]).tolist()
        return means

    def rows(self, what: str = "", progress: bool = False) -> Iterator[LogitRows]:
        """Which contexts, and their base and tuned logits in float32, piece by piece."""
        for rows in self._pieces(what, progress):
            yield (
                rows,
                _logits(self.pair.base.hooked, self.base[rows]),
                _logits(self.pair.tuned.hooked, self.tuned[rows]),
            )

    def base_rows(self) -> Iterator[tuple[slice, Float[Tensor, "n d_vocab"]]]:
        """The same of the base model alone."""
        for rows in self._pieces("", False):
            yield rows, _logits(self.pair.base.hooked, self.base[rows])

    def _pieces(self, what: str, progress: bool) -> Iterator[slice]:
        size = max(1, CHUNK_BYTES // (4 * self.pair.base.hooked.cfg.d_vocab))
        starts = range(0, len(self), size)
        for start in tqdm(starts, desc=what, disable=not progress, leave=False):
            yield slice(start, min(start + size, len(self)))


def read_contexts(opened: Inputs, batch_size: int, progress: bool) -> Contexts:
    """Read the texts with both models, so many per forward pass.

    Raises:
        ActivationError: if a model overflows.
    """
    residuals = _residuals(opened.pair, opened.corpus, batch_size, progress)
    return Contexts(opened.pair, opened.corpus, *residuals, opened.notes)


def special_ids(pair: Pair) -> set[int]:
    """Ids that are no words: the tokenizer's special tokens, and those of the configuration."""
    found: set[int] = set()
    config = plain_model(pair.base.model).config
    for holder in (config, getattr(pair.base.model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(holder, name, None)
            found |= set(value if isinstance(value, list | tuple) else [value]) - {None}
    tokenizer = pair.tokenizer
    if tokenizer is not None:
        found |= set(tokenizer.all_special_ids)
        # Rows that pad the vocabulary to a round number stand for no token.
        found |= set(range(pair.base.hooked.cfg.d_vocab)) - set(tokenizer.get_vocab().values())
    return found


def _residuals(
    pair: Pair, corpus: Corpus, batch_size: int, progress: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sides = {"base": pair.base.hooked, "tuned": pair.tuned.hooked}
    parts: dict[str, list[Tensor]] = {"base": [], "tuned": [], "text": []}
    batches = list(corpus.batches(batch_size))
    first = 0
    for batch in tqdm(batches, desc="reading", disable=not progress, leave=False):
        counted = batch.real & ~batch.bos
        for side, model in sides.items():
            parts[side].append(_last_residual(side, model, batch.tokens, batch.real)[counted])
        text = torch.arange(first, first + len(counted))[:, None].expand(counted.shape)
        parts["text"].append(text[counted])
        first += len(counted)
    return torch.cat(parts["base"]), torch.cat(parts["tuned"]), torch.cat(parts["text"])


def _last_residual(side: str, model: HookedModel, tokens: Tensor, real: Tensor) -> Tensor:
    device = model.cfg.device
    with evaluating(model):  # type: ignore[arg-type]
        last = run_last_residual(model, tokens.to(device), real.long().to(device))
    if not bool(torch.isfinite(last[real.to(device)]).all()):
        raise ActivationError(
            f"the {side} model has NaN or infinite activations: load it in a wider dtype, as in "
            "dtype='float32'"
        )
    return last


def _logits(model: HookedModel, residual: Float[Tensor, "n d_model"]) -> Tensor:
    with evaluating(model):  # type: ignore[arg-type]
        logits = unembed(model, final_norm(model, residual)).float()
    # Statistics are float64, which Apple's accelerator does not have.
    return logits.cpu() if logits.device.type == "mps" else logits


def names(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Tokens as text; a piece of a character as the tokenizer calls it, ids without a tokenizer."""
    if tokenizer is None:
        return [str(i) for i in ids]
    return [piece if "\ufffd" in text else text for text, piece in _decoded(tokenizer, ids)]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The same, but a piece of a character reads "\ufffd": its name may look like a word."""
    if tokenizer is None:
        return [str(i) for i in ids]
    return [text for text, _ in _decoded(tokenizer, ids)]


def _decoded(tokenizer: Any, ids: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Each token's text, and what the tokenizer calls it."""
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(ids))]
    for i, piece in zip(ids, pieces, strict=True):
        text = str(tokenizer.decode([i]))
        # Decoded alone, a SentencePiece token loses the space that begins its word.
        lost = piece.startswith("▁") and not text.startswith(" ")
        yield (f" {text}" if lost else text), piece


def ranks_in_base(
    pair: Pair, prompt: Sequence[int], tokens: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The base model's rank of every token after a prompt, and its own top-1 token in each place.

    Tied logits share the best rank.
    """
    base = pair.base.hooked
    ids = torch.tensor([[*prompt, *tokens]], device=base.cfg.device)
    with evaluating(base):  # type: ignore[arg-type]
        logits = run_logits(base, ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1].float()
    ranks: list[int] = distances.rank_of(logits, ids[0, len(prompt) :]).tolist()
    top1: list[int] = distances.winner(logits).tolist()
    return ranks, top1
