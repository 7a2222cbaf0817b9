"""patch_norm: how much of a "terminal expansion" is block, and how much is final norm?

arXiv 2605.22579 (section 4) reads its last layer off hidden states that have passed the final
norm, and every other layer off raw ones. Here the norms' weights are exchanged: either model's
last output is read through either model's norm, so that both parts are measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import check_counts, check_seed, check_types
from ..offloading import named_values
from ..pair import open_inputs
from ..passes.streaming import PassOptions, run_pass
from ..passes.streams import VIEWS, StreamPair, View
from ..probes import ParticipationRatio
from ..render.blocks import Axis, Block, Chart, Details, Grid, Role, Table, Text, Verdict
from ..render.format import DIMENSIONS, NUMBER, PERCENT, count, ends, interval
from ..results.result import Result
from ..statistics.ratios import Ratio, sum_ends, weighted_ratio
from .engine import ChangedOutput, OutputReader
from .outcomes import METRICS, RENAMED, SIDES, Outcome, Side

SINK_THRESHOLD = 10.0

Row = dict[str, Any]


@check_types
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
    check_seed(seed)
    inputs = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    pair = inputs.pair
    plain = ParticipationRatio(views=VIEWS, layers=(-2, -1), with_excluded=True)
    crossed, swapped = CrossedNorms(), SwappedNorms(inputs.corpus)
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
        _row("dimension", "jump_of_scripts", jump_of_scripts(plain)),
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


def jump_of_scripts(plain: ParticipationRatio) -> Dimension:
    """What the last layer seems to add where BOS and attention sinks are counted in as well."""
    before, last = plain.spec.resolve_layers(plain.layers)
    metric = "delta_naive_with_sinks_and_bos"
    rows = {(row.layer, row.view): row for row in plain.compute().rows if row.metric == metric}
    at = rows[last, "final_norm"]
    jump = at.value - rows[before, "raw"].value
    return Dimension(jump, math.nan, math.nan, jump, at.n, None)


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
    first, second = ([x for _, x in named_values(model.ln_final)] for model in (base, tuned))
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
        value, low, high: as `compare_models` reports it, with its 95% interval over texts.
        naive: from the sample covariance.
        n: tokens.
        ratio: what intervals of sums need; None if there are too few tokens.
    """

    value: float
    low: float
    high: float
    naive: float
    n: int
    ratio: Ratio | None


def dimensions(probe: ParticipationRatio) -> dict[tuple[Side, int, View], Dimension]:
    """Everything a probe has measured, as `compare_models` reports it."""
    rows = {(row.metric, row.layer, row.view): row for row in probe.compute().rows}
    ratios: dict[tuple[Side, int, View], Dimension] = {}
    for layer in probe.spec.resolve_layers(probe.layers):
        for view in probe.views:
            measured = probe.measured(layer, view)
            for k, side in enumerate(SIDES):
                row = rows[side, layer, view]
                ratios[side, layer, view] = Dimension(
                    value=row.value,
                    low=row.low,
                    high=row.high,
                    naive=rows[f"{side}_naive", layer, view].value,
                    n=row.n,
                    ratio=None if measured is None else measured[k],
                )
    return ratios


def less(one: Dimension, other: Dimension) -> Dimension:
    """One less another; exactly 0 for equal ones."""
    return total([(1.0, one), (-1.0, other)])


def total(terms: Sequence[tuple[float, Dimension]]) -> Dimension:
    """A weighted sum, with an interval if all of its parts are of the same tokens."""
    (first_weight, first), *others = terms
    value, naive = (
        sum((w * getattr(one, key) for w, one in others), first_weight * getattr(first, key))
        for key in ("value", "naive")
    )
    parts = [(weight, one.ratio) for weight, one in terms if one.ratio is not None]
    if len(parts) < len(terms) or not all(_same(first, one) for _, one in others):
        return Dimension(value, math.nan, math.nan, naive, first.n, None)
    ratio = weighted_ratio(parts)
    return Dimension(value, *sum_ends(ratio), naive, first.n, ratio)


