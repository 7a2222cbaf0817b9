"""Measures of repetition against the definitions written out."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperlens.decoding import diversity
from hyperlens.statistics import significance

TEXTS = st.lists(st.integers(0, 4), max_size=14)


@given(TEXTS, st.integers(1, 4))
def test_repetition_is_one_minus_distinct_over_all(text: list[int], n: int) -> None:
    grams = [tuple(text[i + j] for j in range(n)) for i in range(len(text)) if i + n <= len(text)]
    found = diversity.repetition(text, n)
    if not grams:
        assert math.isnan(found)
        return
    once = [g for i, g in enumerate(grams) if g not in grams[:i]]
    assert found == 1 - len(once) / len(grams)
    assert diversity.distinct([text], n) == len(once) / len(grams)


@given(st.lists(TEXTS, max_size=4))
def test_distinct_joins_counts_but_no_texts(texts: list[list[int]]) -> None:
    pairs = [pair for text in texts for pair in pairwise(text)]
    found = diversity.distinct(texts, 2)
    assert math.isnan(found) if not pairs else found == len(set(pairs)) / len(pairs)


@given(st.lists(TEXTS, max_size=6), st.integers(1, 3))
def test_distinct_by_text_is_the_jackknife(texts: list[list[int]], n: int) -> None:
    found = diversity.distinct_by_text(texts, n)
    assert len(found) == len(texts)
    count = len(texts)
    without = [diversity.distinct([*texts[:i], *texts[i + 1 :]], n) for i in range(count)]
    if any(map(math.isnan, without)):
        assert all(map(math.isnan, found))
        return
    whole = diversity.distinct(texts, n)
    if count == 0:
        return
    assert sum(found) / count == pytest.approx(whole)
    spread = sum((x - sum(without) / count) ** 2 for x in without)
    standard_error = math.sqrt(spread * (count - 1) / count)
    if count > 1:
        assert significance.estimate(found).se == pytest.approx(standard_error, abs=1e-12)


@given(TEXTS)
def test_the_ratio_counts_every_item_once(text: list[int]) -> None:
    found = diversity.type_token_ratio(text)
    if not text:
        assert math.isnan(found)
        return
    new = [item for i, item in enumerate(text) if item not in text[:i]]
    assert found == len(new) / len(text)


@given(TEXTS, st.integers(1, 6))
def test_the_windowed_ratio_is_a_mean_over_all_windows(text: list[int], window: int) -> None:
    windows = [text[i : i + window] for i in range(len(text)) if i + window <= len(text)]
    windows = windows or [text]
    ratios = [len(set(w)) / len(w) for w in windows if w]
    found = diversity.windowed_type_token_ratio(text, window)
    assert math.isnan(found) if not text else found == pytest.approx(sum(ratios) / len(ratios))


@given(TEXTS)
def test_the_longest_loop_is_the_longest_stretch_of_two_periods(text: list[int]) -> None:
    longest = 0
    for start in range(len(text)):
        for end in range(start + 2, len(text) + 1):
            stretch = text[start:end]
            for period in range(1, len(stretch) // 2 + 1):
                if all(a == b for a, b in zip(stretch, stretch[period:], strict=False)):
                    longest = max(longest, len(stretch))
    assert diversity.longest_loop(text) == longest


@given(TEXTS)
def test_the_measures_are_these_functions(text: list[int]) -> None:
    expected = {
        "ttr": diversity.type_token_ratio(text),
        "windowed_ttr": diversity.windowed_type_token_ratio(text, 50),
        "rep_2": diversity.repetition(text, 2),
        "rep_3": diversity.repetition(text, 3),
        "loop": diversity.longest_loop(text) / len(text) if text else math.nan,
    }
    found = {name: measure(text) for name, measure in diversity.MEASURES.items()}
    assert found == pytest.approx(expected, nan_ok=True)


@given(TEXTS.filter(bool))
def test_every_measure_is_a_share(text: list[int]) -> None:
    for name, measure in diversity.MEASURES.items():
        value = measure(text)
        assert math.isnan(value) or 0 <= value <= 1, name


def test_words_are_what_is_between_spaces_and_marks() -> None:
    assert diversity.words("The fox's den -- the FOX said: 12!") == [
        *("the", "fox", "s", "den", "the", "fox", "said", "12"),
    ]
    assert diversity.type_token_ratio(diversity.words("A a b")) == 2 / 3
