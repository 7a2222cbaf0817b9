"""From answers to rates: both orders, ties, bias, tests; and judges of several kinds."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from judge_for_tests import always_first, longer, verdict
from scipy import stats as scipy_stats

from hyperlens import write_report
from hyperlens.errors import CorpusError, JudgeError, LoadingError
from hyperlens.judging import (
    FewerRepeatedBigrams,
    Judgement,
    JudgeResult,
    judge_continuations,
    read_prompt,
)
from hyperlens.judging.judges import repeated_bigrams
from hyperlens.judging.pairs import JudgedPair, TextPair, bias_rows
from hyperlens.render.blocks import Chart
from hyperlens.render.format import PERCENT, interval
from hyperlens.statistics.significance import binomial_p, holm, wilson

QUIET = {"progress": False}


def pairs(n: int, a: str = "word {i}", b: str = "one word and another {i}") -> list[dict[str, str]]:
    return [{"context": f"Once {i}", "a": a.format(i=i), "b": b.format(i=i)} for i in range(n)]


def by_side(decide: Callable[[int, str], tuple[str, tuple, tuple]]) -> Callable[[str], str]:
    """A judge told by pair number and by the side ("a" or "b") that is shown first."""

    def judge(prompt: str) -> str:
        context, first, _ = read_prompt(prompt)
        return verdict(*decide(int(context.split()[1]), "a" if first.startswith("word") else "b"))

    return judge


def flowing(text: str) -> str:
    """Without line breaks."""
    return " ".join(text.split())


def test_a_judge_that_looks_at_the_place_decides_nothing() -> None:
    found = judge_continuations(pairs(9), judge=always_first, **QUIET)
    for criterion in ("coherence", "diversity", "overall"):
        share = {m: found.at(criterion=criterion, metric=m) for m in ("a_wins", "b_wins", "tie")}
        assert [row["value"] for row in share.values()] == [0, 0, 1]
        assert (share["tie"]["low"], share["tie"]["high"]) == wilson(9, 9)
        place = found.at(criterion=criterion, metric="first_position")
        assert (place["value"], place["n"]) == (1, 9)
        assert (place["low"], place["high"]) == wilson(9, 9)
        assert found.value(criterion=criterion, metric="orders_disagree") == 1
        assert found.at(criterion=criterion, metric="a_of_decided")["n"] == 0
        assert math.isnan(found.at(criterion=criterion, metric="a_of_decided")["p"])
    assert found.value(criterion="coherence", metric="score_a") == 5.5
    assert "The judge favours the text shown first" in found.summary()
    assert "no pair was decided" in found.summary()


def test_a_judge_that_prefers_the_longer_text_always_does() -> None:
    found = judge_continuations(pairs(12), judge=longer, names=("short", "long"), **QUIET)
    for criterion in ("coherence", "diversity", "overall"):
        assert found.value(criterion=criterion, metric="b_wins") == 1
        # No pair is judged by place.
        assert found.at(criterion=criterion, metric="first_position")["n"] == 0
        assert found.value(criterion=criterion, metric="orders_disagree") == 0
        assert found.value(criterion=criterion, metric="longer_wins") == 1
        p = found.at(criterion=criterion, metric="a_of_decided")["p"]
        assert p == pytest.approx(3 * scipy_stats.binomtest(0, 12).pvalue)
    assert found.value(criterion="coherence", metric="score_difference") == -5
    won = f"100.0% [{wilson(12, 12)[0]:.1%}, 100.0%] of 12 decided pairs, p = 0.001"
    assert f"Overall: B (long) wins {won}" in found.summary()
    assert "The judge favours" not in found.summary()
    swapped = judge_continuations(pairs(12, "one word and another {i}", "word {i}"), judge=longer)
    assert swapped.at(criterion="overall", metric="a_wins") == found.at(
        criterion="overall", metric="b_wins"
    ) | {"metric": "a_wins"}


def test_the_rule_counts_repeated_bigrams() -> None:
    loops = pairs(5, a="word {i} a b a b a b", b="a b c d e f {i}")
    found = judge_continuations(loops, judge=FewerRepeatedBigrams(), **QUIET)
    assert found.value(criterion="overall", metric="b_wins") == 1
    assert found.value(criterion="diversity", metric="fewer_repeats_wins") == 1
    assert found.value(criterion="coherence", metric="tie") == 1
    assert repeated_bigrams("a b a b a") == 0.5
    assert repeated_bigrams("a") == 0
    assert "not evidence about the models" in flowing(found.summary())


def test_rates_intervals_and_tests_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    n, places = 40, ("first", "second")
    winners = rng.choice(["first", "second", "tie"], size=(n, 2), p=[0.5, 0.3, 0.2])
    scores = rng.integers(1, 11, size=(n, 2, 4))

    def decide(i: int, shown_first: str) -> tuple[str, tuple, tuple]:
        order = "ab".index(shown_first)
        one = [int(x) for x in scores[i, order]]
        return str(winners[i, order]), tuple(one[:2]), tuple(one[2:])

    found = judge_continuations(pairs(n), judge=by_side(decide), **QUIET)
    p_values = {}
    for criterion in ("coherence", "diversity", "overall"):
        sides, leaning = [], []
        for i in range(n):
            pair, places_named = [], []
            for order, shown in enumerate(("ab", "ba")):
                if criterion == "overall":
                    place = str(winners[i, order])
                else:
                    x, y = (
                        scores[i, order, :2] if criterion == "coherence" else scores[i, order, 2:]
                    )
                    place = "tie" if x == y else places[int(x < y)]
                pair.append("tie" if place == "tie" else shown[places.index(place)])
                places_named.append({"first": 1, "second": -1, "tie": 0}[place])
            leaning.append(np.sign(sum(places_named)))
            sides.append(pair[0] if pair[0] == pair[1] else "tie")
        assert found.extras["outcomes"][criterion] == sides
        for metric, side in (("a_wins", "a"), ("b_wins", "b"), ("tie", "tie")):
            row, count = found.at(criterion=criterion, metric=metric), sides.count(side)
            expected = scipy_stats.binomtest(count, n).proportion_ci(0.95, method="wilson")
            assert row["value"] == count / n
            assert (row["low"], row["high"]) == (expected.low, expected.high)
        place = found.at(criterion=criterion, metric="first_position")
        first, second = leaning.count(1), leaning.count(-1)
        assert (place["value"], place["n"]) == (first / (first + second), first + second)
        assert (place["low"], place["high"]) == wilson(first, first + second)
        decided = sides.count("a") + sides.count("b")
        p_values[criterion] = scipy_stats.binomtest(sides.count("a"), decided, 0.5).pvalue
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    assert {c: found.at(criterion=c, metric="a_of_decided")["p"] for c in p_values} == corrected
    a = (scores[:, 0, 0] + scores[:, 1, 1]) / 2
    b = (scores[:, 0, 1] + scores[:, 1, 0]) / 2
    gap = found.at(criterion="coherence", metric="score_difference")
    expected = scipy_stats.ttest_rel(a, b).confidence_interval()
    assert (gap["low"], gap["high"]) == pytest.approx((expected.low, expected.high))


def test_an_unbiased_judge_is_seldom_called_biased() -> None:
    """It judges every pair by a place, which differs from pair to pair: all is chance."""
    rng, n, runs, alarms = np.random.default_rng(0), 50, 200, 0
    pair, verdicts = TextPair("c", "a", "b"), {}
    for winner in ("first", "second", "tie"):
        verdicts[winner] = Judgement((5, 5), (5, 5), winner, "")
    for _ in range(runs):
        favoured = rng.choice(["first", "second"], n)
        answers = np.where(rng.random((2, n)) < 0.1, "tie", favoured)
        judged = [JudgedPair(pair, (verdicts[x], verdicts[y])) for x, y in answers.T.tolist()]
        (place,) = (
            row for row in bias_rows(judged, "overall") if row["metric"] == "first_position"
        )
        alarms += not place["low"] <= 0.5 <= place["high"]
    # Nominally 5%; had the 2n answers been taken for independent, one in five or six.
    assert scipy_stats.binomtest(alarms, runs, 0.05, alternative="greater").pvalue > 0.01


@pytest.mark.parametrize(("wins", "n"), [(0, 1), (3, 10), (5, 10), (57, 98)])
def test_the_binomial_test_is_exact(wins: int, n: int) -> None:
    ways = [math.comb(n, k) for k in range(n + 1)]
    as_rare = sum(way for way in ways if way <= ways[wins])
    assert binomial_p(wins, n) == pytest.approx(as_rare / 2**n)
    assert math.isnan(binomial_p(0, 0))


def test_equal_texts_are_ties_that_nobody_is_asked_about() -> None:
    asked = []

    def judge(prompt: str) -> str:
        asked.append(prompt)
        return always_first(prompt)

    same = [{"context": "c", "a": "x", "b": "x"}] * 3
    found = judge_continuations([*same, *pairs(2), *pairs(2)], judge=judge, **QUIET)
    assert len(asked) == len(set(asked)) == 4  # nor twice about the same
    assert found.at(criterion="overall", metric="tie")["n"] == 7
    assert found.at(criterion="overall", metric="first_position")["n"] == 4
    counts = {"pairs": 7, "judged": 4, "identical": 3, "left_out": 0}
    assert found.extras["counts"] == counts
    assert "3 of two equal texts" in found.summary()


def test_answers_that_cannot_be_read_are_asked_for_again_then_left_out() -> None:
    asked: list[str] = []

    def judge(prompt: str) -> str:
        asked.append(prompt)
        number = int(read_prompt(prompt)[0].split()[1])
        if number == 0 or (number == 1 and "no use" not in prompt):
            return "I would rather not say"
        return longer(prompt)

    found = judge_continuations(pairs(4), judge=judge, tries=2, **QUIET)
    assert len(asked) == 8 + 4
    assert sum("it held no JSON object" in prompt for prompt in asked) == 4
    assert found.extras["counts"] == {"pairs": 4, "judged": 3, "identical": 0, "left_out": 1}
    assert found.extras["outcomes"]["overall"] == [None, "b", "b", "b"]
    assert found.at(criterion="overall", metric="b_wins")["n"] == 3
    assert found.extras["problems"] == {"it held no JSON object": 2}
    assert found.extras["unreadable"][0]["answer"] == "I would rather not say"
    assert "1 left out, because an answer could not be read (2x it held no" in flowing(
        found.summary()
    )


def test_nothing_at_all_could_be_judged(tmp_path: Path) -> None:
    found = judge_continuations(pairs(2), judge=lambda prompt: "no", tries=1, **QUIET)
    assert all(row["n"] == 0 and math.isnan(row["value"]) for row in found.table)
    assert "No pair could be judged" in found.summary()
    found.save(tmp_path / "out")
    assert JudgeResult.load(tmp_path / "out").extras == found.extras


def test_page_notebook_and_summary_show_the_same_numbers(tmp_path: Path) -> None:
    found = judge_continuations(pairs(12), judge=longer, names=("short", "long"), **QUIET)
    page = write_report(tmp_path / "page.html", [found]).read_text(encoding="utf-8")
    wins = interval(found.at(criterion="overall", metric="b_wins"), PERCENT)
    gap = "-5.00"
    for text in (found.summary(), found._repr_html_(), page):
        assert wins in text
        assert gap in text
        assert "one word and another 0" in text
    assert "new words" in page  # the question
    assert found.plot().to_dict()


def test_the_charts_show_the_rows_of_the_table() -> None:
    found = judge_continuations(pairs(9), judge=always_first, **QUIET)
    rates, biases = (block for block in found.blocks() if isinstance(block, Chart))
    assert rates.x.scale == biases.x.scale == "share"
    assert rates.roles == {"a": "base", "tie": "other", "b": "tuned"}
    metrics = {"a": "a_wins", "tie": "tie", "b": "b_wins"}
    assert len(rates.rows) == 9
    for shown in rates.rows:
        row = found.at(criterion=shown["criterion"], metric=metrics[shown["series"]])
        assert [shown[key] for key in ("value", "low", "high", "pairs")] == [
            row[key] for key in ("value", "low", "high", "n")
        ]
    first = [row["value"] for row in biases.rows if "shown first" in row["bias"]]
    assert first == [1, 1, 1]
    alike = judge_continuations(pairs(2), judge=longer, names=("x", "x"), **QUIET)
    rates = next(block for block in alike.blocks() if isinstance(block, Chart))
    assert rates.series == ["x (base)", "tie", "x (tuned)"]


def test_results_of_version_0_1_are_read(tmp_path: Path) -> None:
    found = judge_continuations(pairs(3), judge=longer, **QUIET)
    path = found.write(tmp_path)
    old = json.loads(path.read_text())
    old["meta"]["data"] = old["meta"].pop("corpus")
    path.write_text(json.dumps({**old, "format": 1}))
    assert JudgeResult.load(tmp_path).summary() == found.summary()


def test_examples_are_told_by_side() -> None:
    def decide(i: int, shown_first: str) -> tuple[str, tuple, tuple]:
        return ("first", (9, 2), (4, 4)) if shown_first == "a" else ("second", (3, 8), (4, 4))

    found = judge_continuations(pairs(3), judge=by_side(decide), n_examples=1, **QUIET)
    (example,) = found.extras["examples"]
    assert example["outcome"] == {"coherence": "a", "diversity": "tie", "overall": "a"}
    forward, backward = example["verdicts"]
    assert (forward["shown_first"], forward["winner"]) == ("a", "a")
    assert (backward["shown_first"], backward["winner"]) == ("b", "a")
    assert forward["coherence"] == {"a": 9, "b": 2}
    assert backward["coherence"] == {"a": 8, "b": 3}


def test_what_cannot_be_a_judge() -> None:
    for judge, said in (
        (3, "got int"),
        ("http://localhost:8000/v1", "Endpoint"),
        (lambda prompt: None, "answered with a NoneType"),
    ):
        with pytest.raises(JudgeError, match=said):
            judge_continuations(pairs(1), judge=judge, **QUIET)
    with pytest.raises(LoadingError, match="does not exist"):
        judge_continuations(pairs(1), judge=Path("none"), **QUIET)
    with pytest.raises(CorpusError, match="tries"):
        judge_continuations(pairs(1), judge=longer, tries=0, **QUIET)
    with pytest.raises(CorpusError, match="n_examples must be at least 0"):
        judge_continuations(pairs(1), judge=longer, n_examples=-1, **QUIET)
    with pytest.raises(JudgeError, match="two sides"):
        judge_continuations(pairs(1), judge=longer, names=("one",), **QUIET)
