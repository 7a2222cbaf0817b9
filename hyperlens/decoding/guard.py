"""GUARD: sampling that adapts to the model's uncertainty (Ding et al. 2025, EMNLP Findings).

It samples from the few most likely tokens, of which it lowers those that the text already holds.
How few, and how much, follows from how the entropy of the next token compares with that of the
last tokens (local) and of the whole text (global). One of the decoding baselines of arXiv
2605.22579, Table 7.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from ..checks import check_whole

EPSILON = 1e-4
DECAY = 0.95  # of the weights of older entropies in the global mean
LOWEST_K, RANGE_OF_K = 5, 10
Q, RANGE_OF_Q = 0.9, 0.1


class Guard(LogitsProcessor):
    """Turns logits into GUARD's log-probabilities; to be used with `do_sample=True`.

    Works in `transformers`' `generate` as it is, any number of texts at once. What it remembers of
    a text is forgotten when another one begins, so one processor serves many calls. Only a text
    given back to go on with cannot be told from one that was never interrupted: call `reset()`
    before it, as `continuations` does, where its entropies are to be forgotten.

    Args:
        window: how many entropies are "local"; the paper's value is 7.
        pad_token_id: of prompts padded on the left; tokens of this id that stand before any other
            are no text. None if there are no pads.

    Raises:
        DecodingError: if the window is too short for a median.
    """

    def __init__(self, window: int = 7, pad_token_id: int | None = None) -> None:
        check_whole("window", window, 2)
        self.window = window
        self.pad_token_id = pad_token_id
        self.reset()

    def reset(self) -> None:
        """Forget every text."""
        self._seen: Tensor | None = None
        self._entropies: list[Tensor] = []

    def __call__(
        self, input_ids: Int[Tensor, "batch pos"], scores: Float[Tensor, "batch d_vocab"]
    ) -> Float[Tensor, "batch d_vocab"]:
        """The log-probabilities of the next token, -inf beyond the k most likely."""
        if not self._continues(input_ids):
            self._entropies = []
        self._seen = input_ids.clone()
        # Apple's accelerator has no float64.
        log_p = (scores.cpu() if scores.device.type == "mps" else scores).double().log_softmax(-1)
        p = log_p.exp()
        self._entropies.append(-(p * (p + 1e-5).log()).sum(-1))
        history = torch.stack(self._entropies, dim=-1)
        k, alpha = strengths(history, self.window, scores.shape[-1])
        counts = _counts(input_ids.to(p.device), scores.shape[-1], self.pad_token_id)
        among_top_k = (
            log_p.argsort(dim=-1, descending=True, stable=True).argsort(-1) < k.int()[:, None]
        )
        # As logarithms: powers of α vanish where every likely token has occurred many times.
        penalised = (log_p + counts * alpha.log()[:, None]).masked_fill(~among_top_k, -torch.inf)
        return penalised.log_softmax(-1).to(scores)

    def _continues(self, input_ids: Tensor) -> bool:
        """Whether this is the same batch of texts, one token later."""
        seen = self._seen
        return (
            seen is not None
            and seen.shape[0] == input_ids.shape[0]
            and seen.shape[1] + 1 == input_ids.shape[1]
            and bool(torch.equal(seen, input_ids[:, :-1]))
        )


def strengths(
    history: Float[Tensor, "batch t"], window: int, d_vocab: int
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """GUARD's k (not rounded, 5 to 15) and α (0 to 1) after these entropies, the last one current.

    Args:
        history: entropy of every step so far, nats.
        window: how many of them are local.
        d_vocab: size of the vocabulary.
    """
    t = history.shape[-1]
    now = history[:, -1]
    previous = history[:, -2] if t > 1 else now
    change = ((now - previous).abs() / (previous + EPSILON)).clamp(0, 1)
    if t < window:
        # Medians are the lower ones of an even number, as torch's are.
        local = now - history.median(-1).values
        overall = torch.zeros_like(now)
        drift = torch.zeros_like(now)
    else:
        weights = DECAY ** torch.arange(t - 1, -1, -1, dtype=history.dtype, device=history.device)
        mean = (history * weights).sum(-1) / weights.sum()
        recent = history[:, -(window - 1) :].median(-1).values
        local = now - history[:, -window:].median(-1).values
        overall = recent - mean
        drift = (overall.abs() / (recent + EPSILON)).clamp(0, 1)
    q = Q + RANGE_OF_Q * (1 + change + drift)
    k = LOWEST_K + RANGE_OF_K * torch.sigmoid(_mixed(local, overall, q, math.log(d_vocab)))
    return k, torch.sigmoid(_mixed(local, overall, q, (k + EPSILON).log()))


def _mixed(local: Tensor, overall: Tensor, q: Tensor, scale: Any) -> Tensor:
    """The local and the global deviation, each weighted by its own size."""
    edge = 1 - EPSILON
    near, far = (q * torch.atanh((gap / scale).clamp(-edge, edge)) for gap in (local, overall))
    share = near.abs() / (near.abs() + far.abs() + EPSILON)
    return share * near + (1 - share) * far


def _counts(
    input_ids: Int[Tensor, "batch pos"], d_vocab: int, pad: int | None
) -> Float[Tensor, "batch d_vocab"]:
    """How often each token stands in prompt and output, pads on the left left out."""
    real = torch.ones_like(input_ids, dtype=torch.float64)
    if pad is not None:
        real = ((input_ids != pad).cumsum(-1) > 0).to(torch.float64)
    counts = torch.zeros(len(input_ids), d_vocab, dtype=torch.float64, device=input_ids.device)
    return counts.scatter_add_(-1, input_ids, real)
