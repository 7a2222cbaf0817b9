"""Did behaviour change? Both models continue the same prompts (arXiv 2605.22579, section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import significance, stats
from ..decoding.diversity import MEASURES, distinct, repetition, type_token_ratio, words
from ..decoding.prompts import text_after
from ..errors import CorpusError
from ..hooked import evaluating, run_logits
from ..loading import Loaded
from ..pairing import ModelPair, describe_pair
from .behaviour_finding import BehaviourFinding
from .contexts import names, open_pair_and_texts
from .continuing import Continuing, check_counts, check_room, choose_prompts

STRATEGIES = {"greedy": False, "sample": True}
# Of words, where there is a tokenizer to write them: what does not depend on how words are cut.
WORD_MEASURES: Mapping[str, Callable[[Sequence[str]], float]] = {
    "word_ttr": type_token_ratio,
    "word_rep_2": lambda items: repetition(items, 2),
    "word_rep_3": lambda items: repetition(items, 3),
}
# Lengths of n-grams that are counted over all continuations together.
DISTINCT = (1, 2, 3)


def measure_behaviour(
    base: Any,
    tuned: Any,
    texts: Any,
    *,
    n_prompts: int = 32,
    prompt_tokens: int = 17,
    max_new_tokens: int = 96,
    strategies: Sequence[str] = ("greedy", "sample"),
    n_examples: int = 8,
    batch_size: int = 16,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> BehaviourFinding:
    """How diverse both models' continuations of the same prompts are.

    Every continuation has `max_new_tokens` tokens, an end-of-text token being one like any other:
    measures of repetition depend on length. Greedy takes the most likely token; sampling is at
    temperature 1 from the whole vocabulary.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models.
        texts: what `compare_models` takes; their first tokens are the prompts.
        n_prompts: how many texts, drawn at random, are continued.
        prompt_tokens: how many of their first tokens are the prompt, BOS included.
        max_new_tokens: how many are added to it.
        strategies: "greedy", "sample" or both.
        n_examples: how many prompts are kept as text, with each token's rank in the base model.
        batch_size: prompts per forward pass.
        seed: of the choice of prompts and of sampling.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Returns:
        A `BehaviourFinding`: mean and interval over prompts of every measure, and the difference
        tuned - base, paired by prompt, with p values of the paired t test, Holm-corrected.

    Raises:
        HyperlensError: if a source cannot be opened, the texts do not fit the models, or there
            is no room for the continuations.
    """
    _check_strategies(strategies)
    check_counts(batch_size=batch_size, max_new_tokens=max_new_tokens)
    opened = open_pair_and_texts(
        base, tuned, texts, max_length=max(prompt_tokens, 2), device=device, dtype=dtype
    )
    pair = opened.pair
    check_room(pair, prompt_tokens, max_new_tokens)
    prompts = choose_prompts(opened.corpus, n_prompts, prompt_tokens, seed)
    tokenizer = pair.base.opened.tokenizer or pair.tuned.opened.tokenizer
    continuing = Continuing(prompts, max_new_tokens, batch_size, seed, progress)
    table: list[dict[str, Any]] = []
    together: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    for strategy in strategies:
        written = {
            side: continuing.run(loaded, do_sample=STRATEGIES[strategy]).tokens
            for side, loaded in _sides(pair).items()
        }
        table += _rows(strategy, written, tokenizer)
        together += _together(strategy, written)
        examples += [
            _example(pair, tokenizer, strategy, prompts[i], {s: w[i] for s, w in written.items()})
            for i in range(min(n_examples, len(prompts)))
        ]
    meta = describe_pair(pair) | {
        "seed": seed,
        "options": {
            "n_prompts": len(prompts),
            "prompt_tokens": prompt_tokens,
            "max_new_tokens": max_new_tokens,
            "strategies": list(strategies),
        },
        "data": opened.corpus.describe(),
        "notes": list(opened.notes),
    }
    extras = {"distinct": together, "examples": examples}
    return BehaviourFinding(tuple(_holm(table)), extras, meta)


def _check_strategies(strategies: Sequence[str]) -> None:
    unknown = [name for name in strategies if name not in STRATEGIES]
    if unknown or not strategies or isinstance(strategies, str):
        raise CorpusError(
            f"strategies must be a list of {' and '.join(STRATEGIES)}, got {strategies!r}"
        )


def _sides(pair: ModelPair) -> dict[str, Loaded]:
    return {"base": pair.base, "tuned": pair.tuned}


def _rows(
    strategy: str, written: Mapping[str, list[list[int]]], tokenizer: Any
) -> list[dict[str, Any]]:
    """Mean over prompts of every measure, of both models and of their difference."""
    rows = []
    for metric in [*MEASURES, *(WORD_MEASURES if tokenizer is not None else [])]:
        values = {
            side: [_measure(metric, tokens, tokenizer) for tokens in texts]
            for side, texts in written.items()
        }
        for side, of_side in values.items():
            found = significance.estimate(of_side)
            rows.append(_row(strategy, side, metric, found, math.nan))
        gap = significance.difference(values["tuned"], values["base"])
        p = significance.paired_p(values["tuned"], values["base"])
        rows.append(_row(strategy, "difference", metric, gap, p))
    return rows


def _measure(metric: str, tokens: list[int], tokenizer: Any) -> float:
    if metric in WORD_MEASURES:
        return WORD_MEASURES[metric](words(tokenizer.decode(tokens, skip_special_tokens=True)))
    return float(MEASURES[metric](tokens))


def _together(strategy: str, written: Mapping[str, list[list[int]]]) -> Iterator[dict[str, Any]]:
    """Distinct n-grams / n-grams over all continuations: how much they resemble each other, too.

    One number for all prompts, which falls with their number; so it has no interval.
    """
    for side, texts in written.items():
        for n in DISTINCT:
            yield {"strategy": strategy, "model": side, "n": n, "value": distinct(texts, n)}


def _row(
    strategy: str, model: str, metric: str, found: significance.Estimate, p: float
) -> dict[str, Any]:
    names_only = {"strategy": strategy, "model": model, "metric": metric}
    return {**names_only, **found._asdict(), "p": p}


def _holm(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with p corrected for all tests of the table."""
    corrected = significance.holm([row["p"] for row in table])
    return [{**row, "p": p} for row, p in zip(table, corrected, strict=True)]


def _example(
    pair: ModelPair,
    tokenizer: Any,
    strategy: str,
    prompt: list[int],
    written: Mapping[str, list[int]],
) -> dict[str, Any]:
    """One prompt and both continuations, with the base model's rank of every token."""
    sides = {
        side: {
            "text": text_after(tokenizer, prompt, tokens),
            "tokens": names(tokenizer, tokens),
            "base_rank": base_ranks(pair, prompt, tokens).tolist(),
        }
        for side, tokens in written.items()
    }
    return {"strategy": strategy, "prompt": text_after(tokenizer, [], prompt), **sides}


def base_ranks(pair: ModelPair, prompt: list[int], tokens: list[int]) -> Tensor:
    """The base model's rank of every token in its place; tied logits share the best rank."""
    base = pair.base.hooked
    ids = torch.tensor([[*prompt, *tokens]], device=base.cfg.device)
    with evaluating(base):  # type: ignore[arg-type]
        logits = run_logits(base, ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1].float()
    return stats.rank_of(logits, ids[0, len(prompt) :])
