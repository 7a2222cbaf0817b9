"""Would another way of decoding do as well? (arXiv 2605.22579, section 6 and Table 7)

The tuned model writes greedily; its base under methods that need no training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..checks import check_counts, check_seed
from ..decoding.prompts import (
    check_room,
    choose_examples,
    choose_prompts,
    eos_ids,
    opening_and_texts,
)
from ..pair import open_inputs
from ..statistics.significance import estimate
from .decoding_finding import METHODS, DecodingResult
from .decoding_methods import Writing, Written, check_methods
from .decoding_rows import Way, measured, rows
from .mauve_scores import SEEDS, few_texts
from .mauve_written import OwnTexts, check_mauve, check_writes_text
from .text_features import open_featurizer


def compare_decoding(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    methods: Sequence[str] = tuple(METHODS),
    temperature: float = 0.7,
    top_p: float = 0.95,
    min_p: float = 0.1,
    guard_window: int = 7,
    contrastive_q: float = 1.0,
    n_prompts: int = 32,
    prompt_tokens: int = 17,
    max_new_tokens: int = 96,
    n_samples: int = 1,
    stop_at_eos: bool = False,
    mauve_features: Any = None,
    n_examples: int = 3,
    batch_size: int = 16,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> DecodingResult:
    """The base model under several ways of decoding beside the tuned model's greedy text.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models.
        texts: what `compare_models` takes; their first tokens are the prompts.
        methods: which ways of decoding the base model: "greedy", "temperature", "top_p", "min_p",
            "guard" (Ding et al. 2025), "contrastive" (adaptive contrastive search, arXiv
            2407.18698). The tuned model decodes greedily.
        temperature: of the method of this name; ours. The other methods sample at 1; ours.
        top_p: of nucleus sampling; ours.
        min_p: the paper's.
        guard_window: of GUARD; the paper's.
        contrastive_q: of adaptive contrastive search; its authors'.
        n_prompts: how many texts, drawn at random, are continued.
        prompt_tokens: how many of their first tokens are the prompt, BOS included.
        max_new_tokens: how many are added to it.
        n_samples: how often the methods that sample are run, with seeds from `seed` on.
        stop_at_eos: end at an end of text. Otherwise it is a token like any other, and all
            continuations are of one length: measures of repetition depend on length.
        mauve_features: a model that reads texts, for MAUVE between continuations and the texts' own
            ones, as many tokens long; None leaves it out. Only texts that long are continued then.
        n_examples: how many prompts, drawn at random, are kept as text, with what every method
            wrote.
        batch_size: prompts per forward pass; adaptive contrastive search has up to 15 times as many
            rows.
        seed: of the choice of prompts and examples, and of sampling.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        HyperlensError: if a method or its parameter makes no sense, a source cannot be opened, the
            texts do not fit the models, or there is no room for the continuations.
    """
    parameters = {
        "temperature": temperature,
        "top_p": top_p,
        "min_p": min_p,
        "guard": guard_window,
        "contrastive": contrastive_q,
    }
    check_methods(methods, parameters)
    check_counts(batch_size=batch_size, max_new_tokens=max_new_tokens, n_samples=n_samples)
    check_counts(0, n_examples=n_examples)
    check_seed(seed)
    # MAUVE compares with as many tokens of the texts themselves.
    rest = 0 if mauve_features is None else max_new_tokens
    if mauve_features is not None:
        check_mauve(mauve_features)
    opened = open_inputs(
        base, tuned, texts, max_length=max(prompt_tokens + rest, 2), device=device, dtype=dtype
    )
    pair = opened.pair
    check_room(pair, prompt_tokens, max_new_tokens)
    drawn = choose_prompts(opened.corpus, n_prompts, prompt_tokens + rest, seed)
    prompts = [one[:prompt_tokens] for one in drawn]
    tokenizer = pair.tokenizer
    if mauve_features is not None:
        check_writes_text(tokenizer)
    writing = Writing(prompts, parameters, max_new_tokens, batch_size, stop_at_eos, progress)
    seeds = range(seed, seed + n_samples)
    written = {("base", method): writing.run(pair.base, method, seeds) for method in methods}
    written["tuned", "greedy"] = writing.run(pair.tuned, "greedy", seeds)
    meta = pair.describe() | {
        "seed": seed,
        "options": {
            "methods": list(methods),
            "parameters": {name: parameters[name] for name in methods if name in parameters},
            "n_prompts": len(prompts),
            "prompt_tokens": prompt_tokens,
            "max_new_tokens": max_new_tokens,
            "n_samples": n_samples,
            "stop_at_eos": stop_at_eos,
        },
        "data": opened.corpus.describe(),
        "notes": list(opened.notes),
    }
    mauve: dict[Way, float] = {}
    if mauve_features is not None:
        reader = open_featurizer(mauve_features, batch_size=batch_size, device=device, dtype=dtype)
        own = OwnTexts(reader, tokenizer, [one[prompt_tokens:] for one in drawn])
        mauve = _mauve(own, written)
        meta["mauve"] = reader.describe() | {"seeds": list(SEEDS)}
        meta["notes"] += [*own.notes, *few_texts(len(drawn))]
    about = [
        {
            "model": model,
            "method": method,
            "parameter": float(parameters.get(method, math.nan)),
            "n_samples": len(found.samples),
            "seconds": found.seconds,
        }
        for (model, method), found in written.items()
    ]
    examples = [
        _example(tokenizer, prompts[i], {w: found.samples[0][i] for w, found in written.items()})
        for i in choose_examples(len(prompts), n_examples, seed)
    ]
    # Each model's own ends: a chat model has others than its base.
    eos = {
        side: eos_ids(loaded.model, loaded.tokenizer or tokenizer)
        for side, loaded in (("base", pair.base), ("tuned", pair.tuned))
    }
    values = {way: measured(found.samples, eos[way[0]]) for way, found in written.items()}
    return DecodingResult(
        tuple(rows(values, mauve)), {"methods": about, "examples": examples}, meta
    )


def _example(
    tokenizer: Any, prompt: Sequence[int], written: Mapping[Way, Sequence[int]]
) -> dict[str, Any]:
    """One prompt, and what every way of decoding wrote after it."""
    opening, texts = opening_and_texts(tokenizer, prompt, list(written.values()))
    return {
        "prompt": opening,
        "texts": [
            {"model": model, "method": method, "text": text}
            for (model, method), text in zip(written, texts, strict=True)
        ],
    }


def _mauve(own: OwnTexts, written: Mapping[Way, Written]) -> dict[Way, float]:
    """Of every way of decoding, the mean over samples and seeds; NaN where it is unknown."""
    found = {}
    for (model, method), made in written.items():
        scores = own.scores(f"{model}, {METHODS[method].words}", made.samples)
        found[model, method] = estimate([one.mean for one in scores]).value
    return found
