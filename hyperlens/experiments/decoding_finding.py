"""Ways of decoding side by side, as a result: its words, its figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..results.result import Result
from .wording import noted, p_in_words, wrapped

if TYPE_CHECKING:
    import matplotlib.figure


class Method(NamedTuple):
    """What there is to know of a way of decoding.

    Attributes:
        words: its name in texts.
        deterministic: whether the same prompt always gives the same text.
        sign: of its parameter.
        whose: who chose the parameter's default; nobody has to for greedy decoding.
    """

    words: str
    deterministic: bool
    sign: str = ""
    whose: str = ""


METHODS: Mapping[str, Method] = {
    "greedy": Method("greedy", True),
    "temperature": Method("temperature", False, "T", "ours"),
    "top_p": Method("top-p", False, "p", "ours"),
    "min_p": Method("min-p", False, "p", "the paper's"),
    "guard": Method("GUARD", False, "w", "the paper's"),
    "contrastive": Method("adaptive contrastive", True, "q", "its authors'"),
}
# Metric, in a sentence, at the head of a column.
WORDS = {
    "ttr": ("type-token ratio", "TTR"),
    "windowed_ttr": ("type-token ratio, windows of 50", "TTR50"),
    "rep_2": ("repeated bigrams", "rep-2"),
    "rep_3": ("repeated trigrams", "rep-3"),
    "loop": ("share taken by the longest loop", "loop"),
    "distinct_2": ("distinct bigrams of all texts together", "dist-2"),
    "length": ("tokens before the end of text", "length"),
    "mauve": ("MAUVE", "MAUVE"),
}
TESTED = ("ttr", "rep_2")
GROUPS = ("below", "above", "not clearly different", "cannot be told")
# What every way of decoding is compared with: a model and its method.
REFERENCE = ("tuned", "greedy")


@dataclass(frozen=True)
class DecodingResult(Result):
    """The base model under several ways of decoding, and the tuned one under greedy decoding.

    The table has a row per model ("base", "tuned"), method and metric. `value` is the mean over
    prompts (over their samples first, where a method was sampled several times), `low` to `high`
    its 95% interval, `se` its standard error; `difference` to `difference_high` is the method minus
    the tuned model's greedy decoding, paired by prompt, and `p` of the paired t test,
    Holm-corrected over the table. `distinct_2` is of all texts together, its interval by the
    jackknife. `mauve`, if asked for, has no interval.

    Extras: `methods`, with each method's parameter and the seconds that one text per prompt took;
    `examples`, prompts with what every method wrote.
    """

    name = "decoding"
    columns = (
        *("model", "method", "deterministic", "metric", "value", "low", "high", "se", "n"),
        *("difference", "difference_low", "difference_high", "p"),
    )

    def value(self, model: str, method: str, metric: str) -> Mapping[str, Any]:
        """One row of the table."""
        return self.select(model=model, method=method, metric=metric)[0]

    @property
    def ways(self) -> list[tuple[str, str]]:
        """(model, method), in order; the tuned model's greedy decoding is the last."""
        return list(dict.fromkeys((row["model"], row["method"]) for row in self.table))

    @property
    def metrics(self) -> list[str]:
        """Those that were measured."""
        return list(dict.fromkeys(row["metric"] for row in self.table))

    def about(self, model: str, method: str) -> Mapping[str, Any]:
        """Parameter and seconds of one method."""
        found: list[Mapping[str, Any]] = self.extras["methods"]
        return next(one for one in found if (one["model"], one["method"]) == (model, method))

    def called(self, model: str, method: str) -> str:
        """`base, min-p (p=0.1)`."""
        one, parameter = METHODS[method], self.about(model, method)["parameter"]
        return f"{model}, {one.words}" + (f" ({one.sign}={parameter:g})" if one.sign else "")

    def summary(self) -> str:
        """Table 7, the differences, and what may be concluded."""
        options = self.meta["options"]
        head = "".join(f"{WORDS[metric][1]:>7}" for metric in self.metrics)
        ends = "ends at" if options["stop_at_eos"] else "goes on through"
        lines = [
            f"decoding  {self.meta['base']['name']} → {self.meta['tuned']['name']}",
            f"{options['n_prompts']} prompts of {options['prompt_tokens']} tokens, "
            f"{options['max_new_tokens']} tokens added (what is written {ends} an end of text)",
            "",
            f"{'mean over prompts':<33}{'det.':>5}{head}{'sec.':>6}",
            *map(self._line, self.ways),
        ]
        for metric in TESTED:
            lines += ["", f"{WORDS[metric][0]}, minus that of the tuned model's greedy decoding"]
            lines += [self._difference(model, method, metric) for model, method in self.ways[:-1]]
        said = [line for text in self.conclusions() for line in wrapped(text)]
        return "\n".join([*lines, "", *noted(self.meta), *said])

    def _line(self, way: tuple[str, str]) -> str:
        rows = [self.value(*way, metric) for metric in self.metrics]
        cells = (
            f"{row['value']:7.1f}" if row["metric"] == "length" else f"{row['value']:7.3f}"
            for row in rows
        )
        seconds = self.about(*way)["seconds"]
        return f"{self.called(*way):<33}{yes_or_no(rows[0]):>5}{''.join(cells)}{seconds:6.1f}"

    def _difference(self, model: str, method: str, metric: str) -> str:
        row = self.value(model, method, metric)
        gap, low, high = (row[f"difference{end}"] for end in ("", "_low", "_high"))
        return (
            f"  {self.called(model, method):<35}{gap:+.3f} [{low:+.3f}, {high:+.3f}]  "
            f"{p_in_words(row['p'])}"
        )

    def conclusions(self) -> list[str]:
        """What the corrected tests allow to say, and what they do not."""
        said = [f"{WORDS[metric][0].capitalize()}: {self._verdict(metric)}." for metric in TESTED]
        return [
            *said,
            "p: paired t test over prompts, Holm-corrected over the table. A method's numbers are "
            "those of its parameters: with others they differ.",
            "Diversity is not quality: read the examples.",
        ]

    def _verdict(self, metric: str) -> str:
        """On which side of the tuned model's greedy decoding each method clearly is."""
        groups: dict[str, list[str]] = {group: [] for group in GROUPS}
        for model, method in self.ways[:-1]:
            row = self.value(model, method, metric)
            group = "not clearly different"
            if math.isnan(row["difference_low"]):
                group = "cannot be told"
            elif row["p"] < 0.05:
                group = "above" if row["difference"] > 0 else "below"
            groups[group].append(METHODS[method].words)
        found = "; ".join(f"{side}: {', '.join(names)}" for side, names in groups.items() if names)
        return f"beside the tuned model's greedy decoding, {found}"

    def plot(self) -> matplotlib.figure.Figure:
        """Three measures of every method; hollow marks are of methods that sample."""
        from ..render.plots import BLUE, VERMILION, NotebookFigure, plain_frame

        ways = self.ways
        figure = NotebookFigure(figsize=(13, 0.42 * len(ways) + 1.6), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for axes, metric in zip(panels, ("ttr", "rep_2", "loop"), strict=True):
            for place, (model, method) in enumerate(ways):
                row = self.value(model, method, metric)
                color = VERMILION if model == "tuned" else BLUE
                axes.errorbar(
                    row["value"], place, xerr=row["high"] - row["value"], fmt="o", color=color,
                    mfc=color if row["deterministic"] else "white", capsize=3,
                )  # fmt: skip
            tuned = self.value(*ways[-1], metric)
            axes.axvline(tuned["value"], color=VERMILION, linewidth=0.8, linestyle=":")
            axes.set_title(WORDS[metric][0], loc="left", fontsize=11)
            axes.set_xlabel("mean over prompts, 95% interval (0 to 1)")
            axes.set_xlim(-0.03, 1.03)
            plain_frame(axes)
        panels[0].set_yticks(range(len(ways)), [self.called(*way) for way in ways])
        panels[0].invert_yaxis()
        figure.suptitle(
            f"{self.meta['base']['name']} → {self.meta['tuned']['name']}   (filled: deterministic, "
            "hollow: sampled)", fontsize=12, parse_math=False,
        )  # fmt: skip
        return figure


def yes_or_no(row: Mapping[str, Any]) -> str:
    """The column "Det." of the paper's table."""
    return "yes" if row["deterministic"] else "no"
