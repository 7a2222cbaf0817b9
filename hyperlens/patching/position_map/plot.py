"""The figure of a layer x position map: both directions, on average and in one text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...render.plots import NotebookFigure
from ..directions import TOWARDS
from .finding import EVERY, direction_name

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

# From all the way back to all the way to the donor; red and blue, told apart by colour-blind eyes.
COLOURS = "RdBu_r"


def draw(finding: Any) -> matplotlib.figure.Figure:
    """Above, means over texts with a column of all positions; below, one text with its tokens."""
    figure = NotebookFigure(figsize=(13, 8.6), layout="constrained")
    axes = figure.subplots(2, 2)
    offsets = finding.offsets
    example = finding.extras["example"]
    one = {(c["direction"], c["layer"], c["offset"]): c["moved"] for c in example["cells"]}
    layers = range(finding.n_layers + 1)
    for (above, below), direction in zip(axes.T, TOWARDS, strict=True):
        values = [
            [
                finding.cell(direction, layer, offset, "moved")["value"]
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
        picks = [_drawable(repr(example[side])) for side in ("base_pick", "tuned_pick")]
        title = f"one text, which goes on with {picks[0]} (base) or {picks[1]} (tuned)"
        below.set_title(title, loc="left", fontsize=10, parse_math=False)
        _labels(below, [_drawable(token) for token in example["tokens"]])
    for ax in axes[:, 0]:
        ax.set_ylabel("layer (0 = embedding, l = output of block l-1)")
    label = "how far the logits move: 0 the host's, 1 the donor's"
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