def _same(a: Dimension, b: Dimension) -> bool:
    if a.ratio is None or b.ratio is None:
        return False
    return a.n == b.n and torch.equal(a.ratio.sample.valid, b.ratio.sample.valid)


CELLS = {
    "raw": ("raw_base", "raw_tuned", "raw_change"),
    "scaled to one length": ("unit_rms_base", "unit_rms_tuned", "unit_rms_change"),
    "after the base's norm": ("base_stream_base_norm", "tuned_stream_base_norm", None),
    "after the tuned model's norm": ("base_stream_tuned_norm", "tuned_stream_tuned_norm", None),
    "after each model's own norm": ("base_stream_base_norm", "tuned_stream_tuned_norm", "change"),
    "raw, one block earlier": ("before_base", "before_tuned", "before_change"),
}
STEPS = {
    "raw_change": "the stream itself, raw",
    "rescaling": "+ scaling every vector to one length",
    "weighting": "+ reading it through a norm's weights",
    "weights": "+ the change of the norm's weights",
    "change": "= after each model's own norm",
}
EFFECTS = {
    "stream": "2 x 2: effect of the stream",
    "interaction": "2 x 2: interaction of stream and weights",
    "jump_as_read": "what the last layer seems to add, read after the norm, ordinary tokens",
    "jump_raw": "what the last block adds, raw on both sides",
}
# Not in results of earlier versions.
OF_SCRIPTS = {
    "jump_of_scripts": "what it seems to add to scripts, which count BOS and sinks (naive)",
}
SWAPPED = {
    "norm into base": ("to_tuned", "the base model with the tuned model's norm"),
    "stream into base": ("to_tuned", "the base model with the tuned model's stream"),
    "norm into tuned": ("to_base", "the tuned model with the base model's norm"),
    "stream into tuned": ("to_base", "the tuned model with the base model's stream"),
}
OUTCOME = {"to_tuned": "become the tuned model's", "to_base": "become the base model's again"}


