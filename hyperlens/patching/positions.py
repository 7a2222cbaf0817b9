"""patch_positions: at which layer, and from which token, does a changed decision come?

A heat map of layers x positions for two models: at one decision that tuning changed, the residual
of one model at one token and layer is put into the other. Where it moves the decision is where
the effect of tuning sits on its way from the earlier tokens to the last one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..checks import check_counts
from ..models.tokenizers import token_names
from ..pair import open_inputs
from ..passes.failures import explaining_out_of_memory
from ..render.plots import NotebookFigure
from ..results.result import Result
from ..statistics.ratios import holm_p_values, ratio
from ..statistics.significance import Estimate, wilson
from .outcomes import BROUGHT, DIRECTIONS, INTO_BASE, SOURCE, TOWARDS
from .position_map import EVERY, DrawnDecisions, MapCells, draw_changed, map_positions
from .wording import share_of, shown

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

# Tokens of the example that are shown before those that were patched.
CONTEXT_TOKENS = 30
# Less than this of the way is shown as nothing.
SMALLEST_SHOWN = 0.005
# From all the way back to all the way to the source; red and blue, told apart by colour-blind eyes.
COLOURS = "RdBu_r"


def patch_positions(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    offsets: int = 12,
    n_texts: int = 32,
    max_length: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> PositionsResult:
    """Patch one token's residual at every layer and position before a decision tuning changed.

    In each text one such decision is drawn, and the text is cut there. "Tuned into base" asks
    where the tuned model's residual brings its decision about (denoising), "base into tuned"
    where the base's undoes it (noising). Next to the single positions stands a patch of all
    positions up to the decision. The effect of a cell is the share of decisions that become the
    source's, and how far the logit difference (tuned model's top-1 token less base's) moves from
    the target's towards the source's: 0 for not at all, 1 for all the way.

    Only the blocks after a patch are run again, for several positions and texts at a time.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; or an open `Pair`.
        texts: what `compare_models` takes.
        offsets: how many positions are patched, the last token (offset 0) and those before it.
        n_texts: how many texts, drawn at random, give a decision.
        max_length: tokens per text.
        batch_size: patched texts per forward pass; does not change the result.
        seed: of the choice of texts and decisions.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        PatchError: if tuning changed too few decisions, blocks pass on more than the residual
            stream, or the models keep something other than keys and values.
        ActivationError: if a model, or a patched one, overflows.
        HyperlensError: if a source cannot be opened, or the texts do not fit the models.
    """
    check_counts(offsets=offsets, n_texts=n_texts, batch_size=batch_size)
    inputs = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    pair = inputs.pair
    with explaining_out_of_memory(batch_size, ", or max_length"):
        drawn = draw_changed(
            pair,
            inputs.corpus,
            n_texts=n_texts,
            offsets=offsets,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
        cells = map_positions(pair, drawn.texts, offsets, batch_size, progress)
    meta = inputs.metadata(
        seed=seed,
        options={"offsets": offsets, "n_texts": len(drawn.texts), "max_length": max_length},
        notes=drawn.notes(offsets),
    )
    extras = {
        "decisions": len(drawn.texts),
        "looked_at": drawn.n_looked_at,
        "too_short": drawn.n_short,
        "unchanged": drawn.n_same,
        "example": _example(cells, drawn, pair.tokenizer),
    }
    return PositionsResult(tuple(_rows(cells)), extras, meta)


def _rows(cells: MapCells) -> Iterator[dict[str, Any]]:
    """Both metrics of every cell; p that nothing moves, corrected over a direction's cells."""
    top_1 = {"base": cells.base_top_1, "tuned": cells.tuned_top_1}
    changed = cells.changed
    for direction in DIRECTIONS:
        moved = cells.moved(direction)
        of_source = top_1[SOURCE[direction]][:, None, None]
        hits = (cells.top_1[direction] == of_source) & changed[:, None, None]
        places = list(itertools.product(range(moved.shape[1]), range(len(cells.offsets))))
        shifts = [ratio(moved[:, *place] * changed, cells.distance) for place in places]
        for place, shift, p in zip(places, shifts, holm_p_values(shifts), strict=True):
            share = _share(int(hits[:, *place].sum()), int(changed.sum()))
            for metric, estimate, its_p in (("recovered", share, math.nan), ("moved", shift, p)):
                layer, column = place
                row = {"direction": direction, "layer": layer, "offset": cells.offsets[column]}
                yield row | {"metric": metric} | estimate._asdict() | {"p": its_p}


def _share(hits: int, n: int) -> Estimate:
    """Of decisions in different texts, with Wilson's interval."""
    value = hits / n if n else math.nan
    return Estimate(value, *wilson(hits, n), math.sqrt(value * (1 - value) / max(n, 1)), n)


