"""MAUVE of two sets of texts, as a result: its words, its figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..results.result import Result
from .wording import noted

if TYPE_CHECKING:
    import matplotlib.figure


@dataclass(frozen=True)
class MauveResult(Result):
    """How near two sets of texts are.

    The table has a row per seed of the clustering: MAUVE, 1 for the same distribution and towards 0
    for disjoint ones, and its smoothed variant (arXiv 2212.14578).

    Extras: `curves`, the divergence curve of every seed.
    """

    name = "mauve"
    columns = ("seed", "value", "smoothed")

    @property
    def value(self) -> float:
        """MAUVE, mean over seeds."""
        return float(sum(row["value"] for row in self.table) / len(self.table))

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the greatest MAUVE of all seeds: what the clustering alone does."""
        values = [row["value"] for row in self.table]
        return min(values), max(values)

    def summary(self) -> str:
        """The value, what it was computed from, and how far it carries."""
        low, high = self.spread
        p, q = self.meta["p"], self.meta["q"]
        return "\n".join(
            [
                f"MAUVE  {self.meta['title']}",
                f"{self.value:.3f}, mean of {len(self.table)} clusterings ({low:.3f} to "
                f"{high:.3f}); 1: the same distribution, 0: nothing in common",
                f"{p['n']:,} and {q['n']:,} texts in {self.meta['options']['n_clusters']} "
                f"clusters, read by {self.meta['features']['name']}",
                *noted(self.meta),
                "The range is that of the clustering alone: other texts would move MAUVE more.",
            ]
        )

    def plot(self) -> matplotlib.figure.Figure:
        """The divergence curve of every seed; MAUVE is the area under it."""
        from ..render.plots import BLUE, NotebookFigure, plain_frame

        figure = NotebookFigure(figsize=(5.6, 4.6), layout="constrained")
        axes = figure.subplots()
        for curve in self.extras["curves"]:
            # Its two ends are corners of the square.
            points = sorted(curve, key=lambda point: (point[0], -point[1]))
            axes.plot(*zip(*points, strict=True), color=BLUE, lw=1, alpha=0.7)
        axes.set_title(
            f"MAUVE {self.value:.3f}, {len(self.table)} clusterings", loc="left", fontsize=11
        )
        axes.set_xlabel("exp(−5 KL(Q ‖ mixture)): Q lies where P does")
        axes.set_ylabel("exp(−5 KL(P ‖ mixture)): P lies where Q does")
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        plain_frame(axes)
        return figure
