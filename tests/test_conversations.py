"""The loss is on completions and on what the assistant says, for all templates and methods."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_for_tests import CHATML, D_VOCAB, FORGETFUL, GEMMA, TALK, TEMPLATES, letters
from conftest import make_tiny
from torch.nn import functional

from hyperlens import cli
from hyperlens.data.conversations import Conversations, read_examples
from hyperlens.data.texts import Texts
from hyperlens.errors import HyperlensError
from hyperlens.training import hyperfit
from hyperlens.training.data import training_data
from hyperlens.training.examples import examples
from hyperlens.training.prefix import Plan, PrefixCache
from hyperlens.training.recipes import changed, preset
from hyperlens.training.record import Recorder
from hyperlens.training.token_loss import TokenLoss


def said(tokenizer: Any, ids: Any, counted: Any) -> list[str]:
    """The spans of tokens that count, as text."""
    spans: list[list[int]] = []
    before = False
    for token, counts in zip(ids.tolist(), counted.tolist(), strict=True):
        if counts and not before:
            spans.append([])
        if counts:
            spans[-1].append(token)
        before = counts
    return [tokenizer.decode(span) for span in spans]


def encoded(rows: list[dict[str, Any]], tokenizer: Any, loss_on: Any = "completions") -> list[Any]:
    return list(examples(read_examples(rows), tokenizer, loss_on))


# Which tokens count


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("chatml", ["the answer<|im_end|>", "so, because.<|im_end|>"]),
        ("llama3", ["the answer<|eot|>", "so, because.<|eot|>"]),
        ("gemma", ["the answer</turn>", "so, because.</turn>"]),
        ("mistral", [" the answer</s>", " so, because.</s>"]),
        ("marked", ["the answer<|im_end|>", "so, because.<|im_end|>"]),
    ],
)
def test_what_the_assistant_says_counts_in_every_family(family, expected) -> None:
    tokenizer = letters(TEMPLATES[family])
    (one,) = encoded([{"messages": TALK}], tokenizer)
    assert said(tokenizer, one.ids, one.counted) == expected
    given = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert one.ids.tolist() == given
    assert given.count(tokenizer.bos_token_id) == (family in ("llama3", "gemma", "mistral"))


def test_all_of_a_conversation_can_count() -> None:
    (one,) = encoded([{"messages": TALK}], letters(FORGETFUL), "all")
    assert one.counted.all()


def test_a_template_without_a_clean_split_is_refused() -> None:
    with pytest.raises(HyperlensError, match=r'row 1: .* set loss_on="all"') as caught:
        encoded([{"messages": TALK}], letters(FORGETFUL))
    assert "\n" not in str(caught.value)


def test_what_a_template_refuses_is_told_with_its_reason() -> None:
    system = [{"role": "system", "content": "be kind"}, *TALK]
    with pytest.raises(HyperlensError, match=r"row 2: .*System role not supported"):
        encoded([{"messages": TALK}, {"messages": system}], letters(GEMMA))
    (one,) = encoded([{"messages": system}], letters(CHATML))
    assert len(said(letters(), one.ids, one.counted)) == 2


def test_without_a_template_conversations_are_refused() -> None:
    with pytest.raises(HyperlensError, match="no chat template"):
        encoded([{"messages": TALK}], letters())


def test_a_completion_follows_its_prompt() -> None:
    tokenizer = letters()
    (one,) = encoded([{"prompt": "ask ", "completion": "answer"}], tokenizer)
    assert said(tokenizer, one.ids, one.counted) == ["answer"]
    assert tokenizer.decode(one.ids) == "ask answer"


# Which rows are examples


def test_files_and_tables_of_conversations_are_read(tmp_path) -> None:
    import pandas as pd

    rows = [{"messages": TALK}, {"messages": TALK[:2]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        found = read_examples(tmp_path / name)
        assert isinstance(found, Conversations)
        assert list(found) == rows
        assert found.source["name"] == name
        assert list(read_examples(tmp_path / name, limit=1)) == rows[:1]
    pairs = [{"prompt": "a", "completion": "b", "id": 3}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert list(read_examples(tmp_path / "b.jsonl")) == [{"prompt": "a", "completion": "b"}]


def test_a_column_of_texts_comes_first(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one", "messages": TALK}))
    (tmp_path / "b.jsonl").write_text(json.dumps({"note": "two", "messages": TALK}))
    assert read_examples(tmp_path / "a.jsonl") == ["one"]
    assert read_examples(tmp_path / "b.jsonl", column="note") == ["two"]
    assert isinstance(read_examples(["a text"]), Texts)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": []}], "row 1: expected messages as a list"),
        ([{"messages": [{"role": "user"}]}], "row 1: expected messages"),
        ([{"messages": TALK}, {"text": "a"}], "row 2 has neither messages nor prompt"),
        ([{"messages": TALK}, {"prompt": "a", "completion": "b"}], "row 2 has prompt, and rows"),
        ([{"prompt": "a", "completion": None}], "row 1: expected a string as completion"),
    ],
)
def test_rows_of_another_kind_are_told(rows, message) -> None:
    with pytest.raises(HyperlensError, match=message):
        read_examples(rows)


# Sequences


def pairs(n: int = 12) -> list[dict[str, str]]:
    return [
        {"prompt": f"say {i}: ", "completion": f"{i} is {'so ' * (1 + i % 4)}"} for i in range(n)
    ]


def data_of(rows: Any, tokenizer: Any, **changes: Any) -> Any:
    options = {"n_sequences": 4, "sequence_length": 20, "record_every": 1, "n_validation": 3}
    recipe = changed(preset("demo"), **{**options, **changes})
    return training_data(rows, tokenizer, recipe, D_VOCAB)


def test_sequences_are_cut_padded_and_masked() -> None:
    tokenizer = letters()
    data = data_of(pairs(), tokenizer, sequence_length=14)
    assert data.tokens.shape == (4, 14)
    texts = ["say 0: 0 is so ", "say 1: 1 is so so "]
    assert tokenizer.decode(data.tokens[1]) == texts[1][:14]
    assert said(tokenizer, data.tokens[0], data.counted[0]) == ["0 is so"]
    assert data.manifest["n_counted"] == int(data.counted.sum())
    assert data.manifest["n_cut"] > 0
    wide = data_of(pairs(), tokenizer, add_eos=True, sequence_length=64)
    for row, counted in zip(wide.tokens, wide.counted, strict=True):
        last = int(counted.nonzero().max())
        assert row[last] == tokenizer.eos_token_id
        assert not counted[last + 1 :].any()
    assert wide.held_out_lengths.tolist() == [
        int(row.nonzero().max()) + 1 for row in wide.held_out_counted
    ]
    everything = data_of(pairs(), tokenizer, loss_on="all")
    assert said(tokenizer, everything.tokens[0], everything.counted[0]) == [texts[0]]


def test_what_has_no_completion_within_the_length_is_left_out() -> None:
    long = [{"prompt": "p" * 30, "completion": "c"}, *pairs()]
    data = data_of(long, letters())
    assert data.manifest["n_without_completion"] == 1
    assert any("the loss is on none" in note for note in data.notes)
    with pytest.raises(HyperlensError, match="raise sequence_length"):
        data_of(long[:1], letters())
    with pytest.raises(HyperlensError, match="leave packed out"):
        data_of(long, letters(), packed=True)


def test_eos_at_the_end_of_texts() -> None:
    tokenizer = letters()
    texts = ["abcd", "efgh</s>", "ijklm"]
    recipe = changed(preset("demo"), n_sequences=3, sequence_length=5, record_every=0, add_eos=True)
    rows = training_data(texts, tokenizer, recipe, D_VOCAB).tokens
    assert [tokenizer.decode(row) for row in rows] == ["abcd</s>", "efgh</s>", "ijklm"]
    with pytest.raises(HyperlensError, match="add_eos does not go with packed"):
        changed(recipe, packed=True)


# The loss


def hand_masked(model: Any, tokens: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Each sequence by itself, without its padding."""
    total = torch.zeros(())
    for row, counts in zip(tokens, counted, strict=True):
        length = int(counts.nonzero().max()) + 1
        logits = model(row[None, :length]).logits[0, :-1]
        labels = torch.where(counts[1:length], row[1:length], -100)
        total = total + functional.cross_entropy(logits, labels, reduction="sum")
    return total


