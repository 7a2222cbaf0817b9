"""The tuned model beside placebos, as a result: its words, its figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..results.result import Result
from .wording import noted

if TYPE_CHECKING:
    import matplotlib.figure

# What the summary is about: metric, view, words, unit.
HEADLINE = (
    ("relative_l2", "raw", "relative L2 distance of the raw stream", ""),
    ("delta", "raw", "Δ effective dimension, raw", "dimensions"),
    ("delta", "final_norm", "Δ effective dimension, after the final norm", "dimensions"),
    ("top1_agreement", "final_norm", "same first token", ""),
    ("spearman", "final_norm", "Spearman's ρ over the vocabulary", ""),
    ("rank_gt_10", "final_norm", "first token from below base rank 10", ""),
    ("kl", "final_norm", "KL(tuned ‖ base)", "nats"),
    ("ttr", "greedy text", "greedy type-token ratio", ""),
    ("rep_2", "greedy text", "greedy repeated bigrams", ""),
)


@dataclass(frozen=True)
class NullTestResult(Result):
    """Every statistic of the tuned model, and its range over placebos.

    The table has a row per metric, layer and view ("greedy text" for what continuations measure):
    the tuned model's value, and mean, least and greatest of the placebos'.

    Extras: `base`, the base's own greedy text; the size of the change; the placebos' seeds.
    """

    name = "null_test"
    columns = (
        *("metric", "layer", "view", "tuned"),
        *("placebo_mean", "placebo_low", "placebo_high", "n_placebos"),
    )

    def headline(self) -> list[tuple[str, str, Mapping[str, Any], str]]:
        """(words, unit, row, verdict) of what the summary is about, at the last layer."""
        last = self.meta["n_layers"]
        found = []
        for metric, view, words, unit in HEADLINE:
            rows = self.select(metric=metric, view=view, layer=last)
            found += [(words, unit, row, verdict(row)) for row in rows]
        return found

    def summary(self) -> str:
        """The last layer and the output beside the placebos, and what that allows to say."""
        k = len(self.extras["placebo_seeds"])
        lines = [
            f"null test  {self.meta['base']['name']} → {self.meta['tuned']['name']}",
            f"{k} placebos: the base plus the tuned model's change with the entries of each of its "
            f"{self.extras['changed_tensors']}",
            "tensors shuffled; the same norm, nothing learned. At the last layer and the output:",
            "",
            f"{'':<45}{'tuned':>9}   {'placebos, least to greatest':<28}",
        ]
        for words, unit, row, where in self.headline():
            between = f"{row['placebo_low']:.3f} to {row['placebo_high']:.3f} {unit}"
            lines.append(f"{words:<45}{row['tuned']:9.3f}   {between:<28}{where}")
        greedy = self.extras["base"]
        return "\n".join(
            [
                *lines,
                "",
                f"The base's own greedy text: type-token ratio {greedy['ttr']:.3f}, "
                f"repeated bigrams {greedy['rep_2']:.3f}.",
                "Above or below every placebo: not what a random change of this size does. Within "
                "their range: it might be.",
                f"With {k} placebos no p value below {1 / (k + 1):.2f} is possible; none is given.",
                *noted(self.meta),
            ]
        )

    def plot(self) -> matplotlib.figure.Figure:
        """Distance and dimension along the layers, the placebos as a band."""
        from ..render.plots import BLUE, GREY, LAYER_LABEL, NotebookFigure, plain_frame

        figure = NotebookFigure(figsize=(13, 3.8), layout="constrained")
        panels = (
            ("relative_l2", "raw", "relative L2 distance, raw"),
            ("delta", "raw", "Δ effective dimension, raw (dimensions)"),
            ("delta", "final_norm", "Δ effective dimension, after the final norm (dimensions)"),
        )
        for axes, (metric, view, title) in zip(figure.subplots(1, 3), panels, strict=True):
            rows = sorted(self.select(metric=metric, view=view), key=lambda row: row["layer"])
            layers = [row["layer"] for row in rows]
            low, high = ([row[f"placebo_{end}"] for row in rows] for end in ("low", "high"))
            axes.fill_between(layers, low, high, color=GREY, alpha=0.35, label="placebos, range")
            axes.plot(layers, [row["placebo_mean"] for row in rows], color=GREY, ls="--")
            axes.plot(layers, [row["tuned"] for row in rows], color=BLUE, marker="o", label="tuned")
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel(LAYER_LABEL)
            plain_frame(axes)
        figure.axes[0].legend(frameon=False)
        return figure


def verdict(row: Mapping[str, Any]) -> str:
    """Where the tuned value lies."""
    values = (row["tuned"], row["placebo_low"], row["placebo_high"])
    if not all(map(math.isfinite, values)):
        return "cannot tell"
    if row["tuned"] > row["placebo_high"]:
        return "above every placebo"
    return "below every placebo" if row["tuned"] < row["placebo_low"] else "within their range"
