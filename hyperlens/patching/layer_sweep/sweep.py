"""Every cell of a layer sweep, batch by batch: patched, compared with both models, dropped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ...data.corpus import Corpus
from ...hooks.surface import HookedModel, evaluating, final_norm, input_device
from ...pair import Pair
from ...passes.streams import logit_rows
from ..directions import INTO_BASE, INTO_TUNED
from ..hooks.cells import Activations, check_resumes, read, run_patched
from ..hooks.positions import Positions, chosen_so_far, positions_mask
from ..hooks.sites import Site
from ..logits import check_finite, check_stream, float_logits
from ..outcomes import Outcome, Tally, measure, reference
from ..pending import pieces
from .placebos import PLACEBOS, noise, of_other_text, random_rotation, rotated

DONOR = "donor"


class Cell(NamedTuple):
    """One patched model.

    Attributes:
        direction: whose activation goes into whom; the latter is the host.
        site: where.
        activation: "donor", or the name of a placebo.
    """

    direction: str
    site: Site
    activation: str


@dataclass(frozen=True)
class Sweep:
    """What is swept.

    Attributes:
        sites: one cell each, per direction and activation.
        positions: which tokens are patched.
        with_placebos: whether the placebos stand beside the donor.
        seed: of the placebos.
    """

    sites: Sequence[Site]
    positions: Positions
    with_placebos: bool
    seed: int

    @property
    def activations(self) -> tuple[str, ...]:
        """What is put in, the donor's own first."""
        return (DONOR, *PLACEBOS) if self.with_placebos else (DONOR,)


@dataclass(frozen=True)
class Outcomes:
    """What became of every cell, and of the two models as they are ("base", "tuned")."""

    cells: Mapping[Cell, Outcome]
    models: Mapping[str, Outcome]


class _Batch(NamedTuple):
    """Texts on the models' device, and for each of them another text to take a placebo from."""

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    counted: Bool[Tensor, "batch pos"]
    number: Int[Tensor, " batch"]
    other_tokens: Int[Tensor, "batch pos"]
    other_mask: Int[Tensor, "batch pos"]


class _Side(NamedTuple):
    """One model's activations on a batch, and on its other texts."""

    model: HookedModel
    stream: list[Float[Tensor, "batch pos d_model"]]
    here: Activations
    elsewhere: Activations


Normed = Float[Tensor, "n d_model"]


def run_sweep(
    pair: Pair, corpus: Corpus, sweep: Sweep, batch_size: int, progress: bool
) -> Outcomes:
    """Patch every cell on every text; only what comes after a patch is run again.

    Raises:
        ActivationError: if a model, or what a patch makes of it, overflows.
        PatchError: if a model's blocks cannot be resumed, or lack a site, or no text has the
            positions.
    """
    n = len(corpus.sequences)
    cells: dict[Cell, Tally] = defaultdict(lambda: Tally(n))
    models = {"base": Tally(n), "tuned": Tally(n)}
    rotation = random_rotation(pair.base.hooked.cfg.d_model, sweep.seed)
    with tqdm(total=n, desc="patching", unit="text", disable=not progress) as bar:
        for index, batch in enumerate(_batches(pair, corpus, batch_size)):
            sides = {
                "base": _read("base", pair.base.hooked, batch, sweep),
                "tuned": _read("tuned", pair.tuned.hooked, batch, sweep),
            }
            if index == 0:
                positions_mask(sweep.positions, batch.mask)  # the longest texts are here
                for side in sides.values():
                    check_resumes(side.model, batch.tokens, batch.mask, side.stream)
            patched = _patched(sides, batch, sweep, rotation, corpus.max_length)
            waiting = pieces(patched, lambda one: one[1].nbytes)
            # The models themselves are compared once, with the first cells.
            _compare(pair, sides, batch, next(waiting), cells, models)
            for piece in waiting:
                _compare(pair, sides, batch, piece, cells, {})
            bar.update(len(batch.tokens))
    return Outcomes(
        {cell: tally.outcome() for cell, tally in cells.items()},
        {name: tally.outcome() for name, tally in models.items()},
    )


