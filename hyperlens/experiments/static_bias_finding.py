"""Table 2 of arXiv 2605.22579 as a result: its words, its figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..results.result import Result
from .wording import noted, plus_minus, wrapped

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

BIASES = ("promoted", "all", "random", "shuffled", "constant")
WORDS = {
    "promoted": "top K",
    "all": "all tokens",
    "random": "random K",
    "shuffled": "shuffled δ",
    "constant": "constant",
    "ttr": "TTR, greedy",
    "rep_2": "bigram repetition, greedy",
    "rep_3": "trigram repetition, greedy",
    "agreement_tuned": "top-1 agreement with the tuned model, teacher-forced",
    "agreement_base": "top-1 agreement with the base model, teacher-forced",
}
BLOCKS = ("ttr", "rep_2", "agreement_tuned")


@dataclass(frozen=True)
class StaticBiasResult(Result):
    """The base model with a fixed bias on its logits, beside placebos and the tuned model.

    The table has a row per bias ("none", the base itself; "promoted", the paper's; "all";
    the placebos "random", "shuffled" and "constant"; "tuned", the tuned model), α and metric
    (`ttr`, `rep_2`, `rep_3` over prompts; `agreement_tuned`, `agreement_base` over texts).

    Extras: the static share of the logit change, what each bias adds to agreement (`gains`), the
    trends over α, the most promoted tokens.
    """

    name = "static_bias"
    columns = ("bias", "alpha", "metric", "value", "low", "high", "se", "n")

    @property
    def alphas(self) -> list[float]:
        """The strengths that were tried, without 0."""
        alphas: list[float] = self.meta["options"]["alphas"]
        return alphas

    def value(self, bias: str, alpha: float, metric: str) -> Mapping[str, Any]:
        """One row of the table."""
        return self.select(bias=bias, alpha=alpha, metric=metric)[0]

    def trend(self, bias: str, metric: str) -> Mapping[str, Any]:
        """How a metric goes with α: see `hyperlens.experiments.trend.trend`."""
        trends: list[Mapping[str, Any]] = self.extras["trends"]
        return next(t for t in trends if t["bias"] == bias and t["metric"] == metric)

    def summary(self) -> str:
        """Table 2, its trends, and what may be concluded."""
        top = ", ".join(repr(one["token"]) for one in self.extras["promoted"][:8])
        n = {metric: self.value("none", 0.0, metric)["n"] for metric in BLOCKS}
        return "\n".join(
            [
                f"Is it a static bias?  {self.meta['base']['name']} → {self.meta['tuned']['name']}",
                "",
                f"{self.extras['static_share']:.1%} of the mean squared change of the (centred) "
                "logits is the same in every context.",
                *wrapped(f"Most promoted tokens of K = {self.extras['k_used']}: {top}"),
                "",
                f"base + α δ, ± one standard error over {n['ttr']} prompts or "
                f"{n['agreement_tuned']} texts",
                *(line for metric in BLOCKS for line in self._block(metric)),
                "trend: Spearman's ρ of the mean with α from 0 on, exact two-sided p, blind to how "
                "much prompts",
                "differ. each: mean ± standard error over prompts of each prompt's own ρ.",
                *noted(self.meta),
                "",
                *self.conclusions(),
            ]
        )

    def _block(self, metric: str) -> list[str]:
        base, tuned = (self.value(side, 0.0, metric) for side in ("none", "tuned"))
        lines = [
            f"{WORDS[metric]}: base {plus_minus(base)}, tuned {plus_minus(tuned)}",
            f"{'':<10}" + "".join(f"{WORDS[bias]:>16}" for bias in BIASES),
        ]
        for alpha in self.alphas:
            cells = (self.value(bias, alpha, metric) for bias in BIASES)
            lines.append(f"  α = {alpha:<4g}" + "".join(f"{plus_minus(c):>16}" for c in cells))
        if not metric.startswith("agreement"):
            found = [self.trend(bias, metric) for bias in BIASES]
            lines.append("  trend   " + "".join(f"{_trend(t):>16}" for t in found))
            lines.append("  each    " + "".join(f"{_each(t):>16}" for t in found))
        return [*lines, ""]

    def gain(self, bias: str, alpha: float) -> Mapping[str, Any]:
        """What a bias adds to the base's agreement with the tuned model, paired by text."""
        gains: list[Mapping[str, Any]] = self.extras["gains"]
        return next(g for g in gains if g["bias"] == bias and g["alpha"] == alpha)

    def best(self) -> Mapping[str, Any]:
        """The bias, no placebo, whose first tokens agree most with the tuned model's."""
        rows = [
            self.value(bias, alpha, "agreement_tuned")
            for bias in ("promoted", "all")
            for alpha in self.alphas
        ]
        return max(rows, key=lambda row: row["value"])

    def conclusions(self) -> list[str]:
        """What a reader may and may not conclude, sentence by sentence."""
        base, best = self.value("none", 0.0, "agreement_tuned"), self.best()
        gain = self.gain(best["bias"], best["alpha"])
        of_best = f"{WORDS[best['bias']]}, α = {best['alpha']:g}"
        points = [f"{100 * gain[end]:+.1f}" for end in ("value", "low", "high")]
        found = f"{points[0]} points [{points[1]}, {points[2]}]"
        if base["value"] == 1.0:
            first = "The two models' first tokens never differ: there is no change to explain."
        elif best["value"] > 0.999:
            first = (
                "The tuned model is the base plus a bias, as far as first tokens tell: they agree "
                f"in {best['value']:.1%} of contexts ({of_best})."
            )
        elif not gain["low"] > 0:
            first = (
                f"No bias clearly brings the base nearer to the tuned model: {base['value']:.1%} "
                f"of first tokens agree without one, the best bias ({of_best}) adds {found}. The "
                "change depends on context."
            )
        else:
            explained = gain["value"] / (1 - base["value"])
            first = (
                f"The best of {2 * len(self.alphas)} biases ({of_best}) adds {found} to the "
                f"{base['value']:.1%} of first tokens that agree without one: net, "
                f"{explained:.1%} of what changed. The rest depends on context."
            )
        ttr = {one: self.value(one, 0.0, "ttr") for one in ("none", "tuned")}
        reach = max(
            (self.value(bias, a, "ttr") for bias in ("promoted", "all") for a in self.alphas),
            key=lambda row: row["value"],
        )
        second = (
            f"Greedy TTR: base {ttr['none']['value']:.3f}, tuned {ttr['tuned']['value']:.3f}; the "
            f"most diverse bias ({WORDS[reach['bias']]}, α = {reach['alpha']:g}) reaches "
            f"{reach['value']:.3f} [{reach['low']:.3f}, {reach['high']:.3f}]."
        )
        third = (
            "Not to be concluded: that more diverse text is like the tuned model's (agreement "
            "tells that), nor, from α below 1 alone, that no bias would do: a tuned model that is "
            "base plus bias is met at α = 1."
        )
        return [line for text in (first, second, third) for line in wrapped(text)]

    def plot(self) -> matplotlib.figure.Figure:
        """TTR, repetition and agreement over α, one line per bias."""
        from ..render.plots import NotebookFigure

        figure = NotebookFigure(figsize=(13, 4.4), layout="constrained")
        figure.suptitle(
            f"{self.meta['base']['name']} → {self.meta['tuned']['name']}",
            fontsize=13,
            fontweight="bold",
            parse_math=False,
        )
        panels = figure.subplots(1, 3)
        labels = (
            ("A  Diversity", "greedy TTR"),
            ("B  Repetition", "greedy bigram repetition"),
            ("C  Like the tuned model?", "first tokens that agree with it"),
        )
        for axes, metric, (title, label) in zip(panels, BLOCKS, labels, strict=True):
            axes.set_title(title, loc="left", fontsize=11)
            axes.set_ylabel(f"{label} (share)")
            self._draw(axes, metric)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=7, frameon=False)
        return figure

    def _draw(self, axes: Axes, metric: str) -> None:
        from ..render.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, plain_frame

        styles = dict(
            zip(
                BIASES,
                ((VERMILION, "o-"), (BLUE, "s-"), (ORANGE, "^--"), (GREEN, "v--"), (GREY, "d:")),
                strict=True,
            )
        )
        for side, color in (("none", "black"), ("tuned", "#CC79A7")):
            row = self.value(side, 0.0, metric)
            label = "base" if side == "none" else "tuned"
            axes.axhline(row["value"], color=color, lw=1.2, label=label)
            if math.isfinite(row["low"]):
                axes.axhspan(row["low"], row["high"], color=color, alpha=0.12, lw=0)
        for bias, (color, style) in styles.items():
            rows = [self.value(bias, alpha, metric) for alpha in self.alphas]
            values = [row["value"] for row in rows]
            axes.plot(self.alphas, values, style, color=color, ms=4.5, lw=1.3, label=WORDS[bias])
            if all(math.isfinite(row["low"]) for row in rows):
                lows, highs = ([row[end] for row in rows] for end in ("low", "high"))
                axes.fill_between(self.alphas, lows, highs, color=color, alpha=0.12, lw=0)
        if min(self.alphas) > 0:
            axes.set_xscale("log")
        axes.set_xlabel("α (strength of the bias)\nbands: 95% intervals")
        plain_frame(axes)


def _trend(found: Mapping[str, Any]) -> str:
    if math.isnan(found["rho"]):
        return "none"
    p = found["p_exact"] if math.isfinite(found["p_exact"]) else found["p"]
    return f"{found['rho']:+.2f}, p {'<0.001' if p < 0.001 else format(p, '.3f')}"


def _each(found: Mapping[str, Any]) -> str:
    own = found["per_unit"]
    return "none" if math.isnan(own["se"]) else f"{own['value']:+.2f} ± {own['se']:.2f}"
