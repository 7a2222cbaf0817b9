"""When did it change? A base beside the checkpoints of one training run, each compared with it.

Every checkpoint gets the comparison that `compare_models` would give it, bit for bit, with the base
opened once. Beside that each text's own numbers are kept, so that checkpoints are compared with
each other text by text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_types
from ..data.conversations import read_examples
from ..data.corpus import are_token_ids, check_max_length
from ..errors import HyperlensError, PairError, ResultsError
from ..files import check_new_folder, expand_user
from ..models.kinds import Backend
from ..models.sources import check_source
from ..models.training_steps import find_checkpoints
from ..pair import Pair, open_pairs, tokenized
from ..passes.streaming import PassOptions
from ..passes.streams import View
from ..probes import LogitLens, LogitProbe, ParticipationRatio, RankReordering, ResidualDrift
from ..render.blocks import Axis, Block, Chart, Details, Grid, Heading, Table, Text, Verdict
from ..render.format import (
    DIMENSIONS,
    DISTANCE,
    MISSING,
    NATS,
    PERCENT,
    POINTS,
    SIGNED_NATS,
    Form,
    complement,
    count,
    ends,
    interval,
    listed,
    one_line,
    p_value,
)
from ..results.fingerprint import texts_sha256, versions
from ..results.result import Result, unknown
from ..results.resume import KeptRecords, source_identity
from ..results.rows import COLUMNS, ProbeResult
from ..statistics import shares, significance
from ..statistics.ratios import (
    Ratio,
    Resampled,
    jackknife_estimate,
    left_out,
    resampled_estimate,
    share_of_texts,
    weighted_ratio,
)
from ..statistics.significance import Estimate
from .audit import largest_step, unchanged
from .comparison import Comparison, small_models_note
from .run import checked_options, compare_inputs

EXAMPLES = (
    "hyperlens trajectory ./base ./run --texts held_out.txt --out trajectory",
    "hyperlens trajectory ./base ./run/checkpoint-* --texts held_out.txt",
)

# A change is sure below this p, corrected over all checkpoints.
LEVEL = 0.05


class Quantity(NamedTuple):
    """What is followed over the checkpoints, at the last layer.

    Attributes:
        name: in the result.
        words: in charts and sentences.
        short: in tables.
        row: probe, metric and view of the comparison's row.
        form: of the value.
        gap: of a difference between two checkpoints.
        is_complement: whether it is all that the row's share is not.
    """

    name: str
    words: str
    short: str
    row: tuple[str, str, str]
    form: Form
    gap: Form
    is_complement: bool = False


_PR = "participation_ratio"
QUANTITIES = (
    Quantity(
        "dimension_raw",
        "Δ dimension of the raw last block",
        "Δ dim. raw",
        (_PR, "delta", "raw"),
        DIMENSIONS,
        DIMENSIONS,
    ),
    Quantity(
        "dimension_final_norm",
        "Δ dimension after the final norm",
        "Δ dim. normed",
        (_PR, "delta", "final_norm"),
        DIMENSIONS,
        DIMENSIONS,
    ),
    Quantity(
        "other_top1",
        "top-1 tokens that differ from the base's",
        "other top-1",
        ("rank_reordering", "top1_agreement", "final_norm"),
        PERCENT,
        POINTS,
        is_complement=True,
    ),
    Quantity("kl", "KL(tuned ‖ base)", "KL", ("logit_lens", "kl", "final_norm"), NATS, SIGNED_NATS),
)
OF_LOGITS = ("other_top1", "kl")


@check_types
def trace_trajectory(
    base: Any,
    checkpoints: Any,
    texts: Any,
    *,
    max_length: int = 256,
    batch_size: int = 8,
    include_bos: bool = False,
    sink_threshold: float = 10.0,
    lens_tokens: int | float | None = None,
    out: str | Path | None = None,
    backend: Backend = "residual",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TrajectoryResult:
    """When in training did it change, and where?

    Compares every checkpoint of one training run with the base, on the same texts. Each comparison
    is that of `compare_models`, bit for bit; the base is opened, checked and hashed once, and two
    models are in memory at a time.

    A change at the last layer has begun at the first checkpoint from which on all are surely
    changed, in one direction: 95% interval without 0, and p < 0.05, corrected over the checkpoints
    (Holm). Neighbouring checkpoints are compared text by text in the same way.

    Args:
        base: the model before training, as `compare_models` takes it.
        checkpoints: the folder of a run with folders such as checkpoint-500 in it, as transformers'
            Trainer and `hyperfit(keep_every=...)` write them; or several folders of checkpoints
            (full models or adapters); or a mapping from training step to anything that
            `compare_models` takes.
        texts: what `compare_models` takes. Intervals need five.
        max_length: tokens per text, BOS included; longer texts are cut and counted.
        batch_size: texts per forward pass; does not change the result.
        include_bos: measure BOS positions too.
        sink_threshold: as in `compare_models`.
        lens_tokens: below the output, read the logit lens at so many tokens of each text, or at
            this share of them, as in `compare_models`.
        out: a new folder to save the result in. Checkpoints that are done are kept beside it, in
            `out.partial`, until then: the same call goes on after an interruption.
        backend: how models are hooked, "residual", "bridge" or "hooked_transformer".
        device, dtype: as in `compare_models`.
        seed: of the token sample that intervals are computed from.
        progress: show progress bars.

    Returns:
        A `TrajectoryResult`: every row of every comparison with its step, when the last layer and
        the output changed, and maps of step against layer.

    Raises:
        HyperlensError: naming the step, if a checkpoint cannot be opened or does not fit the base;
            if two have one step, or there are none.

    Example::

        result = trace_trajectory("base", "run", "held_out.txt", out="trajectory")
        result.comparison(500).summary()
    """
    options = checked_options(batch_size, sink_threshold, seed, progress, lens_tokens)
    check_max_length(max_length)
    check_source(base)
    sources = find_checkpoints(checkpoints)
    for step, source in sources.items():
        with _naming(step):
            check_source(source)
    if out is not None:
        check_new_folder(expand_user(out))
    # Before any model is loaded: a mistyped file name should not cost a minute.
    texts = texts if are_token_ids(texts) else read_examples(texts)
    reading = {"max_length": max_length, "include_bos": include_bos}
    run = {"backend": backend, "device": str(device), "dtype": str(dtype)}
    identities: dict[int, dict[str, Any]] = {step: {} for step in sources}
    if out is not None:  # weights of models in memory are hashed for them
        identities = _identities(base, sources, texts, options, reading | run)
    records = KeptRecords.beside(out)
    done = {step: records.find(identity) for step, identity in identities.items()}
    missing = [step for step, record in done.items() if record is None]
    pairs = open_pairs(
        base, (sources[step] for step in missing), backend=backend, device=device, dtype=dtype
    )
    for step in tqdm(missing, desc="trajectory", unit="checkpoint", disable=not progress):
        with _naming(step):
            # No name for the pair: the next one is opened when this one is gone.
            record = _measured(next(pairs), texts, options, reading)
        done[step] = record
        records.keep(identities[step], record)
    result = _result({step: record for step, record in done.items() if record is not None})
    if out is not None:
        result.save(expand_user(out))
        records.forget(identities.values())
    return result


@contextmanager
def _naming(step: int) -> Iterator[None]:
    """Say which checkpoint an error is about."""
    try:
        yield
    except HyperlensError as error:
        raise type(error)(f"checkpoint of step {step}: {error}") from error


def _identities(
    base: Any, sources: Mapping[int, Any], texts: Any, options: PassOptions, run: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """For every checkpoint everything that decides its comparison."""
    groups = getattr(texts, "groups", None)
    reading = {} if are_token_ids(texts) else texts.reading.describe()
    same = {
        "question": TrajectoryResult.name,
        "base": source_identity(base),
        "texts": texts_sha256(texts),
        "groups": None if groups is None else list(map(str, groups)),
        **({"reading": reading} if reading else {}),
        "batch_size": options.batch_size,
        "sink_threshold": options.sink_threshold,
        "lens_tokens": options.lens_tokens,
        "seed": options.seed,
        "versions": versions(),
    }
    return {
        step: same | run | {"step": step, "checkpoint": source_identity(source)}
        for step, source in sources.items()
    }


def _measured(
    pair: Pair, texts: Any, options: PassOptions, reading: dict[str, Any]
) -> dict[str, Any]:
    """The comparison of one checkpoint, and what each text says, as JSON values."""
    inputs = tokenized(pair, texts, reading["max_length"], reading["include_bos"])
    probes = [
        ResidualDrift(with_excluded=True),
        DimensionWithTexts(with_excluded=True),
        LensWithTexts(),
        RanksWithTexts(),
    ]
    comparison = compare_inputs(inputs, probes, options, reading)
    extras: dict[str, Any] = {}
    of_texts: dict[str, Any] = {}
    for name, of_probe in comparison.extras.items():
        rest = dict(of_probe)
        of_texts |= rest.pop(OF_TEXTS, {})
        extras |= {name: rest} if rest else {}
    found = {"comparison": comparison.to_dict() | {"extras": extras}, "texts": of_texts}
    # As it is read back: a run that was interrupted and one that was not give the same.
    record: dict[str, Any] = json.loads(json.dumps(found))
    return record


# The default probes of a comparison, which also say what each text says at the last layer.

OF_TEXTS = "of_texts"


def _with_texts(result: ProbeResult, found: Mapping[str, Any]) -> ProbeResult:
    return ProbeResult(result.rows, {**result.extras, OF_TEXTS: found}) if found else result


class DimensionWithTexts(ParticipationRatio):
    """And its change without each text, and over draws of the texts."""

    _found: Mapping[str, Any] = {}

    def measured(self, layer: int, view: View) -> tuple[Ratio, Ratio] | None:
        """As of any participation ratio; of the last layer, what is asked for is kept."""
        measured = super().measured(layer, view)
        if layer == self.spec.n_layers:
            found = {f"dimension_{view}": self._without_texts(measured)}
            self._found = {**self._found, **found}
        return measured

    def _without_texts(self, measured: tuple[Ratio, Ratio] | None) -> dict[str, Any] | None:
        if measured is None:
            return None
        base, tuned = measured
        total = weighted_ratio([(1.0, tuned), (-1.0, base)])
        in_all = float(self.sums["sequences"][-1])
        n_texts = len(total.sample.length) if self.spec.grouped else in_all
        kept = {"value": total.value, "left_out": left_out(total, n_texts).tolist()}
        if total.draws is None:
            return kept
        return kept | {
            "of_texts": total.draws.of_texts,
            "draws": total.draws.draws.tolist(),
            "shrink": share_of_texts(total),
        }

    def compute_layer(self, layer: int) -> ProbeResult:
        """The rows, and what was kept."""
        self._found = {}
        return _with_texts(super().compute_layer(layer), self._found)


class LensWithTexts(LogitLens):
    """And each text's sum of KL at the output."""

    def compute(self) -> ProbeResult:
        """The rows, and the sums."""
        y, n = _sums_of_texts(self, "kl")
        return _with_texts(super().compute(), {"kl": {"y": y.tolist(), "n": n.tolist()}})


