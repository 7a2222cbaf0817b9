"""Two models write for a judge, and a local chat model judges."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lora, make_tiny, perturbed, token_texts
from judge_for_tests import longer, verdict
from peft import AutoPeftModelForCausalLM
from test_cli import tokenizer
from transformers import AutoModelForCausalLM

from hyperlens import cli, open_pair, write_report
from hyperlens.decoding.generate import continuations
from hyperlens.decoding.prompts import choose_examples
from hyperlens.errors import CorpusError, JudgeError
from hyperlens.judging import (
    JudgeResult,
    LocalJudge,
    judge_continuations,
    judge_models,
    read_prompt,
)

QUIET = {"progress": False}
SHORT = {"prompt_tokens": 4, "max_new_tokens": 8, **QUIET}
TEXTS = [" ".join(f"w{3 + (i * j) % 50}" for j in range(1, 9)) for i in range(1, 7)]
PAIRS = [{"context": f"w{i}", "a": "w5", "b": "w6 w7"} for i in range(3)]
TEMPLATE = "{% for m in messages %}<s> {{ m.content }} {% endfor %}w9"


def test_two_models_write_and_a_judge_reads(tmp_path: Path) -> None:
    base, seen = (make_tiny("llama"), tokenizer()), []

    def judge(prompt: str) -> str:
        seen.append(read_prompt(prompt))
        return longer(prompt)

    same = judge_models(base, base, TEXTS, judge=judge, **SHORT)
    assert same.extras["counts"] == {"pairs": 6, "judged": 0, "identical": 6, "left_out": 0}
    assert same.value(criterion="overall", metric="tie") == 1
    assert not seen
    tuned = (perturbed(base[0], 0.5), tokenizer())
    found, again = (judge_models(base, tuned, TEXTS, judge=judge, **SHORT) for _ in range(2))
    assert found == again
    judged = found.extras["counts"]["judged"]
    assert judged >= 4
    assert len(seen) == 2 * 2 * judged
    # The BOS token is no part of what a judge reads.
    assert {context for context, _, _ in seen} <= {" ".join(t.split()[:3]) for t in TEXTS}
    assert found.meta["base"]["sha256"] != found.meta["tuned"]["sha256"]
    assert found.meta["options"] == {
        "n_prompts": 6,
        "prompt_tokens": 4,
        "max_new_tokens": 8,
        "tries": 3,
    }
    found.write(tmp_path)
    assert JudgeResult.load(tmp_path) == found
    # An open pair and the texts are the same inputs.
    assert judge_models(open_pair(base, tuned), TEXTS, judge=judge, **SHORT) == found
    write_report(tmp_path / "page.html", [found])


def test_each_model_ends_its_own_texts() -> None:
    base = (make_tiny("llama"), tokenizer())
    tuned = (perturbed(base[0], 0.5), tokenizer())

    def texts() -> dict[str, tuple[list[str], list[str]]]:
        found = judge_models(base, tuned, TEXTS, judge=longer, n_examples=6, **SHORT)
        return {e["context"]: (e["a"].split(), e["b"].split()) for e in found.extras["examples"]}

    through = texts()
    end = next(b[2] for _, b in through.values() if b[2] not in b[:2])
    # As chat models have it: more ends than the tokenizer knows, in the tuned model alone.
    tuned[0].generation_config.eos_token_id = [2, tokenizer().convert_tokens_to_ids(end)]
    ended = texts()
    assert any(end in b for _, b in through.values())
    for context, (a, b) in ended.items():
        before_a, before_b = through[context]
        assert a == before_a
        assert b == (before_b[: before_b.index(end)] if end in before_b else before_b)


def test_examples_are_drawn_from_all_pairs() -> None:
    base, reads = make_tiny("llama"), tokenizer()
    tuned = perturbed(base, 0.5)
    found = judge_models((base, reads), (tuned, reads), TEXTS, judge=longer, n_examples=3, **SHORT)
    prompts = sorted(reads(text)["input_ids"][:4] for text in TEXTS)
    order = [reads.decode(prompts[i][1:]) for i in choose_examples(6, 6, 0)]
    assert found.extras["counts"]["judged"] == 6
    assert [example["context"] for example in found.extras["examples"]] == order[:3]


def test_models_without_a_tokenizer_write_nothing_to_read(tiny) -> None:
    with pytest.raises(CorpusError, match="no tokenizer"):
        judge_models(tiny, tiny, token_texts(4), judge=longer, **SHORT)


def test_two_adapters_are_each_put_on_their_own_base(tmp_path: Path) -> None:
    for i, name in enumerate(("base", "other")):
        make_tiny("llama", seed=i).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        lora(opened, "llama", seed=i + 2).save_pretrained(tmp_path / f"adapter-{name}")
    seen: list[tuple[str, str, str]] = []

    def judge(prompt: str) -> str:
        seen.append(read_prompt(prompt))
        return longer(prompt)

    sources = [str(tmp_path / f"adapter-{name}") for name in ("base", "other")]
    found = judge_models(*sources, TEXTS, judge=judge, **SHORT)
    assert (found.base_name, found.tuned_name) == ("adapter-base", "adapter-other")
    assert found.meta["tuned"]["kind"] == "adapter"
    # Each wrote what it writes alone.
    alone = [judge_models(source, source, TEXTS, judge=judge, **SHORT) for source in sources]
    assert [one.extras["counts"]["identical"] for one in alone] == [6, 6]
    prompt = tokenizer()(TEXTS[0])["input_ids"][:4]
    reads = tokenizer()
    for source, place in zip(sources, (1, 2), strict=True):
        model = AutoPeftModelForCausalLM.from_pretrained(source).eval()
        (written,) = continuations(model, reads, [prompt], max_new_tokens=8, progress=False)
        context = reads.decode(prompt, skip_special_tokens=True)
        text = reads.decode([*prompt, *written], skip_special_tokens=True)[len(context) :]
        assert text in [shown[place] for shown in seen if shown[0] == context]


def test_what_is_no_option_is_said_before_anything_is_written(tiny) -> None:
    for options in ({"seed": -1}, {"seed": 2**63}, {"n_examples": -1}):
        with pytest.raises(CorpusError, match=f"{next(iter(options))} must be") as caught:
            judge_models(tiny, tiny, TEXTS, judge=longer, **options, **SHORT)
        assert "\n" not in str(caught.value)


def test_a_judge_that_will_not_do_is_said_before_anything_is_written(
    tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("models were opened")

    monkeypatch.setattr("hyperlens.judging.judge.open_prompts", opened)
    with pytest.raises(JudgeError, match="identity"):
        judge_models(tiny, tiny, TEXTS, judge=longer, cache="answers", **SHORT)
    with pytest.raises(JudgeError, match="no chat template"):
        judge_models(tiny, tiny, TEXTS, judge=(tiny, tokenizer()), **SHORT)


# a local judge


def chat_model() -> tuple[Any, Any]:
    """A random model with room for a prompt, and a tokenizer with a chat template."""
    reads = tokenizer()
    reads.chat_template = TEMPLATE
    return make_tiny("llama", max_position_embeddings=1024), reads


def test_a_model_that_talks_nonsense_is_counted_not_fatal() -> None:
    judge = LocalJudge(chat_model(), max_new_tokens=6, batch_size=2)
    found = judge_continuations(PAIRS, judge=judge, tries=2, **QUIET)
    assert found.extras["counts"] == {"pairs": 3, "judged": 0, "identical": 0, "left_out": 3}
    assert sum(found.extras["problems"].values()) == 6
    assert found.meta["judge"]["kind"] == "local"
    assert "No pair could be judged" in found.summary()


def test_answers_do_not_depend_on_the_batch_and_are_the_models_own() -> None:
    model, reads = chat_model()
    prompts = ["w3 w4", "w5", "w6 w7 w8 w9 w10"]
    one, many = (
        dict(LocalJudge((model, reads), max_new_tokens=5, batch_size=size).answers(prompts))
        for size in (1, 3)
    )
    assert one == many
    ids = torch.tensor([reads(f"<s> {prompts[1]} w9", add_special_tokens=False)["input_ids"]])
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    written = ids[0, 3:].tolist()
    written = written[: written.index(2)] if 2 in written else written  # EOS
    assert one[1] == reads.decode(written, skip_special_tokens=True)


class Stub:
    """A tokenizer that writes verdicts whatever the model says."""

    chat_template = "{{ messages }}"
    eos_token_id = 2

    def __init__(self) -> None:
        self.chats: list[str] = []

    def get_vocab(self) -> dict[str, int]:
        return {}

    def apply_chat_template(self, chat: list[dict[str, str]], **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        self.chats.append(chat[0]["content"])
        return chat[0]["content"]

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [3, 4]}

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return f"<think>hm</think>{verdict('first', (6, 5), (5, 5))}"


def test_a_local_models_answers_are_read(tmp_path: Path) -> None:
    stub = Stub()
    judge = LocalJudge((make_tiny("llama"), stub), max_new_tokens=5)
    options = {"cache": tmp_path, **QUIET}
    found = judge_continuations(PAIRS, judge=judge, **options)
    assert len(stub.chats) == 6
    assert found.value(criterion="overall", metric="first_position") == 1
    assert found.is_language_model
    assert judge_continuations(PAIRS, judge=judge, **options) == found
    assert len(stub.chats) == 6
    # Kept answers belong to these weights.
    other = LocalJudge((make_tiny("llama", seed=1), stub), max_new_tokens=5)
    judge_continuations(PAIRS, judge=other, **options)
    assert len(stub.chats) == 12


def test_every_end_of_turn_ends_an_answer() -> None:
    model, reads = chat_model()
    judge = LocalJudge((model, reads), max_new_tokens=5)
    (before,) = dict(judge.answers(["w3 w4"])).values()
    first = reads(before.split()[0], add_special_tokens=False)["input_ids"][0]
    model.generation_config.eos_token_id = [2, first]
    judge = LocalJudge((model, reads), max_new_tokens=5)
    assert dict(judge.answers(["w3 w4"])) == {0: ""}


def test_a_local_judge_needs_a_chat_model_with_room(tiny) -> None:
    with pytest.raises(JudgeError, match="no tokenizer"):
        LocalJudge(tiny)
    small = LocalJudge((tiny, Stub()))
    with pytest.raises(JudgeError, match=r"the judge .* positions"):
        judge_continuations(PAIRS, judge=small, **QUIET)


def test_the_command_takes_a_folder_as_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, reads = chat_model()
    for name in ("model", "judge"):
        model.save_pretrained(tmp_path / name)
        reads.save_pretrained(tmp_path / name)
    texts, out = tmp_path / "texts.txt", tmp_path / "out"
    texts.write_text("\n\n".join(TEXTS))
    folder = str(tmp_path / "model")
    perturbed(model, 0.5).save_pretrained(tmp_path / "tuned")
    command = ["judge", folder, str(tmp_path / "tuned"), "--texts", str(texts), "--out", str(out)]
    short = ["--prompt-tokens", "4", "--max-new-tokens", "4", "--tries", "1", "-q"]
    judge = ["--judge-folder", str(tmp_path / "judge"), "--judge-tokens", "5"]
    assert cli.main([*command, *short, *judge]) == cli.OK
    found = JudgeResult.load(out)
    assert found.extras["counts"]["left_out"] >= 4
    assert found.meta["judge"]["name"] == "judge"
    assert "Judged by judge (local)" in capsys.readouterr().out
