"""Names that tell apart the models and the results of one page: charts and tables go by them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from .format import one_line

SIDES = ("base", "tuned")
Model = Mapping[str, Any]


def name_of(result: Any, side: str) -> str:
    """What a model of a result is called, on one line."""
    return one_line(result.meta.get(side, {}).get("name", side))


def label_of(result: Any) -> str:
    """`base → tuned` of a result, or its own title, on one line."""
    if title := result.meta.get("title"):
        return one_line(title)
    return " → ".join(name_of(result, side) for side in SIDES)


def told_apart(results: Sequence[Any]) -> list[Any]:
    """The same results in the same order, no two of one kind under one name.

    Where two models are called alike, the folders that they lie in are put before their names. A
    pair that is measured twice, on other texts or in another way, gets a number.
    """
    longer = _longer_names(results)
    taken: dict[str, set[str]] = defaultdict(set)
    named = []
    for result in results:
        sides = {
            side: {**model, "name": longer[_key(model)]} for side, model in _models(result).items()
        }
        renamed = replace(result, meta={**result.meta, **sides})
        plain_label = label_of(renamed)
        numbered = chain([""], (f" ({n})" for n in count(2)))
        suffix = next(s for s in numbered if plain_label + s not in taken[result.name])
        taken[result.name].add(plain_label + suffix)
        if suffix:
            renamed = replace(renamed, meta=_numbered(renamed.meta, plain_label, suffix))
        named.append(renamed)
    return named


def _numbered(meta: Mapping[str, Any], label: str, suffix: str) -> dict[str, Any]:
    """The tuned model gets the number too: series of charts are called by its name."""
    tuned = meta.get("tuned")
    sides = {}
    if isinstance(tuned, Mapping) and "name" in tuned:
        sides["tuned"] = {**tuned, "name": f"{tuned['name']}{suffix}"}
    return {**meta, **sides, "title": f"{label}{suffix}"}


def _models(result: Any) -> dict[str, Model]:
    sides = {side: result.meta.get(side) for side in SIDES}
    return {side: m for side, m in sides.items() if isinstance(m, Mapping) and "name" in m}


def _key(model: Model) -> tuple[str, str]:
    """A model's name, and what makes it another model than the others of that name."""
    return str(model["name"]), str(model.get("sha256") or model.get("source", ""))


def _longer_names(results: Sequence[Any]) -> dict[tuple[str, str], str]:
    """What to call each model: its name, with as few of its folders as tell it from others."""
    alike: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    for result in results:
        for model in _models(result).values():
            alike[str(model["name"])].setdefault(_key(model), str(model.get("source", "")))
    return {
        key: label
        for name, sources in alike.items()
        for key, label in zip(sources, _with_folders(name, list(sources.values())), strict=True)
    }


def _with_folders(name: str, sources: Sequence[str]) -> list[str]:
    # Only what was called by the last part of its path can be called by more of it.
    paths = [Path(source).parts for source in sources]
    deepest = max((len(path) for path in paths if path[-1:] == (name,)), default=1)
    labels = [name] * len(paths)
    for length in range(1, deepest + 1):
        labels = [str(Path(*path[-length:])) if path[-1:] == (name,) else name for path in paths]
        if len(set(labels)) == len(set(paths)):
            break
    return labels
