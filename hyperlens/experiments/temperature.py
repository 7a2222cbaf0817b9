"""Is it just temperature? The base model at the tuned model's entropy (arXiv 2605.22579, 3.2).

The paper's Table 1 compares three models: the original, the original at the temperature T* that
gives it the tuned model's entropy, and the tuned one. Temperature keeps every rank, so greedy text
at T* is the original's by construction and decides nothing; sampled text is compared beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TemperatureLogitsWarper

from ..checks import check_counts, check_seed, check_types
from ..decoding.diversity import REPETITION_METRICS
from ..decoding.entropy_matching import (
    EntropyMatched,
    Match,
    entropy_at,
    match_entropy,
    match_mean_entropy,
    scaled,
    tied_maxima,
)
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import check_room, choose_prompts, prompt_lengths
from ..errors import ResultsError
from ..pair import open_inputs
from ..passes.contexts import Contexts, read_contexts
from ..render.blocks import Axis, Block, Chart, Details, Grid, Heading, Role, Table, Text, Verdict
from ..render.format import (
    COSINE,
    FRACTION,
    NATS,
    PERCENT,
    SIGNED,
    SIGNED_FRACTION,
    Form,
    complement,
    count,
    ends,
    interval,
    number,
    p_value,
    span,
)
from ..results.result import Result, matching
from ..statistics import significance
from ..statistics.distances import winner
from ..statistics.rank_correlation import spearman

EXAMPLES = (
    "hyperlens temperature ./base ./tuned --texts held_out.txt --out temperature",
    "hyperlens temperature ./base ./tuned --texts held_out.txt --n-prompts 100 --max-length 128",
)

VARIANTS = ("original", "matched", "matched_per_context", "tuned")
TEACHER_FORCED = ("top1_agreement", "spearman", "entropy")
# Which variants are tested against each other; the first is the paper's own test.
COMPARED = (("tuned", "matched"), ("matched", "original"))
# Generation scales float32 logits, which a temperature beyond these would overflow or flatten.
COLDEST, HOTTEST = 1e-4, 1e4
# Edges of the histogram of per-context temperatures, as log2 T; the outer bins hold what is beyond.
EDGES = torch.linspace(-4.0, 4.0, 33, dtype=torch.float64)

Units = dict[tuple[str, str, str], list[float]]
"""Variant, decoding and metric to one value per text or prompt."""


@check_types
def match_temperature(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    n_prompts: int = 32,
    prompt_tokens: int = 17,
    max_new_tokens: int = 96,
    max_length: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> TemperatureResult:
    """Is the tuned model just the base at another temperature? Compare them at equal entropy.

    Table 1 of arXiv 2605.22579 for any pair, with sampled text beside greedy text. Agreement with
    the base, Spearman's ρ and entropy are teacher-forced, in every context of the texts.
    Repetition is that of continuations of their first tokens, all of one length because it depends
    on length; an end-of-text token counts as any other token.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; or an open `Pair` and the
            texts.
        texts: what `compare_models` takes.
        n_prompts: how many texts, drawn at random, are continued.
        prompt_tokens: how many of their first tokens are the prompt, BOS included; of
            conversations all before the assistant's last turn is.
        max_new_tokens: how many are added to it.
        max_length: tokens per text of the teacher-forced statistics.
        batch_size: texts or prompts per forward pass.
        seed: of the choice of prompts and of the sampled continuations.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Returns:
        A `TemperatureResult`: means and intervals of every measure for the base, the base at T*
        and the tuned model, with paired and Welch tests between them.

    Raises:
        HyperlensError: if a source cannot be opened, the texts do not fit the models, or there
            is no room for the continuations.
    """
    check_counts(batch_size=batch_size)
    check_seed(seed)
    inputs = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    pair = inputs.pair
    check_room(pair, prompt_tokens, max_new_tokens)
    prompts = choose_prompts(
        inputs.corpus, n_prompts, prompt_tokens, seed, max_new_tokens=max_new_tokens
    )
    contexts = read_contexts(
        pair.base.hooked, pair.tuned.hooked, inputs.corpus, batch_size, progress
    )
    scaling = find_scaling(contexts, progress)
    predictions = read_predictions(contexts, scaling, progress)
    runner = GenerationRunner(prompts, max_new_tokens, batch_size, seed, progress)
    generations = {
        (variant, decoding): runner.run(
            pair.tuned if variant == "tuned" else pair.base,
            scaling.processors(variant),
            do_sample=decoding == "sampled",
        )
        for decoding in ("greedy", "sampled")
        for variant in VARIANTS
    }
    units = dict(predictions.units)
    for condition, generated in generations.items():
        units |= {(*condition, metric): generated.metrics[metric] for metric in REPETITION_METRICS}
    options = {
        "n_prompts": len(prompts),
        "prompt_tokens": prompt_lengths(inputs.corpus, prompts, prompt_tokens),
        "max_new_tokens": max_new_tokens,
        "max_length": inputs.corpus.max_length,
        "batch_size": batch_size,
    }
    meta = inputs.metadata(seed=seed, options=options, notes=scaling.notes())
    meta["corpus"]["n_contexts"] = len(contexts)
    greedy = {variant: generations[variant, "greedy"].tokens for variant in VARIANTS}
    return TemperatureResult(
        table=tuple(
            {"variant": variant, "decoding": decoding, "metric": metric}
            | significance.estimate(values)._asdict()
            for (variant, decoding, metric), values in units.items()
        ),
        extras={
            "temperature": _describe(scaling, predictions),
            "tied_contexts": predictions.tied,
            "changed_contexts": predictions.changed,
            "greedy_tokens_changed": {v: _changed(greedy[v], greedy["original"]) for v in VARIANTS},
            "greedy_tokens": sum(map(len, greedy["original"])),
            "tests": _tests(units),
        },
        meta=meta,
    )


@dataclass(frozen=True)
class Scaling:
    """The temperatures that bring the base model to the tuned model's entropy.

    Attributes:
        target: the tuned model's mean entropy, in nats; every text has the same weight in it.
        shared: the single temperature at which the base model's mean entropy is the target.
        in_context: log T* of each context for the tuned model's entropy in that same context.
        n_reached: in how many contexts some temperature gives that entropy.
    """

    target: float
    shared: Match
    in_context: Float[Tensor, " n"]
    n_reached: int

    @property
    def temperature(self) -> float:
        """The shared temperature as generation uses it."""
        return min(max(float(self.shared.temperature), COLDEST), HOTTEST)

    def processors(self, variant: str) -> list[Any]:
        """The logits processors that make the base model generate as a variant of it."""
        if variant == "matched":
            return [TemperatureLogitsWarper(self.temperature)]
        return [EntropyMatched(self.target)] if variant == "matched_per_context" else []

    def notes(self) -> list[str]:
        """What a reader should know where the target or the temperature is out of reach."""
        t, low, high = (
            float(x) for x in (self.shared.temperature, self.shared.lowest, self.shared.highest)
        )
        notes = []
        if not bool(self.shared.reached):
            notes.append(
                f"no temperature gives the base model {self.target:.4g} nats (it reaches {low:.4g} "
                f"to {high:.4g}): the closest was taken"
            )
        if self.temperature != t:
            notes.append(
                f"T* = {t:.3g} is beyond what float32 logits can be scaled by: texts were "
                f"generated at {self.temperature:g}"
            )
        return notes


def find_scaling(contexts: Contexts, progress: bool) -> Scaling:
    """Solve for every temperature of the experiment."""
    parts = []
    for _, base, tuned in contexts.rows("matching entropies", progress):
        entropy = entropy_at(tuned, torch.zeros(len(tuned)))
        match = match_entropy(base, entropy)
        parts.append([x.cpu() for x in (entropy, match.log_temperature, match.reached)])
    entropy, in_context, reached = (torch.cat(part) for part in zip(*parts, strict=True))
    weights = contexts.weights
    target = float((weights * entropy).sum())

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        return ((logits, weights[rows]) for rows, logits in contexts.base_rows())

    return Scaling(target, match_mean_entropy(pieces, target), in_context, int(reached.sum()))


class Predictions(NamedTuple):
    """Teacher-forced statistics of every variant.

    Attributes:
        units: agreement, ρ and entropy of every variant, text by text.
        tied: in how many contexts of a variant several tokens share the largest logit.
        changed: in how many its top-1 token is not the original's.
        to_mean: log T* of each context for the *mean* entropy of the tuned model.
    """

    units: Units
    tied: dict[str, int]
    changed: dict[str, int]
    to_mean: Float[Tensor, " n"]


def read_predictions(contexts: Contexts, scaling: Scaling, progress: bool) -> Predictions:
    """Compare every variant with the original, scaled in float32 as decoding does it.

    In exact arithmetic scaling keeps every rank. In float32 it can merge two neighbouring logits
    into a tie, which is why the variants are measured and not simply set to 1.
    """
    parts: dict[tuple[str, str], list[Tensor]] = {
        (v, m): [] for v in VARIANTS for m in TEACHER_FORCED
    }
    tied, changed = dict.fromkeys(VARIANTS, 0), dict.fromkeys(VARIANTS, 0)
    to_mean = []
    for _, base, tuned in contexts.rows("reading ranks", progress):
        top1 = winner(base)
        target = torch.full((len(base),), scaling.target, dtype=torch.float64)
        per_context = match_entropy(base, target).log_temperature
        to_mean.append(per_context.cpu())
        logits_of = {
            "original": base,
            "matched": base / scaling.temperature,
            "matched_per_context": scaled(base, per_context).float().to(base.device),
            "tuned": tuned,
        }
        for variant, logits in logits_of.items():
            agrees = winner(logits) == top1
            tied[variant] += int((tied_maxima(logits) > 1).sum())
            changed[variant] += int((~agrees).sum())
            parts[variant, "top1_agreement"].append(agrees.double().cpu())
            parts[variant, "spearman"].append(spearman(base, logits).cpu())
            parts[variant, "entropy"].append(entropy_at(logits, torch.zeros_like(target)).cpu())
    units = {
        (variant, "teacher-forced", metric): contexts.per_text(torch.cat(values))
        for (variant, metric), values in parts.items()
    }
    return Predictions(units, tied, changed, torch.cat(to_mean))


def _describe(scaling: Scaling, predictions: Predictions) -> dict[str, Any]:
    """Every temperature found, as JSON values."""
    log2 = (scaling.in_context / math.log(2)).clamp(float(EDGES[0]), float(EDGES[-1]))
    return {
        "shared": float(scaling.shared.temperature),
        "shared_reached": bool(scaling.shared.reached),
        "target_entropy": scaling.target,
        "reachable": [float(scaling.shared.lowest), float(scaling.shared.highest)],
        "own_quantiles": _quantiles(scaling.in_context),
        "own_reached": scaling.n_reached,
        "to_mean_quantiles": _quantiles(predictions.to_mean),
        "n_contexts": len(scaling.in_context),
        "log2_edges": EDGES.tolist(),
        "own_counts": torch.histogram(log2, EDGES).hist.long().tolist(),
    }


def _quantiles(log_temperature: Float[Tensor, " n"]) -> dict[str, float]:
    """Quantiles of temperatures, by the nearest order statistic."""
    ordered = log_temperature.sort().values
    # torch's own quantile refuses more than 16 million values.
    at = {q: ordered[round(q * (len(ordered) - 1))] for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
    return {f"{q:g}": float(value.exp()) for q, value in at.items()}


def _tests(units: Units) -> list[dict[str, Any]]:
    """Paired and Welch tests of every comparison, each kind corrected over all of them (Holm).

    Without a p value where the outcome holds by construction: it would only weaken the others.
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
                    | _test(a, b, _holds_by_construction(decoding, metric, first))
                )
    for kind in ("paired_p", "welch_p"):
        tests = significance.holm_rows(tests, kind, f"{kind}_holm")
    return tests


