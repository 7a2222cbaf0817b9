"""What the tests check of shapes and types when they call hyperlens."""

import importlib.util
from pathlib import Path
from types import ModuleType

import checking_for_tests
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError, config, jaxtyped
from jaxtyping._import_hook import Typechecker, _JaxtypingLoader
from torch import Tensor

from hyperlens.checks import check_types

SOURCE = """
from jaxtyping import Float
from torch import Tensor

def summed(x: Float[Tensor, "n m"]) -> Float[Tensor, " n"]:
    return x.sum(0)

def named(x: int, *, y: str = "a") -> str:
    return y if x else x

def around() -> object:
    def inner(x: int) -> int:
        return x
    return inner

class Holder:
    def first(self, x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return x[0]
"""


@pytest.fixture
def checked(tmp_path: Path) -> ModuleType:
    """A module imported as the tests import hyperlens."""
    (tmp_path / "checked.py").write_text(SOURCE)
    typechecker = Typechecker("beartype.beartype")
    loader = _JaxtypingLoader("checked", str(tmp_path / "checked.py"), typechecker=typechecker)
    spec = importlib.util.spec_from_loader("checked", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_shapes_are_checked_in_functions_and_methods(checked: ModuleType) -> None:
    assert checked.summed(torch.ones(2, 2)).tolist() == [2, 2]
    with pytest.raises(TypeCheckError, match="return value"):
        checked.summed(torch.ones(2, 3))
    for wrong in (torch.ones(2), torch.ones(2, 2, dtype=torch.int64), [[1.0]]):
        with pytest.raises(TypeCheckError, match="parameters"):
            checked.summed(wrong)
    assert checked.Holder().first(torch.ones(2), torch.ones(2)) == 1
    with pytest.raises(TypeCheckError, match="parameters"):
        checked.Holder().first(torch.ones(2), torch.ones(3))


def test_other_types_are_checked_where_no_shape_is_named(checked: ModuleType) -> None:
    assert checked.named(1, y="b") == "b"
    for call in (lambda: checked.named("1"), lambda: checked.named(1, y=2)):
        with pytest.raises(BeartypeCallHintViolation):
            call()


def test_checks_can_be_turned_off(checked: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    assert checked.named("", y=3) == ""
    assert checked.summed(torch.ones(2, 3, 4)).shape == (3, 4)


def test_an_inner_function_is_left_to_the_one_around_it(checked: ModuleType) -> None:
    assert checked.around()("no number") == "no number"


def test_the_first_calls_of_each_test_are_checked(
    checked: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(checking_for_tests.CALLS_CHECKED):
        checked.named(1)
    assert checked.named(1, y=2) == 2
    monkeypatch.setattr(checking_for_tests.Test, "number", -2)
    with pytest.raises(BeartypeCallHintViolation):
        checked.named(1, y=2)


def test_axes_of_the_callers_own_functions_do_not_bind_ours() -> None:
    """A caller may check shapes, too, and call a function of ours twice with other sizes."""

    @check_types
    def ours(x: Float[Tensor, "batch pos"]) -> int:
        return x.numel()

    @jaxtyped(typechecker=beartype)
    def of_caller(x: Float[Tensor, "batch pos"]) -> int:
        return ours(x[:, 1:])

    assert of_caller(torch.zeros(2, 3)) == 4
