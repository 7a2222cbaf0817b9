"""Does the expansion cause the reordering? The rules of the verdict, and the result.

Two claims are judged. *Needed*: with the expansion taken away, the tuned model's changed decisions
go, or go back to the base model's, more than with as much taken away at random. *Enough*: the
expansion alone makes the base model decide as the tuned one does, more than its control.

1. Without a changed decision there is nothing to be caused: cannot tell.
2. Where the interval of the change of dimension (raw outputs of the last block) lies above 0, by
   more than rounding, there is an expansion. Where it lies below the smallest effect of interest,
   as a share of the base model's dimension, there is none to be the cause: contradicts, whatever
   else. Otherwise it is unknown whether there is one: cannot tell. The same is asked of what the
   tuned model's final norm and unembedding read of both streams (the dimension of the logits of
   the tokens that occur in the texts): unless that grew too, the whole is not supported.
3. Only methods that change how the variance is spread decide (`DECIDING`): those that take along
   directions which grew without raising the dimension are evidence. A method counts if on the
   texts that decisions are read on it moves the dimension by at least half of the expansion. Its
   effect is the share of changed decisions that it moves, less its control's (paired by text, mean
   over the random draws), with intervals that hold together over the methods and effects of a claim
   (Bonferroni).
4. A method supports the claim if the interval of an effect lies above the smallest effect of
   interest, and the effect is larger than with every single draw of a control of the same variance.
   It contradicts the claim if all its effects' intervals lie below the smallest effect, and it is
   sure that more could be reached: what its control leaves to be lost, or the best change of its
   kind brings beyond the control (an affine map of the base's outputs; all of the tuned model's
   coordinates), is above the smallest effect too. Where even that is not more, the method cannot
   decide, and does not count; but one that could move every decision and by itself, without its
   control subtracted, surely moves fewer than the smallest effect contradicts the claim.
5. A claim is supported if all methods that count support it, contradicted if all contradict it;
   otherwise it cannot be told. "Needed" is not supported where setting a single direction back to
   the base's variance returns at least half as many decisions as the method that returns most,
   and the dimension falls by less than the smallest effect, as a share of the expansion: then
   that direction is needed, not the expansion.
6. The whole: supports if both claims are supported and the expansion is read, contradicts if one is
   contradicted, cannot tell otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

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
from .changes import (
    ADDING,
    AFFINE,
    BY_DIRECTIONS,
    METHODS,
    REMOVING,
    SINGLE,
    VARIANCE_CONTROL,
    side_of,
)

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
        least: the same less the draw of a control that does most, without an interval.
        room: the share of changed decisions that could be moved beyond the control: all that it
            leaves, or what the best change of the kind brings more.
        shares: the effects without the control, where everything is in reach of the method.
    """

    moved: float
    effects: Mapping[str, Estimate]
    least: Mapping[str, float]
    room: Estimate
    shares: Mapping[str, Estimate] = field(default_factory=dict)


class Expansion(NamedTuple):
    """A change of dimension, tuned - base, and the base model's dimension."""

    change: Estimate
    base: float


class Single(NamedTuple):
    """One of the directions that grew most, set back to the base's variance.

    Attributes:
        direction: which, counted from 1.
        fell: by how much of the expansion the dimension fell; negative: it rose.
        returned: the share of changed decisions that are the base model's again.
    """

    direction: int
    fell: float
    returned: Estimate


@dataclass(frozen=True)
class Judgement:
    """What may be said.

    Attributes:
        overall: of the hypothesis that the expansion causes the reordering.
        expansion: whether the dimension grew; None where it cannot be told.
        read: the same of what the tuned model's unembedding reads.
        needed, enough: the two claims.
        methods: what each method says of its claim; None for those that do not count.
        veto: the single direction that is needed without any fall of dimension, from 1; None
            if there is none.
    """

    overall: Overall
    expansion: bool | None
    read: bool | None
    needed: Answer
    enough: Answer
    methods: Mapping[str, Answer | None]
    veto: int | None


