"""patch_blocks: each block's activation of one model put into the other, and what it does.

The causal question behind arXiv 2605.22579, which only correlates: does the output of the last
blocks of the tuned model bring about its decisions, and does the base's undo them?
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..checks import check_choice, check_counts, check_seed, check_types
from ..data.corpus import Corpus, pad
from ..decoding.diversity import REPETITION_METRICS as REPETITION
from ..decoding.prompts import prompt_lengths
from ..errors import PatchError, ResultsError
from ..hooks.loading import LoadedModel
from ..hooks.partial_forward import Activations, check_resumes, read, resume, run_patched
from ..hooks.patched_generation import check_takes_past, donating
from ..hooks.sites import (
    Positions,
    Site,
    check_kind,
    counts_from_the_end,
    in_blocks,
    mask_of_existing,
    positions_mask,
)
from ..hooks.surface import (
    HookedModel,
    check_finite,
    check_stream,
    evaluating,
    final_norm,
    float_logits,
    input_device,
)
from ..pair import Pair, open_inputs
from ..passes.failures import explaining_out_of_memory
from ..render.blocks import (
    Axis,
    Block,
    Chart,
    Details,
    Grid,
    Reference,
    Role,
    Scale,
    Table,
    Text,
    Verdict,
)
from ..render.format import FRACTION, PERCENT, POINTS, count, ends, interval, p_value
from ..results.result import Result
from ..results.rows import chosen_layers
from ..statistics import significance
from ..statistics.shares import holm_p_values
from ..statistics.significance import Estimate
from .controls import (
    CONTROLS,
    OTHER_TEXT,
    RANDOM_DIRECTION,
    RENAMED,
    ROTATED,
    of_other_text,
    random_direction,
    random_rotation,
    rotated,
)
from .engine import (
    Batch,
    BatchOutputs,
    Outcomes,
    PatchedOutput,
    Repetition,
    batches,
    compare_patched,
    draw_texts,
    greedy_generation,
    patched_repetition,
)
from .outcomes import (
    BROUGHT,
    DIRECTIONS,
    INTO_BASE,
    METRICS,
    SIDES,
    SOURCE,
    TARGET,
    TOWARDS,
    Side,
)
from .outcomes import RENAMED as RENAMED_METRICS
from .two_by_two import BEYOND, PARTS, Cut, cut_cells, cut_effects, part_effects

SOURCE_ACTIVATION = "source"

Row = dict[str, Any]


@check_types
def patch_blocks(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    site: str = "resid_post",
    positions: Positions = None,
    controls: bool = True,
    n_texts: int = 64,
    max_length: int = 128,
    n_prompts: int = 32,
    prompt_tokens: int = 17,
    max_new_tokens: int = 96,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> BlocksResult:
    """Patch every block in both directions, and compare what patched models decide and generate.

    "Tuned into base" puts the tuned model's activation into the base (what does it bring about?),
    "base into tuned" the other way round (what does it undo?). Patches of the residual stream at
    all positions also give the 2 x 2 of every cut between blocks, because such a patch *is* the
    one model's residual entering the other's late blocks. A patch of layer l carries all that
    happened before it: read where its effect changes from one layer to the next, not how large it
    is at the last.

    Next to the source activation stand controls: the source's activation on another text, an
    equally long move in a random direction, and the source's own change rotated.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; or an open `Pair`.
        texts: what `compare_models` takes.
        site: "resid_post" (with the embedding output as layer 0), "resid_pre", "attn_out",
            "mlp_out" or "final_norm".
        positions: which tokens are patched: None, a list, or a slice (see `Positions`).
        controls: whether to run them; False is four times faster and has no baseline.
        n_texts: how many texts are read, drawn at random.
        max_length: tokens per text.
        n_prompts, prompt_tokens, max_new_tokens: of the greedy generations; 0 new tokens generates
            none.
        batch_size: texts, or prompts, per forward pass; does not change the result.
        seed: of the choice of texts and prompts, and of the controls.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        PatchError: if the models lack the site, blocks pass on more than the residual stream, or
            text is to be generated and the models take no `past_key_values`.
        ActivationError: if a model, or a patched one, overflows.
        HyperlensError: if a source cannot be opened, or the texts do not fit the models.
    """
    check_kind(site)
    check_counts(n_texts=n_texts, batch_size=batch_size)
    check_seed(seed)
    if max_new_tokens and counts_from_the_end(positions):
        raise PatchError(
            f"positions {positions} count from the end of a text, and a text that is being "
            "generated has none yet: count from the start, or pass max_new_tokens=0"
        )
    inputs = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    inputs = draw_texts(inputs, n_texts, seed)
    pair = inputs.pair
    sweep = Sweep(swept_sites(site, pair.base.hooked.cfg.n_layers), positions, controls, seed)
    if max_new_tokens:
        for loaded in (pair.base, pair.tuned):
            check_takes_past(loaded.model)
    generation = greedy_generation(
        pair,
        inputs.corpus,
        n_prompts=n_prompts,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    with explaining_out_of_memory(batch_size, ", or max_length"):
        outcomes = run_sweep(pair, inputs.corpus, sweep, batch_size, progress)
    models: dict[Side, LoadedModel] = {"base": pair.base, "tuned": pair.tuned}
    repetition = patched_repetition(
        generation, models, _generated_cells(sweep), _generation_patch(models, sweep), progress
    )
    cuts = _cuts(outcomes, sweep.sites) if sweep.has_cuts else []
    meta = inputs.metadata(
        seed=seed,
        options={
            "site": site,
            "positions": None if positions is None else str(positions),
            "controls": controls,
            "n_texts": len(inputs.corpus.sequences),
            "max_length": max_length,
            "n_prompts": len(generation.prompts) if generation else 0,
            "prompt_tokens": prompt_lengths(
                inputs.corpus, generation.prompts if generation else (), prompt_tokens
            ),
            "max_new_tokens": max_new_tokens,
        },
    )
    extras = outcomes.models["base"].counts() | {
        "contrasts": [*_contrasts(outcomes, sweep), *_repetition_contrasts(repetition, sweep)],
        "two_by_two": list(cut_cells(cuts)),
        "effects": list(cut_effects(cuts)),
        "parts": list(_parts(outcomes, cuts, pair.base.hooked.cfg.n_layers - 1)),
    }
    return BlocksResult((*_rows(outcomes), *_repetition_rows(repetition)), extras, meta)


def swept_sites(kind: str, n_layers: int) -> list[Site]:
    """The sites of a sweep; that of `resid_post` begins with the input of the first block."""
    if kind == "final_norm":
        return [Site("final_norm")]
    start = [Site("resid_pre", 0)] if kind == "resid_post" else []
    return [*start, *in_blocks(kind, range(n_layers))]


# Teacher-forced decisions


class Cell(NamedTuple):
    """One patched model.

    Attributes:
        direction: whose activation goes into whom.
        site: where.
        activation: "source", the name of a control, or that of a part of the last cut.
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
        with_controls: whether the controls are run.
        seed: of the controls.
    """

    sites: Sequence[Site]
    positions: Positions
    with_controls: bool
    seed: int

    @property
    def activations(self) -> tuple[str, ...]:
        """What is put in, the source activation first."""
        return (SOURCE_ACTIVATION, *(CONTROLS if self.with_controls else ()))

    @property
    def has_cuts(self) -> bool:
        """Whether a patch is the one model's residual entering the other's late blocks."""
        return self.positions is None and self.sites[0].kind.startswith("resid")


class _ModelReading(NamedTuple):
    """One model's activations on a batch, and on the other texts of its controls."""

    model: HookedModel
    stream: list[Float[Tensor, "batch pos d_model"]]
    here: Activations
    elsewhere: Activations


