"""Would another way of decoding do as well? (arXiv 2605.22579, section 6 and Table 7)

The tuned model generates greedily; its base by methods that need no training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from ..checks import check_counts, check_seed, check_types
from ..decoding.contrastive import Adaptive, adaptive_contrastive_search
from ..decoding.diversity import MEASURES, distinct_by_text, is_ttr_again
from ..decoding.generate import check_sampling, continuations, keeping_continuations
from ..decoding.guard import Guard
from ..decoding.prompts import (
    batch_size_for,
    check_room,
    choose_examples,
    choose_openings,
    eos_ids,
    lengths_in_words,
    opening_and_texts,
    prompt_lengths,
)
from ..errors import DecodingError
from ..hooks.loading import LoadedModel
from ..pair import Inputs, Pair, open_inputs
from ..render.blocks import (
    Axis,
    Block,
    Chart,
    Details,
    Grid,
    Reference,
    Role,
    Sample,
    Samples,
    Table,
    Text,
    Verdict,
)
from ..render.format import (
    FRACTION,
    NUMBER,
    SIGNED,
    SIGNED_FRACTION,
    Form,
    count,
    ends,
    interval,
    p_value,
)
from ..results.result import Result, only
from ..statistics import significance
from .mauve import (
    SEEDS,
    ReferenceTexts,
    check_has_tokenizer,
    check_mauve,
    few_texts_notes,
    open_featurizer,
)

EXAMPLES = (
    "hyperlens decoding ./base ./tuned --texts held_out.txt --n-samples 5 --out decoding",
    "hyperlens decoding ./base ./tuned --texts t.txt --methods greedy,min_p --min-p 0.05",
)

Tokens = Sequence[Sequence[int]]
Condition = tuple[str, str]
"""A model ("base" or "tuned") and its method of decoding."""


class Method(NamedTuple):
    """A method of decoding.

    Attributes:
        words: its name in texts.
        deterministic: whether the same prompt always gives the same text.
        symbol: of its parameter, if it has one.
    """

    words: str
    deterministic: bool
    symbol: str = ""


METHODS: Mapping[str, Method] = {
    "greedy": Method("greedy", True),
    "temperature": Method("temperature", False, "T"),
    "top_p": Method("top-p", False, "p"),
    "min_p": Method("min-p", False, "p"),
    "guard": Method("GUARD", False, "w"),
    "contrastive": Method("adaptive contrastive", True, "q"),
}
# What every method is compared with.
REFERENCE: Condition = ("tuned", "greedy")


@check_types
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
    """Would another way of decoding the base do as well as the tuned model's greedy text?

    The base model generates by several methods that need no training, the tuned model greedily,
    after the same prompts.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; or an open `Pair` and the
            texts.
        texts: what `compare_models` takes; their first tokens are the prompts.
        methods: how the base model is decoded: "greedy", "temperature", "top_p", "min_p", "guard"
            (Ding et al. 2025), "contrastive" (adaptive contrastive search, arXiv 2407.18698). The
            tuned model decodes greedily.
        temperature: of the method of this name; our choice. The other methods sample at 1, our
            choice as well.
        top_p: of nucleus sampling; our choice.
        min_p: of min-p sampling; the paper's choice.
        guard_window: of GUARD; the paper's choice.
        contrastive_q: of adaptive contrastive search; its authors' choice.
        n_prompts: how many texts, drawn at random, are continued.
        prompt_tokens: how many of their first tokens are the prompt, BOS included; of
            conversations all before the assistant's last turn is.
        max_new_tokens: how many are added to it.
        n_samples: how often the methods that sample are run, with seeds from `seed` on.
        stop_at_eos: end at an end of text. Otherwise it is a token like any other, and all
            continuations are of one length: measures of repetition depend on length.
        mauve_features: a model that reads texts, for MAUVE between continuations and the texts' own
            ones, as many tokens long; only texts that long are continued then. Without it there is
            no MAUVE.
        n_examples: how many prompts, drawn at random, are kept as text, with what every method
            generated.
        batch_size: prompts per forward pass; adaptive contrastive search has up to 15 times as many
            rows.
        seed: of the choice of prompts and examples, and of sampling.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Returns:
        A `DecodingResult`: mean and interval over prompts of every measure, and the difference to
        the tuned model's greedy text, paired by prompt, with Holm-corrected p values.

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
    n_own_tokens = 0 if mauve_features is None else max_new_tokens
    if mauve_features is not None:
        check_mauve(mauve_features)
    inputs = open_inputs(
        base,
        tuned,
        texts,
        max_length=max(prompt_tokens + n_own_tokens, 2),
        only_prompts=True,
        device=device,
        dtype=dtype,
    )
    pair = inputs.pair
    check_room(pair, prompt_tokens, max_new_tokens)
    openings = choose_openings(
        inputs.corpus,
        n_prompts,
        prompt_tokens,
        seed,
        n_after=n_own_tokens,
        max_new_tokens=max_new_tokens,
    )
    prompts = [one.prompt for one in openings]
    if mauve_features is not None:
        check_has_tokenizer(pair.tokenizer)
    runner = MethodRunner(prompts, parameters, max_new_tokens, batch_size, stop_at_eos, progress)
    seeds = range(seed, seed + n_samples)
    generated = {("base", method): runner.run(pair.base, method, seeds) for method in methods}
    generated[REFERENCE] = runner.run(pair.tuned, "greedy", seeds)
    options = {
        "methods": list(methods),
        "parameters": {name: parameters[name] for name in methods if name in parameters},
        "n_prompts": len(prompts),
        "prompt_tokens": prompt_lengths(inputs.corpus, prompts, prompt_tokens),
        "max_new_tokens": max_new_tokens,
        "n_samples": n_samples,
        "stop_at_eos": stop_at_eos,
    }
    meta = inputs.metadata(seed=seed, options=options)
    mauve: dict[Condition, float] = {}
    if mauve_features is not None:
        reader = open_featurizer(mauve_features, batch_size=batch_size, device=device, dtype=dtype)
        own = [one.after for one in openings]
        reference = ReferenceTexts(reader, pair.tokenizer, own)
        mauve = _mauve(reference, generated)
        meta["mauve"] = reader.describe() | {"seeds": list(SEEDS)}
        meta["notes"] += [*reference.notes, *few_texts_notes(len(openings))]
    chosen = choose_examples(len(prompts), n_examples, seed)
    extras = {
        "methods": _method_facts(generated, parameters),
        "examples": [_example(pair, prompts[i], generated, i) for i in chosen],
    }
    return DecodingResult(tuple(_rows(_values(inputs, generated), mauve)), extras, meta)


