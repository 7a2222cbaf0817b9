"""The paper's numbers and a run's, side by side, and what became of each claim."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from ..render.blocks import Block, Details, Heading, Table, Text, Verdict
from ..render.format import MISSING, number
from ..results.result import Result
from .claims import Claim
from .paper import (
    CONTRADICTIONS,
    NOT_MEASURED,
    SAID,
    PaperNumber,
    exhibits,
    paper_numbers,
    stages_of,
)
from .protocol import Protocol
from .readings import Readings

# Two numbers of the paper are compared with what the paper printed behind ±, this many times.
STANDARD_ERRORS = 2.0
# The settings that decide a stage's numbers and that the paper states.
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "temperature": ("n_prompts", "max_new_tokens"),
    "static_bias": ("n_prompts", "max_new_tokens", "bias_tokens", "alphas"),
    "variants": ("n_prompts", "max_new_tokens", "last_k"),
    "provenance": ("max_new_tokens",),
    "decoding": ("min_p", "guard_window", "max_new_tokens"),
    "judge": ("n_judged",),
    "training": ("last_k",),
}
OF_TRAINING = ("n_train", "epochs")


def side_by_side(found: Readings, protocol: Protocol) -> list[dict[str, Any]]:
    """A row for each number of the paper that a run has measured or could have.

    Both ends of a range that the paper prints are one row.

    Args:
        found: what was measured.
        protocol: how.
    """
    printed: dict[tuple[str, str, str, str], list[PaperNumber]] = {}
    for one in paper_numbers():
        if one.quantity:
            key = (one.exhibit, one.model, one.quantity, one.row if one.relation != "range" else "")
            printed.setdefault(key, []).append(one)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for numbers in printed.values():
        row = _row(numbers, found, protocol)
        # What a caption repeats of its table stands once.
        rows.setdefault(tuple(row[k] for k in ("exhibit", "model", "quantity", "paper")), row)
    return list(rows.values())


def _row(numbers: Sequence[PaperNumber], found: Readings, protocol: Protocol) -> dict[str, Any]:
    one = numbers[0]
    values = [number.value for number in numbers]
    is_range = one.relation == "range"
    mine = found.get(one.quantity)
    scale = 100.0 if one.unit == "%" else 1.0
    value, low, high = (
        (scale * x for x in mine[:3]) if mine is not None else (math.nan, math.nan, math.nan)
    )
    low_end, high_end = (min(values), max(values)) if is_range else (one.low, one.high)
    return {
        "exhibit": one.exhibit,
        "model": one.model,
        "row": one.row,
        "column": one.column.split(" (low")[0].split(" (high")[0],
        "quantity": one.quantity,
        "unit": one.unit,
        "relation": one.relation,
        "paper": sum(values) / len(values) if is_range else one.value,
        "paper_uncertainty": one.uncertainty,
        "paper_low": low_end,
        "paper_high": high_end,
        "value": value,
        "low": low,
        "high": high,
        "n": mine.n if mine is not None else 0,
        "same_direction": _same_direction(one, value, found, scale),
        "within": _within(one, value, low_end, high_end),
        "settings": settings_that_differ(one.stage, protocol),
    }


def _within(one: PaperNumber, value: float, low: float, high: float) -> bool | None:
    """Whether a value lies within what the paper prints; None where it prints no uncertainty."""
    if math.isnan(value):
        return None
    if math.isfinite(low):
        return low <= value <= high
    if math.isfinite(one.uncertainty):
        return abs(value - one.value) <= STANDARD_ERRORS * one.uncertainty
    return None


def reference_of(quantity: str) -> str | None:
    """What a quantity is above or below in the paper; "" for 0, None where nothing is compared.

    >>> reference_of("variants/late_lora/ttr"), reference_of("geometry/delta_last")
    ('variants/original/ttr', '')
    """
    stage, _, rest = quantity.partition("/")
    name, _, metric = rest.rpartition("/")
    if stage in ("variants", "temperature", "static_bias") and name not in ("original", "p", ""):
        return None if name == "trend" else f"{stage}/original/{metric}"
    if stage == "decoding" and name != "greedy":
        return f"decoding/greedy/{metric}"
    if stage == "cross_domain" and metric == "ttr":
        return f"{stage}/{name}/ttr_base"
    return "" if metric in ("delta", "delta_last", "rho") else None


def _same_direction(one: PaperNumber, value: float, found: Readings, scale: float) -> bool | None:
    """Whether a run's difference from the reference has the paper's sign; None if unknown."""
    reference = reference_of(one.quantity)
    if reference is None or math.isnan(value):
        return None
    if not reference:
        return bool(value * one.value > 0)
    theirs = next(
        (
            other
            for other in paper_numbers()
            if (other.exhibit, other.model, other.quantity) == (one.exhibit, one.model, reference)
        ),
        None,
    )
    ours = found.get(reference)
    if theirs is None or ours is None:
        return None
    gap = one.value - theirs.value
    # Within the noise that the paper states, its difference has no direction.
    if abs(gap) <= STANDARD_ERRORS * math.hypot(one.uncertainty, theirs.uncertainty) or gap == 0:
        return None
    return bool(gap * (value - scale * ours.value) > 0)


def settings_that_differ(stage: str, protocol: Protocol) -> str:
    """The settings of a stage that the paper states and this run has otherwise.

    >>> from hyperlens.reproduction.protocol import protocol_for
    >>> settings_that_differ("judge", protocol_for("demo", epochs=260, n_train=2000))
    'n_judged 32 (paper 200)'
    """
    names = (*SETTINGS.get(stage, ()), *OF_TRAINING)
    paper = Protocol()
    return ", ".join(
        f"{name} {_plain(getattr(protocol, name))} (paper {_plain(getattr(paper, name))})"
        for name in names
        if getattr(protocol, name) != getattr(paper, name)
    )


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


WITH_MAUVE = ("Table 6", "Table 7")
OUTCOMES = {True: "yes", False: "no", None: MISSING}


class ReproductionResult(Result):
    """A row for each number of arXiv 2605.22579 that can be measured, and this run's beside it.

    `paper` is as printed, in `unit`, with what stands behind ± as `paper_uncertainty` and a printed
    interval or range as `paper_low` to `paper_high`. `value` with its 95% interval is this run's,
    NaN where it was not measured. `same_direction`: whether it is on the same side of the
    original's value (or of 0) as in the paper, None where the paper's own difference is within
    twice its ±; `within`: whether it lies within the printed interval or range, or within twice
    what stands behind ±; None where the paper prints none.
    `settings`: what the paper states and this run has otherwise, the model apart.

    Extras: `claims`, what became of each claim of the abstract, by which rule and number; `said`,
    what this run found where the paper says something without a number; `beside`, what it
    measured in another way than the paper, too;
    `not_run`, stages that were not measured and why; `protocol` and the `origins` of its values.
    """

    name: ClassVar[str] = "reproduction"
    title: ClassVar[str] = "Does the paper hold for this model?"
    is_overview: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (
        *("exhibit", "model", "row", "column", "quantity", "unit", "relation"),
        *("paper", "paper_uncertainty", "paper_low", "paper_high"),
        *("value", "low", "high", "n", "same_direction", "within", "settings"),
    )

    @property
    def claims(self) -> list[Claim]:
        """What became of each claim of the abstract."""
        return [Claim(**one) for one in self.extras["claims"]]

    def verdicts(self) -> list[Verdict]:
        """Each claim of the abstract: reproduced, not reproduced or cannot tell, and why."""
        found = [
            Verdict(one.name, f"{one.outcome}: {one.claim} ({one.decided_by}).")
            for one in self.claims
        ]
        caution = (
            "One base model, one run of training and these texts: a claim that is not reproduced "
            "here may hold for the paper's models, and the other way round."
        )
        if self.meta["small"]:
            caution += f" {self.meta['small']}"
        return [*found, Verdict("scope", caution, caution=True)]

    def evidence(self) -> list[Block]:
        """The rules of the claims, a table per exhibit, what was not run, and the protocol."""
        return [
            Details("the rules of the claims", [self._rules()]),
            Heading("The paper's numbers and this run's"),
            Text(
                f"{self._totals()} The paper's models are others than this one: equal numbers are "
                "not expected, equal directions are."
            ),
            *self._tables(),
            *self._said(),
            Details("exhibits without a measurement", [self._missing()]),
            Details("the protocol", [self._protocol()]),
        ]

    def _rules(self) -> Table:
        rows = [[one.name, one.outcome, one.decided_by, one.rule] for one in self.claims]
        return Table(["claim", "outcome", "decided by", "rule: reproduced if"], rows)

    def _totals(self) -> str:
        measured = [row for row in self.table if math.isfinite(row["value"])]
        parts = []
        for column, words in (
            ("same_direction", "have the paper's direction"),
            ("within", "lie within the paper's interval, or twice its ±"),
        ):
            known = [row[column] for row in measured if row[column] is not None]
            parts.append(f"{sum(known)} of {len(known)} {words}")
        return f"{len(measured)} of {len(self.table)} numbers were measured; {', '.join(parts)}."

    def _tables(self) -> Iterator[Block]:
        """One folded table per exhibit; those of nothing but repetitions in the text come last."""
        for exhibit in self._ordered():
            rows = self.rows(exhibit=exhibit)
            if not any(math.isfinite(row["value"]) for row in rows):
                continue
            blocks: list[Block] = [_table(rows)]
            if exhibit in self.extras.get("beside", {}):
                blocks.append(Text(" ".join(self.extras["beside"][exhibit])))
            if exhibit in CONTRADICTIONS:
                text = f"The paper contradicts itself here: {CONTRADICTIONS[exhibit]}."
                blocks.append(Text(text, role="note"))
            yield Details(f"{exhibit} ({', '.join(_models(rows))})", blocks)

    def _said(self) -> Iterator[Block]:
        """What the paper says without a number, and what this run found."""
        for exhibit, sentences in self.extras.get("said", {}).items():
            words = f"The paper: {SAID[exhibit]}. This run: {' '.join(sentences)}"
            yield Details(exhibit, [Text(words)])

    def _ordered(self) -> list[str]:
        found = dict.fromkeys(row["exhibit"] for row in self.table)
        return sorted(
            found, key=lambda name: (not name.startswith(("Table", "Figure")), _key(name))
        )

    def _missing(self) -> Table:
        not_run = self.extras["not_run"]
        rows = []
        for exhibit in exhibits():
            needed = [*stages_of(exhibit), *(["MAUVE"] if exhibit in WITH_MAUVE else [])]
            why = NOT_MEASURED.get(exhibit) or "; ".join(
                f"{stage}: {not_run[stage]}" for stage in needed if stage in not_run
            )
            if why:
                rows.append([exhibit, why])
        return Table(["exhibit", "why"], rows)

    def _protocol(self) -> Table:
        origins = self.extras["origins"]
        rows = [
            [name, _plain(tuple(value) if isinstance(value, list) else value), origins[name]]
            for name, value in self.extras["protocol"].items()
        ]
        return Table(["setting", "value", "whose choice"], rows)


def _key(exhibit: str) -> tuple[str, int, str]:
    """Tables and figures by their numbers."""
    kind, _, rest = exhibit.partition(" ")
    return kind, int(rest) if rest.isdigit() else 0, rest


def _models(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = [
        [
            f"{row['row']}, {row['column']}",
            _printed(row),
            _measured(row),
            OUTCOMES[row["same_direction"]],
            OUTCOMES[row["within"]],
        ]
        for row in rows
    ]
    settings = dict.fromkeys(row["settings"] for row in rows if row["settings"])
    caption = f"settings that differ: {'; '.join(settings)}" if settings else ""
    head = ["", "paper", "this run [95%]", "same direction", "within ± 2 SE"]
    return Table(head, cells, caption)


def _printed(row: Mapping[str, Any]) -> str:
    """A number as the paper has it: `0.684 ± 0.017`, `0.67 to 0.69`, `< 0.001`."""
    unit = f" {row['unit']}" if row["unit"] in ("%", "nats", "hours", "dimensions") else ""
    if row["relation"] == "range":
        return f"{row['paper_low']:g} to {row['paper_high']:g}{unit}"
    sign = {"=": "", "~": "about "}.get(row["relation"], f"{row['relation']} ")
    text = f"{sign}{row['paper']:g}"
    if math.isfinite(row["paper_uncertainty"]):
        text += f" ± {row['paper_uncertainty']:g}"
    elif math.isfinite(row["paper_low"]):
        text += f" [{row['paper_low']:g}, {row['paper_high']:g}]"
    return text + unit


def _measured(row: Mapping[str, Any]) -> str:
    if math.isnan(row["value"]):
        return MISSING
    text = number(row["value"])
    if math.isfinite(row["low"]):
        text += f" [{number(row['low'], row['value'])}, {number(row['high'], row['value'])}]"
    return text