class _OtherTexts(NamedTuple):
    """For each text of a batch, another one: the next of the corpus.

    Attributes:
        tokens, mask: padded on the right to the width of the batch.
        unpadded: whether each is to be read by itself.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    unpadded: bool

    def read(self, model: HookedModel, sites: Sequence[Site]) -> Activations:
        """A model's activations on them, zeros at pads that it has not seen."""
        if not self.unpadded:
            return read(model, self.tokens, self.mask, sites)[1]
        width, found = self.tokens.shape[1], []
        for tokens, n in zip(self.tokens, self.mask.sum(-1).tolist(), strict=True):
            alone = tokens[None, :n]
            found.append(read(model, alone, torch.ones_like(alone), sites)[1])
        return {
            site: torch.cat([F.pad(of[site], (0, 0, 0, width - of[site].shape[1])) for of in found])
            for site in sites
        }


def run_sweep(
    pair: Pair, corpus: Corpus, sweep: Sweep, batch_size: int, progress: bool
) -> Outcomes[Cell]:
    """Patch every cell on every text; only the blocks after a patch are run again.

    Raises:
        ActivationError: if a model, or a patched one, overflows.
        PatchError: if a model's blocks cannot be resumed, or lack a site, or no text has the
            positions.
    """
    models: dict[Side, HookedModel] = {"base": pair.base.hooked, "tuned": pair.tuned.hooked}
    outputs = _outputs(models, corpus, sweep, batch_size)
    return compare_patched(outputs, models, corpus, progress)