def judge(
    raw: Expansion,
    read: Expansion,
    n_changed: int,
    needed: Mapping[str, Evidence],
    enough: Mapping[str, Evidence],
    singles: Sequence[Single],
    smallest: float,
) -> Judgement:
    """Apply the rules of this module.

    Args:
        raw: of the last block's outputs.
        read: of what the tuned model's final norm and unembedding read of them.
        n_changed: how many decisions tuning changed.
        needed, enough: what each method did that decides the claim, `jointly`.
        singles: what single directions do.
        smallest: effect of interest, as a share of changed decisions and of the dimension.
    """
    grew, is_read = (expanded(change, base, smallest) for change, base in (raw, read))
    methods = {method: of_method(found, smallest) for method, found in {**needed, **enough}.items()}
    claims = [of_claim([methods[method] for method in claim]) for claim in (needed, enough)]
    veto = vetoed(singles, needed, smallest)
    if veto is not None and claims[0] == "supported":
        claims[0] = "cannot tell"
    overall: Overall = "cannot tell"
    if n_changed and grew is False:
        overall = "contradicts"
    elif n_changed and grew:
        if "contradicted" in claims:
            overall = "contradicts"
        elif claims == ["supported", "supported"] and is_read:
            overall = "supports"
    return Judgement(overall, grew, is_read, claims[0], claims[1], methods, veto)


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
    """What one method says; None if it does not count (rules 3 and 4)."""
    if not found.moved >= HALF:
        return None
    if not all(math.isfinite(one.low) for one in found.effects.values()):
        return "cannot tell"
    if any(one.low > smallest and found.least[name] > 0 for name, one in found.effects.items()):
        return "supported"
    if found.shares and all(share.high < smallest for share in found.shares.values()):
        return "contradicted"
    if found.room.value <= smallest:
        return None
    if all(one.high < smallest for one in found.effects.values()) and found.room.low > smallest:
        return "contradicted"
    return "cannot tell"


def of_claim(methods: Sequence[Answer | None]) -> Answer:
    """What all methods together say (rule 5)."""
    counted = {method for method in methods if method is not None}
    return counted.pop() if len(counted) == 1 else "cannot tell"


def vetoed(
    singles: Sequence[Single], needed: Mapping[str, Evidence], smallest: float
) -> int | None:
    """The direction that returns most decisions without any fall of dimension (rule 5)."""
    returned = [
        one.effects["returned"].value for one in needed.values() if "returned" in one.effects
    ]
    most = max(returned, default=0.0)
    causal = [
        one
        for one in singles
        if one.fell < smallest and one.returned.low > smallest and one.returned.value >= HALF * most
    ]
    return max(causal, key=lambda one: one.returned.value).direction if causal else None


# The result


Row = Mapping[str, Any]

