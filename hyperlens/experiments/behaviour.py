"""Did behaviour change? Both models continue the same prompts (arXiv 2605.22579, section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..checks import check_counts, check_seed, check_types
from ..decoding.diversity import (
    MEASURES,
    distinct,
    is_ttr_again,
    repetition,
    type_token_ratio,
    words,
)
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import (
    choose_examples,
    lengths_in_words,
    open_prompts,
    opening_and_texts,
    prompt_lengths,
)
from ..errors import CorpusError
from ..hooks.loading import LoadedModel
from ..models.tokenizers import token_names
from ..pair import Pair
from ..passes.contexts import ranks_in
from ..render.blocks import (
    Axis,
    Block,
    Chart,
    Details,
    Heading,
    Role,
    Sample,
    Samples,
    Table,
    Text,
    Verdict,
)
from ..render.format import FRACTION, SIGNED_FRACTION, count, ends, interval, p_value
from ..results.result import Result
from ..statistics import significance

EXAMPLES = (
    "hyperlens behaviour ./base ./tuned --texts held_out.txt --out behaviour",
    "hyperlens behaviour ./base ./tuned --texts held_out.txt --strategies greedy --n-prompts 100",
)

STRATEGIES = {"greedy": False, "sample": True}
# Of words, where there is a tokenizer to write them: what does not depend on how words are cut.
WORD_MEASURES: Mapping[str, Callable[[Sequence[str]], float]] = {
    "word_ttr": type_token_ratio,
    "word_rep_2": lambda items: repetition(items, 2),
    "word_rep_3": lambda items: repetition(items, 3),
}
# Lengths of n-grams that are counted over all continuations together.
DISTINCT = (1, 2, 3)


@check_types
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
    """How diverse is what both models write, and how much does it repeat itself?

    Every continuation has `max_new_tokens` tokens, an end-of-text token being one like any other:
    measures of repetition depend on length. Greedy takes the most likely token; sampling is at
    temperature 1 from the whole vocabulary.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models.
        texts: what `compare_models` takes; their first tokens are the prompts.
        n_prompts: how many texts, drawn at random, are continued.
        prompt_tokens: how many of their first tokens are the prompt, BOS included; of
            conversations all before the assistant's last turn is.
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
    inputs, prompts = open_prompts(
        base,
        tuned,
        texts,
        n_prompts=n_prompts,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    pair = inputs.pair
    tokenizer = pair.tokenizer
    continuing = GenerationRunner(prompts, max_new_tokens, batch_size, seed, progress)
    table: list[dict[str, Any]] = []
    distinct_shares: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    for strategy in strategies:
        written = {
            side: continuing.run(loaded, do_sample=STRATEGIES[strategy]).tokens
            for side, loaded in _sides(pair).items()
        }
        table += _rows(strategy, written, tokenizer)
        distinct_shares += _distinct_shares(strategy, written)
        examples += [
            _example(pair, tokenizer, strategy, prompts[i], {s: w[i] for s, w in written.items()})
            for i in choose_examples(len(prompts), n_examples, seed)
        ]
    meta = inputs.metadata(
        seed=seed,
        options={
            "n_prompts": len(prompts),
            "prompt_tokens": prompt_lengths(inputs.corpus, prompts, prompt_tokens),
            "max_new_tokens": max_new_tokens,
            "strategies": list(strategies),
        },
    )
    extras = {"distinct": distinct_shares, "examples": examples}
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


def _distinct_shares(
    strategy: str, written: Mapping[str, list[list[int]]]
) -> Iterator[dict[str, Any]]:
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
            "base_rank": ranks,
            "base_top1": token_names(tokenizer, top1),
        }
        for (side, tokens), text in zip(written.items(), texts, strict=True)
        for ranks, top1 in [ranks_in(pair.base.hooked, prompt, tokens)]
    }
    return {"strategy": strategy, "prompt": opening, **sides}


WORDS = {
    "ttr": "type-token ratio (TTR)",
    "windowed_ttr": "TTR, windows of 50",
    "rep_2": "repeated bigrams",
    "rep_3": "repeated trigrams",
    "loop": "share taken by the longest loop",
    "word_ttr": "TTR of words",
    "word_rep_2": "repeated bigrams of words",
    "word_rep_3": "repeated trigrams of words",
}
DECODED = {"greedy": "Greedy decoding", "sample": "Sampling at temperature 1"}
# Examples shown at once; the others are folded away.
SHOWN = 2


