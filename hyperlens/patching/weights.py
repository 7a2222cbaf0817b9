"""patch_weights: whose weights are needed to make one model behave as the other?

Activations carry all that happened before them; weights do not. Moving whole parts of the tuned
model into the base, and of the base into the tuned model, shows what parts suffice and what parts
are needed (arXiv 2605.22579 trains the last five blocks alone and takes them for the place of it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from matplotlib.ticker import MaxNLocator

from ..checks import check_counts
from ..decoding.diversity import REPETITION_METRICS as REPETITION
from ..decoding.generate import GenerationRunner
from ..errors import PatchError
from ..hooks.loading import LoadedModel, hook
from ..models.kinds import is_peft
from ..models.weight_sharing import merged
from ..pair import open_inputs
from ..passes.failures import explaining_out_of_memory
from ..render.plots import GREY, NotebookFigure, plain_frame
from ..results.result import Result
from ..statistics import significance
from ..statistics.ratios import holm_p_values, p_value
from ..statistics.significance import Estimate
from .blocks import COLOURS, LABELS
from .engine import (
    Outcomes,
    Repetition,
    draw_texts,
    greedy_generation,
    patched_repetition,
)
from .outcomes import (
    BROUGHT,
    DIRECTIONS,
    INTO_BASE,
    METRICS,
    RENAMED,
    SIDES,
    SOURCE,
    TARGET,
    TOWARDS,
    Side,
)
from .parts import (
    NAMED,
    Key,
    MixedModel,
    Target,
    key_of,
    mixed_models,
    moved,
    read_mixed,
    targets,
)
from .wording import NOTHING_CHANGED, changed_share, share_of, shown

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

SUFFIXES = ("suffix", "suffix_and_head")
# Text must lie closer to the source's than this share of what tuning changed.
OF_THE_CHANGE = 0.5
# Rounding leaves models of equal weights no further apart than this, nats.
ALIKE = 1e-4
WITH = {
    "suffix": "without final norm and unembedding",
    "suffix_and_head": "with final norm and unembedding",
}

Row = Mapping[str, Any]


def patch_weights(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    enough: float = 0.9,
    n_texts: int = 64,
    max_length: int = 128,
    n_prompts: int = 16,
    prompt_tokens: int = 17,
    max_new_tokens: int = 48,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> WeightsResult:
    """Move parts of either model into the other: the last k blocks, every k, and each part alone.

    The last k blocks move with and without the final norm and the unembedding. Decisions of a
    mixed model are read teacher-forced; its text is generated greedily. Parts that tuning left as
    they were are not moved, so that mixed models with the same weights are run only once.

    The smallest suffix that reproduces the behaviour is the one of fewest blocks for which the 95%
    interval of the recovered share of changed decisions lies above `enough`, and, where text was
    generated and tuning changed its type-token ratio (TTR), for which the interval of the TTR's
    difference to the source model contains 0 and reaches no further from it than half of what
    tuning changed. There may be none.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; or an open `Pair`.
            Adapters are merged.
        texts: what `compare_models` takes.
        enough: the share of changed decisions, from 0 to 1, that a suffix must recover: the lower
            end of the interval counts.
        n_texts: how many texts are read, drawn at random.
        max_length: tokens per text.
        n_prompts, prompt_tokens, max_new_tokens: of the greedy generations; 0 new tokens generates
            none, which saves most of the time.
        batch_size: texts, or prompts, per forward pass; does not change the result.
        seed: of the choice of texts and prompts.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        PatchError: if the models are of different architectures, blocks pass on more than the
            residual stream, or `enough` is no share.
        HyperlensError: if a source cannot be opened, or the texts do not fit the models.
    """
    if not 0 < enough < 1:
        raise PatchError(f"enough is a share of decisions between 0 and 1; got {enough}")
    check_counts(n_texts=n_texts, batch_size=batch_size)
    inputs = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    inputs = draw_texts(inputs, n_texts, seed)
    pair = inputs.pair
    generation = greedy_generation(
        pair,
        inputs.corpus,
        n_prompts=n_prompts,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    of = targets(_plain(pair.base), _plain(pair.tuned))
    n_blocks = pair.base.hooked.cfg.n_layers
    moves = [mixed for direction in DIRECTIONS for mixed in mixed_models(direction, n_blocks)]
    keys = list(dict.fromkeys(key_of(mixed, of) for mixed in moves))
    with explaining_out_of_memory(batch_size, ", or max_length"):
        outcomes = read_mixed(of, keys, inputs.corpus, batch_size, progress)
    repetition = _repetition(generation, of, keys, progress)
    meta = inputs.metadata(
        seed=seed,
        options={
            "enough": enough,
            "n_texts": len(inputs.corpus.sequences),
            "max_length": max_length,
            "n_prompts": len(generation.prompts) if generation else 0,
            "prompt_tokens": prompt_tokens,
            "max_new_tokens": max_new_tokens,
        },
        notes=list(_notes(pair.base, pair.tuned, of, outcomes)),
    )
    contrasts = list(_contrasts(moves, of, repetition))
    table = (*_rows(moves, of, outcomes), *_repetition_rows(moves, of, repetition))
    smallest = smallest_suffixes(table, contrasts, enough)
    extras = outcomes.models["base"].counts() | {
        "changed_parts": sorted(map(str, of[INTO_BASE].changed), key=_part_order),
        "contrasts": contrasts,
        "smallest": [suffix._asdict() for suffix in smallest],
    }
    return WeightsResult(table, extras, meta)


def _plain(loaded: LoadedModel) -> LoadedModel:
    """The model itself, or with its adapter merged."""
    if not is_peft(loaded.model):
        return loaded
    return hook(replace(loaded, model=merged(loaded.model)), "residual")


def _part_order(part: str) -> tuple[int, int]:
    return (1, NAMED.index(part)) if part in NAMED else (0, int(part))


def _notes(
    base: LoadedModel, tuned: LoadedModel, of: Mapping[str, Target], outcomes: Outcomes[Key]
) -> Iterator[str]:
    if any(is_peft(loaded.model) for loaded in (base, tuned)):
        yield "the adapter was merged: weights move between plain models"
    everything = outcomes.patched[INTO_BASE, of[INTO_BASE].changed]
    left = everything.estimate("kl_tuned").value
    if left > ALIKE:
        yield (
            f"with all weights of the tuned model the base is still {left:.2g} nats away from it: "
            "the two differ in more than their weights (in their configurations)"
        )


def _rows(
    moves: Sequence[MixedModel], of: Mapping[str, Target], outcomes: Outcomes[Key]
) -> Iterator[Row]:
    for side, outcome in outcomes.models.items():
        for metric in METRICS:
            yield _row("unpatched", side, -1, metric, outcome.estimate(metric))
    for mixed in moves:
        outcome = outcomes.patched[key_of(mixed, of)]
        for metric in METRICS:
            yield _row(*mixed[:3], metric, outcome.estimate(metric))


def _row(direction: str, kind: str, number: int, metric: str, estimate: Estimate) -> dict[str, Any]:
    return {
        "direction": direction,
        "kind": kind,
        "number": number,
        "metric": metric,
    } | estimate._asdict()


def _repetition(
    generation: GenerationRunner | None,
    of: Mapping[str, Target],
    keys: Sequence[Key],
    progress: bool,
) -> dict[Key | Side, Repetition]:
    """Repetition of greedy text of every mixed model, and of both unpatched models."""

    def patch(key: Key) -> tuple[LoadedModel, AbstractContextManager[None]]:
        target = of[key[0]]
        return target.loaded, moved(target.slots, key[1])

    models: dict[Side, LoadedModel] = {
        TARGET[direction]: target.loaded for direction, target in of.items()
    }
    mixed = [key for key in keys if key[1]]
    found = patched_repetition(generation, models, mixed, patch, progress)
    # Without a moved part it is the target itself.
    unmoved: dict[Key | Side, Repetition] = {
        (direction, frozenset()): found[TARGET[direction]] for direction in DIRECTIONS if found
    }
    return found | unmoved


def _repetition_rows(
    moves: Sequence[MixedModel],
    of: Mapping[str, Target],
    repetition: Mapping[Key | Side, Repetition],
) -> Iterator[Row]:
    if not repetition:
        return
    for side in SIDES:
        for metric in REPETITION:
            mean = significance.estimate(repetition[side][metric])
            yield _row("unpatched", side, -1, metric, mean)
    for mixed in moves:
        metrics = repetition[key_of(mixed, of)]
        for metric in REPETITION:
            yield _row(*mixed[:3], metric, significance.estimate(metrics[metric]))


def _contrasts(
    moves: Sequence[MixedModel],
    of: Mapping[str, Target],
    repetition: Mapping[Key | Side, Repetition],
) -> Iterator[Row]:
    """Repetition of mixed models less that of target and source, paired by prompt.

    p is corrected over the different models of a direction (Holm). The source model itself is the
    first row of each.
    """
    if not repetition:
        return
    for direction in DIRECTIONS:
        those = [mixed for mixed in moves if mixed.direction == direction]
        keys = list(dict.fromkeys(key_of(mixed, of) for mixed in those))
        for metric in REPETITION:
            models = {
                "target": repetition[TARGET[direction]][metric],
                "source": repetition[SOURCE[direction]][metric],
            }
            change = significance.difference(models["source"], models["target"])
            yield _row(direction, "source", -1, metric, change) | {
                "against": "target",
                "p": p_value(change),
            }
            for against, values in models.items():
                differences = {
                    key: significance.difference(repetition[key][metric], values) for key in keys
                }
                p_of = dict(zip(keys, holm_p_values(differences.values()), strict=True))
                for mixed in those:
                    key = key_of(mixed, of)
                    row = _row(*mixed[:3], metric, differences[key])
                    yield row | {"against": against, "p": p_of[key]}


# The smallest suffix


class Suffix(NamedTuple):
    """The smallest suffix of one direction and kind.

    Attributes:
        direction, kind: as in the table.
        number: its blocks; -1 if no suffix suffices.
        by_text: whether its text was compared, too; not where none was generated, nor where the
            two models' TTR does not differ.
    """

    direction: str
    kind: str
    number: int
    by_text: bool


def smallest_suffixes(
    table: Sequence[Row], contrasts: Sequence[Row], enough: float
) -> Iterator[Suffix]:
    """The smallest suffix of every direction, without and with the head.

    Args:
        table, contrasts: of a `WeightsResult`.
        enough: the interval of the recovered share must lie above it.
    """
    for direction, metric in TOWARDS.items():
        change = next(iter(_ttr(contrasts, direction, "source", "target")), None)
        by_text = change is not None and (change["low"] > 0 or change["high"] < 0)
        margin = OF_THE_CHANGE * abs(change["value"]) if change is not None else math.nan
        for kind in SUFFIXES:
            ttr = {row["number"]: row for row in _ttr(contrasts, direction, kind, "source")}
            fit = (
                row["number"]
                for row in table
                if (row["direction"], row["kind"], row["metric"]) == (direction, kind, metric)
                and row["low"] > enough
                and (not by_text or close(ttr[row["number"]], margin))
            )
            yield Suffix(direction, kind, min(fit, default=-1), by_text)


def close(difference: Row, margin: float) -> bool:
    """Whether an interval contains 0 and stays within a margin of it.

    >>> close({"low": -0.1, "high": 0.2}, margin=0.2)
    True
    """
    return bool(-margin <= difference["low"] <= 0 <= difference["high"] <= margin)


def _ttr(contrasts: Sequence[Row], direction: str, kind: str, against: str) -> list[Row]:
    wanted = {"direction": direction, "kind": kind, "against": against, "metric": "ttr"}
    return [row for row in contrasts if all(row[key] == value for key, value in wanted.items())]


# The result


@dataclass(frozen=True)
class WeightsResult(Result):
    """What each mixed model decides and generates, next to both models.

    The table has a row per direction, kind, number and metric. Kinds: "suffix" (the last `number`
    blocks), "suffix_and_head" (with final norm and unembedding), "block" (block `number` alone),
    "embedding", "final_norm" and "unembedding" alone, and "all", the latter with number -1; the
    models as they are have the direction "unpatched" and the kind "base" or "tuned". Metrics: see
    `hyperlens.patching.outcomes.METRICS`, and TTR, rep-2, rep-3 of greedy text (n counts texts,
    or prompts for these three).

    Extras: `decisions` and how many tuning `changed`; `changed_parts`, in which any weight
    differs; `contrasts`, repetition less that of the target or the source model, paired, p
    corrected over the models of a direction by Holm; `smallest`, the smallest suffix of every
    direction and kind (number -1 for none).
    """

    name = "patch_weights"
    title = "Which weights are needed?"
    old_names: ClassVar[tuple[str, ...]] = ("transplant",)
    renamed: ClassVar[Mapping[str, str]] = {**RENAMED, "host": "target", "donor": "source"}
    columns = ("direction", "kind", "number", "metric", "value", "low", "high", "se", "n")

    def along(self, direction: str, kind: str, metric: str) -> list[Mapping[str, Any]]:
        """One metric of one kind, by number."""
        rows = self.rows(direction=direction, kind=kind, metric=metric)
        return sorted(rows, key=lambda row: row["number"])

    def alone(self, direction: str, metric: str) -> list[tuple[str, Mapping[str, Any]]]:
        """(name, row) of every part that moves alone, in the order of the model."""
        blocks = [(f"block {row['number']}", row) for row in self.along(direction, "block", metric)]
        one = {kind: self.along(direction, kind, metric) for kind in NAMED}
        named = {kind: [(kind.replace("_", " "), row) for row in one[kind]] for kind in NAMED}
        return [*named["embedding"], *blocks, *named["final_norm"], *named["unembedding"]]

    def smallest(self, direction: str, kind: str) -> Mapping[str, Any]:
        """The smallest suffix of a direction and kind."""
        every: list[Mapping[str, Any]] = self.extras["smallest"]
        return next(s for s in every if s["direction"] == direction and s["kind"] == kind)

    @property
    def depth(self) -> int:
        """How many blocks the models have."""
        return int(self.meta["n_layers"])

    def conclusions(self) -> list[str]:
        """What the intervals allow to say."""
        if not self.extras["changed"]:
            return [NOTHING_CHANGED]
        sentences = [changed_share(self.extras)]
        sentences += self._unchanged()
        for direction in TOWARDS:
            sentences += [self._smallest(direction), self._of_one_part(direction)]
        return sentences

    def _unchanged(self) -> list[str]:
        every = [*map(str, range(self.depth)), *NAMED]
        same = [part for part in every if part not in self.extras["changed_parts"]]
        if not same:
            return []
        named = [f"block {part}" if part.isdigit() else part.replace("_", " ") for part in same]
        return [f"Tuning left these parts as they were: {', '.join(named)}."]

    def _smallest(self, direction: str) -> str:
        enough = self.meta["options"]["enough"]
        source, target = SOURCE[direction], TARGET[direction]
        found = []
        for kind, words in WITH.items():
            one = self.smallest(direction, kind)
            if one["number"] < 0:
                found.append(f"{words}, no number of last blocks does")
            else:
                found.append(f"{words}, {_last(one['number'], self.depth)}")
        by_text = self.smallest(direction, "suffix")["by_text"]
        what = "decides and writes" if by_text else "decides"
        return (
            f"{direction.capitalize()}, the smallest suffix with which the {target} model {what} "
            f"as the {source} model does (surely more than {enough:.0%} of the changed decisions"
            f"{', and a like TTR' if by_text else ''}): {'; '.join(found)}."
        )

    def _of_one_part(self, direction: str) -> str:
        name, row = max(
            self.alone(direction, TOWARDS[direction]), key=lambda pair: pair[1]["value"]
        )
        return f"{direction.capitalize()}, alone: {name} does most, {share_of(row)}."

    def summary(self) -> str:
        """Both directions by number of last blocks, the parts alone, and what may be sentences."""
        lines = [
            f"weight transplant  {self.meta['base']['name']} → {self.meta['tuned']['name']}",
            f"the last k of {self.depth} blocks of one model in the other, "
            f"{self.meta['options']['n_texts']} texts",
            "",
        ]
        for direction in TOWARDS:
            lines += [*self._lines(direction), ""]
        lines += [*self.conclusions(), *(f"note: {note}" for note in self.meta["notes"])]
        return "\n".join(lines)

    def _lines(self, direction: str) -> list[str]:
        metric = TOWARDS[direction]
        lines = [
            f"{direction}: {BROUGHT[direction]}",
            f"{'k':>3}  {'blocks alone':<25}{'with norm and unembed':<25}"
            f"{'the first of them alone':<27}{'greedy TTR':<10}",
        ]
        blocks = {row["number"]: row for row in self.along(direction, "block", metric)}
        ttr = {row["number"]: row for row in self.along(direction, "suffix_and_head", "ttr")}
        heads = self.along(direction, "suffix_and_head", metric)
        pairs = list(zip(self.along(direction, "suffix", metric), heads, strict=True))
        for plain, with_head in shown(pairs):
            k = plain["number"]
            first = blocks.get(self.depth - k)
            single = f"{self.depth - k}: {share_of(first)}" if first else ""
            text = f"{ttr[k]['value']:.3f}" if k in ttr else ""
            line = f"{k:>3}  {share_of(plain):<25}{share_of(with_head):<25}{single:<27}{text:<10}"
            lines.append(line.rstrip())
        others = [
            f"{kind.replace('_', ' ')} {share_of(row)}"
            for kind in (*NAMED, "all")
            for row in self.along(direction, kind, metric)
        ]
        return [*lines, f"alone: {'; '.join(others[:-1])}.", f"all weights: {others[-1][4:]}."]

    def plot(self) -> matplotlib.figure.Figure:  # type: ignore[override]
        """Suffixes, single parts, and the diversity of generated text."""
        return draw(self)


def _last(k: int, depth: int) -> str:
    if k == 0:
        return "no block at all"
    blocks = f"block {depth - 1}" if k == 1 else f"blocks {depth - k} to {depth - 1}"
    return f"the last {k} ({blocks})" if k < depth else f"all {depth} blocks"


# The figure


STYLES = {"suffix_and_head": ("-", "o"), "suffix": (":", "s")}


def draw(result: Any) -> matplotlib.figure.Figure:
    """Decisions by number of last blocks, parts alone, and diversity of generated text."""
    panels = [_suffixes, _alone]
    panels += [_generated] if result.along(INTO_BASE, "suffix", "ttr") else []
    figure = NotebookFigure(figsize=(4.7 * len(panels), 4.1), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        panel(ax, result)
        plain_frame(ax)
        ax.legend(frameon=False, fontsize=8)
    return figure


def _suffixes(ax: Axes, result: Any) -> None:
    ax.set_title("changed decisions that ...", loc="left", fontsize=10)
    for direction, metric in TOWARDS.items():
        for kind in STYLES:
            label = LABELS[direction] if kind == "suffix_and_head" else None
            _line(ax, result.along(direction, kind, metric), direction, kind, label)
    enough = result.meta["options"]["enough"]
    ax.axhline(enough, color=GREY, lw=0.8, ls="--", label=f"enough: {enough:.0%}")
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    _blocks_axis(ax)


def _alone(ax: Axes, result: Any) -> None:
    ax.set_title("... by one part alone", loc="left", fontsize=10)
    names = [name for name, _ in result.alone(INTO_BASE, "to_tuned")]
    for shift, (direction, metric) in zip((-0.2, 0.2), TOWARDS.items(), strict=True):
        rows = [row for _, row in result.alone(direction, metric)]
        places = [i + shift for i in range(len(rows))]
        values = [0.0 if math.isnan(row["value"]) else row["value"] for row in rows]
        ax.bar(places, values, width=0.38, color=COLOURS[direction], label=direction)
        for place, row in zip(places, rows, strict=True):
            if math.isfinite(row["low"]):
                ax.vlines(place, row["low"], row["high"], "black", lw=1)
    ax.set_xticks(range(len(names)), [name.removeprefix("block ") for name in names])
    ax.tick_params(axis="x", rotation=90 if len(names) > 8 else 45, labelsize=8)
    ax.set_xlabel("block (0-based), or other part")
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def _generated(ax: Axes, result: Any) -> None:
    ax.set_title("type-token ratio of greedy text", loc="left", fontsize=10)
    for direction in TOWARDS:
        for kind in STYLES:
            label = direction if kind == "suffix_and_head" else None
            _line(ax, result.along(direction, kind, "ttr"), direction, kind, label)
    for model, style in (("base", "--"), ("tuned", "-.")):
        (own,) = result.along("unpatched", model, "ttr")
        ax.axhline(own["value"], color=GREY, ls=style, lw=1, label=f"the {model} model")
    _blocks_axis(ax)


def _blocks_axis(ax: Axes) -> None:
    ax.set_xlabel("last k blocks (dotted: without final norm and unembedding)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _line(
    ax: Axes, rows: Sequence[Mapping[str, Any]], direction: str, kind: str, label: str | None
) -> None:
    style, marker = STYLES[kind]
    numbers, values = [row["number"] for row in rows], [row["value"] for row in rows]
    ax.plot(numbers, values, ls=style, marker=marker, ms=4, color=COLOURS[direction], label=label)
    if kind == "suffix_and_head":
        low, high = ([row[end] for row in rows] for end in ("low", "high"))
        ax.fill_between(numbers, low, high, color=COLOURS[direction], alpha=0.2, lw=0)
