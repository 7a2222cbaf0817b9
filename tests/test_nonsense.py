"""Nonsense in any argument of any public function ends in one line, or in an answer."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from conftest import short
from surface_for_tests import call, good, parameters, public, shared

from hyperlens.errors import HyperlensError

# The first three are of a type that next to nothing takes, and fail before any work.
NONSENSE: list[Callable[[], Any]] = [
    object,
    lambda: -1,
    lambda: [object()],
    lambda: None,
    lambda: 0,
    lambda: 0.5,
    lambda: math.nan,
    lambda: math.inf,
    lambda: -math.inf,
    lambda: True,
    lambda: 2**63,
    lambda: 10**30,
    lambda: 10**5000,
    lambda: "",
    lambda: "nonsense",
    lambda: "\ud83d",
    lambda: "a\0b",
    lambda: b"bytes",
    lambda: Path("none") / "x",
    list,
    dict,
    set,
    lambda: [None],
    lambda: [[]],
    lambda: [-1],
    lambda: [math.nan],
    lambda: ["nonsense"],
    lambda: {"a": None},
    lambda: {"a": object()},
    lambda: iter([1]),
    lambda: range(3),
    lambda: slice("a", 1),
    lambda: len,
    lambda: object,
    lambda: torch.tensor(math.nan),
    lambda: torch.zeros(0),
    lambda: np.array(["a"]),
    lambda: torch.nn.Linear(1, 1),
]
SURFACE = dict(public())
KEPT = {"saved", "run", "adapter"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """The working folder, with a result, a run and an adapter in it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("nonsense")
        patch.chdir(folder)
        shared()
        yield folder


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """Arguments reach our own checks, as they do outside the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def problem_with(name: str, argument: str, make: Callable[[], Any], place: Path) -> str:
    """What is wrong with how a function takes nonsense, "" if nothing is."""
    arguments = good(name, SURFACE[name]) | {argument: make()}
    try:
        call(SURFACE[name], arguments)
    except HyperlensError as error:
        message = str(error)
        if len(message.splitlines()) != 1 or len(message) > 900:
            return f"not one line: {message[:300]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    half_written = [path.name for path in place.iterdir() if path.name.startswith(".")]
    return f"left {half_written}" if half_written else ""


def problems(name: str, values: list[Callable[[], Any]], place: Path) -> list[str]:
    return [
        f"{argument}={make()!r:.60}: {found}" if make is not NONSENSE[12] else f"{argument}: {found}"
        for argument in parameters(name, SURFACE[name])
        for make in values
        if (found := problem_with(name, argument, make, place))
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SURFACE)
def test_nonsense_in_each_argument(name: str, place: Path) -> None:
    assert problems(name, NONSENSE[:3], place) == []


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SURFACE)
def test_more_nonsense_in_each_argument(name: str, place: Path) -> None:
    assert problems(name, NONSENSE[3:], place) == []


@pytest.mark.parametrize("name", SURFACE)
@pytest.mark.long
def test_the_other_arguments_are_good(name: str, place: Path) -> None:
    """Otherwise it would be them that are refused."""
    call(SURFACE[name], good(name, SURFACE[name]))
    if (place / "out").exists():
        os.rename(place / "out", place / f"out of {name}")
