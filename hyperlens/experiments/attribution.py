"""Which components make the decisions that tuning changed: embedding, heads, MLPs?

The logits are a sum over what the components of a model add to the residual stream, once the final
norm's scale is taken as it is. So is the difference of two logits, and with it the change of every
decision. Such lists look meaningful for any pair of models: beside them stand random changes of the
same size, the same positions with the two tokens of other decisions, and what happens when a
component is put into the base alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_choice, check_counts, check_seed, check_types
from ..data.corpus import Corpus
from ..errors import ArgumentError, PairError
from ..hooks.attach import on_input, on_output
from ..hooks.components import (
    SPLITS,
    Component,
    ComponentMap,
    Readout,
    contributions,
    find_components,
    read_out,
    read_written,
)
from ..hooks.loading import LoadedModel
from ..hooks.partial_forward import check_resumes, read, run_patched
from ..hooks.patterns import Routing, attention_patterns, expert_choices
from ..hooks.sites import Site
from ..hooks.surface import (
    HookedModel,
    check_finite,
    evaluating,
    float_logits,
    input_device,
    residual_logits,
    run_last_residual,
)
from ..pair import Inputs, open_inputs
from ..passes.failures import explaining_out_of_memory
from ..passes.streaming import PassOptions
from ..passes.streams import logit_rows
from ..render.blocks import Axis, Block, Chart, Details, Role, Table, Text, Verdict
from ..render.format import (
    MISSING,
    PERCENT,
    SIGNED,
    Form,
    count,
    ends,
    interval,
    p_value,
    percent,
    span,
)
from ..results.result import Result
from ..statistics import distances, shares
from ..statistics.ratios import jackknife_estimate
from ..statistics.significance import Estimate, holm, rho_and_p
from .null_test import SINK_THRESHOLD, RandomChanges

EXAMPLES = (
    "hyperlens attribute ./base ./tuned --texts held_out.txt --out attribution",
    "hyperlens attribute ./base ./tuned --texts held_out.txt --by branches --n-controls 0",
)

# Random changes keep each tensor's size and rank, scaled to move the stream as far as tuning does.
CONTROL = "rows_and_columns_rescaled"
# The parts of a change that no component writes.
READING, REMAINDER, ALL = Component("reading"), Component("remainder"), Component("all")
VERIFIABLE = ("embedding", "position", "head", "attention", "mlp")
# With fewer texts no component is named, and the table shows so many components.
FEWEST, SHOWN = 5, 12
# Shares leave 0 to 1 where components oppose each other.
SHARE = Form(percent)
# Shares of components before the first change, which differ by rounding only.
ROUNDING = 1e-9
# Up to this, what differs between two float32 models is rounding, not what tuning did: shares of
# the change, effects relative to the differences of logits, and distances of attention patterns.
NEGLIGIBLE = 1e-6
# Over fewer components Spearman's correlation takes few values, and often does not move at all
# when a text is left out: its spread over texts tells nothing.
FEWEST_RANKED = 8
# What reads the stream and adds no part to it.
READ_ONLY = ("norm_bias", "unembedding_bias", "soft_cap", "reading", "remainder", "all")

Sums = Float[Tensor, "unit component"]


@check_types
def attribute(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    by: str = "heads",
    n_verified: int = 12,
    n_controls: int = 9,
    max_length: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> AttributionResult:
    """Which heads and MLPs make the decisions that tuning changed?

    A decision is changed where the two models' top-1 tokens differ, after any token of the texts.
    There, the logit of the tuned model's token less that of the base's is split over what every
    component writes, in both models, with the scale of the final norm frozen. The change of a
    component's part is what it writes differently, read by the mean of both models' readouts, and
    what is read differently of it. The leading components are then put into the base alone.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; or an open `Pair` and the
            texts.
        texts: what `compare_models` takes.
        by: attention by "heads", or "branches" for each block's attention as a whole.
        n_verified: how many of the leading components are put into the base alone, and as many
            others drawn at random; 0 for none.
        n_controls: random changes of the tuned model's size whose attributions stand beside; 0
            for none, at least 2 otherwise.
        max_length: tokens per text, BOS included.
        batch_size: texts per forward pass; does not change the result.
        seed: of the random changes, of the exchanged tokens and of the components drawn.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Returns:
        An `AttributionResult`.

    Raises:
        PatchError: naming what the architecture does not allow.
        ActivationError: if a model, or a patched one, overflows.
        HyperlensError: if a source cannot be opened, or the texts do not fit the models.
    """
    check_counts(batch_size=batch_size)
    check_counts(0, n_verified=n_verified, n_controls=n_controls)
    check_choice("by", by, SPLITS)
    check_seed(seed)
    if n_controls == 1:
        raise ArgumentError("n_controls=1 shows no spread: give at least 2, or 0 for none")
    inputs = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    pair = inputs.pair
    maps = [find_components(loaded, by) for loaded in (pair.base, pair.tuned)]
    if maps[0].components != maps[1].components:
        raise PairError("the two models have other components: give a pair of one architecture")
    if input_device(pair.base.hooked).type == "mps":
        raise ArgumentError("MPS has no float64, which this needs: pass device='cpu'")
    meta = inputs.metadata(
        seed=seed,
        options={
            "by": by,
            "n_verified": n_verified,
            "n_controls": n_controls,
            "max_length": max_length,
        },
    )
    run = _Run(inputs.corpus, batch_size, progress)
    with explaining_out_of_memory(batch_size, ", or max_length"):
        top = _top_tokens(pair.base, "base", run)
        decisions = _changed(top, _top_tokens(pair.tuned, "tuned", run), run.corpus)
        counts = {"decisions": decisions.n, "changed": len(decisions.text)}
        if not len(decisions.text):
            return AttributionResult((), counts, meta)
        sums = _measure(maps[0], maps[1], decisions, run, seed)
        controls = list(_controls(inputs, maps[0], top, by, n_controls, run, seed))
        rows = _rows(maps[0].components, sums, controls)
        nothing = _writes_nothing(rows)
        chosen = _chosen(maps[0].components, sums, 0 if nothing else n_verified, seed)
        if chosen.leading:
            effects = _effects(maps[0], maps[1], decisions, chosen.all, run)
            rows += _verified_rows(maps[0].components, sums, effects, chosen)
        rows += _pattern_rows(pair.base, pair.tuned, run)
        routing_rows, loads = _routing(pair.base, pair.tuned, run)
    extras = counts | {
        "n_units": int((sums.n > 0).sum()),
        "leading": [one._asdict() for one in chosen.leading],
        "others": [one._asdict() for one in chosen.others],
        "largest_remainder": sums.largest_remainder,
        "controls": [
            {"seed": one.seed, "changed": one.changed, "factor": one.factor} for one in controls
        ],
        "expert_load": loads,
    }
    return AttributionResult((*rows, *routing_rows), extras, meta)


@dataclass(frozen=True)
class _Run:
    """The texts, and how they are read."""

    corpus: Corpus
    batch_size: int
    progress: bool

    @property
    def unit(self) -> Int[Tensor, " text"]:
        """The independent unit that each text belongs to."""
        groups = self.corpus.groups
        return torch.tensor(range(len(self.corpus.sequences)) if groups is None else groups)

    def batches(self, device: torch.device, what: str) -> Iterator[_Texts]:
        """All texts, the longest first."""
        first, n = 0, len(self.corpus.sequences)
        with tqdm(total=n, desc=what, unit="text", disable=not self.progress, leave=False) as bar:
            for batch in self.corpus.batches(self.batch_size):
                parts = (batch.tokens, batch.real.long(), batch.counted)
                yield _Texts(first, *(x.to(device) for x in parts))
                first += len(batch.tokens)
                bar.update(len(batch.tokens))

    def summed(
        self, values: Float[Tensor, "n component"], text: Int[Tensor, " n"]
    ) -> Float[Tensor, "unit component"]:
        """Values of some tokens, added up by unit."""
        total = torch.zeros(self.corpus.n_units, values.shape[-1], dtype=torch.float64)
        return total.index_add_(0, self.unit[text.cpu()], values.to("cpu", torch.float64))


class _Texts(NamedTuple):
    """A batch on the models' device; `first` is the number of its first text."""

    first: int
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    counted: Bool[Tensor, "batch pos"]

    @property
    def text(self) -> Int[Tensor, "batch pos"]:
        """The number of each token's text."""
        n, width = self.tokens.shape
        return (torch.arange(n) + self.first)[:, None].expand(n, width)