class NormResult(Result):
    """The last block's outputs of both models, read through the final norms of both.

    The table has a row per quantity. Of `what` "dimension", in dimensions, corrected (`value`,
    `low`, `high`) and `naive`, over n tokens: the ratios `raw_*`, `unit_rms_*`, the four cells
    `{base,tuned}_stream_{base,tuned}_norm`, and one block earlier `before_*`; the changes of each;
    the effects `stream`, `weights` (which add up to `change`) and `interaction`; the steps
    `rescaling` and `weighting` (`raw_change` + `rescaling` + `weighting` + `weights` = `change`);
    `jump_as_read` and `jump_raw`, what the last layer seems to add and what it adds;
    `jump_of_scripts`, what it seems to add over every token, by the naive ratio. Of `what`
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
        return self.at(what="dimension", name=name)

    def decided(self, name: str, metric: str) -> Mapping[str, Any]:
        """One metric of one swap."""
        return self.at(what="decisions", name=name, metric=metric)

    def verdicts(self) -> list[Verdict]:
        """How much is the stream's, how much the norm's, and what the usual reading shows."""
        rows = {name: self.dimension(name) for name in (*STEPS, *EFFECTS)}
        own = (
            "the two models have the same final norm"
            if self.extras["same_norm"]
            else f"{interval(rows['weights'], DIMENSIONS)} from the change of the norm's weights"
        )
        return [
            Verdict(
                "block or norm",
                f"Of the {interval(rows['change'], DIMENSIONS)} dimensions after the final norm, "
                f"{interval(rows['stream'], DIMENSIONS)} come from the stream that leaves the last "
                f"block; {own}.",
            ),
            Verdict(
                "reading",
                "Read after the final norm at the last layer and raw before it, as "
                "hidden_states[-1] and [-2] are by default, the last block seems to add "
                f"{interval(rows['jump_as_read'], DIMENSIONS)} over ordinary tokens; raw on both "
                f"sides it adds {interval(rows['jump_raw'], DIMENSIONS)}." + self._of_scripts(),
            ),
            Verdict("decisions", self._of_decisions()),
        ]

    def _of_scripts(self) -> str:
        return "".join(
            f" With BOS and attention sinks counted in, as scripts do, it seems to add "
            f"{DIMENSIONS(row['value'])} (naive ratio): see compare for why."
            for row in self.rows(what="dimension", name="jump_of_scripts")
        )

    def _of_decisions(self) -> str:
        if not self.extras["changed"]:
            return "Tuning changed no decision on these texts."
        parts = [
            f"{interval(self.decided(name, metric), PERCENT)} {OUTCOME[metric]} in {words}"
            for name, (metric, words) in SWAPPED.items()
            if name.startswith("norm")
        ]
        return (
            f"Of the {count(self.extras['changed'], 'decision')} that tuning changed (of "
            f"{self.extras['decisions']:,}), {' and '.join(parts)}: what the norm's weights change "
            "by themselves."
        )

    def evidence(self) -> list[Block]:
        """The 2 x 2 of streams and norms, the steps from raw to normed, and the swaps."""
        return [
            Text(
                "Either model's last output, read through either model's final norm: what the "
                "blocks put out, what any norm does by scaling every vector to one length, and "
                "what tuning changed in the norm's weights."
            ),
            self._cells(),
            self._steps(),
            Grid([self._cells_chart(), self._swaps_chart()]),
            self._decisions(),
        ]

    def _cells(self) -> Table:
        rows = []
        for words, (base, tuned, change) in CELLS.items():
            sides = [self.dimension(name) for name in (base, tuned)]
            cells = [f"{interval(row)}, naive {NUMBER(row['naive'])}" for row in sides]
            end = interval(self.dimension(change), DIMENSIONS) if change else ""
            rows.append([words, *cells, end])
        n, texts = self.dimension("change")["n"], self.meta["corpus"]["n_sequences"]
        caption = (
            f"participation ratio of the last block's output over {count(n, 'token')} of "
            f"{count(texts, 'text')}; naive: from the sample covariance"
        )
        return Table(["dimension [95%]", "base stream", "tuned stream", "change"], rows, caption)

    def _steps(self) -> Table:
        rows = [
            [words, interval(row, DIMENSIONS)]
            for name, words in (STEPS | EFFECTS | OF_SCRIPTS).items()
            for row in self.rows(what="dimension", name=name)
        ]
        return Table(["tuned - base, dimensions [95%]", self.tuned_name], rows, joins=True)

    def _cells_chart(self) -> Chart:
        names = {
            "raw, no norm": ("raw_base", "raw_tuned"),
            "base's norm": ("base_stream_base_norm", "tuned_stream_base_norm"),
            "tuned model's norm": ("base_stream_tuned_norm", "tuned_stream_tuned_norm"),
        }
        rows = [
            {"series": series, "stream": stream, **ends(self.dimension(name))}
            for series, pair in names.items()
            for stream, name in zip(("base stream", "tuned stream"), pair, strict=True)
        ]
        x = Axis("value", "dimension (participation ratio)", "zero")
        y = Axis("stream", "", is_category=True)
        title = "Effective dimension of either stream through either norm"
        roles: dict[str, Role] = dict.fromkeys(names, "other")
        roles["raw, no norm"] = "base"
        return Chart("dots", title, title, rows, x, y, roles)

    def _swaps_chart(self) -> Chart:
        rows = [
            {"series": "swap", "swap": words, **ends(self.decided(name, metric))}
            for name, (metric, words) in SWAPPED.items()
        ]
        x = Axis("value", "share that become the other model's", "share")
        y = Axis("swap", "", is_category=True)
        title = "Changed decisions that a swap moves, 95% intervals over texts"
        return Chart("dots", title, title, rows, x, y, {"swap": "other"})

    def _decisions(self) -> Details:
        rows = [
            [
                words,
                *(interval(self.decided(name, m), PERCENT) for m in ("to_tuned", "to_base")),
            ]
            for name, (_, words) in SWAPPED.items()
        ]
        head = ["changed decisions that are", "the tuned model's", "the base's"]
        return Details("decisions under every swap", [Table(head, rows)])
