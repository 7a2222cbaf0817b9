"""patch_expansion: take the expansion away, or bring it about, and see what is decided.

arXiv 2605.22579 (section 4.2) finds that the last block's outputs spread over more directions
after tuning and calls that the mechanism. Here the spread itself is changed, and nothing else: the
outputs of one model's last block about their mean, before its own final norm and unembedding.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...checks import check_counts, check_seed, check_types
from ...data.corpus import Corpus
from ...decoding.diversity import REPETITION_METRICS as REPETITION
from ...decoding.prompts import prompt_lengths
from ...errors import CorpusError, PatchError
from ...hooks.loading import LoadedModel
from ...hooks.patched_generation import changing
from ...hooks.sites import Site
from ...hooks.surface import HookedModel, check_finite, evaluating, input_device
from ...pair import Pair, open_inputs
from ...passes.streaming import PassOptions, run_pass
from ...passes.streams import StreamPair, StreamSpec
from ...probes import ParticipationRatio
from ...results.rows import ProbeResult
from ...statistics import significance
from ...statistics.moments import in_full_float32, moments_of
from ...statistics.shares import NOTHING, holm_p_values
from ...statistics.significance import Estimate
from ...statistics.spectrum import Cloud, participation
from ..engine import (
    ChangedOutput,
    Outcomes,
    OutputReader,
    Repetition,
    draw_texts,
    greedy_generation,
    patched_repetition,
    second_half,
    subset,
)
from ..outcomes import METRICS, SIDES, Outcome, Side
from .changes import (
    ADDING,
    AFFINE,
    DECIDING,
    ITSELF,
    METHODS,
    SINGLE,
    VARIANCE_CONTROL,
    Cell,
    Frame,
    Joint,
    Plan,
    change_of,
    generated_cells,
    plan,
    side_of,
)
from .result import CLAIMS, Evidence, Expansion, ExpansionResult, Single, jointly, judge

Row = dict[str, Any]

SINK_THRESHOLD = 10.0
# A covariance from fewer tokens than this many times the width says little of its small axes.
FEWEST_TOKENS, FEW_TOKENS = 2, 10
CONTRASTED = ("to_tuned", "to_base", "agreement_tuned", "agreement_base", "kl_tuned", "kl_base")
# Dimensions and variance are of a covariance: they have no interval.
SPREAD = ("dimension_fitted", "dimension", "variance")
# The half of the texts that directions are fitted on, and the half that decisions are read on.
FITTED, READ = 0, 1
AFFINE_MAP = Cell(AFFINE, 0, ITSELF, -1)


@check_types
def patch_expansion(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    n_directions: Sequence[int] | None = None,
    n_random: int = 3,
    smallest_effect: float = 0.1,
    n_texts: int = 128,
    max_length: int = 256,
    n_prompts: int = 32,
    prompt_tokens: int = 17,
    max_new_tokens: int = 96,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> ExpansionResult:
    """Remove the expansion from the tuned model, add it to the base model, and read decisions.

    Half of the texts, drawn at random, are for means, covariances and directions only (without BOS
    and attention sinks); decisions, and the dimension that is left, are read on the other half,
    with the output of every token changed. Methods and controls are those of
    `hyperlens.patching.expansion.changes`, the rules of the verdict those of
    `hyperlens.patching.expansion.result`.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; or an open `Pair`.
        texts: what `compare_models` takes.
        n_directions: how many of the base's directions are kept, and how many new ones removed;
            None for 1, 2, 4, ... up to all. The number that just undoes the expansion is always
            among them.
        n_random: random draws of every control.
        smallest_effect: of interest, as a share of the changed decisions.
        n_texts: how many texts are used, drawn at random.
        max_length: tokens per text.
        n_prompts, prompt_tokens, max_new_tokens: of the greedy generations from texts of the
            second half, under a few of the changes; 0 new tokens generates none.
        batch_size: texts, or prompts, per forward pass; does not change the result.
        seed: of all draws.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        CorpusError: if there are too few texts, or too few tokens to fit directions on.
        PatchError: if a number of directions or the smallest effect makes no sense.
        ActivationError: if a model, or a changed one, overflows.
        HyperlensError: if a source cannot be opened, or the texts do not fit the models.
    """
    check_counts(batch_size=batch_size, n_random=n_random, n_texts=n_texts)
    check_seed(seed)
    _check(n_directions, smallest_effect)
    inputs = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    inputs = draw_texts(inputs, n_texts, seed)
    pair, corpus = inputs.pair, inputs.corpus
    is_read = second_half(corpus, seed)
    read = subset(corpus, is_read)
    generation = greedy_generation(
        pair,
        read,
        n_prompts=n_prompts,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    options = PassOptions(batch_size, SINK_THRESHOLD, seed, progress)
    dimension, read_by_head, halves = _spread(pair, corpus, is_read, options)
    fitted = halves[FITTED]
    planned = plan(fitted, n_directions, n_random, seed)
    means = {side: fitted.of(side).mean for side in SIDES}
    reader = ExpansionReader(planned, means, read)
    run_pass(pair.base.hooked, pair.tuned.hooked, read, [reader], options)
    models: dict[Side, LoadedModel] = {"base": pair.base, "tuned": pair.tuned}
    last_block = Site("resid_post", pair.base.hooked.cfg.n_layers - 1)

    def patch(cell: Cell) -> tuple[LoadedModel, AbstractContextManager[None]]:
        loaded = models[cell.side]
        change = change_of(planned, cell, means[cell.side], loaded.hooked.cfg.device)
        return loaded, changing(loaded.model, last_block, change)

    repetition = patched_repetition(generation, models, generated_cells(planned), patch, progress)
    measured = Measured(planned, reader.outcomes(), fitted, halves[READ], repetition)
    meta = inputs.metadata(
        seed=seed,
        options={
            "n_directions": None if n_directions is None else list(n_directions),
            "n_random": n_random,
            "smallest_effect": smallest_effect,
            "n_texts": len(corpus.sequences),
            "max_length": max_length,
            "n_prompts": len(generation.prompts) if generation else 0,
            "prompt_tokens": prompt_lengths(
                corpus, generation.prompts if generation else (), prompt_tokens
            ),
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
        },
        notes=list(_notes(fitted.base, planned)),
    )
    extras = _extras(measured, dimension, read_by_head, smallest_effect) | {
        "texts": {"fitted": int((~is_read).sum()), "read": int(is_read.sum())},
        "tokens": {"fitted": fitted.base.n, "read": halves[READ].base.n},
    }
    return ExpansionResult(tuple(table_rows(measured)), extras, meta)


Dimensions = dict[str, Estimate]
"""Of "base" and "tuned", and their difference "delta"."""


def _spread(
    pair: Pair, corpus: Corpus, is_read: Bool[Tensor, " text"], options: PassOptions
) -> tuple[Dimensions, Dimensions, dict[int, Joint]]:
    """Dimensions over all texts, raw as `compare_models` has them and as the tuned model's head
    reads them, and both models' outputs on each half.

    Raises:
        CorpusError: if the first half has too few tokens for a covariance.
    """
    raw = ParticipationRatio(views=("raw",), layers=(-1,))
    tokens = torch.from_numpy(np.unique(np.concatenate(corpus.sequences)))
    logits = ReadByHead(head_root(pair.tuned.hooked, tokens))
    halves = TextHalves(is_read)
    result = run_pass(pair.base.hooked, pair.tuned.hooked, corpus, [raw, logits, halves], options)
    dimensions: list[Dimensions] = [
        {
            row.metric: Estimate(row.value, row.low, row.high, math.nan, row.n)
            for row in result.results[probe.name].rows
            if row.metric in ("base", "tuned", "delta")
        }
        for probe in (raw, logits)
    ]
    joint = {half: halves.outputs(half) for half in (FITTED, READ)}
    n, d = joint[FITTED].base.n, pair.base.hooked.cfg.d_model
    if n < FEWEST_TOKENS * d:
        raise CorpusError(
            f"half of the texts have {n} tokens, and a covariance of {d} directions needs "
            f"{FEWEST_TOKENS * d} at least: give more or longer texts, or raise n_texts or "
            "max_length"
        )
    return dimensions[0], dimensions[1], joint


def _extras(
    measured: Measured,
    dimension: Dimensions,
    read_by_head: Dimensions,
    smallest_effect: float,
) -> dict[str, Any]:
    counts = measured.outcomes.models["base"].counts()
    evidence = {
        claim: {method: evidence_of(measured, method) for method in methods}
        for claim, methods in CLAIMS.items()
    }
    needed, enough = (
        jointly({method: one for method, one in each.items() if method in DECIDING})
        for each in evidence.values()
    )
    judgement = judge(
        Expansion(dimension["delta"], dimension["base"].value),
        Expansion(read_by_head["delta"], read_by_head["base"].value),
        counts["changed"],
        needed,
        enough,
        [single_of(measured, k) for k in measured.planned.sizes(SINGLE)],
        smallest_effect,
    )
    shown = {**evidence["needed"], **evidence["enough"], **needed, **enough}
    outputs = {"fitted": measured.fitted, "read": measured.read}
    return counts | {
        "dimension": {name: estimate._asdict() for name, estimate in dimension.items()},
        "read_by_head": {name: estimate._asdict() for name, estimate in read_by_head.items()},
        "naive": {
            half: {side: participation(both.of(side).covariance) for side in SIDES}
            for half, both in outputs.items()
        },
        "matched": dict(measured.planned.matched),
        "evidence": {method: _as_row(one) for method, one in shown.items()},
        "verdict": asdict(judgement),
        "contrasts": list(contrasts(measured)),
        "draws": list(draws(measured)),
    }


def _as_row(one: Evidence) -> dict[str, Any]:
    return {
        "moved": one.moved,
        "effects": {name: effect._asdict() for name, effect in one.effects.items()},
        "least": dict(one.least),
        "room": one.room._asdict(),
    }


def _check(n_directions: Any, smallest_effect: Any) -> None:
    if n_directions is not None:
        if not isinstance(n_directions, list | tuple | range) or not n_directions:
            raise PatchError(
                f"expected n_directions as a list of numbers of directions, got {n_directions!r}"
            )
        check_counts(**{f"n_directions[{i}]": n for i, n in enumerate(n_directions)})
    if not 0 < smallest_effect < 1:
        raise PatchError(
            "expected the smallest effect of interest as a share between 0 and 1, got "
            f"{smallest_effect}"
        )


def _notes(fitted: Cloud, planned: Plan) -> Iterator[str]:
    d = len(fitted.mean)
    if fitted.n < FEW_TOKENS * d:
        yield (
            f"directions are fitted on {fitted.n} tokens, for {d} of them: the spectra look "
            "steeper than they are, and small directions are poorly determined"
        )
    for side, count in planned.empty.items():
        if count:
            yield (
                f"{count} of the {side} model's {d} directions have (nearly) no variance and are "
                "left as they are where its spectrum is changed"
            )
    if planned.matched["new_directions"] is None:
        yield (
            "no number of the directions that grew most brings the tuned model's dimension down "
            "to the base model's when they are removed: that method is not judged"
        )


# Readers of a streaming pass


def head_root(
    model: HookedModel, tokens: Int[Tensor, " chosen"]
) -> Float[Tensor, "d_model d_model"]:
    """R with R Rᵀ = W Wᵀ, W the unembedding of some tokens without what is common to all of them:
    x R has the spectrum of x's logits, less their mean, in d_model numbers.

    Args:
        model: whose unembedding.
        tokens: which; those that no text has would share one large direction of no consequence.
    """
    one = torch.eye(model.cfg.d_model, device=input_device(model), dtype=model.cfg.dtype)
    with evaluating(model):
        rows = model.unembed(one[:, None])[:, 0] - model.unembed(0 * one[:1, None])[:, 0]
    rows = rows[:, tokens.to(rows.device)].cpu().double()
    rows = rows - rows.mean(1, keepdim=True)
    values, axes = torch.linalg.eigh(rows @ rows.mT)
    root: Tensor = axes * values.clamp_min(0.0).sqrt()
    return root


class ReadByHead(ParticipationRatio):
    """The participation ratio of the logits that the tuned model's final norm and unembedding make
    of both streams: what is not read does not count.

    Args:
        root: of the unembedding, see `head_root`.
    """

    name = "read_by_head"

    def __init__(self, root: Float[Tensor, "d_model d_model"]) -> None:
        super().__init__(views=("final_norm",), layers=(-1,))
        self._root = root.float()

    def update(self, pair: StreamPair) -> None:
        """Add one batch."""

        def read(x: Tensor) -> Tensor:
            normed = pair.tuned.final_norm(x).float()
            with in_full_float32():
                return normed @ self._root.to(normed.device)

        base, tuned = (replace(stream, final_norm=read) for stream in (pair.base, pair.tuned))
        super().update(replace(pair, base=base, tuned=tuned))


class TextHalves:
    """Mean and covariance of both models' last-block outputs together, on each half of the texts.

    Without BOS and attention sinks, like every measure of geometry. Runs in a pass over the whole
    corpus.

    Args:
        is_read: which texts belong to the half that decisions are read on.
    """

    name = "halves"

    def __init__(self, is_read: Bool[Tensor, " text"]) -> None:
        self._half = torch.where(is_read, READ, FITTED)
        self._seen = 0

    def open(self, spec: StreamSpec) -> None:
        """Allocate."""
        both = 2 * spec.d_model

        def sums(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=spec.device)

        # By half; a token's two outputs lie end to end, the base's first.
        self._n, self._total, self._outer = sums(2), sums(2, both), sums(2, both, both)
        self._origin: Tensor | None = None

    def update(self, pair: StreamPair) -> None:
        """Add one batch, which follows the one before in the corpus's order."""
        last = pair.n_layers
        here = self._half[self._seen : self._seen + pair.n_sequences].to(pair.tokens.device)
        self._seen += pair.n_sequences
        counted = pair.mask(last, "geometry")
        for half in (FITTED, READ):
            index = (counted & (here == half)[:, None]).flatten().nonzero().squeeze(-1)
            self._n[half] += len(index)
            if not len(index):
                continue
            each = [stream.vectors(last, "raw", index) for stream in (pair.base, pair.tuned)]
            x = torch.cat([one.to(pair.device) for one in each], 1)
            # Sums are taken about a point near the data: less cancellation; any will do.
            self._origin = x.mean(0) if self._origin is None else self._origin
            found = moments_of(x, self._origin)
            self._total[half] += found.total
            self._outer[half] += found.outer

    def compute(self) -> ProbeResult:
        """A pass asks for rows; `outputs` has the result instead."""
        return ProbeResult(())

    def state_bytes(self, spec: StreamSpec) -> int:
        """Memory of the sums, and of the products that are added to them."""
        return 3 * 8 * 2 * spec.d_model * (2 * spec.d_model + 1)

    def outputs(self, half: int) -> Joint:
        """Both models' outputs on one half, on the CPU."""
        n = int(self._n[half])
        if not n or self._origin is None:
            raise CorpusError(
                "half of the texts have nothing but BOS and attention sinks: give more texts"
            )
        mean = (self._total[half] / n).cpu()
        covariance = self._outer[half].cpu() / n - torch.outer(mean, mean)
        mean = mean + self._origin.cpu().double()
        d = len(mean) // 2
        base, tuned = slice(d), slice(d, None)
        return Joint(
            Cloud(n, mean[base], covariance[base, base]),
            Cloud(n, mean[tuned], covariance[tuned, tuned]),
            covariance[base, tuned],
        )


