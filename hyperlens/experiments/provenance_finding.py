"""Where the tuned model's picks come from, as a result: its words, its figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..results.result import Result
from ..statistics.rank_buckets import DEEP_TAIL, RANK_BUCKETS
from .token_kinds import KINDS
from .wording import noted

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

# Of base ranks, as in the paper's Figure 4.
BUCKETS = tuple(bucket.label for bucket in RANK_BUCKETS)
MODES = ("teacher-forced", "free-running")
# Colour (as in plots, which needs matplotlib) and place of each mode's bars.
MODE_STYLES = {"teacher-forced": ("#0072B2", -0.2), "free-running": ("#D55E00", 0.2)}


@dataclass(frozen=True)
class ProvenanceResult(Result):
    """Base ranks of the tuned model's picks, and what kind of tokens they are.

    The table has a row per mode ("teacher-forced", "free-running"), bucket of base ranks ("1",
    "2-10", ">10"; "changed" for all beyond rank 1, "all") and metric: `share` of all decisions;
    of the decisions in the bucket the share of each kind of token, of near-synonyms (the pick is
    among the base pick's nearest neighbours in the unembedding), of picks that avoid a repeated
    trigram the base's pick would have made (`avoids`), and of the reverse (`falls_into`). Values
    are means over texts.

    Extras: `rank_histogram`, mode to bins of base ranks ("low", "high", "count" of decisions);
    `examples`, picks of every bucket in their context.
    """

    name = "provenance"
    columns = ("mode", "bucket", "metric", "value", "low", "high", "se", "n")

    def value(self, mode: str, bucket: str, metric: str) -> Mapping[str, Any]:
        """One row of the table."""
        return self.select(mode=mode, bucket=bucket, metric=metric)[0]

    def summary(self) -> str:
        """Shares by bucket, what is in them, and whether picks avoid repetition."""
        head = f"{'':<34}" + "".join(f"{mode:>26}" for mode in MODES)
        lines = [
            f"provenance  {self.meta['base']['name']} → {self.meta['tuned']['name']}",
            "base rank of the token that the tuned model puts first; mean over texts [95%]",
            "",
            head,
        ]
        lines += [self._line(f"base rank {bucket}", bucket, "share") for bucket in BUCKETS]
        lines.append(self._line("of which 200 and more", "all", DEEP_TAIL.metric))
        lines += ["", "of the picks beyond rank 1:"]
        for kind in KINDS:
            lines.append(self._line(f"  {kind}", "changed", kind))
        lines.append(self._line("  near-synonym of the base's pick", "changed", "near_synonym"))
        lines.append(self._line("  avoids a repeated trigram", "changed", "avoids"))
        lines.append(self._line("  makes one the base would not", "changed", "falls_into"))
        lines += ["", "examples (context | tuned pick | base pick, base rank of the tuned pick):"]
        lines += [_in_words(e) for e in self.extras["examples"] if e["mode"] == MODES[1]][:6]
        return "\n".join([*lines, "", *noted(self.meta), *self.conclusions()])

    def _line(self, what: str, bucket: str, metric: str) -> str:
        cells = (percent(self.value(mode, bucket, metric)) for mode in MODES)
        return f"{what:<34}" + "".join(f"{cell:>26}" for cell in cells)

    def conclusions(self) -> list[str]:
        """What a reader may and may not conclude."""
        gap = self.value("free-running", "changed", "avoids_minus_falls_into")
        said = [f"Free-running, {_repetition(gap)}."]
        uniform = self.value("teacher-forced", "all", DEEP_TAIL.metric)["value"]
        vocabulary = self.meta["d_vocab"]
        if vocabulary > 400 and uniform > 0.5 * (vocabulary - 200) / vocabulary:
            said.append(
                "Base ranks are spread almost as if at random: check that both models have the "
                "same vocabulary."
            )
        said.append(
            "Avoiding repetition is what a pick did, not why it was made. Kinds are told by an "
            "English word list."
        )
        return said

    def plot(self) -> matplotlib.figure.Figure:
        """The paper's Figure 4, its buckets, and the kinds of tokens in them, read both ways."""
        from ..render.plots import NotebookFigure, plain_frame

        figure = NotebookFigure(figsize=(16, 4.4), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 0.8, 1.5))
        self._draw_ranks(left)
        self._draw_buckets(middle)
        self._draw_kinds(right)
        for axes in (left, middle, right):
            plain_frame(axes)
        return figure

    def _draw_ranks(self, axes: Axes) -> None:
        for (mode, bins), (color, shift) in zip(
            self.extras["rank_histogram"].items(), MODE_STYLES.values(), strict=True
        ):
            total = max(1, sum(one["count"] for one in bins))
            shares = [100 * one["count"] / total for one in bins]
            places = [i + shift for i in range(len(bins))]
            axes.bar(places, shares, 0.38, color=color, label=f"{mode}, {total:,} decisions")
        axes.set_xticks(range(len(bins)), [_span(one) for one in bins], rotation=45, ha="right")
        axes.set_xlabel("base model's rank of the token the tuned model puts first")
        axes.set_ylabel("share of decisions (%)")
        axes.legend(frameon=False)

    def _draw_buckets(self, axes: Axes) -> None:
        for mode, (color, shift) in MODE_STYLES.items():
            rows = [self.value(mode, bucket, "share") for bucket in BUCKETS]
            values = [100 * row["value"] for row in rows]
            half = [100 * (row["high"] - row["value"]) for row in rows]
            places = [i + shift for i in range(len(BUCKETS))]
            axes.bar(places, values, 0.38, yerr=half, color=color, capsize=3)
        axes.set_xticks(range(len(BUCKETS)), [f"rank {bucket}" for bucket in BUCKETS])
        axes.set_ylabel("share of decisions (%), mean over texts, 95%")

    def _draw_kinds(self, axes: Axes) -> None:
        from ..render.plots import BLUE, GREEN, GREY, ORANGE, VERMILION

        colors = (GREY, BLUE, ORANGE, GREEN, VERMILION, "#CCCCCC")
        short = [mode.partition("-")[0] for mode in MODES]
        names = [f"{mode}\nrank {bucket}" for mode in short for bucket in BUCKETS]
        bottom = [0.0] * len(names)
        for kind, color in zip(KINDS, colors, strict=True):
            shares = [
                100 * _or_zero(self.value(mode, bucket, kind)["value"])
                for mode in MODES
                for bucket in BUCKETS
            ]
            axes.bar(names, shares, 0.7, bottom=bottom, color=color, label=kind)
            bottom = [b + s for b, s in zip(bottom, shares, strict=True)]
        axes.set_ylabel("kind of token (%), mean over texts")
        axes.tick_params(axis="x", labelsize=8)
        axes.legend(frameon=False, bbox_to_anchor=(1, 1), fontsize=8)


