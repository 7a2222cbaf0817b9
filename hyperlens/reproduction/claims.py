"""The six claims of the paper's abstract, each judged by a stated rule on intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from ..compare.audit import audit
from ..render.format import DIMENSIONS, FRACTION, PERCENT, SIGNED_FRACTION, Form, interval, number

Outcome = Literal["reproduced", "not reproduced", "cannot tell here"]

# A static bias explains what changed if it brings back at least this share of it.
ENOUGH_BIAS = 0.5
# Late-stage LoRA suffices if it loses less than this share of what LoRA on all blocks gains.
LOST = 0.25
# A time is shorter if it is by this factor: single measurements on a shared machine vary.
FASTER = 1.2

UNKNOWN: Outcome = "cannot tell here"


class Claim(NamedTuple):
    """A claim of the abstract and what became of it.

    Attributes:
        name: a word or two.
        claim: what the paper says.
        rule: when it counts as reproduced, and when not; in between it cannot be told.
        outcome: by that rule.
        decided_by: the number that decides, or what is missing.
    """

    name: str
    claim: str
    rule: str
    outcome: Outcome
    decided_by: str


Results = Mapping[str, Any]
"""Stage to its result; a stage that was not run is missing."""


class _Rule(NamedTuple):
    name: str
    claim: str
    rule: str
    stages: tuple[str, ...]
    judge: Callable[[Results], tuple[Outcome, str]]


def judge_claims(results: Results) -> list[Claim]:
    """What became of each claim of the abstract in one run."""
    found = []
    for rule in RULES:
        missing = [stage for stage in rule.stages if stage not in results]
        if missing:
            outcome, decided_by = UNKNOWN, f"{', '.join(missing)} was not measured"
        else:
            outcome, decided_by = rule.judge(results)
        found.append(Claim(rule.name, rule.claim, rule.rule, outcome, decided_by))
    return found


def by_interval(low: float, high: float, bound: float) -> Outcome:
    """Reproduced if the interval lies above a bound, not reproduced if it lies at or below it.

    >>> by_interval(0.1, 0.3, 0.0), by_interval(-0.2, 0.1, 0.0)
    ('reproduced', 'cannot tell here')
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return UNKNOWN
    if low > bound:
        return "reproduced"
    return "not reproduced" if high <= bound else UNKNOWN


def _not_temperature(results: Results) -> tuple[Outcome, str]:
    parts, outcomes = [], []
    for decoding in ("greedy", "sampled"):
        test = results["temperature"].test(decoding, "ttr", "tuned", "matched")["difference"]
        outcomes.append(by_interval(test["low"], test["high"], 0.0))
        parts.append(f"{decoding} {interval(test, SIGNED_FRACTION)}")
    outcome = outcomes[0] if len(set(outcomes)) == 1 else UNKNOWN
    return outcome, f"TTR, tuned - base at T*: {', '.join(parts)}"


def _not_static(results: Results) -> tuple[Outcome, str]:
    result = results["static_bias"]
    base = result.value(bias="none", alpha=0.0, metric="agreement_tuned")
    if result.fitted is None or base == 1.0:
        return UNKNOWN, "no bias could be fitted"
    gain = result.gain("fitted", 1.0)
    share = {key: gain[key] / (1 - base) for key in ("value", "low", "high")}
    outcome = by_interval(-share["high"], -share["low"], -ENOUGH_BIAS)
    explained = interval(share, Form(PERCENT.write, -math.inf, 1.0))
    return outcome, f"the best fitted bias brings back {explained} of the changed top-1 predictions"


def _delta(results: Results, from_end: int) -> Mapping[str, Any] | None:
    """The raw change of dimension so many layers before the last, BOS and sinks left out."""
    comparison = results["geometry"]
    at = {row.layer: row for row in comparison.measured("participation_ratio", "delta", "raw")}
    row = at.get(comparison.n_layers - from_end)
    return None if row is None else row._asdict()


def _localised(results: Results) -> tuple[Outcome, str]:
    last, before = (_delta(results, from_end) for from_end in (0, 1))
    if last is None or before is None:
        return UNKNOWN, "the last two layers were not measured"
    outcome: Outcome = UNKNOWN
    if last["low"] > 0 and before["high"] < last["low"] / 2:
        outcome = "reproduced"
    elif before["low"] > last["high"] / 2:
        outcome = "not reproduced"
    found = (
        f"change of dimension before the last block {interval(before, DIMENSIONS)}, after it "
        f"{interval(last, DIMENSIONS)}"
    )
    as_read = next(
        (one for one in audit(results["geometry"]) if one.quantity == "participation_ratio"), None
    )
    if as_read is not None and as_read.before is not None:
        found += (
            f"; as scripts read it (BOS in, the last layer after the final norm) "
            f"{DIMENSIONS(as_read.before.as_read)} and {DIMENSIONS(as_read.last.as_read)}"
        )
    return outcome, found


