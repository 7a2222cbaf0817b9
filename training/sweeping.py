"""How many late blocks are needed? Late-stage LoRA on the last k blocks, for each k, rank and seed.

arXiv 2605.22579 trains the last 5 blocks (4 in some captions) and stops there. Here every k gets
the same texts, the same recipe and several seeds, and what each of them gains is set beside what
the largest k gains.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from .. import processes
from ..checks import check_seed, check_types
from ..errors import HyperlensError, TrainingError
from ..files import expand_user
from ..hooks.surface import evaluating
from ..models.kinds import plain_model
from ..models.structure import find_structure
from ..models.weight_sharing import weight_sharing_copy
from ..render.blocks import Axis, Block, Chart, Details, Grid, Reference, Role, Table, Text, Verdict
from ..render.format import (
    DIMENSIONS,
    DISTANCE,
    FRACTION,
    MISSING,
    PERCENT,
    SIGNED_FRACTION,
    Form,
    count,
    ends,
    interval,
    one_line,
)
from ..render.page import write_report
from ..results.fingerprint import versions
from ..results.result import Result
from ..results.resume import WorkFolder
from ..statistics import significance
from ..statistics.moments import moments_of
from ..statistics.ratios import SampledTokens, linearised
from .adapters import find_block_list
from .data import TrainingData
from .history import read_run
from .hyperfitting import (
    Prepared,
    check_can_keep,
    chosen_recipe,
    identity_of,
    prepare,
    run_to_json,
    train_and_save,
)
from .locks import locked
from .prefix import SharedPrefixes
from .recipes import Recipe, changed
from .token_loss import last_position_only

if TYPE_CHECKING:
    from .fitting import RunOptions

STAMP = "sweep-folder.json"
LOCK = "lock.json"
# A k is enough if it gains at least this share of what the largest k gains.
SHARE = 0.9
# Fields of a recipe that a sweep sets itself, and what to give instead.
SWEPT = {"last_k": "last_k", "lora_r": "ranks", "seed": "seeds"}


class Cell(NamedTuple):
    """One run of a sweep.

    Attributes:
        last_k: how many of the last blocks are trained.
        rank: of the adapter.
        seed: of the order of sequences and of the adapter's initial values.
    """

    last_k: int
    rank: int
    seed: int

    def __str__(self) -> str:
        return f"last_k {self.last_k}, rank {self.rank}, seed {self.seed}"


@check_types
def sweep(
    base: Any,
    texts: Any,
    *,
    last_k: Sequence[int] | None = None,
    ranks: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    recipe: str | Path | Recipe | None = None,
    validation: Any = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    checkpoint_minutes: float = 10.0,
    progress: bool = True,
    **overrides: Any,
) -> SweepResult:
    """How many late blocks are needed? Late-stage LoRA for each k, rank and seed.

    Every cell (k, rank, seed) is a run of `hyperfit` with "late_lora" on the same sequences, and is
    measured on the same held-out ones. The base is opened once and texts are tokenised once. Cells
    of one k share the prefix cache, and a smaller k continues from the cache of the larger one, so
    that each frozen block is run once for the whole sweep.

    With `out`, every cell is a folder of its own in `out/cells`, which opens as any adapter. Killed
    at any moment, the same call goes on within the cell that was interrupted. Cells are found again
    by everything that decides them: with more `seeds`, or other `last_k`, only new cells are
    trained.

    Args:
        base: what `hyperfit` takes.
        texts: what `hyperfit` takes. A random selection is that of the recipe's own seed.
        last_k: how many of the last blocks to train; None for 1 up to all of them.
        ranks: of the adapter; None for the recipe's. The scale alpha / r is the recipe's at every
            rank.
        seeds: of training. Intervals are over them: one seed has none.
        recipe: name of a preset, a `Recipe`, or the folder of a run; None for "li2026".
        validation: held-out texts; None takes those that follow the training sequences.
        out: a new folder, or that of an earlier sweep; None keeps nothing.
        device, dtype: as in `hyperfit`.
        checkpoint_minutes: between two checkpoints of a cell.
        progress: show a bar over the cells on a terminal, a line for each elsewhere.
        overrides: other values for fields of `Recipe`, such as `epochs=20`.

    Returns:
        A `SweepResult`: loss, diversity, agreement and dimension against k, and how many blocks
        are enough by a stated rule. With `out` it is saved there, too.

    Raises:
        HyperlensError: as `hyperfit` does, naming the cell; or if a k is larger than the model, or
            a value is given twice.

    Example::

        result = sweep("base", "tales.txt", recipe="demo", seeds=range(5), out="sweep")
    """
    start = _start(recipe, overrides)
    check_can_keep(start, out)
    _check_seeds(seeds)
    if processes.count() > 1:
        raise TrainingError("a sweep runs in one process: start it without torchrun or accelerate")
    folder = None if out is None else expand_user(out)
    work = None if folder is None else _work_folder(folder)
    if work is not None:
        work.check()
    prepared = prepare(base, texts, start, validation, device=device, dtype=dtype)
    model, _, data, manifest, adapter = prepared
    if adapter is not None:
        raise TrainingError(
            f"{adapter.name} is an adapter, and each run of a sweep begins anew: give its base, or "
            "merge it first (hyperlens merge)"
        )
    _check_held_out(data, start)
    n_blocks = len(find_block_list(model).blocks)
    cells = _cells(
        _values("last_k", last_k, range(1, n_blocks + 1)),
        _values("ranks", ranks, [start.lora_r]),
        _values("seeds", seeds, []),
    )
    recipes = {cell: _recipe_of(cell, start, n_blocks) for cell in cells}
    from .fitting import RunOptions

    options = RunOptions(checkpoint_minutes, (), False, True, (), SharedPrefixes())
    with ExitStack() as held:
        if work is not None and folder is not None:
            work.claim()
            held.enter_context(locked(folder / LOCK))
        run = _Sweep(prepared, options, folder)
        done = _all_done(run, recipes, progress)
        result = _result(done, n_blocks, start, manifest)
        if folder is not None:
            # What `save` writes, into the folder with the cells.
            result.write_texts(folder)
            write_report(folder / "report.html", [result])
    return result


def _start(recipe: str | Path | Recipe | None, overrides: dict[str, Any]) -> Recipe:
    """The recipe that all cells share."""
    for name in ("method", "blocks", *SWEPT):
        if name in overrides:
            instead = SWEPT.get(name, "last_k")
            raise TrainingError(f"a sweep sets {name} itself: give {instead} instead")
    start = chosen_recipe(recipe, "late_lora", overrides)
    if "record_every" not in overrides:
        # Before the first epoch and after the last.
        return replace(start, record_every=start.epochs)
    if not start.record_every:
        raise TrainingError("a sweep needs the record of each run: leave record_every out")
    return start


def _check_seeds(seeds: Sequence[int]) -> None:
    if not len(seeds):
        raise TrainingError("a sweep needs at least one seed: give seeds, such as 0,1,2")
    for seed in seeds:
        check_seed(seed)


def _check_held_out(data: TrainingData, recipe: Recipe) -> None:
    # Two texts are the fewest that have pairs of tokens of different texts.
    if len(data.held_out) < 2:
        raise TrainingError(
            f"a sweep is measured on held-out sequences, and {len(data.held_out)} are left: give "
            f"validation texts or more text, or lower n_sequences (now {recipe.n_sequences})"
        )


def _work_folder(folder: Path) -> WorkFolder:
    return WorkFolder(folder, STAMP, {"hyperlens": "sweep"}, "a sweep")


def _values(name: str, given: Sequence[int] | None, otherwise: Sequence[int]) -> list[int]:
    """Whole numbers, ascending; none may be there twice."""
    values = sorted(otherwise if given is None else given)
    if not values:
        raise TrainingError(f"{name} is empty: give at least one, or leave it out")
    twice = next((a for a, b in pairwise(values) if a == b), None)
    if twice is not None:
        raise TrainingError(f"{name} has {twice} twice: give each once")
    return values


def _cells(last_k: Sequence[int], ranks: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
    """All cells, the largest k first: each frozen prefix continues the one before."""
    return [Cell(k, rank, seed) for k in reversed(last_k) for rank in ranks for seed in seeds]


def _recipe_of(cell: Cell, start: Recipe, n_blocks: int) -> Recipe:
    if cell.last_k > n_blocks:
        raise TrainingError(
            f"last_k is {cell.last_k} but the model has {n_blocks} blocks: choose 1 to {n_blocks}"
        )
    recipe = changed(start, last_k=cell.last_k, lora_r=cell.rank, seed=cell.seed)
    return replace(recipe, lora_alpha=start.lora_alpha / start.lora_r * cell.rank)


@dataclass
class _Sweep:
    """What all cells share.

    Attributes:
        prepared: the base, which no cell changes, and what is trained and measured on.
        options: how runs are carried out, with the prefixes that they share.
        folder: of the sweep; None keeps nothing.
    """

    prepared: Prepared
    options: RunOptions
    folder: Path | None
    of_base: float | None = None

    def folder_of(self, cell: Cell, recipe: Recipe) -> Path | None:
        """Where a cell is or will be."""
        if self.folder is None:
            return None
        identity = json.dumps(identity_of(recipe, self.prepared.manifest), sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        name = f"k{cell.last_k}-rank{cell.rank}-seed{cell.seed}-{digest}"
        return self.folder / "cells" / name

    def record(self, cell: Cell, recipe: Recipe) -> dict[str, Any]:
        """What hyperfit.json says of a cell, which is trained first if it is not there."""
        folder = self.folder_of(cell, recipe)
        if folder is not None and folder.is_dir():
            return _saved(folder)
        run = train_and_save(
            # Frozen weights are shared with the base, everything else is the cell's own.
            self.prepared._replace(trainee=weight_sharing_copy(self.prepared.trainee)),
            recipe,
            folder,
            self.options,
            lambda tuned: self._measure(tuned, recipe.batch_size),
        )
        return run_to_json(run)

    def _measure(self, tuned: Any, rows: int) -> dict[str, Any]:
        """Effective dimension of the base and of a trained model, after the final norm."""
        data = self.prepared.data
        held_out, lengths = data.held_out, data.held_out_lengths
        if self.of_base is None:
            self.of_base = dimension(final_states(self.prepared.trainee, held_out, rows), lengths)
        states = final_states(tuned, held_out, rows)
        found = {"base": self.of_base, "tuned": dimension(states, lengths)}
        # JSON has no NaN.
        known = {side: x if math.isfinite(x) else None for side, x in found.items()}
        return {"participation_ratio": known}


def _saved(folder: Path) -> dict[str, Any]:
    """What hyperfit.json says of a finished cell."""
    saved = read_run(folder)
    if "participation_ratio" not in saved.get("manifest", {}):
        raise TrainingError(
            f"{folder} is not a finished cell of a sweep: remove it, and the cell is trained again"
        )
    return saved


def _all_done(
    run: _Sweep, recipes: Mapping[Cell, Recipe], progress: bool
) -> dict[Cell, dict[str, Any]]:
    """The record of every cell."""
    done: dict[Cell, dict[str, Any]] = {}
    is_terminal = sys.stderr.isatty()
    bar = tqdm(recipes.items(), desc="sweep", unit="run", disable=not (progress and is_terminal))
    for cell, recipe in bar:
        bar.set_postfix_str(str(cell))
        try:
            done[cell] = run.record(cell, recipe)
        except HyperlensError as error:
            raise type(error)(f"{cell}: {error}") from error
        if progress and not is_terminal:
            sys.stderr.write(f"sweep: {len(done)}/{len(recipes)}, {cell}\n")
            sys.stderr.flush()
    return done


def final_states(
    model: Any, tokens: Int[Tensor, "text pos"], rows: int
) -> Float[Tensor, "text rest d_model"]:
    """The final-normed states of all tokens but the first of each text, on the CPU.

    The first is BOS or, where there is none, what attention sinks into: it is unlike all others.

    Args:
        model: a plain model or PeftModel.
        tokens: ids without padding.
        rows: texts per forward pass.
    """
    plain = plain_model(model)
    device = plain.get_input_embeddings().weight.device
    found = []
    with torch.no_grad(), evaluating(model), last_position_only(find_structure(plain).head) as seen:
        for batch in torch.split(tokens, rows):
            plain(input_ids=batch.to(device), use_cache=False)
            found.append(seen[0][:, 1:].cpu())
    return torch.cat(found)


def dimension(
    states: Float[Tensor, "text pos d_model"], lengths: Int[Tensor, " text"] | None = None
) -> float:
    """The participation ratio of some texts' tokens, from pairs of tokens of different texts.

    The number that `compare_models` gives for the same tokens.

    Args:
        states: what `final_states` returns.
        lengths: tokens of each text without padding, its first one included; None without any.
    """
    n, pos, _ = states.shape
    rest = torch.full((n,), pos) if lengths is None else lengths - 1
    valid = torch.arange(pos) < rest[:, None]
    x = states.double()
    origin = x[valid].mean(0)
    length = rest.double()
    sample = SampledTokens(x - origin, valid, length, float(length.square().sum()))
    return linearised(moments_of(x[valid], origin), sample)[0]


# From the records of cells to the result

# Metric, what it is called, how it is written, and the scale of its axis.
METRICS: tuple[tuple[str, str, Form], ...] = (
    ("ttr", "TTR", FRACTION),
    ("rep_2", "repeated bigrams", FRACTION),
    ("top1_agreement", "base's top-1", PERCENT),
    ("delta_pr", "Δ dimension", DIMENSIONS),
    ("train_loss", "training loss, nats", DISTANCE),
    ("validation_loss", "held-out loss, nats", DISTANCE),
)
# What the base is in the table: none of its blocks is trained.
BASE_K = 0


def _numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one cell, of the weights that it kept."""
    about = record["manifest"]
    kept = about["kept_epoch"]
    at = next(one for one in record["records"] if one["epoch"] == kept)
    sizes = about["participation_ratio"]
    known = sizes["base"] is not None and sizes["tuned"] is not None
    return {
        "ttr": at["ttr"],
        "rep_2": at["bigram_repetition"],
        "top1_agreement": at["rank_1"],
        "delta_pr": sizes["tuned"] - sizes["base"] if known else math.nan,
        "train_loss": record["history"][kept - 1],
        "validation_loss": float(at["validation_loss"]),
    }