class ExpansionReader(OutputReader[Cell]):
    """Every change on every decision of the texts of a pass.

    Args:
        planned: the changes.
        means: of the last-block outputs of both models, where the changes are fitted.
        corpus: the texts that the pass reads.
    """

    name = "expansion"

    def __init__(
        self, planned: Plan, means: Mapping[Side, Float[Tensor, " d_model"]], corpus: Corpus
    ) -> None:
        super().__init__(corpus)
        self._plan = planned
        self._means = means

    def open(self, spec: StreamSpec) -> None:
        """Group the changes by model and basis, and start to count."""
        super().open(spec)
        grouped: dict[tuple[Side, str], list[Cell]] = defaultdict(list)
        for cell, along in self._plan.changes.items():
            grouped[cell.side, along.basis].append(cell)
        self._grouped = dict(grouped)
        self._frames: dict[tuple[Side, str], Frame] = {}

    def changes(
        self, residuals: Mapping[Side, Float[Tensor, "n d_model"]]
    ) -> Iterator[tuple[Cell, ChangedOutput]]:
        """Every planned change; `ActivationError` if one overflows."""
        for (side, basis), cells in self._grouped.items():
            x = residuals[side]
            frame = self._frame(side, basis, x.device)
            coordinates = frame.coordinates(x)
            for cell in cells:
                _, gain, into = self._plan.changes[cell]
                if into is None:
                    new = frame.moved(x, coordinates, gain)
                else:
                    difference = frame.coordinates(residuals["tuned"]) - coordinates
                    new = self._frame(side, into, x.device).added(x, difference, gain)
                yield cell, self._checked(cell, new)
        yield AFFINE_MAP, self._checked(AFFINE_MAP, self._predicted(residuals["base"]))

    def _checked(self, cell: Cell, new: Tensor) -> ChangedOutput:
        check_finite(f"the {cell.side} model ({cell.method}, {cell.condition})", new)
        return ChangedOutput(new, cell.side, cell.side)

    def _predicted(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """The best affine prediction of the tuned model's outputs from the base's."""
        base, tuned, matrix = (
            one.float().to(x.device)
            for one in (self._means["base"], self._means["tuned"], self._plan.affine)
        )
        with in_full_float32():
            return (tuned + (x.float() - base) @ matrix.mT).to(x.dtype)

    def _frame(self, side: Side, basis: str, device: torch.device) -> Frame:
        if (side, basis) not in self._frames:
            frame = Frame(self._means[side], self._plan.bases[basis], device)
            self._frames[side, basis] = frame
        return self._frames[side, basis]

    def state_bytes(self, spec: StreamSpec) -> int:
        """Memory of the bases, and of comparing some rows of logits."""
        return 4 * len(self._plan.bases) * spec.d_model**2 + super().state_bytes(spec)


# Rows of the result


@dataclass(frozen=True)
class Measured:
    """All that was measured.

    Attributes:
        planned: the changes.
        outcomes: of each cell, and of both models as they are.
        fitted, read: both models' outputs on the half that directions are fitted on, and on the
            half that decisions are read on.
        repetition: of greedy text, per prompt, of some cells and of both models.
    """

    planned: Plan
    outcomes: Outcomes[Cell]
    fitted: Joint
    read: Joint
    repetition: Mapping[Cell | Side, Repetition]

    def conditions(self, method: str, size: int) -> list[str]:
        """The method itself, then its controls."""
        cells = self.planned.changes
        return list(
            dict.fromkeys(
                c.condition for c in cells if (c.method, c.n_directions) == (method, size)
            )
        )

    def draws(self, method: str, size: int, condition: str) -> list[Cell]:
        """All random draws of a condition; one cell for the method itself."""
        wanted = (method, size, condition)
        return [cell for cell in self.planned.changes if cell[:3] == wanted]

    def outcome(self, method: str, size: int, condition: str) -> Outcome:
        """The mean over the draws of a condition."""
        each = [self.outcomes.patched[cell] for cell in self.draws(method, size, condition)]
        sums = {
            metric: torch.stack([one.sums[metric] for one in each]).mean(0)
            for metric in each[0].sums
        }
        return Outcome(sums, each[0].decisions, each[0].changed)

    @cached_property
    def spread(self) -> dict[Cell, dict[str, float]]:
        """What each change leaves, on both halves; the variance is that of the first."""
        fitted, read = self.planned.spread(self.fitted), self.planned.spread(self.read)
        return {
            cell: dict(
                zip(SPREAD, (fitted[cell].dimension, read[cell].dimension, fitted[cell].variance),
                    strict=True)
            )
            for cell in self.planned.changes
        }  # fmt: skip

    def dimension(self, cell: Cell) -> float:
        """The participation ratio that a change leaves on the half that decisions are read on."""
        return self.spread[cell]["dimension"]


def table_rows(measured: Measured) -> Iterator[Row]:
    """The table: both models as they are, then every method, number of directions and condition."""
    for side in SIDES:
        outcome = measured.outcomes.models[side]
        yield from (_row("none", 0, side, m, outcome.estimate(m)) for m in METRICS)
        yield from _spread_rows("none", 0, side, _spread_of(measured, side))
        yield from _repetition_rows("none", 0, side, measured.repetition.get(side))
    yield from (
        _row(AFFINE, 0, ITSELF, m, measured.outcomes.patched[AFFINE_MAP].estimate(m))
        for m in METRICS
    )
    for method in (*METHODS, SINGLE):
        for size in measured.planned.sizes(method):
            for condition in measured.conditions(method, size):
                outcome = measured.outcome(method, size, condition)
                yield from (_row(method, size, condition, m, outcome.estimate(m)) for m in METRICS)
                cells = measured.draws(method, size, condition)
                each = [measured.spread[cell] for cell in cells]
                yield from _spread_rows(method, size, condition, _mean(each))
                yield from _repetition_rows(
                    method, size, condition, measured.repetition.get(cells[0])
                )


def contrasts(measured: Measured) -> Iterator[Row]:
    """Every method less its controls, paired by text; p corrected over the sizes (Holm).

    Generated text: less the control, and less the model as it is, paired by prompt.
    """
    for method in METHODS:
        sizes = measured.planned.sizes(method)
        if method == "tuned_coordinates":
            # All coordinates at once are the tuned model's output, which has no control.
            sizes = sizes[:1]
        for against in measured.conditions(method, sizes[0])[1:] if sizes else ():
            for metric in CONTRASTED:
                each = [
                    measured.outcome(method, size, ITSELF).difference(
                        measured.outcome(method, size, against), metric
                    )
                    for size in sizes
                ]
                yield from _corrected(method, sizes, against, metric, each)
        yield from _repetition_contrasts(measured, method)


def draws(measured: Measured) -> Iterator[Row]:
    """Every random draw of every control, without intervals."""
    for cell in measured.planned.changes:
        if cell.condition != ITSELF:
            outcome = measured.outcomes.patched[cell]
            yield cell._asdict() | {
                "to_tuned": outcome.estimate("to_tuned").value,
                "to_base": outcome.estimate("to_base").value,
                "dimension": measured.dimension(cell),
            }


def evidence_of(measured: Measured, method: str) -> Evidence:
    """What a method did beyond its control, at the size that is judged."""
    size = measured.planned.judged(method)
    if size is None:
        return Evidence(math.nan, {}, {}, NOTHING)
    control = VARIANCE_CONTROL[method]
    itself = measured.outcome(method, size, ITSELF)
    mean = measured.outcome(method, size, control)
    conditions = {control, "rotated"} & set(measured.conditions(method, size))
    each = [
        measured.outcomes.patched[cell]
        for condition in conditions
        for cell in measured.draws(method, size, condition)
    ]
    signs = {"brought": ("to_tuned", 1.0)} if method in ADDING else {
        "lost": ("to_tuned", -1.0),
        "returned": ("to_base", 1.0),
    }  # fmt: skip
    effects = {
        name: _times(sign, itself.difference(mean, metric))
        for name, (metric, sign) in signs.items()
    }
    least = {
        name: min(sign * itself.difference(one, metric).value for one in each)
        for name, (metric, sign) in signs.items()
    }
    room = mean.estimate("to_tuned")
    shares = {name: itself.estimate(metric) for name, (metric, _) in signs.items()}
    if method in ADDING:
        room = _ceiling(measured, method).difference(mean, "to_tuned")
        shares = shares if method == "tuned_coordinates" else {}
    if "lost" in shares:
        shares["lost"] = _one_minus(shares["lost"])
    return Evidence(_moved(measured, method, size), effects, least, room, shares)


def _ceiling(measured: Measured, method: str) -> Outcome:
    """The most that changes of a kind can bring: the best affine map, or all coordinates."""
    if method != "tuned_coordinates":
        return measured.outcomes.patched[AFFINE_MAP]
    return measured.outcome(method, measured.planned.sizes(method)[-1], ITSELF)


def single_of(measured: Measured, k: int) -> Single:
    """What setting one direction back to the base's variance does."""
    returned = measured.outcome(SINGLE, k, ITSELF).estimate("to_base")
    return Single(k, _moved(measured, SINGLE, k), returned)


def _moved(measured: Measured, method: str, size: int) -> float:
    """By how much of the expansion the dimension moved, where decisions are read."""
    own, other = (participation(measured.read.of(side).covariance) for side in SIDES)
    if side_of(method) == "tuned":
        own, other = other, own
    (cell,) = measured.draws(method, size, ITSELF)
    return (measured.dimension(cell) - own) / (other - own) if other != own else math.nan


def _times(sign: float, x: Estimate) -> Estimate:
    return x if sign > 0 else x._replace(value=-x.value, low=-x.high, high=-x.low)


def _one_minus(x: Estimate) -> Estimate:
    return x._replace(value=1 - x.value, low=1 - x.high, high=1 - x.low)


def _row(method: str, size: int, condition: str, metric: str, estimate: Estimate) -> Row:
    return {
        "method": method,
        "n_directions": size,
        "condition": condition,
        "metric": metric,
    } | estimate._asdict()


def _spread_rows(
    method: str, size: int, condition: str, values: Mapping[str, float]
) -> Iterator[Row]:
    for metric, value in values.items():
        none = math.nan
        yield _row(method, size, condition, metric, Estimate(value, none, none, none, 0))


def _spread_of(measured: Measured, side: Side) -> dict[str, float]:
    fitted, read = (half.of(side).covariance for half in (measured.fitted, measured.read))
    return dict(zip(SPREAD, (participation(fitted), participation(read), 1.0), strict=True))


def _mean(each: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in each) / len(each) for name in each[0]}