def _repetition(gap: Mapping[str, Any]) -> str:
    """What changed picks do to repetition, as far as the interval tells."""
    if not gap["n"]:
        return "no pick is changed, so none avoids repetition or causes it"
    if math.isnan(gap["low"]):
        return "too few texts have a changed pick to tell whether such picks avoid repetition"
    if gap["low"] > 0:
        return "changed picks avoid repetition more often than they cause it"
    if gap["high"] < 0:
        return "changed picks cause repetition more often than they avoid it"
    return "changed picks avoid repetition not clearly more often than they cause it"


def _span(one: Mapping[str, int]) -> str:
    return f"{one['low']:,}" if one["low"] == one["high"] else f"{one['low']:,}-{one['high']:,}"


def percent(row: Mapping[str, Any]) -> str:
    """`12.3% [11.0%, 13.6%]`; n/a where there is no such decision."""
    if math.isnan(row["value"]):
        return "n/a"
    text = f"{100 * row['value']:.1f}%"
    if math.isnan(row["low"]):
        return text
    return f"{text} [{100 * max(row['low'], 0):.1f}, {100 * min(row['high'], 1):.1f}]"


def _or_zero(x: float) -> float:
    return 0.0 if math.isnan(x) else x


def _in_words(example: Mapping[str, Any]) -> str:
    shown = " ".join(str(example["context"]).split())[-48:]
    return (
        f"  …{shown:<48} | {str(example['picked']).strip()!r} | "
        f"{str(example['base_first']).strip()!r}, {example['rank']:,}"
    )
