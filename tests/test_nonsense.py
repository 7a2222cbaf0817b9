"""Nonsense in any argument of any public function ends in one line, or in an answer."""

import inspect
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pytest
import torch
from surface_for_tests import call, good, parameters, public, shared

from hyperlens import open_pair
from hyperlens.errors import HyperlensError, shortened

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
    with conftest.unchecked():
        yield


def returns_a_result(name: str) -> bool:
    return str(inspect.signature(SURFACE[name]).return_annotation).endswith("Result")


def problem_in(function: Callable[..., Any], arguments: dict[str, Any], place: Path) -> str:
    """What is wrong with how a function takes nonsense, "" if nothing is."""
    try:
        call(function, arguments)
    except HyperlensError as error:
        message = str(error)
        if len(message.splitlines()) != 1 or len(message) > 900:
            return f"not one line: {message[:300]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    half_written = [path.name for path in place.iterdir() if path.name.startswith(".")]
    return f"left {half_written}" if half_written else ""


def problems(name: str, values: list[Callable[[], Any]], place: Path) -> list[str]:
    arguments = good(name, SURFACE[name])
    return [
        f"{argument}={shortened(make())}: {found}"
        for argument in parameters(name, SURFACE[name])
        for make in values
        if (found := problem_in(SURFACE[name], arguments | {argument: make()}, place))
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SURFACE)
def test_nonsense_in_each_argument(name: str, place: Path) -> None:
    found = problems(name, NONSENSE[:3], place)
    assert not found, "\n".join(found)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SURFACE)
def test_more_nonsense_in_each_argument(name: str, place: Path) -> None:
    found = problems(name, NONSENSE[3:], place)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", SURFACE)
@pytest.mark.long
def test_the_other_arguments_are_good(name: str, place: Path) -> None:
    """Otherwise it would be them that are refused."""
    call(SURFACE[name], good(name, SURFACE[name]))
    if (place / "out").exists():
        os.rename(place / "out", place / f"out of {name}")


def answers() -> Iterator[tuple[str, Any]]:
    """A pair, and the results of some functions, whose methods people call."""
    yield "Pair", open_pair(shared()["base"], shared()["tuned"])
    yield "Comparison", shared()["results"][0]


def methods(one: Any) -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Its public methods that take arguments, with good ones."""
    table = getattr(one, "table", ())
    values = {**(table[0] if table else {}), "texts": shared()["texts"], "folder": "new"}
    for name, method in inspect.getmembers(one, inspect.ismethod):
        taken = inspect.signature(method).parameters.values()
        # Written out for the class itself, or its subclasses.
        if name.startswith("_") or name in ("write", "of", "from_format_1"):
            continue
        arguments = {p.name: values.get(p.name) for p in taken if p.kind is not p.VAR_KEYWORD}
        if len(arguments) < len(taken):
            arguments |= {column: values.get(column) for column in one.columns}
        yield f"{type(one).__name__}.{name}", method, arguments


def problems_of_methods(one: Any, values: list[Callable[[], Any]], place: Path) -> list[str]:
    found = []
    for name, method, arguments in methods(one):
        for argument in arguments:
            found += [
                f"{name}({argument}={shortened(make())}): {wrong}"
                for make in values
                if (wrong := problem_in(method, arguments | {argument: make()}, place))
            ]
            shutil.rmtree("new", ignore_errors=True)
    return found


@pytest.mark.parametrize("name", ["Pair", "Comparison"])
def test_nonsense_in_methods(name: str, place: Path) -> None:
    found = problems_of_methods(dict(answers())[name], NONSENSE[::4], place)
    assert not found, "\n".join(found)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in SURFACE if returns_a_result(name)])
def test_nonsense_in_methods_of_results(name: str, place: Path) -> None:
    result = call(SURFACE[name], good(name, SURFACE[name]))
    found = problems_of_methods(result, NONSENSE, place)
    assert not found, "\n".join(found)
