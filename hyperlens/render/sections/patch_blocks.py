"""What each block's activation brings about in the other model, and the 2 x 2 of every cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ..charts import chart, lines
from ..parts import (
    conclusions,
    details,
    grid,
    join,
    notes,
    pair_name,
    paragraph,
    preformatted,
    share,
    table,
    tag,
)
from ..words import number, percent

ORDER = 130
TITLE = "Does it cause the behaviour?"
READS = "patch_blocks"
LOADS = "hyperlens.patching.blocks:BlocksResult"

TOWARDS = {
    "tuned into base": ("to_tuned", "changed decisions that become the tuned model's"),
    "base into tuned": ("to_base", "changed decisions that become the base's again"),
}
NAMES = {
    "source": "the other model's activation",
    "other_text": "control: of another text",
    "random_direction": "control: as far in a random direction",
    "rotated": "control: its change, rotated",
}
CELLS = {
    "base": "base residual, base blocks",
    "tuned_late_blocks": "base residual, tuned blocks",
    "tuned_incoming_residual": "tuned residual, base blocks",
    "tuned": "tuned residual, tuned blocks",
}
EFFECTS = {
    "incoming_residual": "incoming residual",
    "late_blocks": "late blocks",
    "interaction": "interaction",
}


def body(results: Sequence[Any]) -> Markup:
    """Pair after pair."""
    parts = [
        paragraph(
            "An activation of one model is put into the other, at every token, and all blocks "
            "after it run on. A patch of a layer carries all that came before: read where a curve "
            "rises. The 2 x 2 keeps apart whose residual enters the late blocks and whose late "
            "blocks they are; an interaction says that neither does by itself what both do "
            "together."
        )
    ]
    for result in results:
        options = result.meta["options"]
        where = "" if options["positions"] is None else f", positions {options['positions']}"
        what = f"{pair_name(result)}: {options['site']}{where}"
        parts.append(tag("p", what, class_="pairs"))
        parts += [conclusions(result), notes(result)]
        parts.append(grid(*_charts(result)))
        parts += _tables(result)
        parts.append(details("In words", preformatted(result.summary())))
    return join(parts)


def _charts(result: Any) -> list[Markup]:
    drawn = []
    for direction, (metric, what) in TOWARDS.items():
        rows = [
            _point(row, NAMES[activation])
            for activation in result.activations
            for row in result.at(direction, metric, activation)
        ]
        alt = f"{direction}: share of {what}, by layer, next to controls"
        drawn.append(_chart(rows, "share", f"{direction}: {what}", alt))
    if result.extras["effects"]:
        rows = [_point(e, words) for key, words in EFFECTS.items() for e in result.effect(key)]
        alt = (
            "effects of incoming residual and late blocks on the share of the tuned model's, by cut"
        )
        drawn.append(_chart(rows, "effect", "2 x 2: effect on the tuned model's share", alt))
    rows = [_point(r, d) for d in TOWARDS for r in result.at(d, "ttr")]
    if rows:
        own = {name: result.unpatched(name, "ttr") for name in ("base", "tuned")}
        beside = ", ".join(f"the {name} model {number(row['value'])}" for name, row in own.items())
        alt = f"type-token ratio of greedy text by patched layer; {beside}"
        drawn.append(_chart(rows, "TTR", f"type-token ratio of greedy text ({beside})", alt))
    return drawn


def _point(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    kept = {key: row[key] for key in ("layer", "value", "low", "high")}
    return {"pair": name, **kept}


def _chart(rows: list[dict[str, Any]], y: str, title: str, alt: str) -> Markup:
    return chart(lines(rows, "value", y), title, alt, rows)


def _tables(result: Any) -> list[Markup]:
    made = []
    for direction, (metric, what) in TOWARDS.items():
        against = {
            (c["activation"], c["layer"]): c["p"] for c in result.contrasts(direction, metric)
        }
        controls = result.activations[1:]
        head = ["layer", what, *(f"{NAMES[p]} (p of the difference)" for p in controls)]
        body = []
        for row in result.at(direction, metric):
            cells = [str(row["layer"]), share(row)]
            for name in controls:
                (other,) = [
                    o for o in result.at(direction, metric, name) if o["layer"] == row["layer"]
                ]
                cells.append(f"{percent(other['value'])} ({number(against[name, row['layer']])})")
            body.append(cells)
        made.append(details(f"{direction}, every layer", table(head, body)))
    if result.extras["two_by_two"]:
        made.append(details("The 2 x 2 of every cut", _two_by_two(result)))
    return made


def _two_by_two(result: Any) -> Markup:
    found = {
        (c["layer"], c["cell"]): c for c in result.extras["two_by_two"] if c["metric"] == "to_tuned"
    }
    cuts = sorted({layer for layer, _ in found})
    rows = [[str(cut), *(share(found[cut, cell]) for cell in CELLS)] for cut in cuts]
    return table(["cut before block", *CELLS.values()], rows)
