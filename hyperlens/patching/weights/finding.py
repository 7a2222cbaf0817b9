"""The weight transplant as a result: its words, its figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...results.result import Result
from ..directions import BROUGHT, INTO_BASE, INTO_TUNED, TOWARDS
from ..wording import NOTHING_CHANGED, changed_share, share_of, shown
from .named import NAMED

if TYPE_CHECKING:
    import matplotlib.figure

HOST = {INTO_BASE: "base", INTO_TUNED: "tuned"}
DONOR = {INTO_BASE: "tuned", INTO_TUNED: "base"}
WITH = {
    "suffix": "without final norm and unembedding",
    "suffix_and_head": "with final norm and unembedding",
}


@dataclass(frozen=True)
class TransplantResult(Result):
    """What each mixed model decides and writes, beside both models.

    The table has a row per direction, kind, number and metric. Kinds: "suffix" (the last `number`
    blocks), "suffix_and_head" (with final norm and unembedding), "block" (block `number` alone),
    "embedding", "final_norm" and "unembedding" alone, and "all", the latter with number -1; the
    models as they are have the direction "unpatched" and the kind "base" or "tuned". Metrics: see
    `hyperlens.patching.outcomes.METRICS`, and TTR, rep-2, rep-3 of greedy continuations (n counts
    texts, or prompts for these three).

    Extras: `decisions` and how many tuning `changed`; `changed_parts`, in which any weight
    differs; `contrasts`, what is written less what the host or the donor writes, paired, p
    corrected over the models of a direction by Holm; `smallest`, the smallest suffix of every
    direction and kind (number -1 for none).
    """

    name = "transplant"
    columns = ("direction", "kind", "number", "metric", "value", "low", "high", "se", "n")

    def at(self, direction: str, kind: str, metric: str) -> list[Mapping[str, Any]]:
        """One metric of one kind, by number."""
        rows = self.select(direction=direction, kind=kind, metric=metric)
        return sorted(rows, key=lambda row: row["number"])

    def alone(self, direction: str, metric: str) -> list[tuple[str, Mapping[str, Any]]]:
        """(name, row) of every part that moves alone, in the order of the model."""
        blocks = [(f"block {row['number']}", row) for row in self.at(direction, "block", metric)]
        one = {kind: self.at(direction, kind, metric) for kind in NAMED}
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
        said = [changed_share(self.extras)]
        said += self._unchanged()
        for direction in TOWARDS:
            said += [self._smallest(direction), self._of_one_part(direction)]
        return said

    def _unchanged(self) -> list[str]:
        every = [*map(str, range(self.depth)), *NAMED]
        same = [part for part in every if part not in self.extras["changed_parts"]]
        if not same:
            return []
        named = [f"block {part}" if part.isdigit() else part.replace("_", " ") for part in same]
        return [f"Tuning left these parts as they were: {', '.join(named)}."]

    def _smallest(self, direction: str) -> str:
        enough = self.meta["options"]["enough"]
        donor, host = DONOR[direction], HOST[direction]
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
            f"{direction.capitalize()}, the smallest suffix with which the {host} model {what} as "
            f"the {donor} model does (surely more than {enough:.0%} of the changed decisions"
            f"{', and a like TTR' if by_text else ''}): {'; '.join(found)}."
        )

    def _of_one_part(self, direction: str) -> str:
        name, row = max(
            self.alone(direction, TOWARDS[direction]), key=lambda pair: pair[1]["value"]
        )
        return f"{direction.capitalize()}, alone: {name} does most, {share_of(row)}."

    def summary(self) -> str:
        """Both directions by number of last blocks, the parts alone, and what may be said."""
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
        blocks = {row["number"]: row for row in self.at(direction, "block", metric)}
        ttr = {row["number"]: row for row in self.at(direction, "suffix_and_head", "ttr")}
        heads = self.at(direction, "suffix_and_head", metric)
        pairs = list(zip(self.at(direction, "suffix", metric), heads, strict=True))
        for plain, whole in shown(pairs):
            k = plain["number"]
            first = blocks.get(self.depth - k)
            single = f"{self.depth - k}: {share_of(first)}" if first else ""
            text = f"{ttr[k]['value']:.3f}" if k in ttr else ""
            line = f"{k:>3}  {share_of(plain):<25}{share_of(whole):<25}{single:<27}{text:<10}"
            lines.append(line.rstrip())
        others = [
            f"{kind.replace('_', ' ')} {share_of(row)}"
            for kind in (*NAMED, "all")
            for row in self.at(direction, kind, metric)
        ]
        return [*lines, f"alone: {'; '.join(others[:-1])}.", f"all weights: {others[-1][4:]}."]

    def plot(self) -> matplotlib.figure.Figure:
        """Suffixes, single parts, and the diversity of what is written."""
        from .plot import draw

        return draw(self)


def _last(k: int, depth: int) -> str:
    if k == 0:
        return "no block at all"
    blocks = f"block {depth - 1}" if k == 1 else f"blocks {depth - k} to {depth - 1}"
    return f"the last {k} ({blocks})" if k < depth else f"all {depth} blocks"
