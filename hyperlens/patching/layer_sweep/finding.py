"""The layer sweep as a result: its words, its figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...results.result import Result
from ..directions import BROUGHT, INTO_BASE, INTO_TUNED, TOWARDS
from ..wording import NOTHING_CHANGED, changed_share, share_of, shown, signed_share

if TYPE_CHECKING:
    import matplotlib.figure

WRITTEN = ("ttr", "rep_2", "rep_3")


@dataclass(frozen=True)
class BlocksResult(Result):
    """What each patched model decides and writes, beside both models and the placebos.

    The table has a row per direction, site, activation ("donor" or a placebo) and metric; the
    models as they are have the direction "unpatched" and layer -1. Metrics: see
    `hyperlens.patching.outcomes.METRICS`, and TTR, rep-2, rep-3 of greedy continuations (n counts
    texts, or prompts for these three).

    Extras: `decisions` and how many tuning `changed`; `contrasts`, donor less placebo (or less
    the unpatched host, for what is written), paired, p corrected over the sites by Holm;
    `two_by_two` and `effects`, for every cut between blocks.
    """

    name = "patching"
    columns = (
        *("direction", "layer", "site", "block", "activation", "metric"),
        *("value", "low", "high", "se", "n"),
    )

    def at(self, direction: str, metric: str, activation: str = "donor") -> list[Mapping[str, Any]]:
        """One metric along the sites."""
        return self.select(direction=direction, activation=activation, metric=metric)

    def unpatched(self, model: str, metric: str) -> Mapping[str, Any] | None:
        """A metric of the base or the tuned model as it is; None if it was not measured."""
        rows = self.at("unpatched", metric, model)
        return rows[0] if rows else None

    @property
    def activations(self) -> list[str]:
        """What was put in, the donor's own first."""
        found = (r["activation"] for r in self.table if r["direction"] != "unpatched")
        return list(dict.fromkeys(found))

    def contrasts(self, direction: str, metric: str) -> list[Mapping[str, Any]]:
        """Donor less placebo along the sites, for every placebo."""
        every = self.extras["contrasts"]
        return [c for c in every if c["direction"] == direction and c["metric"] == metric]

    def effect(self, effect: str, metric: str = "to_tuned") -> list[Mapping[str, Any]]:
        """One effect of the 2 x 2 along the cuts."""
        every = self.extras["effects"]
        return [e for e in every if e["effect"] == effect and e["metric"] == metric]

    def beats_placebos(self, direction: str, layer: int) -> bool | None:
        """Whether the donor brings about more than every placebo (corrected p < 0.05)."""
        rows = [c for c in self.contrasts(direction, TOWARDS[direction]) if c["layer"] == layer]
        if not rows or any(not math.isfinite(row["p"]) for row in rows):
            return None
        return all(row["p"] < 0.05 and row["value"] > 0 for row in rows)

    def conclusions(self) -> list[str]:
        """What the intervals allow to say."""
        if not self.extras["changed"]:
            return [NOTHING_CHANGED]
        said = [changed_share(self.extras)]
        said += self._of_the_cut()
        said += self._of_generation()
        return said

    def _of_the_cut(self) -> list[str]:
        cut = self.meta["n_layers"] - 1
        if cut not in {e["layer"] for e in self.extras["effects"]}:
            return []
        four = {c["cell"]: c for c in self.extras["two_by_two"]
                if c["layer"] == cut and c["metric"] == "to_tuned"}  # fmt: skip
        (gap,) = [e for e in self.effect("stack - state") if e["layer"] == cut]
        (both,) = [e for e in self.effect("interaction") if e["layer"] == cut]
        if gap["low"] > 0:
            more = "the last block and the head matter more than all before them"
        elif gap["high"] < 0:
            more = "what happens before the last block matters more than the last block"
        else:
            more = "which of the two matters more cannot be told"
        said = [
            f"At the cut before the last block (layer {cut}): the tuned model's last block and "
            f"head, on the base's state, bring about {share_of(four['tuned_stack'])}; the tuned "
            f"model's state, in the base's last block and head, {share_of(four['tuned_state'])}. "
            f"By themselves, {more} (difference {signed_share(gap)})."
        ]
        if both["low"] > 0 or both["high"] < 0:
            way = "more than the sum of" if both["low"] > 0 else "less than the sum of"
            said.append(
                f"Together they do {way} what each does alone (interaction {signed_share(both)}): "
                "neither share is all of its part."
            )
        return said

    def _of_generation(self) -> list[str]:
        said = []
        for direction, host, donor in (
            (INTO_BASE, "base", "tuned"),
            (INTO_TUNED, "tuned", "base"),
        ):
            rows, own = self.at(direction, "ttr"), self.unpatched(host, "ttr")
            theirs = self.unpatched(donor, "ttr")
            if rows and own and theirs:
                last = rows[-1]
                said.append(
                    f"Free-running, {direction} at {self._where(last)}: type-token ratio "
                    f"{last['value']:.3f} [{last['low']:.3f}, {last['high']:.3f}]; the {host} "
                    f"model by itself {own['value']:.3f}, the {donor} model {theirs['value']:.3f}."
                )
        return said

    def _where(self, row: Mapping[str, Any]) -> str:
        if row["layer"] < 0:
            return "the final norm"
        is_last = row["layer"] == self.meta["n_layers"]
        return "the last layer" if is_last else f"layer {row['layer']}"

    def summary(self) -> str:
        """Both directions along the layers, the 2 x 2, and what they allow to say."""
        options = self.meta["options"]
        where = "all positions" if options["positions"] is None else options["positions"]
        lines = [
            f"patching  {self.meta['base']['name']} → {self.meta['tuned']['name']}",
            f"{options['site']} of one model put into the other, {where}, "
            f"{options['n_texts']} texts",
            "",
        ]
        for direction in TOWARDS:
            lines += [*self._sweep(direction), ""]
        if self.extras["effects"]:
            lines += [*self._cuts(), ""]
        lines += [
            *self.conclusions(),
            "A patch of a layer carries all that came before it: read where the shares change from "
            "one layer to the next.",
            *(f"note: {note}" for note in self.meta["notes"]),
        ]
        return "\n".join(lines)

    def _sweep(self, direction: str) -> list[str]:
        metric = TOWARDS[direction]
        placebos = [name for name in self.activations if name != "donor"]
        ttr = {row["layer"]: row for row in self.at(direction, "ttr")}
        head = f"{direction}: {BROUGHT[direction]}"
        lines = [
            head,
            f"{'layer':>5}  {'donor [95%]':<26}{'greatest placebo':<18}{'greedy TTR':<10}",
        ]
        for row in shown(self.at(direction, metric)):
            others = [
                other["value"]
                for name in placebos
                for other in self.at(direction, metric, name)
                if other["layer"] == row["layer"]
            ]
            beats = {True: "  beyond all", False: "", None: ""}[
                self.beats_placebos(direction, row["layer"])
            ]
            greatest = f"{max(others):.1%}{beats}" if others else ""
            text = f"{ttr[row['layer']]['value']:.3f}" if row["layer"] in ttr else ""
            line = f"{place(row):>5}  {share_of(row):<26}{greatest:<18}{text:<10}"
            lines.append(line.rstrip())
        return lines

    def _cuts(self) -> list[str]:
        lines = [
            "2 x 2 of every cut: effects on the share that are the tuned model's, points",
            f"{'cut':>5}  {'state before it':<26}{'stack after it':<26}{'interaction':<26}",
        ]
        columns = [self.effect(name) for name in ("state", "stack", "interaction")]
        for rows in shown(list(zip(*columns, strict=True))):
            cells = "".join(f"{signed_share(row):<26}" for row in rows)
            lines.append(f"{rows[0]['layer']:>5}  {cells}".rstrip())
        return lines

    def plot(self) -> matplotlib.figure.Figure:
        """Decisions brought about along the layers, the 2 x 2, and what is written."""
        from .plot import draw

        return draw(self)


def place(row: Mapping[str, Any]) -> str:
    """The layer of a row, or the norm."""
    return "norm" if row["layer"] < 0 else str(row["layer"])
