"""What fine-tuning did to each weight matrix: how far, of what rank, and whether it rotated.

arXiv 2605.22579 (appendix A.3) ascribes rank reordering to "the rotation of singular vectors rather
than magnitude shifts". Every number stands beside that of random changes of the same singular
values, because any change rotates singular vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_choice, check_counts, check_seed, check_types, check_whole
from ..errors import ArgumentError, PairError
from ..hooks.loading import parse_device
from ..models.sources import identity
from ..models.weight_pairs import WeightPair, WeightPairs, block_of, read_weight_pairs
from ..pair import Pair
from ..render.blocks import Axis, Block, Chart, Details, Role, Table, Text, Verdict
from ..render.format import MISSING, PERCENT, count, number
from ..results.fingerprint import versions
from ..results.result import Result
from ..statistics.matrices import (
    Singular,
    best_cosines,
    effective_rank,
    random_change,
    rounding_error,
    singular,
    singular_of_product,
    stable_rank,
    subspace_angles,
)

EXAMPLES = (
    "hyperlens weights ./base ./tuned --out weights",
    "hyperlens weights ./base ./lora-adapter",
    "hyperlens weights ./base ./tuned --k 32 --n-controls 19",
)

# Metrics of a matrix that stand beside those of random changes.
CONTROLLED = ("angle", "values_share", "intruders")
ONLY_MATRICES = (
    *("rank", "effective_rank", "stable_rank", "top_share", "k", "angle_left", "angle_left_max"),
    *("angle_right", "angle_right_max", "rounding_8", "rounding_4"),
    *(f"{metric}{end}" for metric in CONTROLLED for end in ("", "_low", "_high")),
)
BITS = (8, 4)
# Rows of the table of single matrices; all of them are in the result's own table.
MOST_SHOWN = 60


@check_types
def compare_weights(
    base: Any,
    tuned: Any = None,
    *,
    k: int = 16,
    epsilon: float = 0.6,
    n_controls: int = 5,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> WeightChangesResult:
    """What did fine-tuning change in each weight matrix?

    Of every matrix: how large the change is beside the weights and beside rounding them to 8 or 4
    bits, its rank, whether the leading singular vectors rotated, and whether new ones came in
    ("intruder dimensions", arXiv 2410.21228). The same is measured of random changes with the same
    singular values. No texts are needed, folders are read one pair of tensors at a time, and of a
    plain LoRA adapter the factors.

    Args:
        base: a folder, hub id or Hugging Face model; or an open `Pair`, and then no `tuned`.
        tuned: the same, or a plain LoRA adapter.
        k: how many leading singular vectors are compared; at most half of what a matrix has.
        epsilon: a leading singular vector of the tuned matrix is an intruder where its
            absolute cosine with every one of the base's is below this.
        n_controls: random changes of each matrix.
        seed: of the random changes.
        device: where matrices are decomposed; the CPU by default.
        progress: show a progress bar.

    Returns:
        A `WeightChangesResult` with a row for every weight.

    Raises:
        HyperlensError: if a source cannot be read, is quantised or an adapter of another kind, or
            the two models have other weights.

    >>> from hyperlens.embedded import embedded_base
    >>> result = compare_weights(embedded_base(), embedded_base(), progress=False)
    >>> result.conclusions()
    ['The two models have the same weights: none of 92 differs.']
    """
    check_counts(n_controls=n_controls)
    check_whole("k", k, 1, ArgumentError)
    check_seed(seed)
    if not 0 < epsilon <= 1:
        raise ArgumentError(f"epsilon must be above 0 and at most 1, got {epsilon}")
    where = parse_device(device) or torch.device("cpu")
    if where.type == "mps":
        raise ArgumentError("MPS has no float64, which this needs: leave device out")
    pairs = _opened(base, tuned)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(n_controls)]
    settings = _Settings(k, epsilon, generators, where)
    found: list[_Measured] = []
    bar = tqdm(pairs, total=len(pairs), desc="weights", unit="tensor", disable=not progress)
    for pair in bar:
        found += [_measure(one, settings) for one in _matrices(pair)]
    meta = {
        "base": pairs.base,
        "tuned": pairs.tuned,
        "options": {"k": k, "epsilon": epsilon, "n_controls": n_controls},
        "seed": seed,
        "versions": versions(),
        "notes": pairs.notes,
    }
    extras = {
        "controls": {one.row["module"]: one.controls for one in found if one.controls},
        "intruders": [one for measured in found for one in measured.intruders],
    }
    return WeightChangesResult(tuple(one.row for one in found), extras, meta)


def _opened(base: Any, tuned: Any) -> WeightPairs:
    if isinstance(base, Pair):
        if tuned is not None:
            raise PairError("a pair holds both models: leave the second out")
        pairs = read_weight_pairs(base.base.model, base.tuned.model)
        for about, opened in ((pairs.base, base.base), (pairs.tuned, base.tuned)):
            about |= identity(opened.name, opened.kind)
        return pairs
    if tuned is None:
        raise PairError("expected two models, or one pair made with open_pair; got one model")
    return read_weight_pairs(base, tuned)


class _Settings(NamedTuple):
    """What `compare_weights` was asked for; a generator for each control."""

    k: int
    epsilon: float
    generators: Sequence[torch.Generator]
    device: torch.device


class _Measured(NamedTuple):
    """One weight: its row, controlled metrics to their values in each control, its intruders."""

    row: dict[str, Any]
    controls: dict[str, list[float]]
    intruders: list[dict[str, Any]]


def _matrices(pair: WeightPair) -> Iterator[WeightPair]:
    """A weight as matrices: every expert's for itself, kernels with one row for each output."""
    if pair.tuned is None or pair.base.ndim < 3:
        yield pair
    elif pair.base.ndim == 3 and "expert" in pair.name:
        is_same = pair.tuned is pair.base
        for i, base in enumerate(pair.base):
            yield WeightPair(f"{pair.name}[{i}]", base, base if is_same else pair.tuned[i])
    else:
        flat = pair.base.flatten(1)
        tuned = flat if pair.tuned is pair.base else pair.tuned.flatten(1)
        yield WeightPair(pair.name, flat, tuned)


