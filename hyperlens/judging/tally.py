"""From verdicts in both orders to rates, tests, and signs of a judge's own leanings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..decoding.diversity import words
from ..statistics import significance
from .asking import Found
from .pairs import Pair
from .rule import repeated_bigrams
from .verdict import CRITERIA, PLACES, SCORED, TIE, NoVerdict, Verdict

SIDES = ("a", "b")
OUTCOMES = (*SIDES, TIE)


@dataclass(frozen=True)
class Judged:
    """A pair and what was said of it.

    Attributes:
        pair: the texts.
        found: with a shown first, then with b shown first; None where it was not asked because
            both texts are the same.
    """

    pair: Pair
    found: tuple[Found, Found] | None

    @property
    def verdicts(self) -> tuple[Verdict, Verdict] | None:
        """In both orders, if both could be read."""
        if self.found is None:
            return None
        first, second = self.found
        if isinstance(first, Verdict) and isinstance(second, Verdict):
            return first, second
        return None

    @property
    def problems(self) -> list[NoVerdict]:
        """What was wrong with answers that could not be read."""
        return [found for found in self.found or () if isinstance(found, NoVerdict)]

    def place(self, criterion: str) -> str | None:
        """Which place ("first", "second") its two answers favour together, "tie" for neither.

        None if an answer could not be read. A side that wins in both orders favours no place.
        """
        if self.verdicts is None:
            return None
        named = [verdict.prefers(criterion) for verdict in self.verdicts]
        first, second = (named.count(place) for place in PLACES)
        return TIE if first == second else PLACES[first < second]

    def choices(self, criterion: str) -> tuple[str, str] | None:
        """The side ("a", "b" or "tie") that wins with a shown first, and with b shown first."""
        if self.verdicts is None:
            return None
        forward, backward = (verdict.prefers(criterion) for verdict in self.verdicts)
        return _side(forward, SIDES), _side(backward, SIDES[::-1])

    def outcome(self, criterion: str) -> str | None:
        """The side that wins in both orders, else "tie"; None if an answer could not be read.

        Two identical texts are a tie.
        """
        if self.found is None:
            return TIE
        chosen = self.choices(criterion)
        if chosen is None:
            return None
        return chosen[0] if chosen[0] == chosen[1] else TIE

    def scores(self, criterion: str) -> tuple[float, float] | None:
        """Scores of a and b, 1 to 10, mean over both orders."""
        if self.verdicts is None:
            return None
        forward, backward = (verdict.scores(criterion) for verdict in self.verdicts)
        return (forward[0] + backward[1]) / 2, (forward[1] + backward[0]) / 2


def _side(place: str, shown: Sequence[str]) -> str:
    return TIE if place == TIE else shown[PLACES.index(place)]


def tally(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Rows of a `JudgeResult`.

    Rates are shares of pairs with Wilson's interval; p is that of the exact binomial test of wins
    among the decided pairs against one half, two-sided, Holm-corrected over the criteria.
    """
    rows = [row for criterion in CRITERIA for row in _of_criterion(judged, criterion)]
    return significance.holm_rows(rows)


def _of_criterion(judged: Sequence[Judged], criterion: str) -> list[dict[str, Any]]:
    outcomes = [one.outcome(criterion) for one in judged]
    counts = {outcome: outcomes.count(outcome) for outcome in OUTCOMES}
    known, decided = sum(counts.values()), counts["a"] + counts["b"]
    names = ("a_wins", "b_wins", "tie")
    rows = [
        _share(criterion, name, counts[outcome], known)
        for name, outcome in zip(names, OUTCOMES, strict=True)
    ]
    p = significance.binomial_p(counts["a"], decided)
    rows.append({**_share(criterion, "a_of_decided", counts["a"], decided), "p": p})
    rows += leanings(judged, criterion)
    if criterion in SCORED:
        rows += _scores(judged, criterion)
    return rows


def leanings(judged: Sequence[Judged], criterion: str) -> list[dict[str, Any]]:
    """How often place, length and repetition go with winning."""
    chosen = [one.choices(criterion) for one in judged]
    both = [choice for choice in chosen if choice is not None]
    # Of pairs, not of answers: the two answers of a pair are not independent.
    places = [one.place(criterion) for one in judged]
    first, second = (places.count(place) for place in PLACES)
    return [
        _share(criterion, "first_position", first, first + second),
        _share(criterion, "orders_disagree", sum(x != y for x, y in both), len(both)),
        _won_by(judged, criterion, "longer_wins", lambda text: len(words(text))),
        _won_by(judged, criterion, "fewer_repeats_wins", lambda text: -repeated_bigrams(text)),
    ]


def _won_by(
    judged: Iterable[Judged], criterion: str, metric: str, more: Callable[[str], float]
) -> dict[str, Any]:
    """How many of the decided pairs were won by the text with more of something."""
    won = []
    for one in judged:
        winner = one.outcome(criterion)
        a, b = more(one.pair.a), more(one.pair.b)
        if winner in SIDES and a != b:
            won.append(winner == SIDES[a < b])
    return _share(criterion, metric, sum(won), len(won))


def _scores(judged: Iterable[Judged], criterion: str) -> list[dict[str, Any]]:
    found = [one.scores(criterion) for one in judged]
    a, b = ([scores[side] for scores in found if scores is not None] for side in (0, 1))
    estimates = (
        ("score_a", significance.estimate(a)),
        ("score_b", significance.estimate(b)),
        ("score_difference", significance.difference(a, b)),
    )
    return [_row(criterion, name, e.value, e.low, e.high, e.n) for name, e in estimates]


def _share(criterion: str, metric: str, count: int, n: int) -> dict[str, Any]:
    value = count / n if n else math.nan
    return _row(criterion, metric, value, *significance.wilson(count, n), n)


def _row(
    criterion: str, metric: str, value: float, low: float, high: float, n: int
) -> dict[str, Any]:
    numbers = {"value": value, "low": low, "high": high, "n": n, "p": math.nan}
    return {"criterion": criterion, "metric": metric, **numbers}
