"""What a judge preferred, as a result: its words, its figure."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..experiments.wording import noted, p_in_words, wrapped
from ..results.result import Result
from .verdict import CRITERIA

if TYPE_CHECKING:
    import matplotlib.figure

WINS = {"a_wins": "A wins", "tie": "tie", "b_wins": "B wins"}
LEANINGS = {
    "first_position": "pairs judged by place, for the text shown first",
    "longer_wins": "decided pairs won by the longer text",
    "fewer_repeats_wins": "decided pairs won by the text that repeats less",
    "orders_disagree": "pairs judged otherwise in the other order",
}


@dataclass(frozen=True)
class JudgeResult(Result):
    """Which of two models' continuations a judge prefers, each pair asked in both orders.

    A is `meta["base"]`, B is `meta["tuned"]`, whatever they are. The table has a row per criterion
    ("coherence", "diversity": the higher score; "overall": the named winner) and metric:

    - `a_wins`, `b_wins`, `tie`: shares of pairs; a pair is won by who wins in both orders;
    - `a_of_decided`: A's share of the pairs that are no ties, p of the exact binomial test against
      one half, Holm-corrected over the criteria;
    - `first_position`: of the pairs whose two answers favour one place (both name it, or one does
      and the other is a tie), the share that favour the first; `orders_disagree`: share of pairs
      judged otherwise in the other order; `longer_wins`, `fewer_repeats_wins`: shares of decided
      pairs won by the text with more words, with fewer repeated bigrams of words;
    - `score_a`, `score_b`, `score_difference` (A - B): mean scores, 1 to 10 (not overall).

    Shares have Wilson's 95% intervals, scores t intervals over pairs. n: pairs.

    Extras: `counts` of pairs, `outcomes` by criterion and pair ("a", "b", "tie"; None: left out),
    `examples` of verdicts, `problems` with answers that could not be read, `unreadable` examples
    of them, and `prompt`, the question.
    """

    name = "judge"
    columns = ("criterion", "metric", "value", "low", "high", "n", "p")

    def value(self, criterion: str, metric: str) -> Mapping[str, Any]:
        """One row of the table."""
        return self.select(criterion=criterion, metric=metric)[0]

    @property
    def sides(self) -> tuple[str, str]:
        """The names of A and B."""
        return _printable(self.meta["base"]["name"]), _printable(self.meta["tuned"]["name"])

    @property
    def judge(self) -> str:
        """Who judged, in a few words."""
        about = self.meta["judge"]
        name = about.get("model") or about.get("name") or "unnamed"
        where = f" at {about['url']}" if "url" in about else ""
        return _printable(f"{name}{where} ({about['kind']})")

    @property
    def is_language_model(self) -> bool:
        """Whether a language model judged, as far as is known."""
        return self.meta["judge"]["kind"] in ("endpoint", "local")

    def summary(self) -> str:
        """Rates, tests, and what leans on what."""
        a, b = self.sides
        lines = [
            f"judge  A = {a}",
            f"       B = {b}",
            *wrapped(f"judged by {self.judge}, each pair in both orders"),
            *wrapped(self.counted()),
            "",
            f"{'share of pairs [95%]':<22}"
            + "    ".join(f"{words:<19}" for words in WINS.values()).rstrip(),
        ]
        for criterion in CRITERIA:
            cells = "".join(f"{percent(self.value(criterion, m)):<23}" for m in WINS)
            p = p_in_words(self.value(criterion, "a_of_decided")["p"])
            lines.append(f"  {criterion:<20}{cells}{p}".rstrip())
        lines += ["", "the judge's leanings, overall [95%]"]
        lines += [
            f"  {words:<52}{percent(self.value('overall', metric))}"
            for metric, words in LEANINGS.items()
        ]
        said = [line for sentence in self.conclusions() for line in wrapped(sentence)]
        return "\n".join([*lines, "", *noted(self.meta), *said])

    def counted(self) -> str:
        """How many pairs there were, and what became of them."""
        counts = self.extras["counts"]
        parts = [f"{counts['pairs']} pairs: {counts['judged']} judged"]
        if counts["identical"]:
            parts.append(f"{counts['identical']} of two equal texts (ties, not asked)")
        if counts["left_out"]:
            problems = "; ".join(f"{n}x {what}" for what, n in self.extras["problems"].items())
            parts.append(
                f"{counts['left_out']} left out, because an answer could not be read ({problems})"
            )
        return ", ".join(parts)

    def conclusions(self) -> list[str]:
        """What the numbers allow to say."""
        counts = self.extras["counts"]
        if not counts["judged"] and not counts["identical"]:
            return ["No pair could be judged: the judge gave no answer of the form asked for."]
        said = [self._verdict(criterion) for criterion in CRITERIA]
        place = self.value("overall", "first_position")
        if place["low"] > 0.5 or place["high"] < 0.5:
            which = "first" if place["value"] > 0.5 else "second"
            said.append(
                f"The judge leans towards the text shown {which}; it decided only the pairs that "
                "it judged alike in both orders."
            )
        if not self.is_language_model:
            said.append("The judge is no language model known to hyperlens: this is no evidence.")
        said.append(
            "p: exact binomial test of wins among decided pairs, Holm-corrected over the three "
            "criteria. A judge's preference is no measure of quality by itself: read the texts."
        )
        return said

    def _verdict(self, criterion: str) -> str:
        row, name = self.value(criterion, "a_of_decided"), criterion.capitalize()
        if not row["n"]:
            return f"{name}: no pair was decided."
        if row["p"] >= 0.05:
            return f"{name}: no clear preference ({row['n']} decided pairs)."
        return f"{name}: {'A' if row['value'] > 0.5 else 'B'} wins more of the decided pairs."

    def plot(self) -> matplotlib.figure.Figure:
        """Left: who wins, by criterion. Right: the judge's leanings, where 50% is none."""
        from ..render.plots import BLUE, GREY, VERMILION, NotebookFigure, plain_frame

        figure = NotebookFigure(figsize=(12, 4), layout="constrained")
        names = " against ".join(self.sides)
        figure.suptitle(f"{names}, judged by {self.judge}", fontsize=11, parse_math=False)
        left, right = figure.subplots(1, 2)
        marks = zip(WINS.items(), (BLUE, GREY, VERMILION), "oDs", (-0.18, 0.0, 0.18), strict=True)
        for (metric, words), color, mark, shift in marks:
            rows = [self.value(criterion, metric) for criterion in CRITERIA]
            places = [i + shift for i in range(len(rows))]
            _draw(left, rows, places, fmt=mark, color=color, label=words)
        left.set_yticks(range(len(CRITERIA)), CRITERIA)
        left.set_xlabel("share of pairs (%), 95% (Wilson)")
        left.legend(frameon=False, bbox_to_anchor=(0, 1), loc="lower left", ncols=3)
        leanings = list(LEANINGS)[:3]
        for shift, criterion, mark in zip((-0.18, 0.0, 0.18), CRITERIA, "^vo", strict=True):
            rows = [self.value(criterion, metric) for metric in leanings]
            places = [i + shift for i in range(len(rows))]
            _draw(right, rows, places, fmt=mark, color=GREY, label=criterion)
        right.axvline(50, color=GREY, lw=0.8, ls=":")
        told = [textwrap.fill(LEANINGS[metric], 24) for metric in leanings]
        right.set_yticks(range(len(leanings)), told, fontsize=9)
        right.set_xlabel("share (%), 95% (Wilson)")
        right.legend(frameon=False, bbox_to_anchor=(0, 1), loc="lower left", ncols=3)
        for axes in (left, right):
            axes.set_xlim(-3, 103)
            axes.set_ylim(2.5, -0.5)
            plain_frame(axes)
        return figure


def percent(row: Mapping[str, Any]) -> str:
    """`41.0% [31.8, 50.8]`, or n/a."""
    if not row["n"]:
        return "n/a"
    return f"{100 * row['value']:.1f}% [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _draw(axes: Any, rows: list[Mapping[str, Any]], places: list[float], **style: Any) -> None:
    values = [100 * row["value"] for row in rows]
    # Wilson's interval holds the value, but for the last digit of a float.
    below = [max(0.0, 100 * (row["value"] - row["low"])) for row in rows]
    above = [max(0.0, 100 * (row["high"] - row["value"])) for row in rows]
    axes.errorbar(values, places, xerr=[below, above], capsize=3, **style)


def _printable(text: str) -> str:
    """On one line, as any file can hold it."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
