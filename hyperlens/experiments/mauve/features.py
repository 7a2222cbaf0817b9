"""One vector per text, from any causal language model: what MAUVE compares sets of texts by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ...checks import check_counts
from ...data.corpus import check_max_length, pad, tokenize
from ...errors import ActivationError, CorpusError
from ...hooks.loading import LoadedModel, hook, parse_device, parse_dtype
from ...hooks.surface import evaluating, final_norm, input_device, run_last_residual
from ...models.sources import open_source
from ...render.format import count


class Features(NamedTuple):
    """Texts as vectors.

    Attributes:
        vectors: one row per text that has a token, in the order of the texts.
        n_empty: texts without any token, which have no vector.
        n_cut: texts longer than the limit, read up to there.
    """

    vectors: Float[Tensor, "n d_model"]
    n_empty: int
    n_cut: int


@dataclass(frozen=True)
class Featurizer:
    """A model that turns texts into vectors.

    The vector of a text is the last layer's residual at the text's last token, after the model's
    own final norm: what Hugging Face gives as `hidden_states[-1]` there, and what the package
    `mauve-text` takes of GPT-2. Texts begin with BOS where the tokenizer puts one.

    Attributes:
        loaded: the model, hooked and checked.
        max_length: tokens per text, BOS included; a longer text is read up to there.
        batch_size: texts per forward pass; changes nothing but rounding.
    """

    loaded: LoadedModel
    max_length: int
    batch_size: int

    def describe(self) -> dict[str, Any]:
        """Which model, which token and how many, as JSON values."""
        return self.loaded.describe() | {
            "dtype": str(self.loaded.hooked.cfg.dtype).removeprefix("torch."),
            "max_length": self.max_length,
            "position": "last token, after the final norm",
        }

    def features(self, texts: Sequence[str], progress: bool = False) -> Features:
        """The vectors of some texts.

        Raises:
            CorpusError: if the model has no tokenizer.
            ActivationError: if the model overflows.
        """
        ids = tokenize(texts, self.loaded.tokenizer)
        sequences = [tokens[: self.max_length] for tokens in ids if len(tokens)]
        vectors = torch.empty(len(sequences), self.loaded.hooked.cfg.d_model)
        longest_first = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        starts = range(0, len(sequences), self.batch_size)
        for start in tqdm(starts, desc="reading texts", disable=not progress, leave=False):
            rows = longest_first[start : start + self.batch_size]
            vectors[rows] = self._last([sequences[i] for i in rows]).cpu()
        n_cut = sum(len(tokens) > self.max_length for tokens in ids)
        return Features(vectors, len(ids) - len(sequences), n_cut)

    def _last(self, batch: Sequence[np.ndarray]) -> Float[Tensor, "batch d_model"]:
        """Padded on the right: what comes after a text's last token cannot change it."""
        model = self.loaded.hooked
        tokens, mask = pad(batch)
        lengths = mask.sum(-1)
        device = input_device(model)
        with evaluating(model):
            residual = run_last_residual(model, tokens.to(device), mask.to(device))
            last = residual[torch.arange(len(batch)), lengths - 1]
            vectors = final_norm(model, last).float()
        if not bool(torch.isfinite(vectors).all()):
            raise ActivationError(
                "the model that reads the texts has NaN or infinite activations: load it in a "
                "wider dtype, as in dtype='float32'"
            )
        return vectors


def feature_notes(name: str, *sets: Features) -> list[str]:
    """What a reader of the result should know of texts that were left out or cut."""
    n_empty, n_cut = sum(one.n_empty for one in sets), sum(one.n_cut for one in sets)
    total = count(sum(len(one.vectors) for one in sets) + n_empty, "text")
    notes = []
    if n_empty:
        notes.append(f"{name}: {n_empty:,} of {total} without a token, left out")
    if n_cut:
        notes.append(f"{name}: {n_cut:,} of {total} longer than what is read, cut")
    return notes


def open_featurizer(
    source: Any,
    *,
    max_length: int = 1024,
    batch_size: int = 16,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Featurizer:
    """Open a model to read texts with.

    Args:
        source: whatever a model can be opened from; or a `Featurizer`, which is returned.
        max_length: tokens per text; the model's own context bounds it.
        batch_size: texts per forward pass.
        device, dtype: as in `compare_models`.

    Raises:
        LoadingError: if the source cannot be opened.
        ParityError: if it does not read as its plain model does.
        CorpusError: if it has no tokenizer, or an option makes no sense.

    >>> from hyperlens.embedded import embedded_base
    >>> reader = open_featurizer(embedded_base())
    >>> len(reader.features(["The old mill.", ""]).vectors)
    1
    """
    if isinstance(source, Featurizer):
        return source
    check_max_length(max_length)
    check_counts(batch_size=batch_size)
    opened = open_source(source, device=parse_device(device), dtype=parse_dtype(dtype))
    if opened.tokenizer is None:
        raise CorpusError(
            f"{opened.name} has no tokenizer to read texts with: pass (model, tokenizer)"
        )
    loaded = hook(opened, "residual")
    context = getattr(loaded.hooked.cfg, "n_ctx", None)
    return Featurizer(loaded, min(max_length, context or max_length), batch_size)
