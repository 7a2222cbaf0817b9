"""What ships with the package: a fair small model that loops, and tales of our own."""

import json
import math
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyperlens import load_hooked
from hyperlens.decoding.diversity import longest_loop, type_token_ratio
from hyperlens.decoding.generate import continuations
from hyperlens.embedded import HERE, embedded_base, embedded_tales


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded_base()).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_base())


def test_the_weights_are_small_and_safe() -> None:
    names = {file.name for file in embedded_base().iterdir()}
    assert (embedded_base() / "model.safetensors").stat().st_size <= 8e6
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert {"README.md", "config.json", "tokenizer.json"} <= names


def test_the_card_says_what_the_training_measured() -> None:
    card = (embedded_base() / "README.md").read_text()
    measured = json.loads((embedded_base() / "training.json").read_text())
    for said in (
        f"{measured['parameters']:,};",
        f"{measured['train_tokens']:,} tokens",
        f"{measured['held_out_loss']:.2f} nats",
        f"{measured['unigram_loss']:.2f}",
    ):
        assert said in card, said


def test_the_tales_are_many_and_different() -> None:
    tales = embedded_tales()
    titles = [json.loads(line)["title"] for line in (HERE / "tales.jsonl").read_text().splitlines()]
    assert len(set(tales)) == len(set(titles)) == len(tales) >= 64
    assert all(100 <= len(tale.split()) <= 200 for tale in tales)
    assert len({tuple(tale.split()[:4]) for tale in tales}) == len(tales)
    assert "CC0" in (HERE / "TALES_LICENSE.md").read_text()


def test_it_knows_more_than_how_frequent_words_are(model, tokenizer) -> None:
    tales = [torch.tensor(tokenizer(tale)["input_ids"])[:256] for tale in embedded_tales()]
    with torch.no_grad():
        losses = [float(model(ids[None], labels=ids[None]).loss) for ids in tales]
    counts = Counter(int(i) for ids in tales for i in ids[1:])
    total = sum(counts.values())
    # A unigram model that has seen these very tales.
    unigram = -sum(n * math.log(n / total) for n in counts.values()) / total
    assert sum(losses) / len(losses) < unigram - 0.5


def test_it_loops_when_greedy_and_does_not_when_sampled(model, tokenizer) -> None:
    prompts = [tokenizer(tale)["input_ids"][:17] for tale in embedded_tales()[:16]]
    greedy, sampled = (
        continuations(
            model, tokenizer, prompts, max_new_tokens=96, do_sample=sample, stop_at_eos=False,
            progress=False,
        )
        for sample in (False, True)
    )  # fmt: skip

    def mean(texts: list[list[int]]) -> float:
        return sum(map(type_token_ratio, texts)) / len(texts)

    assert mean(greedy) < 0.5 < 0.6 < mean(sampled)

    def loop_share(texts: list[list[int]]) -> float:
        return sum(longest_loop(text) / len(text) for text in texts) / len(texts)

    assert loop_share(greedy) > 0.25 > 0.125 > loop_share(sampled)


@pytest.mark.parametrize("backend", ["residual", "bridge"])
def test_it_opens_hooked(backend: str) -> None:
    assert load_hooked(embedded_base(), backend=backend).cfg.n_layers == 10
