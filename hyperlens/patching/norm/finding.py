"""How much of a terminal expansion is block and how much norm, as a result: its words, figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...results.result import Result
from ..wording import share_of

if TYPE_CHECKING:
    import matplotlib.figure

ROWS = {
    "raw": ("raw_base", "raw_tuned", "raw_change"),
    "every vector scaled to one length": ("unit_rms_base", "unit_rms_tuned", "unit_rms_change"),
    "after the base model's norm": ("base_stream_base_norm", "tuned_stream_base_norm", None),
    "after the tuned model's norm": ("base_stream_tuned_norm", "tuned_stream_tuned_norm", None),
    "after each model's own norm": ("base_stream_base_norm", "tuned_stream_tuned_norm", "change"),
}
STEPS = {
    "raw_change": "the stream itself, raw",
    "rescaling": "scaling every vector to one length",
    "weighting": "reading it through a norm's weights",
    "weights": "the change of the norm's weights",
    "change": "after each model's own norm",
}
SWAPPED = {
    "norm into base": ("to_tuned", "the base model with the tuned model's norm"),
    "stream into base": ("to_tuned", "the base model with the tuned model's stream"),
    "norm into tuned": ("to_base", "the tuned model with the base model's norm"),
    "stream into tuned": ("to_base", "the tuned model with the base model's stream"),
}
OUTCOME = {"to_tuned": "become the tuned model's", "to_base": "become the base model's again"}
WIDTH = 98


@dataclass(frozen=True)
class NormResult(Result):
    """The last block's outputs of both models, read through the final norms of both.

    The table has a row per quantity. Of `what` "dimension", in dimensions, corrected (`value`,
    `low`, `high`) and `naive`, over n tokens: the ratios `raw_*`, `unit_rms_*`, the four cells
    `{base,tuned}_stream_{base,tuned}_norm`, and one block earlier `before_*`; the changes of each;
    the effects `stream`, `weights` (which add up to `change`) and `interaction`; the steps
    `rescaling` and `weighting` (`raw_change` + `rescaling` + `weighting` + `weights` = `change`);
    `jump_as_read` and `jump_raw`, what the last layer seems to add and what it adds. Of `what`
    "decisions", over n texts: the metrics of `hyperlens.patching.outcomes.METRICS` where only the
    norm, or only the stream, of one model is put into the other.

    Extras: how many `decisions`, and how many of them tuning `changed`; whether the norms have the
    `same_norm`.
    """

    name = "final_norm"
    columns = ("what", "name", "metric", "value", "low", "high", "naive", "n")

    def dimension(self, name: str) -> Mapping[str, Any]:
        """One quantity, in dimensions."""
        return self.select(what="dimension", name=name)[0]

    def decided(self, name: str, metric: str) -> Mapping[str, Any]:
        """One metric of one swap."""
        return self.select(what="decisions", name=name, metric=metric)[0]

    def conclusions(self) -> list[str]:
        """What the numbers say, sentence by sentence."""
        return [*self._of_the_norm(), self._of_the_reading(), self._of_decisions()]

    def _of_the_norm(self) -> list[str]:
        rows = {name: self.dimension(name) for name in (*STEPS, "stream", "interaction")}
        own = (
            "the two models have the same final norm"
            if self.extras["same_norm"]
            else f"{signed(rows['weights'])} from the change of the norm's weights (interaction "
            f"{signed(rows['interaction'])})"
        )
        return [
            f"Of the {signed(rows['change'])} dimensions after the final norm, "
            f"{signed(rows['stream'])} come from the stream that leaves the last block; {own}.",
            f"Raw, that stream changes by {signed(rows['raw_change'])}. To that, scaling every "
            f"vector to one length adds {signed(rows['rescaling'])}, and reading it through a "
            f"norm's weights, whichever model's, {signed(rows['weighting'])}.",
        ]

    def _of_the_reading(self) -> str:
        before, change = self.dimension("before_change"), self.dimension("change")
        read, raw = self.dimension("jump_as_read"), self.dimension("jump_raw")
        return (
            "A script that holds hidden_states[-1] against hidden_states[-2] reads a vector after "
            f"the final norm against a raw one: the change of dimension seems to go from "
            f"{before['value']:+.1f} to {change['value']:+.1f} in the last block, a jump of "
            f"{signed(read)}. Raw outputs on both sides have one of {signed(raw)}."
        )

    def _of_decisions(self) -> str:
        if not self.extras["changed"]:
            return "Tuning changed no decision on these texts."
        parts = []
        for name, (metric, words) in SWAPPED.items():
            if name.startswith("norm"):
                row = self.decided(name, metric)
                parts.append(f"{share_of(row)} {OUTCOME[metric]} in {words}")
        return (
            f"Of the {self.extras['changed']:,} decisions that tuning changed (of "
            f"{self.extras['decisions']:,}), {' and '.join(parts)}: what the norm's weights change "
            "by themselves."
        )

    def summary(self) -> str:
        """The cells, their effects, and what they say."""
        n = self.dimension("change")["n"]
        texts = self.meta["data"]["n_sequences"]
        lines = [
            f"The norm question  {self.meta['base']['name']} → {self.meta['tuned']['name']}",
            f"participation ratio of the last block's output over {n:,} tokens of {texts} texts",
            "",
            f"{'':<36}{'base stream':>20}{'tuned stream':>20}{'change [95%]':>22}",
        ]
        for words, (base, tuned, change) in ROWS.items():
            cells = "".join(f"{self._cell(name):>20}" for name in (base, tuned))
            end = f"{signed(self.dimension(change)):>22}" if change else ""
            lines.append(f"{words:<36}{cells}{end}".rstrip())
        lines += ["in brackets: naive, from the sample covariance", ""]
        for name, words in STEPS.items():
            sign = "= " if name == "change" else "  "
            lines.append(f"{sign}{words:<40}{signed(self.dimension(name))}")
        lines += ["", *(line for text in self.conclusions() for line in _wrapped(text))]
        lines += [line for note in self.meta["notes"] for line in _wrapped(f"note: {note}")]
        return "\n".join(lines)

    def _cell(self, name: str) -> str:
        row = self.dimension(name)
        return f"{row['value']:.1f} ({row['naive']:.1f})"

    def plot(self) -> matplotlib.figure.Figure:
        """The steps, the 2 x 2, and the decisions."""
        from .plot import draw

        return draw(self)


def signed(row: Mapping[str, Any]) -> str:
    """A change in dimensions, with its interval."""
    if not math.isfinite(row["low"]):
        return f"{row['value']:+.1f}"
    return f"{row['value']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH)
