"""Which text does a judge prefer? Table 5 of arXiv 2605.22579 on the page, with its pitfalls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ..charts import chart, dots
from ..parts import (
    conclusions,
    details,
    heading,
    join,
    notes,
    p_in_words,
    paragraph,
    preformatted,
    share,
    table,
    tag,
)
from ..words import MISSING, plain

ORDER = 27
TITLE = "Which text does a judge prefer?"
READS = "judge"
LOADS = "hyperlens.judging.finding:JudgeResult"

CRITERIA = ("coherence", "diversity", "overall")
OUTCOMES = {"a_wins": "A wins", "tie": "tie", "b_wins": "B wins"}
LEANINGS = {
    "first_position": "pairs judged by place, for the text shown first",
    "orders_disagree": "pairs judged otherwise in the other order",
    "longer_wins": "decided pairs won by the longer text",
    "fewer_repeats_wins": "decided pairs won by the text that repeats less",
}
SHOWN_AT_ONCE = 1


def body(results: Sequence[Any]) -> Markup:
    """One pair of models and judge after another."""
    explained = paragraph(
        "A judge read two continuations of each prompt, without knowing who wrote them, in both "
        "orders. A pair is won by the text preferred in both; otherwise it is a tie. Coherence and "
        "diversity go to the higher score (1 to 10), overall to the named winner. Shares of pairs "
        "with Wilson's 95% intervals."
    )
    return join([explained, *(_one(result) for result in results)])


def _one(result: Any) -> Markup:
    a, b = (plain(name) for name in result.sides)
    names = {"A wins": f"A: {a}", "B wins": f"B: {b}", "tie": "tie"}
    drawn = [
        {
            "criterion": criterion,
            "model": names[words],
            **{key: result.value(criterion, metric)[key] for key in ("value", "low", "high", "n")},
        }
        for criterion in CRITERIA
        for metric, words in OUTCOMES.items()
    ]
    title = f"won and tied pairs, judged by {plain(result.judge)} (shares, 95% interval)"
    parts = [
        heading(f"A: {a}, B: {b}"),
        conclusions(result),
        notes(result),
        paragraph(plain(result.counted()) + "."),
        chart(dots(drawn, "criterion", "share of pairs"), title, f"{a} against {b}", drawn),
        table(["", *OUTCOMES.values(), "A of decided", "against half"], _rates(result)),
        table(
            ["the judge's leanings", *CRITERIA],
            _leanings(result),
            "no leaning: 50%, and 0% in the second row",
        ),
        table(["mean score, 1 to 10", "A", "B", "A − B"], _scores(result)),
    ]
    examples = [_example(example, a, b) for example in result.extras["examples"]]
    parts += examples[:SHOWN_AT_ONCE]
    if examples[SHOWN_AT_ONCE:]:
        parts.append(details("more pairs", *examples[SHOWN_AT_ONCE:]))
    if unreadable := result.extras["unreadable"]:
        told = (paragraph(f"“{one['answer']}”: {one['problem']}") for one in unreadable)
        parts.append(details("Some answers that could not be read", *told))
    parts.append(details("What the judge was asked", preformatted(result.extras["prompt"])))
    return join(parts)


def _rates(result: Any) -> list[list[str]]:
    rows = []
    for criterion in CRITERIA:
        tested = result.value(criterion, "a_of_decided")
        cells = [share(result.value(criterion, metric)) for metric in OUTCOMES]
        rows.append([criterion, *cells, share(tested), p_in_words(tested["p"]) or MISSING])
    return rows


def _leanings(result: Any) -> list[list[str]]:
    return [
        [words, *(share(result.value(criterion, metric)) for criterion in CRITERIA)]
        for metric, words in LEANINGS.items()
    ]


def _scores(result: Any) -> list[list[str]]:
    return [
        [
            criterion,
            *(_score(result.value(criterion, f"score_{what}")) for what in ("a", "b")),
            _score(result.value(criterion, "score_difference"), sign="+"),
        ]
        for criterion in CRITERIA
        if result.select(criterion=criterion, metric="score_a")
    ]


def _score(row: Mapping[str, Any], sign: str = "") -> str:
    if not row["n"]:
        return MISSING
    value, low, high = (f"{row[key]:{sign}.2f}" for key in ("value", "low", "high"))
    return value if row["low"] != row["low"] else f"{value} [{low}, {high}]"


def _example(example: Mapping[str, Any], a: str, b: str) -> Markup:
    sides = (
        tag(
            "div",
            tag("h4", f"{side.upper()}: {name}"),
            tag("p", tag("span", example["context"], class_="prompt"), example[side]),
        )
        for side, name in (("a", a), ("b", b))
    )
    rows = [_verdict(verdict) for verdict in example["verdicts"]]
    head = ["", "coherence A : B", "diversity A : B", "winner"]
    reasons = (
        paragraph(f"With {verdict['shown_first'].upper()} first: “{verdict['reason']}”")
        for verdict in example["verdicts"]
    )
    return join([tag("div", *sides, class_="texts"), table(head, rows), *reasons])


def _verdict(verdict: Mapping[str, Any]) -> list[str]:
    scores = [f"{verdict[c]['a']} : {verdict[c]['b']}" for c in ("coherence", "diversity")]
    winner = verdict["winner"]
    shown = winner if winner == "tie" else winner.upper()
    return [f"{verdict['shown_first'].upper()} shown first", *scores, shown]