def _expands(results: Results) -> tuple[Outcome, str]:
    last = _delta(results, 0)
    if last is None:
        return UNKNOWN, "the last layer was not measured"
    outcome = by_interval(last["low"], last["high"], 0.0)
    found = f"change of dimension at the last layer {interval(last, DIMENSIONS)}"
    controls = [
        row
        for row in results["null_test"].table
        if (row["metric"], row["view"]) == ("delta", "raw")
        and row["layer"] == results["geometry"].n_layers
    ]
    if outcome == "reproduced" and controls:
        most = max(row["control_high"] for row in controls)
        p = max(row["p"] for row in controls)
        found += (
            f"; random changes that move the stream as far reach {DIMENSIONS(most)} "
            f"(p = {number(p)})"
        )
        above = all(row["tuned"] > row["control_high"] and row["p"] <= 0.05 for row in controls)
        outcome = "reproduced" if above else UNKNOWN
    return outcome, found


def _suffices(results: Results) -> tuple[Outcome, str]:
    result = results["variants"]
    late, lora = (result.at(variant=name, metric="ttr") for name in ("late_lora", "lora"))
    between = result.between("late_lora", "lora", "ttr")
    allowed = -LOST * lora["difference"]
    found = (
        f"TTR, late-stage - LoRA on all blocks: {interval(between, SIGNED_FRACTION)}; LoRA gains "
        f"{SIGNED_FRACTION(lora['difference'])}, late-stage {FRACTION(late['value'])} in all"
    )
    if not lora["difference_low"] > 0:
        return UNKNOWN, f"{found}: LoRA on all blocks has no clear gain to keep"
    outcome = by_interval(between["low"], between["high"], allowed)
    if outcome == "reproduced" and not late["difference_low"] > 0:
        outcome = UNKNOWN
    return outcome, found


def _faster(results: Results) -> tuple[Outcome, str]:
    result = results["training"]
    seconds = {}
    for run in ("full", "lora", "late_lora"):
        known = result.known(run) if run in result.runs else {}
        if "hours" not in known or "epochs" not in known:
            return UNKNOWN, f"the time of {run} is not known"
        seconds[run] = 3600 * known["hours"] / known["epochs"]
    least = min(seconds["full"], seconds["lora"]) / seconds["late_lora"]
    outcome: Outcome = "reproduced" if least >= FASTER else UNKNOWN
    if least <= 1:
        outcome = "not reproduced"
    return outcome, (
        f"an epoch takes {number(seconds['full'])} s with all weights, {number(seconds['lora'])} s "
        f"with LoRA on all blocks, {number(seconds['late_lora'])} s late-stage (measured once)"
    )


RULES = (
    _Rule(
        "not temperature",
        "scaling the base to the tuned model's entropy does not give its diversity",
        "the 95% interval of the difference in TTR between the tuned model and the base at T* lies "
        "above 0 for greedy and for sampled text; not reproduced if both lie at or below 0",
        ("temperature",),
        _not_temperature,
    ),
    _Rule(
        "not a static bias",
        "no fixed shift of the vocabulary does it",
        f"the best bias, fitted on other texts, brings back less than {PERCENT(ENOUGH_BIAS)} of "
        "the changed top-1 predictions (whole interval); not reproduced if it brings back more",
        ("static_bias",),
        _not_static,
    ),
    _Rule(
        "localised at the end",
        "the geometric change happens in the final block",
        "more than half of the change of effective dimension arises in the last block, by the "
        "intervals before and after it, BOS and attention sinks left out; not reproduced if less",
        ("geometry",),
        _localised,
    ),
    _Rule(
        "terminal expansion",
        "effective dimension grows at the last layer",
        "the 95% interval of the change at the last layer lies above 0, and the change is larger "
        "than in every random change that moves the stream as far (p at most .05); not reproduced "
        "if the interval lies at or below 0",
        ("geometry", "null_test"),
        _expands,
    ),
    _Rule(
        "late-stage suffices",
        "LoRA on the last blocks is enough",
        f"late-stage LoRA loses less than {PERCENT(LOST)} of the gain in TTR of LoRA on all blocks "
        "(whole interval), and gains by itself; not reproduced if it loses more",
        ("variants",),
        _suffices,
    ),
    _Rule(
        "late-stage saves time",
        "LoRA on the last blocks trains faster",
        f"an epoch is at least {FASTER:g} times faster than with all weights and than with LoRA on "
        "all blocks; not reproduced if it is no faster",
        ("training",),
        _faster,
    ),
)
