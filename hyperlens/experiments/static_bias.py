"""Is it a static bias? The mean logit shift, injected into the base model (arXiv 2605.22579, 3.5).

The paper adds α times the mean shift of the 500 most promoted tokens to the base model's logits
and finds that text only gets worse (Table 2). Here placebos stand beside it, and so does the bias
that the hypothesis is about: the shift of all tokens, at α = 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import check_counts, check_seed
from ..decoding.diversity import REPETITION_METRICS
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import check_room, choose_prompts
from ..models.tokenizers import special_ids, token_names
from ..pair import Pair, open_inputs
from ..passes.contexts import Contexts, read_contexts
from ..statistics import significance
from ..statistics.distances import winner
from ..statistics.significance import trend
from .logit_shift import LogitBias, Shift, biases, check_alphas, mean_shift, promoted
from .static_bias_finding import BIASES, StaticBiasResult

# The paper's, and 1: where a tuned model that is base + bias would be met exactly.
ALPHAS = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
# So many of the most promoted tokens are named in the result.
NAMED = 30

Condition = tuple[str, float]
"""A bias ("none" for the base as it is, "tuned" for the tuned model) and its α."""


def inject_static_bias(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    k: int = 500,
    alphas: Sequence[float] = ALPHAS,
    n_prompts: int = 32,
    prompt_tokens: int = 32,
    max_new_tokens: int = 128,
    max_length: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> StaticBiasResult:
    """Table 2 of arXiv 2605.22579 for any pair, with placebos.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models.
        texts: what `compare_models` takes; the shift is measured, and agreement judged, on them.
        k: how many of the most promoted tokens get a bias; special tokens never do.
        alphas: strengths of the bias.
        n_prompts: how many texts, drawn at random, are continued greedily.
        prompt_tokens: how many of their first tokens are the prompt.
        max_new_tokens: how many are added to it; an end-of-text token is a token like any other.
        max_length: tokens per text.
        batch_size: texts or prompts per forward pass.
        seed: of the choice of prompts and of the placebos.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        HyperlensError: if a source cannot be opened, the texts do not fit the models, there is
            no room for the continuations, or an option makes no sense.
    """
    check_counts(k=k, batch_size=batch_size)
    check_seed(seed)
    strengths = check_alphas(alphas)
    opened = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    check_room(opened.pair, prompt_tokens, max_new_tokens)
    prompts = choose_prompts(opened.corpus, n_prompts, prompt_tokens, seed)
    contexts = read_contexts(
        opened.pair.base.hooked, opened.pair.tuned.hooked, opened.corpus, batch_size, progress
    )
    shift = mean_shift(contexts, progress)
    pair, d_vocab = opened.pair, contexts.d_vocab
    allowed = torch.ones(len(shift.delta), dtype=torch.bool)
    special = special_ids(pair.base.model, pair.tokenizer, d_vocab)
    allowed[[i for i in sorted(special) if i < len(allowed)]] = False
    chosen = promoted(shift.rank_gain, allowed, k)
    bias = biases(shift.delta, chosen, allowed, seed)
    conditions: dict[Condition, Tensor] = {
        (name, alpha): alpha * bias[name] for name in BIASES for alpha in strengths
    }
    units = _agreements(contexts, conditions, progress)
    continuing = GenerationRunner(prompts, max_new_tokens, batch_size, seed, progress)
    units |= dict(_repetitions(pair, conditions, continuing))
    options = {
        "k": k,
        "alphas": list(strengths),
        "n_prompts": len(prompts),
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "max_length": opened.corpus.max_length,
        "batch_size": batch_size,
    }
    meta = opened.metadata(seed=seed, options=options)
    meta["corpus"]["n_contexts"] = len(contexts)
    meta["notes"] += _notes(k, len(chosen), int(allowed.sum()), shift.rank_gain[chosen])
    return StaticBiasResult(
        table=tuple(_row(*key, values) for key, values in units.items()),
        extras={
            "static_share": shift.static_share,
            "gains": _gains(units, conditions),
            "trends": _trends(units, strengths),
            "k_used": len(chosen),
            "promoted": _named(pair.tokenizer, shift, chosen[:NAMED].tolist()),
        },
        meta=meta,
    )


Units = dict[tuple[str, float, str], list[float]]


def _agreements(
    contexts: Contexts, conditions: Mapping[Condition, Float[Tensor, " d_vocab"]], progress: bool
) -> Units:
    """Text by text, how often each condition's first token is the tuned model's, or the base's."""
    every: list[Condition] = [("none", 0.0), *conditions, ("tuned", 0.0)]
    metrics = ("agreement_tuned", "agreement_base")
    parts: dict[tuple[str, float, str], list[Tensor]] = {
        (*one, metric): [] for one in every for metric in metrics
    }
    for _, base, tuned in contexts.rows("agreement", progress):
        first = {"agreement_tuned": winner(tuned), "agreement_base": winner(base)}
        for one in every:
            logits = tuned if one[0] == "tuned" else base
            if one in conditions:
                logits = base + conditions[one].to(base)
            picked = winner(logits)
            for metric in metrics:
                parts[*one, metric].append((picked == first[metric]).double().cpu())
    return {key: contexts.per_text(torch.cat(values)) for key, values in parts.items()}