NAMES = {
    "base_directions": "kept to the base's first directions",
    "new_directions": "rid of the directions that grew most",
    "base_spectrum": "given the base's spectrum",
    "expanding_directions": "set back along the directions that expand",
    "tuned_spectrum": "given the tuned model's spectrum",
    "tuned_covariance": "given the tuned model's covariance",
    "tuned_coordinates": "given the tuned model's coordinates along the directions that expand",
}
SHORT = {
    "base_directions": "base directions kept",
    "new_directions": "grown directions removed",
    "base_spectrum": "base spectrum",
    "expanding_directions": "expanding ones set back",
    "tuned_spectrum": "tuned spectrum",
    "tuned_covariance": "tuned covariance",
    "tuned_coordinates": "tuned coordinates",
}
CONDITIONS = {
    "itself": "the change itself",
    "same_dimension": "control: random directions, as many",
    "same_variance": "control: random directions, as much variance",
    "rotated": "control: the same coordinates along random directions",
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
# Why a method does not count: it does not move the dimension, or there is nothing in its reach.
NOT_COUNTED, CANNOT_DECIDE = "not counted", "cannot decide"
RULES = (
    "Without a changed decision, or where it is unknown whether the dimension grew: cannot tell. "
    "Without an expansion: contradicted. Only changes of how the variance is spread decide; those "
    "that take along directions which grew without raising the dimension are evidence. A change "
    "counts if it moves the dimension by at least half of the expansion on the texts that "
    "decisions are read on, and could show an effect: the best change of its kind does more than "
    "its control by the smallest effect of interest. Its effect is the share of changed decisions "
    "that it moves, less that of its random control, paired by text, with 95% intervals that hold "
    "together over a claim (Bonferroni). It supports the claim where the lower bound of an effect "
    "lies above the smallest effect and the effect is larger than with every single random draw; "
    "it contradicts it where the upper bounds of all its effects lie below, and it is sure that "
    "more could be reached, or where it moves next to nothing even before its control is "
    "subtracted. A claim is supported if all changes that count support it, contradicted if all "
    "contradict it. It is not supported that the expansion is needed where one direction alone, "
    "set back to the base's variance, returns half as many decisions and the dimension does not "
    "fall. Overall: supported if both claims are and what the unembedding reads expands too, "
    "contradicted if one is, cannot tell otherwise."
)
EARLIER = (
    "Judged by the rules of an earlier version, in which one change of several was enough to "
    "support a claim, directions that do not expand were counted, and it was not asked what the "
    "best change could reach: it may be wrong in both directions. Measure again."
)
SCOPE = (
    "Directions were fitted on some texts and decisions read on others; only affine changes of the "
    "last block's output about its mean were tried, and the tuned model's own coordinates: nothing "
    "can be concluded about other changes, nor about what spreads over directions only within "
    "some contexts."
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
    random draw; `dimension`, the participation ratios of both models with intervals;
    `read_by_head`, those of what the tuned model's final norm and unembedding read; `naive`, those
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
            *self._of_power(),
            *self._of_generation(),
            Verdict("scope", SCOPE, caution=True),
            *([Verdict("earlier rules", EARLIER, caution=True)] if self._is_earlier else []),
        ]

    @property
    def _is_earlier(self) -> bool:
        """Whether an earlier version made this, by other rules."""
        return "read" not in self.extras["verdict"]

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
        if not self._is_earlier:
            reason += self._of_reading()
        claims = ", ".join(f"{claim}: {verdict[claim]}" for claim in CLAIMS)
        return f"{answer}{reason}. Of the two claims about it, {claims}."

    def _of_reading(self) -> str:
        """How much of the expansion the unembedding reads."""
        base, change = (self.extras["read_by_head"][key] for key in ("base", "delta"))
        size = f"{NUMBER(base['value'])} dimensions in the base, {interval(change, DIMENSIONS)}"
        return {
            True: f". What the unembedding reads of it, the logits, expands too ({size})",
            False: f". But what the unembedding reads of it, the logits, does not expand ({size})",
            None: ". But it is unknown whether what the unembedding reads of it, the logits, "
            f"expands ({size})",
        }[self.extras["verdict"]["read"]]

    def _of_claim(self, claim: str) -> str:
        """The answer to one claim, and the effect that decides it."""
        question = {
            "needed": "Needed? The tuned model without the expansion",
            "enough": "Enough? The base model with the expansion",
        }[claim]
        verdict = self.extras["verdict"]
        answer = verdict[claim]
        effects = [row for row in self._effects(claim) if row["answer"] is not None]
        if not effects:
            return f"{question}: {answer}, {self._why_none_counts(claim)}."
        if (claim, answer) == ("needed", "cannot tell") and verdict.get("veto") is not None:
            return f"{question}: {answer}. {self._of_veto(verdict['veto'])}"
        decided = [row for row in effects if row["answer"] == answer]
        if not decided:
            said = "; ".join(
                f"{NAMES[method]}: {verdict['methods'][method]}"
                for method in dict.fromkeys(row["method"] for row in effects)
            )
            return f"{question}: {answer}, the changes do not agree ({said})."
        row = max(decided, key=lambda row: _finite(row["low" if answer == "supported" else "high"]))
        return (
            f"{question}: {answer}, {self._why(answer, row)}. The largest, {NAMES[row['method']]}"
            f"{self._sized(row['method'])}: {PERCENT(row['share'])} of the changed decisions are "
            f"{EFFECTS[row['effect']][0]}, {PERCENT(row['control'])} with its random control "
            f"(difference {interval(row, POINTS)})."
        )

    def _why_none_counts(self, claim: str) -> str:
        deciding = self.extras["verdict"]["methods"]
        reasons = {
            method: self._not_counted(method) for method in CLAIMS[claim] if method in deciding
        }
        if set(reasons.values()) == {NOT_COUNTED}:
            return "no change that decides moved the dimension by half of the expansion"
        words = {
            NOT_COUNTED: "it did not move the dimension by half of the expansion",
            CANNOT_DECIDE: f"nothing of its kind does {self._threshold} more than its control",
        }
        each = "; ".join(f"{NAMES[method]}, {words[why]}" for method, why in reasons.items())
        return f"no change counts ({each})"

    def _of_veto(self, direction: int) -> str:
        """Which single direction is needed though the dimension does not fall."""
        row = self.at(method=SINGLE, n_directions=direction, condition="itself", metric="to_base")
        dimension = self.value(
            method=SINGLE, n_directions=direction, condition="itself", metric="dimension"
        )
        tuned = self.value(method="none", n_directions=0, condition="tuned", metric="dimension")
        return (
            f"Of the directions that grew, number {direction} alone, set back to the base's "
            f"variance, returns {interval(row, PERCENT)} of the changed decisions while the "
            f"dimension goes from {NUMBER(tuned)} to {NUMBER(dimension)}: that direction is "
            "needed, not the expansion."
        )

    def _why(self, answer: str, largest: Row) -> str:
        """Which rule the largest of the effects that decide has met."""
        threshold = self._threshold
        if answer == "contradicted":
            return f"every effect's upper bound is below {threshold}, and more could be reached"
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
        return f"it is not sure that an effect of {threshold} could be reached"

    @property
    def _threshold(self) -> str:
        return f"{NUMBER(100 * self._smallest)} points"

    def _sized(self, method: str) -> str:
        """The number of directions that is judged, where a method has one."""
        return f" ({self.judged(method)})" if method in BY_DIRECTIONS else ""

    def _effects(self, claim: str) -> Iterator[dict[str, Any]]:
        """What every judged change moved beyond its control."""
        for method in CLAIMS[claim]:
            if method not in self.extras["evidence"]:
                continue  # a result of an earlier version
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
                    "answer": self.extras["verdict"]["methods"].get(method),
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
        """How much of what tuning changed could be reached at all, beside what would be needed."""
        if self._is_earlier or self.extras["verdict"]["expansion"] is False:
            return
        kinds = {
            "tuned_spectrum": ("the best affine map of the base's output brings", AFFINE, 0),
            "tuned_coordinates": (
                "all of the tuned model's coordinates bring",
                "tuned_coordinates",
                max(self.sizes("tuned_coordinates"), default=0),
            ),
        }
        for method, (words, best, size) in kinds.items():
            if self.judged(method) is None:
                continue
            row = self.at(method=best, n_directions=size, condition="itself", metric="to_tuned")
            control = self.value(
                method=method,
                n_directions=self.judged(method),
                condition=VARIANCE_CONTROL[method],
                metric="to_tuned",
            )
            least = min(control + self._smallest, 1.0)
            answer = (
                f"In reach of the base model: {words} {interval(row, PERCENT)} of the changed "
                f"decisions; support needs more than {PERCENT(least)} (the control of "
                f"{SHORT[method]} and {self._threshold})"
            )
            if row["value"] <= least:
                answer += ": that change cannot decide"
            yield Verdict("power", f"{answer}.")

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
        if self.sizes(SINGLE):
            title = "single directions, set back to the base's variance"
            sizes.append(Details(title, [self._sizes_table(SINGLE)]))
        rules = EARLIER if self._is_earlier else RULES
        rules = f"{rules} Smallest effect of interest: {self._threshold}."
        return [done, *tables, Grid(charts), *sizes, Details("the rules", [Text(rules)])]

    def _claim_table(self, claim: str) -> Table:
        rows = [
            [
                f"{SHORT[row['method']]}{self._sized(row['method'])}: {row['effect']}",
                PERCENT(row["moved"]),
                PERCENT(row["share"]),
                PERCENT(row["control"]),
                interval(row, PLAIN_POINTS),
                row["answer"] or self._not_counted(row["method"]),
            ]
            for row in self._effects(claim)
        ]
        head = ["change: effect", "moved", "with it", "control", "difference, points", "answer"]
        caption = (
            f"is it {claim}? moved: share of the expansion (50% to count); with it, control: share "
            "of changed decisions; differences are paired by text, 95% intervals hold together"
        )
        return Table(head, rows, caption)

    def _not_counted(self, method: str) -> str:
        if method not in self.extras["verdict"]["methods"]:
            return "evidence only"
        return CANNOT_DECIDE if self.extras["evidence"][method]["moved"] >= HALF else NOT_COUNTED

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
