"""Every cell of a layer x position map, text by text, in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ...hooks.surface import evaluating, input_device
from ...pair import Pair
from ...statistics.distances import winner
from ..directions import DIRECTIONS, INTO_BASE, INTO_TUNED
from ..hooks.cells import check_resumes
from ..logits import check_finite, float_logits
from .cells import Ending, check_reads_on, patched_everywhere, patched_singly, read_ending
from .finding import EVERY


@dataclass(frozen=True)
class Cells:
    """What every cell did, text by text.

    Attributes:
        offsets: of the columns; `EVERY` is last.
        base_pick, tuned_pick: the unpatched models' choices.
        gap: of the unpatched models, by direction in which they are the host: the logit of the
            tuned model's choice less that of the base's.
        picks, gaps: the patched models' choice and gap, by direction.
    """

    offsets: Sequence[int]
    base_pick: Int[Tensor, " text"]
    tuned_pick: Int[Tensor, " text"]
    gap: Mapping[str, Float[Tensor, " text"]]
    picks: Mapping[str, Int[Tensor, "text layer offset"]]
    gaps: Mapping[str, Float[Tensor, "text layer offset"]]

    @property
    def changed(self) -> Bool[Tensor, " text"]:
        """Where the models still differ on the text that was cut; rounding may undo a tie."""
        return self.base_pick != self.tuned_pick

    def moved(self, direction: str) -> Float[Tensor, "text layer offset"]:
        """How far the gap moves from the host's in the direction of the donor's."""
        sign = 1.0 if direction == DIRECTIONS[0] else -1.0
        return sign * (self.gaps[direction] - self.gap[direction][:, None, None])

    @property
    def whole(self) -> Float[Tensor, " text"]:
        """How far it would move all the way."""
        way = self.gap[DIRECTIONS[1]] - self.gap[DIRECTIONS[0]]
        return torch.where(self.changed, way, 0.0)


def map_positions(
    pair: Pair, texts: Sequence[np.ndarray], n_offsets: int, batch_size: int, progress: bool
) -> Cells:
    """Patch every layer and position of every text.

    Args:
        pair: the two models.
        texts: token ids that end with the token before the decision.
        n_offsets: how many positions, counted back from the last token.
        batch_size: patched texts per forward pass.
        progress: show a progress bar.

    Raises:
        ActivationError: if a model, or what a patch makes of it, overflows.
        PatchError: if a model's blocks hand on more than the residual stream, or it keeps something
            other than keys and values.
    """
    n, n_layers = len(texts), pair.base.hooked.cfg.n_layers
    offsets = (*range(n_offsets), EVERY)
    shape = (n, n_layers + 1, len(offsets))
    found = Cells(
        offsets,
        torch.zeros(n, dtype=torch.long),
        torch.zeros(n, dtype=torch.long),
        {way: torch.zeros(n, dtype=torch.float64) for way in DIRECTIONS},
        {way: torch.zeros(shape, dtype=torch.long) for way in DIRECTIONS},
        {way: torch.zeros(shape, dtype=torch.float64) for way in DIRECTIONS},
    )
    order = sorted(range(n), key=lambda i: (-len(texts[i]), i))
    with tqdm(total=n, desc="patching", unit="text", disable=not progress) as bar:
        for start in range(0, n, batch_size):
            batch = order[start : start + batch_size]
            tokens, mask = _padded([texts[i] for i in batch], input_device(pair.base.hooked))
            read = {
                INTO_BASE: read_ending("base", pair.base.hooked, tokens, mask, n_offsets),
                INTO_TUNED: read_ending("tuned", pair.tuned.hooked, tokens, mask, n_offsets),
            }
            if start == 0:
                for one in read.values():
                    check_resumes(one.model, tokens, mask, one.stream)
                    check_reads_on(one)
            _fill(found, torch.tensor(batch), read, batch_size)
            bar.update(len(batch))
    return found


def _fill(
    found: Cells, text: Int[Tensor, " text"], read: Mapping[str, Ending], batch_size: int
) -> None:
    """Both models as they are, then all cells of some texts."""
    logits = {way: _logits(one, one.unpatched) for way, one in read.items()}
    base_pick, tuned_pick = (winner(logits[way]).cpu() for way in (INTO_BASE, INTO_TUNED))
    found.base_pick[text], found.tuned_pick[text] = base_pick, tuned_pick
    for way in DIRECTIONS:
        found.gap[way][text] = _gap(logits[way], base_pick, tuned_pick)
    for way, donor in zip(DIRECTIONS, reversed(DIRECTIONS), strict=True):
        host = read[way]
        for layer, pair in enumerate(zip(host.stream, read[donor].stream, strict=True)):
            if torch.equal(*pair):  # blocks that tuning left alone: nothing is put in
                found.picks[way][text, layer] = winner(logits[way]).cpu()[:, None]
                found.gaps[way][text, layer] = found.gap[way][text][:, None]
                continue
            columns = [
                *patched_singly(host, pair[1], layer, batch_size).unbind(1),
                patched_everywhere(host, pair[1], layer),
            ]
            for column, normed in enumerate(columns):
                check_finite(f"the patched model ({way}, layer {layer})", normed)
                made = _logits(host, normed)
                found.picks[way][text, layer, column] = winner(made).cpu()
                found.gaps[way][text, layer, column] = _gap(made, base_pick, tuned_pick)


def _padded(
    texts: Sequence[np.ndarray], device: torch.device
) -> tuple[Int[Tensor, "text pos"], Int[Tensor, "text pos"]]:
    """On the left: all end together."""
    tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(texts):
        tokens[row, -len(ids) :], mask[row, -len(ids) :] = torch.from_numpy(ids), 1
    return tokens.to(device), mask.to(device)


def _logits(one: Ending, normed: Float[Tensor, "text d_model"]) -> Float[Tensor, "text d_vocab"]:
    with evaluating(one.model):
        return float_logits(one.model, normed)


def _gap(
    logits: Float[Tensor, "text d_vocab"],
    base_pick: Int[Tensor, " text"],
    tuned_pick: Int[Tensor, " text"],
) -> Float[Tensor, " text"]:
    """The logit of the tuned model's choice less that of the base's, float64, on the CPU."""
    tuned, base = (logits.cpu().gather(-1, pick[:, None])[:, 0] for pick in (tuned_pick, base_pick))
    return tuned.double() - base.double()