def _outputs(
    models: Mapping[Side, HookedModel], corpus: Corpus, sweep: Sweep, batch_size: int
) -> Iterator[BatchOutputs[Cell]]:
    rotation = random_rotation(models["base"].cfg.d_model, sweep.seed)
    for index, batch in enumerate(batches(corpus, batch_size, input_device(models["base"]))):
        others = _other_texts(corpus, batch)
        readings = {side: _read(side, models[side], batch, others, sweep) for side in SIDES}
        if index == 0:
            positions_mask(sweep.positions, batch.mask)  # the first batch has the longest texts
            for reading in readings.values():
                check_resumes(reading.model, batch.tokens, batch.mask, reading.stream)
        last = {side: reading.stream[-1][batch.counted] for side, reading in readings.items()}
        patched = _patched(readings, batch, others, sweep, rotation, corpus.max_length)
        alone = _parts_alone(readings, batch) if sweep.has_cuts else ()
        yield BatchOutputs(batch, last, itertools.chain(patched, alone))


def _other_texts(corpus: Corpus, batch: Batch) -> _OtherTexts:
    n, width = len(corpus.sequences), batch.tokens.shape[1]
    following = [corpus.sequences[(text + 1) % n][:width] for text in batch.number.tolist()]
    tokens, mask = pad(following, width=width)
    device = batch.tokens.device
    return _OtherTexts(tokens.to(device), mask.to(device), corpus.unpadded)


def _read(
    side: Side, model: HookedModel, batch: Batch, others: _OtherTexts, sweep: Sweep
) -> _ModelReading:
    stream, here = read(model, batch.tokens, batch.mask, sweep.sites)
    check_stream(side, stream, batch.mask.bool())
    elsewhere: Activations = {}
    if sweep.with_controls:
        elsewhere = others.read(model, sweep.sites)
    return _ModelReading(model, stream, here, elsewhere)


def _patched(
    readings: Mapping[Side, _ModelReading],
    batch: Batch,
    others: _OtherTexts,
    sweep: Sweep,
    rotation: Float[Tensor, "d_model d_model"],
    longest: int,
) -> Iterator[PatchedOutput[Cell]]:
    """The output of the final norm at the counted tokens, cell by cell."""
    chosen = mask_of_existing(sweep.positions, batch.mask)[..., None]
    for direction in DIRECTIONS:
        target, source = readings[TARGET[direction]], readings[SOURCE[direction]]
        logits = partial(float_logits, target.model)
        for site in sweep.sites:
            own, value = target.here[site], source.here[site]
            for activation in sweep.activations:
                if activation == OTHER_TEXT:
                    new = of_other_text(source.elsewhere[site], others.mask.sum(-1))
                elif activation == RANDOM_DIRECTION:
                    new = random_direction(own, value, batch.number, longest, sweep.seed)
                elif activation == ROTATED:
                    new = rotated(own, value, rotation)
                else:
                    new = value
                new = torch.where(chosen, new.to(own), own)
                read_by = target.model, batch.tokens, batch.mask, target.stream
                normed = run_patched(*read_by, site, new)[batch.counted]
                check_finite(f"the patched model ({direction}, {activation} at {site})", normed)
                yield PatchedOutput(normed, {Cell(direction, site, activation): logits})


