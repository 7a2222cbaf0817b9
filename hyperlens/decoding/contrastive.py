"""Contrastive search: among the most likely tokens, choose the one least like the text so far.

For each of the k most likely next tokens the model computes the hidden state it would have there.
The token with the largest (1 - α) p - α s is chosen, where s is the largest cosine of that state
with the states of the text so far (Su et al. 2022, arXiv 2202.06417). k and α are fixed, or follow
the model's uncertainty. transformers 5 has no contrastive search of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_positive, check_types, check_whole
from ..data.corpus import pad
from ..errors import DecodingError
from ..hooks.attach import attach
from ..hooks.surface import evaluating
from ..models.kinds import plain_model
from ..models.structure import find_structure
from ..offloading import device_of
from .prompts import batches, check_prompts, eos_ids

# Of adaptive contrastive search: k is 5 to 15.
LOWEST_K, RANGE_OF_K = 5, 10


@check_types
def contrastive_search(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    k: int,
    alpha: float,
    max_new_tokens: int,
    batch_size: int = 16,
    stop_at_eos: bool = True,
    progress: bool = True,
) -> list[list[int]]:
    """Continue each prompt by contrastive search (arXiv 2202.06417).

    Deterministic; with α = 0 or k = 1 it is greedy decoding. The states compared are those after
    the final norm, of every token of prompt and continuation; pads do not count.

    Args:
        model: a `PreTrainedModel` or `PeftModel` with a cache of keys and values.
        tokenizer: whose EOS ends a continuation, as the model's own do; None has none.
        prompts: token ids, BOS included where the model wants one; none may be empty.
        k: how many candidates.
        alpha: weight of the penalty, 0 to 1; its authors take 0.6.
        max_new_tokens: how many to add at most.
        batch_size: prompts at once; k times as many rows go through the model.
        stop_at_eos: end at EOS (which is left out), or generate past it.
        progress: show a progress bar.

    Returns:
        New token ids per prompt, without prompt, padding and EOS.

    Raises:
        CorpusError: if a prompt is empty, or longer than the model's context allows.
        DecodingError: if k or α is out of range, or the model has no such cache.
        LoadingError: if the model cannot generate.
    """
    return _search(
        model,
        tokenizer,
        prompts,
        lambda: Fixed(k, alpha),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stop_at_eos=stop_at_eos,
        progress=progress,
    )


@check_types
def adaptive_contrastive_search(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    q: float = 1.0,
    max_new_tokens: int,
    batch_size: int = 16,
    stop_at_eos: bool = True,
    progress: bool = True,
) -> list[list[int]]:
    """The same with k (5 to 15) and α by the model's uncertainty (arXiv 2407.18698).

    Deterministic. The uncertainty of a text's earlier steps is forgotten at its end.

    Args:
        model, tokenizer, prompts, max_new_tokens, batch_size, stop_at_eos, progress: as in
            `contrastive_search`.
        q: how steeply k and α grow with uncertainty; its authors take 1.

    Returns:
        New token ids per prompt, without prompt, padding and EOS.

    Raises:
        CorpusError: if a prompt is empty, or longer than the model's context allows.
        DecodingError: if q is no positive number, or the model has no such cache.
        LoadingError: if the model cannot generate.
    """
    return _search(
        model,
        tokenizer,
        prompts,
        lambda: Adaptive(q),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stop_at_eos=stop_at_eos,
        progress=progress,
    )


def _search(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    strength: Callable[[], Strength],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_at_eos: bool,
    progress: bool,
) -> list[list[int]]:
    check_prompts(model, prompts, max_new_tokens, batch_size)
    eos = set(eos_ids(model, tokenizer)) if stop_at_eos else set()
    generated: list[list[int]] = [[] for _ in prompts]
    device = device_of(model)
    bar = tqdm(total=len(prompts), desc="searching", unit="text", disable=not progress)
    # By hook: whether `hidden_states[-1]` is before or after the norm is up to the configuration
    # (tie_last_hidden_states, transformers 5.23).
    normed: list[Tensor] = []
    with bar, evaluating(model), attach(find_structure(model), "final_norm", 0, normed.append):
        for batch in batches(prompts, batch_size):
            # A new one for every batch: what it remembers belongs to these texts.
            rule, alive = strength(), list(batch)
            tokens, mask = pad([prompts[i] for i in batch], side="left")
            texts = _Texts.begin(model, normed, tokens.to(device), mask.to(device))
            for left in range(max_new_tokens, 0, -1):
                chosen = texts.extend(rule)
                going = [row for row, token in enumerate(chosen) if token not in eos]
                for row in going:
                    generated[alive[row]].append(chosen[row])
                if not going or left == 1:
                    break
                if len(going) < len(alive):
                    alive = [alive[row] for row in going]
                    rows = torch.tensor(going, device=device)
                    texts.keep(rows)
                    rule.keep(rows)
            bar.update(len(batch))
    return generated


@dataclass
class _Texts:
    """A batch of texts as the model holds them: its cache, and the states to compare with.

    Attributes:
        normed: gets what the final norm returns in a forward pass.
        logits: of the next token.
        states: of every token, after the final norm, of length 1.
        mask: 0 at the pads, which stand on the left.
    """

    model: Any
    normed: list[Tensor]
    cache: Any
    logits: Float[Tensor, "rows d_vocab"]
    states: Float[Tensor, "rows pos d_model"]
    mask: Int[Tensor, "rows pos"]

    @classmethod
    def begin(
        cls,
        model: Any,
        normed: list[Tensor],
        tokens: Int[Tensor, "rows pos"],
        mask: Int[Tensor, "rows pos"],
    ) -> _Texts:
        """Read the prompts."""
        cache, logits, states = _forward(model, normed, tokens, mask, None)
        return cls(model, normed, cache, logits, states, mask)

    def extend(self, strength: Strength) -> list[int]:
        """Add the best candidate to every text, and return it."""
        p = self.logits.softmax(-1)
        k, alpha = strength(p)
        # Of equal logits the smaller id first, as in greedy decoding.
        order = self.logits.argsort(dim=-1, descending=True, stable=True)[:, : int(k.max())]
        tried = torch.arange(order.shape[-1], device=order.device) < k[:, None]
        # One row per candidate, however many each text has.
        row = tried.nonzero()[:, 0]
        self.cache.reorder_cache(row)
        mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=-1)
        cache, logits, states = _forward(
            self.model, self.normed, order[tried][:, None], mask[row], self.cache
        )
        best = _best(p.gather(-1, order), tried, states[:, 0], self.states, self.mask, alpha)
        at = (tried.flatten().cumsum(0) - 1).view_as(order)
        winner = at.gather(-1, best[:, None])[:, 0]
        cache.reorder_cache(winner)
        self.cache, self.logits, self.mask = cache, logits[winner], mask
        self.states = torch.cat([self.states, states[winner]], dim=1)
        chosen: list[int] = order.gather(-1, best[:, None])[:, 0].tolist()
        return chosen

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep only these texts."""
        self.cache.reorder_cache(rows)
        self.logits, self.states, self.mask = self.logits[rows], self.states[rows], self.mask[rows]