def _measure(pair: WeightPair, settings: _Settings) -> _Measured:
    base = pair.base.to(settings.device).double()
    row: dict[str, Any] = {
        "module": pair.name,
        "block": block_of(pair.name),
        "kind": kind_of(pair.name),
        "rows": base.shape[0] if base.ndim else 1,
        "columns": base.shape[1] if base.ndim == 2 else 1,
        "norm": float(base.norm()),
    }
    row |= dict.fromkeys(ONLY_MATRICES, math.nan)
    if base.ndim < 2 or min(base.shape) < 2:
        tuned = base if pair.tuned is None else pair.tuned.to(base)
        return _Measured(row | _size(row["norm"], float((tuned - base).norm())), {}, [])
    row |= {f"rounding_{bits}": _ratio(rounding_error(base, bits), row["norm"]) for bits in BITS}
    change, floor = (None, 0.0) if pair.tuned is pair.base else _change(pair, base)
    if change is None or not bool(change.values.any()):
        unchanged = {name: 0.0 for name in ONLY_MATRICES if not name.startswith("rounding")}
        return _Measured(row | unchanged | _size(row["norm"], 0.0), {}, [])
    row |= _size(row["norm"], float(change.values.norm())) | _rank(change.values, floor)
    return _compared(row, base, change, settings)


def _size(norm: float, change: float) -> dict[str, float]:
    return {"change": change, "relative": _ratio(change, norm)}


def _ratio(part: float, whole: float) -> float:
    """part / whole; 0 of nothing, infinite where nothing became something."""
    if whole > 0:
        return part / whole
    return 0.0 if part == 0 else math.inf


