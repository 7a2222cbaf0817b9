"""Two models' logits at every context of some texts, without keeping the logits.

A context is a token of a text with all tokens before it; what follows it is what models predict.
Only the residuals after the last block are kept. Logits are computed from them a few rows at a
time, as often as an experiment needs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..data.corpus import Corpus
from ..errors import ActivationError
from ..hooks.surface import (
    HookedModel,
    evaluating,
    residual_logits,
    run_logits,
)
from ..statistics import distances
from .shared_prefix import run_last_of_both, shared_on
from .streams import SharedPrefix, logits_in_pieces, slices

# Logits of so many bytes exist at a time, per model: less than in a pass over residual streams,
# because experiments hold several copies of them, such as softmaxes at several temperatures.
CHUNK_BYTES = 8 * 2**20

LogitRows = tuple[slice, Float[Tensor, "n d_vocab"], Float[Tensor, "n d_vocab"]]


@dataclass(frozen=True)
class Contexts:
    """Every counted context of a corpus, as both models see it.

    Attributes:
        base_model, tuned_model: the two hooked models.
        corpus: the texts.
        base, tuned: residuals after the last block, before the final norm.
        text: which sequence of the corpus each context belongs to.
    """

    base_model: HookedModel
    tuned_model: HookedModel
    corpus: Corpus
    base: Float[Tensor, "n d_model"]
    tuned: Float[Tensor, "n d_model"]
    text: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.text)

    @property
    def d_vocab(self) -> int:
        """Number of logits."""
        return int(self.base_model.cfg.d_vocab)

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
        yield from logits_in_pieces(
            self._pieces(what, progress),
            (partial(residual_logits, self.base_model), self.base),
            (partial(residual_logits, self.tuned_model), self.tuned),
        )

    def base_rows(self) -> Iterator[tuple[slice, Float[Tensor, "n d_vocab"]]]:
        """The same of the base model alone."""
        base = partial(residual_logits, self.base_model), self.base
        yield from logits_in_pieces(self._pieces("", False), base)

    def _pieces(self, what: str, progress: bool) -> Iterator[slice]:
        pieces = list(slices(len(self), max(1, CHUNK_BYTES // (4 * self.d_vocab))))
        yield from tqdm(pieces, desc=what, disable=not progress, leave=False)


def read_contexts(
    base: HookedModel, tuned: HookedModel, corpus: Corpus, batch_size: int, progress: bool
) -> Contexts:
    """Read the texts with both models, `batch_size` of them per forward pass.

    Raises:
        ActivationError: if a model overflows.
    """
    parts: dict[str, list[Tensor]] = {"base": [], "tuned": [], "text": []}
    shared = shared_on(base, tuned, corpus.sequences[0])
    first = 0
    for batch in tqdm(
        list(corpus.batches(batch_size)), desc="reading", disable=not progress, leave=False
    ):
        counted = batch.counted
        read = _last_residuals(base, tuned, batch.tokens, batch.real, shared)
        for role, last in zip(("base", "tuned"), read, strict=True):
            parts[role].append(last[counted])
        text = torch.arange(first, first + len(counted))[:, None].expand(counted.shape)
        parts["text"].append(text[counted])
        first += len(counted)
    return Contexts(base, tuned, corpus, *map(torch.cat, parts.values()))


def _last_residuals(
    base: HookedModel, tuned: HookedModel, tokens: Tensor, real: Tensor, shared: SharedPrefix
) -> tuple[Tensor, Tensor]:
    here = base.cfg.device
    tokens, real = tokens.to(here), real.to(here)
    with evaluating(base), evaluating(tuned):
        found = run_last_of_both(base, tuned, tokens, real.long(), shared)
    for role, last in zip(("base", "tuned"), found, strict=True):
        if not bool(torch.isfinite(last[real]).all()):
            raise ActivationError(
                f"the {role} model has NaN or infinite activations: load it in a wider dtype, as "
                "in dtype='float32'"
            )
    return found


def ranks_in(
    model: HookedModel, prompt: Sequence[int], tokens: Sequence[int]
) -> tuple[list[int], list[int]]:
    """A model's rank of every token after a prompt, and its own top-1 token in each place.

    Tied logits share the best rank.
    """
    logits = logits_along(model, prompt, tokens)
    written = torch.tensor(tokens, device=logits.device)
    ranks: list[int] = distances.rank_of(logits, written).tolist()
    top1: list[int] = distances.winner(logits).tolist()
    return ranks, top1


def logits_along(
    model: HookedModel, prompt: Sequence[int], tokens: Sequence[int]
) -> Float[Tensor, "n d_vocab"]:
    """What a model predicts, in float32, in place of every token after a prompt."""
    ids = torch.tensor([[*prompt, *tokens]], device=model.cfg.device)
    with evaluating(model):
        return run_logits(model, ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1].float()
