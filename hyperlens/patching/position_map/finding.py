"""The layer x position map as a result: its words, its figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...results.result import Result
from ..directions import BROUGHT, INTO_BASE, TOWARDS
from ..wording import share_of, shown

if TYPE_CHECKING:
    import matplotlib.figure

EVERY = -1
"""Stands for an offset: all positions up to the decision are patched."""

# Less than this of the way reads as nothing.
SEEN = 0.005


@dataclass(frozen=True)
class PositionsResult(Result):
    """What one model's residual at one token and layer does to the other's decision.

    The table has a row per direction, layer (0 for the embedding output, l for the output of
    block l - 1), offset (how many tokens before the last one; -1 for all positions up to the
    decision) and metric: "recovered", the share of decisions that become the donor's, and "moved",
    how far the logit of the tuned model's choice less that of the base's moves from the host's
    (0) to the donor's (1). n counts texts, one decision each; `p` that nothing moves is corrected
    over the cells of a direction (Holm), NaN for "recovered".

    Extras: how many `decisions`; how many texts were `looked_at` to find them, and how many of
    these were `too_short` or had none (`unchanged`); `example`, one text with its tokens.
    """

    name = "patch_positions"
    columns = (
        *("direction", "layer", "offset", "metric"),
        *("value", "low", "high", "se", "n", "p"),
    )

    def cell(self, direction: str, layer: int, offset: int, metric: str) -> Mapping[str, Any]:
        """One cell of a map."""
        (row,) = self.select(direction=direction, layer=layer, offset=offset, metric=metric)
        return row

    def column(self, direction: str, offset: int, metric: str) -> list[Mapping[str, Any]]:
        """One position along the layers."""
        return self.select(direction=direction, offset=offset, metric=metric)

    @property
    def offsets(self) -> list[int]:
        """The positions of single tokens, the earliest first."""
        return list(reversed(range(self.meta["options"]["offsets"])))

    @property
    def n_layers(self) -> int:
        """How many blocks the models have; layers go from 0 to this."""
        return int(self.meta["n_layers"])

    def strongest_earlier(self, direction: str, layer: int) -> Mapping[str, Any] | None:
        """The position before the last token at which the gap moves furthest."""
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
        said = []
        for direction, metric in TOWARDS.items():
            donor = "tuned" if metric == "to_tuned" else "base"
            layer = self.arrival(direction)
            if layer is None:
                said.append(
                    f"{direction.capitalize()}: at no layer up to the last does the last token "
                    f"alone surely decide more than half of the time as in the {donor} model."
                )
            else:
                all_of_it = self.cell(direction, layer, EVERY, "recovered")
                said.append(
                    f"{direction.capitalize()}: from layer {layer} on, what stands at the last "
                    f"token alone surely makes more than half of the decisions the {donor} "
                    f"model's ({share_of(self.cell(direction, layer, 0, 'recovered'))} at layer "
                    f"{layer}, where all positions together make {share_of(all_of_it)})."
                )
            sure = [
                row
                for row in self.select(direction=direction, metric="moved")
                if row["offset"] > 0 and row["p"] < 0.05
            ]
            if sure:
                best = max(sure, key=lambda row: abs(row["value"]))
                said.append(
                    f"Of single earlier tokens, {len(sure)} cells surely move the decision "
                    f"(corrected p < 0.05); most, the token {best['offset']} before the last at "
                    f"layer {best['layer']}: {moved(best)} of the way."
                )
            else:
                said.append("No single earlier token surely moves the decision (corrected p).")
        return said

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
            if earlier and abs(earlier["value"]) >= SEEN:
                furthest = f"{moved(earlier)} ({earlier['offset']} back)"
            line = (
                f"{layer:>5}  {share_of(self.cell(direction, layer, 0, 'recovered')):<25}"
                f"{moved(self.cell(direction, layer, 0, 'moved')):<22}{furthest:<30}"
                f"{share_of(self.cell(direction, layer, EVERY, 'recovered')):<22}"
            )
            lines.append(line.rstrip())
        return lines

    def plot(self) -> matplotlib.figure.Figure:
        """Both maps, and those of the example."""
        from .plot import draw

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
