"""Results back from the folders they were saved in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ..errors import ResultsError
from ..results.comparison import Comparison
from ..results.result import Result
from .page import AnyResult, section_modules


def read_results(folders: Sequence[Path]) -> list[AnyResult]:
    """Every comparison and finding in these folders and the folders inside them.

    Raises:
        ResultsError: if a folder does not exist or holds none, or a result cannot be read.
    """
    return [result for folder in folders for result in _read(folder.expanduser())]


def _read(folder: Path) -> list[AnyResult]:
    if not folder.is_dir():
        raise ResultsError(f"no folder {folder}: give one that --out of a command wrote")
    kinds = finding_classes()
    found: list[AnyResult] = []
    for path in sorted(folder.rglob("*.json")):
        if path.name == "comparison.json":
            found.append(Comparison.load(path.parent))
        elif path.stem in kinds and _is_finding(path):
            found.append(kinds[path.stem].load(path.parent))
    if not found:
        raise ResultsError(
            f"no results in {folder}: expected comparison.json or the JSON file of an experiment"
        )
    return found


def finding_classes() -> dict[str, type[Result]]:
    """The class of every experiment that the page knows, by the names of its file, old ones too."""
    classes: dict[str, type[Result]] = {}
    for module in section_modules():
        if where := getattr(module, "LOADS", None):
            home, name = where.split(":")
            kind = getattr(import_module(home), name)
            classes |= dict.fromkeys((module.READS, *kind.old_names), kind)
    return classes


def _is_finding(path: Path) -> bool:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # whoever loads it says what is wrong
    return isinstance(data, dict) and data.get("name") == path.stem
