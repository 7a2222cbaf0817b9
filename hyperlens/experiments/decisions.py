"""Every next-token decision of a tuned model, and its rank in the base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..hooks.surface import evaluating, run_logits
from ..pair import Pair
from ..passes.contexts import Contexts
from ..statistics import distances
from ..statistics.moments import in_full_float32


@dataclass(frozen=True)
class Decisions:
    """The decisions along one text, in order.

    Attributes:
        ids: the whole text; the decision at i follows `ids[: position[i]]`.
        position: where each decision is made.
        picked: the tuned model's top-1 token.
        base_first: the base model's top-1 token.
        rank: the base model's rank of `picked`, one-based; tied logits share the best rank.
    """

    ids: list[int]
    position: list[int]
    picked: list[int]
    base_first: list[int]
    rank: list[int]


def along_texts(contexts: Contexts, progress: bool) -> list[Decisions]:
    """Teacher-forced: what both models predict next at every context of the texts."""
    parts_of: dict[str, list[Tensor]] = {"picked": [], "base_first": [], "rank": []}
    for _, base, tuned in contexts.rows("provenance", progress):
        winner = distances.winner(tuned)
        parts_of["picked"].append(winner)
        parts_of["base_first"].append(distances.winner(base))
        parts_of["rank"].append(distances.rank_of(base, winner))
    columns = {name: torch.cat(parts).cpu() for name, parts in parts_of.items()}
    text = contexts.text.cpu()
    corpus = contexts.corpus
    decisions = []
    for number, sequence in enumerate(corpus.sequences):
        in_text = text == number
        if not bool(in_text.any()):
            continue
        ids = sequence.tolist()
        # A decision follows every token but a BOS.
        position = [i + 1 for i, token in enumerate(ids) if token != corpus.bos_id]
        picked, base_first, ranks = (columns[name][in_text].tolist() for name in parts_of)
        decisions.append(Decisions(ids, position, picked, base_first, ranks))
    return decisions


def along_continuations(
    pair: Pair, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> list[Decisions]:
    """Free-running: each token that the tuned model generated, and its rank in the base model."""
    decisions = []
    for prompt, tokens in zip(prompts, continuations, strict=True):
        ids = [*prompt, *tokens]
        ranks, first = in_the_base(pair, prompt, tokens)
        position = list(range(len(prompt), len(ids)))
        decisions.append(Decisions(ids, position, list(tokens), first, ranks))
    return decisions


def in_the_base(
    pair: Pair, prompt: Sequence[int], tokens: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The base model's rank of every token in its place, and its own top-1 token there.

    Tied logits share the best rank.
    """
    base = pair.base.hooked
    ids = torch.tensor([[*prompt, *tokens]], device=base.cfg.device)
    with evaluating(base):
        logits = run_logits(base, ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1].float()
    ranks: list[int] = distances.rank_of(logits, ids[0, len(prompt) :]).tolist()
    first: list[int] = distances.winner(logits).tolist()
    return ranks, first


def neighbours(
    unembedding: Float[Tensor, "d_vocab d_model"], tokens: Sequence[int], count: int
) -> dict[int, set[int]]:
    """The nearest tokens of each token by cosine of the unembedding's rows, mean removed."""
    rows = unembedding.detach().float()
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=-1)
    wanted = sorted(set(tokens))
    near: dict[int, set[int]] = {}
    for some in _batches(wanted, 256):
        with in_full_float32():
            similar: Float[Tensor, "n d_vocab"] = rows[some] @ rows.T
        own: Bool[Tensor, "n d_vocab"] = torch.zeros_like(similar, dtype=torch.bool)
        own[torch.arange(len(some)), torch.tensor(some)] = True
        best: Int[Tensor, "n count"] = similar.masked_fill(own, -torch.inf).topk(count).indices
        near |= {token: set(row) for token, row in zip(some, best.tolist(), strict=True)}
    return near


def _batches(values: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(values), size):
        yield list(values[start : start + size])
