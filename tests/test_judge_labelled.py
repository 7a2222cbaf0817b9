"""The paper's own protocol of judging: its prompt, one order, exact intervals."""

import json
import re
from pathlib import Path

import pytest
from conftest import SHARED
from judge_for_tests import says, serving, verdict
from scipy import stats

from hyperlens import cli
from hyperlens.errors import JudgeError
from hyperlens.judging import (
    Endpoint,
    FewerRepeatedBigrams,
    Judgement,
    JudgeResult,
    judge_continuations,
)
from hyperlens.judging.labelled import (
    PLACEHOLDERS,
    labelled_answer,
    open_prompt,
    read_labelled,
)
from hyperlens.judging.prompt import UnreadableAnswer

QUIET = {"progress": False}
ASKED = "coherence_score_a"


def pairs(n: int) -> list[dict[str, str]]:
    return [{"context": f"Once {i}", "a": f"word {i}", "b": f"another {i}"} for i in range(n)]


def answer(winner: str, coherence=(5, 5), diversity=(5, 5)) -> str:
    return labelled_answer(Judgement(coherence, diversity, winner, "because"))


def test_the_packaged_prompt_is_the_papers_word_for_word() -> None:
    paper = Path(SHARED / "paper" / "beyond-temperature.txt")
    if not paper.exists():
        pytest.skip("the paper is not here (../shared/paper)")
    text = " ".join(paper.read_text().split())
    prompt = open_prompt("paper")
    assert prompt.is_paper
    assert " ".join(prompt.template.split()) in text


def test_a_prompt_is_written_and_read_back() -> None:
    prompt = open_prompt("paper")
    texts = ("Once {continuation_a}", "a {context} {x}", "b\n\nand {continuation_b}")
    asked = prompt.write(*texts)
    assert all(text in asked for text in texts)
    assert prompt.read(asked) == texts
    with pytest.raises(JudgeError, match="in the words of the prompt 'paper'"):
        prompt.read("something else")


def test_answers_of_the_papers_form_are_read() -> None:
    judgement = read_labelled(answer("first", (9, 3), (2, 2)))
    assert (judgement.winner, judgement.prefers("coherence")) == ("first", "first")
    assert judgement.prefers("diversity") == "tie"
    assert json.loads(answer("second"))["winner"] == "B"
    fenced = f"Here it is:\n```json\n{answer('tie')}\n```"
    assert read_labelled(fenced).winner == "tie"
    good = json.loads(answer("first"))
    for changes in ({"winner": "C"}, {"coherence_score_a": 11}, {"diversity_score_b": "7"}):
        with pytest.raises(UnreadableAnswer):
            read_labelled(json.dumps(good | changes))
    with pytest.raises(UnreadableAnswer):
        read_labelled(verdict())


def scripted(n_a: int, n_b: int):
    """A server: A wins the first pairs, B those after them, else tie; blind, always tie."""

    def script(_: int, prompt: str):
        if ASKED not in prompt:
            return says(verdict())
        i = int(re.search(r"Once (\d+)", prompt)[1])
        winner = "first" if i < n_a else "second" if i < n_a + n_b else "tie"
        scores = {"first": (8, 4), "second": (4, 8), "tie": (5, 5)}[winner]
        return says(answer(winner, scores, scores[::-1]))

    return script


def test_counts_that_give_the_papers_table() -> None:
    """57.3, 41.2 and 1.5% are 114, 82 and 3 of 199, and nothing else of about 200.

    The paper prints 64.2 as the upper end of the first interval, which is 64.26.
    """
    with serving(scripted(114, 82)) as server:
        judge = Endpoint(server.url, "some-model", pause=0.01)
        found = judge_continuations(pairs(199), judge=judge, prompt="paper", **QUIET)
    labelled = [prompt for prompt in server.prompts if ASKED in prompt]
    assert (len(labelled), len(server.prompts)) == (199, 3 * 199)
    expected = {"a_wins": (114, 57.3, 50.1, 64.3), "b_wins": (82, 41.2, 34.3, 48.4)}
    for metric, (wins, *printed) in expected.items():
        row = found.at(criterion="overall", metric=f"labelled_{metric}")
        exact = stats.binomtest(wins, 199).proportion_ci(method="exact")
        assert (row["value"], row["low"], row["high"]) == (wins / 199, exact.low, exact.high)
        assert [round(100 * row[k], 1) for k in ("value", "low", "high")] == printed
    assert round(100 * found.value(criterion="overall", metric="labelled_tie"), 1) == 1.5
    # Diversity goes to the higher score, the other way round here.
    assert found.at(criterion="diversity", metric="labelled_a_wins")["value"] == 82 / 199
    decided = found.at(criterion="overall", metric="labelled_a_of_decided")
    assert decided["p"] == stats.binomtest(114, 196).pvalue
    assert round(decided["p"], 3) == 0.027
    # The blind protocol is beside it, and another thing.
    assert found.value(criterion="overall", metric="tie") == 1
    assert found.extras["labelled"]["is_paper"]
    assert found.meta["options"]["prompt"] == "paper"
    text = " ".join(str(found).split())
    assert "Asked once, with the paper's prompt and texts labelled A and B" in text


