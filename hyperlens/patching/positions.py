"""patch_positions: at which layer, and from which token, does a changed decision come?

A heat map of layers x positions for two models: at one decision that tuning changed, the residual
of one model at one token and layer is put into the other. Where it moves the decision is where
the effect of tuning sits on its way from the earlier tokens to the last one.

Means over texts are by offset from the decision. A token that stands elsewhere in each text is
looked for by its position and by what token it is (`earlier_tokens`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..checks import check_counts, check_seed, check_types
from ..models.tokenizers import token_names
from ..pair import open_inputs
from ..passes.failures import explaining_out_of_memory
from ..render.blocks import Axis, Block, Chart, Details, Grid, Table, Text, Verdict
from ..render.format import PERCENT, SIGNED, count, ends, interval, one_line, p_value
from ..results.result import Result, matching
from ..results.rows import chosen_layers
from ..statistics.shares import holm_p_values, ratio
from ..statistics.significance import Estimate, wilson
from .earlier_tokens import KINDS, OWN, POSITION, TOKEN, earlier_tokens
from .outcomes import BROUGHT, DIRECTIONS, INTO_BASE, SOURCE, TOWARDS
from .position_cells import EVERY, DrawnDecisions, MapCells, draw_changed, map_positions

# Tokens of the example that are shown before those that were patched.
CONTEXT_TOKENS = 30
# Less than this of the way is shown as nothing.
SMALLEST_SHOWN = 0.005


@check_types
def patch_positions(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    offsets: int = 12,
    n_texts: int = 32,
    max_length: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> PositionsResult:
    """Patch one token's residual at every layer and position before a decision tuning changed.

    In each text one such decision is drawn, and the text is cut there. "Tuned into base" asks
    where the tuned model's residual brings its decision about (denoising), "base into tuned"
    where the base's undoes it (noising). Next to the single positions stands a patch of all
    positions up to the decision. The effect of a cell is the share of decisions that become the
    source's, and how far the logit difference (tuned model's top-1 token less base's) moves from
    the target's towards the source's: 0 for not at all, 1 for all the way.

    Only the blocks after a patch are run again, for several positions and texts at a time.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; or an open `Pair`.
        texts: what `compare_models` takes.
        offsets: how many positions are patched, the last token (offset 0) and those before it.
        n_texts: how many texts, drawn at random, give a decision.
        max_length: tokens per text.
        batch_size: patched texts per forward pass; does not change the result.
        seed: of the choice of texts and decisions.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Raises:
        PatchError: if tuning changed too few decisions, blocks pass on more than the residual
            stream, or the models keep something other than keys and values.
        ActivationError: if a model, or a patched one, overflows.
        HyperlensError: if a source cannot be opened, or the texts do not fit the models.
    """
    check_counts(offsets=offsets, n_texts=n_texts, batch_size=batch_size)
    check_seed(seed)
    inputs = open_inputs(base, tuned, texts, max_length=max_length, device=device, dtype=dtype)
    pair = inputs.pair
    with explaining_out_of_memory(batch_size, ", or max_length"):
        drawn = draw_changed(
            pair,
            inputs.corpus,
            n_texts=n_texts,
            offsets=offsets,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
        cells = map_positions(pair, drawn.texts, offsets, batch_size, progress)
    meta = inputs.metadata(
        seed=seed,
        options={"offsets": offsets, "n_texts": len(drawn.texts), "max_length": max_length},
        notes=drawn.notes(offsets),
    )
    extras = {
        "decisions": len(drawn.texts),
        "looked_at": drawn.n_looked_at,
        "too_short": drawn.n_short,
        "unchanged": drawn.n_same,
        "example": _example(cells, drawn, pair.tokenizer),
        "earlier": [_named(row, pair.tokenizer) for row in earlier_tokens(cells, drawn.texts)],
    }
    return PositionsResult(tuple(_rows(cells)), extras, meta)


def _rows(cells: MapCells) -> Iterator[dict[str, Any]]:
    """Both metrics of every cell; p that nothing moves, corrected over a direction's cells."""
    top_1 = {"base": cells.base_top_1, "tuned": cells.tuned_top_1}
    changed = cells.changed
    for direction in DIRECTIONS:
        moved = cells.moved(direction)
        of_source = top_1[SOURCE[direction]][:, None, None]
        hits = (cells.top_1[direction] == of_source) & changed[:, None, None]
        places = list(itertools.product(range(moved.shape[1]), range(len(cells.offsets))))
        shifts = [ratio(moved[:, *place] * changed, cells.distance) for place in places]
        for place, shift, p in zip(places, shifts, holm_p_values(shifts), strict=True):
            share = _share(int(hits[:, *place].sum()), int(changed.sum()))
            for metric, estimate, its_p in (("recovered", share, math.nan), ("moved", shift, p)):
                layer, column = place
                row = {"direction": direction, "layer": layer, "offset": cells.offsets[column]}
                yield row | {"metric": metric} | estimate._asdict() | {"p": its_p}


