"""What was compared, and the numbers that matter most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ...results.audit import unchanged
from ...results.comparison import Comparison
from ..parts import details, join, note, notes, pair_name, paragraph, preformatted, table
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
    rows = [_headline_row(result) for result in results]
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


def _headline_row(result: Comparison) -> tuple[str, dict[str, str]]:
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
    told = [(pair_name(result), _sizes(result)) for result in results]
    if len({sizes for _, sizes in told}) == 1:
        lines = [told[0][1]]
    else:
        lines = [f"{pair}: {sizes}" for pair, sizes in told]
    return join(
        [
            table(["", "model", "opened as", "SHA-256 of its weights"], models.values()),
            *map(paragraph, lines),
            notes(*results),
        ]
    )


def _sizes(result: Comparison) -> str:
    """How large models and texts are, and how they were read."""
    meta = result.meta
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
    if "sha256" in corpus:
        texts.append(f"SHA-256 of the texts {plain(corpus['sha256'])[:16]}")
    how = [f"{key} {plain(meta[key])}" for key in ("backend", "device", "dtype") if key in meta]
    return "; ".join(filter(None, [", ".join(sizes), ", ".join(texts), ", ".join(how)]))
