"""What was compared, and the numbers that matter most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ...audit import unchanged
from ...results import Comparison
from ..parts import details, join, note, pair_name, paragraph, preformatted, table
from ..words import NO_CHANGE, headline, plain, summary

ORDER = 10
TITLE = "What was compared?"
READS = "comparison"

# Below this many parameters' worth of width a result says little about the models people use.
SMALL_WIDTH = 1024


def body(results: Sequence[Comparison]) -> Markup:
    """Models, texts and headline of every pair."""
    parts: list[Markup] = []
    if any(result.meta.get("d_model", SMALL_WIDTH) < SMALL_WIDTH for result in results):
        parts.append(
            note(
                "These are small models: a demonstration of the measurements, and no evidence "
                "about large ones."
            )
        )
    rows = [_headline_row(result, results) for result in results]
    columns = list(dict.fromkeys(name for _, found in rows for name in found))
    parts.append(
        table(
            ["output, teacher-forced", *(name for name, _ in rows)],
            ([column, *(found.get(column, "n/a") for _, found in rows)] for column in columns),
        )
    )
    parts += [paragraph(NO_CHANGE) for result in results if unchanged(result)]
    parts.append(_inputs(results))
    for result in results:
        parts.append(details(f"In words: {pair_name(result)}", preformatted(summary(result))))
    return join(parts)


def _headline_row(result: Comparison, results: Sequence[Comparison]) -> tuple[str, dict[str, str]]:
    found = {_in_full(what): number for what, number in headline(result)}
    return pair_name(result), found


def _in_full(what: str) -> str:
    """The headline of the summary names ranks after the first by their numbers alone."""
    named = what[0].isalpha()
    return f"{what if named else f'token of base rank {what}'} [95%]"


def _inputs(results: Sequence[Comparison]) -> Markup:
    """Each model and text once, with what is needed to find it again."""
    models: dict[str, tuple[Any, ...]] = {}
    for result in results:
        for side in ("base", "tuned"):
            model = result.meta.get(side, {})
            name = plain(model.get("name", side))
            sha = str(model.get("sha256", ""))[:16]
            models.setdefault(name + sha, (side, name, str(model.get("kind", "")), sha))
    meta = results[0].meta
    corpus = meta.get("corpus", {})
    sizes = [
        f"{meta[key]:,} {words}"
        for key, words in (
            ("n_layers", "blocks"),
            ("d_model", "dimensions"),
            ("d_vocab", "tokens in the vocabulary"),
        )
        if key in meta
    ]
    texts = [f"{corpus[f'n_{k}']:,} {k}" for k in ("sequences", "tokens") if f"n_{k}" in corpus]
    how = [f"{key} {plain(meta[key])}" for key in ("backend", "device", "dtype") if key in meta]
    notes = [
        plain(line) for line in dict.fromkeys(n for r in results for n in r.meta.get("notes", []))
    ]
    return join(
        [
            table(["", "model", "opened as", "SHA-256 of its weights"], models.values()),
            paragraph(
                "; ".join(filter(None, [", ".join(sizes), ", ".join(texts), ", ".join(how)]))
            ),
            *(paragraph("Note: ", line) for line in notes),
        ]
    )