def check_methods(methods: Sequence[str], parameters: Mapping[str, Any]) -> None:
    """Raise unless all methods are known and their parameters in range.

    Raises:
        DecodingError: saying what is possible.
    """
    names = list(methods)
    known = not isinstance(methods, str) and set(names) <= METHODS.keys()
    if not names or len(set(names)) < len(names) or not known:
        raise DecodingError(
            f"methods must be some of {', '.join(METHODS)}, as a list with each once at most; got "
            f"{methods!r}"
        )
    check_sampling(**{name: parameters[name] for name in ("temperature", "top_p", "min_p")})
    Guard(parameters["guard"])
    Adaptive(parameters["contrastive"])


class Generated(NamedTuple):
    """New token ids per prompt, run by run, and the mean seconds of a run."""

    samples: list[list[list[int]]]
    seconds: float


@dataclass(frozen=True)
class MethodRunner:
    """The same prompts and options for every method of decoding.

    Attributes:
        prompts: token ids; those of conversations are of several lengths.
        parameters: of every method that has one.
        max_new_tokens: how many are added at most.
        batch_size: prompts per forward pass.
        stop_at_eos: end at an end of text, or go on through it.
        progress: show progress bars.
    """

    prompts: list[list[int]]
    parameters: Mapping[str, float]
    max_new_tokens: int
    batch_size: int
    stop_at_eos: bool
    progress: bool

    def run(self, loaded: LoadedModel, method: str, seeds: Sequence[int]) -> Generated:
        """Continue every prompt, once per seed; once where no seed matters."""
        runs = seeds[:1] if METHODS[method].deterministic else seeds
        # The first call of a process takes longer, whatever it does.
        model, tokenizer = loaded.model, loaded.tokenizer
        continuations(model, tokenizer, self.prompts[:1], max_new_tokens=1, progress=False)
        with keeping_continuations(None):
            start = time.perf_counter()
            samples = [self._once(loaded, method, seed) for seed in runs]
        return Generated(samples, (time.perf_counter() - start) / len(runs))

    def _once(self, loaded: LoadedModel, method: str, seed: int) -> list[list[int]]:
        model, tokenizer = loaded.model, loaded.tokenizer
        size = batch_size_for(loaded, self.prompts, self.batch_size)
        if method == "guard" and len({len(prompt) for prompt in self.prompts}) > 1:
            size = 1  # it would count pads as text
        common: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "batch_size": size,
            "stop_at_eos": self.stop_at_eos,
            "progress": self.progress,
        }
        if method == "contrastive":
            q = self.parameters[method]
            return adaptive_contrastive_search(model, tokenizer, self.prompts, q=q, **common)
        common |= self._sampling(method) | {"seed": seed}
        return continuations(model, tokenizer, self.prompts, **common)

    def _sampling(self, method: str) -> dict[str, Any]:
        """What is not greedy; top-p, min-p and GUARD sample at temperature 1."""
        if method == "greedy":
            return {}
        value = self.parameters[method]
        if method == "guard":
            return {"do_sample": True, "logits_processors": [Guard(int(value))]}
        return {"do_sample": True, method: value}