class RanksWithTexts(RankReordering):
    """And each text's number of top-1 tokens that differ."""

    def compute(self) -> ProbeResult:
        """The rows, and the numbers."""
        y, n = _sums_of_texts(self, "top1_agreement")
        found = {"other_top1": {"y": (n - y).tolist(), "n": n.tolist()}}
        return _with_texts(super().compute(), found)


def _sums_of_texts(
    probe: LogitProbe, metric: str
) -> tuple[Float[Tensor, " text"], Float[Tensor, " text"]]:
    """At the last layer the sum of each text that is sampled, and over how many decisions."""
    k = probe.metrics.index(metric)
    return probe.sums["sampled_y"][k, -1, 0].cpu(), probe.sums["sampled_n"][-1].cpu()


# From the records of checkpoints to the result


def _result(done: Mapping[int, Mapping[str, Any]]) -> TrajectoryResult:
    comparisons = {step: record["comparison"] for step, record in done.items()}
    metas = {step: one["meta"] for step, one in comparisons.items()}
    _check_one_corpus(metas)
    table = [{"step": step, **row} for step, one in comparisons.items() for row in one["table"]]
    first = next(iter(metas.values()))
    meta = {key: value for key, value in first.items() if key not in ("tuned", "excluded")}
    meta["checkpoints"] = [{"step": step, **one["tuned"]} for step, one in metas.items()]
    meta["notes"] = _notes(metas)
    meta["title"] = f"{one_line(first['base']['name'])} → {count(len(metas), 'checkpoint')}"
    extras = {
        "changes": _changes(done, int(first["n_layers"])),
        "comparisons": {
            str(step): {"meta": one["meta"], "extras": one["extras"]}
            for step, one in comparisons.items()
        },
    }
    return TrajectoryResult(tuple(table), extras, meta)


