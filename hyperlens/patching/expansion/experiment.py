"""Is it the extra dimensions? Take the expansion away, or bring it about, and see what is decided.

arXiv 2605.22579 (section 4.2) finds that the last block's outputs spread over more directions
after tuning and calls that the mechanism. Here the spread itself is changed, and nothing else: the
outputs of one model's last block about their mean, before its own final norm and unembedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from ...checks import check_counts
from ...data.corpus import Corpus
from ...decoding.generate import GenerationRunner
from ...decoding.prompts import check_room, choose_prompts
from ...errors import CorpusError, PatchError
from ...pair import Pair, open_inputs
from ...passes.streaming import PassOptions, run_pass
from ...probes import ParticipationRatio
from ...statistics.significance import Estimate
from ..choosing import drawn, only, second_half
from ..hooks.generating import changing
from ..hooks.sites import Site
from ..spectrum import Cloud, participation
from .applying import Reading, change_of
from .finding import ExpansionResult
from .halves import FITTED, READ, SIDES, Halves
from .interventions import ADDING, REMOVING, Plan, plan, written_cells
from .rows import Found, Written, contrasts, draws, evidence, rows
from .verdict import Evidence, jointly, judge

SINK_THRESHOLD = 10.0
# A covariance from fewer tokens than this many times the width says little of its small axes.
FEWEST_TOKENS, FEW_TOKENS = 2, 10


def expansion(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    doses: Sequence[int] | None = None,
    n_random: int = 3,
    smallest_effect: float = 0.1,
    n_texts: int = 128,
    max_length: int = 256,
    n_prompts: int = 16,
    prompt_tokens: int = 17,
    max_new_tokens: int = 48,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> ExpansionResult:
    """Remove the expansion from the tuned model, add it to the base model, and read decisions.

    Half of the texts, drawn at random, are for means, covariances and directions only (without BOS
    and attention sinks); decisions, and the dimension that is left, are read on the other half,
    with the output of every token changed. Ways and controls are those of
    `hyperlens.patching.expansion.interventions`, the rules of the verdict those of
    `hyperlens.patching.expansion.verdict`.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models.
        texts: what `compare_models` takes.
        doses: how many of the base's directions are kept, and how many new ones removed; None for
            1, 2, 4, ... up to all. The dose that just undoes the expansion is always among them.
        n_random: random draws of every control.
        smallest_effect: of interest, as a share of the changed decisions.
        n_texts: how many texts are used, drawn at random.
        max_length: tokens per text.
        n_prompts, prompt_tokens, max_new_tokens: of the greedy continuations of texts of the
            second half, under a few of the changes; 0 new tokens writes none.
        batch_size: texts per forward pass; does not change the result.
        seed: of all draws.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        CorpusError: if there are too few texts, or too few tokens to fit directions on.
        PatchError: if a dose or the smallest effect makes no sense.
        ActivationError: if a model, or what a change makes of it, overflows.
        HyperlensError: if a source cannot be opened, or the texts do not fit the models.
    """
    check_counts(batch_size=batch_size, n_random=n_random, n_texts=n_texts)
    _check(doses, smallest_effect)
    opened = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    pair, corpus, notes = drawn(opened, n_texts, seed)
    is_read = second_half(corpus, seed)
    prompts: list[list[int]] = []
    if max_new_tokens:
        check_room(pair, prompt_tokens, max_new_tokens)
        prompts = choose_prompts(only(corpus, is_read), n_prompts, prompt_tokens, seed)
    options = PassOptions(batch_size, SINK_THRESHOLD, seed, progress)
    dimension, clouds = _spread(pair, corpus, is_read, options)
    planned = plan(clouds[FITTED]["base"], clouds[FITTED]["tuned"], doses, n_random, seed)
    means = {side: clouds[FITTED][side].mean for side in SIDES}
    second = only(corpus, is_read)
    reading = Reading(planned, means, len(second.sequences))
    run_pass(pair.base.hooked, pair.tuned.hooked, second, [reading], options)
    written: Written = {}
    if prompts:
        continuing = GenerationRunner(prompts, max_new_tokens, max(batch_size, 16), seed, False)
        written = _write(pair, planned, means, continuing, progress)
    found = Found(planned, reading.outcomes(), clouds[FITTED], clouds[READ], written)
    meta = pair.describe() | {
        "seed": seed,
        "options": {
            "doses": None if doses is None else list(doses),
            "n_random": n_random,
            "smallest_effect": smallest_effect,
            "n_texts": len(corpus.sequences),
            "max_length": max_length,
            "n_prompts": len(prompts),
            "prompt_tokens": prompt_tokens,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
        },
        "data": corpus.describe(),
        "notes": [*notes, *_notes(clouds[FITTED]["base"], planned)],
    }
    extras = _extras(found, dimension, smallest_effect) | {
        "texts": {"fitted": int((~is_read).sum()), "read": int(is_read.sum())},
        "tokens": {"fitted": clouds[FITTED]["base"].n, "read": clouds[READ]["base"].n},
    }
    return ExpansionResult(tuple(rows(found)), extras, meta)


def _spread(
    pair: Pair, corpus: Corpus, is_read: Bool[Tensor, " text"], options: PassOptions
) -> tuple[dict[str, Estimate], dict[int, dict[Any, Cloud]]]:
    """Both models' dimension over all texts, as `compare_models` has it, and clouds of each half.

    Raises:
        CorpusError: if the first half has too few tokens for a covariance.
    """
    probe = ParticipationRatio(views=("raw",), layers=(-1,))
    halves = Halves(is_read)
    result = run_pass(pair.base.hooked, pair.tuned.hooked, corpus, [probe, halves], options)
    dimension = {
        row.metric: Estimate(row.value, row.low, row.high, float("nan"), row.n)
        for row in result.results[probe.name].rows
        if row.metric in ("base", "tuned", "delta")
    }
    clouds = {half: {side: halves.cloud(half, side) for side in SIDES} for half in (FITTED, READ)}
    n, d = clouds[FITTED]["base"].n, pair.base.hooked.cfg.d_model
    if n < FEWEST_TOKENS * d:
        raise CorpusError(
            f"half of the texts have {n} tokens, and a covariance of {d} directions needs "
            f"{FEWEST_TOKENS * d} at least: give more or longer texts, or raise n_texts or "
            "max_length"
        )
    return dimension, clouds


def _extras(
    found: Found, dimension: Mapping[str, Estimate], smallest_effect: float
) -> dict[str, Any]:
    unchanged = found.outcomes["base"]
    n_changed = int(unchanged.changed.sum())
    needed, enough = (
        jointly({way: evidence(found, way) for way in ways}) for ways in (REMOVING, ADDING)
    )
    verdict = judge(
        dimension["delta"],
        dimension["base"].value,
        n_changed,
        needed,
        enough,
        smallest_effect,
    )
    clouds = {"fitted": found.fitted, "read": found.read}
    return {
        "decisions": int(unchanged.decisions.sum()),
        "changed": n_changed,
        "dimension": {name: one._asdict() for name, one in dimension.items()},
        "naive": {
            half: {side: participation(cloud.covariance) for side, cloud in both.items()}
            for half, both in clouds.items()
        },
        "matched": dict(found.planned.matched),
        "evidence": {way: _as_row(one) for way, one in {**needed, **enough}.items()},
        "verdict": asdict(verdict),
        "contrasts": list(contrasts(found)),
        "draws": list(draws(found)),
    }


def _as_row(one: Evidence) -> dict[str, Any]:
    return {
        "moved": one.moved,
        "effects": {name: effect._asdict() for name, effect in one.effects.items()},
        "least": dict(one.least),
        "room": one.room._asdict(),
    }


def _write(
    pair: Pair,
    planned: Plan,
    means: Mapping[Any, Tensor],
    continuing: GenerationRunner,
    progress: bool,
) -> Written:
    """Repetition of what is written under some of the changes, and by both models as they are."""
    cells = written_cells(planned)
    loaded = {"base": pair.base, "tuned": pair.tuned}
    site = Site("resid_post", pair.base.hooked.cfg.n_layers - 1)
    written: Written = {}
    with tqdm(total=len(cells) + 2, desc="writing", unit="model", disable=not progress) as bar:
        for side, one in loaded.items():
            written[side] = continuing.run(one).metrics
            bar.update()
        for cell in cells:
            one = loaded[cell.side]
            change = change_of(planned, cell, means[cell.side], one.hooked.cfg.device)
            with changing(one.model, site, change):
                written[cell] = continuing.run(one).metrics
            bar.update()
    return written


def _check(doses: Any, smallest_effect: Any) -> None:
    if doses is not None:
        if not isinstance(doses, list | tuple | range) or not doses:
            raise PatchError(f"expected doses as a list of numbers of directions, got {doses!r}")
        check_counts(**{f"doses[{i}]": dose for i, dose in enumerate(doses)})
    if not 0 < smallest_effect < 1:
        raise PatchError(
            "expected the smallest effect of interest as a share between 0 and 1, got "
            f"{smallest_effect}"
        )


def _notes(fitted: Cloud, planned: Plan) -> Iterator[str]:
    d = len(fitted.mean)
    if fitted.n < FEW_TOKENS * d:
        yield (
            f"directions are fitted on {fitted.n} tokens, for {d} of them: the spectra look "
            "steeper than they are, and small directions are not known well"
        )
    for side, count in planned.empty.items():
        if count:
            yield (
                f"{count} of the {side} model's {d} directions have (nearly) no variance and are "
                "left as they are where its spectrum is changed"
            )
    if planned.matched["new_directions"] is None:
        yield (
            "no number of the directions that grew most brings the tuned model's dimension down "
            "to the base model's when they are removed: that way is not judged"
        )
