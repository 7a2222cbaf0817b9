"""patch_norm: how much of a "terminal expansion" is block, and how much is final norm?

arXiv 2605.22579 (section 4) reads its last layer off hidden states that have passed the final
norm, and every other layer off raw ones. Here the norms' weights are exchanged: either model's
last output is read through either model's norm, so that both parts are measured.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import check_counts
from ..pair import open_inputs
from ..passes.streaming import PassOptions, run_pass
from ..passes.streams import VIEWS, StreamPair, View
from ..probes import ParticipationRatio
from ..render.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, NotebookFigure, plain_frame
from ..results.result import Result
from ..statistics.intervals import RatioInfluence, SampledTokens, influence_half_width
from .engine import ChangedOutput, OutputReader
from .outcomes import METRICS, RENAMED, SIDES, Outcome, Side
from .wording import share_of

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

SINK_THRESHOLD = 10.0

Row = dict[str, Any]


def patch_norm(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    max_length: int = 256,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> NormResult:
    """Read both models' last outputs through both models' final norms: a 2 x 2 of dimensions.

    One pass over the texts, as `compare_models` makes it, with the same numbers where they are of
    the same quantity; memory does not grow with the number of texts.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; or an open `Pair`.
        texts: what `compare_models` takes.
        max_length: tokens per text.
        batch_size: texts per forward pass; does not change the result.
        seed: of the token sample that intervals are computed from.
        device, dtype: as in `compare_models`.
        progress: show a progress bar.

    Raises:
        HyperlensError: if a source cannot be opened, or the texts do not fit the models.
    """
    check_counts(batch_size=batch_size)
    inputs = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    pair = inputs.pair
    plain = ParticipationRatio(views=VIEWS, layers=(-2, -1))
    crossed, swapped = CrossedNorms(), SwappedNorms(len(inputs.corpus.sequences))
    options = PassOptions(batch_size, SINK_THRESHOLD, seed, progress)
    run_pass(pair.base.hooked, pair.tuned.hooked, inputs.corpus, [plain, crossed, swapped], options)
    outcomes = swapped.outcomes()
    meta = inputs.metadata(
        seed=seed,
        options={
            "max_length": max_length,
            "batch_size": batch_size,
            "sink_threshold": SINK_THRESHOLD,
        },
    )
    extras = outcomes.models["base"].counts() | {
        "same_norm": same_norm(pair.base.hooked, pair.tuned.hooked),
    }
    ratios = quantities(plain, crossed).items()
    table = (
        *(_row("dimension", name, ratio) for name, ratio in ratios),
        *_decisions([*outcomes.models.items(), *outcomes.patched.items()]),
    )
    return NormResult(table, extras, meta)


def quantities(plain: ParticipationRatio, crossed: CrossedNorms) -> dict[str, Dimension]:
    """The cells, their effects, and the steps from the raw change to the one after the norm.

    Args:
        plain: measured raw, at unit RMS and after each model's own norm, at the last layers.
        crossed: measured after the other model's norm.
    """
    own, other = dimensions(plain), dimensions(crossed)
    *before, last = plain.spec.resolve_layers(plain.layers)

    def change(view: View, layer: int) -> Dimension:
        return less(own["tuned", layer, view], own["base", layer, view])

    # Named by stream, then norm: bt is the base's stream through the tuned model's norm. As in any
    # 2 x 2, a main effect is the mean of its two simple effects, and the interaction is their
    # difference: stream + weights = tt - bb, the change as everybody reads it.
    bb, tt = (own[side, last, "final_norm"] for side in SIDES)
    bt, tb = (other[side, last, "final_norm"] for side in SIDES)
    raw, unit = change("raw", last), change("unit_rms", last)
    stream = total([(0.5, less(tb, bb)), (0.5, less(tt, bt))])
    weights = total([(0.5, less(bt, bb)), (0.5, less(tt, tb))])
    change_as_read = less(tt, bb)
    ratios = {
        f"{view}_{side}": own[side, last, view] for view in ("raw", "unit_rms") for side in SIDES
    }
    ratios |= {
        "base_stream_base_norm": bb,
        "base_stream_tuned_norm": bt,
        "tuned_stream_base_norm": tb,
        "tuned_stream_tuned_norm": tt,
        "stream": stream,
        "weights": weights,
        "interaction": less(less(tt, tb), less(bt, bb)),
        "raw_change": raw,
        "unit_rms_change": unit,
        "change": change_as_read,
        "rescaling": less(unit, raw),
        "weighting": less(stream, unit),
    }
    for layer in before:
        earlier = change("raw", layer)
        ratios |= {f"before_{side}": own[side, layer, "raw"] for side in SIDES}
        ratios |= {
            "before_change": earlier,
            "jump_as_read": less(change_as_read, earlier),
            "jump_raw": less(raw, earlier),
        }
    return ratios


class SwappedNorms(OutputReader[str]):
    """What each model decides with the other's final norm, or the other's last output."""

    name = "swapped norms"

    def changes(
        self, residuals: Mapping[Side, Float[Tensor, "n d_model"]]
    ) -> Iterator[tuple[str, ChangedOutput]]:
        """The norm, then the stream, of one model put into the other."""
        others: tuple[tuple[Side, Side], ...] = (("base", "tuned"), ("tuned", "base"))
        for target, source in others:
            yield f"norm into {target}", ChangedOutput(residuals[target], source, target)
            yield f"stream into {target}", ChangedOutput(residuals[source], target, target)


def same_norm(base: Any, tuned: Any) -> bool:
    """Whether the two final norms have the same weights, bit for bit."""
    first, second = (list(model.ln_final.parameters()) for model in (base, tuned))
    return len(first) == len(second) and all(map(torch.equal, first, second))


def _row(what: str, name: str, ratio: Dimension) -> Row:
    return {
        "what": what,
        "name": name,
        "metric": "participation_ratio",
        "value": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "naive": ratio.naive,
        "n": ratio.n,
    }


def _decisions(outcomes: Iterable[tuple[str, Outcome]]) -> Iterator[Row]:
    for name, outcome in outcomes:
        for metric in METRICS:
            estimate = outcome.estimate(metric)._asdict()
            estimate.pop("se")
            row = {"what": "decisions", "name": name, "metric": metric, "naive": math.nan}
            yield row | estimate


# Participation ratios through exchanged norms


class CrossedNorms(ParticipationRatio):
    """The participation ratio of each model's last output after the *other* model's final norm.

    "base" is the base's stream after the tuned model's norm, "tuned" the other way round.
    """

    name = "crossed_norms"

    def __init__(self) -> None:
        super().__init__(views=("final_norm",), layers=(-1,))

    def update(self, pair: StreamPair) -> None:
        """Add one batch, the norms exchanged."""
        super().update(
            replace(
                pair,
                base=replace(pair.base, final_norm=pair.tuned.final_norm),
                tuned=replace(pair.tuned, final_norm=pair.base.final_norm),
            )
        )


@dataclass(frozen=True)
class Dimension:
    """A participation ratio, or a sum of several.

    Attributes:
        value, low, high: corrected for few tokens, with its 95% interval over texts.
        naive: from the sample covariance.
        n: tokens.
        influence, sample: of the sampled tokens; None if there are too few.
    """

    value: float
    low: float
    high: float
    naive: float
    n: int
    influence: RatioInfluence | None
    sample: SampledTokens | None


def dimensions(probe: ParticipationRatio) -> dict[tuple[Side, int, View], Dimension]:
    """Everything a probe has measured, as `compare_models` reports it."""
    rows = {(row.metric, row.layer, row.view): row for row in probe.compute().rows}
    ratios: dict[tuple[Side, int, View], Dimension] = {}
    for layer in probe.spec.resolve_layers(probe.layers):
        for view in probe.views:
            linear = probe.linearised(layer, view)
            for k, side in enumerate(SIDES):
                row = rows[side, layer, view]
                ratios[side, layer, view] = Dimension(
                    value=row.value,
                    low=row.low,
                    high=row.high,
                    naive=rows[f"{side}_naive", layer, view].value,
                    n=row.n,
                    influence=None if linear is None else linear[0][k],
                    sample=None if linear is None else linear[1],
                )
    return ratios


def less(one: Dimension, other: Dimension) -> Dimension:
    """One less another; exactly 0 for equal ones."""
    return total([(1.0, one), (-1.0, other)])


def total(terms: Sequence[tuple[float, Dimension]]) -> Dimension:
    """A weighted sum, with an interval if all of its parts are of the same tokens.

    A participation ratio is nearly linear in the tokens: ratio ≈ centre + Σ influence of each.
    So the weighted sum has the weighted sum of influences, and its interval takes account of how
    the parts vary together, which adding up their own intervals would not.
    """
    (first_weight, first), *others = terms
    value, naive = (
        sum((w * getattr(one, key) for w, one in others), first_weight * getattr(first, key))
        for key in ("value", "naive")
    )
    none = Dimension(value, math.nan, math.nan, naive, first.n, None, None)
    if first.influence is None or first.sample is None:
        return none
    centre = first_weight * first.influence.centre
    influence = first_weight * first.influence.influence
    for weight, one in others:
        if one.influence is None or one.sample is None or not _same(first, one):
            return none
        centre += weight * one.influence.centre
        influence = influence + weight * one.influence.influence
    half = influence_half_width(influence, float(first.n), first.sample)
    return replace(
        none,
        low=centre - half,
        high=centre + half,
        influence=RatioInfluence(centre, influence),
        sample=first.sample,
    )


def _same(a: Dimension, b: Dimension) -> bool:
    if a.sample is None or b.sample is None:
        return False
    return a.n == b.n and torch.equal(a.sample.valid, b.sample.valid)


# The result


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

    name = "patch_norm"
    title = "Is the expansion in the block, or in the final norm?"
    old_names: ClassVar[tuple[str, ...]] = ("final_norm",)
    renamed: ClassVar[Mapping[str, str]] = RENAMED
    columns = ("what", "name", "metric", "value", "low", "high", "naive", "n")

    def dimension(self, name: str) -> Mapping[str, Any]:
        """One quantity, in dimensions."""
        return self.rows(what="dimension", name=name)[0]

    def decided(self, name: str, metric: str) -> Mapping[str, Any]:
        """One metric of one swap."""
        return self.rows(what="decisions", name=name, metric=metric)[0]

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
        texts = self.meta["corpus"]["n_sequences"]
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

    def plot(self) -> matplotlib.figure.Figure:  # type: ignore[override]
        """The steps, the 2 x 2, and the decisions."""
        return draw(self)


def signed(row: Mapping[str, Any]) -> str:
    """A change in dimensions, with its interval."""
    if not math.isfinite(row["low"]):
        return f"{row['value']:+.1f}"
    return f"{row['value']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH)


# The figure


COLOURS = dict(zip(STEPS, (BLUE, ORANGE, GREEN, VERMILION, GREY), strict=True))


def draw(result: Any) -> matplotlib.figure.Figure:
    """How the change comes about step by step, the 2 x 2, and what swaps change."""
    figure = NotebookFigure(figsize=(14, 4.2), layout="constrained")
    figure.suptitle(
        f"{result.meta['base']['name']} → {result.meta['tuned']['name']}",
        fontsize=12,
        fontweight="bold",
        parse_math=False,
    )
    steps, cells, swaps = figure.subplots(1, 3, width_ratios=(1.3, 1, 1.1))
    _draw_steps(steps, result)
    _draw_cells(cells, result)
    _draw_swaps(swaps, result)
    return figure


def _draw_steps(axes: Axes, result: Any) -> None:
    axes.set_title("A  From raw to after the norm", loc="left", fontsize=10)
    at = 0.0
    for place, (name, words) in enumerate(STEPS.items()):
        row = result.dimension(name)
        start = 0.0 if name == "change" else at
        axes.barh(place, row["value"], left=start, color=COLOURS[name], height=0.6, label=words)
        ends = [[abs(row["value"] - row["low"])], [abs(row["high"] - row["value"])]]
        if row["low"] == row["low"]:
            axes.errorbar(start + row["value"], place, xerr=ends, color="black", capsize=2, lw=1)
        at = start + row["value"]
    axes.set_yticks(range(len(STEPS)), list(STEPS.values()), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set_xlabel("change of dimension, tuned − base (segments: 95%)")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_cells(axes: Axes, result: Any) -> None:
    axes.set_title("B  Either stream through either norm", loc="left", fontsize=10)
    for norm, colour, mark in (("base", BLUE, "o"), ("tuned", VERMILION, "s")):
        rows = [result.dimension(f"{stream}_stream_{norm}_norm") for stream in ("base", "tuned")]
        _segments(axes, [0, 1], rows, colour, mark, f"the {norm} model's norm")
    raw = [result.dimension(f"raw_{stream}") for stream in ("base", "tuned")]
    _segments(axes, [0, 1], raw, GREY, "^", "raw, no norm")
    axes.set_xticks([0, 1], ["base stream", "tuned stream"])
    axes.set_xlim(-0.25, 1.25)
    axes.set_ylabel("dimension (participation ratio)")
    axes.legend(frameon=False, fontsize=8)
    plain_frame(axes)


def _draw_swaps(axes: Axes, result: Any) -> None:
    axes.set_title("C  Changed decisions that a swap moves", loc="left", fontsize=10)
    for place, (name, (metric, _)) in enumerate(SWAPPED.items()):
        row = result.decided(name, metric)
        colour = VERMILION if name.startswith("norm") else BLUE
        axes.barh(place, row["value"], color=colour, height=0.6)
        if row["low"] == row["low"]:
            axes.plot([row["low"], row["high"]], [place, place], color="black", lw=1.2)
    labels = [words.replace(" with ", "\nwith ") for _, words in SWAPPED.values()]
    axes.set_yticks(range(len(SWAPPED)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share that become the other model's choice")
    axes.spines[["top", "right"]].set_visible(False)


def _segments(
    axes: Axes, x: list[int], rows: list[Mapping[str, Any]], colour: str, mark: str, label: str
) -> None:
    values = [row["value"] for row in rows]
    axes.plot(x, values, color=colour, marker=mark, lw=1.4, label=label)
    for place, row in zip(x, rows, strict=True):
        if row["low"] == row["low"]:
            axes.plot([place, place], [row["low"], row["high"]], color=colour, lw=1.2)
