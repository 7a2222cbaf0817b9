"""What a judge is asked and what counts as its answer; answers that are kept."""

import json
import math
import random
import re
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from judge_for_tests import verdict

from hyperlens.errors import CorpusError, JudgeError, ResultsError
from hyperlens.judging.answers import AnswerCache
from hyperlens.judging.endpoint import LONGEST_WAIT, wait
from hyperlens.judging.pairs import TextPair, pairs_sha256, read_pairs
from hyperlens.judging.prompt import (
    FORM,
    LONGEST_ANSWER,
    SCHEMA,
    UnreadableAnswer,
    ask_again,
    read_judgement,
    read_prompt,
    write_prompt,
)

TEXT = st.text(alphabet=st.sampled_from("ab =\n{}FIRSTEND"), max_size=60) | st.text(max_size=20)
GOOD = verdict("second", (3, 7), (8, 8), "it loops")


# the prompt


@given(context=TEXT, first=TEXT, second=TEXT)
def test_no_text_can_end_its_own_part(context: str, first: str, second: str) -> None:
    prompt = write_prompt(context, first, second)
    assert read_prompt(prompt) == (context, first, second)
    assert read_prompt(ask_again(prompt, "===== END {x}")) == (context, first, second)


def test_a_text_that_looks_like_the_prompt_stays_a_text() -> None:
    inner = write_prompt("a", "b", "c")
    assert read_prompt(write_prompt(inner, inner, "d")) == (inner, inner, "d")
    with pytest.raises(JudgeError, match="write_prompt"):
        read_prompt("Which is better?")


def test_the_prompt_is_blind_and_asks_for_the_form() -> None:
    prompt = write_prompt("Once", " upon a time", " there was")
    assert FORM in prompt
    # Only places: no names of models, methods, or sides.
    assert not re.search(r"\b(model|LoRA|base|tuned|A|B)\b", prompt)
    keys = re.findall(r'"(\w+)":', FORM)
    assert set(keys) == {*SCHEMA["properties"], "first", "second"}


def test_the_question_after_a_bad_answer_is_another_one() -> None:
    prompt = write_prompt("a", "b", "c")
    again = ask_again(prompt, "it was empty")
    assert again.startswith(prompt)
    assert "it was empty" in again


# judgements


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Here is my verdict:\n{GOOD}\nI hope this helps {{really}}.",
        f"<think>maybe {verdict('first')}?</think>\n{GOOD}",
        f"The set {{a, b}} aside: {GOOD}",
        GOOD.replace("3", "3.0"),
    ],
)
def test_one_object_is_read_whatever_stands_around_it(answer: str) -> None:
    found = read_judgement(answer)
    assert (found.coherence, found.diversity) == ((3, 7), (8, 8))
    assert all(type(score) is int for score in found.coherence)
    assert (found.winner, found.reason) == ("second", "it loops")
    preferred = [found.prefers(c) for c in ("coherence", "diversity", "overall")]
    assert preferred == ["second", "tie", "second"]


def changed(**changes: object) -> str:
    return json.dumps({**json.loads(GOOD), **changes})


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("", "it was empty"),
        ("<think>only thoughts</think>  ", "it was empty"),
        ("The second one.", "it held no JSON object"),
        ("[1, 2]", "it held no JSON object"),
        (GOOD[:-1], "it held 2 JSON objects"),  # cut off: only its inner ones are whole
        (GOOD[:40], "it held no JSON object"),
        (GOOD.replace("8", "NaN"), "another form"),  # only the other scores are JSON
        (f"{GOOD} {GOOD}", "it held 2 JSON objects"),
        (GOOD.replace('"reason"', '"winner": "first", "reason"'), "it held 2 JSON objects"),
        ("{" * 5000, "it held no JSON object"),
        ('{"a":' * 20000, "it held no JSON object"),
        ("x" * (LONGEST_ANSWER + 1), "it was longer"),
        (changed(winner="First"), "winner"),
        (changed(winner=1), "winner"),
        (changed(coherence={"first": 0, "second": 5}), "coherence.first: 0 is less"),
        (changed(coherence={"first": 11, "second": 5}), "coherence.first: 11 is greater"),
        (changed(diversity={"first": "8", "second": 5}), "diversity.first: '8' is not"),
        (changed(diversity={"first": True, "second": 5}), "diversity.first: True is not"),
        (changed(diversity={"first": 7.5, "second": 5}), "diversity.first: 7.5 is not"),
        (changed(diversity=[8, 8]), "diversity"),
        (changed(reason=None), "reason"),
        (changed(extra=1), "extra"),
        ("{}", "required"),
        (json.dumps({"verdict": json.loads(GOOD)}), "another form"),
    ],
)
def test_anything_else_cannot_be_read(answer: str, problem: str) -> None:
    with pytest.raises(UnreadableAnswer, match=problem) as caught:
        read_judgement(answer)
    assert len(str(caught.value)) < 250
    assert answer.startswith(caught.value.answer)
    assert len(caught.value.answer) <= 300


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5))
def test_no_value_of_another_kind_gets_through(value: object) -> None:
    with pytest.raises(UnreadableAnswer):
        read_judgement(json.dumps(value))


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text: str) -> None:
    with pytest.raises(UnreadableAnswer):
        read_judgement(text)


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