# Which decisions changed


@dataclass(frozen=True)
class Decisions:
    """Where the top-1 tokens of two models differ, text by text.

    Attributes:
        text, position: where; the decision is about the token after this one.
        base, tuned: the two tokens.
        n: how many decisions there are in all.
    """

    text: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    base: Int[Tensor, " n"]
    tuned: Int[Tensor, " n"]
    n: int

    def of(self, texts: _Texts) -> tuple[slice, Bool[Tensor, "batch pos"]]:
        """Which of them are in these texts, and where."""
        here = (self.text >= texts.first) & (self.text < texts.first + len(texts.tokens))
        where = torch.zeros_like(texts.counted)
        where[self.text[here] - texts.first, self.position[here]] = True
        start = int((self.text < texts.first).sum())
        return slice(start, start + int(here.sum())), where

    def exchanged(self, seed: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """The two tokens of another decision for each, of another text where there is one."""
        generator = torch.Generator().manual_seed(seed)
        n = len(self.text)
        drawn = torch.randint(n, (n,), generator=generator)
        for _ in range(20):
            again = self.text[drawn] == self.text
            if not bool(again.any()):
                break
            drawn[again] = torch.randint(n, (int(again.sum()),), generator=generator)
        return self.base[drawn], self.tuned[drawn]


def _top_tokens(loaded: LoadedModel, side: str, run: _Run) -> Int[Tensor, " n"]:
    """A model's top-1 token after every counted token of all texts, in their order."""
    model = loaded.hooked
    found: list[Tensor] = []
    for texts in run.batches(input_device(model), f"{side} model"):
        with evaluating(model):
            last = run_last_residual(model, texts.tokens, texts.mask)[texts.counted]
        check_finite(f"the {side} model", last)
        found += [
            distances.winner(residual_logits(model, last[rows])).cpu()
            for rows in logit_rows(len(last), model.cfg.d_vocab, last.device)
        ]
    return torch.cat(found)


def _changed(base: Int[Tensor, " n"], tuned: Int[Tensor, " n"], corpus: Corpus) -> Decisions:
    """Where two models' top-1 tokens differ."""
    counted = [corpus.counted(i) for i in range(len(corpus.sequences))]
    text = torch.tensor([i for i, of_text in enumerate(counted) for _ in range(of_text.sum())])
    position = torch.cat([torch.from_numpy(of_text.nonzero()[0]) for of_text in counted])
    at = base != tuned
    return Decisions(text[at], position[at], base[at], tuned[at], len(base))


# Direct attribution


@dataclass(frozen=True)
class _Sums:
    """Sums over changed decisions, by independent unit and component.

    Attributes:
        base, tuned: each component's part of the difference of logits, in either model.
        written: the change of what it writes, read by the mean of both readouts; the last two
            columns are what is read differently of all, and what rounding leaves.
        shuffled: the same with the tokens of other decisions.
        totals: the whole difference in base and tuned, and its change.
        n: how many decisions.
        largest_remainder: of a single decision in either model, in logits.
    """

    base: Sums
    tuned: Sums
    written: Float[Tensor, "unit part"]
    shuffled: Float[Tensor, "unit part"]
    totals: Float[Tensor, "unit 3"]
    n: Float[Tensor, " unit"]
    largest_remainder: float


def _measure(
    base: ComponentMap, tuned: ComponentMap, decisions: Decisions, run: _Run, seed: int
) -> _Sums:
    """Split the difference of logits at every changed decision."""
    found: dict[str, Tensor] = {}
    largest = 0.0
    device = input_device(base.loaded.hooked)
    others = decisions.exchanged(seed)
    for texts in run.batches(device, "attributing"):
        rows, where = decisions.of(texts)
        if rows.start == rows.stop:
            continue
        tokens = [
            (plus[rows].to(device), minus[rows].to(device))
            for minus, plus in ((decisions.base, decisions.tuned), others)
        ]
        parts = _parts(base, tuned, texts, where, tokens)
        largest = max(largest, float(parts.pop("largest")))
        for name, values in parts.items():
            total = run.summed(values, decisions.text[rows])
            found[name] = found[name] + total if name in found else total
    return _Sums(**found | {"n": found["n"][:, 0]}, largest_remainder=largest)


def _parts(
    base: ComponentMap,
    tuned: ComponentMap,
    texts: _Texts,
    where: Bool[Tensor, "batch pos"],
    tokens: Sequence[tuple[Int[Tensor, " n"], Int[Tensor, " n"]]],
) -> dict[str, Tensor]:
    """The fields of `_Sums` for each decision of some texts."""
    maps = (base, tuned)
    written = [read_written(of, texts.tokens, texts.mask, where) for of in maps]
    # Of each pair of tokens, the base's readout and the tuned model's.
    readouts = [
        _read_out(of, one.last, *pair)
        for pair in tokens
        for of, one in zip(maps, written, strict=True)
    ]
    vectors = torch.stack([one.vector for one in readouts])
    in_base, in_tuned = (
        contributions(of, one, vectors) for of, one in zip(maps, written, strict=True)
    )
    found: dict[str, Tensor] = {}
    for name, first in (("written", 0), ("shuffled", 2)):
        of_base, of_tuned = readouts[first : first + 2]
        before = in_base[first] + _own_parts(of_base, in_base[first])
        after = in_tuned[first + 1] + _own_parts(of_tuned, in_tuned[first + 1])
        change = after - before
        # With readouts u and parts c: u'c' - uc = mean(u, u') (c' - c) + (u' - u) mean(c, c').
        read = (in_base[first + 1] - in_base[first] + in_tuned[first + 1] - in_tuned[first]) / 2
        left = [
            one.difference - parts.sum(-1) for one, parts in ((of_base, before), (of_tuned, after))
        ]
        rest = torch.stack([read.sum(-1), left[1] - left[0]], -1)
        found[name] = torch.cat([change - read, rest], -1)
        if name == "written":
            found |= {"base": before, "tuned": after}
            differences = [of_base.difference, of_tuned.difference]
            found["totals"] = torch.stack([*differences, differences[1] - differences[0]], -1)
            found["n"] = torch.ones_like(differences[0])[:, None]
            found["largest"] = torch.stack(left).abs().max()
    return found


def _read_out(
    of: ComponentMap, last: Float[Tensor, "n d_model"], plus: Tensor, minus: Tensor
) -> Readout:
    """`read_out`, a few rows of logits at a time."""
    pieces = [
        read_out(of, last[rows], plus[rows], minus[rows])
        for rows in logit_rows(len(last), of.loaded.hooked.cfg.d_vocab, last.device)
    ]
    return Readout(*map(torch.cat, zip(*pieces, strict=True)))


def _own_parts(of: Readout, like: Float[Tensor, "n component"]) -> Float[Tensor, "n component"]:
    """What belongs to a readout itself, in the last three columns."""
    own = torch.stack([of.norm_bias, of.unembedding_bias, of.soft_cap], -1)
    return torch.nn.functional.pad(own, (like.shape[-1] - 3, 0))


class _Control(NamedTuple):
    """A random change of the tuned model's size.

    Attributes:
        seed: of the change.
        factor: what it was scaled by.
        changed: how many decisions it changes.
        share: each component's share of their change, and of what is in none.
    """

    seed: int
    factor: float
    changed: int
    share: Float[Tensor, " part"]


def _controls(
    inputs: Inputs,
    base: ComponentMap,
    top: Int[Tensor, " n"],
    by: str,
    n: int,
    run: _Run,
    seed: int,
) -> Iterator[_Control]:
    """Random changes, one in memory at a time; those that change no decision are left out.

    Args:
        inputs: the pair and its texts.
        base: the base's components.
        top: its top-1 tokens.
        by: how components are split.
        n: how many random changes.
        run: how texts are read.
        seed: of the first change, and of the exchanged tokens.
    """
    if not n:
        return
    options = PassOptions(run.batch_size, SINK_THRESHOLD, seed, False)
    random = RandomChanges(inputs, options)
    quiet = _Run(run.corpus, run.batch_size, False)
    for one in tqdm(range(seed, seed + n), desc="random changes", disable=not run.progress):
        model, factor = random.model(CONTROL, one)
        decisions = _changed(top, _top_tokens(model, "randomly changed", quiet), run.corpus)
        if len(decisions.text):
            sums = _measure(base, find_components(model, by), decisions, quiet, seed)
            share = sums.written.sum(0) / sums.totals[:, 2].sum()
            yield _Control(one, factor, len(decisions.text), share)


Row = dict[str, Any]


def _rows(components: Sequence[Component], sums: _Sums, controls: Sequence[_Control]) -> list[Row]:
    """Every component's part, its share of the change, and both beside their controls."""
    parts = (*components, READING, REMAINDER)
    n, change = sums.n, sums.totals[:, 2]
    rows = [
        _row(ALL, metric, shares.ratio(sums.totals[:, i], n))
        for i, metric in enumerate(("base", "tuned", "change"))
    ]
    share = [shares.ratio(sums.written[:, i], change) for i in range(len(parts))]
    # What is in no component has no controls of its own.
    own = len(components)
    values = torch.stack([one.share for one in controls]) if controls else None
    p_share = [math.nan] * len(parts)
    if values is not None and len(values) > 1:
        kinds = [one.kind for one in components]
        p_share[:own] = holm(beyond_controls(share[:own], values[:, :own], kinds))
    for i, part in enumerate(parts):
        if i < own:
            of_model = (sums.base[:, i], sums.tuned[:, i])
            in_base, in_tuned = (shares.ratio(one, n) for one in of_model)
            rows += [_row(part, "base", in_base), _row(part, "tuned", in_tuned)]
            rows.append(_row(part, "change", shares.ratio(of_model[1] - of_model[0], n)))
        rows.append(_row(part, "written", shares.ratio(sums.written[:, i], n)))
        rows.append(_row(part, "shuffled", shares.ratio(sums.shuffled[:, i], n)))
        rows.append(_row(part, "share", share[i], p_share[i]))
        if values is not None:
            of_controls = values[:, i]
            low, high = float(of_controls.min()), float(of_controls.max())
            mean = float(of_controls.mean())
            found = Estimate(mean, low, high, math.nan, len(of_controls))
            rows.append(_row(part, "control_share", found))
    return rows


def _writes_nothing(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no component adds anything else to the stream in the tuned model, but for rounding.

    Then the stream is the same, and all of the change is how it is read.
    """
    written = [r for r in rows if r["metric"] == "share" and r["kind"] not in READ_ONLY]
    return bool(written) and all(abs(row["value"]) <= NEGLIGIBLE for row in written)


def beyond_controls(
    share: Sequence[Estimate],
    controls: Float[Tensor, "control component"],
    kinds: Sequence[str],
) -> list[float]:
    """One-sided p that each share is above what another random change would have.

    Random changes differ from each other more than texts do. A few of them tell the spread of one
    component badly: at least the mean spread of all of its kind is used, and the degrees of freedom
    are those of the few. NaN, and no test, for a component that is the same everywhere.

    >>> found = Estimate(0.5, 0.4, 0.6, 0.05, 20)
    >>> p = beyond_controls([found], torch.tensor([[0.1], [0.12], [0.08]]), ["mlp"])
    >>> p[0] < 0.05
    True
    """
    k = len(controls)
    means, spread = controls.double().mean(0), controls.double().var(0) * (1 + 1 / k)
    # Of those that vary: what is 0 everywhere would hide how much the others do.
    varying: dict[str, list[float]] = {}
    for kind, variance in zip(kinds, spread.tolist(), strict=True):
        varying.setdefault(kind, []).extend([variance] if variance > ROUNDING**2 else [])
    typical = {kind: sum(some) / len(some) if some else 0.0 for kind, some in varying.items()}
    found = []
    for one, kind, mean, variance in zip(
        share, kinds, means.tolist(), spread.tolist(), strict=True
    ):
        is_same = abs(one.value - mean) <= ROUNDING and variance <= ROUNDING**2
        se = math.sqrt(max(variance, typical[kind]) + one.se**2) if one.se >= 0 else math.nan
        above = (one.value - mean) / se if se else math.nan
        found.append(math.nan if is_same else float(stats.t.sf(above, k - 1)))
    return found


def _row(part: Component, metric: str, found: Estimate, p: float = math.nan) -> Row:
    return {**part._asdict(), "metric": metric, **found._asdict(), "p": p}


# Verified: put into the base alone


class _Chosen(NamedTuple):
    """Components that are put into the base: those that write most of the change, and others."""

    leading: list[Component]
    others: list[Component]

    @property
    def all(self) -> list[Component]:
        """Both."""
        return [*self.leading, *self.others]


def _chosen(components: Sequence[Component], sums: _Sums, n: int, seed: int) -> _Chosen:
    written = sums.written.sum(0).abs().tolist()
    able = [i for i, one in enumerate(components) if one.kind in VERIFIABLE]
    order = sorted(able, key=lambda i: -written[i])
    leading, rest = order[:n], sorted(order[n:])
    generator = torch.Generator().manual_seed(seed)
    drawn = sorted(torch.randperm(len(rest), generator=generator)[:n].tolist())
    return _Chosen([components[i] for i in leading], [components[rest[i]] for i in drawn])


def _effects(
    base: ComponentMap,
    tuned: ComponentMap,
    decisions: Decisions,
    chosen: Sequence[Component],
    run: _Run,
) -> Sums:
    """How far the difference of logits moves in the base with one component of the tuned model."""
    total = torch.zeros(run.corpus.n_units, len(chosen), dtype=torch.float64)
    model = base.loaded.hooked
    for texts in run.batches(input_device(model), "verifying"):
        rows, where = decisions.of(texts)
        if rows.start == rows.stop:
            continue
        states = [_state(of, texts, chosen) for of in (base, tuned)]
        if texts.first == 0:
            check_resumes(model, texts.tokens, texts.mask, states[0].stream)
        own = _margins(model, _normed(model, states[0].stream[-1])[where], decisions, rows)
        effects = []
        for one in chosen:
            site, value = _replacement(one, base, tuned, *states)
            read_by = model, texts.tokens, texts.mask, states[0].stream
            normed = run_patched(*read_by, site, value)[where]
            check_finite(f"the base model with {label(one)} of the tuned model", normed)
            effects.append(_margins(model, normed, decisions, rows) - own)
        total += run.summed(torch.stack(effects, -1), decisions.text[rows])
    return total


class _State(NamedTuple):
    """A model's activations on some texts.

    Attributes:
        stream: all residual layers.
        sites: at the branches asked for.
        inside: by ("z", block) and ("y", block), what enters and leaves output projections; and
            "position", what the table of positions gives.
    """

    stream: list[Float[Tensor, "batch pos d_model"]]
    sites: Mapping[Site, Float[Tensor, "batch pos d_model"]]
    inside: Mapping[Any, Tensor]


def _state(of: ComponentMap, texts: _Texts, chosen: Sequence[Component]) -> _State:
    inside: dict[Any, Tensor] = {}

    def keep(key: Any) -> Callable[[Tensor], None]:
        def change(value: Tensor) -> None:
            inside[key] = value.detach()

        return change

    wanted = {Site(_SITES[one.kind], one.block) for one in chosen if one.kind in _SITES}
    with ExitStack() as hooks:
        if of.position_table is not None:
            hooks.enter_context(on_output(of.position_table, keep("position")))
        for block in {one.block for one in chosen if one.kind == "head"}:
            projection = of.heads[block].projection
            hooks.enter_context(on_input(projection, keep(("z", block))))
            hooks.enter_context(on_output(projection, keep(("y", block))))
        stream, sites = read(of.loaded.hooked, texts.tokens, texts.mask, sorted(wanted))
    return _State(stream, sites, inside)


_SITES: Any = {"attention": "attn_out", "mlp": "mlp_out"}


def _replacement(
    one: Component, base: ComponentMap, tuned: ComponentMap, own: _State, other: _State
) -> tuple[Site, Float[Tensor, "batch pos d_model"]]:
    """Where the base gets another activation, and which, to have the tuned model's component."""
    if one.kind in _SITES:
        site = Site(_SITES[one.kind], one.block)
        return site, other.sites[site]
    if one.kind in ("embedding", "position"):
        site = Site("resid_pre", 0)
        if "position" not in own.inside:
            return site, other.stream[0]
        here, there = own.inside["position"], other.inside["position"]
        value = own.stream[0] - here + there if one.kind == "position" else other.stream[0]
        return site, value if one.kind == "position" else value - there + here
    heads, source = base.heads[one.block], tuned.heads[one.block]
    with evaluating(base.loaded.hooked), evaluating(tuned.loaded.hooked):
        before = heads.alone(own.inside["z", one.block], one.head)
        after = source.alone(other.inside["z", one.block], one.head)
        value = heads.normed(own.inside["y", one.block] + (after - before))
    return Site("attn_out", one.block), value


def _normed(
    model: HookedModel, last: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    with evaluating(model):
        normed: Tensor = model.ln_final(last)
        return normed


def _margins(
    model: HookedModel, normed: Float[Tensor, "n d_model"], decisions: Decisions, rows: slice
) -> Float[Tensor, " n"]:
    """Logit of the tuned model's token less that of the base's."""
    plus, minus = (x[rows].to(normed.device) for x in (decisions.tuned, decisions.base))
    found = []
    for piece in logit_rows(len(normed), model.cfg.d_vocab, normed.device):
        with evaluating(model):
            logits = float_logits(model, normed[piece]).double()
        row = torch.arange(len(logits), device=logits.device)
        found.append(logits[row, plus[piece]] - logits[row, minus[piece]])
    return torch.cat(found)


def _verified_rows(
    components: Sequence[Component], sums: _Sums, effects: Sums, chosen: _Chosen
) -> list[Row]:
    """Effects, and how well attributions foretell them over the components that were tried."""
    rows = [
        _row(one, "effect", shares.ratio(effects[:, i], sums.n)) for i, one in enumerate(chosen.all)
    ]
    index = torch.tensor([components.index(one) for one in chosen.all])
    written = sums.written[:, index]

    def of_texts(keep: Bool[Tensor, " unit"]) -> tuple[float, float]:
        n = sums.n[keep].sum()
        w, e = (x[keep].sum(0) / n for x in (written, effects))
        return agreement(w, e, float(sums.totals[keep].sum(0).abs().max() / n))

    used = sums.n > 0
    values = of_texts(used)
    without = []
    for unit in used.nonzero()[:, 0].tolist():
        keep = used.clone()
        keep[unit] = False
        without.append(of_texts(keep) if bool(keep.any()) else (math.nan, math.nan))
    for i, metric in enumerate(("rank_correlation", "explained")):
        left_out = torch.tensor([one[i] for one in without], dtype=torch.float64)
        found = jackknife_estimate(values[i], left_out)
        if metric == "rank_correlation":
            found = bounded_correlation(found, len(chosen.all))
        rows.append(_row(ALL, metric, found))
    return rows


def agreement(
    written: Float[Tensor, " component"], effects: Float[Tensor, " component"], size: float
) -> tuple[float, float]:
    """Spearman's correlation of attributions and effects, and how much of the effects they explain.

    Args:
        written, effects: of each component, in logits.
        size: of the differences of logits that the effects are part of.

    Returns:
        Both NaN where no effect is more than rounding: there is no order and no size to explain.

    >>> agreement(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1e-9]), 5.0)
    (nan, nan)
    """
    if not float(effects.abs().max()) > NEGLIGIBLE * size:
        return math.nan, math.nan
    explained = 1 - float((effects - written).square().sum() / effects.square().sum())
    return rho_and_p(written.tolist(), effects.tolist())[0], explained


def bounded_correlation(found: Estimate, n: int) -> Estimate:
    """A rank correlation over n components with its interval over texts within -1 and 1.

    Made on Fisher's scale, artanh, by the delta method: near 1 the error is skewed. No interval
    (NaN) over few components, nor where no text moves the correlation.

    >>> found = bounded_correlation(Estimate(0.9, 0.7, 1.1, 0.1, 20), 12)
    >>> round(found.low, 2), round(found.high, 2)
    (0.4, 0.99)
    """
    if n < FEWEST_RANKED or not found.se > 0:
        return found._replace(low=math.nan, high=math.nan, se=math.nan)
    half = (found.high - found.low) / 2
    if abs(found.value) >= 1:  # infinite on that scale
        return found._replace(low=max(found.low, -1.0), high=min(found.high, 1.0))
    centre, step = math.atanh(found.value), half / (1 - found.value**2)
    return found._replace(low=math.tanh(centre - step), high=math.tanh(centre + step))


# Where heads attend, and where tokens are sent


def _pattern_rows(base: LoadedModel, tuned: LoadedModel, run: _Run) -> list[Row]:
    """Total variation between the two models' attention patterns, per head.

    Beside it, that between each head of the base and the next of the same block.
    """
    moved: dict[int, Tensor] = {}
    apart: dict[int, Tensor] = {}
    n = torch.zeros(run.corpus.n_units, dtype=torch.float64)
    for texts in run.batches(input_device(base.hooked), "attention"):
        both = [attention_patterns(one, texts.tokens, texts.mask) for one in (base, tuned)]
        text = texts.text[texts.counted.cpu()]
        n += run.summed(torch.ones(len(text), 1), text)[:, 0]
        for block, (one, other) in enumerate(zip(*both, strict=True)):
            if one is None or other is None or one.shape != other.shape:
                continue
            for found, x, y in ((moved, one, other), (apart, one, one.roll(-1, 1))):
                distance = (x.float() - y.float()).abs().sum(-1).transpose(1, 2) / 2
                total = run.summed(distance[texts.counted], text)
                found[block] = found[block] + total if block in found else total
    rows = []
    for block, total in moved.items():
        for head in range(total.shape[1]):
            part = Component("head", block, head)
            for metric, values in (
                ("pattern_distance", total),
                ("pattern_distance_of_heads", apart[block]),
            ):
                of_head = shares.ratio(values[:, head], n, within=(0.0, 1.0))
                rows.append(_row(part, metric, of_head))
    return rows


def _routing(base: LoadedModel, tuned: LoadedModel, run: _Run) -> tuple[list[Row], list[Row]]:
    """How many of a token's experts are the same in both models, and every expert's load.

    Beside the overlap stands that with the experts of another token of the text.
    """
    sums: dict[int, dict[str, Tensor]] = {}
    for texts in run.batches(input_device(base.hooked), "experts"):
        both = [expert_choices(one, texts.tokens, texts.mask) for one in (base, tuned)]
        if not any(both[0]):
            return [], []
        text = texts.text[texts.counted.cpu()]
        for block, (one, other) in enumerate(zip(*both, strict=True)):
            if one is None or other is None:
                continue
            total = {
                name: run.summed(values, text)
                for name, values in _routed(one, other, texts).items()
            }
            before = sums.get(block, {})
            sums[block] = {
                name: before[name] + x if name in before else x for name, x in total.items()
            }
    rows: list[Row] = []
    loads: list[Row] = []
    for block, found in sums.items():
        part = Component("mlp", block)
        for metric in ("routing_overlap", "routing_overlap_elsewhere"):
            ratio = shares.ratio(found[metric][:, 0], found["n"][:, 0], within=(0.0, 1.0))
            rows.append(_row(part, metric, ratio))
        rows.append(_row(part, "load_distance", _load_distance(found["base"], found["tuned"])))
        by_expert = [(x.sum(0) / x.sum()).tolist() for x in (found["base"], found["tuned"])]
        for expert, (before, after) in enumerate(zip(*by_expert, strict=True)):
            loads.append({"block": block, "expert": expert, "base": before, "tuned": after})
    return rows, loads


def _routed(base: Routing, tuned: Routing, texts: _Texts) -> dict[str, Float[Tensor, "n column"]]:
    """Per counted token: overlap, overlap with another token, and the experts as 0 and 1."""
    here, there = base.experts[texts.counted], tuned.experts[texts.counted]
    elsewhere = torch.cat(
        [
            of_text[counted].roll(max(1, int(counted.sum()) // 2), 0)
            for of_text, counted in zip(tuned.experts, texts.counted, strict=True)
        ]
    )

    def overlap(other: Int[Tensor, "n k"]) -> Float[Tensor, "n 1"]:
        shared = (here[..., None] == other[..., None, :]).any(-1)
        return shared.double().mean(-1, keepdim=True)

    def load(experts: Int[Tensor, "n k"]) -> Float[Tensor, "n expert"]:
        return torch.nn.functional.one_hot(experts, base.n_experts).sum(1).double()

    return {
        "routing_overlap": overlap(there),
        "routing_overlap_elsewhere": overlap(elsewhere),
        "base": load(here),
        "tuned": load(there),
        "n": torch.ones(len(here), 1, dtype=torch.float64),
    }


def _load_distance(base: Sums, tuned: Sums) -> Estimate:
    """Share of the load that lies on other experts; with a jackknife interval over units."""

    def distance(keep: Bool[Tensor, " unit"]) -> float:
        loads = [x[keep].sum(0) / x[keep].sum() for x in (base, tuned)]
        return float((loads[0] - loads[1]).abs().sum() / 2)

    used = base.sum(-1) > 0
    without = []
    for unit in used.nonzero()[:, 0].tolist():
        keep = used.clone()
        keep[unit] = False
        without.append(distance(keep) if bool(keep.any()) else math.nan)
    return jackknife_estimate(distance(used), torch.tensor(without, dtype=torch.float64))


# The result


_LABELS = {
    "embedding": "token embedding",
    "position": "position embedding",
    "head": "head {head} of block {block}",
    "attention": "attention of block {block}",
    "attention_bias": "biases of block {block}'s attention",
    "mlp": "MLP of block {block}",
    "norm_bias": "bias of the final norm",
    "unembedding_bias": "bias of the unembedding",
    "soft_cap": "soft cap of the logits",
    "reading": "how it is read",
    "remainder": "rounding",
    "all": "all",
}


def label(part: Component) -> str:
    """A component as a reader knows it.

    >>> label(Component("head", 2, 5))
    'head 5 of block 2'
    """
    return _LABELS[part.kind].format(block=part.block, head=part.head)


def _part(row: Mapping[str, Any]) -> Component:
    return Component(row["kind"], row["block"], row["head"])


class AttributionResult(Result):
    """Which components make the decisions that tuning changed.

    The table has a row per component (`kind`, and `block` and `head` where it has them, else -1)
    and metric. Means over changed decisions, in logits: `base` and `tuned`, the component's part
    of the difference (logit of the tuned model's token less that of the base's) in either model,
    and their `change`; `written`, the change of what it writes, read by the mean of both models'
    readouts; `shuffled`, the same with the tokens of other decisions, which were not chosen for
    having changed: random changes write more than that, too. `share` is what is written of the
    whole change; its p, of a share no larger than a random change of the same size has, one-sided,
    Holm-corrected; `control_share` is the mean over those random changes, its `low` and `high`
    their range.
    `effect` is how far the difference moves in the base with the tuned model's component alone.

    Kind "reading" is what is read differently of all components together, "remainder" what
    rounding leaves: `written` of all rows but "all" sums to the change of "all". Of kind "all" are
    also `rank_correlation` (Spearman, attributions against effects) and `explained` (1 - squared
    errors of attributions over squared effects), both NaN where no effect is more than rounding;
    over fewer than 8 components the correlation has no interval. Over all tokens:
    `pattern_distance`, total variation between the two models' attention patterns, and beside it
    `pattern_distance_of_heads`, between this head and the next in the base; of blocks with
    experts `routing_overlap`, the same with another token's (`..._elsewhere`), and
    `load_distance`.

    Extras: how many `decisions`, and how many `changed`; `leading` and `others`, the components
    that were put into the base; `largest_remainder`, in logits; `controls`; `expert_load`.
    """

    name: ClassVar[str] = "attribute"
    title: ClassVar[str] = "Which components make the decisions that tuning changed?"
    columns: ClassVar[tuple[str, ...]] = (
        *("kind", "block", "head", "metric", "value", "low", "high", "se", "n", "p"),
    )

    def leaders(self) -> list[Mapping[str, Any]]:
        """Rows of `share`, of components that write most of the change first.

        None where no component writes anything differently, but for rounding.
        """
        if _writes_nothing(self.table):
            return []
        rows = [row for row in self.rows(metric="share") if row["kind"] in VERIFIABLE]
        return sorted(rows, key=lambda row: -row["value"])

    def beyond(self) -> list[Mapping[str, Any]]:
        """Rows of `share` above those of random changes of the same size (p below 0.05)."""
        return [row for row in self.leaders() if row["p"] < 0.05]

    def _of(self, part: Component, metric: str) -> Mapping[str, Any] | None:
        found = self.rows(**part._asdict(), metric=metric)
        return found[0] if found else None

    def verdicts(self) -> list[Verdict]:
        """What changed, which components it comes from, and whether they do it alone."""
        n, changed = self.extras["decisions"], self.extras["changed"]
        if not changed:
            said = f"The two models' top-1 tokens are the same after all {count(n, 'token')}."
            return [Verdict("components", f"{said} There is nothing to attribute.")]
        return [*self._components(), *self._what(), *self._verified(), *self._inside()]

    def _what(self) -> Iterator[Verdict]:
        n, changed = self.extras["decisions"], self.extras["changed"]
        change, base = (self.at(kind="all", metric=m) for m in ("change", "base"))
        reading = self.at(kind="reading", metric="share")
        yield Verdict(
            "change",
            f"Tuning changed {changed:,} of {n:,} decisions ({percent(changed / n)}). There the "
            f"logit of its token less that of the base's moved by {interval(change, SIGNED)}, from "
            f"{SIGNED(base['value'])}; {interval(reading, SHARE)} of it is another reading of the "
            "same stream (scale of the final norm, unembedding).",
        )

    def _components(self) -> Iterator[Verdict]:
        leaders, beyond = self.leaders(), self.beyond()
        if self.extras["n_units"] < FEWEST:
            few = count(self.extras["n_units"], "text")
            yield Verdict("components", f"Changed decisions in {few} only: too few to name any.")
            return
        if not leaders:
            yield Verdict(
                "components",
                "No component writes anything differently, but for rounding: all of the change is "
                "another reading of the same stream (final norm, unembedding and their biases).",
            )
            return
        first = (beyond or leaders)[0]
        part = _part(first)
        beside = self._of(part, "control_share")
        if beside is None:
            yield Verdict(
                "components",
                f"{_capital(label(part))} writes most of the change, {interval(first, SHARE)}. "
                "Without random changes beside it (n_controls) that may be what any change does.",
                caution=True,
            )
            return
        n = count(beside["n"], "random change")
        theirs = span(beside["low"], beside["high"], SHARE)
        scope = f"{n} of the same size in the same weights: {theirs}"
        if beyond:
            more = f"; {len(beyond)} of {len(leaders)} components write more than they do"
            yield Verdict(
                "components",
                f"{_capital(label(part))} writes {interval(first, SHARE)} of the change "
                f"({scope}; {p_value(first['p'])}){more if len(beyond) > 1 else ''}.",
            )
            return
        yield Verdict(
            "components",
            f"No component writes a larger share of the change than with random changes: the "
            f"largest is {label(part)}'s, {interval(first, SHARE)} ({scope}).",
        )

    def _verified(self) -> Iterator[Verdict]:
        if not self.extras["leading"]:
            return
        rho, explained = (self.at(metric=m) for m in ("rank_correlation", "explained"))
        tried = len(self.extras["leading"]), len(self.extras["others"])
        who = f"Put into the base alone, {tried[0]} leading components and {tried[1]} others"
        if math.isnan(explained["value"]):
            said = f"{who} do not move the decisions, but for rounding."
            yield Verdict("verified", said, caution=True)
            return
        few = sum(tried) < FEWEST_RANKED
        said = (
            f"{who} move the decisions in the order of their attributions with Spearman's ρ "
            f"{interval(rho, SIGNED)}{' (too few components for an interval)' if few else ''}; "
        )
        if explained["value"] > 0:
            said += f"attributions explain {interval(explained, SHARE)} of the effects."
        else:
            said += (
                "their sizes are not foretold: attributions are farther from the effects than 0 is."
            )
        yield Verdict("verified", said, caution=not explained["value"] > 0)

    def _inside(self) -> Iterator[Verdict]:
        moved = self.rows(metric="pattern_distance")
        if moved:
            most = max(moved, key=lambda row: row["value"])
            beside = self.at(**_part(most)._asdict(), metric="pattern_distance_of_heads")
            differ = f"No head attends differently on these texts ({len(moved)} compared)."
            if most["value"] > NEGLIGIBLE:
                differ = (
                    f"{_capital(label(_part(most)))} attends most differently: "
                    f"{interval(most, PERCENT)} of its attention moved (two heads of that block in "
                    f"the base: {PERCENT(beside['value'])} apart)."
                )
            yield Verdict("attention", differ)
        overlap = self.rows(metric="routing_overlap")
        if overlap:
            least = min(overlap, key=lambda row: row["value"])
            part = _part(least)
            beside = self.at(**part._asdict(), metric="routing_overlap_elsewhere")
            yield Verdict(
                "experts",
                f"Tokens are sent to other experts most in block {part.block}: "
                f"{interval(least, PERCENT)} of their experts are the same (those of another token "
                f"of the text: {PERCENT(beside['value'])}).",
            )

    def evidence(self) -> list[Block]:
        """The leading components, attributions against effects, and every component."""
        if not self.table:
            return []
        told = Text(
            "At every decision that tuning changed, the logit of the tuned model's token less that "
            "of the base's is a sum over components, with the scale of the final norm frozen. "
            "Written: the change of what a component writes, read by the mean of both models' "
            "readouts. Direct: what a component does through later ones counts as theirs."
        )
        leading: list[Block] = []
        if leaders := self.leaders():
            leading = [self._chart(), self._table(leaders[:SHOWN])]
        return [
            told,
            *leading,
            *self._against_effect(),
            *self._patterns(),
            *self._experts(),
            Details("every component", [self._table(self._every())]),
        ]

    def _every(self) -> list[Mapping[str, Any]]:
        """Shares of all that is not 0 in both models."""
        rows = self.rows(metric="share")
        return [row for row in rows if not self._is_nothing(_part(row))]

    def _is_nothing(self, part: Component) -> bool:
        of_models = [self._of(part, metric) for metric in ("base", "tuned", "written")]
        return all(row is None or row["value"] == 0 for row in of_models)

    def _chart(self) -> Chart:
        title = "Share of the change that each component writes"
        rows = []
        for row in self.leaders()[:SHOWN]:
            part = _part(row)
            rows.append({"series": "tuned", "component": label(part), **ends(row)})
            beside = self._of(part, "control_share")
            if beside is not None:
                series = "random changes (range)"
                rows.append({"series": series, "component": label(part), **ends(beside)})
        roles: dict[str, Role] = {"tuned": "tuned", "random changes (range)": "control"}
        axes = Axis("value", "share of the change"), Axis("component", "", is_category=True)
        return Chart("dots", title, f"{title}; 95% intervals over texts", rows, *axes, roles)

    def _table(self, rows: Sequence[Mapping[str, Any]]) -> Table:
        forms = {"base": SIGNED, "tuned": SIGNED, "written": SIGNED, "shuffled": SIGNED}
        cells = []
        for row in rows:
            part = _part(row)
            found = {m: self._of(part, m) for m in (*forms, "control_share", "effect")}
            beside = found["control_share"]
            cells.append(
                [
                    label(part),
                    *(_cell(found[m], form, m == "written") for m, form in forms.items()),
                    interval(row, SHARE),
                    MISSING if beside is None else span(beside["low"], beside["high"], SHARE),
                    p_value(row["p"]) or MISSING,
                    _cell(found["effect"], SIGNED, True),
                ]
            )
        head = ["component", "in base", "in tuned", "written", "other tokens", "share",
                "random changes", "p", "alone in base"]  # fmt: skip
        caption = (
            "logits, means over changed decisions; other tokens: what is written for the two "
            "tokens of another decision; p: share above random changes, Holm; alone in base: how "
            "far the base moves with this component of the tuned model"
        )
        return Table(head, cells, caption)

    def _against_effect(self) -> Iterator[Block]:
        leading = {Component(**one) for one in self.extras["leading"]}
        rows = []
        for row in self.rows(metric="effect"):
            part = _part(row)
            written = self.at(**part._asdict(), metric="written")
            series = "leading components" if part in leading else "others, drawn at random"
            rows.append(
                {
                    "series": series,
                    "written": written["value"],
                    "x_low": written["low"],
                    "x_high": written["high"],
                    "component": label(part),
                    **ends(row),
                }
            )
        if rows:
            title = "Attribution against effect, in logits"
            alt = f"{title}: a point for each component put into the base alone"
            axes = Axis("written", "written (attribution)"), Axis("value", "effect alone in base")
            names = ("leading components", "others, drawn at random")
            roles: dict[str, Role] = dict(zip(names, ("tuned", "base"), strict=True))
            yield Chart("points", title, alt, rows, *axes, roles)

    def _patterns(self) -> Iterator[Block]:
        found = self.rows(metric="pattern_distance")
        if found:
            title = "How much of each head's attention moved"
            rows = [{k: row[k] for k in ("block", "head", "value", "low", "high")} for row in found]
            alt = f"{title}: total variation between the two models' patterns, by block and head"
            yield Chart("heatmap", title, alt, rows, Axis("head", "head"), Axis("block", "block"))

    def _experts(self) -> Iterator[Block]:
        found = self.rows(metric="routing_overlap")
        if found:
            rows = []
            for row in found:
                part = _part(row)
                others = [self._of(part, m) for m in ("routing_overlap_elsewhere", "load_distance")]
                cells = [_cell(one, PERCENT, True) for one in (row, *others)]
                rows.append([str(part.block), *cells])
            head = ["block", "experts that are the same", "as another token's", "load moved"]
            yield Table(head, rows, "of each token's experts; of all experts' load")


def _cell(row: Mapping[str, Any] | None, form: Form, with_interval: bool) -> str:
    if row is None:
        return MISSING
    return interval(row, form) if with_interval else form(row["value"])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