def _change(pair: WeightPair, base: Tensor) -> tuple[Singular, float]:
    """The change decomposed, and the singular value that rounding alone can be expected to reach.

    The tuned weights were rounded to the type that they are stored in, each w by up to u |w|: such
    errors make a matrix whose largest singular value is about u ‖W‖ (1/√rows + 1/√columns) / √3.
    Merging rounds the product before the sum, too: the bound is that of 2 u, without the √3.
    """
    stored = 0.0
    if pair.factors is not None:
        change = singular_of_product(*(one.to(base) for one in pair.factors))
    elif pair.tuned is not None:
        tuned = pair.tuned.to(base)
        change = singular(tuned - base)
        unit = torch.finfo(pair.tuned.dtype).eps
        largest = max(float(base.norm()), float(tuned.norm()))
        stored = unit * largest * sum(n**-0.5 for n in base.shape)
    arithmetic = torch.finfo(torch.float64).eps * max(base.shape) * float(change.values[0])
    return change, max(stored, arithmetic)


def _rank(values: Tensor, floor: float) -> dict[str, float]:
    """Of a change: what rounding could make is left out of both ranks."""
    above = values[values > floor]
    squares = values.square()
    return {
        "rank": float(len(above)),
        "effective_rank": effective_rank(above),
        "stable_rank": stable_rank(values),
        "top_share": float(squares[0] / squares.sum()),
    }