def _batches(pair: Pair, corpus: Corpus, batch_size: int) -> Iterator[_Batch]:
    device = input_device(pair.base.hooked)
    n = len(corpus.sequences)
    first = 0
    for batch in corpus.batches(batch_size):
        number = torch.arange(first, first + len(batch.tokens))
        first += len(number)
        others, mask = torch.zeros_like(batch.tokens), torch.zeros_like(batch.tokens)
        for row, text in enumerate(number.tolist()):
            ids = torch.from_numpy(corpus.sequences[(text + 1) % n][: batch.tokens.shape[1]])
            others[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        counted = batch.real & ~batch.bos
        moved = (batch.tokens, batch.real.long(), counted, number, others, mask)
        yield _Batch(*(x.to(device) for x in moved))


def _read(name: str, model: HookedModel, batch: _Batch, sweep: Sweep) -> _Side:
    stream, here = read(model, batch.tokens, batch.mask, sweep.sites)
    check_stream(name, stream, batch.mask.bool())
    elsewhere: Activations = {}
    if sweep.with_placebos:
        elsewhere = read(model, batch.other_tokens, batch.other_mask, sweep.sites)[1]
    return _Side(model, stream, here, elsewhere)


def _patched(
    sides: Mapping[str, _Side],
    batch: _Batch,
    sweep: Sweep,
    rotation: Float[Tensor, "d_model d_model"],
    longest: int,
) -> Iterator[tuple[Cell, Normed]]:
    """What leaves the final norm at the counted tokens, cell by cell."""
    chosen = chosen_so_far(sweep.positions, batch.mask)[..., None]
    for direction, host, donor in (
        (INTO_BASE, sides["base"], sides["tuned"]),
        (INTO_TUNED, sides["tuned"], sides["base"]),
    ):
        for site in sweep.sites:
            own, value = host.here[site], donor.here[site]
            for activation in sweep.activations:
                if activation == "other_text":
                    put = of_other_text(donor.elsewhere[site], batch.other_mask.sum(-1))
                elif activation == "noise":
                    put = noise(own, value, batch.number, longest, sweep.seed)
                else:
                    put = value if activation == DONOR else rotated(own, value, rotation)
                put = torch.where(chosen, put.to(own), own)
                read_by = host.model, batch.tokens, batch.mask, host.stream
                normed = run_patched(*read_by, site, put)[batch.counted]
                check_finite(f"the patched model ({direction}, {activation} at {site})", normed)
                yield Cell(direction, site, activation), normed


def _compare(
    pair: Pair,
    sides: Mapping[str, _Side],
    batch: _Batch,
    piece: list[tuple[Cell, Normed]],
    cells: Mapping[Cell, Tally],
    models: Mapping[str, Tally],
) -> None:
    """Logits of some cells beside the unpatched models', a few rows at a time."""
    text = batch.number[:, None].expand_as(batch.counted)[batch.counted]
    last = {name: side.stream[-1][batch.counted] for name, side in sides.items()}
    with evaluating(sides["base"].model), evaluating(sides["tuned"].model):
        for rows in logit_rows(len(text), pair.base.hooked.cfg.d_vocab, text.device):
            logits = {
                name: float_logits(side.model, final_norm(side.model, last[name][rows]))
                for name, side in sides.items()
            }
            known = reference(logits["base"], logits["tuned"])
            for name, tally in models.items():
                tally.add(measure(logits[name], known), known.changed, text[rows])
            for cell, normed in piece:
                host = sides["base" if cell.direction == INTO_BASE else "tuned"].model
                found = measure(float_logits(host, normed[rows]), known)
                cells[cell].add(found, known.changed, text[rows])
