"""Training data: which sequences, which are held out, and that whatever is left out is said."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_VOCAB, make_tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hyperlens import compare_models
from hyperlens.data.texts import Texts, read_texts
from hyperlens.errors import CorpusError, TrainingError
from hyperlens.training import Recipe, hyperfit
from hyperlens.training.data import TrainingData, random_order, training_data
from hyperlens.training.recipes import changed

VOCAB = 64


def ids(n: int, length: int = 6, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, VOCAB, (n, length)).tolist()


def found(texts: Any, tokenizer: Any = None, validation: Any = None, **changes: Any) -> Any:
    options = {"n_sequences": 3, "sequence_length": 4, "record_every": 0} | changes
    data = training_data(texts, tokenizer, changed(Recipe(), **options), VOCAB, validation)
    json.dumps(data.manifest)
    return data


def refusal(*args: Any, **changes: Any) -> str:
    with pytest.raises((TrainingError, CorpusError)) as caught:
        found(*args, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Words:
    """A tokenizer of one id per word, that starts texts with BOS."""

    bos_token_id = 0

    def __call__(
        self, given: Any, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, Any]:
        start = [self.bos_token_id] if add_special_tokens else []
        if isinstance(given, str):
            return {"input_ids": [*start, *(1 + ord(word) % 60 for word in given.split())]}
        return {"input_ids": [self(text, add_special_tokens)["input_ids"] for text in given]}


def words(text: str) -> list[int]:
    return Words()(text)["input_ids"]  # type: ignore[no-any-return]


# Which sequences are trained on


def test_texts_are_cut_counted_and_kept_in_order() -> None:
    data = found(["a b c d e", "a b", "f g h i", "a b c z", "k l m"], Words(), n_sequences=5)
    assert data.tokens.tolist() == [words("a b c"), words("f g h"), words("k l m")]
    counts = {"n_read": 5, "n_short": 1, "n_cut": 3, "n_duplicates": 1, "longest": 6}
    assert data.manifest.items() >= {**counts, "n_sequences": 3, "bos_prepended": True}.items()
    assert data.notes == (
        "only 3 of the 5 sequences asked for were found",
        "1 of 5 texts have fewer than 4 tokens and were left out",
        "1 duplicate sequences were left out",
    )


def test_short_texts_are_padded_on_request() -> None:
    """Pads stand at the end and never count; a single token predicts nothing."""
    several = ["a b c d e", "a b", "", "k l m", "f"]
    data = found(several, Words(), n_sequences=4, pad_short=True)
    whole = [words("a b c"), words("a b"), words("k l m"), words("f")]
    counted = [[True] * len(ids) + [False] * (4 - len(ids)) for ids in whole]
    assert data.counted is not None
    assert data.counted.tolist() == counted
    assert [
        row[mask].tolist() for row, mask in zip(data.tokens, data.counted, strict=True)
    ] == whole
    assert data.manifest["n_counted"] == sum(len(ids) - 1 for ids in whole)
    assert data.notes == ("3 of 5 texts have fewer than 4 tokens and were padded",)
    # Where none is short, nothing changes.
    same = found(["a b c", "f g h"], Words(), n_sequences=2, pad_short=True)
    assert same.counted is None
    assert (
        same.manifest["sha256"]
        == found(["a b c", "f g h"], Words(), n_sequences=2).manifest["sha256"]
    )


def test_what_was_left_out_is_said_though_there_were_enough() -> None:
    data = found([[1], [1, 2, 3, 4], [1, 2, 3, 4, 5], [5, 6, 7, 8]], n_sequences=2)
    assert len(data.tokens) == 2
    assert [note.split()[0] for note in data.notes] == ["1", "1"]
    assert found(ids(3)).notes == ()


def test_reading_stops_once_there_are_enough() -> None:
    data = found(ids(9), n_sequences=2)
    assert data.manifest["n_read"] == 2
    assert data.tokens.tolist() == [row[:4] for row in ids(9)[:2]]
    assert data.held_out.shape == (0, 4)


def test_packing_uses_every_token_and_says_what_is_left_over() -> None:
    texts = [[1, 2], [3], [4, 5, 6], [7], [8, 9, 10], [11]]
    data = found(texts, n_sequences=9, packed=True)
    assert data.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert data.manifest.items() >= {"n_read": 6, "n_short": 0, "n_left_over": 3}.items()
    assert data.notes == (
        "only 2 of the 9 sequences asked for were found",
        "there is no tokenizer, so no EOS stands between the packed texts",
    )
    long = found([list(range(1, 14))], n_sequences=9, packed=True)
    assert long.tokens.flatten().tolist() == list(range(1, 13))
    assert long.manifest["n_left_over"] == 1
    # Reading stops where there are enough.
    assert found(texts, n_sequences=1, packed=True).manifest["n_read"] == 3


def test_packed_texts_end_in_eos_and_are_tokenized_one_by_one() -> None:
    class Ending(Words):
        eos_token_id = 63

    texts = ["a b", "c d e f", "g"]
    rows = found(texts, Ending(), n_sequences=9, packed=True).tokens
    whole = [*words("a b")[1:], 63, *words("c d e f")[1:], 63, *words("g")[1:], 63]
    assert rows[:, 0].tolist() == [0, 0, 0]
    assert rows[:, 1:].flatten().tolist() == whole[:9]
    plain = found(texts, Words(), n_sequences=9, packed=True).tokens
    assert plain[:, 1:].flatten().tolist() == words("a b c d e f")[1:]


@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=9), min_size=4, max_size=12))
def test_packing_loses_nothing_but_the_end(texts: list[list[int]]) -> None:
    whole = [token for text in texts for token in text]
    if len(whole) < 4:
        return
    data = found(texts, n_sequences=99, packed=True)
    rows = [whole[i : i + 4] for i in range(0, len(whole) - 3, 4)]
    assert data.tokens.tolist() == [list(row) for row in dict.fromkeys(map(tuple, rows))]
    assert data.manifest["n_left_over"] == len(whole) % 4


def test_a_random_selection_draws_from_all_texts() -> None:
    options = {"selection": "random", "n_sequences": 5, "record_every": 1, "n_validation": 4}
    data, again = (found(ids(40), **options) for _ in range(2))
    assert torch.equal(data.tokens, again.tokens)
    assert data.manifest == again.manifest
    assert data.manifest["n_read"] == 40
    everything = [tuple(row[:4]) for row in ids(40)]
    chosen = [tuple(row) for row in (*data.tokens.tolist(), *data.held_out.tolist())]
    assert len(set(chosen)) == 9
    assert set(chosen) <= set(everything)
    assert chosen[:5] != everything[:5]
    other = found(ids(40), **options, seed=1)
    assert other.manifest["sha256"] != data.manifest["sha256"]


def test_an_order_is_drawn_the_same_everywhere() -> None:
    order = random_order(1000, 7)
    assert sorted(order) == list(range(1000))
    # The definition of PCG64's raw stream, by numpy's own generator of full-width integers.
    stream = np.random.Generator(np.random.PCG64(7)).integers(0, 2**64, 1000, dtype=np.uint64)
    assert (np.diff(stream[order].astype(object)) > 0).all()
    assert len(random_order(0, 0)) == 0


# Which are held out


def test_the_next_sequences_are_held_out() -> None:
    texts = ids(3) + ids(2) + ids(9, seed=1)  # the fourth and fifth were seen before
    data = found(texts, record_every=1, n_validation=2)
    assert data.tokens.tolist() == [row[:4] for row in texts[:3]]
    assert data.held_out.tolist() == [row[:4] for row in texts[5:7]]
    assert data.manifest["n_read"] == 7
    assert data.manifest["n_held_out"] == 2
    held_out = np.array([row[:4] for row in texts[5:7]], dtype="<i8")
    assert data.manifest["held_out_sha256"] == hashlib.sha256(held_out.tobytes()).hexdigest()
    assert data.manifest["sha256"] == found(ids(3)).manifest["sha256"]


def test_held_out_texts_of_their_own_are_never_trained_on() -> None:
    texts, other = ids(5), ids(9, seed=1)
    validation = [texts[1], other[0], other[0], [1], texts[4], other[1], other[2]]
    data = found(texts, validation=validation, record_every=1, n_validation=3)
    # The fifth text is not among the three that are trained on.
    expected = [row[:4] for row in (other[0], texts[4], other[1])]
    assert data.held_out.tolist() == expected
    about = data.manifest["validation"]
    assert about["source"] == {"kind": "token ids"}
    del about["source"], about["longest"], about["n_cut"]
    assert about == {"n_read": 6, "n_short": 1, "n_duplicates": 1, "n_trained_on": 1}
    assert data.manifest["n_read"] == 3
    assert len(data.notes) == 3
    assert all(note.startswith("validation: 1 ") for note in data.notes)


@pytest.mark.parametrize("selection", ["first", "random"])
def test_no_sequence_is_on_both_sides(selection: Any) -> None:
    texts = ids(30) + ids(30)
    options = {"selection": selection, "record_every": 2, "n_sequences": 20, "n_validation": 20}
    for validation in (None, texts[10:] + ids(8, seed=3)):
        data: TrainingData = found(texts, validation=validation, **options)
        rows = [tuple(row) for row in (*data.tokens.tolist(), *data.held_out.tolist())]
        assert len(data.tokens) == 20
        assert len(data.held_out) >= 10
        assert len(set(rows)) == len(rows)


def test_too_little_to_hold_out_is_said() -> None:
    data = found(ids(3), record_every=1)
    assert data.held_out.shape == (0, 4)
    assert "no sequences are left to hold out" in data.notes[0]
    assert "lower n_sequences" in data.notes[0]
    some = found(ids(5), record_every=1)
    assert len(some.held_out) == 2
    assert some.notes == ("only 2 of 128 held-out sequences were found",)


# Nonsense


def test_texts_that_will_not_do_are_refused() -> None:
    short = [[1] * 3, [2] * 2]
    assert "the longest has 3" in refusal(short)
    assert "packed=True" in refusal(short)
    assert "5 tokens in all" in refusal(short, packed=True, sequence_length=6)
    assert "vocabulary of 64" in refusal([[VOCAB] * 4])
    assert "token id -1" in refusal([[-1] * 4])
    assert "no tokenizer" in refusal(["some words"])
    assert "no texts" in refusal([], Words())
    assert "flat list" in refusal([[[1, 2, 3, 4]]])


def test_a_file_without_texts_is_refused(tmp_path: Path) -> None:
    for name, text in (("a.txt", ""), ("b.txt", " \n\n \n"), ("c.jsonl", ""), ("d.csv", "text\n")):
        (tmp_path / name).write_text(text)
        assert "no texts in" in refusal(str(tmp_path / name), Words())


def test_held_out_texts_that_will_not_do_are_refused() -> None:
    options = {"record_every": 1, "n_validation": 2}
    assert "all 3 sequences are also trained on" in refusal(ids(3), validation=ids(3), **options)
    line = refusal(ids(3), validation=[[1, 2]], **options)
    assert line.startswith("validation: none of the 1 texts has 4 tokens")
    assert "record_every is 0" in refusal(ids(3), validation=ids(3, seed=1))
    assert "vocabulary" in refusal(ids(3), validation=[[VOCAB] * 4], **options)


# Where the texts came from


def test_a_file_is_known_by_its_name_and_hash(tmp_path: Path) -> None:
    file = tmp_path / "tales.csv"
    file.write_text("id,story\n1,a b c d\n2,e f g h\n")
    texts = read_texts(file, column="story", limit=2)
    source = found(texts, Words()).manifest["source"]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert source == {
        "kind": "file",
        "name": "tales.csv",
        "sha256": sha256,
        "column": "story",
        "limit": 2,
    }
    plain = tmp_path / "tales.txt"
    plain.write_text("a b c d\n\ne f g h\n")
    held_out = {"validation": texts, "record_every": 1, "n_validation": 1}
    data = found(str(plain), Words(), n_sequences=1, **held_out)
    assert data.manifest["source"]["name"] == "tales.txt"
    assert "column" not in data.manifest["source"]


def test_a_hub_dataset_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    made = datasets.Dataset.from_dict({"prompt": ["?", "?"], "story": ["a b c d", "e f g h"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    texts = read_texts("owner/tales", column="story", split="test")
    source = found(texts, Words()).manifest["source"]
    assert source == {
        "kind": "hub dataset",
        "name": "owner/tales",
        "split": "test",
        "column": "story",
    }
    source = found(read_texts(made, column="story"), Words()).manifest["source"]
    assert source["kind"] == "dataset"
    assert source["fingerprint"] == made._fingerprint


@pytest.mark.parametrize(
    ("name", "column", "rows"),
    [
        ("fancyzhx/ag_news", None, {"text": ["a b", "c d e f"], "label": [0] * 2}),
        ("euclaise/writingprompts", "story", {"prompt": ["?"] * 2, "story": ["a b c", "d e f"]}),
    ],
)
def test_the_papers_domains_have_the_columns_that_the_readme_names(
    name: str, column: str | None, rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    made = datasets.Dataset.from_dict(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    data = found(read_texts(name, column=column), Words(), packed=column is None)
    assert len(data.tokens) == 2
    assert data.manifest["source"]["name"] == name
    if column is not None:
        assert "columns of text: prompt, story" in refusal(name, Words())


def test_other_texts_are_known_by_their_kind() -> None:
    assert found(ids(3)).manifest["source"] == {"kind": "token ids"}
    assert found(["a b c d"], Words()).manifest["source"] == {"kind": "list"}
    texts = read_texts(["a b c d", "e f g h"], limit=1)
    assert isinstance(texts, Texts)
    assert texts == ["a b c d"]
    assert read_texts(texts).source == {"kind": "list", "limit": 1}


# A tokenizer without a pad token


def test_a_tokenizer_without_a_pad_token_will_do(tmp_path: Path) -> None:
    vocabulary = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(3, D_VOCAB)]
    word_level = models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    backend = Tokenizer(word_level)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert tokenizer.pad_token_id is None
    base = make_tiny("llama", pad_token_id=None)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    texts = [" ".join(f"w{3 + (7 * i + j * j) % 58}" for j in range(5 + i)) for i in range(9)]
    options = {"n_sequences": 4, "sequence_length": 6, "epochs": 1, "learning_rate": 1e-2}
    record = {"n_validation": 3, "n_prompts": 2, "prompt_tokens": 3, "new_tokens": 4}
    out = tmp_path / "run"
    hyperfit(tmp_path / "base", texts, out=out, progress=False, **options, **record)
    comparison = compare_models(tmp_path / "base", out, texts, progress=False)
    assert comparison.value("drift", "l2", 3, "raw") > 0