def _compared(
    row: dict[str, Any], base: Tensor, change: Singular, settings: _Settings
) -> _Measured:
    """Singular vectors and values after the change, and after random ones."""
    before = singular(base)
    k = min(settings.k, max(1, min(base.shape) // 2))
    after = singular(base + change.matrix())
    angles = {
        side: subspace_angles(getattr(before, side)[:, :k], getattr(after, side)[:, :k])
        for side in ("left", "right")
    }
    row |= {"k": float(k)}
    for side, degrees in angles.items():
        row |= {
            f"angle_{side}": float(degrees.mean()),
            f"angle_{side}_max": float(degrees.max()),
        }
    total = row["change"] ** 2
    controls: dict[str, list[float]] = {metric: [] for metric in CONTROLLED}
    # Without what rounding made: a change of low rank is held against changes of that rank.
    of_that_rank = change.first(max(1, int(row["rank"])))
    for generator in settings.generators:
        randomly = singular(base + random_change(of_that_rank, generator))
        for metric, value in _controlled(before, randomly, k, total, settings.epsilon).items():
            controls[metric].append(value)
    row |= _controlled(before, after, k, total, settings.epsilon)
    for metric, values in controls.items():
        row |= {f"{metric}_low": min(values), f"{metric}_high": max(values)}
    intruders = list(_intruders(row["module"], before, after.first(k), settings.epsilon))
    return _Measured(row, controls, intruders)


def _controlled(
    before: Singular, after: Singular, k: int, total: float, epsilon: float
) -> dict[str, float]:
    """What is measured of the tuned matrix and of every random change."""
    sides = [
        subspace_angles(one[:, :k], other[:, :k]).mean()
        for one, other in ((before.left, after.left), (before.right, after.right))
    ]
    cosines = best_cosines(before.left, after.left[:, :k])
    moved = float((after.values - before.values).square().sum())
    return {
        "angle": float(sum(sides)) / 2,
        # At most 1: the squared distance of sorted singular values is no more than that of the
        # matrices (Mirsky 1960), and equal to it only where no singular vector rotates.
        "values_share": moved / total,
        "intruders": float((cosines < epsilon).sum()),
    }


def _intruders(
    module: str, before: Singular, after: Singular, epsilon: float
) -> Iterator[dict[str, Any]]:
    """Which leading singular vectors of the tuned matrix are new."""
    for place, cosine in enumerate(best_cosines(before.left, after.left).tolist()):
        if cosine < epsilon:
            value = float(after.values[place])
            yield {"module": module, "place": place + 1, "cosine": cosine, "singular_value": value}


def _overall(metric: str, values: Sequence[float], squares: Sequence[float]) -> float:
    """A controlled metric over several matrices.

    The mean angle, the number of intruders, or of Σ‖ΔW‖² what singular values account for.

    Args:
        metric: its name.
        values: of each matrix.
        squares: ‖ΔW‖² of each matrix.
    """
    if metric == "intruders":
        return sum(values)
    weights = squares if metric == "values_share" else [1.0] * len(values)
    weighted = sum(value * weight for value, weight in zip(values, weights, strict=True))
    return weighted / sum(weights)


def kind_of(name: str) -> str:
    """What a weight is called in every block.

    >>> kind_of("layers.3.self_attn.q_proj.weight"), kind_of("layers.0.experts.7.up_proj.weight")
    ('q_proj', 'experts.up_proj')
    """
    parts = [part for part in name.split("[")[0].split(".") if not part.isdigit()]
    if parts[-1] == "weight" and len(parts) > 1:
        parts.pop()
    inside = ["experts"] if "experts" in parts[:-1] else []
    own = parts[-2:] if parts[-1] == "bias" else parts[-1:]
    return ".".join([*inside, *own])


OUTSIDE = "outside the blocks"
RANDOM = "random changes"


class WeightChangesResult(Result):
    """A row for every weight; what is of matrices only is NaN for vectors.

    `norm` ‖W‖ (Frobenius) of the base, `change` ‖ΔW‖, `relative` their ratio, `rounding_8` and
    `rounding_4` the same ratio for rounding the base (to nearest, each output by its largest).
    Of the change: `rank` (above what rounding to the stored type could make), `effective_rank` (exp
    of the entropy of the normalised singular values), `stable_rank`, `top_share` (of ‖ΔW‖² in its
    first singular direction). Between the spans of the `k` leading singular vectors before and
    after: mean and largest principal angle, `angle_left` (output side), `angle_right`, and `angle`,
    the mean of both, in degrees. `values_share`: of ‖ΔW‖² what changed singular values account
    for; the rest is rotation. `intruders`: of the k leading left singular vectors after, those
    whose absolute cosine with every one before is below epsilon. `..._low` and `..._high`: the
    range over random changes with the same singular values.

    Extras: `controls`, of each changed matrix these metrics in every random change; `intruders`,
    each with its module, its place among the singular vectors, cosine and singular value.
    """

    name: ClassVar[str] = "weights"
    title: ClassVar[str] = "What did fine-tuning change in each weight matrix?"
    columns: ClassVar[tuple[str, ...]] = (
        *("module", "block", "kind", "rows", "columns", "norm", "change", "relative"),
        *ONLY_MATRICES,
    )

    @property
    def changed(self) -> list[Mapping[str, Any]]:
        """The rows of the matrices that differ."""
        return [row for row in self.matrices if row["change"] > 0]

    @property
    def matrices(self) -> list[Mapping[str, Any]]:
        """The rows of all matrices."""
        return [row for row in self.table if math.isfinite(row["rounding_4"])]

    def overall(
        self, metric: str, matrices: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[float, list[float]]:
        """A metric over matrices that changed, and the same of every random change.

        Args:
            metric: "angle" (mean), "intruders" (all together) or "values_share" (of Σ‖ΔW‖²).
            matrices: rows of `changed`; None for all.

        Raises:
            HyperlensError: if there is no such metric.
        """
        check_choice("metric", metric, CONTROLLED)
        rows = self.changed if matrices is None else matrices
        squares = [row["change"] ** 2 for row in rows]
        controls = [self.extras["controls"][row["module"]][metric] for row in rows]
        return (
            _overall(metric, [row[metric] for row in rows], squares),
            [_overall(metric, values, squares) for values in zip(*controls, strict=True)],
        )

    def share(self, block: int | None) -> float:
        """What a block's weights have of Σ‖ΔW‖²; None for those outside of blocks."""
        squares = {id(row): row["change"] ** 2 for row in self.table}
        total = sum(squares.values())
        inside = sum(squares[id(row)] for row in self.table if row["block"] == block)
        return inside / total if total else 0.0

    def verdicts(self) -> list[Verdict]:
        """Where the change is, how large, and whether it rotates more than random changes do."""
        if not any(row["change"] > 0 for row in self.table):
            same = f"The two models have the same weights: none of {len(self.table):,} differs."
            return [Verdict("weights", same)]
        found = [self._where(), self._how_far()]
        if self.changed:
            found += [self._rotation(), self._magnitude(), self._new()]
        caution = (
            "How far weights move says nothing of what that does: a small change may decide, and a "
            "large one may not matter. Compare predictions and text too."
        )
        return [*found, Verdict("weights", caution, caution=True)]

    @property
    def _blocks(self) -> list[int]:
        return sorted({row["block"] for row in self.table if row["block"] is not None})

    def _where(self) -> Verdict:
        places: list[int | None] = [*self._blocks, None]
        most = max(places, key=self.share)
        words = f"Weights {OUTSIDE} have" if most is None else f"Block {most} has"
        n_changed = sum(row["change"] > 0 for row in self.table)
        answer = (
            f"{n_changed:,} of {count(len(self.table), 'weight')} changed. {words} most of it, "
            f"{PERCENT(self.share(most))} of Σ‖ΔW‖²"
        )
        blocks = self._blocks
        if len(blocks) > 1:
            last = math.ceil(len(blocks) / 2)
            late = sum(map(self.share, blocks[-last:]))
            answer += f"; the last {last} of {len(blocks)} blocks have {PERCENT(late)}"
            if most is not None:
                answer += f", weights {OUTSIDE} {PERCENT(self.share(None))}"
        return Verdict("where", f"{answer}.")

    def _how_far(self) -> Verdict:
        rows = self.changed
        if not rows:
            return Verdict("how far", "No matrix changed, only vectors such as norms and biases.")
        largest = max(rows, key=lambda row: row["relative"])
        moved = " and ".join(self._less_than_rounding(bits) for bits in BITS)
        return Verdict(
            "how far",
            f"‖ΔW‖ / ‖W‖ of {len(rows):,} changed {_matrices_word(len(rows))}: median "
            f"{_relative(median(row['relative'] for row in rows))}, at most "
            f"{_relative(largest['relative'])} in {largest['module']}; {moved}.",
        )

    def _less_than_rounding(self, bits: int) -> str:
        rows = self.changed
        less = sum(row["relative"] < row[f"rounding_{bits}"] for row in rows)
        typical = _relative(median(row[f"rounding_{bits}"] for row in rows))
        number_of = f"{less:,}" if less else "none"
        return f"{number_of} moved less than rounding to {bits} bits would ({typical})"

    def _rotation(self) -> Verdict:
        value, controls = self.overall("angle")
        words = against(value, controls, degrees, "further than", "less than", "no further than")
        beyond = sum(row["angle"] > row["angle_high"] for row in self.changed)
        return Verdict(
            "rotation",
            f"Leading singular vectors rotate {words} under {self._random()}: by "
            f"{degrees(value)}, under these {_range(controls, degrees)} (further than under any in "
            f"{beyond:,} of {len(self.changed):,} {_matrices_word(len(self.changed))}).",
        )

    def _magnitude(self) -> Verdict:
        value, controls = self.overall("values_share")
        words = against(value, controls, PERCENT, "more than", "less than", "as much as")
        return Verdict(
            "magnitude",
            f"Changed singular values account for {PERCENT(value)} of Σ‖ΔW‖², {words} in "
            f"{self._random()} ({_range(controls, PERCENT)}); the rest is rotation of singular "
            "vectors, as is most of a random change.",
        )

    def _new(self) -> Verdict:
        value, controls = self.overall("intruders")
        leading = int(sum(row["k"] for row in self.changed))
        epsilon = self.meta["options"]["epsilon"]
        return Verdict(
            "intruders",
            f"{value:,.0f} of {leading:,} leading singular vectors are intruders (absolute cosine "
            f"below {epsilon:g} with every one of the base's); of {self._random()} "
            f"{_range(controls, '{:,.0f}'.format)}.",
        )

    def _random(self) -> str:
        n_controls = self.meta["options"]["n_controls"]
        return f"{count(n_controls, 'random change')} of the same singular values"

    def evidence(self) -> list[Block]:
        """By block and by kind of matrix, charts over the blocks, and single matrices."""
        options = self.meta["options"]
        if not any(row["change"] > 0 for row in self.table):
            return []
        about = Text(
            f"Principal angles between the spans of the {options['k']} leading singular vectors "
            "(fewer in small matrices) before and after, mean of both sides. Random: the range "
            f"over {count(options['n_controls'], 'change')} with the same singular values, drawn "
            "for each matrix. Ranks leave out what rounding to the stored type could make."
        )
        blocks = [(str(block), self.rows(block=block)) for block in self._blocks]
        blocks.append((OUTSIDE, self.rows(block=None)))
        kinds = dict.fromkeys(row["kind"] for row in self.matrices)
        by_kind = [(kind, [r for r in self.matrices if r["kind"] == kind]) for kind in kinds]
        return [
            about,
            self._table("block", blocks),
            *self._charts(),
            Details("by kind of matrix", [self._table("kind", by_kind)]),
            Details("single weights", self._single()),
        ]

    def _table(
        self, first: str, groups: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
    ) -> Table:
        total = sum(row["change"] ** 2 for row in self.table)
        head = [first, "of Σ‖ΔW‖²", "‖ΔW‖/‖W‖", "8 bits", "4 bits", "rotation", "random",
                "intruders", "random", "effective rank"]  # fmt: skip
        cells = [[name, *self._cells(rows, total)] for name, rows in groups if rows]
        caption = (
            "8 and 4 bits: relative error of rounding the base's matrices; rotation and effective "
            "rank: mean over changed matrices; intruders: all together"
        )
        return Table(head, cells, caption)

    def _cells(self, rows: Sequence[Mapping[str, Any]], total: float) -> list[str]:
        change = sum(row["change"] ** 2 for row in rows)
        matrices = [row for row in rows if math.isfinite(row["rounding_4"])]
        changed = [row for row in matrices if row["change"] > 0]
        cells = [
            PERCENT(change / total),
            _relative(_change_of(rows)),
            *(_relative(_rounding(matrices, bits)) for bits in BITS),
        ]
        if not changed:
            return [*cells, *[MISSING] * 5]
        angle, angles = self.overall("angle", changed)
        intruders, others = self.overall("intruders", changed)
        return [
            *cells,
            degrees(angle),
            _range(angles, degrees),
            f"{intruders:,.0f}",
            _range(others, "{:,.0f}".format),
            number(sum(row["effective_rank"] for row in changed) / len(changed)),
        ]

    def _charts(self) -> Iterator[Chart]:
        if len(self._blocks) < 2 or not self.changed:
            return
        of_block = {
            block: [row for row in self.matrices if row["block"] == block] for block in self._blocks
        }
        x = Axis("block", "block (0-based)")
        rows: list[dict[str, Any]] = [
            {"series": self.tuned_name, "block": block, "value": _change_of(found)}
            for block, found in of_block.items()
        ]
        rows += [
            {"series": f"rounding to {bits} bits", "block": block, "value": _rounding(found, bits)}
            for bits in BITS
            for block, found in of_block.items()
        ]
        title = "Size of the change beside the weights in each block"
        roles: dict[str, Role] = {f"rounding to {bits} bits": "other" for bits in BITS}
        yield Chart("lines", title, title, rows, x, Axis("value", "no unit", "zero"), roles)
        rows = [row for block, found in of_block.items() for row in self._turned(block, found)]
        title = "Rotation of the leading singular vectors in each block"
        y = Axis("value", "degrees, mean over matrices", "zero")
        yield Chart("lines", title, title, rows, x, y, {RANDOM: "control"})

    def _turned(self, block: int, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """The points of a block in the chart of rotations; none where no matrix changed."""
        changed = [row for row in rows if row["change"] > 0]
        if not changed:
            return
        value, controls = self.overall("angle", changed)
        ends = {"low": min(controls), "high": max(controls)}
        yield {"series": self.tuned_name, "block": block, "value": value}
        yield {"series": RANDOM, "block": block, "value": median(controls), **ends}

    def _single(self) -> list[Block]:
        """The matrices and the vectors that moved furthest."""
        matrices = sorted(self.changed, key=lambda row: -row["relative"])
        vectors = [
            [row["module"], _relative(row["relative"])]
            for row in self.table
            if not math.isfinite(row["rounding_4"]) and row["change"] > 0
        ]
        head = ["matrix", "‖ΔW‖/‖W‖", "rank", "effective", "stable", "first direction", "left",
                "right", "random", "intruders"]  # fmt: skip
        caption = "rotation left: of the output side; right: of the input side"
        if len(matrices) > MOST_SHOWN:
            caption += f"; {len(matrices) - MOST_SHOWN:,} more are in the result's own table"
        found: list[Block] = []
        if matrices:
            found.append(Table(head, [*map(_cells_of, matrices[:MOST_SHOWN])], caption))
        if vectors:
            found.append(Table(["vector", "‖ΔW‖/‖W‖"], vectors[:MOST_SHOWN]))
        return found


def _cells_of(row: Mapping[str, Any]) -> list[str]:
    return [
        row["module"],
        _relative(row["relative"]),
        f"{row['rank']:,.0f}",
        number(row["effective_rank"]),
        number(row["stable_rank"]),
        PERCENT(row["top_share"]),
        degrees(row["angle_left"]),
        degrees(row["angle_right"]),
        _range([row["angle_low"], row["angle_high"]], degrees),
        f"{row['intruders']:,.0f}",
    ]


def against(
    value: float,
    draws: Sequence[float],
    shown: Callable[[float], str],
    above: str,
    below: str,
    between: str,
) -> str:
    """How a value stands to those of random changes; only beyond all of them, as printed, counts.

    >>> against(3.0, [1.0, 2.0], str, "more than", "less than", "as much as")
    'more than'
    >>> against(2.04, [1.0, 2.01], "{:.1f}".format, "more than", "less than", "as much as")
    'as much as'
    """
    if shown(value) in (shown(min(draws)), shown(max(draws))):
        return between
    if value > max(draws):
        return above
    return below if value < min(draws) else between


def degrees(value: float) -> str:
    """An angle.

    >>> degrees(12.34)
    '12.3°'
    """
    return f"{value:.1f}°"


def _matrices_word(n: int) -> str:
    return "matrix" if n == 1 else "matrices"


def _relative(value: float) -> str:
    """A ratio of norms as a percentage; it may be above 100%."""
    return f"{number(100 * value)}%" if math.isfinite(value) else MISSING


def _change_of(rows: Sequence[Mapping[str, Any]]) -> float:
    """‖ΔW‖ / ‖W‖ of several weights together."""
    return _together(rows, [row["change"] for row in rows])


def _rounding(rows: Sequence[Mapping[str, Any]], bits: int) -> float:
    """What rounding several matrices changes, beside their norm."""
    return _together(rows, [row[f"rounding_{bits}"] * row["norm"] for row in rows])


def _together(rows: Sequence[Mapping[str, Any]], parts: Sequence[float]) -> float:
    norms = sum(row["norm"] ** 2 for row in rows)
    return math.sqrt(sum(part**2 for part in parts) / norms) if norms else math.nan


def _range(values: Sequence[float], write: Callable[[float], str]) -> str:
    low, high = write(min(values)), write(max(values))
    return low if low == high else f"{low} to {high}"
