"""The changes at work: on every decision of some texts, and while a model writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...passes.streams import ModelStream, StreamPair, StreamSpec, logit_chunk_bytes
from ...statistics.moments import in_full_float32
from ..logits import check_finite
from ..outcomes import Outcome, Tally, measure, reference
from ..outputs import OutputReader
from .interventions import Cell, Plan, Side


class Frame:
    """A basis about a mean, in float32 where a model's outputs are.

    Args:
        mean, basis: float64.
        device: of the outputs.
    """

    def __init__(self, mean: Tensor, basis: Tensor, device: torch.device) -> None:
        self._mean = mean.float().to(device)
        self._basis = basis.float().to(device)

    def coordinates(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Where outputs lie along the axes."""
        with in_full_float32():
            return (x.float() - self._mean) @ self._basis

    def moved(
        self,
        x: Float[Tensor, "*rows d_model"],
        coordinates: Float[Tensor, "*rows d_model"],
        gain: Float[Tensor, " d_model"],
    ) -> Float[Tensor, "*rows d_model"]:
        """The outputs with every coordinate times its gain; those of gain 1 are left untouched."""
        by = (gain - 1.0).float().to(x.device)
        with in_full_float32():
            change = (coordinates * by) @ self._basis.mT
        return (x.float() + change).to(x.dtype)


def change_of(
    planned: Plan, cell: Cell, mean: Float[Tensor, " d_model"], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """One change as a function of a last block's output, for `changing`."""
    basis, gain = planned.changes[cell]
    frame = Frame(mean, planned.bases[basis], device)
    return lambda x: frame.moved(x, frame.coordinates(x), gain)


class Reading(OutputReader):
    """Every change on every decision of the texts of a pass.

    Args:
        planned: the changes.
        means: of the last-block outputs of both models, where the changes are fitted.
        n_texts: how many texts the pass reads.
    """

    name = "expansion"

    def __init__(
        self, planned: Plan, means: dict[Side, Float[Tensor, " d_model"]], n_texts: int
    ) -> None:
        super().__init__(n_texts)
        self._plan = planned
        self._means = means

    def open(self, spec: StreamSpec) -> None:
        """Put the bases where the outputs are, and begin to count."""
        grouped: dict[tuple[Side, str], list[Cell]] = defaultdict(list)
        for cell, (basis, _) in self._plan.changes.items():
            grouped[cell.side, basis].append(cell)
        self._grouped = dict(grouped)
        self._frames: dict[tuple[Side, str], Frame] = {}
        sides: tuple[Side, Side] = ("base", "tuned")
        self._unchanged: dict[Side, Tally] = {side: Tally(self._n_texts) for side in sides}
        self._changed = {cell: Tally(self._n_texts) for cell in self._plan.changes}

    def decide(self, pair: StreamPair, index: Int[Tensor, " n"], text: Int[Tensor, " n"]) -> None:
        """Put in every change, and count what is decided; `ActivationError` if one overflows."""
        streams: dict[Side, ModelStream] = {"base": pair.base, "tuned": pair.tuned}
        outputs = {
            side: stream.residuals[-1].flatten(0, 1)[index] for side, stream in streams.items()
        }

        def logits(side: Side, x: Tensor) -> Tensor:
            stream = streams[side]
            return stream.unembed(stream.final_norm(x)).float().to(pair.device)

        own = {side: logits(side, x) for side, x in outputs.items()}
        models = reference(own["base"], own["tuned"])
        for side, tally in self._unchanged.items():
            tally.add(measure(own[side], models), models.changed, text)
        for (side, basis), cells in self._grouped.items():
            x = outputs[side]
            frame = self._frame(side, basis, x.device)
            coordinates = frame.coordinates(x)
            for cell in cells:
                new = frame.moved(x, coordinates, self._plan.changes[cell].gain)
                check_finite(f"the {side} model ({cell.way}, {cell.arm})", new)
                found = measure(logits(side, new), models)
                self._changed[cell].add(found, models.changed, text)

    def _frame(self, side: Side, basis: str, device: torch.device) -> Frame:
        if (side, basis) not in self._frames:
            frame = Frame(self._means[side], self._plan.bases[basis], device)
            self._frames[side, basis] = frame
        return self._frames[side, basis]

    def outcomes(self) -> dict[Cell | Side, Outcome]:
        """What each change did, and the models without any."""
        found: dict[Cell | Side, Outcome] = {}
        found |= {cell: tally.outcome() for cell, tally in self._changed.items()}
        found |= {side: tally.outcome() for side, tally in self._unchanged.items()}
        return found

    def state_bytes(self, spec: StreamSpec) -> int:
        """Memory of the bases, and of the logits of some rows with what is made of them."""
        return 4 * len(self._plan.bases) * spec.d_model**2 + 16 * logit_chunk_bytes(
            spec.d_vocab, spec.device
        )
