"""The paper's own protocol (arXiv 2605.22579, appendix G): each pair once, labelled A and B.

The prompt is a text file with placeholders; the packaged one is the paper's, word for word.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..data.texts import ENCODING
from ..errors import JudgeError
from .prompt import PLACES, SCORED, TIE, Judgement, read_object

PAPER = "paper"
PLACEHOLDERS = ("context", "continuation_a", "continuation_b")
PLACE = re.compile(r"\{(context|continuation_a|continuation_b)\}")
LONGEST_PROMPT = 100_000

_WINNERS = {"A": PLACES[0], "B": PLACES[1], TIE: TIE}
_SCORES = [f"{criterion}_score_{side}" for criterion in SCORED for side in ("a", "b")]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "winner": {"enum": list(_WINNERS)},
        **{name: {"type": "integer", "minimum": 1, "maximum": 10} for name in _SCORES},
        "reasoning": {"type": "string"},
    },
    "required": ["winner", *_SCORES, "reasoning"],
}
"""JSON Schema of an answer in the paper's form."""


@dataclass(frozen=True)
class LabelledPrompt:
    """A question about two texts that are called A and B.

    Attributes:
        template: its text, with the placeholders {context}, {continuation_a} and {continuation_b}.
        name: "paper" for the paper's own, else the name of its file.
    """

    template: str
    name: str

    @property
    def is_paper(self) -> bool:
        """Whether this is the paper's prompt, word for word."""
        return self.template == _paper_template()

    def write(self, context: str, a: str, b: str) -> str:
        """The question about two texts; braces in a text are left alone.

        >>> prompt = LabelledPrompt("{context}|{continuation_a}|{continuation_b}", "mine")
        >>> prompt.write("x", "{context}", "z")
        'x|{context}|z'
        """
        texts = dict(zip(PLACEHOLDERS, (context, a, b), strict=True))
        return PLACE.sub(lambda match: texts[match[1]], self.template)

    def read(self, prompt: str) -> tuple[str, str, str]:
        """The opening and both texts of a question: for judges that are functions.

        Raises:
            JudgeError: if it is another prompt's.
        """
        pattern, named = "", set()
        for i, part in enumerate(PLACE.split(self.template)):
            if i % 2 == 0:
                pattern += re.escape(part)
            elif part in named:
                pattern += f"(?P={part})"
            else:
                named.add(part)
                pattern += f"(?P<{part}>.*?)"
        match = re.match(pattern, prompt, re.DOTALL)
        if match is None:
            raise JudgeError(f"expected a question in the words of the prompt {self.name!r}")
        context, a, b = (match[name] for name in PLACEHOLDERS)
        return context, a, b


def _paper_template() -> str:
    return (files(__package__) / "paper_prompt.txt").read_text(encoding="utf-8")


def open_prompt(source: str | Path) -> LabelledPrompt:
    """A prompt from its file.

    Args:
        source: a text file with the three placeholders; or "paper".

    Raises:
        JudgeError: if it cannot be read, or lacks a placeholder.

    >>> open_prompt("paper").is_paper
    True
    """
    if source == PAPER:
        return LabelledPrompt(_paper_template(), PAPER)
    path = Path(source).expanduser()
    try:
        text = path.read_text(encoding=ENCODING)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise JudgeError(
            f"cannot read the prompt {path} ({reason}): give a text file, or {PAPER!r} for the "
            "paper's own"
        ) from None
    missing = [name for name in PLACEHOLDERS if f"{{{name}}}" not in text]
    if missing:
        raise JudgeError(
            f"the prompt {path} has no {{{missing[0]}}}: it needs the placeholders "
            f"{', '.join(f'{{{name}}}' for name in PLACEHOLDERS)}"
        )
    if len(text) > LONGEST_PROMPT:
        raise JudgeError(f"the prompt {path} is longer than {LONGEST_PROMPT:,} characters")
    return LabelledPrompt(text, path.name)


def read_labelled(answer: str) -> Judgement:
    """The judgement in an answer of the paper's form; A is the first text.

    Raises:
        UnreadableAnswer: if there is no such object, more than one, or it has another form.
    """
    value = read_object(answer, SCHEMA)
    coherence, diversity = (
        (int(value[f"{name}_score_a"]), int(value[f"{name}_score_b"])) for name in SCORED
    )
    return Judgement(coherence, diversity, _WINNERS[value["winner"]], value["reasoning"])


def labelled_answer(judgement: Judgement) -> str:
    """A judgement in the paper's form, as a rule gives it."""
    scores = {
        f"{name}_score_{side}": score
        for name in SCORED
        for side, score in zip(("a", "b"), judgement.scores(name), strict=True)
    }
    names = {place: label for label, place in _WINNERS.items()}
    return json.dumps({"winner": names[judgement.winner], **scores, "reasoning": judgement.reason})