@pytest.mark.parametrize("trained", ["last block", "all", "cached"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_loss_and_its_gradient_are_those_masked_by_hand(name, trained) -> None:
    model = make_tiny(name, vocab_size=D_VOCAB)
    data = data_of(pairs(), letters())
    blocks = model.model.layers if name == "llama" else model.transformer.h
    for parameter in model.parameters():
        parameter.requires_grad_(trained == "all")
    for parameter in blocks[-1].parameters():
        parameter.requires_grad_(True)
    loss = TokenLoss(model)
    assert loss.head_is_frozen == (trained != "all")
    if trained == "cached":
        cache = PrefixCache(model, len(blocks) - 1, Plan(0, "memory", Path()))
        cache.fill(model, data.tokens, rows=2)
        with cache.serving(torch.arange(4)):
            found = loss(model, data.tokens, data.counted)
    else:
        found = loss(model, data.tokens, data.counted)
    by_hand = hand_masked(model, data.tokens, data.counted)
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-4)
    weights = [p for p in model.parameters() if p.requires_grad]
    for one, other in zip(
        torch.autograd.grad(found, weights, allow_unused=True),
        torch.autograd.grad(by_hand, weights, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    # What stands where nothing counts makes no difference but through what follows.
    assert not torch.allclose(found, loss(model, data.tokens), rtol=0.01)


def test_the_record_is_of_what_counts() -> None:
    model, data = make_tiny("llama", vocab_size=D_VOCAB), data_of(pairs(), letters())
    recipe = changed(preset("demo"), n_prompts=8, prompt_tokens=6, new_tokens=4, batch_size=2)
    recorder = Recorder(
        model, data.held_out, recipe, 0, None, data.held_out_counted, data.held_out_lengths
    )
    found = recorder.measure(0, 0, 0.0, 0.0)
    with torch.no_grad():
        expected = hand_masked(model, data.held_out, data.held_out_counted)
    assert found.validation_loss == pytest.approx(
        float(expected) / int(data.held_out_counted[:, 1:].sum()), rel=1e-5
    )
    assert len(found.ttr_per_prompt) == 3
    with pytest.raises(HyperlensError, match="to be a prompt"):
        Recorder(
            model, data.held_out, changed(recipe, prompt_tokens=17), 0, None,
            data.held_out_counted, torch.tensor([3, 4, 5]),
        )  # fmt: skip


SHORT = {
    "recipe": "demo", "n_sequences": 5, "sequence_length": 40, "epochs": 2, "batch_size": 2,
    "n_validation": 3, "n_prompts": 2, "prompt_tokens": 6, "new_tokens": 4, "record_every": 2,
    "progress": False,
}  # fmt: skip


@pytest.mark.parametrize("method", ["full", "lora", "late_lora"])
def test_every_method_learns_completions_only(method) -> None:
    rows = [{"messages": [{**TALK[0], "content": f"hi {i}"}, TALK[1]]} for i in range(12)]
    tokenizer = letters(CHATML)
    base = make_tiny("llama", vocab_size=D_VOCAB)
    last_k = {"last_k": 1} if method == "late_lora" else {}
    run = hyperfit((base, tokenizer), rows, method, **SHORT, **last_k)
    tokens = tokenizer.apply_chat_template(rows[0]["messages"], return_dict=True, tokenize=True)
    assert run.manifest["data"]["n_counted"] == 5 * len("the answer|")
    assert run.manifest["data"]["n_tokens"] >= 5 * len(tokens["input_ids"]) - 5
    # The first epoch's mean is over counted tokens, the last batch being smaller.
    everything = hyperfit((base, tokenizer), rows, method, **SHORT, **last_k, loss_on="all")
    assert everything.history[0] != run.history[0]
    if method == "late_lora":
        assert run.manifest["prefix_cache"]
        plain = hyperfit((base, tokenizer), rows, method, **SHORT, **last_k, prefix_cache=False)
        assert plain.history == run.history


def test_the_mean_loss_is_over_counted_tokens() -> None:
    """The step's loss is divided by them, though sequences have different numbers of them."""
    base, tokenizer = make_tiny("llama", vocab_size=D_VOCAB), letters()
    data = data_of(pairs(), tokenizer, n_sequences=5, sequence_length=40)
    with torch.no_grad():
        expected = hand_masked(base, data.tokens, data.counted)
    run = hyperfit((base, tokenizer), pairs(), **{**SHORT, "batch_size": 5, "epochs": 1})
    n = int(data.counted[:, 1:].sum())
    assert run.history[0] == pytest.approx(float(expected) / n, rel=1e-5)


def test_the_command_takes_conversations(tmp_path, capsys) -> None:
    base = make_tiny("llama", vocab_size=D_VOCAB)
    base.save_pretrained(tmp_path / "base")
    letters(CHATML).save_pretrained(tmp_path / "base")
    rows = [{"messages": [{**TALK[0], "content": f"hi {i}"}, TALK[1]]} for i in range(12)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["hyperfit", str(tmp_path / "base"), "--texts", str(tmp_path / "chats.jsonl")]
    for name, value in SHORT.items():
        argv += [] if name == "progress" else [f"--{name.replace('_', '-')}", str(value)]
    assert cli.main([*argv, "--quiet", "--out", str(tmp_path / "out")]) == cli.OK
    assert "compare" not in capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "hyperfit.json").read_text())
    assert saved["recipe"]["loss_on"] == "completions"
    assert saved["manifest"]["data"]["n_counted"] == 5 * len("the answer|")