def _mauve(
    reference: ReferenceTexts, generated: Mapping[Condition, Generated]
) -> dict[Condition, float]:
    """Of every condition, the mean over samples and seeds; NaN where it is unknown."""
    means = {}
    for (model, method), of_one in generated.items():
        scores = reference.scores(f"{model}, {METHODS[method].words}", of_one.samples)
        means[model, method] = significance.estimate([score.mean for score in scores]).value
    return means


def _method_facts(
    generated: Mapping[Condition, Generated], parameters: Mapping[str, float]
) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "method": method,
            "parameter": float(parameters.get(method, math.nan)),
            "n_samples": len(of_one.samples),
            "seconds": of_one.seconds,
        }
        for (model, method), of_one in generated.items()
    ]


def _example(
    pair: Pair, prompt: Sequence[int], generated: Mapping[Condition, Generated], i: int
) -> dict[str, Any]:
    """Prompt number `i`, and what every condition generated after it in its first sample."""
    tokens = [of_one.samples[0][i] for of_one in generated.values()]
    opening, texts = opening_and_texts(pair.tokenizer, prompt, tokens)
    return {
        "prompt": opening,
        "texts": [
            {"model": model, "method": method, "text": text}
            for (model, method), text in zip(generated, texts, strict=True)
        ],
    }


Values = Mapping[str, Sequence[float]]
"""Measure to its value for every prompt."""


def _values(
    inputs: Inputs, generated: Mapping[Condition, Generated]
) -> dict[Condition, dict[str, list[float]]]:
    """Every measure of every prompt, the mean over its samples, for each condition."""
    pair = inputs.pair
    # Each model's own ends: a chat model has others than its base.
    eos = {
        side: eos_ids(loaded.model, loaded.tokenizer or pair.tokenizer)
        for side, loaded in (("base", pair.base), ("tuned", pair.tuned))
    }
    return {key: _measured(of_one.samples, eos[key[0]]) for key, of_one in generated.items()}


