"""What the tests check of shapes and types: inner functions too, each time they are defined."""

from typing import Any

import pytest
import torch
from checking_for_tests import checked
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor


def inner(kind: Any, default: Any, known: list[Any]) -> Any:
    @jaxtyped(typechecker=checked)
    def twice(x: kind, times: Any = default) -> Float[Tensor, " n"]:
        known.append(times)
        return 2 * x

    return twice


def test_every_definition_is_checked_and_keeps_what_it_closes_over() -> None:
    for _ in range(3):
        known: list[Any] = []
        twice = inner(Float[Tensor, " n"], 1, known)
        assert twice(torch.ones(2)).tolist() == [2, 2]
        assert known == [1]
        for wrong in (torch.ones(2, 2), torch.ones(2, dtype=torch.int64), [1.0]):
            with pytest.raises(TypeCheckError, match="parameters"):
                twice(wrong)
        assert known == [1]


def test_what_comes_back_is_checked() -> None:
    for _ in range(2):

        @jaxtyped(typechecker=checked)
        def summed(x: Float[Tensor, "n m"]) -> Float[Tensor, " n"]:
            return x.sum(0)

        assert summed(torch.ones(2, 2)).tolist() == [2, 2]
        with pytest.raises(TypeCheckError, match="return value"):
            summed(torch.ones(2, 3))


def test_other_annotations_and_defaults_are_not_taken_for_the_same() -> None:
    x, table = torch.ones(2), torch.ones(2, 2)
    for default in (None, True, 1, 1.0, "one", [1]):
        known: list[Any] = []
        inner(Float[Tensor, " n"], default, known)(x)
        assert known == [default]
        assert type(known[0]) is type(default)
    with pytest.raises(TypeCheckError, match="parameters"):
        inner(Float[Tensor, "n m"], 1, [])(x)
    with pytest.raises(TypeCheckError, match="return value"):
        inner(Float[Tensor, "n m"], 1, [])(table)


def test_one_signature_is_made_once() -> None:
    def made(text: str) -> Any:
        scope: dict[str, Any] = {}
        exec(f"def f({text}): pass", scope)
        return checked(scope["f"])

    assert made("x: int, *, y: str = 'a'") is made("x: int, *, y: str = 'a'")
    different = ["x: int", "y: int", "x: str", "*x: int", "**x: int", "x: int = 1", "x: int = 2"]
    assert len({id(made(text)) for text in different}) == len(different)