def _base_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    at = record["records"][0]
    return {
        "ttr": at["ttr"],
        "rep_2": at["bigram_repetition"],
        "top1_agreement": 1.0,
        "delta_pr": 0.0,
        "train_loss": math.nan,
        "validation_loss": float(at["validation_loss"]),
    }


def _result(
    done: Mapping[Cell, Mapping[str, Any]],
    n_blocks: int,
    recipe: Recipe,
    manifest: Mapping[str, Any],
) -> SweepResult:
    first = next(iter(done.values()))
    base = _base_numbers(first)
    cells = [
        {**cell._asdict(), **_numbers_of(record), "seconds": record["manifest"]["seconds"]}
        for cell, record in sorted(done.items())
    ]
    ranks = sorted({cell.rank for cell in done})
    table = [
        {"last_k": BASE_K, "rank": BASE_K, "metric": metric, "value": base[metric],
         "low": math.nan, "high": math.nan, "se": math.nan, "n": 1}
        for metric, _, _ in METRICS
    ]  # fmt: skip
    table += [
        {"last_k": k, "rank": rank, "metric": metric}
        | significance.estimate(
            [cell[metric] for cell in cells if (cell["last_k"], cell["rank"]) == (k, rank)]
        )._asdict()
        for rank in ranks
        for k in sorted({cell.last_k for cell in done})
        for metric, _, _ in METRICS
    ]
    notes = dict.fromkeys(note for record in done.values() for note in record["manifest"]["notes"])
    about = dict(manifest["base"])
    meta = {
        "title": f"late blocks of {one_line(Path(about['name']).name)}",
        "base": about,
        "corpus": dict(manifest["data"]),
        "options": {"recipe": recipe.to_json(), "share": SHARE},
        "seed": sorted({cell.seed for cell in done}),
        "n_blocks": n_blocks,
        "versions": versions(),
        "notes": list(notes),
    }
    return SweepResult(tuple(table), {"cells": cells}, meta)