def _named(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The same row with the chosen tokens by name."""
    if row["kind"] != TOKEN:
        return row
    names = token_names(tokenizer, [choice["label"] for choice in row["chosen"]])
    chosen = [choice | {"token": name} for choice, name in zip(row["chosen"], names, strict=True)]
    return row | {"chosen": chosen}


def _share(hits: int, n: int) -> Estimate:
    """Of decisions in different texts, with Wilson's interval."""
    value = hits / n if n else math.nan
    return Estimate(value, *wilson(hits, n), math.sqrt(value * (1 - value) / max(n, 1)), n)


def _example(cells: MapCells, drawn: DrawnDecisions, tokenizer: Any) -> dict[str, Any]:
    """The first text that was drawn, cell by cell."""
    offsets = [offset for offset in cells.offsets if offset != EVERY]
    ids = drawn.texts[0].tolist()
    distance = float(cells.distance[0]) or math.nan
    rows = []
    for direction in DIRECTIONS:
        moved = cells.moved(direction)[0] / distance
        top_1 = cells.top_1[direction][0]
        for layer, column in itertools.product(range(len(moved)), range(len(offsets))):
            rows.append(
                {
                    "direction": direction,
                    "layer": layer,
                    "offset": offsets[column],
                    "moved": float(moved[layer, column]),
                    "top_1": token_names(tokenizer, [int(top_1[layer, column])])[0],
                }
            )
    of_models = [int(cells.base_top_1[0]), int(cells.tuned_top_1[0])]
    base_top_1, tuned_top_1 = token_names(tokenizer, of_models)
    before = ids[-CONTEXT_TOKENS - len(offsets) : -len(offsets)]
    return {
        "before": "".join(token_names(tokenizer, before)),
        "tokens": token_names(tokenizer, ids[-len(offsets) :]),
        "base_top_1": base_top_1,
        "tuned_top_1": tuned_top_1,
        "cells": rows,
    }


# The result


@dataclass(frozen=True)
class PositionsResult(Result):
    """What one model's residual at one token and layer does to the other's decision.

    The table has a row per direction, layer (0 for the embedding output, l for the output of
    block l - 1), offset (how many tokens before the last one; -1 for all positions up to the
    decision) and metric: "recovered", the share of decisions that become the source's, and
    "moved", how far the logit difference (tuned model's top-1 token less base's) moves from the
    target's (0) to the source's (1). n counts texts, one decision each; `p` that nothing moves is
    corrected over the cells of a direction (Holm), NaN for "recovered".

    Extras: how many `decisions`; how many texts were `looked_at` to find them, and how many of
    these were `too_short` or had none (`unchanged`); `example`, one text with its tokens;
    `earlier`, what the best position, the best token and each text's own best earlier token do
    where they were not chosen (see `hyperlens.patching.earlier_tokens`).
    """

    name = "patch_positions"
    title = "From which token does a changed decision come?"
    renamed: ClassVar[Mapping[str, str]] = {
        "base_pick": "base_top_1",
        "tuned_pick": "tuned_top_1",
        "choice": "top_1",
    }
    columns = (
        *("direction", "layer", "offset", "metric"),
        *("value", "low", "high", "se", "n", "p"),
    )

    def cell(self, direction: str, layer: int, offset: int, metric: str) -> Mapping[str, Any]:
        """One cell of a map.

        Raises:
            ResultsError: if it was not measured.
        """
        return self.at(direction=direction, layer=layer, offset=offset, metric=metric)

    def column(self, direction: str, offset: int, metric: str) -> list[Mapping[str, Any]]:
        """One position along the layers."""
        return self.rows(direction=direction, offset=offset, metric=metric)

    @property
    def offsets(self) -> list[int]:
        """The positions of single tokens, the earliest first."""
        return list(reversed(range(self.meta["options"]["offsets"])))

    @property
    def n_layers(self) -> int:
        """How many blocks the models have; layers go from 0 to this."""
        return int(self.meta["n_layers"])

    def strongest_earlier(self, direction: str, layer: int) -> Mapping[str, Any] | None:
        """The position before the last token at which the logit difference moves furthest."""
        rows = [
            self.cell(direction, layer, offset, "moved") for offset in self.offsets if offset > 0
        ]
        return max((row for row in rows if row["value"] == row["value"]),
                   key=lambda row: abs(row["value"]), default=None)  # fmt: skip

    def earlier(self, direction: str, kind: str, metric: str) -> Mapping[str, Any] | None:
        """The best "position" or "token", or each text's "own" best; None in version 0.1."""
        wanted = {"direction": direction, "kind": kind, "metric": metric}
        return next(iter(matching(self.extras.get("earlier", []), wanted)), None)

    def arrival(self, direction: str) -> int | None:
        """The first layer from which on the last token alone carries over half (lower bounds)."""
        found = None
        for row in reversed(self.column(direction, 0, "recovered")):
            if not row["low"] > 0.5:
                break
            found = row["layer"]
        return found

    def verdicts(self) -> list[Verdict]:
        """From which layer on the last token carries the decision, and what earlier tokens do."""
        return [
            Verdict("where", answer(direction))
            for direction in TOWARDS
            for answer in (self._of_the_last_token, self._of_earlier_tokens)
        ]

    def _of_the_last_token(self, direction: str) -> str:
        layer, source = self.arrival(direction), SOURCE[direction]
        if layer is None:
            return (
                f"{direction.capitalize()}: at no layer does the last token alone make more than "
                f"half of the decisions the {source} model's with a lower bound above 50%."
            )
        last, every = (
            interval(self.cell(direction, layer, offset, "recovered"), PERCENT)
            for offset in (0, EVERY)
        )
        return (
            f"{direction.capitalize()}: from layer {layer} on, the residual at the last token "
            f"alone makes more than half of the decisions the {source} model's ({last} at layer "
            f"{layer}; all positions together make {every})."
        )

    def _of_earlier_tokens(self, direction: str) -> str:
        cells = [r for r in self.rows(direction=direction, metric="moved") if r["offset"] > 0]
        below = [row for row in cells if row["p"] < 0.05]
        if below:
            best = max(below, key=lambda row: abs(row["value"]))
            found = (
                f"of the offsets before the last token, {count(len(below), 'cell')} of "
                f"{len(cells)} move the decision at a corrected p below 0.05; the furthest is "
                f"{best['offset']} before the last at layer {best['layer']}, "
                f"{interval(best, SIGNED)} of the way."
            )
        else:
            found = (
                "no fixed offset before the last token moves the decision at a corrected p below "
                "0.05."
            )
        return f"{direction.capitalize()}: {found} {self._elsewhere(direction)}"

    def _elsewhere(self, direction: str) -> str:
        """What a token that stands elsewhere in each text does."""
        rows = {kind: self.earlier(direction, kind, "moved") for kind in KINDS}
        fixed = [row for kind in (POSITION, TOKEN) if (row := rows[kind]) is not None]
        own, share = rows[OWN], self.earlier(direction, OWN, "recovered")
        if own is None or share is None:
            return (
                "Effects are means over texts by offset: a token that matters in one text stands "
                "elsewhere in another."
            )
        split = "chosen on one half of the texts and read on the other"
        said = [f"{_chosen(r)} ({_reach(r)})" for r in fixed if r["p"] < 0.05]
        found = (
            f"Wherever it stands, {split}, {' and '.join(said)} does."
            if said
            else f"No fixed position and no fixed token, {split} ({_few(fixed)}), does."
        )
        back = self.meta["options"]["offsets"] - 1
        if not own["n"]:
            return found
        return (
            f"{found} Each text's own best of the last {back} before it, chosen by the opposite "
            f"patch, moves it {interval(own, SIGNED)} of the way and makes "
            f"{interval(share, PERCENT)} of the decisions the {SOURCE[direction]} model's; tokens "
            "further back were not patched one by one."
        )

    def evidence(self) -> list[Block]:
        """Maps of both directions, the layers as tables, and one text."""
        n, looked = self.extras["decisions"], self.extras["looked_at"]
        blocks: list[Block] = [
            Text(
                f"At {count(n, 'decision')} that tuning changed, one per text "
                f"({count(looked, 'text')} looked at), the residual of one model at one token and "
                "layer is put into the other. Moved: how far the logit difference (tuned model's "
                "top-1 token less the base's) goes from the target's (0) to the source's (1). "
                "“all” patches every position up to the decision."
            ),
            Grid([self._map(direction) for direction in TOWARDS]),
            *(self._table(direction) for direction in TOWARDS),
            *([self._earlier_table()] if self.extras.get("earlier") else []),
        ]
        return [*blocks, self._example()]

    def _map(self, direction: str) -> Chart:
        recovered = {
            (row["layer"], row["offset"]): row["value"]
            for row in self.rows(direction=direction, metric="recovered")
        }
        moved = {
            (r["layer"], r["offset"]): r for r in self.rows(direction=direction, metric="moved")
        }
        rows = [
            {
                "layer": layer,
                "position": "all" if offset == EVERY else str(offset),
                **ends(moved[layer, offset]),
                "text": f"{PERCENT(recovered[layer, offset])} become the source's",
            }
            for layer in reversed(range(self.n_layers + 1))
            for offset in (*self.offsets, EVERY)
        ]
        title = f"{direction_name(direction)}: how far the logits move"
        return _heatmap(
            title, f"{title}. {self._of_the_last_token(direction)}", rows, "tokens before the last"
        )

    def _table(self, direction: str) -> Table:
        rows = [
            [
                str(layer),
                interval(self.cell(direction, layer, 0, "recovered"), PERCENT),
                interval(self.cell(direction, layer, 0, "moved"), SIGNED),
                self._furthest(direction, layer),
                interval(self.cell(direction, layer, EVERY, "recovered"), PERCENT),
            ]
            for layer in chosen_layers(range(self.n_layers + 1), MAX_ROWS)
        ]
        head = ["layer", "last token alone", "moved", "an earlier one, at most", "all positions"]
        caption = f"{direction}: {BROUGHT[direction]}, 95% over texts"
        return Table(head, rows, caption)

    def _earlier_table(self) -> Table:
        """Tokens that stand elsewhere in each text."""
        rows = []
        for direction in TOWARDS:
            for kind in KINDS:
                moved, share = (self.earlier(direction, kind, m) for m in ("moved", "recovered"))
                if moved is not None and share is not None:
                    cells = [interval(moved, SIGNED), interval(share, PERCENT), str(moved["n"])]
                    rows.append([direction, _chosen(moved), *cells, p_value(moved["p"])])
        head = ["direction", "an earlier token", "moved", "become the source's", "texts", "p"]
        caption = (
            "position and token: chosen on one half of the texts and read on the other, both ways, "
            "where it is among the patched ones, p Holm-corrected over these; a text's own best: "
            "chosen by the opposite patch, a mean of largest effects and so not tested against 0"
        )
        return Table(head, rows, caption)

    def _furthest(self, direction: str, layer: int) -> str:
        earlier = self.strongest_earlier(direction, layer)
        if earlier is None or abs(earlier["value"]) < SMALLEST_SHOWN:
            return "none"
        return f"{SIGNED(earlier['value'])} ({earlier['offset']} back)"

    def _example(self) -> Details:
        example = self.extras["example"]
        text = one_line(f"{example['before']}{''.join(example['tokens'])}")
        base, tuned = (one_line(example[side]) for side in ("base_top_1", "tuned_top_1"))
        about = Text(f"“{text}” goes on with “{base}” (base) or “{tuned}” (tuned).")
        maps = Grid([self._example_map(direction) for direction in TOWARDS])
        return Details("one of the texts", [about, maps])

    def _example_map(self, direction: str) -> Chart:
        example = self.extras["example"]
        tokens = dict(zip(self.offsets, example["tokens"], strict=True))
        cells = {
            (cell["layer"], cell["offset"]): cell
            for cell in example["cells"]
            if cell["direction"] == direction
        }
        rows = [
            {
                "layer": layer,
                # A token may come twice: its place keeps the columns apart.
                "position": f"{one_line(token)} ({-offset})",
                "value": cells[layer, offset]["moved"],
                "text": one_line(cells[layer, offset]["top_1"]),
            }
            for layer in reversed(range(self.n_layers + 1))
            for offset, token in tokens.items()
        ]
        title = f"that text, {direction}: how far the logits move"
        return _heatmap(title, title, rows, "token")


# Rows of a table in the summary; the last layers are always among them.
MAX_ROWS = 14


def _heatmap(title: str, alt: str, rows: list[dict[str, Any]], x: str) -> Chart:
    return Chart("heatmap", title, alt, rows, Axis("position", x), Axis("layer", "layer"))


def _chosen(row: Mapping[str, Any]) -> str:
    """What was chosen on either half, in words."""
    if row["kind"] == OWN:
        return "each text's own best"
    words = [
        f"{row['kind']} {repr(one['token']) if row['kind'] == TOKEN else one['label']} at layer "
        f"{one['layer']}"
        for one in row["chosen"]
    ]
    return " or ".join(dict.fromkeys(words)) or f"no {row['kind']}"


def _few(rows: Sequence[Mapping[str, Any]]) -> str:
    """In how many texts what was chosen stands at all: where in few, nothing could be found."""
    return f"{' and '.join(count(row['n'], 'text') for row in rows)} that have it"


def _reach(row: Mapping[str, Any]) -> str:
    return f"{interval(row, SIGNED)} of the way, {count(row['n'], 'text')}, {p_value(row['p'])}"


def direction_name(direction: str) -> str:
    """As patching papers call it, too."""
    return f"{direction} ({'denoising' if direction == INTO_BASE else 'noising'})"