def _measured(samples: Sequence[Tokens], eos: Collection[int]) -> dict[str, list[float]]:
    by_sample = [
        {name: [measure(ids) for ids in tokens] for name, measure in MEASURES.items()}
        | {
            "distinct_2": distinct_by_text(tokens, 2),
            "length": [float(_length(ids, eos)) for ids in tokens],
        }
        for tokens in samples
    ]
    return {
        metric: [_mean(values) for values in zip(*(one[metric] for one in by_sample), strict=True)]
        for metric in by_sample[0]
    }


def _length(tokens: Sequence[int], eos: Collection[int]) -> int:
    """How many tokens stand before the first end of text."""
    return next((place for place, token in enumerate(tokens) if token in eos), len(tokens))


def _mean(values: Sequence[float]) -> float:
    """Of those that exist: a sample without any token has no measure of repetition."""
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _rows(
    values: Mapping[Condition, Values], mauve: Mapping[Condition, float]
) -> list[dict[str, Any]]:
    """The table: means, differences to the reference paired by prompt, corrected p values."""
    reference = values[REFERENCE]
    table = []
    for condition, of_one in values.items():
        for metric, by_prompt in of_one.items():
            gap, p = _without_interval(math.nan, 0), math.nan
            if condition != REFERENCE:
                gap = significance.difference(by_prompt, reference[metric])
                # What is the same test twice counts once in Holm's correction.
                if not is_ttr_again(metric, of_one, reference):
                    p = significance.paired_p(by_prompt, reference[metric])
            table.append(_row(condition, metric, significance.estimate(by_prompt), gap, p))
        if condition in mauve:
            n = len(of_one["ttr"])
            value = _without_interval(mauve[condition], n)
            gap = _without_interval(mauve[condition] - mauve[REFERENCE], n)
            table.append(_row(condition, "mauve", value, gap, math.nan))
    return significance.holm_rows(table)


def _without_interval(value: float, n: int) -> significance.Estimate:
    return significance.Estimate(value, math.nan, math.nan, math.nan, n)


def _row(
    condition: Condition,
    metric: str,
    value: significance.Estimate,
    gap: significance.Estimate,
    p: float,
) -> dict[str, Any]:
    model, method = condition
    return {
        "model": model,
        "method": method,
        "deterministic": METHODS[method].deterministic,
        "metric": metric,
        **value._asdict(),
        "difference": gap.value,
        "difference_low": gap.low,
        "difference_high": gap.high,
        "p": p,
    }


WORDS = {
    "ttr": "TTR",
    "windowed_ttr": "TTR, windows of 50",
    "rep_2": "repeated bigrams",
    "rep_3": "repeated trigrams",
    "loop": "longest loop",
    "distinct_2": "distinct bigrams, all texts",
    "length": "tokens before the end",
    "mauve": "MAUVE",
}
# The measures that the verdicts are about, and whether a higher value is more diverse.
TESTED = {"ttr": True, "rep_2": False}
SIDES = ("more diverse", "less diverse", "not clearly different", "unclear")
DRAWN = {"ttr": "TTR", "rep_2": "repeated bigrams, a share", "loop": "longest loop, a share"}


