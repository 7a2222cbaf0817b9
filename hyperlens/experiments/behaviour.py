"""Did behaviour change? Both models continue the same prompts (arXiv 2605.22579, section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..checks import check_counts, check_seed
from ..decoding.diversity import (
    MEASURES,
    distinct,
    is_ttr_again,
    repetition,
    type_token_ratio,
    words,
)
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import check_room, choose_examples, choose_prompts, opening_and_texts
from ..errors import CorpusError
from ..hooks.loading import LoadedModel
from ..models.tokenizers import token_names
from ..pair import Pair, open_inputs
from ..statistics import significance
from .behaviour_finding import BehaviourResult
from .decisions import in_the_base

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
    tuned: Any = None,
    texts: Any = None,
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
) -> BehaviourResult:
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
        n_examples: how many prompts, drawn at random, are kept as text, with each token's rank in
            the base model.
        batch_size: prompts per forward pass.
        seed: of the choice of prompts and examples, and of sampling.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Returns:
        A `BehaviourResult`: mean and interval over prompts of every measure, and the difference
        tuned - base, paired by prompt, with p values of the paired t test, Holm-corrected.

    Raises:
        HyperlensError: if a source cannot be opened, the texts do not fit the models, or there
            is no room for the continuations.
    """
    _check_strategies(strategies)
    check_counts(batch_size=batch_size, max_new_tokens=max_new_tokens)
    check_counts(0, n_examples=n_examples)
    check_seed(seed)
    opened = open_inputs(
        base, tuned, texts, max_length=max(prompt_tokens, 2), device=device, dtype=dtype
    )
    pair = opened.pair
    check_room(pair, prompt_tokens, max_new_tokens)
    prompts = choose_prompts(opened.corpus, n_prompts, prompt_tokens, seed)
    tokenizer = pair.tokenizer
    continuing = GenerationRunner(prompts, max_new_tokens, batch_size, seed, progress)
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
            for i in choose_examples(len(prompts), n_examples, seed)
        ]
    meta = pair.describe() | {
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
    return BehaviourResult(tuple(significance.holm_rows(table)), extras, meta)


def _check_strategies(strategies: Sequence[str]) -> None:
    unknown = [name for name in strategies if name not in STRATEGIES]
    twice = len(set(strategies)) < len(strategies)
    if unknown or twice or not strategies or isinstance(strategies, str):
        raise CorpusError(
            f"strategies must be a list of {' and '.join(STRATEGIES)}, each once at most; got "
            f"{strategies!r}"
        )


def _sides(pair: Pair) -> dict[str, LoadedModel]:
    return {"base": pair.base, "tuned": pair.tuned}


def _rows(
    strategy: str, written: Mapping[str, list[list[int]]], tokenizer: Any
) -> list[dict[str, Any]]:
    """Mean over prompts of every measure, of both models and of their difference."""
    rows = []
    metrics = [*MEASURES, *(WORD_MEASURES if tokenizer is not None else [])]
    values = {
        side: {m: [_measure(m, tokens, tokenizer) for tokens in texts] for m in metrics}
        for side, texts in written.items()
    }
    for metric in metrics:
        for side, of_side in values.items():
            found = significance.estimate(of_side[metric])
            rows.append(_row(strategy, side, metric, found, math.nan))
        tuned, base = (values[side][metric] for side in ("tuned", "base"))
        # What is the same test twice counts once in Holm's correction.
        again = is_ttr_again(metric, *values.values())
        p = math.nan if again else significance.paired_p(tuned, base)
        gap = significance.difference(tuned, base)
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


def _example(
    pair: Pair,
    tokenizer: Any,
    strategy: str,
    prompt: list[int],
    written: Mapping[str, list[int]],
) -> dict[str, Any]:
    """One prompt and both continuations, with the base model's rank of every token."""
    opening, texts = opening_and_texts(tokenizer, prompt, list(written.values()))
    sides = {
        side: {
            "text": text,
            "tokens": token_names(tokenizer, tokens),
            "base_rank": in_the_base(pair, prompt, tokens)[0],
        }
        for (side, tokens), text in zip(written.items(), texts, strict=True)
    }
    return {"strategy": strategy, "prompt": opening, **sides}
