"""One row of the cross-domain table: one pair of models on one corpus."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.corpus import Corpus
from ..decoding.diversity import REPETITION_METRICS
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import choose_prompts
from ..pair import Inputs
from ..passes.streaming import PassOptions, run_pass
from ..probes import ParticipationRatio, RankReordering
from ..statistics import significance
from .cross_domain_finding import READ
from .mauve_written import OwnTexts
from .text_features import Featurizer

SINK_THRESHOLD = 10.0


@dataclass(frozen=True)
class RowOptions:
    """What is the same for all rows: see `cross_domain`."""

    n_prompts: int
    prompt_tokens: int
    max_new_tokens: int
    max_length: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Prompts:
    """Beginnings of texts, and how the texts themselves go on (empty where nobody asks)."""

    starts: list[list[int]]
    rests: list[list[int]]


def prompts_of(corpus: Corpus, options: RowOptions, with_rests: bool) -> Prompts:
    """Draw the texts to be continued.

    Raises:
        CorpusError: if fewer than two texts are long enough.
    """
    cut = options.prompt_tokens
    length = cut + options.max_new_tokens if with_rests else cut
    drawn = choose_prompts(corpus, options.n_prompts, length, options.seed)
    return Prompts([one[:cut] for one in drawn], [one[cut:] for one in drawn])


def measure_row(
    opened: Inputs, prompts: Prompts, options: RowOptions, reader: Featurizer | None
) -> tuple[dict[str, Any], list[str]]:
    """Everything of the row but its two names, and notes on it.

    Args:
        opened: the pair, and the corpus as it reads it.
        prompts: what is continued; with rests if there is a reader.
        options: of all rows.
        reader: for MAUVE; None leaves it out (NaN).
    """
    pair = opened.pair
    continuing = GenerationRunner(
        prompts.starts, options.max_new_tokens, options.batch_size, options.seed, False
    )
    written = {"base": continuing.run(pair.base), "tuned": continuing.run(pair.tuned)}
    counts = opened.corpus.counts
    row: dict[str, Any] = {
        "n": len(prompts.starts),
        "n_texts": counts.n_sequences,
        "n_tokens": counts.n_tokens,
    }
    for metric in REPETITION_METRICS:
        base, tuned = (written[side].metrics[metric] for side in ("base", "tuned"))
        gap = significance.difference(tuned, base)
        row |= {
            f"{metric}_base": significance.estimate(base).value,
            f"{metric}_tuned": significance.estimate(tuned).value,
            f"{metric}_difference": gap.value,
            f"{metric}_low": gap.low,
            f"{metric}_high": gap.high,
            f"{metric}_p": significance.paired_p(tuned, base),
        }
    tokens = {side: made.tokens for side, made in written.items()}
    mauve, notes = _mauve(opened, prompts, tokens, reader)
    return row | _inside(opened, options) | mauve, notes


def _inside(opened: Inputs, options: RowOptions) -> dict[str, float]:
    """Teacher-forced, at the last layer: agreement, ρ and change of effective dimension."""
    found = run_pass(
        opened.pair.base.hooked,
        opened.pair.tuned.hooked,
        opened.corpus,
        [ParticipationRatio(views=("raw", "final_norm"), layers=(-1,)), RankReordering()],
        PassOptions(options.batch_size, SINK_THRESHOLD, options.seed, False),
    ).results
    rows = {(r.metric, r.view): r for result in found.values() for r in result.rows}
    row: dict[str, float] = {}
    for name, (metric, view) in READ.items():
        one = rows[metric, view]
        row |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
    return row


def _mauve(
    opened: Inputs,
    prompts: Prompts,
    written: Mapping[str, Sequence[Sequence[int]]],
    reader: Featurizer | None,
) -> tuple[dict[str, float], list[str]]:
    """How near each model's continuations are to the texts' own, and notes on what was read."""
    row = {f"mauve_{side}{end}": math.nan for side in written for end in ("", "_low", "_high")}
    if reader is None:
        return row, []
    tokenizer = opened.pair.tokenizer
    own = OwnTexts(reader, tokenizer, prompts.rests)
    for side, tokens in written.items():
        for scores in own.scores(side, [tokens]):
            row[f"mauve_{side}"] = scores.mean
            row[f"mauve_{side}_low"] = min(scores.values)
            row[f"mauve_{side}_high"] = max(scores.values)
    return row, own.notes
