"""Which functions the tests check, and how: shapes by jaxtyping, all other types by beartype.

jaxtyping's import hook checks shapes of every function, inner ones anew each time that the outer
one is called, which took two fifths of the tests' time. Here an inner function is left to the
checks of the one around it, and one that names no shape needs beartype alone.
"""

import ast
import functools
from types import FunctionType
from typing import Any

from beartype import beartype
from jaxtyping import _import_hook, config

SHAPES = {"Bool", "Float", "Float32", "Float64", "Int", "Int64", "Shaped"}
PLAIN = ast.parse("__import__('checking_for_tests').types_only", mode="eval").body


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
        if node.decorator_list != written and not names_a_shape(node):
            node.decorator_list[-1] = PLAIN
        return node


def names_a_shape(function: ast.FunctionDef) -> bool:
    """Whether an annotation of it is one of jaxtyping's."""
    args = function.args
    annotated = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    annotations = [function.returns, *(arg.annotation for arg in annotated if arg is not None)]
    found = (ast.walk(annotation) for annotation in annotations if annotation is not None)
    return any(isinstance(n, ast.Name) and n.id in SHAPES for nodes in found for n in nodes)


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

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        off = config.jaxtyping_disable
        return function(*args, **kwargs) if off else checked()(*args, **kwargs)

    return called


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
