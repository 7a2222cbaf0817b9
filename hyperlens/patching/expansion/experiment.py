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
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...checks import check_counts, check_seed, check_types
from ...data.corpus import Corpus
from ...decoding.diversity import REPETITION_METRICS as REPETITION
from ...errors import CorpusError, PatchError
from ...hooks.loading import LoadedModel
from ...hooks.patched_generation import changing
from ...hooks.sites import Site
from ...hooks.surface import check_finite
from ...pair import Pair, open_inputs
from ...passes.streaming import PassOptions, run_pass
from ...passes.streams import StreamPair, StreamSpec
from ...probes import ParticipationRatio
from ...results.rows import ProbeResult
from ...statistics import significance
from ...statistics.moments import moments_of
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
    ITSELF,
    METHODS,
    REMOVING,
    VARIANCE_CONTROL,
    Cell,
    Frame,
    Plan,
    change_of,
    generated_cells,
    plan,
)
from .result import Evidence, ExpansionResult, jointly, judge

Row = dict[str, Any]

SINK_THRESHOLD = 10.0
# A covariance from fewer tokens than this many times the width says little of its small axes.
FEWEST_TOKENS, FEW_TOKENS = 2, 10
CONTRASTED = ("to_tuned", "to_base", "agreement_tuned", "agreement_base", "kl_tuned", "kl_base")
# Dimensions and variance are of a covariance: they have no interval.
SPREAD = ("dimension_fitted", "dimension", "variance")
# The half of the texts that directions are fitted on, and the half that decisions are read on.
FITTED, READ = 0, 1


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
    dimension, clouds = _spread(pair, corpus, is_read, options)
    fitted = clouds[FITTED]
    planned = plan(fitted["base"], fitted["tuned"], n_directions, n_random, seed)
    means = {side: fitted[side].mean for side in SIDES}
    reader = ExpansionReader(planned, means, read)
    run_pass(pair.base.hooked, pair.tuned.hooked, read, [reader], options)
    models: dict[Side, LoadedModel] = {"base": pair.base, "tuned": pair.tuned}
    last_block = Site("resid_post", pair.base.hooked.cfg.n_layers - 1)

    def patch(cell: Cell) -> tuple[LoadedModel, AbstractContextManager[None]]:
        loaded = models[cell.side]
        change = change_of(planned, cell, means[cell.side], loaded.hooked.cfg.device)
        return loaded, changing(loaded.model, last_block, change)

    repetition = patched_repetition(generation, models, generated_cells(planned), patch, progress)
    measured = Measured(planned, reader.outcomes(), fitted, clouds[READ], repetition)
    meta = inputs.metadata(
        seed=seed,
        options={
            "n_directions": None if n_directions is None else list(n_directions),
            "n_random": n_random,
            "smallest_effect": smallest_effect,
            "n_texts": len(corpus.sequences),
            "max_length": max_length,
            "n_prompts": len(generation.prompts) if generation else 0,
            "prompt_tokens": prompt_tokens,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
        },
        notes=list(_notes(fitted["base"], planned)),
    )
    extras = _extras(measured, dimension, smallest_effect) | {
        "texts": {"fitted": int((~is_read).sum()), "read": int(is_read.sum())},
        "tokens": {"fitted": fitted["base"].n, "read": clouds[READ]["base"].n},
    }
    return ExpansionResult(tuple(table_rows(measured)), extras, meta)


def _spread(
    pair: Pair, corpus: Corpus, is_read: Bool[Tensor, " text"], options: PassOptions
) -> tuple[dict[str, Estimate], dict[int, dict[Any, Cloud]]]:
    """Both models' dimension over all texts, as `compare_models` has it, and clouds of each half.

    Raises:
        CorpusError: if the first half has too few tokens for a covariance.
    """
    probe = ParticipationRatio(views=("raw",), layers=(-1,))
    halves = TextHalves(is_read)
    result = run_pass(pair.base.hooked, pair.tuned.hooked, corpus, [probe, halves], options)
    dimension = {
        row.metric: Estimate(row.value, row.low, row.high, math.nan, row.n)
        for row in result.results[probe.name].rows
        if row.metric in ("base", "tuned", "delta")
    }
    clouds = {half: {side: halves.cloud(half, side) for side in SIDES} for half in (FITTED, READ)}
    n, d = clouds[FITTED]["base"].n, pair.base.hooked.cfg.d_model
    if n < FEWEST_TOKENS * d:
        raise CorpusError(
            f"half of the texts have {n} tokens, and a covariance of {d} directions needs "
            f"{FEWEST_TOKENS * d} at least: give more or longer texts, or raise n_texts or "
            "max_length"
        )
    return dimension, clouds


