"""Several pairs of models on several corpora, as a result: its words, its figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..decoding.diversity import REPETITION_METRICS
from ..results.result import Result
from .wording import noted, p_in_words, wrapped

if TYPE_CHECKING:
    import matplotlib.figure

# What is read inside the models: its metric and view in `compare_models`.
READ = {
    "top1_agreement": ("top1_agreement", "final_norm"),
    "spearman": ("spearman", "final_norm"),
    "delta_raw": ("delta", "raw"),
    "delta_final_norm": ("delta", "final_norm"),
}
WRITTEN_PARTS = ("base", "tuned", "difference", "low", "high", "p")
WIDTH = 26


@dataclass(frozen=True)
class CrossDomainResult(Result):
    """A row per pair of models and corpus (arXiv 2605.22579, Table 6, and what it leaves out).

    Of greedy continuations, means over `n` prompts: `ttr`, `rep_2` and `rep_3` of `_base` and
    `_tuned`, their paired `_difference` with its 95% interval `_low` to `_high`, and `_p` of the
    paired t test, Holm-corrected over the table. Teacher-forced over `n_texts` texts, with
    intervals over texts: `top1_agreement`, `spearman`, and the change of effective dimension at the
    last layer, `delta_raw` and `delta_final_norm`. `mauve_base` and `mauve_tuned`: of the
    continuations and the texts' own; `_low` to `_high` is no interval but the range over seeds of
    the clustering. NaN where MAUVE was left out.
    """

    name = "cross_domain"
    columns = (
        *("pair", "corpus", "n", "n_texts", "n_tokens"),
        *(f"{metric}_{part}" for metric in REPETITION_METRICS for part in WRITTEN_PARTS),
        *(f"{name}{end}" for name in READ for end in ("", "_low", "_high")),
        *(f"mauve_{side}{end}" for side in ("base", "tuned") for end in ("", "_low", "_high")),
    )

    def row(self, pair: str, corpus: str) -> Mapping[str, Any]:
        """One row of the table."""
        return self.select(pair=pair, corpus=corpus)[0]

    @property
    def pairs(self) -> list[str]:
        """Names of the pairs, in order."""
        return list(dict.fromkeys(row["pair"] for row in self.table))

    @property
    def corpora(self) -> list[str]:
        """Names of the corpora, in order."""
        return list(dict.fromkeys(row["corpus"] for row in self.table))

    @property
    def has_mauve(self) -> bool:
        """Whether MAUVE was computed."""
        return self.meta["mauve"] is not None

    def summary(self) -> str:
        """What was written, what changed inside, and what may be concluded."""
        options = self.meta["options"]
        # 32 prompts were asked for; a corpus may have fewer texts.
        prompts = sorted({row["n"] for row in self.table})
        n = " to ".join(dict.fromkeys(str(end) for end in (prompts[0], prompts[-1])))
        lines = [
            f"cross-domain  {self.meta['title']}",
            f"greedy: {n} prompts of {options['prompt_tokens']} tokens, "
            f"{options['max_new_tokens']} added; means, differences paired by prompt",
            "",
            f"{'':<{WIDTH}}{'TTR':>13}  {'difference [95%]':<31}{'rep-2':>13}{'rep-3':>14}",
            *self._block(_written),
            "",
            "teacher-forced, at the last layer; intervals over texts",
            f"{'':<{WIDTH}}{'agrees':>7}{'ρ':>8}{'Δ dimension, raw [95%]':>28}"
            f"{'after the final norm [95%]':>29}",
            *self._block(_inside),
        ]
        if self.has_mauve:
            lines += ["", *self._mauve()]
        return "\n".join([*lines, "", *noted(self.meta), *self.conclusions()])

    def _block(self, line: Any) -> list[str]:
        lines = []
        for pair in self.pairs:
            lines.append(shortened(pair, 60))
            lines += [
                f"  {shortened(corpus, WIDTH - 3):<{WIDTH - 2}}{line(self.row(pair, corpus))}"
                for corpus in self.corpora
            ]
        return lines

    def _mauve(self) -> list[str]:
        lines = [
            f"MAUVE of continuations and the texts' own, read by {self.meta['mauve']['name']}; "
            "(range over seeds)",
            f"{'':<{WIDTH}}{'base':>26}{'tuned':>26}",
        ]
        return lines + self._block(
            lambda row: f"{ranged(row, 'mauve_base'):>26}{ranged(row, 'mauve_tuned'):>26}"
        )

    def conclusions(self) -> list[str]:
        """What the rows have in common, and what that is worth."""
        n = len(self.table)
        ups, downs = (
            sum(row["ttr_p"] < 0.05 and sign * row["ttr_difference"] > 0 for row in self.table)
            for sign in (1, -1)
        )
        grew = {
            view: sum(row[f"delta_{view}_low"] > 0 for row in self.table)
            for view in ("raw", "final_norm")
        }
        said = [
            f"Greedy text of the tuned model is more diverse in {ups} of {n} rows and less in "
            f"{downs} (TTR, p < 0.05 after Holm's correction).",
            f"The last layer's effective dimension clearly grows in {grew['raw']} of {n} rows raw, "
            f"in {grew['final_norm']} after the final norm.",
            "Rows of a pair share their models and rows of a corpus their texts: they are no "
            "independent repetitions.",
            "Diversity is not quality, and texts that a model was trained on are no test of it.",
        ]
        return [line for sentence in said for line in wrapped(sentence)]

    def plot(self) -> matplotlib.figure.Figure:
        """TTR before and after, and the change of dimension, row by row."""
        from ..render.plots import BLUE, GREEN, ORANGE, VERMILION, NotebookFigure, plain_frame

        labels = [f"{shortened(row['corpus'], 24)}" for row in self.table]
        # A gap between pairs, for their names.
        places = [i + self.pairs.index(row["pair"]) for i, row in enumerate(self.table)]
        figure = NotebookFigure(figsize=(12, 1.8 + 0.3 * places[-1]), layout="constrained")
        left, middle, right = figure.subplots(1, 3, sharey=True)
        for place, row in zip(places, self.table, strict=True):
            left.plot([row["ttr_base"], row["ttr_tuned"]], [place] * 2, color="#BBBBBB", zorder=0)
        for side, color, marker in (("base", BLUE, "o"), ("tuned", VERMILION, "s")):
            values = [row[f"ttr_{side}"] for row in self.table]
            left.scatter(values, places, color=color, marker=marker, s=28, label=side)
        left.set_xlim(0, 1)
        left.set_xlabel("greedy type-token ratio, mean over prompts")
        for axes, shown in (
            (middle, (("delta_raw", GREEN, "o", -0.12), ("delta_final_norm", ORANGE, "s", 0.12))),
            (right, (("top1_agreement", BLUE, "o", -0.12), ("spearman", VERMILION, "s", 0.12))),
        ):
            for name, color, marker, shift in shown:
                _errorbars(axes, self.table, name, [p + shift for p in places], color, marker)
        middle.axvline(0, color="black", lw=0.6)
        middle.set_xlabel("Δ effective dimension at the last layer")
        right.set_xlabel("agreement with the base, and ρ")
        left.set_yticks(places, labels, fontsize=9, parse_math=False)
        left.set_ylim(places[-1] + 0.6, -1.4)
        for pair in self.pairs:
            first = next(
                p for p, row in zip(places, self.table, strict=True) if row["pair"] == pair
            )
            left.annotate(
                shortened(pair, 44), (0, first), (2, 8), textcoords="offset points", fontsize=8,
                fontweight="bold", annotation_clip=False, parse_math=False,
            )  # fmt: skip
        for axes in (left, middle, right):
            axes.legend(
                frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.0)
            )
            plain_frame(axes)
        return figure


def _errorbars(
    axes: Any, table: Any, name: str, places: list[float], color: str, marker: str
) -> None:
    words = {
        "delta_raw": "raw",
        "delta_final_norm": "after the final norm",
        "top1_agreement": "same first token",
        "spearman": "Spearman's ρ",
    }
    values = [row[name] for row in table]
    ends = [
        [abs(_or_zero(row[f"{name}{end}"] - row[name])) for row in table]
        for end in ("_low", "_high")
    ]
    axes.errorbar(
        values, places, xerr=ends, fmt=marker, color=color, ms=5, capsize=2, label=words[name]
    )


def _or_zero(x: float) -> float:
    return x if math.isfinite(x) else 0.0


def _written(row: Mapping[str, Any]) -> str:
    p = p_in_words(row["ttr_p"]).replace(" ", "").replace("0.", ".")  # a narrow column
    gap = f"{row['ttr_difference']:+.3f} [{row['ttr_low']:+.3f}, {row['ttr_high']:+.3f}] {p}"
    return (
        f"{row['ttr_base']:7.3f}{row['ttr_tuned']:6.3f}  {gap:<31}"
        f"{row['rep_2_base']:7.3f}{row['rep_2_tuned']:6.3f}"
        f"{row['rep_3_base']:8.3f}{row['rep_3_tuned']:6.3f}"
    )


def _inside(row: Mapping[str, Any]) -> str:
    return (
        f"{100 * row['top1_agreement']:6.1f}%{row['spearman']:8.3f}"
        f"{signed_interval(row, 'delta_raw'):>28}{signed_interval(row, 'delta_final_norm'):>29}"
    )


def signed_interval(row: Mapping[str, Any], name: str) -> str:
    """`+1.2 [+0.8, +1.6]`; without the interval where there is none."""
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if not math.isfinite(low) or not math.isfinite(high):
        return f"{value:+.2f}"
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def ranged(row: Mapping[str, Any], name: str) -> str:
    """`0.93 (0.91 to 0.95)`; n/a where it was not measured."""
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.3f} ({low:.3f} to {high:.3f})" if math.isfinite(value) else "n/a"


def shortened(name: str, width: int) -> str:
    """A name of so many characters at most; both its ends."""
    half = width // 2
    return name if len(name) <= width else f"{name[: half - 1]}…{name[-half:]}"