def _example(cells: MapCells, drawn: DrawnDecisions, tokenizer: Any) -> dict[str, Any]:
    """The first text that was drawn, cell by cell."""
    offsets = [offset for offset in cells.offsets if offset != EVERY]
    ids = drawn.texts[0].tolist()
    distance = float(cells.distance[0]) or math.nan
    rows = []
    for direction in DIRECTIONS:
        moved = cells.moved(direction)[0] / distance
        top_1 = cells.top_1[direction][0]
        for layer, column in itertools.product(range(len(moved)), range(len(offsets))):
            rows.append(
                {
                    "direction": direction,
                    "layer": layer,
                    "offset": offsets[column],
                    "moved": float(moved[layer, column]),
                    "top_1": token_names(tokenizer, [int(top_1[layer, column])])[0],
                }
            )
    of_models = [int(cells.base_top_1[0]), int(cells.tuned_top_1[0])]
    base_top_1, tuned_top_1 = token_names(tokenizer, of_models)
    before = ids[-CONTEXT_TOKENS - len(offsets) : -len(offsets)]
    return {
        "before": "".join(token_names(tokenizer, before)),
        "tokens": token_names(tokenizer, ids[-len(offsets) :]),
        "base_top_1": base_top_1,
        "tuned_top_1": tuned_top_1,
        "cells": rows,
    }


# The result


@dataclass(frozen=True)
class PositionsResult(Result):
    """What one model's residual at one token and layer does to the other's decision.

    The table has a row per direction, layer (0 for the embedding output, l for the output of
    block l - 1), offset (how many tokens before the last one; -1 for all positions up to the
    decision) and metric: "recovered", the share of decisions that become the source's, and
    "moved", how far the logit difference (tuned model's top-1 token less base's) moves from the
    target's (0) to the source's (1). n counts texts, one decision each; `p` that nothing moves is
    corrected over the cells of a direction (Holm), NaN for "recovered".

    Extras: how many `decisions`; how many texts were `looked_at` to find them, and how many of
    these were `too_short` or had none (`unchanged`); `example`, one text with its tokens.
    """

    name = "patch_positions"
    title = "From which token does a changed decision come?"
    renamed: ClassVar[Mapping[str, str]] = {
        "base_pick": "base_top_1",
        "tuned_pick": "tuned_top_1",
        "choice": "top_1",
    }
    columns = (
        *("direction", "layer", "offset", "metric"),
        *("value", "low", "high", "se", "n", "p"),
    )

    def cell(self, direction: str, layer: int, offset: int, metric: str) -> Mapping[str, Any]:
        """One cell of a map."""
        (row,) = self.rows(direction=direction, layer=layer, offset=offset, metric=metric)
        return row

    def column(self, direction: str, offset: int, metric: str) -> list[Mapping[str, Any]]:
        """One position along the layers."""
        return self.rows(direction=direction, offset=offset, metric=metric)

    @property
    def offsets(self) -> list[int]:
        """The positions of single tokens, the earliest first."""
        return list(reversed(range(self.meta["options"]["offsets"])))

    @property
    def n_layers(self) -> int:
        """How many blocks the models have; layers go from 0 to this."""
        return int(self.meta["n_layers"])

    def strongest_earlier(self, direction: str, layer: int) -> Mapping[str, Any] | None:
        """The position before the last token at which the logit difference moves furthest."""
        rows = [
            self.cell(direction, layer, offset, "moved") for offset in self.offsets if offset > 0
        ]
        return max((row for row in rows if row["value"] == row["value"]),
                   key=lambda row: abs(row["value"]), default=None)  # fmt: skip

    def arrival(self, direction: str) -> int | None:
        """The first layer from which on the last token alone surely carries over half."""
        found = None
        for row in reversed(self.column(direction, 0, "recovered")):
            if not row["low"] > 0.5:
                break
            found = row["layer"]
        return found

    def conclusions(self) -> list[str]:
        """What the intervals allow to say."""
        sentences = []
        for direction in TOWARDS:
            source = SOURCE[direction]
            layer = self.arrival(direction)
            if layer is None:
                sentences.append(
                    f"{direction.capitalize()}: at no layer up to the last does the last token "
                    f"alone surely decide more than half of the time as in the {source} model."
                )
            else:
                all_of_it = self.cell(direction, layer, EVERY, "recovered")
                sentences.append(
                    f"{direction.capitalize()}: from layer {layer} on, what stands at the last "
                    f"token alone surely makes more than half of the decisions the {source} "
                    f"model's ({share_of(self.cell(direction, layer, 0, 'recovered'))} at layer "
                    f"{layer}, where all positions together make {share_of(all_of_it)})."
                )
            sure = [
                row
                for row in self.rows(direction=direction, metric="moved")
                if row["offset"] > 0 and row["p"] < 0.05
            ]
            if sure:
                best = max(sure, key=lambda row: abs(row["value"]))
                sentences.append(
                    f"Of single earlier tokens, {len(sure)} cells surely move the decision "
                    f"(corrected p < 0.05); most, the token {best['offset']} before the last at "
                    f"layer {best['layer']}: {moved(best)} of the way."
                )
            else:
                sentences.append("No single earlier token surely moves the decision (corrected p).")
        return sentences

    def summary(self) -> str:
        """Both directions along the layers, and what they allow to say."""
        n, looked = self.extras["decisions"], self.extras["looked_at"]
        lines = [
            f"layers x positions  {self.meta['base']['name']} → {self.meta['tuned']['name']}",
            f"{n} decisions that tuning changed, one per text ({looked} texts looked at), the last "
            f"{self.meta['options']['offsets']} positions",
            "",
        ]
        for direction in TOWARDS:
            lines += [*self._lines(direction), ""]
        return "\n".join(
            [*lines, *self.conclusions(), *(f"note: {note}" for note in self.meta["notes"])]
        )

    def _lines(self, direction: str) -> list[str]:
        lines = [
            f"{direction}: {BROUGHT[direction]}, and how far the logits move",
            f"{'layer':>5}  {'last token alone':<25}{'moved':<22}"
            f"{'an earlier one, at most':<30}{'all positions':<22}",
        ]
        for layer in shown(list(range(self.n_layers + 1))):
            earlier = self.strongest_earlier(direction, layer)
            furthest = "none"
            if earlier and abs(earlier["value"]) >= SMALLEST_SHOWN:
                furthest = f"{moved(earlier)} ({earlier['offset']} back)"
            line = (
                f"{layer:>5}  {share_of(self.cell(direction, layer, 0, 'recovered')):<25}"
                f"{moved(self.cell(direction, layer, 0, 'moved')):<22}{furthest:<30}"
                f"{share_of(self.cell(direction, layer, EVERY, 'recovered')):<22}"
            )
            lines.append(line.rstrip())
        return lines

    def plot(self) -> matplotlib.figure.Figure:  # type: ignore[override]
        """Both maps, and those of the example."""
        return draw(self)


