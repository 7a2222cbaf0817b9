"""Where a prompt ends and its continuation begins, in text; and what ends a text."""

from types import SimpleNamespace
from typing import Any

import pytest
from conftest import lora, make_tiny, token_texts
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hyperlens.data.corpus import build_corpus
from hyperlens.decoding.prompts import as_text, choose_prompts, eos_ids, opening_and_texts
from hyperlens.embedded import embedded_base

TEXTS = ["你好吗abc", "hi 😀 there", "“Yes” – it’s café", "plain words"]


def one_token_per_byte() -> Any:
    """GPT-2's way of spelling what it has no token for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelt = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    spelt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelt.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=spelt)


def check_every_cut(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = as_text(tokenizer, ids)
    for cut in range(1, len(ids) + 1):
        opening, (after,) = opening_and_texts(tokenizer, ids[:cut], [ids[cut:]])
        assert opening + after == whole, cut
        assert "\ufffd" not in opening, cut


@pytest.mark.parametrize("text", TEXTS)
def test_no_character_is_lost_wherever_a_prompt_ends(text: str) -> None:
    tokenizer = one_token_per_byte()
    check_every_cut(tokenizer, text)
    assert as_text(tokenizer, tokenizer(text)["input_ids"]) == text


def test_nor_with_the_byte_fallback_of_sentencepiece(stories) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    for text in TEXTS:
        check_every_cut(tokenizer, text)


@given(st.text(max_size=12), st.integers(0, 40))
def test_nor_in_any_text(text: str, cut: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    cut = min(cut, len(ids))
    opening, (after,) = opening_and_texts(tokenizer, ids[:cut], [ids[cut:]])
    assert opening + after == as_text(tokenizer, ids)


def test_all_texts_after_a_prompt_share_its_opening() -> None:
    tokenizer = one_token_per_byte()
    ids = tokenizer("say 你")["input_ids"]
    other = tokenizer("x")["input_ids"]
    opening, texts = opening_and_texts(tokenizer, ids[:-2], [ids[-2:], other])
    assert opening == "say "
    assert texts == ["你", "\ufffdx"]


def test_ids_stand_for_text_without_a_tokenizer() -> None:
    assert opening_and_texts(None, [1, 2], [[3], []]) == ("1 2", ["3", ""])


def test_every_holder_of_an_end_is_asked() -> None:
    model = make_tiny("llama")
    model.config.eos_token_id = 5
    model.generation_config.eos_token_id = [7, 5]
    # The tokenizer's comes first: it pads, and Guard is told so.
    assert eos_ids(model, SimpleNamespace(eos_token_id=9)) == [9, 5, 7]
    assert eos_ids(model, SimpleNamespace(eos_token_id=None)) == [5, 7]
    assert eos_ids(lora(model, "llama"), None) == [5, 7]
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    assert eos_ids(model, None) == []


def test_the_same_prompts_wherever_texts_are_cut() -> None:
    texts = token_texts(12, shortest=8, longest=30)
    short, whole = (build_corpus(texts, None, max_length=n) for n in (6, 30))
    drawn = choose_prompts(short, 5, 6, seed=3)
    assert choose_prompts(whole, 5, 6, seed=3) == drawn
    assert choose_prompts(whole, 5, 6, seed=4) != drawn
