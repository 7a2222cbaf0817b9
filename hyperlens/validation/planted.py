"""The kinds of planted pairs, and what may and may not be said of each.

A truth is stated for verdicts by name (see `verdicts`): `right` is what names it, `wrong` is what
would be false of it. Anything else that a verdict can say is undecided: a miss where there was
something to name. Verdicts that a kind does not mention could go either way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ..randomness import own_randomness
from . import constructions as make
from .verdicts import ANSWERS

D_VOCAB = 61
N_BLOCKS = 3
SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "bos_token_id": make.BOS,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FIRST_TOKEN = 3
"""The tokens before it are special, and stand in no text."""

Said = Mapping[str, tuple[str, ...]]
"""The name of a verdict to what it may say."""


@dataclass(frozen=True)
class PlantedPair:
    """Two models whose difference is known, and texts to read them on.

    Attributes:
        base, tuned: models in memory.
        texts: token ids, random.
        right: by verdict, what names the truth.
        wrong: by verdict, what is false of this pair.
    """

    base: Any
    tuned: Any
    texts: list[list[int]]
    right: Said = field(default_factory=dict)
    wrong: Said = field(default_factory=dict)


class Kind(NamedTuple):
    """A kind of planted pair.

    Attributes:
        words: what was planted, for tables.
        plant: makes the pair of a seed.
        is_null: whether there is nothing to find; what is said then is a false alarm.
        null_test_every: how many pairs there are for each null test, which takes as long as all
            else several times over; 0 for none, where its answer is not known.
    """

    words: str
    plant: Callable[[int], PlantedPair]
    is_null: bool = False
    null_test_every: int = 0


def random_llama(seed: int, width: int = 32) -> Any:
    """A small random Llama, untied, whose norms are not all ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SIZES, hidden_size=width, intermediate_size=width * 3 // 2, num_hidden_layers=N_BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return _random(LlamaForCausalLM, config, seed)


def random_gpt2(seed: int) -> Any:
    """A small random GPT-2, which has learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**SIZES, n_embd=32, n_layer=N_BLOCKS, n_head=4, n_positions=64)
    return _random(GPT2LMHeadModel, config, seed)


def _random(kind: Any, config: Any, seed: int) -> Any:
    with own_randomness(seed, torch.device("cpu")):
        model = kind(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def random_texts(seed: int, n: int = 48, shortest: int = 10, longest: int = 24) -> list[list[int]]:
    """Token ids of several lengths, each text beginning with BOS."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, n)
    return [[make.BOS, *rng.integers(FIRST_TOKEN, D_VOCAB, n).tolist()] for n in lengths]


# What is true of a pair, by verdict


def _all_but(right: Said) -> Said:
    """Every other answer of these verdicts, which is false then."""
    return {
        name: tuple(answer for answer in ANSWERS[name] if answer not in said)
        for name, said in right.items()
    }


NOTHING = ("nothing changed",)
BLOCKS = ("what enters the last block", "the last block")
HEADS = ("mostly the head", "the head alone")
EARLIER = ("position 5", "a position", "a token", "an offset")
ANY_CHANGE = ("grew", "fell")
OTHER_DIMENSION: Said = {"dimension": ANY_CHANGE, "dimension after the norm": ANY_CHANGE}
IS_TEMPERATURE: Said = {"temperature": ("temperature",)}
IS_BIAS: Said = {"bias": ("the base plus a bias",)}
IS_EXPANSION: Said = {"expansion": ("supported",)}
# Texts that differ by chance alone.
OTHER_TEXTS: Said = {
    "greedy text": ("more diverse", "less diverse"),
    "sampled text": ("more diverse", "less diverse"),
    "text at equal entropy": ("different",),
}
# Verdicts on decisions, where tuning changed none.
NO_DECISION: Said = dict.fromkeys(
    ("bias", "blocks", "part alone", "smallest suffix", "positions", "expansion", "norm"), NOTHING
)
SOME_DECISION = _all_but(NO_DECISION)
# The stream is the base's up to the final norm.
NO_BLOCK: Said = {
    "blocks": ("the head alone",),
    "smallest suffix": ("no block",),
    "positions": ("none",),
    "temperature": ("more than temperature",),
}
SOME_BLOCK: Said = {
    **_all_but({"blocks": (*HEADS, "none"), "smallest suffix": ("no block", "cannot tell")}),
    **IS_TEMPERATURE,
    **IS_EXPANSION,
    "interaction": ("together", "overlap"),
    "positions": EARLIER,
    "dimension": ANY_CHANGE,
}


def _same(seed: int) -> PlantedPair:
    base = random_llama(seed)
    right = {
        **NO_DECISION, **IS_TEMPERATURE, "change": NOTHING, "random changes": NOTHING,
        "picks": ("the base's own",), "greedy text": ("the same",),
    }  # fmt: skip
    wrong = {
        **SOME_DECISION, **OTHER_TEXTS, **OTHER_DIMENSION, "change": ("changed",),
        "picks": ("others",), "random changes": ("beyond", "not beyond"),
    }  # fmt: skip
    return PlantedPair(base, copy.deepcopy(base), random_texts(seed), right, wrong)


