"""Whoever can be asked: the protocol of judges, and what may stand for one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from ..errors import JudgeError


@runtime_checkable
class Judge(Protocol):
    """Whoever answers prompts."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that answers depend on, as JSON values; a `kind` among them, and no secret."""

    def answers(self, prompts: Sequence[str]) -> Generator[tuple[int, str], None, None]:
        """(index, answer) of every prompt, in any order, as they come."""


class FunctionJudge:
    """A function from prompt to answer.

    What a function does cannot be told from outside, so its answers are kept in a folder only
    if it says who it is: give it an attribute `identity`, a mapping of JSON values.
    """

    def __init__(self, function: Callable[[str], str]) -> None:
        self._function = function
        name = getattr(function, "__qualname__", type(function).__qualname__)
        given = getattr(function, "identity", None)
        self.says_who_it_is = given is not None
        self.identity = {"kind": "function", "name": name, **(given or {})}

    def answers(self, prompts: Sequence[str]) -> Generator[tuple[int, str], None, None]:
        """One after another.

        Raises:
            JudgeError: if the function gives something else than text.
        """
        for index, prompt in enumerate(prompts):
            answer = self._function(prompt)
            if not isinstance(answer, str):
                raise JudgeError(
                    f"the judge {self.identity['name']} answered with a {type(answer).__name__}: "
                    "expected text"
                )
            yield index, answer


def as_judge(judge: Any, device: str | torch.device | None = None) -> Judge:
    """What was given, as a judge.

    Args:
        judge: a judge; a chat model as folder, hub id, object or (model, tokenizer); or a function
            from prompt to answer.
        device: for a chat model.

    Raises:
        JudgeError: if it is none of these.
        LoadingError: if a chat model cannot be opened.
    """
    if isinstance(judge, Judge):
        return judge
    if isinstance(judge, str) and "://" in judge:
        raise JudgeError("a URL does not name a model: give Endpoint(url, model)")
    if isinstance(judge, str | Path | tuple | torch.nn.Module):
        from .local import LocalJudge

        return LocalJudge(judge, device=device)
    if callable(judge):
        return FunctionJudge(judge)
    raise JudgeError(
        "expected an Endpoint, a chat model (folder, hub id, (model, tokenizer)) or a function as "
        f"judge, got {type(judge).__name__}"
    )
