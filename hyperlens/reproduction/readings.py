"""What a run measured, under the names that the paper's numbers have (`PaperNumber.quantity`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from scipy import stats

from ..compare.audit import audit
from ..decoding.diversity import REPETITION_METRICS
from ..render.format import PERCENT, interval
from ..results.result import Result
from .paper import SAID, stages_of

TEMPERATURE_VARIANTS = ("original", "matched", "tuned")
TEACHER_FORCED = ("top1_agreement", "spearman", "entropy")
CRITERIA = {"coherence": "coherence", "diversity": "diversity", "overall": "total"}
# The verdicts that answer what the paper says of weights.
OF_SAID = ("weights", "rotation", "magnitude")


class Reading(NamedTuple):
    """One quantity of a run.

    Attributes:
        value: in the units of its result; shares as shares.
        low, high: its 95% interval; NaN where there is none.
        n: over how many prompts or texts; 0 where it is one measurement.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0


Readings = Mapping[str, Reading]
"""Quantity to its reading."""


def readings(results: Mapping[str, Result]) -> dict[str, Reading]:
    """Every quantity that these results hold.

    Args:
        results: stage to its result, such as "temperature" to a `TemperatureResult`; those of
            other domains than the first as "cross_domain/NAME".
    """
    found: dict[str, Reading] = {}
    for stage, result in results.items():
        read = READERS.get(stage.partition("/")[0])
        if read is not None:
            found |= dict(read(result))
    return found


Found = Iterator[tuple[str, Reading]]


def _of(row: Mapping[str, Any]) -> Reading:
    return Reading(row["value"], row["low"], row["high"], int(row["n"]))


def _temperature(result: Any) -> Found:
    for decoding, metrics in (("greedy", REPETITION_METRICS), ("teacher-forced", TEACHER_FORCED)):
        for metric in metrics:
            rows = {
                variant: result.at(variant=variant, decoding=decoding, metric=metric)
                for variant in TEMPERATURE_VARIANTS
            }
            for variant, row in rows.items():
                yield f"temperature/{variant}/{metric}", _of(row)
            yield f"temperature/p/{metric}", Reading(pooled_p(rows["tuned"], rows["matched"]))
    yield "temperature/T", Reading(result.extras["temperature"]["shared"])


