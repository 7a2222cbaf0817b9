"""Results back from the folders they were saved in."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from importlib import import_module
from pathlib import Path

from ..errors import ResultsError
from ..findings import Finding
from ..results import Comparison
from .page import section_modules
from .pairs import Result

COMPARISON = "comparison.json"


def read_results(folders: Sequence[Path]) -> list[Result]:
    """Every comparison and finding in these folders and the folders inside them.

    Raises:
        ResultsError: if a folder does not exist or holds none, or a result cannot be read.
    """
    kinds = finding_classes()
    files = [path for folder in folders for path in _files(folder.expanduser(), kinds)]
    # A folder and one inside it may both be given.
    once = {path.resolve(): path for path in files}
    return [
        Comparison.load(path.parent)
        if path.name == COMPARISON
        else kinds[path.stem].load(path.parent)
        for path in once.values()
    ]


def _files(folder: Path, kinds: Collection[str]) -> list[Path]:
    if not folder.is_dir():
        raise ResultsError(f"no folder {folder}: give one that --out of a command wrote")
    found = [
        path
        for path in sorted(folder.rglob("*.json"))
        if path.name == COMPARISON or (path.stem in kinds and _is_finding(path))
    ]
    if not found:
        raise ResultsError(
            f"no results in {folder}: expected {COMPARISON} or the JSON file of an experiment"
        )
    return found


def finding_classes() -> dict[str, type[Finding]]:
    """The class of every experiment that the page knows, by the name of its file."""
    classes = {}
    for module in section_modules():
        if where := getattr(module, "LOADS", None):
            home, name = where.split(":")
            classes[module.READS] = getattr(import_module(home), name)
    return classes


def _is_finding(path: Path) -> bool:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # whoever loads it says what is wrong
    return isinstance(data, dict) and data.get("name") == path.stem
