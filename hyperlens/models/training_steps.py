"""The checkpoints of a training run: their folders, and after which step each was saved."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import LoadingError, PairError, shortened
from ..files import expand_user
from .adapters import ADAPTER_CONFIG

# Written by transformers' Trainer into its checkpoints, and by `hyperfit` into those it keeps.
TRAINER_STATE = "trainer_state.json"
# Where `hyperfit` keeps them, inside the folder of the run.
CHECKPOINTS = "checkpoints"
# What the folders inside a run are called; of a folder that is named any number at the end will do.
INSIDE_A_RUN = re.compile(r"(?:checkpoint|epoch|step|iter)\D?\d+")
NUMBER_AT_END = re.compile(r"\d+$")


def find_checkpoints(checkpoints: Any) -> dict[int, Any]:
    """The sources of checkpoints by their training steps, in order.

    Args:
        checkpoints: the folder of a run, with checkpoints in it; or several such folders or
            checkpoints; or step to model.

    Raises:
        LoadingError: if a folder does not exist or holds no checkpoint, or its step is unknown.
        PairError: if two have one step, or what is given is neither folders nor steps with models.
    """
    if isinstance(checkpoints, Mapping):
        return _by_step(checkpoints)
    given = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
    if not isinstance(given, Sequence) or not given:
        raise PairError(
            "expected the folder of a run, several checkpoints or {step: model}; got "
            f"{shortened(checkpoints)}"
        )
    for one in given:
        if not isinstance(one, str | Path):
            raise PairError(
                f"a {type(one).__name__} does not tell after which step it was saved: give "
                "checkpoints that are no folders as {step: model}"
            )
    found: dict[int, Path] = {}
    for folder in (inner for one in given for inner in _folders(expand_user(one))):
        step = _step_of(folder)
        if step in found:
            raise PairError(f"{found[step]} and {folder} are both of step {step}: give one of them")
        found[step] = folder
    return dict(sorted(found.items()))


def _by_step(checkpoints: Mapping[Any, Any]) -> dict[int, Any]:
    for step in checkpoints:
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise PairError(
                f"checkpoints must map steps, whole numbers from 0 up, to models; got "
                f"{shortened(step)}"
            )
    if not checkpoints:
        raise PairError("there are no checkpoints: map at least one step to a model")
    return dict(sorted(checkpoints.items()))


def _folders(folder: Path) -> list[Path]:
    """The checkpoints inside a run; a checkpoint itself."""
    if not folder.is_dir():
        raise LoadingError(f"no folder {folder}: give a run, or checkpoints of one")
    inside = [
        child
        for parent in (folder, folder / CHECKPOINTS)
        if parent.is_dir()
        for child in sorted(parent.iterdir())
        if child.is_dir() and INSIDE_A_RUN.fullmatch(child.name)
    ]
    if inside:
        return inside
    if (folder / "config.json").exists() or (folder / ADAPTER_CONFIG).exists():
        return [folder]
    raise LoadingError(
        f"no checkpoints in {folder}: expected folders such as checkpoint-500, as transformers' "
        "Trainer writes them, and hyperfit with keep_every"
    )


def _step_of(folder: Path) -> int:
    """The training step that a checkpoint records, else the number at the end of its name."""
    try:
        step = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"]
        recorded = int(step)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        recorded = -1
    if recorded >= 0:
        return recorded
    number = NUMBER_AT_END.search(folder.absolute().name)
    if number is None:
        raise LoadingError(
            f"{folder} does not tell after which step it was saved: expected {TRAINER_STATE} in "
            "it, or a number at the end of its name; hyperfit keeps checkpoints with keep_every"
        )
    return int(number[0])
