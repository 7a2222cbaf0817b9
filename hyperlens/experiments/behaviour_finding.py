"""What two models write, as a result: its words, its figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..results.result import Result
from .wording import noted, p_in_words

if TYPE_CHECKING:
    import matplotlib.figure

WORDS = {
    "ttr": "type-token ratio",
    "windowed_ttr": "type-token ratio, windows of 50",
    "rep_2": "repeated bigrams",
    "rep_3": "repeated trigrams",
    "loop": "share taken by the longest loop",
    "word_ttr": "type-token ratio of words",
    "word_rep_2": "repeated bigrams of words",
    "word_rep_3": "repeated trigrams of words",
}
STRATEGIES = {"greedy": "greedy", "sample": "sampled at temperature 1"}


@dataclass(frozen=True)
class BehaviourResult(Result):
    """How diverse the continuations of both models are.

    The table has a row per strategy ("greedy", "sample"), model ("base", "tuned" and their paired
    "difference") and metric; values are means over prompts, p is Holm-corrected.

    Extras: `distinct`, the share of distinct n-grams (n = 1, 2, 3) over all continuations of a
    model together, which also tells how much they resemble each other; `examples`, with strategy,
    prompt, and for "base" and "tuned" the text, the tokens and the base model's rank of each of
    them (1 = what greedy decoding of the base would take).
    """

    name = "behaviour"
    columns = ("strategy", "model", "metric", "value", "low", "high", "se", "n", "p")

    def value(self, strategy: str, model: str, metric: str) -> Mapping[str, Any]:
        """One row of the table."""
        return self.select(strategy=strategy, model=model, metric=metric)[0]

    @property
    def strategies(self) -> list[str]:
        """Those that were measured."""
        return list(dict.fromkeys(row["strategy"] for row in self.table))

    @property
    def metrics(self) -> list[str]:
        """Those that were measured."""
        return list(dict.fromkeys(row["metric"] for row in self.table))

    def summary(self) -> str:
        """Every measure of both models, the difference, and one example."""
        options = self.meta["options"]
        lines = [
            f"behaviour  {self.meta['base']['name']} → {self.meta['tuned']['name']}",
            f"{options['n_prompts']} prompts of {options['prompt_tokens']} tokens, "
            f"{options['max_new_tokens']} tokens added; mean over prompts",
        ]
        for strategy in self.strategies:
            lines += ["", f"{STRATEGIES[strategy]:<33}{'base':>8}{'tuned':>9}  difference [95%]"]
            lines += [self._line(strategy, metric) for metric in self.metrics]
            lines += self._together(strategy)
        return "\n".join([*lines, "", *noted(self.meta), *self.conclusion()])

    def _line(self, strategy: str, metric: str) -> str:
        base, tuned, gap = (
            self.value(strategy, m, metric) for m in ("base", "tuned", "difference")
        )
        return (
            f"  {WORDS[metric]:<31}{base['value']:8.3f}{tuned['value']:9.3f}  "
            f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]  {p_in_words(gap['p'])}"
        )

    def distinct(self, strategy: str, model: str) -> dict[int, float]:
        """n to the share of distinct n-grams over all continuations of a model together."""
        rows: list[Mapping[str, Any]] = self.extras.get("distinct", [])
        return {
            row["n"]: row["value"]
            for row in rows
            if (row["strategy"], row["model"]) == (strategy, model)
        }

    def _together(self, strategy: str) -> list[str]:
        base, tuned = (self.distinct(strategy, model) for model in ("base", "tuned"))
        return [
            f"  {f'distinct {n}-grams, all prompts':<31}{base[n]:8.3f}{tuned[n]:9.3f}" for n in base
        ]

    def conclusion(self) -> list[str]:
        """What the intervals allow to say."""
        said = []
        for strategy in self.strategies:
            gap = self.value(strategy, "difference", "ttr")
            if gap["low"] == gap["high"] == 0:
                verdict = "both models are equally diverse on every prompt"
            elif math.isnan(gap["low"]):
                verdict = "whether diversity differs cannot be told from so few prompts"
            elif gap["p"] < 0.05:
                verdict = f"the tuned model is {'more' if gap['value'] > 0 else 'less'} diverse"
            else:
                verdict = "no clear difference in diversity"
            said.append(f"{STRATEGIES[strategy]}: {verdict}.")
        reading = [
            "p: paired t test over prompts, Holm-corrected over the table.",
            "Diversity is not quality: read the examples.",
        ]
        return [*(s[0].upper() + s[1:] for s in said), *reading]

    def plot(self) -> matplotlib.figure.Figure:
        """Both models' mean and interval of every measure, a panel per strategy."""
        from ..render.plots import BLUE, VERMILION, NotebookFigure, plain_frame

        metrics = self.metrics
        figure = NotebookFigure(
            figsize=(5.5 * len(self.strategies) + 2, 0.5 * len(metrics) + 1.8), layout="constrained"
        )
        panels = figure.subplots(1, len(self.strategies), squeeze=False, sharey=True)[0]
        for axes, strategy in zip(panels, self.strategies, strict=True):
            for model, color, shift in (("base", BLUE, -0.12), ("tuned", VERMILION, 0.12)):
                rows = [self.value(strategy, model, metric) for metric in metrics]
                values = [row["value"] for row in rows]
                half = [row["high"] - row["value"] for row in rows]
                places = [i + shift for i in range(len(metrics))]
                marker = "o" if model == "base" else "s"
                axes.errorbar(
                    values, places, xerr=half, fmt=marker, color=color, capsize=3, label=model
                )
            axes.set_title(STRATEGIES[strategy], loc="left", fontsize=11)
            axes.set_xlabel("mean over prompts, 95% interval (0 to 1, no unit)")
            axes.set_xlim(-0.03, 1.03)
            plain_frame(axes)
        panels[0].set_yticks(range(len(metrics)), [WORDS[metric] for metric in metrics])
        panels[0].invert_yaxis()
        panels[0].legend(frameon=False)
        return figure