def _repetitions(
    pair: Pair,
    conditions: Mapping[Condition, Float[Tensor, " d_vocab"]],
    continuing: GenerationRunner,
) -> Iterator[tuple[tuple[str, float, str], list[float]]]:
    runs = {one: (pair.base, [LogitBias(bias)]) for one, bias in conditions.items()}
    runs |= {("none", 0.0): (pair.base, []), ("tuned", 0.0): (pair.tuned, [])}
    for one, (loaded, processors) in runs.items():
        made = continuing.run(loaded, processors)
        for metric in REPETITION_METRICS:
            yield (*one, metric), made.metrics[metric]


def _row(bias: str, alpha: float, metric: str, values: list[float]) -> dict[str, Any]:
    found = significance.estimate(values)
    return {"bias": bias, "alpha": alpha, "metric": metric} | found._asdict()


def _gains(units: Units, conditions: Mapping[Condition, Any]) -> list[dict[str, Any]]:
    """What each bias adds to the base's agreement with the tuned model, paired by text."""
    without = units["none", 0.0, "agreement_tuned"]
    return [
        {"bias": bias, "alpha": alpha}
        | significance.difference(units[bias, alpha, "agreement_tuned"], without)._asdict()
        for bias, alpha in conditions
    ]


def _trends(units: Units, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """Whether repetition goes one way with α, from the base itself (α = 0) on."""
    every = sorted([0.0, *alphas])
    found = []
    for bias in BIASES:
        for metric in REPETITION_METRICS:
            columns = [units[bias if alpha else "none", alpha, metric] for alpha in every]
            found.append({"bias": bias, "metric": metric} | trend(every, columns))
    return found


def _named(tokenizer: Any, shift: Shift, ids: list[int]) -> list[dict[str, Any]]:
    return [
        {"id": i, "token": token, "rank_gain": gain, "delta": delta}
        for i, token, gain, delta in zip(
            ids,
            token_names(tokenizer, ids),
            shift.rank_gain[ids].tolist(),
            shift.delta[ids].tolist(),
            strict=True,
        )
    ]


def _notes(k: int, used: int, allowed: int, gains: Float[Tensor, " k"]) -> list[str]:
    notes = ["δ is measured on the texts that agreement is judged on, which favours the bias"]
    if used < k:
        notes.append(
            f"K = {k} is more than the {allowed} tokens that are not special: all of them get a "
            "bias, and a random set of that size is the same set"
        )
    elif used > allowed / 2:
        notes.append(
            f"K = {k} is {used / allowed:.0%} of the {allowed} tokens that are not special: a "
            "random set of that size overlaps much with it"
        )
    fell = int((gains <= 0).sum())
    if fell:
        notes.append(f"{fell} of the {used} tokens with a bias did not rise on average")
    return notes
