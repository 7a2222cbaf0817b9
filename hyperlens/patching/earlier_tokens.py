"""Does a decision come through an earlier token that stands elsewhere in each text?

A mean over texts by offset misses it: the token that matters is three back in one text and seven
back in another. So three other ways of naming it are tried: its absolute position, which token it
is, and each text's own best. The best of many is high by chance where it was chosen, so it is read
elsewhere: position and token are chosen on one half of the texts and read on the other, both ways;
a text's own best is chosen by the patch in the opposite direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..statistics.shares import p_value, ratio
from ..statistics.significance import Estimate, holm, wilson
from .outcomes import DIRECTIONS, SOURCE
from .position_cells import MapCells

POSITION, TOKEN, OWN = "position", "token", "own"
KINDS = (POSITION, TOKEN, OWN)


class Choice(NamedTuple):
    """A label of earlier tokens, and the layer at which they are patched.

    Attributes:
        label: a position, or a token id.
        layer: 0 for the embedding output, l for the output of block l - 1.
    """

    label: int
    layer: int


def earlier_tokens(cells: MapCells, texts: Sequence[np.ndarray]) -> Iterator[dict[str, Any]]:
    """Every direction, kind and metric: the chosen cell read where it was not chosen.

    n counts the texts that have the chosen token among those that were patched; p that it moves
    nothing is corrected over positions and tokens of both directions (Holm), and NaN for a text's
    own best, which is a mean of largest effects: of a size, but not for a test against 0.
    """
    rows = [row for direction in DIRECTIONS for row in _of_direction(cells, texts, direction)]
    moved = [row for row in rows if row["metric"] == "moved" and row["kind"] != OWN]
    for row, p in zip(moved, holm([_p(row) for row in moved]), strict=True):
        row["p"] = p
    yield from rows


def _p(row: dict[str, Any]) -> float:
    """That nothing moves; never less than the sign test's, for few texts that all say the same."""
    found = Estimate(*(row[key] for key in Estimate._fields))
    return max(p_value(found), 2.0 ** (1 - found.n))


def _of_direction(
    cells: MapCells, texts: Sequence[np.ndarray], direction: str
) -> Iterator[dict[str, Any]]:
    n_texts, _, n_columns = cells.differences[direction].shape
    n_offsets = n_columns - 1
    moved = cells.moved(direction)[:, :, 1:n_offsets]
    for kind in KINDS:
        chosen: list[Choice] = []
        place = torch.full((n_texts, 2), -1)  # layer and offset less 1; -1 where it has none
        if kind == OWN:
            opposite = next(other for other in DIRECTIONS if other != direction)
            place = _own_best(cells.moved(opposite)[:, :, 1:n_offsets])
        else:
            labels = _labels(kind, texts, n_offsets)
            half = torch.arange(n_texts) % 2  # texts come in a random order
            for read in (0, 1):
                choice = choose(moved[half != read], labels[half != read])
                if choice is not None:
                    chosen.append(choice)
                    offset = _offset_of(choice.label, labels)
                    found = (half == read) & (offset >= 0)
                    place[found, 0], place[found, 1] = choice.layer, offset[found]
        row = {
            "direction": direction,
            "kind": kind,
            "chosen": [choice._asdict() for choice in chosen],
        }
        for metric, estimate in _read(cells, direction, moved, place).items():
            yield row | {"metric": metric} | estimate._asdict() | {"p": math.nan}


def _labels(kind: str, texts: Sequence[np.ndarray], n_offsets: int) -> Int[Tensor, "text earlier"]:
    """Positions or token ids of the tokens before the last one, the nearest first."""
    rows = []
    for ids in texts:
        positions = len(ids) - 1 - np.arange(1, n_offsets)
        rows.append(positions if kind == POSITION else np.asarray(ids)[positions])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def choose(
    moved: Float[Tensor, "text layer earlier"], labels: Int[Tensor, "text earlier"]
) -> Choice | None:
    """The label and layer that move most over all texts together; None if nothing moves.

    A label that a text has several times stands for the last of them.

    >>> moved = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])
    >>> choose(moved, torch.tensor([[4, 5], [5, 6]]))
    Choice(label=5, layer=0)
    """
    best, most = None, 0.0
    for label in sorted(set(labels.flatten().tolist())):
        offset = _offset_of(label, labels)
        has = offset >= 0
        total = moved[has].gather(-1, offset[has, None, None].expand(-1, moved.shape[1], 1)).sum(0)
        layer = int(total[:, 0].abs().argmax())
        if float(total[layer, 0].abs()) > most:
            best, most = Choice(label, layer), float(total[layer, 0].abs())
    return best


def _offset_of(label: int, labels: Int[Tensor, "text earlier"]) -> Int[Tensor, " text"]:
    """The nearest place of a label in each text; -1 where a text has none."""
    is_it = labels == label
    return torch.where(is_it.any(-1), is_it.int().argmax(-1), -1)


def _own_best(moved: Float[Tensor, "text layer earlier"]) -> Int[Tensor, "text two"]:
    """Layer and offset less 1 that move furthest towards the source, text by text."""
    if not moved.shape[-1]:
        return torch.full((len(moved), 2), -1)
    flat = moved.flatten(1).argmax(-1)
    return torch.stack([flat // moved.shape[-1], flat % moved.shape[-1]], -1)


def _read(
    cells: MapCells,
    direction: str,
    moved: Float[Tensor, "text layer earlier"],
    place: Int[Tensor, "text two"],
) -> dict[str, Estimate]:
    """How far the chosen cells move the logits, and how many decisions become the source's."""
    has = (place[:, 0] >= 0) & cells.changed
    text, layer, earlier = has.nonzero()[:, 0], place[has, 0], place[has, 1]
    shift = ratio(moved[text, layer, earlier], cells.distance[text])
    source = {"base": cells.base_top_1, "tuned": cells.tuned_top_1}[SOURCE[direction]]
    hits = int((cells.top_1[direction][text, layer, earlier + 1] == source[text]).sum())
    n = len(text)
    value = hits / n if n else math.nan
    se = math.sqrt(value * (1 - value) / n) if n else math.nan
    return {"moved": shift, "recovered": Estimate(value, *wilson(hits, n), se, n)}
