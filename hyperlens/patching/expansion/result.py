"""Does the expansion cause the reordering? The rules of the verdict, and the result.

Two claims are judged. *Needed*: with the expansion taken away, the tuned model's changed decisions
go, or go back to the base model's, more than with as much taken away at random. *Enough*: the
expansion alone makes the base model decide as the tuned one does, more than its control.

1. Without a changed decision there is nothing to be caused: cannot tell.
2. Where the interval of the change of dimension (raw outputs of the last block) lies above 0, by
   more than rounding, there is an expansion. Where it lies below the smallest effect of interest,
   as a share of the base model's dimension, there is none to be the cause: contradicts, whatever
   else. Otherwise it is unknown whether there is one: cannot tell.
3. A method counts if on the texts that decisions are read on it moves the dimension by at least
   half of the expansion. Its effect is the share of changed decisions that it moves, less its
   control's (paired by text, mean over the random draws), with intervals that hold together over
   the methods and effects of a claim (Bonferroni).
4. A method supports the claim if the interval of an effect lies above the smallest effect of
   interest, and the effect is larger than with every single draw of the control. It contradicts the
   claim if all its effects' intervals lie below the smallest effect, and the control leaves room
   for more.
5. A claim is supported if one of the methods supports it, contradicted if all that count contradict
   it; otherwise it cannot be told.
6. The whole: supports if both claims are supported, contradicts if one is contradicted, cannot tell
   otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from ...render.blocks import Axis, Block, Chart, Details, Grid, Role, Table, Text, Verdict
from ...render.format import (
    DIMENSIONS,
    FRACTION,
    NUMBER,
    PERCENT,
    POINTS,
    count,
    ends,
    interval,
)
from ...results.result import Result
from ...statistics.shares import widened
from ...statistics.significance import Estimate
from ..outcomes import RENAMED
from .changes import ADDING, BY_DIRECTIONS, METHODS, REMOVING, VARIANCE_CONTROL, side_of

Answer = Literal["supported", "contradicted", "cannot tell"]
Overall = Literal["supports", "contradicts", "cannot tell"]

# Least share of the expansion by which a method that counts moves the dimension.
HALF = 0.5
# As a share of the dimension: float32 outputs of equal spectra differ by less.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Evidence:
    """What one method of changing the dimension did, beyond its control.

    Attributes:
        moved: by how much of the expansion it moved the dimension (1: all of it).
        effects: shares of changed decisions moved as the claim says, less the control's.
        least: the same less the draw of the control that does most, without an interval.
        room: the share of changed decisions that the control leaves to be moved.
    """

    moved: float
    effects: Mapping[str, Estimate]
    least: Mapping[str, float]
    room: Estimate


@dataclass(frozen=True)
class Judgement:
    """What may be said.

    Attributes:
        overall: of the hypothesis that the expansion causes the reordering.
        expansion: whether the dimension grew; None where it cannot be told.
        needed, enough: the two claims.
        methods: what each method says of its claim; None for those that do not count.
    """

    overall: Overall
    expansion: bool | None
    needed: Answer
    enough: Answer
    methods: Mapping[str, Answer | None]


def judge(
    change: Estimate,
    base_dimension: float,
    n_changed: int,
    needed: Mapping[str, Evidence],
    enough: Mapping[str, Evidence],
    smallest: float,
) -> Judgement:
    """Apply the rules of this module.

    Args:
        change: of the dimension of the last block's raw outputs, tuned - base.
        base_dimension: what it grew from.
        n_changed: how many decisions tuning changed.
        needed, enough: what each method did that bears on the claim, `jointly`.
        smallest: effect of interest, as a share of changed decisions and of the dimension.
    """
    grew = expanded(change, base_dimension, smallest)
    methods = {method: of_method(found, smallest) for method, found in {**needed, **enough}.items()}
    claims = [of_claim([methods[method] for method in claim]) for claim in (needed, enough)]
    overall: Overall = "cannot tell"
    if n_changed and grew is False:
        overall = "contradicts"
    elif n_changed and grew:
        if "contradicted" in claims:
            overall = "contradicts"
        elif claims == ["supported", "supported"]:
            overall = "supports"
    return Judgement(overall, grew, claims[0], claims[1], methods)


def expanded(change: Estimate, base_dimension: float, smallest: float) -> bool | None:
    """Whether the dimension grew; None where the interval allows for both (rule 2)."""
    if change.low > ROUNDING * base_dimension:
        return True
    return False if change.high < smallest * base_dimension else None


def jointly(claim: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """The same evidence with intervals that hold together over a claim's methods and effects."""
    tests = sum(len(found.effects) for found in claim.values())
    return {
        method: replace(
            found,
            effects={name: widened(one, tests, (-1.0, 1.0)) for name, one in found.effects.items()},
        )
        for method, found in claim.items()
    }


