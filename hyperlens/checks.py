"""Validation of arguments: their types, and values that many functions take, such as counts."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin

from .errors import ArgumentError, CorpusError, DecodingError, HyperlensError, shortened

P = ParamSpec("P")
R = TypeVar("R")

# Torch takes 64 bits, and some experiments count on from the seed.
LARGEST_SEED = 2**63 - 1
# What fits no library's integers is no number of ours.
LARGEST_INT = 2**64
# More of anything would never end.
LARGEST_COUNT = 10**9


def check_types(function: Callable[P, R]) -> Callable[P, R]:
    """A public function that refuses arguments of other types than its signature names.

    What a type leaves open, such as a range, is for the function itself.

    Raises:
        ArgumentError: naming the argument, when the function is called.

    >>> @check_types
    ... def repeat(text: str, times: int = 2) -> str:
    ...     return text * times
    >>> repeat("ha", times="3")
    Traceback (most recent call last):
    hyperlens.errors.ArgumentError: times must be a whole number, got '3'
    """
    signature = inspect.signature(function)

    @functools.cache
    def kinds() -> dict[str, Any]:
        # At the first call, when all that annotations name is defined.
        scope = inspect.unwrap(function).__globals__
        named = signature.parameters.values()
        return {one.name: _kind(one.annotation, scope) for one in named}

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError(f"{function.__name__}: {error}") from None
        for name, value in bound.arguments.items():
            kind = kinds()[name]
            check_type(name, value, kind)
            # What may be anything, such as texts, is the function's own to read.
            bound.arguments[name] = value if kind is Any else _plain(value)
        return function(*bound.args, **bound.kwargs)

    return checked


def _plain(value: Any) -> Any:
    """A number or an array of numpy's as Python's own, which JSON knows."""
    if _is_array(value):
        return value.tolist()
    if isinstance(value, int | float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and getattr(value, "ndim", 0) > 0


def check_field_types(record: Any) -> None:
    """`check_types` for the fields of a dataclass, called in its `__post_init__`."""
    for name, (kind, is_shown) in _field_kinds(record.__class__).items():
        check_type(name, getattr(record, name), kind, is_shown=is_shown)


@functools.cache
def _field_kinds(record: Any) -> dict[str, tuple[Any, bool]]:
    """Of each field of a dataclass the type, and whether it is shown."""
    shown = {field.name: field.repr for field in fields(record)}
    return {
        name: (_kind(annotation, vars(sys.modules[owner.__module__])), shown[name])
        for owner in record.__mro__
        for name, annotation in inspect.get_annotations(owner).items()
        if name in shown
    }


def check_type(name: str, value: Any, kind: Any, *, is_shown: bool = True) -> None:
    """Raise unless a value is of a type.

    Args:
        name: of the argument.
        value: what was given.
        kind: the type, as in an annotation.
        is_shown: whether a message may quote the value, which may be a secret.

    Raises:
        ArgumentError: with what was expected and what came.
    """
    if not _is(value, kind):
        came = shortened(value) if is_shown else type(value).__name__
        items = value if isinstance(value, Sequence) else [value]
        uncalled = next((one.__name__ for one in items if isinstance(one, type)), None)
        hint = f": write {uncalled}() rather than {uncalled}" if uncalled else ""
        if isinstance(value, int) and abs(value) >= LARGEST_INT:
            hint = ": numbers are below 2^64"
        raise ArgumentError(f"{name} must be {_in_words(kind)}, got {came}{hint}")


def _kind(annotation: Any, scope: Mapping[str, Any]) -> Any:
    """What an annotation names; anything where only type checkers import it."""
    if annotation is inspect.Parameter.empty:
        return Any
    try:
        return eval(annotation, dict(scope)) if isinstance(annotation, str) else annotation
    except NameError:
        return Any


LISTS = (Sequence, Iterable, list, tuple)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, as a reader of the annotation understands it."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or isinstance(kind, TypeVar):
        return True
    if origin in (Union, UnionType):
        return any(_is(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str)
    if kind in (int, float):
        return is_number(value, kind)
    if origin in LISTS:
        is_one = origin is Iterable or isinstance(value, Sequence) or _is_array(value)
        return is_one and _is_list_of(value, inner[0])
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            _is(key, inner[0]) and _is(one, inner[1]) for key, one in value.items()
        )
    plain = NoneType if kind is None else origin or kind
    return _is_instance(value, plain) if isinstance(plain, type) else True


def _is_instance(value: Any, kind: type) -> bool:
    """`isinstance`; of shapes without what their axes are in a function of the caller's."""
    shapes = sys.modules.get("jaxtyping")  # slow to import, and there if a shape is
    if shapes is None or not issubclass(kind, shapes.AbstractArray):
        return isinstance(value, kind)
    with shapes.jaxtyped("context"):
        return isinstance(value, kind)