def _extras(
    measured: Measured, dimension: Mapping[str, Estimate], smallest_effect: float
) -> dict[str, Any]:
    counts = measured.outcomes.models["base"].counts()
    needed, enough = (
        jointly({method: evidence_of(measured, method) for method in methods})
        for methods in (REMOVING, ADDING)
    )
    judgement = judge(
        dimension["delta"],
        dimension["base"].value,
        counts["changed"],
        needed,
        enough,
        smallest_effect,
    )
    clouds = {"fitted": measured.fitted, "read": measured.read}
    return counts | {
        "dimension": {name: estimate._asdict() for name, estimate in dimension.items()},
        "naive": {
            half: {side: participation(cloud.covariance) for side, cloud in both.items()}
            for half, both in clouds.items()
        },
        "matched": dict(measured.planned.matched),
        "evidence": {method: _as_row(one) for method, one in {**needed, **enough}.items()},
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


class TextHalves:
    """Mean and covariance of both models' last-block outputs, on each half of the texts.

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
        d = spec.d_model

        def sums(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=spec.device)

        # By half, by model.
        self._n = sums(2)
        self._total, self._outer = sums(2, 2, d), sums(2, 2, d, d)
        self._origin: dict[int, Tensor] = {}

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
            for i, stream in enumerate((pair.base, pair.tuned)):
                x = stream.vectors(last, "raw", index).to(pair.device)
                # Sums are taken about a point near the data: less cancellation; any will do.
                found = moments_of(x, self._origin.setdefault(i, x.mean(0)))
                self._total[half, i] += found.total
                self._outer[half, i] += found.outer

    def compute(self) -> ProbeResult:
        """A pass asks for rows; `cloud` has the result instead."""
        return ProbeResult(())

    def state_bytes(self, spec: StreamSpec) -> int:
        """Memory of the sums, and of the products that are added to them."""
        return 5 * 8 * spec.d_model * (spec.d_model + 1)

    def cloud(self, half: int, side: Side) -> Cloud:
        """One model's outputs on one half, on the CPU."""
        i = SIDES.index(side)
        n = int(self._n[half])
        if not n:
            raise CorpusError(
                "half of the texts have nothing but BOS and attention sinks: give more texts"
            )
        mean = (self._total[half, i] / n).cpu()
        covariance = self._outer[half, i].cpu() / n - torch.outer(mean, mean)
        return Cloud(n, mean + self._origin[i].cpu().double(), covariance)


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
        for cell, (basis, _) in self._plan.changes.items():
            grouped[cell.side, basis].append(cell)
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
                new = frame.moved(x, coordinates, self._plan.changes[cell].gain)
                check_finite(f"the {side} model ({cell.method}, {cell.condition})", new)
                yield cell, ChangedOutput(new, side, side)

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
    fitted: Mapping[Side, Cloud]
    read: Mapping[Side, Cloud]
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
    for method in METHODS:
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
    each = [measured.outcomes.patched[cell] for cell in measured.draws(method, size, control)]
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
    left = mean.estimate("to_tuned")
    room = left if method not in ADDING else _one_minus(left)
    return Evidence(_moved(measured, method, size), effects, least, room)


def _moved(measured: Measured, method: str, size: int) -> float:
    """By how much of the expansion the dimension moved, where decisions are read."""
    own, other = (participation(measured.read[side].covariance) for side in SIDES)
    if method not in ADDING:
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
    fitted, read = measured.fitted[side].covariance, measured.read[side].covariance
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