def of_method(found: Evidence, smallest: float) -> Answer | None:
    """What one method says; None if it does not move the dimension (rules 3 and 4)."""
    if not found.moved >= HALF:
        return None
    if not all(math.isfinite(one.low) for one in found.effects.values()):
        return "cannot tell"
    if any(one.low > smallest and found.least[name] > 0 for name, one in found.effects.items()):
        return "supported"
    if all(one.high < smallest for one in found.effects.values()) and found.room.low > smallest:
        return "contradicted"
    return "cannot tell"


def of_claim(methods: Sequence[Answer | None]) -> Answer:
    """What all methods together say (rule 5)."""
    counted = [method for method in methods if method is not None]
    if "supported" in counted:
        return "supported"
    if counted and all(method == "contradicted" for method in counted):
        return "contradicted"
    return "cannot tell"


# The result


Row = Mapping[str, Any]

NAMES = {
    "base_directions": "kept to the base's first directions",
    "new_directions": "rid of the directions that grew most",
    "base_spectrum": "given the base's spectrum",
    "tuned_spectrum": "given the tuned model's spectrum",
    "tuned_covariance": "given the tuned model's covariance",
}
SHORT = {
    "base_directions": "base directions kept",
    "new_directions": "grown directions removed",
    "base_spectrum": "base spectrum",
    "tuned_spectrum": "tuned spectrum",
    "tuned_covariance": "tuned covariance",
}
CONDITIONS = {
    "itself": "the change itself",
    "same_dimension": "control: random directions, as many",
    "same_variance": "control: random directions, as much variance",
    "shuffled_gains": "control: the same gains shuffled",
}
# Each effect: what it moves, the metric, and whether that metric counts what is left.
EFFECTS = {
    "lost": ("no longer the tuned model's", "to_tuned", True),
    "returned": ("the base model's again", "to_base", False),
    "brought": ("the tuned model's", "to_tuned", False),
}
SHARES = {
    "to_tuned": "the tuned model's",
    "to_base": "the base's",
    "rank_gt_10": "base rank > 10",
}
CLAIMS = {"needed": REMOVING, "enough": ADDING}
CHANGE, CONTROL = "the change itself", "its random control"
RULES = (
    "Without a changed decision, or where it is unknown whether the dimension grew: cannot tell. "
    "Without an expansion: contradicted. A change counts if it moves the dimension by at least "
    "half of the expansion on the texts that decisions are read on. Its effect is the share of "
    "changed decisions that it moves, less that of its random control, paired by text, with 95% "
    "intervals that hold together over a claim (Bonferroni). It supports the claim where the "
    "lower bound of an effect lies above the smallest effect of interest and the effect is larger "
    "than with every single random draw; it contradicts it where the upper bounds of all its "
    "effects lie below, and the control leaves room for more. A claim is supported if one change "
    "supports it, contradicted if all that count contradict it. Overall: supported if both claims "
    "are, contradicted if one is, cannot tell otherwise."
)
SCOPE = (
    "Only affine changes of the last block's output about its mean were tried, fitted on some "
    "texts and read on others: nothing can be concluded about other changes, nor about what "
    "spreads over directions only within some contexts."
)