def _parts_alone(
    readings: Mapping[Side, _ModelReading], batch: Batch
) -> Iterator[PatchedOutput[Cell]]:
    """The base with the tuned model's last block, and the base with its head."""
    base, tuned = readings["base"], readings["tuned"]
    last = len(base.stream) - 2
    entering = base.stream[last].to(tuned.stream[last])
    block = resume(tuned.model, batch.tokens, batch.mask, last, entering)
    for part, reading, residual in (
        ("last_block", base, block),
        ("head", tuned, base.stream[-1]),
    ):
        with evaluating(reading.model):
            normed = final_norm(reading.model, residual[batch.counted].to(reading.stream[-1]))
        check_finite(f"the base model with the tuned model's {part.replace('_', ' ')}", normed)
        yield PatchedOutput(normed, {_part_cell(part, last): partial(float_logits, reading.model)})


def _part_cell(part: str, last: int) -> Cell:
    return Cell(INTO_BASE, Site("resid_pre", last), part)


def _rows(outcomes: Outcomes[Cell]) -> Iterator[Row]:
    for side, outcome in outcomes.models.items():
        for metric in METRICS:
            yield _row("unpatched", None, side, metric, outcome.estimate(metric))
    for cell, outcome in outcomes.patched.items():
        for metric in METRICS if cell.activation not in PARTS else ():
            yield _row(cell.direction, cell.site, cell.activation, metric, outcome.estimate(metric))


def _row(
    direction: str, site: Site | None, activation: str, metric: str, estimate: Estimate
) -> Row:
    return {
        "direction": direction,
        "layer": -1 if site is None else site.layer,
        "site": "" if site is None else site.kind,
        "block": -1 if site is None or site.block is None else site.block,
        "activation": activation,
        "metric": metric,
    } | estimate._asdict()


def _contrasts(outcomes: Outcomes[Cell], sweep: Sweep) -> Iterator[Row]:
    """Source less control, paired by text, p corrected over the sites (Holm).

    The metrics: the source model's decisions brought about, and the distance to the source model.
    """
    for direction in DIRECTIONS:
        for control in sweep.activations[1:]:
            for metric in (TOWARDS[direction], f"kl_{SOURCE[direction]}"):
                differences = [
                    outcomes.patched[Cell(direction, site, SOURCE_ACTIVATION)].difference(
                        outcomes.patched[Cell(direction, site, control)], metric
                    )
                    for site in sweep.sites
                ]
                yield from _corrected(direction, sweep.sites, control, metric, differences)


def _corrected(
    direction: str,
    sites: Sequence[Site],
    against: str,
    metric: str,
    differences: Sequence[Estimate],
) -> Iterator[Row]:
    for site, one, p in zip(sites, differences, holm_p_values(differences), strict=True):
        yield _row(direction, site, against, metric, one) | {"p": p}


def _cuts(outcomes: Outcomes[Cell], sites: Sequence[Site]) -> list[Cut]:
    """A patch of the stream at all positions is the source's residual in the target's late blocks.

    So "tuned into base" has the tuned model's incoming residual, and "base into tuned", which runs
    the tuned model's blocks on the base's residual, has its late blocks.
    """
    cuts = []
    base, tuned = outcomes.models["base"], outcomes.models["tuned"]
    for site in sites:
        residual, late = (
            outcomes.patched[Cell(direction, site, SOURCE_ACTIVATION)] for direction in DIRECTIONS
        )
        cuts.append(Cut(site.layer, base, late, residual, tuned))
    return cuts


def _parts(outcomes: Outcomes[Cell], cuts: Sequence[Cut], last: int) -> Iterator[Row]:
    """The three parts of the cut before the last block, each alone in the base."""
    for cut in cuts:
        if cut.layer == last:
            parts = {part: outcomes.patched[_part_cell(part, last)] for part in PARTS[1:]}
            parts[PARTS[0]] = cut.tuned_incoming_residual
            yield from part_effects(cut.base, cut.tuned, parts)


# Free-running generation


def _generated_cells(sweep: Sweep) -> list[Cell]:
    """The cells under which text is generated: the source activation, and one control."""
    return [
        Cell(direction, site, activation)
        for direction in DIRECTIONS
        for site in sweep.sites
        for activation in (SOURCE_ACTIVATION, ROTATED)
        if activation in sweep.activations
    ]