def _holds_by_construction(decoding: str, metric: str, first: str) -> bool:
    """Whether a difference is 0 whatever the models.

    T* has the tuned model's mean entropy; and beside the original it keeps every rank, so that
    what depends on ranks alone differs by the rounding of logits at most.
    """
    if first == "tuned":
        return metric == "entropy"
    return decoding == "greedy" or metric in ("top1_agreement", "spearman")


def _test(a: list[float], b: list[float], is_given: bool) -> dict[str, Any]:
    tests = {"paired_p": significance.paired_p, "welch_p": significance.welch_p}
    difference = {"difference": significance.difference(a, b)._asdict()}
    return difference | {kind: math.nan if is_given else p(a, b) for kind, p in tests.items()}


def _changed(tokens: Sequence[Sequence[int]], original: Sequence[Sequence[int]]) -> int:
    pairs = zip(tokens, original, strict=True)
    return sum(a != b for x, y in pairs for a, b in zip(x, y, strict=True))


WORDS = {
    "ttr": "TTR",
    "rep_2": "repeated bigrams",
    "rep_3": "repeated trigrams",
    "top1_agreement": "top-1 agreement",
    "spearman": "Spearman's ρ",
    "entropy": "entropy, nats",
}
FORMS = {"top1_agreement": PERCENT, "spearman": COSINE, "entropy": Form(number, lowest=0.0)}
SIGNED_FORMS = {"entropy": SIGNED}
# Rounding can swap tied or neighbouring logits of two models that rank alike.
ALIKE = 0.999