class ExpansionResult(Result):
    """What is decided and generated once the expansion is taken away, or brought about.

    The table has a row per method (see `hyperlens.patching.expansion.changes`; "none" for the
    models as they are), number of directions (0 where the whole spectrum changes), condition
    ("itself" or a control, the mean over its random draws) and metric: those of
    `hyperlens.patching.outcomes.METRICS`, TTR, rep-2 and rep-3 of greedy text, and, without
    intervals, `dimension` (participation ratio, naive, where decisions are read),
    `dimension_fitted` (where directions are fitted) and `variance` (the share that is left).

    Extras: the `verdict` and its `evidence`, whose intervals hold together; `contrasts`, each
    method less a control, paired, p corrected over the numbers of directions (Holm); `draws`, every
    random draw; `dimension`, the participation ratios of both models with intervals; `naive`, those
    of each half; `matched` numbers of directions; how many `texts` and `tokens` each half has, how
    many `decisions` are read, and how many of them tuning `changed`.
    """

    name = "patch_expansion"
    title = "Is it the extra dimensions?"
    old_names: ClassVar[tuple[str, ...]] = ("expansion",)
    renamed: ClassVar[Mapping[str, str]] = {
        **RENAMED,
        "way": "method",
        "ways": "methods",
        "dose": "n_directions",
        "doses": "n_directions",
        "arm": "condition",
        "whole": "overall",
        "dealt_gains": "shuffled_gains",
        "untouched": "unchanged",
    }
    columns = ("method", "n_directions", "condition", "metric", "value", "low", "high", "se", "n")

    def sizes(self, method: str) -> list[int]:
        """The numbers of directions of a method, in order."""
        return sorted({row["n_directions"] for row in self.table if row["method"] == method})

    def judged(self, method: str) -> int | None:
        """The number of directions that the verdict looks at; None if none undoes the expansion."""
        size: int | None = self.extras["matched"].get(method, 0)
        return size

    def verdicts(self) -> list[Verdict]:
        """Whether the expansion is the cause, whether it is needed and enough, generated text."""
        if not self.extras["changed"]:
            answer = (
                "Cannot tell whether the expansion causes the reordering: tuning changed no "
                "decision on these texts, so there is nothing to be caused."
            )
            return [Verdict("cause", answer)]
        claims: list[Verdict] = []
        if self.extras["verdict"]["expansion"] is not False:
            claims = [Verdict(claim, self._of_claim(claim)) for claim in CLAIMS]
        return [
            Verdict("cause", self._overall()),
            *claims,
            *self._of_generation(),
            Verdict("scope", SCOPE, caution=True),
            *self._of_power(),
        ]

    @property
    def _smallest(self) -> float:
        return float(self.meta["options"]["smallest_effect"])

    def _overall(self) -> str:
        verdict = self.extras["verdict"]
        answer = {
            "supports": "Supported: that the expansion causes the reordering",
            "contradicts": "Contradicted: that the expansion causes the reordering",
            "cannot tell": "Cannot tell whether the expansion causes the reordering",
        }[verdict["overall"]]
        base, change = (self.extras["dimension"][key] for key in ("base", "delta"))
        size = (
            f"after the last block the residual stream spreads over {NUMBER(base['value'])} "
            f"dimensions in the base model, and the tuned model's change is "
            f"{interval(change, DIMENSIONS)}"
        )
        threshold = NUMBER(self._smallest * base["value"])
        reason = {
            True: f". There is an expansion: {size}",
            False: f". There is no expansion that could be the cause: {size} (an expansion of "
            f"interest: {threshold} dimensions)",
            None: f". It is unknown whether there is an expansion: {size}",
        }[verdict["expansion"]]
        if not verdict["expansion"]:
            return f"{answer}{reason}."
        claims = ", ".join(f"{claim}: {verdict[claim]}" for claim in CLAIMS)
        return f"{answer}{reason}. Of the two claims about it, {claims}."

    def _of_claim(self, claim: str) -> str:
        """The answer to one claim, and the effect that decides it."""
        question = {
            "needed": "Needed? The tuned model without the expansion",
            "enough": "Enough? The base model with the expansion",
        }[claim]
        answer = self.extras["verdict"][claim]
        counted = [row for row in self._effects(claim) if row["answer"] == answer]
        if not counted:
            return f"{question}: {answer}, no change moved the dimension by half of the expansion."
        row = max(counted, key=lambda row: _finite(row["low" if answer == "supported" else "high"]))
        how = self._why(answer, row)
        return (
            f"{question}: {answer}, {how}. The largest, {NAMES[row['method']]}"
            f"{self._sized(row['method'])}: {PERCENT(row['share'])} of the changed decisions are "
            f"{EFFECTS[row['effect']][0]}, {PERCENT(row['control'])} with its random control "
            f"(difference {interval(row, POINTS)})."
        )

    def _why(self, answer: str, largest: Row) -> str:
        """Which rule the largest of the effects that decide has met."""
        threshold = self._threshold
        if answer == "contradicted":
            return (
                f"every effect's upper bound is below {threshold}, and the controls leave room "
                "for more"
            )
        if answer == "supported":
            return (
                f"an effect's lower bound is above {threshold}, and it is larger than with every "
                "random draw"
            )
        if not math.isfinite(largest["low"]):
            return "too few texts for an interval"
        if largest["low"] > self._smallest:
            return f"an effect is above {threshold}, but a single random draw does as much"
        if largest["high"] >= self._smallest:
            return f"the interval of the largest effect contains {threshold}"
        return f"the controls leave too little room for an effect of {threshold}"

    @property
    def _threshold(self) -> str:
        return f"{NUMBER(100 * self._smallest)} points"

    def _sized(self, method: str) -> str:
        """The number of directions that is judged, where a method has one."""
        return f" ({self.judged(method)})" if method in BY_DIRECTIONS else ""

    def _effects(self, claim: str) -> Iterator[dict[str, Any]]:
        """What every judged change moved beyond its control."""
        for method in CLAIMS[claim]:
            found, size = self.extras["evidence"][method], self.judged(method)
            for effect, estimate in found["effects"].items():
                _, metric, is_left = EFFECTS[effect]
                share, control = (
                    self.value(method=method, n_directions=size, condition=condition, metric=metric)
                    for condition in ("itself", VARIANCE_CONTROL[method])
                )
                yield {
                    "method": method,
                    "effect": effect,
                    "moved": found["moved"],
                    "share": 1 - share if is_left else share,
                    "control": 1 - control if is_left else control,
                    "answer": self.extras["verdict"]["methods"][method],
                    **ends(estimate),
                }

    def _of_generation(self) -> Iterator[Verdict]:
        own = [
            FRACTION(row["value"])
            for side in ("base", "tuned")
            for row in self.rows(method="none", condition=side, metric="ttr")
        ]
        if not own:
            return
        parts = []
        for method in ("base_spectrum", "tuned_spectrum"):
            row, control = (
                self.at(method=method, n_directions=0, condition=condition, metric="ttr")
                for condition in ("itself", VARIANCE_CONTROL[method])
            )
            parts.append(
                f"the {side_of(method)} model {NAMES[method]} {interval(row, FRACTION)} (its "
                f"control {FRACTION(control['value'])})"
            )
        answer = f"TTR of greedy text: base {own[0]}, tuned {own[1]}; {'; '.join(parts)}."
        yield Verdict("generated text", answer)

    def _of_power(self) -> Iterator[Verdict]:
        """How much of what tuning changed the largest change of the base model reached."""
        rows = self.rows(method="tuned_covariance", n_directions=0, metric="to_tuned")
        reached = {row["condition"]: interval(row, PERCENT) for row in rows}
        if reached and self.extras["verdict"]["expansion"] is not False:
            yield Verdict(
                "power",
                "With the tuned model's whole covariance the base model reaches "
                f"{reached['itself']} of the changed decisions (its control "
                f"{reached['shuffled_gains']}). What the best affine change could reach was not "
                "measured: where even that brings little more than a control, this test has "
                'little power, and "not enough" cannot be concluded beyond these changes.',
                caution=True,
            )

    def evidence(self) -> list[Block]:
        """The effects of both claims, every change beside its control, and the rules."""
        texts, n_random = self.extras["texts"], self.meta["options"]["n_random"]
        done = Text(
            "What leaves one model's last block is changed about its mean, and nothing else: the "
            "tuned model's is made to spread over as few dimensions as the base's, or the base's "
            "over as many as the tuned model's. If the expansion causes the reordering, the tuned "
            "model must then decide as the base does, and the base as the tuned model, more than "
            f"under random changes that do as much. Directions fitted on "
            f"{count(texts['fitted'], 'text')}, decisions read on {texts['read']} others; "
            f"controls: the mean of {count(n_random, 'random draw')}."
        )
        tables = [self._claim_table(claim) for claim in CLAIMS] if self.extras["changed"] else []
        titles = {
            "needed": "The tuned model, its expansion taken away",
            "enough": "The base model, expanded",
        }
        charts = [self._chart(titles[claim], methods) for claim, methods in CLAIMS.items()]
        if self.rows(metric="ttr"):
            charts.append(self._text_chart())
        sizes = [
            Details(f"the {side_of(method)} model {NAMES[method]}", [self._sizes_table(method)])
            for method in METHODS
            if self.sizes(method)
        ]
        rules = f"{RULES} Smallest effect of interest: {self._threshold}."
        return [done, *tables, Grid(charts), *sizes, Details("the rules", [Text(rules)])]

    def _claim_table(self, claim: str) -> Table:
        rows = [
            [
                f"{SHORT[row['method']]}{self._sized(row['method'])}: {row['effect']}",
                PERCENT(row["moved"]),
                PERCENT(row["share"]),
                PERCENT(row["control"]),
                interval(row, PLAIN_POINTS),
                row["answer"] or "not counted",
            ]
            for row in self._effects(claim)
        ]
        head = ["change: effect", "moved", "with it", "control", "difference, points", "answer"]
        caption = (
            f"is it {claim}? moved: share of the expansion (50% to count); with it, control: share "
            "of changed decisions; differences are paired by text, 95% intervals hold together"
        )
        return Table(head, rows, caption)

    def _changes(self, methods: Sequence[str]) -> Iterator[tuple[str, int, str]]:
        """Every change, and what it is called in a chart."""
        for method in methods:
            for size in self.sizes(method):
                directions = f" ({size})" if method in BY_DIRECTIONS else ""
                yield method, size, f"{SHORT[method]}{directions}"

    def _chart(self, title: str, methods: Sequence[str]) -> Chart:
        rows: list[dict[str, Any]] = []
        for method, size, label in self._changes(methods):
            dimension = self.rows(
                method=method, n_directions=size, condition="itself", metric="dimension"
            )
            name = f"{label}, dimension {NUMBER(dimension[0]['value'])}" if dimension else label
            rows += self._points(method, size, name, "to_tuned")
        alt = f"{title}: share of changed decisions that are the tuned model's, beside controls"
        axes = (
            Axis("value", "changed decisions that are the tuned model's (share)", "share"),
            Axis("change", "", is_category=True),
        )
        return Chart("dots", title, alt, rows, *axes, {CHANGE: "other", CONTROL: "control"})

    def _points(self, method: str, size: int, label: str, metric: str) -> Iterator[dict[str, Any]]:
        names = {"itself": CHANGE, VARIANCE_CONTROL[method]: CONTROL}
        for condition, series in names.items():
            for row in self.rows(
                method=method, n_directions=size, condition=condition, metric=metric
            ):
                yield {"series": series, "change": label, **ends(row)}

    def _text_chart(self) -> Chart:
        sides: dict[str, Role] = {self.base_name: "base", self.tuned_name: "tuned"}
        rows = [
            {"series": name, "change": "as it is", **ends(row)}
            for name, side in sides.items()
            for row in self.rows(method="none", condition=side, metric="ttr")
        ]
        for method, size, label in self._changes(METHODS):
            rows += self._points(method, size, label, "ttr")
        title = "TTR of greedy text, mean over prompts"
        axes = Axis("value", "TTR", "share"), Axis("change", "", is_category=True)
        roles = sides | {CHANGE: "other", CONTROL: "control"}
        return Chart("dots", title, f"{title}, under each change", rows, *axes, roles)

    def _sizes_table(self, method: str) -> Table:
        rows = [
            row
            for size in self.sizes(method)
            for condition in CONDITIONS
            if (row := self._size_row(method, size, condition))
        ]
        head = ["directions", "condition", "dimension", *SHARES.values()]
        head += ["KL(tuned ‖ it), nats", "greedy TTR"]
        caption = (
            "shares of changed decisions (base rank: of all), 95% over texts; TTR: mean over "
            "prompts; * just undoes the expansion, and is judged"
        )
        return Table(head, rows, caption)

    def _size_row(self, method: str, size: int, condition: str) -> list[str]:
        """One change of a size, or its control; empty if it was not measured."""
        wanted = {"method": method, "n_directions": size, "condition": condition}
        found = {row["metric"]: row for row in self.rows(**wanted)}
        if "to_tuned" not in found:
            return []
        mark = "*" if method in BY_DIRECTIONS and size == self.judged(method) else ""
        return [
            f"{size or 'all'}{mark}",
            CONDITIONS[condition],
            NUMBER(found["dimension"]["value"]),
            *(interval(found[metric], PERCENT) for metric in SHARES),
            NUMBER(found["kl_tuned"]["value"]),
            interval(found["ttr"], FRACTION) if "ttr" in found else "",
        ]


# In a column whose head names the unit.
PLAIN_POINTS = replace(POINTS, unit="")


def _finite(x: float) -> float:
    """NaN is smaller than every number."""
    return x if math.isfinite(x) else -math.inf