def _generation_patch(models: Mapping[Side, LoadedModel], sweep: Sweep) -> Any:
    """What patches the model of each cell while it generates."""
    rotation = random_rotation(models["base"].hooked.cfg.d_model, sweep.seed)
    mixes = {ROTATED: partial(rotated, rotation=rotation)}

    def patch(cell: Cell) -> tuple[LoadedModel, AbstractContextManager[None]]:
        target, source = models[TARGET[cell.direction]], models[SOURCE[cell.direction]]
        mix = mixes.get(cell.activation)
        return target, donating(
            target.model, source.model, [cell.site], positions=sweep.positions, mix=mix
        )

    return patch


def _repetition_rows(repetition: Mapping[Cell | Side, Repetition]) -> Iterator[Row]:
    for key, metrics in repetition.items():
        for metric in REPETITION:
            mean = significance.estimate(metrics[metric])
            if isinstance(key, str):
                yield _row("unpatched", None, key, metric, mean)
            else:
                yield _row(key.direction, key.site, key.activation, metric, mean)


def _repetition_contrasts(
    repetition: Mapping[Cell | Side, Repetition], sweep: Sweep
) -> Iterator[Row]:
    """Text under a patch less that of the unpatched target and of a control, paired by prompt."""
    if not repetition:
        return
    for direction in DIRECTIONS:
        for against in ("unpatched", *([ROTATED] if sweep.with_controls else [])):
            for metric in REPETITION:
                differences = []
                for site in sweep.sites:
                    other: Cell | Side = TARGET[direction]
                    if against != "unpatched":
                        other = Cell(direction, site, against)
                    own = repetition[Cell(direction, site, SOURCE_ACTIVATION)]
                    differences.append(
                        significance.difference(own[metric], repetition[other][metric])
                    )
                yield from _corrected(direction, sweep.sites, against, metric, differences)


# The result


