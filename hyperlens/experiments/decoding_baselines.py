"""Would another way of decoding do as well? (arXiv 2605.22579, section 6 and Table 7)

The tuned model writes greedily; its base under methods that need no training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..decoding.prompts import eos_ids, text_after
from ..errors import CorpusError
from ..pairing import describe_pair
from ..sources import check_source
from .contexts import open_pair_and_texts
from .continuing import check_counts, check_room, choose_prompts
from .decoding_finding import METHODS, DecodingFinding
from .decoding_methods import Writing, check_methods
from .decoding_rows import Tokens, Way, measured, rows
from .mauve_scores import SEEDS, compute_mauve, few_texts, mauve_scores
from .text_features import Featurizer, open_featurizer


def decoding_baselines(
    base: Any,
    tuned: Any,
    texts: Any,
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
) -> DecodingFinding:
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
        n_examples: how many prompts are kept as text, with what every method wrote.
        batch_size: prompts per forward pass; adaptive contrastive search has up to 15 times as many
            rows.
        seed: of the choice of prompts and of sampling.
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
    rest = _checked_rest(mauve_features, max_new_tokens)
    opened = open_pair_and_texts(
        base, tuned, texts, max_length=max(prompt_tokens + rest, 2), device=device, dtype=dtype
    )
    pair = opened.pair
    check_room(pair, prompt_tokens, max_new_tokens)
    drawn = choose_prompts(opened.corpus, n_prompts, prompt_tokens + rest, seed)
    prompts = [one[:prompt_tokens] for one in drawn]
    tokenizer = pair.base.opened.tokenizer or pair.tuned.opened.tokenizer
    if mauve_features is not None and tokenizer is None:
        raise CorpusError(
            "MAUVE compares texts, and the pair has no tokenizer to write them with: pass (model, "
            "tokenizer), or leave MAUVE out"
        )
    eos = eos_ids(pair.base.opened.model, tokenizer)
    writing = Writing(prompts, parameters, max_new_tokens, batch_size, stop_at_eos, progress)
    seeds = range(seed, seed + n_samples)
    written = {("base", method): writing.run(pair.base, method, seeds) for method in methods}
    written["tuned", "greedy"] = writing.run(pair.tuned, "greedy", seeds)
    meta = describe_pair(pair) | {
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
        human = [one[prompt_tokens:] for one in drawn]
        samples = {way: found.samples for way, found in written.items()}
        mauve = _mauve(reader, tokenizer, human, samples)
        meta["mauve"] = reader.describe() | {"seeds": list(SEEDS)}
        meta["notes"] += few_texts(len(human))
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
        {
            "prompt": text_after(tokenizer, [], prompts[i]),
            "texts": [
                {
                    "model": model,
                    "method": method,
                    "text": text_after(tokenizer, prompts[i], found.samples[0][i]),
                }
                for (model, method), found in written.items()
            ],
        }
        for i in range(min(n_examples, len(prompts)))
    ]
    values = {way: measured(found.samples, eos) for way, found in written.items()}
    return DecodingFinding(
        tuple(rows(values, mauve)), {"methods": about, "examples": examples}, meta
    )


def _checked_rest(mauve_features: Any, max_new_tokens: int) -> int:
    """How many tokens after the prompt are needed of the texts themselves.

    MAUVE compares with them; whether it can is found out before anything is opened.
    """
    if mauve_features is None:
        return 0
    compute_mauve()
    if not isinstance(mauve_features, Featurizer):
        check_source(mauve_features)
    return max_new_tokens


def _mauve(
    reader: Featurizer, tokenizer: Any, human: Tokens, written: Mapping[Way, Sequence[Tokens]]
) -> dict[Way, float]:
    """MAUVE of what each way wrote and how the texts go on, the mean over samples and seeds."""

    def read(tokens: Tokens) -> Any:
        return reader.features([text_after(tokenizer, [], one) for one in tokens]).vectors

    wanted = read(human)
    return {
        way: sum(mauve_scores(wanted, read(tokens)).mean for tokens in samples) / len(samples)
        for way, samples in written.items()
    }
