"""Table 1 of arXiv 2605.22579 as a result: its words, its figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..results.result import Result
from .wording import noted, p_number, plus_minus, wrapped

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

VARIANTS = ("original", "matched", "matched_per_context", "tuned")
TEACHER_FORCED = ("top1_agreement", "spearman", "entropy")
WORDS = {
    "original": "original",
    "matched": "at T*",
    "matched_per_context": "T* per context",
    "tuned": "tuned",
    "ttr": "TTR",
    "rep_2": "bigram repetition",
    "rep_3": "trigram repetition",
    "top1_agreement": "top-1 agreement",
    "spearman": "Spearman's ρ",
    "entropy": "entropy (nats)",
}


@dataclass(frozen=True)
class TemperatureResult(Result):
    """The original model, the original at the tuned model's entropy, and the tuned model.

    The table has a row per variant ("original"; "matched", at one temperature for all contexts;
    "matched_per_context", each context at the tuned model's mean entropy; "tuned"), decoding
    ("greedy", "sampled", "teacher-forced") and metric (`ttr`, `rep_2`, `rep_3` over prompts;
    `top1_agreement` and `spearman` with the original, and `entropy` in nats, over texts).

    Extras: the temperatures found, tied maxima and what they changed, and every test.
    """

    name = "temperature"
    columns = ("variant", "decoding", "metric", "value", "low", "high", "se", "n")

    def value(self, variant: str, decoding: str, metric: str) -> Mapping[str, Any]:
        """One row of the table."""
        return self.select(variant=variant, decoding=decoding, metric=metric)[0]

    def test(self, decoding: str, metric: str, first: str, second: str) -> Mapping[str, Any]:
        """One test: the paired difference first - second with its interval, and its p values."""
        tests: list[Mapping[str, Any]] = self.extras["tests"]
        wanted = {"decoding": decoding, "metric": metric, "first": first, "second": second}
        return next(t for t in tests if all(t[k] == v for k, v in wanted.items()))

    def summary(self) -> str:
        """Table 1, the temperatures, and what may be concluded."""
        return "\n".join(
            [
                f"Is it temperature?  {self.meta['base']['name']} → {self.meta['tuned']['name']}",
                "",
                *_temperatures(self.extras["temperature"]),
                "",
                *self._table_lines(),
                "",
                *self._controls(),
                *noted(self.meta),
                "",
                *self.conclusions(),
            ]
        )

    def _table_lines(self) -> list[str]:
        head = "".join(f"{WORDS[v]:>17}" for v in VARIANTS)
        lines = [f"{'':<20}{head}{'p':>10}"]
        for decoding in ("greedy", "sampled", "teacher-forced"):
            rows = self.select(decoding=decoding, variant="original")
            what = f"over {max(row['n'] for row in rows)}"
            units = "texts" if decoding == "teacher-forced" else "prompts"
            lines.append(f"{decoding}, {what} {units}")
            for row in rows:
                metric = row["metric"]
                cells = [self.value(v, decoding, metric) for v in VARIANTS]
                p = self.test(decoding, metric, "tuned", "matched")["paired_p_holm"]
                numbers = "".join(f"{plus_minus(cell):>17}" for cell in cells)
                lines.append(f"  {WORDS[metric]:<18}{numbers}{p_number(p):>10}")
        lines.append(
            "± one standard error. p: tuned against T*, paired t test, Holm over all tests "
            "(Welch's in extras)."
        )
        return lines

    def _controls(self) -> list[str]:
        changed, tied = self.extras["greedy_tokens_changed"], self.extras["tied_contexts"]
        n, contexts = self.extras["greedy_tokens"], self.extras["temperature"]["n_contexts"]
        return [
            "Controls: temperature keeps every rank, so the greedy columns of the original must be "
            "the same.",
            f"  greedy tokens that differ from the original's: {changed['matched']} of {n} at T*, "
            f"{changed['matched_per_context']} at T* per context",
            f"  contexts with tied largest logits: {tied['original']} of {contexts} as they are, "
            f"{tied['matched']} after scaling in float32",
        ]

    def conclusions(self) -> list[str]:
        """What a reader may and may not conclude, sentence by sentence."""
        agreement = self.value("tuned", "teacher-forced", "top1_agreement")
        rho = self.value("tuned", "teacher-forced", "spearman")
        # Rounding may part tied or neighbouring logits of two models that rank alike.
        if agreement["value"] > 0.999 and rho["value"] > 0.999:
            first = (
                "The tuned model ranks tokens as its base does: what tuning did to single "
                "predictions is no more than a temperature does."
            )
        else:
            changed = 1 - agreement["value"]
            first = (
                f"The tuned model's first token is another than its base's in {changed:.1%} of "
                f"contexts [{max(1 - agreement['high'], 0):.1%}, "
                f"{min(1 - agreement['low'], 1):.1%}]. No "
                "temperature changes a first token: tuning did more than sharpen."
            )
        gaps = {m: self.test("sampled", m, "tuned", "matched") for m in ("ttr", "rep_2", "rep_3")}
        found = "; ".join(f"{WORDS[m]} {_difference(gap)}" for m, gap in gaps.items())
        second = f"Sampled at the same mean entropy, tuned minus T*: {found}. "
        if any(gap["paired_p_holm"] < 0.05 for gap in gaps.values()):
            second += "Where p is small, entropy alone does not explain it."
        elif all(math.isnan(gap["difference"]["low"]) for gap in gaps.values()):
            second += "From so few prompts it cannot be told whether entropy explains all of it."
        else:
            second += (
                "No clear difference once corrected: entropy may be all there is to the diversity "
                "of sampled text."
            )
        third = (
            "Not to be concluded: anything from the greedy rows of the original, which no "
            "temperature can change; or that diverse text is good text (TTR knows no sense)."
        )
        return [line for text in (first, second, third) for line in wrapped(text)]

    def plot(self) -> matplotlib.figure.Figure:
        """TTR and bigram repetition of every variant, and the temperatures of single contexts."""
        from ..render.plots import NotebookFigure

        figure = NotebookFigure(figsize=(13, 4.2), layout="constrained")
        figure.suptitle(
            f"{self.meta['base']['name']} → {self.meta['tuned']['name']}",
            fontsize=13,
            fontweight="bold",
            parse_math=False,
        )
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
        self._draw_bars(left, "ttr", "A  Diversity", "TTR of the continuation")
        self._draw_bars(middle, "rep_2", "B  Repetition", "bigrams that came before (share)")
        self._draw_temperatures(right)
        return figure

    def _draw_bars(self, axes: Axes, metric: str, title: str, label: str) -> None:
        from ..render.plots import BLUE, ORANGE, plain_frame

        axes.set_title(title, loc="left", fontsize=11)
        styles = (("greedy", BLUE, "", -0.2), ("sampled", ORANGE, "//", 0.2))
        for decoding, color, hatch, offset in styles:
            rows = [self.value(v, decoding, metric) for v in VARIANTS]
            places = [i + offset for i in range(len(rows))]
            axes.bar(
                places,
                [row["value"] for row in rows],
                width=0.38,
                color=color,
                hatch=hatch,
                edgecolor="white",
                lw=0.3,
                label=decoding,
            )
            for place, row in zip(places, rows, strict=True):
                if math.isfinite(row["low"]):
                    axes.vlines(place, row["low"], row["high"], "black", lw=1.2)
        axes.set_xticks(range(len(VARIANTS)), [WORDS[v].replace(" per", "\nper") for v in VARIANTS])
        axes.set_ylabel(f"{label}\n(segments: 95% over prompts)")
        axes.set_ylim(0.0, 1.25 * axes.get_ylim()[1])  # room for the legend
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center")
        plain_frame(axes)

    def _draw_temperatures(self, axes: Axes) -> None:
        from ..render.plots import GREEN, VERMILION, plain_frame

        found = self.extras["temperature"]
        edges = [2.0**edge for edge in found["log2_edges"]]
        total = max(1, sum(found["own_counts"]))
        shares = [100 * count / total for count in found["own_counts"]]
        axes.set_title("C  T* of single contexts", loc="left", fontsize=11)
        axes.stairs(shares, edges, fill=True, color=GREEN, label="for the tuned entropy there")
        if edges[0] <= found["shared"] <= edges[-1]:
            label = f"one for all: {found['shared']:.3g}"
            axes.axvline(found["shared"], color=VERMILION, ls="--", label=label)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("T* (end bins gather what lies beyond)")
        axes.set_ylabel("contexts (%)")
        axes.set_ylim(0.0, 1.25 * max(*shares, 1.0))
        axes.legend(frameon=False, fontsize=9, loc="upper right")
        plain_frame(axes)


def _difference(test: Mapping[str, Any]) -> str:
    found, p = test["difference"], p_number(test["paired_p_holm"])
    ends = f"[{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"{found['value']:+.3f} {ends}, p {p}"


def _temperatures(found: Mapping[str, Any]) -> list[str]:
    own, mean = found["own_quantiles"], found["to_mean_quantiles"]

    def spread(q: Mapping[str, float]) -> str:
        return f"{q['0.5']:.3g} (5% to 95%: {q['0.05']:.3g} to {q['0.95']:.3g})"

    reached = "gives" if found["shared_reached"] else "comes nearest to giving"
    return [
        f"T* = {found['shared']:.4g} {reached} the base model the tuned model's mean entropy, "
        f"{found['target_entropy']:.4g} nats.",
        "T* of single contexts, median:",
        f"  for the tuned model's mean entropy (the paper's words)   {spread(mean)}",
        f"  for the tuned model's entropy in the same context        {spread(own)}",
        f"  the latter exists in {found['own_reached']} of {found['n_contexts']} contexts",
    ]