def _noise(seed: int) -> PlantedPair:
    """Gaussian noise: any permutation of its rows, columns or entries has the same law."""
    base = random_llama(seed)
    wrong = {**IS_TEMPERATURE, **IS_BIAS, **IS_EXPANSION, "random changes": ("beyond",)}
    tuned = make.with_noise(base, 0.1, seed + 1)
    return PlantedPair(base, tuned, random_texts(seed), {}, wrong)


def _two_draws(seed: int) -> PlantedPair:
    base = random_llama(seed)
    wrong = {
        **IS_TEMPERATURE, **IS_BIAS, **IS_EXPANSION, **OTHER_TEXTS, **OTHER_DIMENSION
    }  # fmt: skip
    tuned = make.relabelled(base, seed, FIRST_TOKEN)
    return PlantedPair(base, tuned, random_texts(seed), {}, wrong)


def _temperature(seed: int) -> PlantedPair:
    base = random_llama(seed)
    # As often below 1 as above, and never nearly 1.
    away = float(np.random.default_rng(seed).uniform(0.2, 1.0))
    tuned = make.at_temperature(base, 2.0 ** (away if seed % 2 else -away))
    right = {
        **NO_DECISION, **IS_TEMPERATURE, "change": ("changed",), "picks": ("the base's own",),
        "greedy text": ("the same",), "random changes": ("beyond",),
    }  # fmt: skip
    wrong = {
        **SOME_DECISION, **_all_but({"temperature": ("temperature",)}), "change": NOTHING,
        **OTHER_DIMENSION, "picks": ("others",),
        "greedy text": OTHER_TEXTS["greedy text"], "text at equal entropy": ("different",),
    }  # fmt: skip
    return PlantedPair(base, tuned, random_texts(seed), right, wrong)


def _bias(seed: int) -> PlantedPair:
    base = make.with_head_bias(random_llama(seed))
    bias = torch.randn(D_VOCAB, generator=torch.Generator().manual_seed(seed))
    right = {
        **NO_BLOCK, **IS_BIAS, "fitted bias": ("the base plus a bias", "a part"),
        "part alone": ("unembedding",), "norm": ("none",),
    }  # fmt: skip
    wrong = {
        **SOME_BLOCK, **_all_but({"part alone": ("unembedding",)}), "norm": ("all", *NOTHING),
        "bias": ("no clear gain", *NOTHING), "fitted bias": ("no clear gain", *NOTHING),
    }  # fmt: skip
    return PlantedPair(base, make.with_bias(base, bias), random_texts(seed), right, wrong)


def _block(seed: int) -> PlantedPair:
    base, block = random_llama(seed), seed % N_BLOCKS
    tuned = make.with_noise_in_blocks(base, [block], 0.3, seed + 5)
    return PlantedPair(base, tuned, random_texts(seed), *_truth_of_block(block))


def _attention_head(seed: int) -> PlantedPair:
    base, block = random_llama(seed), seed % N_BLOCKS
    tuned = make.with_noise_in_attention_head(base, block, seed % 4, 2.0, seed + 5)
    right, wrong = _truth_of_block(block)
    right = {**right, "attention": (f"block {block}",)}
    wrong = {**wrong, **_all_but({"attention": (f"block {block}", "none")})}
    return PlantedPair(base, tuned, random_texts(seed), right, wrong)


def _truth_of_block(block: int) -> tuple[Said, Said]:
    is_last = block == N_BLOCKS - 1
    part, other = BLOCKS[::-1] if is_last else BLOCKS
    name = f"block {block}"
    right = {
        "blocks": (part,), "part alone": (name,), "smallest suffix": ("some blocks",),
        "norm": ("none",), "temperature": ("more than temperature",),
    }  # fmt: skip
    wrong = {
        **IS_TEMPERATURE, **IS_BIAS, **_all_but({"part alone": (name,)}),
        "blocks": (other, *HEADS, *NOTHING), "interaction": ("together", "overlap"),
        "smallest suffix": ("no block", *NOTHING), "norm": ("all", *NOTHING),
    }  # fmt: skip
    if is_last:
        return {**right, "positions": ("none",)}, {**wrong, "positions": EARLIER}
    return right, wrong


def _norm(seed: int) -> PlantedPair:
    base = random_llama(seed)
    right = {**NO_BLOCK, "norm": ("all",), "part alone": ("final norm",)}
    wrong = {
        **SOME_BLOCK, **IS_BIAS, **_all_but({"part alone": ("final norm",)}),
        "norm": ("none", *NOTHING),
    }  # fmt: skip
    tuned = make.with_noise_in_norm(base, 0.7, seed + 2)
    return PlantedPair(base, tuned, random_texts(seed), right, wrong)


