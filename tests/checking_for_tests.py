"""The type checker of the tests: beartype, which remembers what it has made.

jaxtyping asks for a check of every function when it is defined, and of an inner one each time that
the outer one is called. Made anew each time, these checks take longer than what they check.
"""

from types import FunctionType
from typing import Any

import beartype

PLAIN = (type(None), bool, int, float, str)
_made: dict[Any, Any] = {}


def checked(function: Any) -> Any:
    """`beartype.beartype(function)`; the same result for what jaxtyping makes of one signature.

    jaxtyping hands over functions that it has made of a signature alone, and that do nothing else.
    So those that agree in names, annotations and defaults may stand for each other.
    """
    try:
        key = _signature(function)
        if key not in _made:
            _made[key] = beartype.beartype(function)
        return _made[key]
    except _Other:
        return beartype.beartype(function)


class _Other(Exception):
    """A function that may have something of its own."""


def _signature(function: Any) -> tuple[Any, ...]:
    """Everything that decides what is checked."""
    if not isinstance(function, FunctionType) or function.__code__.co_filename != "<string>":
        raise _Other
    code, defaults = function.__code__, function.__defaults__ or ()
    by_name = tuple((function.__kwdefaults__ or {}).items())
    values = (*defaults, *(value for _, value in by_name))
    if function.__closure__ or not all(type(value) in PLAIN for value in values):
        raise _Other
    annotations = tuple(function.__annotations__.items())
    try:
        hash(annotations)
    except TypeError:
        raise _Other from None
    return (
        (function.__module__, function.__qualname__, code.co_code, code.co_varnames),
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags),
        annotations,
        # As text, in which True is not 1.
        (repr(defaults), repr(by_name)),
    )
