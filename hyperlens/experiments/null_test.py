"""Is it real? The tuned model beside placebos: random changes of the same size.

Any change of the weights moves the residual stream, expands or shrinks its dimension and reorders
ranks. What tuning did is what it did beyond that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..checks import check_counts, check_seed
from ..decoding.diversity import REPETITION_METRICS
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import check_room, choose_prompts
from ..errors import PairError
from ..hooks.loading import LoadedModel, hook
from ..models.sources import OpenedModel
from ..models.weight_sharing import merged
from ..pair import Inputs, Pair, open_inputs
from ..passes.multi_pass import run_passes
from ..passes.streaming import PassOptions
from ..passes.streams import View
from ..probes import LogitLens, ParticipationRatio, Probe, RankReordering, ResidualDrift
from ..results.rows import Row
from ..statistics.significance import estimate
from .null_test_finding import NullTestResult
from .placebo import changed_tensors, placebo

VIEWS: tuple[View, ...] = ("raw", "final_norm")
MEASURED = {
    "drift": ("cosine", "relative_l2"),
    "participation_ratio": ("delta",),
    "rank_reordering": ("top1_agreement", "spearman", "rank_gt_10"),
    "logit_lens": ("kl",),
}
SINK_THRESHOLD = 10.0


def run_null_test(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    n_placebos: int = 3,
    max_length: int = 256,
    n_prompts: int = 16,
    prompt_tokens: int = 17,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> NullTestResult:
    """Measure the tuned model, and placebos whose weights changed as much but at random.

    A placebo is the base plus the tuned model's change with the entries of each tensor shuffled:
    the same norm and the same values in every tensor, without anything that was learned. With k
    placebos the smallest p value that a permutation test could give is 1 / (k + 1).

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; adapters are merged.
        texts: what `compare_models` takes; prompts are their first tokens.
        n_placebos: how many; one is held in memory at a time.
        max_length: tokens per text.
        n_prompts, prompt_tokens, max_new_tokens: of the greedy continuations.
        batch_size: texts per forward pass.
        seed: of the first placebo, of the choice of prompts and of the token sample; the other
            placebos count on from it.
        device, dtype: as in `compare_models`.
        progress: show a progress bar.

    Raises:
        PairError: if nothing changed, or the models have other weights.
        HyperlensError: if a source cannot be opened, or the texts do not fit the models.
    """
    check_counts(n_placebos=n_placebos, batch_size=batch_size)
    check_seed(seed)
    opened = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    check_room(opened.pair, prompt_tokens, max_new_tokens)
    prompts = choose_prompts(opened.corpus, n_prompts, prompt_tokens, seed)
    continuing = GenerationRunner(prompts, max_new_tokens, batch_size, seed, False)
    plain = merged(opened.pair.base.model)
    changes = changed_tensors(plain, merged(opened.pair.tuned.model))
    if not changes:
        raise PairError(
            "the two models have the same weights: there is no change to test against placebos"
        )
    options = PassOptions(batch_size, SINK_THRESHOLD, seed, False)
    measured = []
    bar = tqdm(total=n_placebos + 1, desc="null test", unit="model", disable=not progress)
    with bar:
        for model in _models(opened.pair, plain, changes, seed, n_placebos):
            measured.append(_measure(opened, model, options, continuing))
            bar.update()
    written = continuing.run(opened.pair.base)
    meta = opened.pair.describe() | {
        "seed": seed,
        "options": {
            "n_placebos": n_placebos,
            "max_length": max_length,
            "n_prompts": len(prompts),
            "prompt_tokens": prompt_tokens,
            "max_new_tokens": max_new_tokens,
        },
        "data": opened.corpus.describe(),
        "notes": list(opened.notes),
    }
    norms = {name: float(change.norm()) for name, change in changes.items()}
    extras = {
        "base": {metric: estimate(written.metrics[metric]).value for metric in REPETITION_METRICS},
        "changed_tensors": len(changes),
        "norm_of_change": math.sqrt(sum(norm**2 for norm in norms.values())),
        "placebo_seeds": list(range(seed, seed + n_placebos)),
    }
    return NullTestResult(tuple(_table(measured[0], measured[1:])), extras, meta)


Key = tuple[str, int, str]


def _models(
    pair: Pair, plain: Any, changes: dict[str, torch.Tensor], seed: int, n_placebos: int
) -> Iterator[LoadedModel]:
    """The tuned model, then the placebos, one at a time."""
    yield pair.tuned
    for number in range(n_placebos):
        model = placebo(plain, changes, seed + number)
        tokenizer = pair.base.tokenizer
        yield hook(OpenedModel(model, tokenizer, f"placebo {number}", "object"), "residual")


def _measure(
    opened: Inputs, model: LoadedModel, options: PassOptions, continuing: GenerationRunner
) -> dict[Key, float]:
    """Every statistic of one model against the base."""
    probes: list[Probe] = [
        ResidualDrift(),
        ParticipationRatio(views=VIEWS),
        RankReordering(),
        LogitLens(layers=(-1,)),
    ]
    outcome = run_passes(
        opened.pair.base.hooked, model.hooked, opened.corpus, probes, options
    ).results
    rows: Iterator[Row] = (row for result in outcome.values() for row in result.rows)
    found = {
        (row.metric, row.layer, row.view): row.value
        for row in rows
        if row.metric in MEASURED[row.probe] and row.view in VIEWS
    }
    last = opened.pair.base.hooked.cfg.n_layers
    written = continuing.run(model)
    return found | {
        (metric, last, "greedy text"): estimate(written.metrics[metric]).value
        for metric in REPETITION_METRICS
    }


def _table(
    tuned: dict[Key, float], placebos: Sequence[dict[Key, float]]
) -> Iterator[dict[str, Any]]:
    for (metric, layer, view), value in tuned.items():
        others = [found[metric, layer, view] for found in placebos]
        yield {
            "metric": metric,
            "layer": layer,
            "view": view,
            "tuned": value,
            "placebo_mean": sum(others) / len(others),
            "placebo_low": min(others),
            "placebo_high": max(others),
            "n_placebos": len(others),
        }
