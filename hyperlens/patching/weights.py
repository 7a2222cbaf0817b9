"""patch_weights: whose weights are needed to make one model behave as the other?

Activations carry all that happened before them; weights do not. Moving whole parts of the tuned
model into the base, and of the base into the tuned model, shows what parts suffice and what parts
are needed (arXiv 2605.22579 trains the last five blocks alone and takes them for the place of it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch

from ..checks import check_counts, check_seed, check_types
from ..decoding.diversity import REPETITION_METRICS as REPETITION
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import prompt_lengths
from ..errors import PatchError
from ..hooks.loading import LoadedModel, hook
from ..models.kinds import is_peft
from ..models.weight_sharing import merged
from ..offloading import check_is_here
from ..pair import open_inputs
from ..passes.failures import explaining_out_of_memory
from ..render.blocks import Axis, Block, Chart, Grid, Reference, Role, Table, Text, Verdict
from ..render.format import FRACTION, PERCENT, count, ends, interval
from ..results.result import Result, only
from ..results.rows import chosen_layers
from ..statistics import significance
from ..statistics.shares import all_alike, holm_p_values, p_value
from ..statistics.significance import Estimate
from .blocks import NOTHING_CHANGED
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


@check_types
def patch_weights(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    enough: float = 0.9,
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
    check_seed(seed)
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
            "prompt_tokens": prompt_lengths(
                inputs.corpus, generation.prompts if generation else (), prompt_tokens
            ),
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
    check_is_here(loaded.model, "putting weights into another model")
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


# Rows of a table over all suffixes; the last two suffixes are always among them.
MAX_ROWS = 14
MOVED = {
    "suffix": "blocks alone",
    "suffix_and_head": "with norm and unembedding",
}


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

    def along(self, direction: str, kind: str, metric: str) -> list[Row]:
        """One metric of one kind, by number."""
        rows = self.rows(direction=direction, kind=kind, metric=metric)
        return sorted(rows, key=lambda row: row["number"])

    def alone(self, direction: str, metric: str) -> list[tuple[str, Row]]:
        """(name, row) of every part that moves alone, in the order of the model."""
        blocks = [(f"block {row['number']}", row) for row in self.along(direction, "block", metric)]
        others = {
            kind: [(kind.replace("_", " "), row) for row in self.along(direction, kind, metric)]
            for kind in NAMED
        }
        return [*others["embedding"], *blocks, *others["final_norm"], *others["unembedding"]]

    def smallest(self, direction: str, kind: str) -> Row:
        """The smallest suffix of a direction and kind.

        Raises:
            ResultsError: if there is no such direction or kind.
        """
        return only("suffix", self.extras["smallest"], {"direction": direction, "kind": kind})

    @property
    def depth(self) -> int:
        """How many blocks the models have."""
        return int(self.meta["n_layers"])

    def verdicts(self) -> list[Verdict]:
        """The smallest suffix of both directions, and the part that does most alone."""
        if not self.extras["changed"]:
            return [Verdict("weights", NOTHING_CHANGED)]
        caution = (
            "A suffix that suffices is not shown to be the only set of parts that does: only "
            "suffixes and single parts were moved."
        )
        return [
            *(Verdict("smallest suffix", self._suffices(direction)) for direction in TOWARDS),
            Verdict("one part alone", self._most_alone()),
            Verdict("other sets", caution, caution=True),
        ]

    def _suffices(self, direction: str) -> str:
        found = "; ".join(self._smallest(direction, kind, words) for kind, words in WITH.items())
        text = ", and similar TTR" if self.smallest(direction, "suffix")["by_text"] else ""
        return (
            f"{direction.capitalize()}, {found}. To suffice: lower bound above "
            f"{PERCENT(self._enough)} of the changed decisions{text}.{self._too_few()}"
        )

    def _too_few(self) -> str:
        """That even all decisions of all texts could not suffice, where there are too few."""
        n_texts = self.meta["options"]["n_texts"]
        groups = self.meta["corpus"].get("n_groups")
        n_units, unit = (groups, "group") if groups else (int(n_texts), "text")
        low, _ = all_alike(1.0, float(n_units), (0.0, 1.0))
        if low > self._enough:
            return ""
        return (
            f" Of {count(n_units, unit)} no more could be shown than {PERCENT(low)}: read more, "
            "or lower enough."
        )

    def _smallest(self, direction: str, kind: str, words: str) -> str:
        rows = self.along(direction, kind, TOWARDS[direction])
        number = self.smallest(direction, kind)["number"]
        if number >= 0:
            (row,) = (row for row in rows if row["number"] == number)
            verb = ("is needed", "suffices", "suffice")[min(number, 2)]
            return f"{words}, {_last(number, self.depth)} {verb} ({interval(row, PERCENT)})"
        most = max(reversed(rows), key=lambda row: row["value"])
        if most["value"] == 0:
            return f"{words}, no suffix of blocks does anything ({interval(most, PERCENT)})"
        other_text = any(row["low"] > self._enough for row in rows)
        # That none suffices is claimed only where every one is surely below; no interval, no claim.
        is_sure = other_text or all(row["high"] < self._enough for row in rows)
        answer = "no suffix of blocks suffices"
        return (
            f"{words}, {answer if is_sure else 'it cannot be told whether a suffix suffices'} "
            f"(the most: {_last(most['number'], self.depth)}, "
            f"{interval(most, PERCENT)}{', but TTR is not similar' * other_text})"
        )

    def _most_alone(self) -> str:
        found = []
        for direction, metric in TOWARDS.items():
            name, row = max(self.alone(direction, metric), key=lambda pair: pair[1]["value"])
            found.append(f"{direction}, {name} has the highest share ({interval(row, PERCENT)})")
        return f"Of parts that move alone: {'; '.join(found)}.{self._late_parts()}"

    def _late_parts(self) -> str:
        """The last block and the head in the base, one without the other, as in patch_blocks."""
        changed, last = set(self.extras["changed_parts"]), self.depth - 1
        parts = (
            ("the last block", "block", last, {str(last)}),
            ("the head (final norm and unembedding)", "suffix_and_head", 0, {*NAMED[1:]}),
        )
        found = [
            f"{name} alone {interval(row, PERCENT)}"
            for name, kind, number, members in parts
            if members & changed
            for row in self.rows(direction=INTO_BASE, kind=kind, number=number, metric="to_tuned")
        ]
        return f" Tuned into base, {', '.join(found)}." if found else ""

    @property
    def _enough(self) -> float:
        return float(self.meta["options"]["enough"])

    def evidence(self) -> list[Block]:
        """Both directions by number of last blocks, single parts, and generated text."""
        tables = [self._suffixes(direction) for direction in TOWARDS]
        charts = [self._suffix_chart(direction) for direction in TOWARDS]
        generated = [self._text_chart(d) for d in TOWARDS if self.along(d, "suffix", "ttr")]
        return [
            Text(self._what_was_done()),
            *tables,
            self._parts(),
            Grid(charts),
            self._parts_chart(),
            *([Grid(generated)] if generated else []),
        ]

    def _what_was_done(self) -> str:
        changed, decisions = self.extras["changed"], self.extras["decisions"]
        share = f" ({PERCENT(changed / decisions)})" if decisions else ""
        unchanged = self._unchanged()
        return (
            f"Weights of one model are put into the other: its last k of {self.depth} blocks, "
            "with and without the final norm and the unembedding, and every part alone. Unlike an "
            "activation, a block's weights carry nothing of what happened before it. On "
            f"{count(self.meta['options']['n_texts'], 'text')}, tuning changed {changed:,} of "
            f"{count(decisions, 'decision')}{share}; shares are of these."
            + (f" Tuning left these parts as they were: {', '.join(unchanged)}." * bool(unchanged))
        )

    def _unchanged(self) -> list[str]:
        every = [*map(str, range(self.depth)), *NAMED]
        same = [part for part in every if part not in self.extras["changed_parts"]]
        return [f"block {part}" if part.isdigit() else part.replace("_", " ") for part in same]

    def _suffixes(self, direction: str) -> Table:
        metric = TOWARDS[direction]
        blocks = {row["number"]: row for row in self.along(direction, "block", metric)}
        ttr = {row["number"]: row for row in self.along(direction, "suffix_and_head", "ttr")}
        pairs = list(zip(*(self.along(direction, kind, metric) for kind in SUFFIXES), strict=True))
        chosen = [pairs[i] for i in chosen_layers(range(len(pairs)), MAX_ROWS)]
        rows = []
        for plain, with_head in chosen:
            k = plain["number"]
            first = blocks.get(self.depth - k)
            rows.append(
                [
                    str(k),
                    *(interval(row, PERCENT) for row in (plain, with_head)),
                    f"{self.depth - k}: {interval(first, PERCENT)}" if first else "",
                    FRACTION(ttr[k]["value"]) if k in ttr else "",
                ]
            )
        caption = f"{direction}: {BROUGHT[direction]}, 95% over texts"
        if ttr:
            caption += "; greedy TTR: mean over prompts, with norm and unembedding"
        if len(chosen) < len(pairs):
            caption += f"; {len(pairs) - len(chosen)} of {len(pairs)} numbers of blocks left out"
        head = ["last k", *MOVED.values(), "first of them alone", "greedy TTR"]
        return Table(head, rows, caption)

    def _parts(self) -> Table:
        """Everything that is no block; blocks alone stand beside the suffixes."""
        kinds = (*NAMED, "all")
        rows = [
            [
                f"{kind.replace('_', ' ')}{' weights' * (kind == 'all')}",
                *(
                    interval(self.at(direction=d, kind=kind, metric=metric), PERCENT)
                    for d, metric in TOWARDS.items()
                ),
            ]
            for kind in kinds
            if all(self.rows(direction=d, kind=kind, metric=m) for d, m in TOWARDS.items())
        ]
        caption = f"{'; '.join(f'{d}: {what}' for d, what in BROUGHT.items())}; 95% over texts"
        return Table(["one part alone", *TOWARDS], rows, caption)

    def _suffix_chart(self, direction: str) -> Chart:
        enough = self._enough
        line = Reference(f"enough: {PERCENT(enough)}", enough, enough, enough, "control")
        title = f"{direction}: {BROUGHT[direction]}"
        return self._by_number(direction, TOWARDS[direction], title, "share", [line])

    def _text_chart(self, direction: str) -> Chart:
        sides: dict[str, Role] = {self.base_name: "base", self.tuned_name: "tuned"}
        lines = [
            Reference(name, own["value"], own["low"], own["high"], role)
            for name, role in sides.items()
            for own in self.along("unpatched", role, "ttr")
        ]
        title = f"{direction}: TTR of greedy text, mean over prompts"
        return self._by_number(direction, "ttr", title, "TTR", lines)

    def _by_number(
        self, direction: str, metric: str, title: str, y: str, references: Sequence[Reference]
    ) -> Chart:
        rows = [
            _point(row, series) | {"number": row["number"]}
            for kind, series in MOVED.items()
            for row in self.along(direction, kind, metric)
        ]
        last = {row["series"]: PERCENT(row["value"]) for row in rows}
        alt = f"{title}, by number of last blocks; all blocks: " + ", ".join(
            f"{series} {end}" for series, end in last.items()
        )
        roles: dict[str, Role] = dict.fromkeys(MOVED.values(), "other")
        axes = Axis("number", "last k blocks"), Axis("value", y, "share")
        return Chart("lines", title, alt, rows, *axes, roles, references)

    def _parts_chart(self) -> Chart:
        rows = [
            _point(row, direction) | {"part": name}
            for direction, metric in TOWARDS.items()
            for name, row in self.alone(direction, metric)
        ]
        title = "Changed decisions that one part alone brings about or undoes, 95% intervals"
        roles: dict[str, Role] = dict.fromkeys(TOWARDS, "other")
        axes = Axis("value", "share", "share"), Axis("part", "", is_category=True)
        return Chart("dots", title, title, rows, *axes, roles)


def _point(row: Row, series: str) -> dict[str, Any]:
    return {"series": series, **ends(row)}


def _last(k: int, depth: int) -> str:
    """The last k blocks by name.

    >>> _last(0, 5), _last(1, 5), _last(2, 5), _last(5, 5)
    ('no block at all', 'the last block (4)', 'the last 2 blocks (3 to 4)', 'all 5 blocks')
    """
    if k == 0:
        return "no block at all"
    if k == 1:
        return f"the last block ({depth - 1})"
    return f"the last {k} blocks ({depth - k} to {depth - 1})" if k < depth else f"all {k} blocks"