def _best(
    p: Float[Tensor, "rows k"],
    tried: Bool[Tensor, "rows k"],
    candidate: Float[Tensor, "tries d_model"],
    states: Float[Tensor, "rows pos d_model"],
    mask: Int[Tensor, "rows pos"],
    alpha: Float[Tensor, " rows"],
) -> Int[Tensor, " rows"]:
    """Which candidate of each text is best; the more likely one of equals."""
    placed = states.new_zeros(*tried.shape, states.shape[-1])
    placed[tried] = candidate
    cosine = placed @ states.transpose(1, 2)
    nearest = cosine.masked_fill(mask[:, None] == 0, -torch.inf).amax(-1).to(p)
    score = (1 - alpha[:, None]) * p - alpha[:, None] * nearest
    return score.masked_fill(~tried, -torch.inf).argmax(-1)


def _forward(
    model: Any,
    normed: list[Tensor],
    tokens: Int[Tensor, "rows new"],
    mask: Int[Tensor, "rows pos"],
    cache: Any,
) -> tuple[Any, Float[Tensor, "rows d_vocab"], Float[Tensor, "rows new d_model"]]:
    """The cache with the new tokens, the logits after them, and their states of length 1."""
    accepted = inspect.signature(plain_model(model).forward).parameters
    if "past_key_values" not in accepted:
        raise DecodingError(
            f"{type(plain_model(model)).__name__} keeps no cache of keys and values, which "
            "contrastive search needs: use another decoding method"
        )
    options: dict[str, Any] = {}
    if "position_ids" in accepted:
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        options["position_ids"] = positions[:, -tokens.shape[1] :]
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    out = model(
        input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **options
    )
    # A model on several devices has them elsewhere than its input.
    states, logits = (
        x.to(tokens.device, torch.promote_types(x.dtype, torch.float32))
        for x in (normed.pop(), out.logits[:, -1])
    )
    if bool(logits.isnan().any()):
        raise DecodingError("the model's logits are NaN: load it in another dtype, as in 'float32'")
    return out.past_key_values, logits, torch.nn.functional.normalize(states, dim=-1)