def pooled_p(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """p of Student's t test of two means with pooled variance, unpaired, as the paper has it.

    Contexts and prompts are the same for both, so that a paired test fits better: this one is
    only for the paper's column. NaN where neither varies.
    """
    moments = [(one["value"], one["se"] * math.sqrt(one["n"]), one["n"]) for one in (a, b)]
    if not any(deviation > 0 for _, deviation, _ in moments):
        return math.nan
    return float(stats.ttest_ind_from_stats(*moments[0], *moments[1], equal_var=True).pvalue)


def _static_bias(result: Any) -> Found:
    sides = [("none", 0.0, "original"), ("tuned", 0.0, "tuned")]
    # Not centred, as the paper has it.
    sides += [("uncentred", alpha, f"{alpha:g}") for alpha in result.alphas]
    for bias, alpha, name in sides:
        for metric in REPETITION_METRICS:
            row = result.at(bias=bias, alpha=alpha, metric=metric)
            yield f"static_bias/{name}/{metric}", _of(row)
    trend = result.trend("uncentred", "ttr")
    yield "static_bias/trend/rho", Reading(trend["rho"])
    yield "static_bias/trend/p", Reading(trend["p"])


def _variants(result: Any) -> Found:
    for row in result.table:
        yield f"variants/{row['variant']}/{row['metric']}", _of(row)


def _provenance(result: Any) -> Found:
    buckets = {"1": "rank_1", "2-10": "rank_2_10", ">10": "rank_gt_10", "changed": "rank_gt_1"}
    for row in result.rows(metric="share"):
        if row["bucket"] in buckets:
            mode = row["mode"].replace("-", "_")
            yield f"provenance/{mode}/{buckets[row['bucket']]}", _of(row)


def _training(result: Any) -> Found:
    for row in result.table:
        yield f"training/{row['run']}/{row['metric']}", Reading(row["value"])
    weights = {row["run"]: row["value"] for row in result.rows(metric="trained_parameters")}
    if "lora" in weights and "late_lora" in weights:
        saved = 1 - weights["late_lora"] / weights["lora"]
        yield "training/late_lora/parameters_saved", Reading(saved)


def _decoding(result: Any) -> Found:
    for row in result.rows(model="base"):
        yield f"decoding/{row['method']}/{row['metric']}", _of(row)
    for row in result.rows(model="tuned", method="greedy"):
        yield f"decoding/tuned/{row['metric']}", _of(row)


def _cross_domain(result: Any) -> Found:
    for row in result.table:
        name = row["corpus"]
        yield f"cross_domain/{name}/ttr", Reading(row["ttr_tuned"], n=int(row["n"]))
        yield f"cross_domain/{name}/ttr_base", Reading(row["ttr_base"], n=int(row["n"]))
        mauve = [row[f"mauve_tuned{end}"] for end in ("", "_low", "_high")]
        if math.isfinite(mauve[0]):
            yield f"cross_domain/{name}/mauve", Reading(mauve[0], n=int(row["n"]))
        value, low, high = (row[f"delta_raw{end}"] for end in ("", "_low", "_high"))
        yield f"cross_domain/{name}/delta", Reading(value, low, high, int(row["n_texts"]))


def _judge(result: Any) -> Found:
    """In the paper's protocol; side A is late-stage LoRA, side B LoRA on all blocks."""
    names = {"labelled_a_wins": "late_lora", "labelled_b_wins": "lora", "labelled_tie": "tie"}
    for criterion, called in CRITERIA.items():
        for row in result.rows(criterion=criterion):
            if row["metric"] in names:
                yield f"judge/{called}/{names[row['metric']]}", _of(row)
    decided = result.at(criterion="overall", metric="labelled_a_of_decided")
    yield "judge/total/p", Reading(decided["p"])


def _geometry(result: Any) -> Found:
    """Figure 5 as the paper seems to read it: BOS in, raw layers, the last after the final norm."""
    for one in audit(result):
        if one.quantity == "participation_ratio":
            yield "geometry/delta_last", Reading(one.last.as_read)
            continue
        yield "geometry/l2_last", Reading(one.last.as_read)
        if one.before is not None:
            yield "geometry/l2_before_last", Reading(one.before.as_read)
            if one.before.as_read > 0:
                yield "geometry/l2_ratio", Reading(one.last.as_read / one.before.as_read)


READERS: Mapping[str, Callable[[Any], Found]] = {
    "temperature": _temperature,
    "static_bias": _static_bias,
    "variants": _variants,
    "provenance": _provenance,
    "training": _training,
    "decoding": _decoding,
    "cross_domain": _cross_domain,
    "judge": _judge,
    "geometry": _geometry,
}


def _blind(result: Any) -> Iterator[str]:
    """What the same judge says without labels and in both orders, in the paper's rows."""
    for criterion, called in CRITERIA.items():
        rates = [
            interval(result.at(criterion=criterion, metric=metric), PERCENT)
            for metric in ("a_wins", "b_wins", "tie")
        ]
        yield (
            f"{called.capitalize()}: late-stage LoRA wins {rates[0]}, LoRA on all blocks "
            f"{rates[1]}, ties {rates[2]}."
        )


def beside(results: Mapping[str, Result]) -> dict[str, list[str]]:
    """What a run measured in another way than the paper, too: exhibit to sentences."""
    if "judge" not in results:
        return {}
    blind = "Judged blind and in both orders, where only a text that wins in both wins:"
    return {"Table 5": [blind, *_blind(results["judge"])]}


def said(results: Mapping[str, Result]) -> dict[str, list[str]]:
    """What a run found where the paper says something without a number: exhibit to sentences."""
    found = {
        exhibit: [
            verdict.answer
            for stage in stages_of(exhibit)
            if stage in results
            for verdict in results[stage].verdicts()
            if verdict.topic in OF_SAID and not verdict.caution
        ]
        for exhibit in SAID
    }
    return {exhibit: sentences for exhibit, sentences in found.items() if sentences}
