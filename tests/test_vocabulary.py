"""Two models with different numbers of tokens are read on those that both have."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from conftest import D_VOCAB, lora, make_tiny, perturbed, short, token_texts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hyperlens import compare_models, load_hooked, measure_behaviour, open_pair
from hyperlens.errors import CorpusError, LoadingError, PairError
from hyperlens.models.sources import open_source
from hyperlens.models.vocabulary import n_shared

PADDING = 8
FEW = {"prompt_tokens": 4, "max_new_tokens": 4, "n_prompts": 3, "progress": False}


def padded(model, n: int = PADDING):
    """A copy with rows of noise after those that mean something."""
    torch.manual_seed(7)
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(D_VOCAB + n, mean_resizing=False)
    with torch.no_grad():
        for table in {larger.get_input_embeddings(), larger.get_output_embeddings()}:
            table.weight[D_VOCAB:] = torch.randn_like(table.weight[D_VOCAB:])
    return larger


@pytest.mark.filterwarnings("ignore:The new embeddings")
@pytest.mark.parametrize(
    "name", short(["llama", "qwen2", "gpt2", "gemma2", "gpt_neox", "phi3"], "qwen2", "gemma2")
)
def test_padding_rows_change_no_number(name: str) -> None:
    """Tied and untied, with a soft cap and without; in either model."""
    base = make_tiny(name)
    tuned, texts = perturbed(base), token_texts(6)
    expected = compare_models(base, tuned, texts, progress=False)
    wide = padded(tuned)
    before = {key: value.clone() for key, value in wide.state_dict().items()}
    found = compare_models(base, wide, texts, progress=False)
    assert str(found.long) == str(expected.long)
    assert any("both are read on 61 tokens" in note for note in found.meta["notes"])
    assert str(compare_models(padded(base), tuned, texts, progress=False).long) == str(
        expected.long
    )
    after = wide.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert wide.config.get_text_config().vocab_size == D_VOCAB + PADDING


def test_text_is_written_with_the_shared_tokens() -> None:
    base = make_tiny("llama")
    tuned, texts = perturbed(base), token_texts(8)
    plain = measure_behaviour(base, tuned, texts, **FEW)
    found = measure_behaviour(base, padded(tuned), texts, **FEW)
    assert str(found.table) == str(plain.table)


def test_the_probability_of_the_other_tokens_is_said() -> None:
    base = make_tiny("llama")
    wide, texts = padded(perturbed(base)), token_texts(3)
    pair = open_pair(base, wide)
    with torch.no_grad():
        outside = [
            wide(torch.tensor([ids])).logits[0].double().softmax(-1)[:, D_VOCAB:].sum(-1)
            for ids in texts
        ]
    share = 100 * float(torch.cat(outside).mean())
    assert share > 1
    (note,) = (note for note in pair.tokenize(texts).notes if "of its probability" in note)
    assert note.startswith(f"the tuned model gives {share:.1f}% of its probability")


def tokenizer(tokens: list[str]):
    words = {token: i for i, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, tokens[0])))


def spoken(tokens: list[str]):
    """One that splits texts at spaces."""
    found = tokenizer(tokens)
    found.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return found


@pytest.mark.parametrize(
    ("rows", "first", "second", "expected"),
    [
        ((4, 8), "abcd", "abcd", 4),  # padding of one
        ((6, 8), "abcd", "abcd", 6),  # of both
        ((4, 6), "abcd", "abcdef", 4),  # added tokens
        ((6, 5), "abcd", "abcde", 4),  # a token where the other has padding
        ((4, 4), "abcx", "abcy", 3),
    ],
)
def test_which_rows_are_shared(rows, first: str, second: str, expected: int) -> None:
    assert n_shared(rows, (tokenizer([*first]), tokenizer([*second]))) == expected
    assert n_shared(rows, (None, tokenizer([*second]))) == min(rows)


def test_tokens_that_moved_are_refused() -> None:
    base = make_tiny("llama")
    words = [f"w{i}" for i in range(D_VOCAB)]
    wide = padded(base)
    moved = tokenizer([words[1], words[0], *words[2:], "new"])
    with pytest.raises(PairError, match="2 that both have stand in other rows"):
        open_pair((base, tokenizer(words)), (wide, moved))
    others = tokenizer([f"v{i}" for i in range(D_VOCAB)])
    with pytest.raises(PairError, match="only the first 0 are the same"):
        open_pair((base, tokenizer(words)), (wide, others))


@pytest.mark.filterwarnings("ignore")
def test_single_tokens_that_the_base_lacks_are_said(tmp_path: Path) -> None:
    base = make_tiny("llama")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 64]}
    )
    peft.get_peft_model(padded(base), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(PairError, match=r"trained token 64, .* has 61 tokens: resize the base"):
        open_source(tmp_path / "adapter", base=open_source(base))


def test_hooked_models_need_one_vocabulary() -> None:
    base = make_tiny("llama")
    with pytest.raises(PairError, match="vocabulary: base 61, tuned 69; of hooked models"):
        open_pair(load_hooked(base), load_hooked(padded(base)))


def test_texts_with_tokens_of_one_model_are_refused() -> None:
    base = make_tiny("llama")
    pair = open_pair(base, padded(base))
    with pytest.raises(CorpusError, match="id 61 is not among the 61 tokens that both models"):
        pair.tokenize([[1, 5, 61], [1, 7, 8]])


def test_an_adapter_on_a_padded_model_is_read() -> None:
    """LoRA on embedding and unembedding has numbers for each token, too."""
    base = make_tiny("llama")
    wide = padded(base)
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens", "lm_head"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(wide, config).eval()
    pair = open_pair(base, adapted)
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        expected = adapted(ids).logits[..., :D_VOCAB]
        assert torch.allclose(pair.tuned.model(ids).logits, expected, atol=1e-5)
    assert pair.base.hooked.cfg.d_vocab == D_VOCAB


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_trained_after_resizing_opens_on_the_original_base(tmp_path: Path) -> None:
    base = make_tiny("llama")
    torch.manual_seed(4)
    adapted = lora(padded(base), "llama", modules_to_save=["embed_tokens", "lm_head"])
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name:
                weight += 0.1 * torch.randn_like(weight)
    adapted.save_pretrained(tmp_path / "adapter")
    texts = token_texts(6)
    expected = compare_models(base, adapted, texts, progress=False)
    found = compare_models(base, tmp_path / "adapter", texts, progress=False)
    for one, other in zip(found.long, expected.long, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-4, abs=1e-5), one
    assert base.config.vocab_size == D_VOCAB
    # What it does not store of new tokens is unknown.
    lora(padded(base), "llama", modules_to_save=["lm_head"]).save_pretrained(tmp_path / "half")
    with pytest.raises((LoadingError, PairError), match="trained with 69 tokens"):
        open_source(tmp_path / "half", base=open_source(base))


@pytest.mark.parametrize("is_swapped", [False, True])
def test_either_model_may_have_added_tokens(is_swapped: bool) -> None:
    base, words = make_tiny("llama"), [f"w{i}" for i in range(D_VOCAB)]
    sides = [(base, spoken(words)), (padded(perturbed(base)), spoken([*words, "<new>"]))]
    first, second = reversed(sides) if is_swapped else sides
    texts = [f"w{i} w{i + 1} w5 w{i + 9}" for i in range(8)]
    found = compare_models(first, second, texts, probes=["drift"], progress=False)
    assert any("both are read on 61 tokens" in note for note in found.meta["notes"])
    with pytest.raises(PairError, match="leave out of the texts what only one of them knows"):
        open_pair(first, second).tokenize([*texts, "w3 <new> w4"])