@runtime_checkable
class Strength(Protocol):
    """Decides k and α at every step of one batch. It may remember earlier steps: one per batch."""

    def __call__(
        self, p: Float[Tensor, "rows d_vocab"]
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
        """How many candidates each text has (1 to d_vocab), and the weight of the penalty."""

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep only these texts."""


class Fixed:
    """The same k and α at every step (Su et al. 2022, arXiv 2202.06417).

    Raises:
        DecodingError: if k is below 1 or α outside 0 to 1.
    """

    def __init__(self, k: int, alpha: float) -> None:
        check_whole("k", k, 1)
        if not 0 <= alpha <= 1:
            raise DecodingError(f"alpha must be from 0 to 1, got {alpha}")
        self.k, self.alpha = k, alpha

    def __call__(
        self, p: Float[Tensor, "rows d_vocab"]
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
        """k, or the whole vocabulary where that is smaller, and α."""
        k = torch.full((len(p),), min(self.k, p.shape[-1]), device=p.device)
        return k, torch.full_like(p[:, 0], self.alpha)

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Nothing is remembered."""


class Adaptive:
    """k and α by how uncertain the model is (Garces Arias et al. 2024, arXiv 2407.18698).

    Both grow with the entropy of the next token compared with the median of the earlier steps:
    k with that of the whole distribution, α with that of its k most likely tokens. At the first
    step, which has nothing before it, k is 10 and α 1/2. The authors' code rounds α to two
    decimals, which their paper does not; here it is not rounded.

    Args:
        q: how steeply they grow; the authors' value is 1.

    Raises:
        DecodingError: if q is no positive number.
    """

    def __init__(self, q: float = 1.0) -> None:
        check_positive("q", q)
        self.q = float(q)
        self._whole: list[Tensor] = []
        self._top: list[Tensor] = []

    def __call__(
        self, p: Float[Tensor, "rows d_vocab"]
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
        """k (5 to 15, or the whole vocabulary where that is smaller) and α (0 to 1)."""
        d_vocab = p.shape[-1]
        share = self._share(_entropy(p), self._whole, torch.full_like(p[:, 0], d_vocab))
        k = (LOWEST_K + RANGE_OF_K * share).round().long().clamp(max=d_vocab)
        ordered = p.sort(-1, descending=True).values
        top = torch.where(torch.arange(d_vocab, device=p.device) < k[:, None], ordered, 0.0)
        alpha = self._share(_entropy(top / top.sum(-1, keepdim=True)), self._top, k.to(p))
        return k, alpha

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Forget the other texts' entropies."""
        self._whole = [entropies[rows] for entropies in self._whole]
        self._top = [entropies[rows] for entropies in self._top]

    def _share(self, now: Tensor, earlier: list[Tensor], size: Tensor) -> Tensor:
        """σ(q · atanh of the gap to the median, as a share of log size); `now` is remembered."""
        usual = _median(torch.stack(earlier)) if earlier else now
        earlier.append(now)
        # A vocabulary of one token has no entropy to be a share of.
        gap = (now - usual) / size.log().clamp_min(torch.finfo(now.dtype).tiny)
        return torch.sigmoid(self.q * torch.atanh(gap.clamp(-1, 1)))


def _entropy(p: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
    """In nats; 0 · log 0 is 0."""
    entropy: Tensor = torch.special.entr(p).sum(-1)
    return entropy


def _median(values: Float[Tensor, "t rows"]) -> Float[Tensor, " rows"]:
    """Over steps; the mean of the middle two of an even number (torch's is the lower one)."""
    ordered = values.sort(0).values
    count = len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