@dataclass(frozen=True)
class BlocksResult(Result):
    """What each patched model decides and generates, next to both models and the controls.

    The table has a row per direction, site, activation ("source" or a control) and metric; the
    models as they are have the direction "unpatched" and layer -1. Metrics: see
    `hyperlens.patching.outcomes.METRICS`, and TTR, rep-2, rep-3 of greedy text (n counts texts,
    or prompts for these three).

    Extras: `decisions` and how many tuning `changed`; `contrasts`, source less control (or less
    the unpatched target, for generated text), paired, p corrected over the sites by Holm;
    `two_by_two` and `effects`, for every cut between blocks; `parts`, what enters the last block,
    the last block and the head, each alone in the base.
    """

    name = "patch_blocks"
    title = "Which blocks' activations cause the behaviour?"
    old_names: ClassVar[tuple[str, ...]] = ("patching",)
    renamed: ClassVar[Mapping[str, str]] = {
        **RENAMED_METRICS,
        **RENAMED,
        "donor": SOURCE_ACTIVATION,
        "placebos": "controls",
        "state": "incoming_residual",
        "stack": "late_blocks",
        "stack - state": "late_blocks - incoming_residual",
        "tuned_state": "tuned_incoming_residual",
        "tuned_stack": "tuned_late_blocks",
    }
    columns = (
        *("direction", "layer", "site", "block", "activation", "metric"),
        *("value", "low", "high", "se", "n"),
    )

    def along(
        self, direction: str, metric: str, activation: str = SOURCE_ACTIVATION
    ) -> list[Mapping[str, Any]]:
        """One metric along the sites."""
        return self.rows(direction=direction, activation=activation, metric=metric)

    def unpatched(self, model: str, metric: str) -> Mapping[str, Any] | None:
        """A metric of the base or the tuned model as it is; None if it was not measured."""
        rows = self.along("unpatched", metric, model)
        return rows[0] if rows else None

    @property
    def activations(self) -> list[str]:
        """What was put in, the source activation first."""
        found = (r["activation"] for r in self.table if r["direction"] != "unpatched")
        return list(dict.fromkeys(found))

    def contrasts(self, direction: str, metric: str) -> list[Mapping[str, Any]]:
        """Source less control along the sites, for every control."""
        every = self.extras["contrasts"]
        return [c for c in every if c["direction"] == direction and c["metric"] == metric]

    def effect(self, effect: str, metric: str = "to_tuned") -> list[Mapping[str, Any]]:
        """One effect of the 2 x 2 along the cuts."""
        every = self.extras["effects"]
        return [e for e in every if e["effect"] == effect and e["metric"] == metric]

    def parts(self, metric: str = "to_tuned") -> dict[str, Mapping[str, Any]]:
        """Each part of the last cut alone in the base, "one - other", and "beyond_parts".

        Nothing where there are no cuts, and in results of version 0.1.
        """
        every = self.extras.get("parts", [])
        return {row["part"]: row for row in every if row["metric"] == metric}

    def beats_controls(self, direction: str, layer: int) -> bool | None:
        """Whether the source activation does more than every control (corrected p < 0.05).

        Raises:
            ResultsError: if there is no such direction.
        """
        check_choice("direction", direction, list(TOWARDS), ResultsError)
        rows = [c for c in self.contrasts(direction, TOWARDS[direction]) if c["layer"] == layer]
        if not rows or any(not math.isfinite(row["p"]) for row in rows):
            return None
        return all(row["p"] < 0.05 and row["value"] > 0 for row in rows)

    def verdicts(self) -> list[Verdict]:
        """What the last block, and what enters it, bring about; what is generated."""
        if not self.extras["changed"]:
            return [Verdict("cause", NOTHING_CHANGED)]
        caution = (
            "A patch of a layer carries all that came before it: read where a share changes from "
            "one layer to the next, not how large it is at the last."
        )
        return [*self._of_the_cut(), *self._of_generation(), Verdict("reading", caution, True)]

    def _of_the_cut(self) -> list[Verdict]:
        parts = self.parts()
        if not parts:
            return self._of_the_cut_alone()
        of = f"Of {self._changed_decisions()}, "
        if parts["head"]["value"] == 1.0:
            answer = (
                f"{of}the tuned model's head alone (final norm and unembedding) on the base's "
                f"last residual brings about {interval(parts['head'], PERCENT)}: no block is "
                "needed for them."
            )
            return [Verdict("cause", answer)]
        shares = ", ".join(f"{PART_NAMES[p]} {interval(parts[p], PERCENT)}" for p in PARTS)
        answer = (
            f"{of}one part of the tuned model alone in the base brings about: {shares}. "
            f"{_most(parts)}"
        )
        beyond = parts[BEYOND]
        found = [Verdict("cause", answer)]
        if beyond["low"] > 0:
            found.append(
                Verdict(
                    "interaction",
                    "All three together bring about all of them, "
                    f"{interval(beyond, POINTS)} beyond the sum of what each does alone: they "
                    "depend on each other, and no share is all of its part.",
                )
            )
        elif beyond["high"] < 0:
            found.append(
                Verdict(
                    "interaction",
                    "The three shares overlap: their sum is more than all "
                    f"({interval(beyond, POINTS)}). What one part brings about alone another "
                    "does, too, or undoes.",
                )
            )
        return found

    def _of_the_cut_alone(self) -> list[Verdict]:
        """What can be said of results in which the last block and the head were not told apart."""
        cut = self.meta["n_layers"] - 1
        cells = {
            cell["cell"]: interval(cell, PERCENT)
            for cell in self.extras["two_by_two"]
            if (cell["layer"], cell["metric"]) == (cut, "to_tuned")
        }
        if not cells:
            return []
        answer = (
            f"Of {self._changed_decisions()}, the tuned model's last block and head together on "
            f"the base's incoming residual bring about {cells['tuned_late_blocks']}; the tuned "
            "model's residual entering the base's last block and head brings about "
            f"{cells['tuned_incoming_residual']}."
        )
        return [Verdict("cause", answer)]

    def _changed_decisions(self) -> str:
        changed, decisions = self.extras["changed"], self.extras["decisions"]
        return f"the {count(changed, 'decision')} that tuning changed (of {decisions:,})"

    def _of_generation(self) -> list[Verdict]:
        found = []
        for direction in DIRECTIONS:
            rows = self.along(direction, "ttr")
            own, theirs = (self.unpatched(model[direction], "ttr") for model in (TARGET, SOURCE))
            if rows and own and theirs:
                answer = (
                    f"Generated text, {direction} at {self._where(rows[-1])}: TTR "
                    f"{interval(rows[-1], FRACTION)}; the {TARGET[direction]} model by itself "
                    f"{FRACTION(own['value'])}, the {SOURCE[direction]} model "
                    f"{FRACTION(theirs['value'])}."
                )
                found.append(Verdict("generated text", answer))
        return found

    def _where(self, row: Mapping[str, Any]) -> str:
        if row["layer"] < 0:
            return "the final norm"
        is_last = row["layer"] == self.meta["n_layers"]
        return "the last layer" if is_last else f"layer {row['layer']}"

    def evidence(self) -> list[Block]:
        """Both directions along the layers beside the controls, the 2 x 2, and generated text."""
        options = self.meta["options"]
        where = "all positions" if options["positions"] is None else options["positions"]
        texts = count(options["n_texts"], "text")
        blocks: list[Block] = [
            Text(
                f"The {options['site']} of one model is put into the other at {where} of {texts}, "
                "and all blocks after it run on. Controls put in another activation: that of "
                "another text, one as far away in a random direction, or the same change rotated."
            ),
            *(self._sweep(direction) for direction in TOWARDS),
            Grid(self._charts()),
        ]
        if self.extras["effects"]:
            blocks += [
                Text(
                    "The 2 x 2 of a cut keeps apart whose residual enters the late blocks and "
                    "whose late blocks (with the head) they are."
                ),
                self._cuts(),
                Details("all four cells of every cut", [self._two_by_two()]),
            ]
        return [
            *blocks,
            *(self._against(direction) for direction in TOWARDS if self.activations[1:]),
        ]

    def _sweep(self, direction: str) -> Table:
        metric, ttr = TOWARDS[direction], {r["layer"]: r for r in self.along(direction, "ttr")}
        rows = []
        for row in chosen_rows(self.along(direction, metric)):
            layer = row["layer"]
            text = FRACTION(ttr[layer]["value"]) if layer in ttr else ""
            rows.append(
                [place(row), interval(row, PERCENT), self._controls_at(direction, layer), text]
            )
        head = ["layer", BROUGHT[direction], "greatest control", "greedy TTR"]
        caption = f"{direction}; share of the decisions that tuning changed, 95% over texts"
        return Table(head, rows, caption)

    def _controls_at(self, direction: str, layer: int) -> str:
        others = [
            row["value"]
            for name in self.activations[1:]
            for row in self.along(direction, TOWARDS[direction], name)
            if row["layer"] == layer
        ]
        if not others:
            return ""
        beyond = " (source above all, p < 0.05)" if self.beats_controls(direction, layer) else ""
        return f"{PERCENT(max(others))}{beyond}"

    def _charts(self) -> list[Chart]:
        drawn = [self._decisions(direction) for direction in TOWARDS]
        if self.extras["effects"]:
            rows = [
                _point(row, words) for key, words in EFFECTS.items() for row in self.effect(key)
            ]
            title = "2 x 2 of every cut: effect on the share that is the tuned model's"
            drawn.append(
                _chart(title, rows, "effect", "data", dict.fromkeys(EFFECTS.values(), "other"))
            )
        if any(self.along(direction, "ttr") for direction in TOWARDS):
            drawn.append(self._generated())
        return drawn

    def _decisions(self, direction: str) -> Chart:
        metric, source = TOWARDS[direction], "the source model's activation"
        rows = [_point(row, source) for row in self.along(direction, metric)]
        roles: dict[str, Role] = {source: "tuned"}
        controls = [self.along(direction, metric, name) for name in self.activations[1:]]
        if controls:
            roles["controls (range)"] = "control"
            rows += [_range(same) for same in zip(*controls, strict=True)]
        return _chart(f"{direction}: {BROUGHT[direction]}", rows, "share", "share", roles)

    def _generated(self) -> Chart:
        rows = [_point(row, d) for d in TOWARDS for row in self.along(d, "ttr")]
        sides: dict[str, Role] = {self.base_name: "base", self.tuned_name: "tuned"}
        references = [
            Reference(name, **ends(own), role=role)
            for name, role in sides.items()
            if (own := self.unpatched(role, "ttr"))
        ]
        roles: dict[str, Role] = dict.fromkeys(TOWARDS, "other")
        chart = _chart("TTR of greedy text by patched layer", rows, "TTR", "share", roles)
        return replace(chart, references=references)

    def _cuts(self) -> Table:
        columns = [self.effect(key) for key in EFFECTS]
        rows = [
            [str(same[0]["layer"]), *(interval(row, POINTS) for row in same)]
            for same in chosen_rows(list(zip(*columns, strict=True)))
        ]
        caption = (
            "effects on the share of changed decisions that are the tuned model's; the late blocks "
            "of every cut, and so its interaction, have the head (final norm and unembedding) in "
            "them: the last cut has nothing else"
        )
        return Table(["cut at layer", *EFFECTS.values()], rows, caption)

    def _two_by_two(self) -> Table:
        found = {
            (cell["layer"], cell["cell"]): interval(cell, PERCENT)
            for cell in self.extras["two_by_two"]
            if cell["metric"] == "to_tuned"
        }
        cuts = sorted({layer for layer, _ in found})
        rows = [[str(cut), *(found[cut, cell] for cell in CELLS)] for cut in cuts]
        return Table(["cut at layer", *CELLS.values()], rows)

    def _against(self, direction: str) -> Details:
        """Source less every control with its p value, at every layer."""
        metric, controls = TOWARDS[direction], self.activations[1:]
        contrasts = {(c["activation"], c["layer"]): c for c in self.contrasts(direction, metric)}
        rows = []
        for row in self.along(direction, metric):
            found = [contrasts[name, row["layer"]] for name in controls]
            cells = [f"{interval(c, POINTS)} {p_value(c['p'])}".rstrip() for c in found]
            rows.append([place(row), *cells])
        head = ["layer", *(f"less {CONTROL_NAMES.get(name, name)}" for name in controls)]
        caption = "paired by text; p Holm-corrected over the layers"
        return Details(f"{direction}: source less each control", [Table(head, rows, caption)])


