"""Is it temperature? The base model at the tuned model's entropy (arXiv 2605.22579, section 3.2).

The paper's Table 1 sets three models side by side: the original, the original at the temperature
T* that gives it the tuned model's entropy, and the tuned one. Temperature keeps every rank, so the
greedy text of the second cannot differ from that of the first and proves nothing: a sampled
control stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..checks import check_counts, check_seed
from ..decoding.diversity import REPETITION_METRICS
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import check_room, choose_prompts
from ..pair import open_inputs
from ..passes.contexts import read_contexts
from ..statistics import significance
from .entropy_scaling import Units, describe_temperatures, find_scaling, teacher_forced
from .temperature_finding import TEACHER_FORCED, VARIANTS, TemperatureResult

# Who is tested against whom; the first is the paper's own test.
COMPARED = (("tuned", "matched"), ("matched", "original"))


def match_temperature(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    n_prompts: int = 32,
    prompt_tokens: int = 32,
    max_new_tokens: int = 128,
    max_length: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> TemperatureResult:
    """Table 1 of arXiv 2605.22579 for any pair, with the control that it lacks.

    Agreement with the base, ρ and entropy are teacher-forced, over every context of the texts;
    repetition is that of greedy and of sampled continuations of their first tokens, all of one
    length, because it depends on length (an end-of-text token is a token like any other).

    Args:
        base, tuned: what `compare_models` takes, but no hooked models.
        texts: what `compare_models` takes.
        n_prompts: how many texts, drawn at random, are continued.
        prompt_tokens: how many of their first tokens are the prompt.
        max_new_tokens: how many are added to it.
        max_length: tokens per text of the teacher-forced statistics.
        batch_size: texts or prompts per forward pass.
        seed: of the choice of prompts and of the sampled continuations.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        HyperlensError: if a source cannot be opened, the texts do not fit the models, or there
            is no room for the continuations.
    """
    check_counts(batch_size=batch_size)
    check_seed(seed)
    opened = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    check_room(opened.pair, prompt_tokens, max_new_tokens)
    prompts = choose_prompts(opened.corpus, n_prompts, prompt_tokens, seed)
    contexts = read_contexts(
        opened.pair.base.hooked, opened.pair.tuned.hooked, opened.corpus, batch_size, progress
    )
    scaling = find_scaling(contexts, progress)
    read = teacher_forced(contexts, scaling, progress)
    continuing = GenerationRunner(prompts, max_new_tokens, batch_size, seed, progress)
    generated = {
        (variant, decoding): continuing.run(
            opened.pair.tuned if variant == "tuned" else opened.pair.base,
            scaling.processors(variant),
            do_sample=decoding == "sampled",
        )
        for decoding in ("greedy", "sampled")
        for variant in VARIANTS
    }
    units = dict(read.units)
    for made, continued in generated.items():
        units |= {(*made, metric): continued.metrics[metric] for metric in REPETITION_METRICS}
    options = {
        "n_prompts": len(prompts),
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "max_length": contexts.corpus.max_length,
        "batch_size": batch_size,
    }
    meta = opened.metadata(seed=seed, options=options)
    meta["corpus"]["n_contexts"] = len(contexts)
    meta["notes"] += scaling.notes()
    greedy = {v: generated[v, "greedy"].tokens for v in VARIANTS}
    return TemperatureResult(
        table=tuple(_row(*key, values) for key, values in units.items()),
        extras={
            "temperature": describe_temperatures(scaling, read),
            "tied_contexts": read.tied,
            "changed_contexts": read.changed,
            "greedy_tokens_changed": {v: _changed(greedy[v], greedy["original"]) for v in VARIANTS},
            "greedy_tokens": sum(map(len, greedy["original"])),
            "tests": _tests(units),
        },
        meta=meta,
    )


def _row(variant: str, decoding: str, metric: str, values: list[float]) -> dict[str, Any]:
    found = significance.estimate(values)
    return {"variant": variant, "decoding": decoding, "metric": metric} | found._asdict()


def _tests(units: Units) -> list[dict[str, Any]]:
    """Paired and Welch tests of every comparison, each kind corrected over all of them (Holm).

    No p value where the outcome is given beforehand: it would only weigh down the others.
    """
    tests: list[dict[str, Any]] = []
    for decoding, metrics in (
        ("greedy", REPETITION_METRICS),
        ("sampled", REPETITION_METRICS),
        ("teacher-forced", TEACHER_FORCED),
    ):
        for first, second in COMPARED:
            for metric in metrics:
                a, b = (units[side, decoding, metric] for side in (first, second))
                tests.append(
                    {"decoding": decoding, "metric": metric, "first": first, "second": second}
                    | _compared(a, b, _is_given(decoding, metric, first))
                )
    for kind in ("paired_p", "welch_p"):
        tests = significance.holm_rows(tests, kind, f"{kind}_holm")
    return tests


def _is_given(decoding: str, metric: str, first: str) -> bool:
    """Whether a difference is 0 by construction.

    T* has the tuned model's mean entropy; and beside the original it keeps every rank, so that
    what depends on ranks alone differs by the rounding of logits at most.
    """
    if first == "tuned":
        return metric == "entropy"
    return decoding == "greedy" or metric in ("top1_agreement", "spearman")


def _compared(a: list[float], b: list[float], is_given: bool) -> dict[str, Any]:
    tests = {"paired_p": significance.paired_p, "welch_p": significance.welch_p}
    difference = {"difference": significance.difference(a, b)._asdict()}
    return difference | {kind: math.nan if is_given else p(a, b) for kind, p in tests.items()}


def _changed(tokens: Sequence[Sequence[int]], original: Sequence[Sequence[int]]) -> int:
    pairs = zip(tokens, original, strict=True)
    return sum(a != b for x, y in pairs for a, b in zip(x, y, strict=True))