def _check_one_corpus(metas: Mapping[int, Mapping[str, Any]]) -> None:
    """Checkpoints without a base's tokenizer may each read the texts with their own."""
    (first, known), *others = ((step, meta["corpus"]["sha256"]) for step, meta in metas.items())
    for step, sha256 in others:
        if sha256 != known:
            raise PairError(
                f"the checkpoints of steps {first} and {step} read the texts as different tokens: "
                "give checkpoints of one tokenizer"
            )


def _notes(metas: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Every note once; with its steps, where it is not of all checkpoints."""
    steps: dict[str, list[int]] = {}
    for step, meta in metas.items():
        for note in meta["notes"]:
            steps.setdefault(note, []).append(step)
    return [
        note if len(of) == len(metas) else f"step {listed(list(map(str, of)))}: {note}"
        for note, of in steps.items()
    ]


def _changes(done: Mapping[int, Mapping[str, Any]], n_layers: int) -> list[dict[str, Any]]:
    """Every quantity at every checkpoint: its change from the base and from the one before."""
    return [row for one in QUANTITIES for row in _changes_of(one, done, n_layers)]


def _changes_of(
    quantity: Quantity, done: Mapping[int, Mapping[str, Any]], n_layers: int
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    before: Any = None
    for step, record in done.items():
        values = _row(quantity, record["comparison"]["table"], n_layers)
        grown = _grown(quantity, record, before) if before else UNKNOWN
        rows.append(
            {
                "quantity": quantity.name,
                "step": step,
                **ends(values),
                "p": _p(_estimate(quantity, record["texts"][quantity.name])),
                "growth": grown.value,
                "growth_low": grown.low,
                "growth_high": grown.high,
                "growth_p": _p(grown),
            }
        )
        before = record
    return significance.holm_rows(significance.holm_rows(rows), "growth_p", "growth_p")


def _row(
    quantity: Quantity, table: Sequence[Mapping[str, Any]], n_layers: int
) -> Mapping[str, Any]:
    """The comparison's own value and interval."""
    wanted = (*quantity.row, n_layers)
    row = next(
        one for one in table
        if (one["probe"], one["metric"], one["view"], one["layer"]) == wanted
    )  # fmt: skip
    return complement(row) if quantity.is_complement else row


def _sha256(record: Mapping[str, Any]) -> str:
    """Of a checkpoint's weights."""
    sha256: str = record["comparison"]["meta"]["tuned"]["sha256"]
    return sha256


UNKNOWN = Estimate(math.nan, math.nan, math.nan, math.nan, 0)
# Of two checkpoints with the same weights: what is the same is so on any text.
UNCHANGED = Estimate(0.0, 0.0, 0.0, 0.0, 0)


def _estimate(quantity: Quantity, of_texts: Mapping[str, Any] | None) -> Estimate:
    """A quantity's change from the base, over texts."""
    if of_texts is None:
        return UNKNOWN
    if quantity.name in OF_LOGITS:
        within = (0.0, 1.0) if quantity.is_complement else None
        return shares.ratio(_tensor(of_texts["y"]), _tensor(of_texts["n"]), within=within)
    return _of_dimension(of_texts)


def _grown(quantity: Quantity, record: Mapping[str, Any], previous: Mapping[str, Any]) -> Estimate:
    """What a checkpoint has more than the one before, paired by text."""
    if _sha256(record) == _sha256(previous):
        return UNCHANGED
    now, before = (one["texts"][quantity.name] for one in (record, previous))
    if now is None or before is None:
        return UNKNOWN
    if quantity.name in OF_LOGITS:
        gap = _tensor(now["y"]) - _tensor(before["y"])
        within = (-1.0, 1.0) if quantity.is_complement else None
        return shares.ratio(gap, _tensor(now["n"]), within=within)
    if len(now["left_out"]) != len(before["left_out"]):
        return UNKNOWN  # attention sinks are all that is left of a text in one of the two
    # The draws are the same ones: of so many texts, from the same seed.
    keys = now.keys() & before.keys()
    grown: dict[str, Any] = {key: _tensor(now[key]) - _tensor(before[key]) for key in keys}
    if "shrink" in grown:
        grown["shrink"] = max(now["shrink"], before["shrink"])
    return _of_dimension(grown)


def _of_dimension(kept: Mapping[str, Any]) -> Estimate:
    """With a comparison's interval; with the jackknife's, where only some texts are sampled."""
    value, without = float(kept["value"]), _tensor(kept["left_out"])
    if "draws" not in kept:
        return jackknife_estimate(value, without)
    found = Resampled(float(kept["of_texts"]), _tensor(kept["draws"]), without)
    return resampled_estimate(value, found, kept["shrink"])


def _p(found: Estimate) -> float:
    """p that it is 0; NaN where it is so exactly, which is no test."""
    return math.nan if found.value == found.se == 0 else shares.p_value(found)


def _tensor(values: Any) -> Float[Tensor, "*texts"]:
    return torch.as_tensor(values, dtype=torch.float64)


class Onset(NamedTuple):
    """When a change began.

    Attributes:
        step: the first checkpoint from which on all are surely changed; None if there is none.
        before: the checkpoint before it; None if it is the first.
        sure: all checkpoints that are surely changed.
    """

    step: int | None
    before: int | None
    sure: list[int]


def onset(changes: Sequence[Mapping[str, Any]]) -> Onset:
    """The first checkpoint from which on all are surely changed, in the direction of the last.

    A checkpoint is surely changed if the 95% interval of its change is without 0, and the p of its
    change, corrected over all checkpoints, is below 0.05.

    Args:
        changes: of one quantity, in order of steps: `step`, `value`, `low`, `high`, corrected `p`.

    >>> at = lambda step, value, p: {
    ...     "step": step, "value": value, "low": value - 1, "high": value + 1, "p": p}
    >>> onset([at(10, 0.5, 0.6), at(20, 3.0, 0.01), at(30, 4.0, 0.001)])
    Onset(step=20, before=10, sure=[20, 30])
    """
    signs = [_sign(one) for one in changes]
    sure = [one["step"] for one, sign in zip(changes, signs, strict=True) if sign]
    first = len(changes)
    while first and signs[first - 1] and signs[first - 1] == signs[-1]:
        first -= 1
    if first == len(changes):
        return Onset(None, None, sure)
    before = changes[first - 1]["step"] if first else None
    return Onset(changes[first]["step"], before, sure)


def _sign(change: Mapping[str, Any], prefix: str = "") -> int:
    """1 if it is surely above 0, -1 if surely below, else 0."""
    value, low, high, p = (
        change[key] for key in ([f"{prefix}{k}" for k in ("value", "low", "high", "p")])
    )
    if not p < LEVEL or not (low > 0 or high < 0):
        return 0
    return 1 if value > 0 else -1


# A sure change by its sign, and what goes on.
SURE = {1: "surely above 0", -1: "surely below 0"}
MOVES = {1: "surely rises", -1: "surely falls", 0: "cannot be told to move"}

# What the maps show: title, probe, metric, view.
MAPS = (
    ("Δ effective dimension, raw", _PR, "delta", "raw"),
    ("Δ effective dimension, after the final norm", _PR, "delta", "final_norm"),
    ("relative L2 distance of the raw streams", "drift", "relative_l2", "raw"),
    ("agreement of the two lenses' top-1 tokens", "logit_lens", "top1_agreement", "final_norm"),
)
STEP = Axis("step", "training step")


class TrajectoryResult(Result):
    """The rows of a `Comparison` for every checkpoint, with its training `step`.

    Extras: `changes`, of every quantity at the last layer (`dimension_raw`,
    `dimension_final_norm`, `other_top1`, `kl`) and checkpoint the `value` with its 95% interval and
    `p` that it is 0, and `growth` since the checkpoint before, paired by text, with the same; p
    values are corrected over the checkpoints (Holm). `comparisons`, what is left of each one.
    """

    name: ClassVar[str] = "trajectory"
    title: ClassVar[str] = "When in training did it change, and where?"
    columns: ClassVar[tuple[str, ...]] = ("step", *COLUMNS)

    @property
    def steps(self) -> list[int]:
        """The training steps of the checkpoints, in order."""
        return [one["step"] for one in self.meta["checkpoints"]]

    def comparison(self, step: int) -> Comparison:
        """The comparison of one checkpoint, as `compare_models` gives it.

        Raises:
            ResultsError: if there is no checkpoint of this step.
        """
        if step not in self._comparisons:
            raise ResultsError(unknown("step", step, self.steps))
        return self._comparisons[step]

    @cached_property
    def _comparisons(self) -> dict[int, Comparison]:
        tables: dict[int, list[dict[str, Any]]] = {step: [] for step in self.steps}
        for row in self.table:
            tables[row["step"]].append({key: row[key] for key in COLUMNS})
        rest = self.extras["comparisons"]
        return {
            step: Comparison(tuple(table), rest[str(step)]["extras"], rest[str(step)]["meta"])
            for step, table in tables.items()
        }

    def changes(self, quantity: str) -> list[Mapping[str, Any]]:
        """The change of one quantity at every checkpoint, in order of steps.

        Raises:
            ResultsError: if there is no such quantity.
        """
        known = [one.name for one in QUANTITIES]
        if quantity not in known:
            raise ResultsError(unknown("quantity", quantity, known))
        return [row for row in self.extras["changes"] if row["quantity"] == quantity]

    def onset(self, quantity: str) -> Onset:
        """When a quantity began to change: see `hyperlens.compare.trajectory.onset`.

        Raises:
            ResultsError: if there is no such quantity.
        """
        return onset(self.changes(quantity))

    def verdicts(self) -> list[Verdict]:
        """When the last layer and the output changed, how it grew, and in which block."""
        if all(map(unchanged, self._comparisons.values())):
            same = "At none of the checkpoints: everything measured reads exactly as for the base."
            return [Verdict("changed?", same)]
        topics = ("expansion", "after the norm", "output")
        found = [
            Verdict(topic, self._when(quantity))
            for topic, quantity in zip(topics, QUANTITIES, strict=False)
        ]
        if len(self.steps) > 1:
            found.append(Verdict("growth", self._growth(QUANTITIES[0])))
        found += self._where()
        caution = (
            "One training run is one draw, and intervals are over texts: of other seeds they say "
            "nothing. A checkpoint that is not surely changed is not shown to be unchanged."
        )
        return [*found, Verdict("scope", caution, caution=True)]

    def _when(self, quantity: Quantity) -> str:
        changes, found = self.changes(quantity.name), self.onset(quantity.name)
        what = _capital(quantity.words)
        if all(one["value"] == 0 for one in changes):
            return f"{what}: exactly as in the base at every checkpoint."
        last = changes[-1]
        if found.step is None:
            if not math.isfinite(last["low"]):
                return (
                    f"{what}: cannot tell when, as its intervals need five texts "
                    f"({quantity.form(last['value'])} at the last checkpoint)."
                )
            only = (
                f"surely changed only at step {_steps(found.sure)}" if found.sure else "nor before"
            )
            return (
                f"{what}: cannot tell when, as it is not surely changed at the last checkpoint, "
                f"step {last['step']} ({_decided(last, quantity.form)}), {only}."
            )
        at = next(one for one in changes if one["step"] == found.step)
        words = f"{what}: {SURE[_sign(at)]} from step {found.step} on"
        words += f" ({_decided(at, quantity.form)}); {self._before(quantity, found.before)}"
        if last is at:
            return f"{words}."
        return f"{words}; {interval(last, quantity.form)} at the last, step {last['step']}."

    def _before(self, quantity: Quantity, step: int | None) -> str:
        """What is known of the checkpoint before a change began."""
        if step is None:
            return "that is the first checkpoint"
        one = next(one for one in self.changes(quantity.name) if one["step"] == step)
        if one["value"] == 0:
            return f"unchanged at step {step}, before it"
        state = SURE.get(_sign(one), "not surely changed")
        return f"{state} at step {step}, before it ({_decided(one, quantity.form)})"

    def _growth(self, quantity: Quantity) -> str:
        """Between which checkpoints a quantity changed most, and whether it still does."""
        changes = self.changes(quantity.name)
        before = {one["step"]: last["step"] for last, one in pairwise(changes)}
        grown = [one for one in changes[1:] if math.isfinite(one["growth"])]
        what = _capital(quantity.words)
        if not grown:
            return f"{what}: cannot tell between which checkpoints, with fewer than two texts."
        largest = max(grown, key=lambda one: abs(one["growth"]))
        sure = sum(_sign(_growth_of(one)) != 0 for one in grown)
        of_last = _growth_of(grown[-1])
        still = MOVES[_sign(of_last)]
        return (
            f"{what}: between checkpoints it moved most from step {before[largest['step']]} to "
            f"{largest['step']} "
            f"({_decided(_growth_of(largest), quantity.gap)}), surely in {sure} of "
            f"{count(len(grown), 'step')} from one checkpoint to the next; in the last, from "
            f"{before[grown[-1]['step']]} to {grown[-1]['step']}, it {still} "
            f"({_decided(of_last, quantity.gap)})."
        )

    def _where(self) -> list[Verdict]:
        """The block with the largest change of dimension, at every checkpoint."""
        blocks: dict[int, list[int]] = {}
        steps = {s: largest_step(c, _PR, "delta") for s, c in self._comparisons.items()}
        for step, found in steps.items():
            if found is not None and found.change:
                blocks.setdefault(found.layer - 1, []).append(step)
        last = steps[self.steps[-1]]
        if not blocks or last is None:
            return []
        parts = "; ".join(f"block {block} at step {_steps(of)}" for block, of in blocks.items())
        others = "as at every other one" if len(blocks) == 1 else parts
        more = f"; {others}" if len(self.steps) > 1 else ""
        return [
            Verdict(
                "where",
                f"At the last checkpoint the raw dimension moves most in block {last.layer - 1}, "
                f"from {DIMENSIONS(last.before)} to {DIMENSIONS(last.after)}{more}.",
            )
        ]

    def evidence(self) -> list[Block]:
        """The last layer against training steps, and maps of step against layer."""
        first = self._comparisons[self.steps[0]]
        corpus = first.meta["corpus"]
        about = Text(
            f"{count(len(self.steps), 'checkpoint')}, each compared with the base on "
            f"{count(corpus['n_sequences'], 'text')}, {count(corpus['n_tokens'], 'token')}. A "
            "change is sure where its 95% interval is without 0 and its p, corrected over the "
            "checkpoints, is below 0.05; it has begun where that holds from then on."
        )
        maps = [self._map(*one) for one in MAPS]
        return [
            *small_models_note(self.meta),
            about,
            Heading("At the last layer"),
            self._table(),
            Grid([self._dimension_chart(), self._line(QUANTITIES[2]), self._line(QUANTITIES[3])]),
            Details("from checkpoint to checkpoint", [self._growth_table()]),
            Heading("Step by layer"),
            Grid(maps[:2]),  # of one unit, as they share their colours
            *maps[2:],
        ]

    def _table(self) -> Table:
        rows = [
            [str(step), *(self._cell(one, step) for one in QUANTITIES), self._words(step)]
            for step in self.steps
        ]
        head = ["step", *(one.short for one in QUANTITIES), "surely changed"]
        caption = "changes from the base"
        if any(math.isfinite(row["low"]) for row in self.extras["changes"]):
            caption += ", 95% intervals over texts"
        return Table(head, rows, caption)

    def _cell(self, quantity: Quantity, step: int) -> str:
        row = next(one for one in self.changes(quantity.name) if one["step"] == step)
        return f"{interval(row, quantity.form)} {p_value(row['p'])}".rstrip()

    def _words(self, step: int) -> str:
        """Which quantities are surely changed at a checkpoint."""
        sure = [one.short for one in QUANTITIES if step in self.onset(one.name).sure]
        return "all" if len(sure) == len(QUANTITIES) else ", ".join(sure) or "none"

    def _growth_table(self) -> Table:
        rows = []
        for last, step in pairwise(self.steps):
            cells = []
            for quantity in QUANTITIES:
                row = next(one for one in self.changes(quantity.name) if one["step"] == step)
                of = _growth_of(row)
                known = math.isfinite(of["value"])
                cells.append(_decided(of, quantity.gap) if known else MISSING)
            rows.append([f"{last} to {step}", *cells])
        head = ["steps", *(one.short for one in QUANTITIES)]
        caption = "differences paired by text (of many texts, those that are sampled)"
        return Table(head, rows, caption)

    def _dimension_chart(self) -> Chart:
        """The terminal expansion against training steps, before and after the final norm."""
        names = ("raw last block", "after the final norm")
        rows = [
            {"series": series, "step": one["step"], **ends(one)}
            for series, quantity in zip(names, QUANTITIES, strict=False)
            for one in self.changes(quantity.name)
            if math.isfinite(one["value"])
        ]
        title = "Δ effective dimension at the last layer, by training step"
        y = Axis("value", "Δ effective dimension", "zero")
        return Chart("lines", title, f"{title}{_range(rows)}", rows, STEP, y)

    def _line(self, quantity: Quantity) -> Chart:
        rows = [
            {"series": "checkpoints", "step": one["step"], **ends(one)}
            for one in self.changes(quantity.name)
        ]
        title = f"{_capital(quantity.words)}, by training step"
        y = Axis("value", "share" if quantity.is_complement else "nats", "zero")
        return Chart("lines", title, f"{title}{_range(rows)}", rows, STEP, y)

    def _map(self, words: str, probe: str, metric: str, view: str) -> Chart:
        wanted = {"probe": probe, "metric": metric, "view": view}
        rows = [
            {key: row[key] for key in ("step", "layer", "value", "low", "high")}
            for row in reversed(self.rows(**wanted))
            if math.isfinite(row["value"])
        ]
        # The last layer on top, the first step on the left.
        rows.sort(key=lambda row: (-row["layer"], row["step"]))
        title = f"{_capital(words)}, by training step and layer"
        layer = Axis("layer", "layer")
        return Chart("heatmap", title, f"{title}{_range(rows)}", rows, STEP, layer)


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _steps(steps: Sequence[int]) -> str:
    return listed(list(map(str, steps)))


def _growth_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The change since the checkpoint before, under the names of a change."""
    return {
        "value": row["growth"], "low": row["growth_low"], "high": row["growth_high"],
        "p": row["growth_p"],
    }  # fmt: skip


def _decided(change: Mapping[str, Any], form: Form) -> str:
    """A change with its interval and p."""
    return f"{interval(change, form)} {p_value(change['p'])}".rstrip()


def _range(rows: Sequence[Mapping[str, Any]]) -> str:
    """From where to where the values of a chart go."""
    values = [row["value"] for row in rows]
    return f": from {DISTANCE(min(values))} to {DISTANCE(max(values))}" if values else ""