class TemperatureResult(Result):
    """The original model, the original at the tuned model's entropy, and the tuned model.

    The table has a row per variant ("original"; "matched", at one temperature for all contexts;
    "matched_per_context", each context at the tuned model's mean entropy; "tuned"), decoding
    ("greedy", "sampled", "teacher-forced") and metric (`ttr`, `rep_2`, `rep_3`: means over
    prompts; `top1_agreement` and `spearman` with the original, and `entropy` in nats: means over
    texts).

    Extras: the temperatures found, tied maxima and what they changed, and every test.
    """

    name: ClassVar[str] = "temperature"
    title: ClassVar[str] = "Is it just temperature?"
    columns: ClassVar[tuple[str, ...]] = (
        *("variant", "decoding", "metric"),
        *("value", "low", "high", "se", "n"),
    )

    def test(self, decoding: str, metric: str, first: str, second: str) -> Mapping[str, Any]:
        """One test: the paired difference first - second with its interval, and its p values.

        Raises:
            ResultsError: if there is no such test.
        """
        wanted = {"decoding": decoding, "metric": metric, "first": first, "second": second}
        for test in matching(self.extras["tests"], wanted):
            return dict(test)
        raise ResultsError(
            f"no test of {metric!r}, {decoding!r}, {first!r} against {second!r}: the pairs tested "
            f"are {', '.join(' and '.join(pair) for pair in COMPARED)}"
        )

    def verdicts(self) -> list[Verdict]:
        """Whether single predictions, and sampled text, are those of a temperature."""
        return [
            Verdict("predictions", self._predictions()),
            Verdict("sampled text", self._sampled_text()),
            Verdict(
                "not to be concluded",
                "Not to be concluded: anything from the greedy text of the base at T*, which no "
                "temperature can change; or that diverse text is good text: TTR does not measure "
                "quality.",
                caution=True,
            ),
        ]

    def _predictions(self) -> str:
        agreement, rho = (
            self.at(variant="tuned", decoding="teacher-forced", metric=metric)
            for metric in ("top1_agreement", "spearman")
        )
        with_rho = f"Spearman's ρ {interval(rho, COSINE)}"
        if agreement["value"] > ALIKE and rho["value"] > ALIKE:
            return (
                "The tuned model ranks tokens as its base does (top-1 agreement "
                f"{interval(agreement, PERCENT)}, {with_rho}): what tuning did to single "
                "predictions is no more than a temperature does."
            )
        if agreement["value"] > ALIKE:
            return (
                f"The tuned model's top-1 predictions are its base's in "
                f"{interval(agreement, PERCENT)} of contexts, but the ranks below them changed "
                f"({with_rho}), which no temperature does: tuning did more than sharpen."
            )
        return (
            f"The tuned model's top-1 prediction differs from the base's in "
            f"{interval(complement(agreement), PERCENT)} of contexts (mean over texts). "
            "Temperature never changes which token is top-1: tuning did more than sharpen."
        )

    def _sampled_text(self) -> str:
        tests = {
            metric: self.test("sampled", metric, "tuned", "matched")
            for metric in REPETITION_METRICS
        }
        differences = "; ".join(_difference(metric, test) for metric, test in tests.items())
        entropy = "the same" if self._reached else "the closest reachable"
        sampled = f"sampled at {entropy} mean entropy (tuned - base at T*: {differences})"
        if any(test["paired_p_holm"] < 0.05 for test in tests.values()):
            return (
                f"The two models' texts differ when {sampled}: where p is small, entropy alone "
                "does not explain it."
            )
        if all(math.isnan(test["difference"]["low"]) for test in tests.values()):
            return (
                "So few prompts cannot tell whether entropy explains the diversity of text "
                f"{sampled}."
            )
        return (
            f"No clear difference between the two models' texts when {sampled}: entropy may "
            "explain all of the diversity of sampled text."
        )

    @property
    def _reached(self) -> bool:
        return bool(self.extras["temperature"]["shared_reached"])

    @property
    def _names(self) -> dict[str, str]:
        """Each variant as tables and charts call it."""
        return {
            "original": self.base_name,
            "matched": f"{self.base_name} at T*",
            "matched_per_context": f"{self.base_name}, T* per context",
            "tuned": self.tuned_name,
        }

    def evidence(self) -> list[Block]:
        """The temperatures, then predictions and text of every variant, then every test."""
        charts = [self._chart(decoding) for decoding in ("greedy", "sampled")]
        return [
            Text(self._temperatures()),
            Heading("Predictions on the same texts"),
            self._table("teacher-forced", "texts", "agreement and ρ are with the base"),
            Heading("Generated text"),
            self._table("greedy", "prompts", "TTR: distinct tokens / tokens"),
            self._table("sampled", "prompts", P_CAPTION),
            Text(self._controls()),
            Grid([*charts, self._histogram()]),
            Details("T* of single contexts", [self._quantile_table(), *self._per_context_tables()]),
            Details("tests of the tuned model against the base at T*", [self._test_table()]),
        ]

    def _temperatures(self) -> str:
        found = self.extras["temperature"]
        quartiles = [found["own_quantiles"][q] for q in ("0.25", "0.75")]
        gives = "gives" if self._reached else "comes closest to giving"
        return (
            f"T* = {number(found['shared'])} {gives} the base model the tuned model's mean "
            f"entropy, {NATS(found['target_entropy'])}. The T* that gives it the tuned model's "
            f"entropy in the same context lies between {number(quartiles[0])} and "
            f"{number(quartiles[1])} in the middle half of contexts; it exists in "
            f"{found['own_reached']:,} of {count(found['n_contexts'], 'context')}."
        )

    def _controls(self) -> str:
        changed, tied = self.extras["greedy_tokens_changed"], self.extras["tied_contexts"]
        return (
            "Check: temperature keeps every rank, so the base's greedy text must stay the same. "
            f"{changed['matched']:,} of {count(self.extras['greedy_tokens'], 'greedy token')} "
            f"changed at T*, {changed['matched_per_context']:,} with T* per context; the largest "
            f"logits are tied in {tied['original']:,} of "
            f"{count(self.extras['temperature']['n_contexts'], 'context')}, in "
            f"{tied['matched']:,} after scaling in float32."
        )

    def _table(self, decoding: str, units: str, caption: str) -> Table:
        """The base, the base at T* and the tuned model."""
        shown = ("original", "matched", "tuned")
        rows = [
            [
                WORDS[metric],
                *(self._cell(variant, decoding, metric) for variant in shown),
                p_value(self.test(decoding, metric, "tuned", "matched")["paired_p_holm"]),
            ]
            for metric in self._metrics(decoding)
        ]
        n = max(row["n"] for row in self.select(decoding=decoding))
        head = [decoding, *(self._names[variant] for variant in shown), "p (Holm)"]
        return Table(head, rows, f"mean over {n:,} {units} [95% interval]; {caption}")

    def _metrics(self, decoding: str) -> list[str]:
        return [row["metric"] for row in self.select(decoding=decoding, variant="original")]

    def _cell(self, variant: str, decoding: str, metric: str) -> str:
        row = self.at(variant=variant, decoding=decoding, metric=metric)
        return interval(row, FORMS.get(metric, FRACTION))

    def _chart(self, decoding: str) -> Chart:
        """Repetition of every variant under one way of decoding."""
        rows = [
            {
                "series": series,
                "measure": WORDS[metric],
                **ends(row),
                "prompts": row["n"],
            }
            for variant, series in self._names.items()
            for metric in REPETITION_METRICS
            for row in [self.at(variant=variant, decoding=decoding, metric=metric)]
        ]
        title = f"{decoding.capitalize()} text: mean over prompts, 95% intervals"
        roles: dict[str, Role] = {
            self._names["matched"]: "other",
            self._names["matched_per_context"]: "other",
            self.base_name: "base",
            self.tuned_name: "tuned",
        }
        x, y = Axis("value", "0 to 1, no unit", "share"), Axis("measure", "", is_category=True)
        return Chart("dots", title, f"{title}, of every variant", rows, x, y, roles)

    def _histogram(self) -> Chart:
        """T* of single contexts, without the empty bins at both ends."""
        found = self.extras["temperature"]
        counts, edges = found["own_counts"], [2.0**edge for edge in found["log2_edges"]]
        filled = [i for i, n in enumerate(counts) if n] or [0]
        bins = range(filled[0], filled[-1] + 1)
        labels = {i: span(edges[i], edges[i + 1]) for i in bins}
        labels[0], labels[len(counts) - 1] = f"< {number(edges[1])}", f"> {number(edges[-2])}"
        series = "T* of single contexts"
        rows = [
            {
                "series": series,
                "temperature": labels[i],
                "value": 100 * counts[i] / max(1, sum(counts)),
                "contexts": counts[i],
            }
            for i in bins
        ]
        title = f"{series}: share of contexts, %"
        alt = (
            f"{title}, each at the tuned model's entropy in the same context; one T* for all "
            f"contexts is {number(found['shared'])}"
        )
        axes = Axis("temperature", "T*", is_category=True), Axis("value", "share, %", "zero")
        return Chart("bars", title, alt, rows, *axes, roles={series: "other"})

    def _quantile_table(self) -> Table:
        found = self.extras["temperature"]
        kinds = {
            "for the tuned model's mean entropy": "to_mean_quantiles",
            "for the tuned model's entropy in the same context": "own_quantiles",
        }
        rows = [[words, *map(number, found[key].values())] for words, key in kinds.items()]
        head = ["T* of single contexts", *(f"{float(q):.0%}" for q in found["own_quantiles"])]
        return Table(head, rows, "quantiles over contexts; the paper's words fit the first row")

    def _per_context_tables(self) -> list[Block]:
        """The base with every context at the tuned model's mean entropy."""
        variants = ("matched", "matched_per_context")
        rows = [
            [
                f"{WORDS[metric]}, {decoding}",
                *(self._cell(variant, decoding, metric) for variant in variants),
            ]
            for decoding in ("greedy", "sampled", "teacher-forced")
            for metric in self._metrics(decoding)
        ]
        head = ["mean over prompts or texts [95%]", *(self._names[variant] for variant in variants)]
        caption = (
            "T* per context: every context has the tuned model's mean entropy; while generating, "
            "T* is solved for at every token."
        )
        return [Table(head, rows, caption)]

    def _test_table(self) -> Table:
        kinds = ("paired_p", "paired_p_holm", "welch_p", "welch_p_holm")
        rows = [
            [
                f"{WORDS[test['metric']]}, {test['decoding']}",
                interval(test["difference"], SIGNED_FORMS.get(test["metric"], SIGNED_FRACTION)),
                *(p_value(test[kind]) for kind in kinds),
            ]
            for test in self.extras["tests"]
            if test["first"] == "tuned"
        ]
        head = ["", "difference [95%]", "paired t", "with Holm", "Welch's t", "with Holm"]
        return Table(head, rows, "no p where the outcome holds by construction")


P_CAPTION = (
    "p: tuned model against the base at T*, paired t test, Holm-corrected over all tests; at T*, "
    "greedy text, top-1 agreement and ρ are the base's and mean entropy the tuned model's by "
    "construction"
)


def _difference(metric: str, test: Mapping[str, Any]) -> str:
    text = f"{WORDS[metric]} {interval(test['difference'], SIGNED_FRACTION)}"
    p = p_value(test["paired_p_holm"])
    return f"{text}, {p}" if p else text
