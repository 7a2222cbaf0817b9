"""Which functions the tests check, and how: shapes by jaxtyping, all other types by beartype.

jaxtyping's import hook checks shapes of every function, inner ones anew each time that the outer
one is called, which took two fifths of the tests' time. Here an inner function is left to the
checks of the one around it, one that names no shape needs beartype alone, and of the calls of one
function within a test the first few are checked: the rest of a loop says nothing new.
"""

import ast
import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from beartype import beartype
from jaxtyping import _import_hook, config

SHAPES = {"Bool", "Float", "Float32", "Float64", "Int", "Int64", "Shaped"}
CALLS_CHECKED = 5
OURS = "__import__('checking_for_tests')"
PLAIN = ast.parse(f"{OURS}.types_only", mode="eval").body


class OuterFunctions(_import_hook.JaxtypingTransformer):
    """Decorates modules on import; `_parents` are the definitions around a node."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        """jaxtyping's decorator, beartype's, or none."""
        if any(isinstance(parent, ast.FunctionDef) for parent in self._parents):
            self._parents.append(node)
            self.generic_visit(node)
            self._parents.pop()
            return node
        written = list(node.decorator_list)
        node = super().visit_FunctionDef(node)
        if node.decorator_list != written:
            how = node.decorator_list[-1] if names_a_shape(node) else PLAIN
            node.decorator_list[-1] = ast.copy_location(_first_calls(how), node)
        return node


def _first_calls(how: ast.expr) -> ast.expr:
    return ast.Call(ast.parse(f"{OURS}.first_calls", mode="eval").body, [how], [])


def names_a_shape(function: ast.FunctionDef) -> bool:
    """Whether an annotation of it is one of jaxtyping's."""
    args = function.args
    annotated = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    annotations = [function.returns, *(arg.annotation for arg in annotated if arg is not None)]
    found = (ast.walk(annotation) for annotation in annotations if annotation is not None)
    return any(isinstance(n, ast.Name) and n.id in SHAPES for nodes in found for n in nodes)


class Test:
    """The test that runs."""

    number = 0


def first_calls(how: Callable[[Any], Any]) -> Callable[[FunctionType], Any]:
    """Decorates a function with `how`, for the first calls of each test."""

    def decorate(function: FunctionType) -> Any:
        checked = how(function)
        seen = {"test": -1, "calls": 0}

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if config.jaxtyping_disable:
                return function(*args, **kwargs)
            if seen["test"] != Test.number:
                seen["test"], seen["calls"] = Test.number, 0
            seen["calls"] += 1
            use = checked if seen["calls"] <= CALLS_CHECKED else function
            return use(*args, **kwargs)

        return called

    return decorate


def types_only(function: FunctionType) -> Any:
    """`beartype(function)`, made at the first call, when all that annotations name is defined."""

    @functools.cache
    def checked() -> Any:
        copy = FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        functools.update_wrapper(copy, function)
        del copy.__wrapped__
        copy.__kwdefaults__ = function.__kwdefaults__
        copy.__annotations__ = {
            name: _looked_up(annotation, function)
            for name, annotation in function.__annotations__.items()
        }
        return beartype(copy)

    return lambda *args, **kwargs: checked()(*args, **kwargs)


def _looked_up(annotation: Any, function: FunctionType) -> Any:
    """What a text names; anything where only type checkers import it, as jaxtyping does."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, function.__globals__)
    except NameError:
        return Any


# Read when a module is imported: this has to come before hyperlens.
_import_hook.JaxtypingTransformer = OuterFunctions