class DecodingResult(Result):
    """The base model under several methods of decoding, and the tuned one under greedy decoding.

    The table has a row per model ("base", "tuned"), method and metric. `value` is the mean over
    prompts (over their samples first, where a method was sampled several times), `low` to `high`
    its 95% interval, `se` its standard error; `difference` to `difference_high` is the method minus
    the tuned model's greedy decoding, paired by prompt, and `p` of the paired t test,
    Holm-corrected over the table. `distinct_2` is of all texts together, its interval by the
    jackknife. `mauve`, if asked for, has no interval.

    Extras: `methods`, with each method's parameter and the seconds that one text per prompt took;
    `examples`, prompts with what every method generated.
    """

    name: ClassVar[str] = "decoding"
    title: ClassVar[str] = "Would another way of decoding do as well?"
    columns: ClassVar[tuple[str, ...]] = (
        *("model", "method", "deterministic", "metric", "value", "low", "high", "se", "n"),
        *("difference", "difference_low", "difference_high", "p"),
    )

    @property
    def conditions(self) -> list[Condition]:
        """(model, method), in order; the tuned model's greedy decoding is the last."""
        return list(dict.fromkeys((row["model"], row["method"]) for row in self.table))

    @property
    def metrics(self) -> list[str]:
        """The metrics that were measured."""
        return list(dict.fromkeys(row["metric"] for row in self.table))

    def about(self, model: str, method: str) -> Mapping[str, Any]:
        """Parameter, number of samples and seconds of one method.

        Raises:
            ResultsError: if it was not run.
        """
        return only("method", self.extras["methods"], {"model": model, "method": method})

    def verdicts(self) -> list[Verdict]:
        """On which side of the tuned model's greedy text each method is."""
        caution = (
            "Diversity is not quality: read the texts. A method's numbers are those of its "
            "parameters; with others they differ."
        )
        return [*map(self._verdict, TESTED), Verdict("quality", caution, caution=True)]

    def _verdict(self, metric: str) -> Verdict:
        sides = self._sides(metric)
        if sides["more diverse"]:
            lead = "Yes"
        elif sides["unclear"]:
            lead = "Too few texts to tell"
        else:
            lead = "Not clearly" if sides["not clearly different"] else "No"
        answers = "; ".join(f"{side} with {', '.join(of)}" for side, of in sides.items() if of)
        tuned = interval(self._row(REFERENCE, metric), FRACTION)
        return Verdict(
            "diversity",
            f"{lead}, by {WORDS[metric]}: beside {self.tuned_name}'s greedy text ({tuned}), "
            f"{self.base_name}'s text is {answers} (differences; p < 0.05 after Holm's "
            "correction).",
        )

    def _sides(self, metric: str) -> dict[str, list[str]]:
        """Which methods of the base are more or less diverse, with the difference."""
        sides: dict[str, list[str]] = {side: [] for side in SIDES}
        for condition in self.conditions[:-1]:
            row = self._row(condition, metric)
            words, difference = METHODS[condition[1]].words, row["difference"]
            side = "not clearly different"
            if math.isnan(row["difference_low"]):
                side = "unclear"
            elif row["p"] < 0.05:
                side = "more diverse" if (difference > 0) == TESTED[metric] else "less diverse"
            known = math.isfinite(difference)
            sides[side].append(f"{words} ({SIGNED_FRACTION(difference)})" if known else words)
        return sides

    def _row(self, condition: Condition, metric: str) -> Mapping[str, Any]:
        model, method = condition
        return self.at(model=model, method=method, metric=metric)

    def _label(self, condition: Condition) -> str:
        """`min-p (p = 0.1)`; the tuned model's with its name."""
        model, method = condition
        symbol, parameter = METHODS[method].symbol, self.about(model, method)["parameter"]
        words = METHODS[method].words + (f" ({symbol} = {parameter:g})" if symbol else "")
        return words if model == "base" else f"{self.tuned_name}, {words}"

    def evidence(self) -> list[Block]:
        """The measures of every method, their differences to the tuned model, and the texts."""
        texts = [self._samples(example) for example in self.extras.get("examples", [])]
        return [
            self._about(),
            self._measures([metric for metric in ("ttr", "rep_2", "mauve") if self._has(metric)]),
            self._differences(list(TESTED)),
            Grid([self._chart(metric) for metric in DRAWN]),
            Details("all measures", [self._other_measures(), self._differences(self.metrics)]),
            *([Details("what each method generated", texts)] if texts else []),
        ]

    def _has(self, metric: str) -> bool:
        return metric in self.metrics

    def _about(self) -> Text:
        options = self.meta["options"]
        at_eos = "ends at" if options["stop_at_eos"] else "goes on through"
        samples = count(options["n_samples"], "sample")
        return Text(
            f"{self.base_name} decoded by several methods, {self.tuned_name} greedily: "
            f"{count(options['n_prompts'], 'prompt')} of "
            f"{lengths_in_words(options['prompt_tokens'])}, {options['max_new_tokens']} tokens "
            f"added; text {at_eos} an end-of-text token; {samples} of methods that sample. TTR: "
            "distinct tokens / tokens, 1 repeats nothing. Repeated bigrams: the share that "
            "occurred before. Longest loop: the share of a text that only repeats itself."
        )

    def _measures(self, metrics: Sequence[str]) -> Table:
        rows = [
            [
                self._label(condition),
                "yes" if METHODS[condition[1]].deterministic else "no",
                *(interval(self._row(condition, m), _form(m)) for m in metrics),
                NUMBER(self.about(*condition)["seconds"]),
            ]
            for condition in self.conditions
        ]
        head = ["mean over prompts [95%]", "det.", *(WORDS[m] for m in metrics), "seconds"]
        caption = (
            f"rows without a model's name are {self.base_name}; det.: whether the same prompt "
            "always gives the same text; seconds: for one text per prompt"
        )
        return Table(head, rows, caption)

    def _other_measures(self) -> Table:
        metrics = [metric for metric in self.metrics if metric not in TESTED]
        rows = [
            [self._label(c), *(interval(self._row(c, m), _form(m)) for m in metrics)]
            for c in self.conditions
        ]
        caption = "mean over prompts; distinct bigrams are counted over all texts together"
        if self._has("mauve"):
            reader = self.meta["mauve"]["name"]
            caption += f"; MAUVE against the texts' own continuations, read by {reader}"
        return Table(["mean [95%]", *(WORDS[metric] for metric in metrics)], rows, caption)

    def _differences(self, metrics: Sequence[str]) -> Table:
        rows = [
            [self._label(c), *(_difference(self._row(c, m), m) for m in metrics)]
            for c in self.conditions[:-1]
        ]
        caption = (
            f"minus {self.tuned_name}, greedy, paired by prompt; p: paired t test, Holm-corrected "
            "over all methods and measures; an interval is not corrected, so it can exclude 0 "
            "where p is above 0.05"
        )
        head = ["difference [95%]", *(WORDS[metric] for metric in metrics)]
        return Table(head, rows, caption)

    def _chart(self, metric: str) -> Chart:
        names = {"base": self.base_name, "tuned": self.tuned_name}
        rows = [
            {
                "series": names[row["model"]],
                # Both models' greedy texts stand in one line.
                "method": METHODS["greedy"].words if c == REFERENCE else self._label(c),
                **ends(row),
            }
            for c in self.conditions
            for row in [self._row(c, metric)]
        ]
        tuned = self._row(REFERENCE, metric)
        roles: dict[str, Role] = {names["base"]: "base", names["tuned"]: "tuned"}
        line = Reference(names["tuned"], tuned["value"], tuned["low"], tuned["high"], "tuned")
        words = DRAWN[metric]
        return Chart(
            "dots",
            f"{words}: mean over prompts, 95% intervals",
            f"{words} of every method; the line is {self.tuned_name}, greedy",
            rows,
            Axis("value", words, "share"),
            Axis("method", "", is_category=True),
            roles,
            [line],
        )

    def _samples(self, example: Mapping[str, Any]) -> Samples:
        texts = [
            Sample(self._sample_label(one["model"], one["method"]), one["text"])
            for one in example["texts"]
        ]
        return Samples(example["prompt"], texts)

    def _sample_label(self, model: str, method: str) -> str:
        label = self._label((model, method))
        return label if model == "tuned" else f"{self.base_name}, {label}"


def _form(metric: str) -> Form:
    return NUMBER if metric == "length" else FRACTION


def _difference(row: Mapping[str, Any], metric: str) -> str:
    gap = {
        "value": row["difference"],
        "low": row["difference_low"],
        "high": row["difference_high"],
    }
    form = SIGNED if metric == "length" else SIGNED_FRACTION
    return f"{interval(gap, form)} {p_value(row['p'])}".rstrip()