class BehaviourResult(Result):
    """How diverse the continuations of both models are.

    The table has a row per strategy ("greedy", "sample"), model ("base", "tuned" and their paired
    "difference") and metric; values are means over prompts, p is Holm-corrected.

    Extras: `distinct`, the share of distinct n-grams (n = 1, 2, 3) over all continuations of a
    model together, which also tells how much they resemble each other; `examples`, with strategy,
    prompt, and for "base" and "tuned" the text, the tokens and the base model's rank of each of
    them (1 = what greedy decoding of the base would take).
    """

    name: ClassVar[str] = "behaviour"
    title: ClassVar[str] = "Did behaviour change?"
    columns: ClassVar[tuple[str, ...]] = (
        *("strategy", "model", "metric"),
        *("value", "low", "high", "se", "n", "p"),
    )

    @property
    def strategies(self) -> list[str]:
        """The strategies that were measured."""
        return list(dict.fromkeys(row["strategy"] for row in self.table))

    @property
    def metrics(self) -> list[str]:
        """The metrics that were measured."""
        return list(dict.fromkeys(row["metric"] for row in self.table))

    def distinct(self, strategy: str, model: str) -> dict[int, float]:
        """n to the share of distinct n-grams over all continuations of a model together."""
        rows: list[Mapping[str, Any]] = self.extras.get("distinct", [])
        return {
            row["n"]: row["value"]
            for row in rows
            if (row["strategy"], row["model"]) == (strategy, model)
        }

    def verdicts(self) -> list[Verdict]:
        """Whether diversity differs, for each strategy."""
        found = [self._verdict(strategy) for strategy in self.strategies]
        return [
            *found,
            Verdict("quality", "Diversity is not quality: read the texts.", caution=True),
        ]

    def _verdict(self, strategy: str) -> Verdict:
        base, tuned, change = (
            self.at(strategy=strategy, model=model, metric="ttr")
            for model in ("base", "tuned", "difference")
        )
        values = (
            f"TTR {interval(tuned, FRACTION)}, base {FRACTION(base['value'])}"
            f"{', ' * bool(p_value(change['p']))}{p_value(change['p'])}"
        )
        if change["low"] == change["high"] == 0:
            answer = f"both models are equally diverse on every prompt ({values})"
        elif math.isnan(change["low"]):
            answer = f"so few prompts cannot tell whether diversity differs ({values})"
        elif change["p"] < 0.05:
            direction = "more" if change["value"] > 0 else "less"
            answer = f"the tuned model's text is {direction} diverse than the base's ({values})"
        else:
            answer = f"no clear difference in diversity ({values})"
        return Verdict("behaviour", f"{DECODED[strategy]}: {answer}.")

    def evidence(self) -> list[Block]:
        """Every measure of both models for each strategy, then texts side by side."""
        options = self.meta["options"]
        written = Text(
            f"Each model continued {count(options['n_prompts'], 'prompt')} of "
            f"{lengths_in_words(options['prompt_tokens'])} by {options['max_new_tokens']} tokens. "
            "TTR: distinct tokens / tokens, 1 repeats nothing. Repeated n-grams: the share that "
            "occurred before. Longest loop: the share of a text that only repeats itself."
        )
        blocks: list[Block] = [written]
        for strategy in self.strategies:
            blocks += [
                Heading(DECODED[strategy]),
                self._measures(strategy),
                self._chart(strategy),
                *self._distinct(strategy),
            ]
        return [*blocks, *self._texts()]

    def _measures(self, strategy: str) -> Table:
        rows = []
        for metric in self.metrics:
            base, tuned, change = (
                self.at(strategy=strategy, model=model, metric=metric)
                for model in ("base", "tuned", "difference")
            )
            cells = (interval(base, FRACTION), interval(tuned, FRACTION))
            change_cell = f"{interval(change, SIGNED_FRACTION)} {p_value(change['p'])}".rstrip()
            rows.append([WORDS[metric], *cells, change_cell])
        return Table(
            ["mean over prompts [95%]", self.base_name, self.tuned_name, "tuned - base, paired"],
            rows,
            "p: paired t test over prompts, Holm-corrected over all measures; an interval is not "
            "corrected, so it can exclude 0 where p is above 0.05",
            joins=True,
        )

    def _chart(self, strategy: str) -> Chart:
        rows = [
            {
                "series": name,
                "measure": WORDS[metric],
                **ends(row),
                "prompts": row["n"],
            }
            for model, name in (("base", self.base_name), ("tuned", self.tuned_name))
            for metric in self.metrics
            for row in [self.at(strategy=strategy, model=model, metric=metric)]
        ]
        title = f"{DECODED[strategy]}: mean over prompts, 95% intervals"
        roles: dict[str, Role] = {self.base_name: "base", self.tuned_name: "tuned"}
        x, y = Axis("value", "0 to 1, no unit", "share"), Axis("measure", "", is_category=True)
        return Chart("dots", title, f"{title}, of both models", rows, x, y, roles)

    def _distinct(self, strategy: str) -> list[Block]:
        """One number for all continuations of a model: how much they resemble each other, too."""
        sides = [self.distinct(strategy, model) for model in ("base", "tuned")]
        rows = [[f"n = {n}", *(FRACTION(side[n]) for side in sides)] for n in sides[0]]
        if not rows:
            return []
        head = ["distinct n-grams / n-grams", self.base_name, self.tuned_name]
        caption = "over all continuations together; falls with their number"
        return [
            Details("distinct n-grams over all prompts", [Table(head, rows, caption, joins=True)])
        ]

    def _texts(self) -> list[Block]:
        """The greedy examples, or all of them if nothing was written greedily."""
        every = self.extras.get("examples", [])
        chosen = [one for one in every if one["strategy"] == "greedy"] or every
        if not chosen:
            return []
        samples: list[Block] = [self._sample(one) for one in chosen]
        about = Text(
            "The same prompts continued by each model, drawn at random. The darker a token, the "
            "lower the base model ranked it in its place; without colour is what its own greedy "
            "decoding would take."
        )
        more = [Details(f"{len(samples) - SHOWN} more", samples[SHOWN:])] if samples[SHOWN:] else []
        return [Heading("The texts"), about, *samples[:SHOWN], *more]

    def _sample(self, example: Mapping[str, Any]) -> Samples:
        texts = [
            Sample(
                f"{name}, {example['strategy']}",
                example[side]["text"],
                example[side]["tokens"],
                example[side]["base_rank"],
                example[side].get("base_top1", ()),
            )
            for side, name in (("base", self.base_name), ("tuned", self.tuned_name))
        ]
        return Samples(example["prompt"], texts)