# Rows of a table in the summary; the last layers are always among them.
MAX_ROWS = 14

NOTHING_CHANGED = "Tuning changed no decision on these texts: there is nothing to bring about."
EFFECTS = {
    "incoming_residual": "incoming residual",
    "late_blocks": "late blocks and head",
    "interaction": "interaction",
}
CELLS = {
    "base": "base residual, base blocks",
    "tuned_late_blocks": "base residual, tuned blocks",
    "tuned_incoming_residual": "tuned residual, base blocks",
    "tuned": "tuned residual, tuned blocks",
}
PART_NAMES = {
    "incoming_residual": "what enters the last block",
    "last_block": "the last block",
    "head": "the head (final norm and unembedding)",
}
CONTROL_NAMES = {
    OTHER_TEXT: "that of another text",
    RANDOM_DIRECTION: "as far at random",
    ROTATED: "the change rotated",
}


def _most(parts: Mapping[str, Mapping[str, Any]]) -> str:
    first, second, _ = sorted(PARTS, key=lambda part: -parts[part]["value"])
    difference = parts[f"{first} - {second}"]
    if not difference["low"] > 0:
        return "None can be told to do most by itself."
    return (
        f"By itself {PART_NAMES[first]} does most ({interval(difference, POINTS)} more than "
        f"{PART_NAMES[second]})."
    )


def place(row: Mapping[str, Any]) -> str:
    """The layer of a row, or the norm."""
    return "norm" if row["layer"] < 0 else str(row["layer"])


def chosen_rows(rows: Sequence[Any]) -> list[Any]:
    """All rows, or some of them spread over all with the last two among them."""
    return [rows[i] for i in chosen_layers(range(len(rows)), MAX_ROWS)]


def _point(row: Mapping[str, Any], series: str) -> dict[str, Any]:
    return {"series": series, "layer": row["layer"], **ends(row)}


def _range(controls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The lowest and highest control at one layer, as a band."""
    values = [row["value"] for row in controls]
    middle = sum(values) / len(values)
    found = {
        "layer": controls[0]["layer"],
        "value": middle,
        "low": min(values),
        "high": max(values),
    }
    return {"series": "controls (range)", **found}


def _chart(
    title: str, rows: list[dict[str, Any]], y: str, scale: Scale, roles: dict[str, Role]
) -> Chart:
    last = {row["series"]: row["value"] for row in rows}
    alt = f"{title}; at the last layer " + ", ".join(f"{k} {v:.3g}" for k, v in last.items())
    return Chart(
        "lines", title, alt, rows, Axis("layer", "patched layer"), Axis("value", y, scale), roles
    )