UNEMBEDDING_RIGHT: Said = {**NO_BLOCK, "part alone": ("unembedding",), "norm": ("none",)}
UNEMBEDDING_WRONG: Said = {
    **SOME_BLOCK, **IS_BIAS, **_all_but({"part alone": ("unembedding",)}), "norm": ("all", *NOTHING)
}  # fmt: skip


def _unembedding(seed: int) -> PlantedPair:
    base = random_llama(seed)
    tuned = make.with_noise_in_unembedding(base, 0.3, seed)
    return PlantedPair(base, tuned, random_texts(seed), UNEMBEDDING_RIGHT, UNEMBEDDING_WRONG)


def _cancelling(seed: int) -> PlantedPair:
    # In float64 what is taken away is what was added, but for the last digits.
    base, shifted = make.with_cancelling_blocks(random_llama(seed).double(), 3.0, seed + 5)
    tuned = make.with_noise_in_unembedding(shifted, 0.3, seed)
    return PlantedPair(base, tuned, random_texts(seed), UNEMBEDDING_RIGHT, UNEMBEDDING_WRONG)


def _position(seed: int) -> PlantedPair:
    base = random_gpt2(seed)
    tuned = make.with_position(base, 5, 20.0, seed + 1)
    right = {
        "positions": ("position 5",), "part alone": ("embedding",), "norm": ("none",),
        "blocks": ("what enters the last block",),
    }  # fmt: skip
    wrong = {
        **IS_TEMPERATURE, **IS_BIAS, **_all_but({"part alone": ("embedding",)}),
        "positions": ("a position", "a token", *NOTHING), "norm": ("all", *NOTHING),
        "blocks": ("the last block", *HEADS, *NOTHING), "interaction": ("together", "overlap"),
        "smallest suffix": ("no block", "some blocks", *NOTHING),
    }  # fmt: skip
    return PlantedPair(base, tuned, random_texts(seed, 48, 9, 12), right, wrong)


def _wide_texts(seed: int) -> list[list[int]]:
    """Several tokens on either half for each of 64 directions."""
    return random_texts(seed, 64, 16, 40)


def _of_last_block(
    seed: int, pair: tuple[Any, Any], right: tuple[str, ...], wrong: tuple[str, ...]
) -> PlantedPair:
    """Only what leaves the last block differs; what is said of its expansion is given."""
    named = {
        "expansion": right, "blocks": ("the last block",), "norm": ("none",),
        "positions": ("none",), "temperature": ("more than temperature",),
    }  # fmt: skip
    false = {
        **IS_TEMPERATURE, **IS_BIAS, "expansion": wrong, "norm": ("all", *NOTHING),
        "blocks": ("what enters the last block", *HEADS, *NOTHING), "positions": EARLIER,
        "interaction": ("together", "overlap"),
    }  # fmt: skip
    return PlantedPair(*pair, _wide_texts(seed), named, false)


def _unread_expansion(seed: int) -> PlantedPair:
    pair = make.with_unread_expansion(random_llama(seed, 64), _wide_texts(seed), 3.0)
    return _of_last_block(seed, pair, ("contradicted",), ("supported", *NOTHING))


def _stretched(seed: int) -> PlantedPair:
    base = random_llama(seed, 64)
    pair = (make.same_form(base), make.stretched(base, _wide_texts(seed), 0.35))
    return _of_last_block(seed, pair, ("supported",), ("contradicted", *NOTHING))


def _new_features(seed: int) -> PlantedPair:
    pair = make.with_new_features(random_llama(seed, 64), _wide_texts(seed), 0.14, seed + 3)
    return _of_last_block(seed, pair, ("supported",), ("contradicted", *NOTHING))


def _rotated(seed: int) -> PlantedPair:
    base = random_llama(seed, 64)
    pair = (make.same_form(base), make.rotated(base, _wide_texts(seed), seed + 7))
    return _of_last_block(seed, pair, ("contradicted",), ("supported", *NOTHING))


KINDS: dict[str, Kind] = {
    "noise": Kind("Gaussian noise in all weights", _noise, True, null_test_every=5),
    "two_draws": Kind("tokens relabelled: another draw of the same model", _two_draws, True),
    "same": Kind("nothing: the same weights", _same, null_test_every=1),
    "temperature": Kind("a temperature", _temperature, null_test_every=2),
    "bias": Kind("a bias on the logits", _bias),
    "block": Kind("one block", _block),
    "attention_head": Kind("one attention head", _attention_head),
    "norm": Kind("the final norm", _norm),
    "unembedding": Kind("the unembedding", _unembedding),
    "cancelling": Kind("two blocks that cancel out, and the unembedding", _cancelling),
    "position": Kind("one position of the embedding", _position),
    "unread_expansion": Kind("an expansion that is not read, and one axis", _unread_expansion),
    "stretched": Kind("an expansion: the spectrum stretched", _stretched),
    "new_features": Kind("an expansion: new features", _new_features),
    "rotated": Kind("a rotation, no expansion", _rotated),
}
