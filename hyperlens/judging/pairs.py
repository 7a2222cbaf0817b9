"""Pairs of continuations: read from a file, and counted once they are judged in both orders.

Counting gives win rates with tests, and signs of a judge's bias.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import is_list
from ..data.texts import ENCODING
from ..decoding.diversity import words
from ..errors import CorpusError
from ..statistics import significance
from .judges import repeated_bigrams
from .prompt import CRITERIA, PLACES, SCORED, TIE, Judgement, UnreadableAnswer

SIDES = ("a", "b")
OUTCOMES = (*SIDES, TIE)


class TextPair(NamedTuple):
    """One opening and its two continuations.

    Attributes:
        context: the opening that both texts continue.
        a, b: what the two models wrote.
    """

    context: str
    a: str
    b: str

    @property
    def is_identical(self) -> bool:
        """Whether there is nothing to choose between."""
        return self.a == self.b


def read_pairs(source: Any) -> list[TextPair]:
    """Pairs from a list of mappings with the keys context, a and b, or from a JSONL file of them.

    Raises:
        CorpusError: if the file cannot be read, or a pair lacks a text.

    >>> read_pairs([{"context": "Once", "a": " upon a time", "b": " there was"}])
    [TextPair(context='Once', a=' upon a time', b=' there was')]
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        pairs = [_pair(record, place) for record, place in _lines(path)]
    elif is_list(source):
        pairs = [_pair(record, f"pair {i}") for i, record in enumerate(source)]
    else:
        raise CorpusError(
            "expected a list of pairs or the path of a JSONL file, got " + type(source).__name__
        )
    if not pairs:
        raise CorpusError("there are no pairs to judge: expected at least one")
    return pairs