class Needed(NamedTuple):
    """How many late blocks are enough.

    Attributes:
        k: the smallest that surely reaches the share; None if that cannot be told.
        too_few: those that surely fall short.
        open: those of which neither is sure.
        margin: of every k but the largest, its gain less the share of the largest k's.
        why: why it cannot be told; empty otherwise.
    """

    k: int | None
    too_few: list[int]
    open: list[int]
    margin: dict[int, significance.Estimate]
    why: str = ""


def needed(gains: Mapping[int, Sequence[float]]) -> Needed:
    """The smallest k whose gain reaches 90% of the largest k's, by intervals over seeds.

    Of each k the 95% interval of gain(k) - 0.9 gain(largest), paired by seed: one that is not
    below 0 reaches it, one that is below 0 falls short.

    Args:
        gains: k to the gain of each seed, in the same order for every k.

    >>> found = needed({1: [0.1, 0.12, 0.11], 2: [0.29, 0.31, 0.3], 3: [0.3, 0.32, 0.31]})
    >>> found.k, found.too_few, found.open
    (2, [1], [])
    """
    largest = max(gains)
    whole = [SHARE * gain for gain in gains[largest]]
    margin = {k: significance.difference(gains[k], whole) for k in sorted(gains) if k < largest}
    reach = [k for k, one in margin.items() if one.low >= 0]
    too_few = [k for k, one in margin.items() if one.high < 0]
    left = [k for k in margin if k not in (*reach, *too_few)]
    own = significance.estimate(gains[largest])
    if not margin:
        why = "only one k was trained"
    elif own.n < 2:
        why = "one seed has no interval"
    elif not own.low > 0:
        why = f"the gain of the largest, k = {largest}, is not surely above 0 itself"
    elif not reach and left:
        why = f"no smaller k surely reaches {SHARE:.0%} of what the largest, k = {largest}, gains"
    else:
        return Needed(min([*reach, largest]), too_few, left, margin)
    return Needed(None, too_few, left, margin, why)


