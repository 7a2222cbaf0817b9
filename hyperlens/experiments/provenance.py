"""Where do the winners come from? (arXiv 2605.22579, sections 3.4 and 6)

The base model's rank of every token the tuned model picks, teacher-forced and along what the
tuned model writes by itself, and what kind of picks those are.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..checks import check_counts, check_seed
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import check_room, choose_prompts
from ..models.kinds import plain_model
from ..models.tokenizers import token_names, token_texts
from ..pair import open_inputs
from ..passes.contexts import read_contexts
from ..probes.rank_reordering import rank_bins
from ..statistics import significance
from ..statistics.rank_buckets import DEEP_TAIL, bucket_of
from .decisions import Decisions, along_continuations, along_texts, neighbours
from .provenance_finding import BUCKETS, ProvenanceResult
from .token_kinds import KINDS, kind_of, repeats

# A pick is a near-synonym of the base's if it is among so many nearest neighbours of it.
NEIGHBOURS = 10
# An n-gram of this length, met again, is a repetition.
NGRAM = 3
WORDS_BEFORE = 12


def trace_provenance(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    n_prompts: int = 32,
    prompt_tokens: int = 17,
    max_new_tokens: int = 96,
    max_length: int = 256,
    n_examples: int = 5,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> ProvenanceResult:
    """The base rank of every token the tuned model picks, and what those tokens are.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models.
        texts: what `compare_models` takes; their first tokens are the prompts.
        n_prompts, prompt_tokens, max_new_tokens: of the tuned model's greedy continuations.
        max_length: tokens per text, teacher-forced.
        n_examples: picks kept with their context, per way of reading and bucket.
        batch_size: texts per forward pass.
        seed: of the choice of prompts and examples.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        HyperlensError: if a source cannot be opened, the texts do not fit the models, or there
            is no room for the continuations.
    """
    check_counts(batch_size=batch_size)
    check_counts(0, n_examples=n_examples)
    check_seed(seed)
    opened = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    pair = opened.pair
    check_room(pair, prompt_tokens, max_new_tokens)
    prompts = choose_prompts(opened.corpus, n_prompts, prompt_tokens, seed)
    contexts = read_contexts(
        opened.pair.base.hooked, opened.pair.tuned.hooked, opened.corpus, batch_size, progress
    )
    written = GenerationRunner(prompts, max_new_tokens, batch_size, seed, progress).run(pair.tuned)
    read = {
        "teacher-forced": along_texts(contexts, progress),
        "free-running": along_continuations(pair, prompts, written.tokens),
    }
    tokenizer = pair.tokenizer
    table: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    unembedding = plain_model(pair.base.model).get_output_embeddings().weight
    for mode, decisions in read.items():
        changed = [
            first for one in decisions for first, rank in zip(one.base_first, one.rank, strict=True)
            if rank > 1
        ]  # fmt: skip
        near = neighbours(unembedding, changed, min(NEIGHBOURS, len(unembedding) - 1))
        picks = [list(_picks(one, near, tokenizer)) for one in decisions]
        table += _rows(mode, picks)
        examples += _examples(mode, picks, decisions, tokenizer, n_examples, seed)
    meta = pair.describe() | {
        "seed": seed,
        "options": {
            "n_prompts": len(prompts),
            "prompt_tokens": prompt_tokens,
            "max_new_tokens": max_new_tokens,
            "max_length": max_length,
            "neighbours": NEIGHBOURS,
            "ngram": NGRAM,
        },
        "data": opened.corpus.describe(),
        "notes": list(opened.notes),
    }
    histograms = {mode: _histogram(decisions, meta["d_vocab"]) for mode, decisions in read.items()}
    extras = {"rank_histogram": histograms, "examples": examples}
    return ProvenanceResult(tuple(table), extras, meta)


Pick = dict[str, Any]


def _picks(one: Decisions, near: dict[int, set[int]], tokenizer: Any) -> Iterator[Pick]:
    """What is to be said of every decision of one text."""
    texts = token_texts(tokenizer, one.ids)
    for i, (at, token, first, rank) in enumerate(
        zip(one.position, one.picked, one.base_first, one.rank, strict=True)
    ):
        context = one.ids[:at]
        ours, theirs = repeats(context, token, NGRAM), repeats(context, first, NGRAM)
        (text,) = token_texts(tokenizer, [token])
        yield {
            "index": i,
            "bucket": bucket_of(rank).label,
            "kind": kind_of(text, texts[at - 1]) if tokenizer is not None else "other",
            "near_synonym": rank > 1 and token in near[first],
            "avoids": theirs and not ours,
            "falls_into": ours and not theirs,
            "deep": DEEP_TAIL.holds(rank),
        }


def _histogram(decisions: Sequence[Decisions], d_vocab: int) -> list[dict[str, int]]:
    """How many decisions had each base rank, in bins that widen with rank."""
    lows = rank_bins(d_vocab)
    highs = [*(low - 1 for low in lows[1:]), d_vocab]
    found = Counter(bisect_right(lows, rank) - 1 for one in decisions for rank in one.rank)
    return [
        {"low": low, "high": high, "count": found[i]}
        for i, (low, high) in enumerate(zip(lows, highs, strict=True))
    ]


def _rows(mode: str, picks: Sequence[Sequence[Pick]]) -> Iterator[dict[str, Any]]:
    """Shares per text, then their mean over texts: of each bucket, and of what is in it."""
    for bucket in (*BUCKETS, "changed", "all"):
        inside = [[p for p in text if _belongs(p, bucket)] for text in picks]
        if bucket != "all":
            shares = [len(i) / len(t) for i, t in zip(inside, picks, strict=True)]
            yield _row(mode, bucket, "share", shares)
        for kind in KINDS:
            yield _row(mode, bucket, kind, [_share(i, "kind", kind) for i in inside])
        if bucket == "1":
            continue
        for flag in ("near_synonym", "avoids", "falls_into"):
            yield _row(mode, bucket, flag, [_share(i, flag, True) for i in inside])
    yield _row(mode, "all", DEEP_TAIL.metric, [_share(text, "deep", True) for text in picks])
    gaps = [
        _share(i, "avoids", True) - _share(i, "falls_into", True)
        for i in ([p for p in text if _belongs(p, "changed")] for text in picks)
    ]
    yield _row(mode, "changed", "avoids_minus_falls_into", gaps)


def _belongs(pick: Pick, bucket: str) -> bool:
    if bucket == "all":
        return True
    return bool(pick["bucket"] != "1" if bucket == "changed" else pick["bucket"] == bucket)


def _share(picks: Sequence[Pick], key: str, value: object) -> float:
    """NaN of a text without any such decision, which is then left out of the mean."""
    return sum(pick[key] == value for pick in picks) / len(picks) if picks else math.nan


def _row(mode: str, bucket: str, metric: str, values: Sequence[float]) -> dict[str, Any]:
    found = significance.estimate(values)._asdict()
    return {"mode": mode, "bucket": bucket, "metric": metric, **found}


def _examples(
    mode: str,
    picks: Sequence[Sequence[Pick]],
    decisions: Sequence[Decisions],
    tokenizer: Any,
    count: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """A random few of every bucket beyond rank 1, each with the words before it."""
    generator = torch.Generator().manual_seed(seed)
    for bucket in BUCKETS[1:]:
        places = [
            (number, pick)
            for number, text in enumerate(picks)
            for pick in text
            if pick["bucket"] == bucket
        ]
        for place in torch.randperm(len(places), generator=generator)[:count].tolist():
            number, pick = places[place]
            one, i = decisions[number], pick["index"]
            before = one.ids[max(0, one.position[i] - WORDS_BEFORE) : one.position[i]]
            yield {
                "mode": mode,
                "bucket": bucket,
                "context": ("" if tokenizer is not None else " ").join(
                    token_names(tokenizer, before)
                ),
                "picked": token_names(tokenizer, [one.picked[i]])[0],
                "base_first": token_names(tokenizer, [one.base_first[i]])[0],
                "rank": one.rank[i],
                "kind": pick["kind"],
            }