def is_number(value: Any, kind: Any) -> bool:
    """Whether a value is a number (a bool is not) and within the range of its kind.

    >>> is_number(2, float), is_number(True, int), is_number(10**400, float)
    (True, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        return False
    if kind is int:
        return -LARGEST_INT < int(cast(Any, value)) < LARGEST_INT
    try:
        float(value)
    except OverflowError:
        return False
    return True


def is_list(value: Any) -> bool:
    """Whether something is read item by item, as lists, arrays and generators are.

    >>> is_list((1, 2)), is_list(map(str, ())), is_list("text"), is_list({"a": 1})
    (True, True, False, False)
    """
    if isinstance(value, str | bytes | Mapping | type):
        return False
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0


def _is_list_of(value: Any, kind: Any) -> bool:
    """Whether the items of a list are of a type; those of a generator are not read."""
    return is_list(value) and (
        not isinstance(value, Collection) or all(_is(one, kind) for one in value)
    )


WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "True or False",
    Path: "a path",
    None: "None",
    NoneType: "None",
}
PLURAL = {int: "whole numbers", float: "numbers", str: "strings", Path: "paths"}


def _in_words(kind: Any) -> str:
    """A type as a message names it.

    >>> _in_words(Sequence[str] | None)
    'a list of strings or None'
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_in_words, inner)))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in LISTS:
        return f"a list of {PLURAL.get(inner[0]) or f'items, each {_in_words(inner[0])}'}"
    if origin is Mapping:
        return f"a mapping from {_in_words(inner[0])} to {_in_words(inner[1])}"
    if kind is Any:
        return "anything"
    if kind in WORDS:
        return WORDS[kind]
    name = getattr(origin or kind, "__name__", None) or str(kind)
    return "a function" if name == "Callable" else f"a {name}"


def check_whole(
    name: str, value: Any, least: int, error: type[HyperlensError] = DecodingError
) -> None:
    """Raise unless a setting is an int of at least `least` (a bool is not), and no absurd one.

    >>> check_whole("window", 1, 2)
    Traceback (most recent call last):
    hyperlens.errors.DecodingError: window must be at least 2 (a whole number), got 1

    Raises:
        HyperlensError: `error`, naming the setting.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise error(f"{name} must be at least {least} (a whole number), got {shortened(value)}")
    if value > LARGEST_COUNT:
        raise error(f"{name} must be at most {LARGEST_COUNT:,}, got {shortened(value)}")


def check_counts(least: int = 1, /, **counts: Any) -> None:
    """Raise unless every argument is an int of at least `least`.

    Raises:
        CorpusError: naming the argument.
    """
    for name, value in counts.items():
        check_whole(name, value, least, CorpusError)


def check_choice(
    name: str, value: Any, choices: Sequence[str], error: type[HyperlensError] = HyperlensError
) -> None:
    """Raise unless a setting is one of `choices`.

    Raises:
        HyperlensError: `error`, with the setting's name, its choices and the value.
    """
    if value not in choices:
        raise error(f"{name} must be one of {', '.join(choices)}; got {shortened(value)}")


def check_positive(name: str, value: float) -> None:
    """Raise unless a setting is positive and finite.

    Raises:
        DecodingError: naming the setting.
    """
    if not 0 < value < math.inf:
        raise DecodingError(f"{name} must be above 0 and finite, got {shortened(value)}")


def check_seed(seed: Any) -> None:
    """Raise unless `seed` is an int from 0 to 2^63 - 1.

    Raises:
        CorpusError: with the range of seeds.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= LARGEST_SEED:
        raise CorpusError(f"seed must be a whole number from 0 to {LARGEST_SEED}, got {seed!r}")