def pairs_sha256(pairs: Sequence[TextPair]) -> str:
    """SHA-256 over all texts, in order."""
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _lines(path: Path) -> Iterable[tuple[Any, str]]:
    """Every record, and where it is."""
    try:
        lines = path.read_text(encoding=ENCODING).split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise CorpusError(
            f"cannot read pairs from {path} ({reason}): expected a JSONL file of objects with "
            "context, a and b"
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            yield json.loads(line), place
        except (ValueError, RecursionError):
            raise CorpusError(f"{place} is not JSON: expected one object per line") from None


def _pair(record: Any, place: str) -> TextPair:
    if isinstance(record, TextPair):
        return record
    if not isinstance(record, Mapping):
        raise CorpusError(
            f"{place} is a {type(record).__name__}: expected an object with context, a and b"
        )
    texts = [record.get(name) for name in TextPair._fields]
    for name, text in zip(TextPair._fields, texts, strict=True):
        if not isinstance(text, str):
            raise CorpusError(
                f"{place} has no string in {name!r}: expected an object with context, a and b"
            )
    return TextPair(*map(str, texts))


@dataclass(frozen=True)
class JudgedPair:
    """A pair and the two answers to it.

    Attributes:
        pair: the texts.
        answers: with a shown first, then with b shown first; None where the judge was not asked
            because both texts are the same.
    """

    pair: TextPair
    answers: tuple[Judgement | UnreadableAnswer, Judgement | UnreadableAnswer] | None

    @property
    def judgements(self) -> tuple[Judgement, Judgement] | None:
        """In both orders, if both answers could be read."""
        if self.answers is None:
            return None
        forward, backward = self.answers
        if isinstance(forward, Judgement) and isinstance(backward, Judgement):
            return forward, backward
        return None

    @property
    def problems(self) -> list[UnreadableAnswer]:
        """What was wrong with answers that could not be read."""
        return [one for one in self.answers or () if isinstance(one, UnreadableAnswer)]

    def favoured_place(self, criterion: str) -> str | None:
        """The place ("first", "second") that the two answers together favour, or "tie".

        A side that wins in both orders favours no place. None if an answer could not be read.
        """
        if self.judgements is None:
            return None
        named = [judgement.prefers(criterion) for judgement in self.judgements]
        first, second = (named.count(place) for place in PLACES)
        return TIE if first == second else PLACES[first < second]

    def winners(self, criterion: str) -> tuple[str, str] | None:
        """Who wins ("a", "b" or "tie") with a shown first, and with b shown first."""
        if self.judgements is None:
            return None
        forward, backward = (judgement.prefers(criterion) for judgement in self.judgements)
        return _side_at(forward, SIDES), _side_at(backward, SIDES[::-1])

    def outcome(self, criterion: str) -> str | None:
        """The side that wins in both orders, else "tie"; None if an answer could not be read.

        Two identical texts are a tie.
        """
        if self.answers is None:
            return TIE
        winners = self.winners(criterion)
        if winners is None:
            return None
        return winners[0] if winners[0] == winners[1] else TIE

    def scores(self, criterion: str) -> tuple[float, float] | None:
        """Scores of a and b, 1 to 10, mean over both orders."""
        if self.judgements is None:
            return None
        forward, backward = (judgement.scores(criterion) for judgement in self.judgements)
        return (forward[0] + backward[1]) / 2, (forward[1] + backward[0]) / 2


def _side_at(place: str, shown: Sequence[str]) -> str:
    return TIE if place == TIE else shown[PLACES.index(place)]


def result_rows(judged: Sequence[JudgedPair]) -> list[dict[str, Any]]:
    """The table of a `JudgeResult`.

    Rates are shares of pairs with Wilson's interval. p is that of the two-sided exact binomial
    test of wins among the decided pairs against one half, Holm-corrected over the criteria.
    """
    rows = [row for criterion in CRITERIA for row in _criterion_rows(judged, criterion)]
    return significance.holm_rows(rows)


def _criterion_rows(judged: Sequence[JudgedPair], criterion: str) -> list[dict[str, Any]]:
    outcomes = [one.outcome(criterion) for one in judged]
    counts = {outcome: outcomes.count(outcome) for outcome in OUTCOMES}
    n_known, n_decided = sum(counts.values()), counts["a"] + counts["b"]
    rows = [
        share_row(criterion, metric, counts[outcome], n_known)
        for metric, outcome in (("a_wins", "a"), ("b_wins", "b"), ("tie", TIE))
    ]
    p = significance.binomial_p(counts["a"], n_decided)
    rows.append({**share_row(criterion, "a_of_decided", counts["a"], n_decided), "p": p})
    rows += bias_rows(judged, criterion)
    if criterion in SCORED:
        rows += _score_rows(judged, criterion)
    return rows


def bias_rows(judged: Sequence[JudgedPair], criterion: str) -> list[dict[str, Any]]:
    """How often place, length and repetition go with winning."""
    winners = [pair for one in judged if (pair := one.winners(criterion)) is not None]
    # Counted by pairs, not answers: the two answers of a pair are not independent.
    places = [one.favoured_place(criterion) for one in judged]
    first, second = (places.count(place) for place in PLACES)
    n_disagree = sum(forward != backward for forward, backward in winners)
    return [
        share_row(criterion, "first_position", first, first + second),
        share_row(criterion, "orders_disagree", n_disagree, len(winners)),
        _won_by(judged, criterion, "longer_wins", lambda text: len(words(text))),
        _won_by(judged, criterion, "fewer_repeats_wins", lambda text: -repeated_bigrams(text)),
    ]


def _won_by(
    judged: Iterable[JudgedPair], criterion: str, metric: str, measure: Callable[[str], float]
) -> dict[str, Any]:
    """How many of the decided pairs were won by the text that measures more."""
    won = []
    for one in judged:
        winner = one.outcome(criterion)
        a, b = measure(one.pair.a), measure(one.pair.b)
        if winner in SIDES and a != b:
            won.append(winner == SIDES[a < b])
    return share_row(criterion, metric, sum(won), len(won))


def _score_rows(judged: Iterable[JudgedPair], criterion: str) -> list[dict[str, Any]]:
    scores = [pair for one in judged if (pair := one.scores(criterion)) is not None]
    a, b = ([pair[side] for pair in scores] for side in (0, 1))
    estimates = (
        ("score_a", significance.estimate(a)),
        ("score_b", significance.estimate(b)),
        ("score_difference", significance.difference(a, b)),
    )
    return [_row(criterion, metric, e.value, e.low, e.high, e.n) for metric, e in estimates]


def share_row(
    criterion: str,
    metric: str,
    count: int,
    n: int,
    ends: Callable[[int, int], tuple[float, float]] = significance.wilson,
) -> dict[str, Any]:
    """A share of n pairs with its 95% interval, Wilson's by default."""
    value = count / n if n else math.nan
    return _row(criterion, metric, value, *ends(count, n), n)


def _row(
    criterion: str, metric: str, value: float, low: float, high: float, n: int
) -> dict[str, Any]:
    numbers = {"value": value, "low": low, "high": high, "n": n, "p": math.nan}
    return {"criterion": criterion, "metric": metric, **numbers}


Answer = Judgement | UnreadableAnswer | None
"""The judgement on a pair; None where nobody was asked because both texts are the same."""


def labelled_rows(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Rates over pairs with Clopper and Pearson's intervals; p as the paper's, uncorrected."""
    rows = []
    for criterion in CRITERIA:
        outcomes = labelled_outcomes(answers, criterion)
        counts = {outcome: outcomes.count(outcome) for outcome in OUTCOMES}
        n, decided = sum(counts.values()), counts["a"] + counts["b"]
        rows += [
            _labelled_row(criterion, metric, counts[outcome], n)
            for metric, outcome in (("a_wins", "a"), ("b_wins", "b"), ("tie", TIE))
        ]
        p = significance.binomial_p(counts["a"], decided)
        rows.append({**_labelled_row(criterion, "a_of_decided", counts["a"], decided), "p": p})
    return rows


def _labelled_row(criterion: str, metric: str, count: int, n: int) -> dict[str, Any]:
    exact = significance.clopper_pearson
    return share_row(criterion, f"labelled_{metric}", count, n, exact)


def labelled_outcomes(answers: Sequence[Answer], criterion: str) -> list[str | None]:
    """The winner of each pair ("a", "b", "tie"); None where the answer could not be read."""
    sides = dict(zip(PLACES, SIDES, strict=True)) | {TIE: TIE}
    found: list[str | None] = []
    for answer in answers:
        if answer is None:
            found.append(TIE)
        elif isinstance(answer, Judgement):
            found.append(sides[answer.prefers(criterion)])
        else:
            found.append(None)
    return found