class SweepResult(Result):
    """Late-stage LoRA against how many of the last blocks are trained.

    A row per `last_k`, `rank` and metric: the mean over seeds, its 95% t interval and standard
    error. The row of `last_k` 0 is the base. Greedy text of held-out prompts: `ttr`, `rep_2`
    (repeated bigrams). Held-out text: `validation_loss`, `top1_agreement` with the base,
    `delta_pr`, the change of the participation ratio after the final norm (first tokens left out).
    `train_loss` is that of the last epoch. Losses are in nats per token.

    Extras: `cells`, the same of every run, with its seconds of training.
    """

    name: ClassVar[str] = "sweep"
    title: ClassVar[str] = "How many late blocks are needed?"
    columns: ClassVar[tuple[str, ...]] = (
        *("last_k", "rank", "metric", "value", "low", "high", "se", "n"),
    )

    @property
    def ranks(self) -> list[int]:
        """The ranks of the adapters, ascending."""
        return sorted({cell["rank"] for cell in self.extras["cells"]})

    @property
    def last_k(self) -> list[int]:
        """How many of the last blocks were trained, ascending."""
        return sorted({cell["last_k"] for cell in self.extras["cells"]})

    def needed(self, rank: int) -> Needed:
        """How many blocks are enough at a rank: see `hyperlens.training.sweeping.needed`."""
        base = self.value(last_k=BASE_K, metric="ttr")
        gains: dict[int, list[float]] = {}
        for cell in self.extras["cells"]:  # in the order of k, rank and seed
            if cell["rank"] == rank:
                gains.setdefault(cell["last_k"], []).append(cell["ttr"] - base)
        return needed(gains)

    def verdicts(self) -> list[Verdict]:
        """How many late blocks are enough, at each rank."""
        found = [Verdict("late blocks", self._verdict(rank)) for rank in self.ranks]
        caution = (
            "Intervals are over seeds of training, each k at 95% by itself: of other texts, "
            "prompts and models they say nothing. Diversity is not quality."
        )
        return [*found, Verdict("scope", caution, caution=True)]

    def _verdict(self, rank: int) -> str:
        found, largest = self.needed(rank), max(self.last_k)
        at = f"Rank {rank}: " if len(self.ranks) > 1 else ""
        rest = "".join(
            f" {words}: {_spans(values)}."
            for words, values in (("Surely too few", found.too_few), ("Undecided", found.open))
            if values and found.margin and self._n_seeds > 1
        )
        if found.k is None:
            return f"{at}Cannot tell how many late blocks are needed: {found.why}.{rest}"
        if found.k == largest:
            return (
                f"{at}All of the last {count(largest, 'block')} are needed: every smaller k surely "
                f"falls short of {SHARE:.0%} of their gain in TTR.{rest}"
            )
        margin = interval(found.margin[found.k]._asdict(), SIGNED_FRACTION)
        return (
            f"{at}The last {count(found.k, 'block')} of {self.meta['n_blocks']} are enough: they "
            f"surely gain {SHARE:.0%} of the TTR that the last {largest} gain (gain less that "
            f"share {margin}, {count(self._n_seeds, 'seed')}).{rest}"
        )

    @property
    def _n_seeds(self) -> int:
        return len({cell["seed"] for cell in self.extras["cells"]})

    def evidence(self) -> list[Block]:
        """What each k gains, in a table and charts against k."""
        recipe = self.meta["options"]["recipe"]
        seeds = count(self._n_seeds, "seed")
        about = Text(
            f"LoRA on the last k of {self.meta['n_blocks']} blocks, {seeds} each, "
            f"{count(recipe['epochs'], 'epoch')} on {self.meta['corpus']['n_sequences']} sequences "
            f"of {recipe['sequence_length']} tokens; all else is of "
            f"{self.meta['corpus']['n_held_out']} held-out sequences. A k is enough if the 95% "
            f"interval over seeds of its gain in TTR, less {SHARE:.0%} of that of the largest k, "
            "is not below 0."
        )
        warning = Text("One seed: there are no intervals, and nothing is decided.", role="warning")
        charts = [
            Grid([self._chart(*one) for one in METRICS[i : i + 2]])
            for i in range(0, len(METRICS), 2)
        ]
        more = Details("every run", [self._cells()])
        return [about, *([warning] if self._n_seeds < 2 else []), self._table(), *charts, more]

    def _table(self) -> Table:
        base = ["0 (base)", *(self._cell(BASE_K, BASE_K, metric, f) for metric, _, f in METRICS)]
        rows = [[*base, MISSING, MISSING]]
        for rank in self.ranks:
            found = self.needed(rank)
            rows += [self._row(k, rank, found) for k in self.last_k]
        head = ["last k", *(words for _, words, _ in METRICS), "gain less 90%", "enough?"]
        return Table(head, rows, "means over seeds with 95% t intervals")

    def _row(self, k: int, rank: int, found: Needed) -> list[str]:
        name = f"{k}, rank {rank}" if len(self.ranks) > 1 else str(k)
        metrics = (self._cell(k, rank, metric, form) for metric, _, form in METRICS)
        if k not in found.margin:
            return [name, *metrics, MISSING, "the largest"]
        word = "too few" if k in found.too_few else "undecided" if k in found.open else "enough"
        margin = interval(found.margin[k]._asdict(), SIGNED_FRACTION)
        return [name, *metrics, margin, word]

    def _cell(self, k: int, rank: int, metric: str, form: Form) -> str:
        return interval(self.at(last_k=k, rank=rank, metric=metric), form)

    def _chart(self, metric: str, words: str, form: Form) -> Chart:
        rows = [
            {"series": f"rank {row['rank']}", "last_k": row["last_k"], **ends(row)}
            for row in self.select(metric=metric)
            if row["last_k"] != BASE_K and math.isfinite(row["value"])
        ]
        base = self.value(last_k=BASE_K, metric=metric)
        references = [Reference("base", base, base, base, "base")] if math.isfinite(base) else []
        x, y = Axis("last_k", "late blocks trained"), Axis("value", words)
        roles: dict[str, Role] = dict.fromkeys((row["series"] for row in rows), "other")
        title = f"{words[0].upper()}{words[1:]} against the number of late blocks"
        return Chart("lines", title, f"{title}, with the base", rows, x, y, roles, references)

    def _cells(self) -> Table:
        rows = [
            [
                f"k {cell['last_k']}, rank {cell['rank']}, seed {cell['seed']}",
                *(form(cell[metric]) for metric, _, form in METRICS),
                f"{cell['seconds']:.0f} s",
            ]
            for cell in self.extras["cells"]
        ]
        return Table(["", *(words for _, words, _ in METRICS), "training"], rows, "of each run")


def _spans(values: Sequence[int]) -> str:
    """Whole numbers in words, neighbours as a span.

    >>> _spans([1, 2, 3, 5])
    'k = 1 to 3, 5'
    """
    parts: list[list[int]] = []
    for value in values:
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    spans = (f"{p[0]} to {p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
    return f"k = {', '.join(spans)}"