def moved(row: Mapping[str, Any]) -> str:
    """How far of the way, with its interval."""
    if not math.isfinite(row["value"]):
        return "n/a"
    if not math.isfinite(row["low"]):
        return f"{row['value']:.2f}"
    return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def direction_name(direction: str) -> str:
    """As patching papers call it, too."""
    return f"{direction} ({'denoising' if direction == INTO_BASE else 'noising'})"


# The figure


def draw(result: Any) -> matplotlib.figure.Figure:
    """Above, means over texts with a column of all positions; below, one text with its tokens."""
    figure = NotebookFigure(figsize=(13, 8.6), layout="constrained")
    axes = figure.subplots(2, 2)
    offsets = result.offsets
    example = result.extras["example"]
    one = {(c["direction"], c["layer"], c["offset"]): c["moved"] for c in example["cells"]}
    layers = range(result.n_layers + 1)
    for (above, below), direction in zip(axes.T, TOWARDS, strict=True):
        values = [
            [
                result.cell(direction, layer, offset, "moved")["value"]
                for offset in (*offsets, EVERY)
            ]
            for layer in layers
        ]
        image = _heat(above, values)
        above.set_title(direction_name(direction), loc="left", fontsize=10)
        above.axvline(len(offsets) - 0.5, color="black", lw=1)
        above.set_xlabel("tokens before the last one")
        _labels(above, [*map(str, offsets), "all"])
        _heat(below, [[one[direction, layer, offset] for offset in offsets] for layer in layers])
        top_1 = [_drawable(repr(example[side])) for side in ("base_top_1", "tuned_top_1")]
        title = f"one text, which goes on with {top_1[0]} (base) or {top_1[1]} (tuned)"
        below.set_title(title, loc="left", fontsize=10, parse_math=False)
        _labels(below, [_drawable(token) for token in example["tokens"]])
    for ax in axes[:, 0]:
        ax.set_ylabel("layer (0 = embedding, l = output of block l-1)")
    label = "how far the logits move: 0 the target's, 1 the source's"
    figure.colorbar(image, ax=axes, label=label, shrink=0.6, extend="both")
    return figure


def _heat(ax: Axes, values: Sequence[Sequence[float]]) -> Any:
    image = ax.imshow(values, cmap=COLOURS, vmin=-1, vmax=1, origin="lower", aspect="auto")
    ax.set_yticks(range(0, len(values), 1 + len(values) // 13))
    return image


def _labels(ax: Axes, labels: Sequence[str]) -> None:
    size = 9 if len(labels) <= 16 else 6
    ax.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=size)
    for text in ax.get_xticklabels():
        text.set_parse_math(False)


def _drawable(text: str) -> str:
    """Only what the default font has: a token may be anything."""
    latin = text.replace("\n", "¶").encode("latin-1", "replace").decode("latin-1")
    return "".join(c if c.isprintable() else "?" for c in latin)
