"""What a judge must answer, and reading it: one JSON object that fits the schema, or nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

from ..errors import JudgeError

SCORED = ("coherence", "diversity")
CRITERIA = (*SCORED, "overall")
PLACES = ("first", "second")
TIE = "tie"

# Longer answers are not looked through.
LONGEST_ANSWER = 100_000

_SCORES = {
    "type": "object",
    "properties": {place: {"type": "integer", "minimum": 1, "maximum": 10} for place in PLACES},
    "required": list(PLACES),
    "additionalProperties": False,
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "reason": {"type": "string"},
        **dict.fromkeys(SCORED, _SCORES),
        "winner": {"enum": [*PLACES, TIE]},
    },
    "required": ["reason", *SCORED, "winner"],
    "additionalProperties": False,
}
"""JSON Schema of an answer, for servers that can hold a model to one."""


class NoVerdict(JudgeError):
    """An answer without a verdict: why, and how it began."""

    def __init__(self, problem: str, answer: str) -> None:
        super().__init__(problem)
        self.answer = answer[:300]


@dataclass(frozen=True)
class Verdict:
    """What a judge said of two texts.

    Attributes:
        coherence, diversity: scores 1 to 10 of the first and the second text.
        winner: "first", "second" or "tie".
        reason: in the judge's words.
    """

    coherence: tuple[int, int]
    diversity: tuple[int, int]
    winner: str
    reason: str

    def prefers(self, criterion: str) -> str:
        """ "first", "second" or "tie": overall the named winner, else the higher score."""
        if criterion == "overall":
            return self.winner
        first, second = self.scores(criterion)
        if first == second:
            return TIE
        return PLACES[first < second]

    def scores(self, criterion: str) -> tuple[int, int]:
        """Of the first and the second text, on "coherence" or "diversity"."""
        return self.coherence if criterion == "coherence" else self.diversity


def read_verdict(answer: str) -> Verdict:
    """The verdict in an answer: one JSON object, alone or with code fences or prose around it.

    What a model thinks aloud before `</think>` is no part of its answer.

    Raises:
        NoVerdict: if there is no such object, more than one, or it does not fit the schema.
    """
    said = answer.rpartition("</think>")[2]
    if not said.strip():
        raise NoVerdict("it was empty", answer)
    if len(said) > LONGEST_ANSWER:
        raise NoVerdict(f"it was longer than {LONGEST_ANSWER:,} characters", answer)
    found = _objects(said)
    if len(found) != 1:
        raise NoVerdict(f"it held {len(found) or 'no'} JSON object{'s'[: len(found)]}", answer)
    error = next(_validator().iter_errors(found[0]), None)
    if error is not None:
        where = error.json_path.removeprefix("$").removeprefix(".")
        what = f"{where}: {error.message}" if where else error.message
        raise NoVerdict(f"the JSON object had another form ({what[:120]})", answer)
    (value,) = found
    # JSON knows one kind of number: 7.0 is a whole one.
    scores = {name: tuple(int(value[name][place]) for place in PLACES) for name in SCORED}
    return Verdict(
        (scores["coherence"][0], scores["coherence"][1]),
        (scores["diversity"][0], scores["diversity"][1]),
        value["winner"],
        value["reason"],
    )


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(SCHEMA)


def _objects(text: str) -> list[dict[str, Any]]:
    """Every JSON object in a text that is not inside another."""
    decoder = json.JSONDecoder(object_pairs_hook=_with_distinct_keys, parse_constant=_no_number)
    found, start = [], text.find("{")
    while start != -1:
        try:
            value, end = decoder.raw_decode(text, start)
            found.append(value)
        except ValueError:
            end = start + 1
        except RecursionError:
            return []
        start = text.find("{", end)
    return found


def _with_distinct_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("a key stands twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
