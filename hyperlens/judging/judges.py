"""Judges: the protocol, and those that are no server: a local chat model, a function, a rule."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from ..checks import check_types
from ..decoding.diversity import repetition, words
from ..decoding.generate import continuations
from ..errors import CorpusError, HyperlensError, JudgeError, first_line
from ..hooks.loading import parse_device, parse_dtype
from ..models.sources import open_source
from ..results.fingerprint import weights_sha256
from .labelled import PAPER, labelled_answer, open_prompt
from .prompt import PLACES, SCORED, TIE, Judgement, read_prompt


@runtime_checkable
class Judge(Protocol):
    """Anything that answers prompts."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything its answers depend on, as JSON values; includes a `kind`, and no secret."""

    def answers(self, prompts: Sequence[str]) -> Generator[tuple[int, str], None, None]:
        """Yield (index, answer) for every prompt, in any order."""


def as_judge(judge: Any, device: str | torch.device | None = None) -> Judge:
    """Anything that can judge, as a `Judge`.

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
        return LocalJudge(judge, device=device)
    if callable(judge):
        return FunctionJudge(judge)
    raise JudgeError(
        "expected an Endpoint, a chat model (folder, hub id, (model, tokenizer)) or a function as "
        f"judge, got {type(judge).__name__}"
    )


class FunctionJudge:
    """A function from prompt to answer.

    What a function does cannot be told from outside, so its answers are kept in a folder only if
    it identifies itself: give it an attribute `identity`, a mapping of JSON values.

    Attributes:
        is_identified: whether the function has such an attribute.
    """

    @check_types
    def __init__(self, function: Callable[[str], str]) -> None:
        self._function = function
        name = getattr(function, "__qualname__", type(function).__qualname__)
        identity = getattr(function, "identity", None)
        self.is_identified = identity is not None
        self.identity = {"kind": "function", "name": name, **(identity or {})}

    def answers(self, prompts: Sequence[str]) -> Generator[tuple[int, str], None, None]:
        """Yield (index, answer) for one prompt after another.

        Raises:
            JudgeError: if the function fails, or returns something other than text.
        """
        for index, prompt in enumerate(prompts):
            try:
                answer = self._function(prompt)
            except HyperlensError:
                raise
            except Exception as error:
                raise JudgeError(
                    f"the judge {self.identity['name']} failed "
                    f"({type(error).__name__}: {first_line(error)})"
                ) from error
            if not isinstance(answer, str):
                raise JudgeError(
                    f"the judge {self.identity['name']} answered with a {type(answer).__name__}: "
                    "expected text"
                )
            yield index, answer


class LocalJudge:
    """A chat model on this machine: its own chat template, greedy decoding, in batches.

    Args:
        source: folder, hub id, `PreTrainedModel`, `PeftModel`, or (model, tokenizer).
        max_new_tokens: the longest answer, in tokens.
        batch_size: prompts per forward pass.
        device, dtype: as in `compare_models`.

    Raises:
        LoadingError: if it cannot be opened.
        JudgeError: if it has no tokenizer, or no chat template.
    """

    @check_types
    def __init__(
        self,
        source: Any,
        *,
        max_new_tokens: int = 800,
        batch_size: int = 4,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        opened = open_source(source, device=parse_device(device), dtype=parse_dtype(dtype))
        if getattr(opened.tokenizer, "chat_template", None) is None:
            lacks = "tokenizer" if opened.tokenizer is None else "chat template"
            raise JudgeError(
                f"the judge {opened.name} has no {lacks}: give a chat model with its tokenizer, as "
                "a folder or (model, tokenizer)"
            )
        self._model, self._tokenizer = opened.model, opened.tokenizer
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size
        template = str(opened.tokenizer.chat_template)
        # Answers do not depend on where the model's folder is.
        name = Path(opened.name).name if Path(opened.name).is_dir() else opened.name
        self.identity = {
            "kind": "local",
            "name": name,
            "sha256": weights_sha256(opened.model),
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "dtype": str(next(opened.model.parameters()).dtype).removeprefix("torch."),
            "max_new_tokens": max_new_tokens,
        }

    def answers(self, prompts: Sequence[str]) -> Generator[tuple[int, str], None, None]:
        """Yield (index, answer) batch by batch, the longest prompts first.

        Raises:
            JudgeError: if a prompt does not fit the model.
        """
        chats = [self._tokens(prompt) for prompt in prompts]
        order = sorted(range(len(chats)), key=lambda i: len(chats[i]), reverse=True)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            generated = self._generate([chats[i] for i in batch])
            for i, tokens in zip(batch, generated, strict=True):
                yield i, str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _generate(self, chats: list[list[int]]) -> list[list[int]]:
        try:
            return continuations(
                self._model,
                self._tokenizer,
                chats,
                max_new_tokens=self._max_new_tokens,
                batch_size=self._batch_size,
                progress=False,
            )
        except CorpusError as error:
            raise JudgeError(f"the judge {self.identity['name']}: {error}") from None

    def _tokens(self, prompt: str) -> list[int]:
        chat = [{"role": "user", "content": prompt}]
        # The template writes the special tokens itself.
        text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


class FewerRepeatedBigrams:
    """A rule in place of a judge: the text that repeats fewer bigrams of words wins.

    It does not read the texts, and gives both the same coherence. It tries out a set-up without a
    model, and is a baseline: a judge that hardly differs from it adds nothing to counting.
    """

    identity = {"kind": "rule", "name": "fewer repeated bigrams"}

    def answers(self, prompts: Sequence[str]) -> Generator[tuple[int, str], None, None]:
        """Yield (index, answer) for one prompt after another."""
        for index, prompt in enumerate(prompts):
            yield index, self._answer(prompt)

    def _answer(self, prompt: str) -> str:
        paper = open_prompt(PAPER)
        is_labelled = prompt.startswith(paper.template.split("{")[0])
        _, *texts = paper.read(prompt) if is_labelled else read_prompt(prompt)
        first, second = (repeated_bigrams(text) for text in texts)
        winner = TIE if first == second else PLACES[first > second]
        scores = [1 + round(9 * (1 - share)) for share in (first, second)]
        reason = (
            f"Repeated bigrams: {first:.1%} in the first, {second:.1%} in the second text. A rule; "
            "coherence was not judged."
        )
        judgement = Judgement((5, 5), (scores[0], scores[1]), winner, reason)
        return labelled_answer(judgement) if is_labelled else _own_answer(judgement)


def _own_answer(judgement: Judgement) -> str:
    """A judgement in the form that `write_prompt` asks for."""
    scores = {name: dict(zip(PLACES, judgement.scores(name), strict=True)) for name in SCORED}
    return json.dumps({"reason": judgement.reason, **scores, "winner": judgement.winner})


def repeated_bigrams(text: str) -> float:
    """Share of bigrams of words that came before; 0 in a text of fewer than two words.

    >>> repeated_bigrams("a b a b a")
    0.5
    """
    share = repetition(words(text), 2)
    return 0.0 if math.isnan(share) else share