def test_only_those_who_ask_for_it_are_asked() -> None:
    with serving(scripted(1, 1)) as server:
        judge = Endpoint(server.url, "some-model", pause=0.01)
        found = judge_continuations(pairs(3), judge=judge, **QUIET)
    assert len(server.prompts) == 6
    assert "labelled" not in found.extras
    assert not found.rows(metric="labelled_tie")
    assert "In one order" not in str(found)


def test_unreadable_answers_are_asked_again_and_then_left_out() -> None:
    asked: list[str] = []

    def judge(prompt: str) -> str:
        if ASKED not in prompt:
            return verdict()
        asked.append(prompt)
        return "no JSON" if "Once 0" in prompt else answer("first")

    same = {"context": "c", "a": "same", "b": "same"}
    found = judge_continuations([*pairs(3), same], judge=judge, prompt="paper", **QUIET)
    about = found.extras["labelled"]
    assert about["outcomes"]["overall"] == [None, "a", "a", "tie"]
    assert about["left_out"] == 1
    # Asked again once: a third time in the same words would be answered from what is kept.
    assert len(asked) == 3 + 1
    assert found.at(criterion="overall", metric="labelled_a_wins")["n"] == 3
    assert "1 pair left out" in " ".join(str(found).split())


def test_a_prompt_of_ones_own(tmp_path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(f"{ASKED}: {{context}} / {{continuation_a}} / {{continuation_b}}?")
    asked: list[str] = []

    def judge(prompt: str) -> str:
        asked.append(prompt)
        return answer("second") if ASKED in prompt else verdict()

    found = judge_continuations(pairs(2), judge=judge, prompt=file, **QUIET)
    assert f"{ASKED}: Once 1 / word 1 / another 1?" in asked
    assert found.value(criterion="overall", metric="labelled_b_wins") == 1
    assert not found.extras["labelled"]["is_paper"]
    assert found.extras["labelled"]["prompt"] == file.read_text()
    assert "with the prompt mine.txt" in " ".join(str(found).split())


def test_prompts_that_cannot_be(tmp_path) -> None:
    (tmp_path / "half.txt").write_text("{context} {continuation_a}")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for source, words in (
        (tmp_path / "half.txt", "has no {continuation_b}"),
        (tmp_path / "none.txt", "cannot read the prompt"),
        (tmp_path, "cannot read the prompt"),
        (tmp_path / "bytes", "not UTF-8 text"),
    ):
        with pytest.raises(JudgeError, match=re.escape(words)) as caught:
            judge_continuations(pairs(1), judge=lambda _: "", prompt=source, **QUIET)
        assert len(str(caught.value).splitlines()) == 1
    assert len(PLACEHOLDERS) == 3


def test_the_rule_answers_the_papers_prompt_too() -> None:
    loops = [{"context": "Once", "a": "a b a b a b", "b": f"a b c d {i}"} for i in range(3)]
    found = judge_continuations(loops, judge=FewerRepeatedBigrams(), prompt="paper", **QUIET)
    assert found.value(criterion="overall", metric="labelled_b_wins") == 1
    assert found.value(criterion="coherence", metric="labelled_tie") == 1


def test_the_command_takes_a_prompt(tmp_path, capsys) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs(2))))
    argv = ["judge", "--pairs", str(file), "--judge-rule", "--prompt"]
    assert cli.main([*argv, "paper", "--out", str(tmp_path / "out")]) == 0
    assert "In one order, as the paper asks" in capsys.readouterr().out
    assert JudgeResult.load(tmp_path / "out").extras["labelled"]["is_paper"]
    assert cli.main([*argv, "nowhere.txt"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot read the prompt nowhere.txt" in line
