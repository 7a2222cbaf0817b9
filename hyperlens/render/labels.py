"""Names that tell apart the models and the results of one page: charts and tables go by them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from ..results.comparison import Comparison
from ..results.result import Result
from .parts import pair_name

SIDES = ("base", "tuned")
Model = Mapping[str, Any]


def told_apart(results: Sequence[Comparison | Result]) -> list[Comparison | Result]:
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
        one = replace(result, meta={**result.meta, **sides})
        plain_label = pair_name(one)
        tried = chain([plain_label], (f"{plain_label} ({n})" for n in count(2)))
        label = next(name for name in tried if name not in taken[result.name])
        taken[result.name].add(label)
        if label != plain_label:
            one = replace(one, meta={**one.meta, "title": label})
        named.append(one)
    return named


def _models(result: Comparison | Result) -> dict[str, Model]:
    found = {side: result.meta.get(side) for side in SIDES}
    return {side: m for side, m in found.items() if isinstance(m, Mapping) and "name" in m}


def _key(model: Model) -> tuple[str, str]:
    """A model's name, and what makes it another model than the others of that name."""
    return str(model["name"]), str(model.get("sha256") or model.get("source", ""))


def _longer_names(results: Sequence[Comparison | Result]) -> dict[tuple[str, str], str]:
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