# pairs


def test_pairs_are_read_from_lists_and_files(tmp_path: Path) -> None:
    records = [{"context": "c", "a": "x", "b": "y", "id": 7}, {"context": "", "a": "", "b": "{"}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n\n".join(map(json.dumps, records)) + "\n", encoding="utf-8-sig")
    pairs = [TextPair("c", "x", "y"), TextPair("", "", "{")]
    assert read_pairs(file) == read_pairs(str(file)) == read_pairs(records) == pairs
    assert read_pairs(pairs) == pairs
    assert pairs_sha256(pairs) != pairs_sha256(pairs[::-1])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"context": "c", "a": "x"}', "line 1 has no string in 'b'"),
        ('{"context": "c", "a": "x", "b": 3}', "line 1 has no string in 'b'"),
        ('{"context": "c", "a": "x", "b": "y"}\n{', "line 2 is not JSON"),
        ("[1]", "line 1 is a list"),
        ("\n", "no pairs"),
    ],
)
def test_bad_pairs_are_named(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(content)
    with pytest.raises(CorpusError, match=said):
        read_pairs(file)


def test_what_are_no_pairs(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}')
    for source, said in (
        (tmp_path / "none.jsonl", "No such file"),
        (tmp_path / "latin.jsonl", "UTF-8"),
        ({"context": "c"}, "list of pairs"),
        (3, "list of pairs"),
        (["text"], "pair 0 is a str"),
    ):
        with pytest.raises(CorpusError, match=said):
            read_pairs(source)


# answers that are kept


def test_answers_outlive_the_run(tmp_path: Path) -> None:
    judge = {"kind": "function", "name": "j", "n": 1}
    folder = tmp_path / "deep" / "answers"
    AnswerCache(judge, folder).put("question \ud800", "answer é \ud800")
    assert AnswerCache(judge, folder).get("question \ud800") == "answer é \ud800"
    assert AnswerCache(judge, folder).get("question") is None
    other = AnswerCache({**judge, "n": 2}, folder)
    assert other.get("question \ud800") is None
    assert len(list(folder.iterdir())) == 1
    other.put("question \ud800", "another")
    assert AnswerCache(judge, folder).get("question \ud800") == "answer é \ud800"


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", "\x00", '{"answer": 3}', "other"])
def test_a_damaged_answer_counts_as_missing(tmp_path: Path, damage: str) -> None:
    answers = AnswerCache({"kind": "j"}, tmp_path)
    answers.put("p", "a")
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(whole.replace('"p"', '"q"') if damage == "other" else damage)
    again = AnswerCache({"kind": "j"}, tmp_path)
    assert again.get("p") is None
    assert again.damaged == 1
    again.put("p", "a")
    assert file.read_text() == whole


def test_answers_need_a_folder_that_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "inside"):
        with pytest.raises(ResultsError, match="another folder"):
            AnswerCache({"kind": "j"}, folder)


# waiting


def test_pauses_double_and_are_the_same_for_the_same_seed() -> None:
    waits = [wait(i, 1.0, random.Random(7), None) for i in range(4)]
    assert waits == [wait(i, 1.0, random.Random(7), None) for i in range(4)]
    assert all(0.5 * 2**i <= seconds <= 1.5 * 2**i for i, seconds in enumerate(waits))
    assert wait(30, 1.0, random.Random(7), None) == LONGEST_WAIT


def test_the_server_may_ask_for_longer() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)
    for header, low, high in (
        ("7", 7, 7),
        ("2.5", 2.5, 2.5),
        (soon, 85, 91),
        (past, 0, 1.5),
        ("soon", 0, 1.5),
        ("nan", 0, 1.5),
        ("-4", 0, 1.5),
        ("", 0, 1.5),
    ):
        seconds = wait(0, 1.0, random.Random(1), header)
        assert low <= seconds <= high, header
        assert math.isfinite(seconds)