def _repetition_rows(
    method: str, size: int, condition: str, metrics: Repetition | None
) -> Iterator[Row]:
    for metric, values in (metrics or {}).items():
        yield _row(method, size, condition, metric, significance.estimate(values))


def _repetition_contrasts(measured: Measured, method: str) -> Iterator[Row]:
    control = VARIANCE_CONTROL[method]
    those = [
        cell for cell in measured.repetition if isinstance(cell, Cell) and cell.method == method
    ]
    sizes = sorted({cell.n_directions for cell in those})
    for against in (control, "unchanged") if sizes else ():
        for metric in REPETITION:
            each = []
            for size in sizes:
                other: Cell | Side = Cell(method, size, control, 0)
                if against == "unchanged":
                    other = Cell(method, size, control, 0).side
                own = measured.repetition[Cell(method, size, ITSELF, -1)][metric]
                each.append(significance.difference(own, measured.repetition[other][metric]))
            yield from _corrected(method, sizes, against, metric, each)


def _corrected(
    method: str, sizes: list[int], against: str, metric: str, each: list[Estimate]
) -> Iterator[Row]:
    for size, one, p in zip(sizes, each, holm_p_values(each), strict=True):
        row = {"method": method, "n_directions": size, "against": against, "metric": metric}
        yield row | one._asdict() | {"p": p}
