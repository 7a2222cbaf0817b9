"""The public functions of hyperlens, and small good values for all that they take."""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import D_VOCAB, lora, make_tiny, perturbed
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hyperlens import compare_models, load_hooked
from hyperlens.judging import write_prompt
from hyperlens.patching import Site
from hyperlens.training import hyperfit

PACKAGES = ("", ".experiments", ".patching", ".probes", ".training", ".judging")
# Documented, and imported from their own modules.
MODULES = (".decoding.generate", ".decoding.contrastive", ".decoding.guard", ".data.texts")
NAMED = (
    "continuations",
    "contrastive_search",
    "adaptive_contrastive_search",
    "Guard",
    "read_texts",
)
TRAINING = {
    "n_sequences": 4,
    "sequence_length": 8,
    "epochs": 1,
    "n_validation": 2,
    "n_prompts": 2,
    "prompt_tokens": 3,
    "new_tokens": 4,
    "packed": False,
    "record_every": 1,
}


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A word per token, with a chat template."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, D_VOCAB))]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(words, range(D_VOCAB), strict=True)), "w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{{ messages[0]['content'] }}",
    )


def judge(prompt: str) -> str:
    """Has no preference."""
    scores = {"first": 5, "second": 5}
    return json.dumps({"reason": "", "coherence": scores, "diversity": scores, "winner": "tie"})


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function and class that takes arguments, once."""
    seen = set()
    for name in (*PACKAGES, *MODULES):
        module = import_module(f"hyperlens{name}")
        for public_name in getattr(module, "__all__", NAMED):
            found = getattr(module, public_name, None)
            if not callable(found) or found in seen or getattr(found, "_is_protocol", False):
                continue
            is_class = inspect.isclass(found)
            if is_class and (issubclass(found, Exception) or inspect.isabstract(found)):
                continue
            seen.add(found)
            yield public_name, found


def parameters(name: str, function: Callable[..., Any]) -> list[str]:
    """What it takes, fields of a recipe included."""
    taken = inspect.signature(function).parameters.values()
    plain = [one.name for one in taken if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    return [*plain, *(TRAINING if name in ("hyperfit", "preset", "sweep") else ())]


@cache
def shared() -> dict[str, Any]:
    """Good values by the names of arguments; made in the working folder, once."""
    base = make_tiny("llama", num_hidden_layers=2)
    tuned, tokenizer = perturbed(base), words_tokenizer()
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(3, D_VOCAB, 12)) for _ in range(16)]
    pair = (base, tokenizer), (tuned, tokenizer)
    comparison = compare_models(*pair, texts, probes=["drift"], progress=False)
    comparison.save("saved")
    lora(make_tiny("llama", num_hidden_layers=2), "llama").save_pretrained("adapter")
    run = hyperfit(pair[0], texts, recipe="demo", out="run", progress=False, **TRAINING)
    return {
        "base": pair[0],
        "tuned": pair[1],
        "model": base,
        "target": base,
        "source": tuned,
        "texts": texts,
        "p_texts": texts,
        "q_texts": texts[::-1],
        "features": pair[0],
        "tokenizer": tokenizer,
        "prompts": [[1, 5, 6], [1, 7]],
        "tokens": torch.tensor([[1, 5, 6, 7]]),
        "attention_mask": None,
        "where": [Site("resid_post", 1)],
        "site": "resid_post",
        "kind": "resid_post",
        "block": 1,
        "blocks": [0, 1],
        "parts": [1],
        "judge": judge,
        "function": judge,
        "answer": judge(""),
        "prompt": write_prompt("a", "b", "c"),
        "context": "a",
        "first": "b",
        "second": "c",
        "url": "http://localhost:1/v1",
        "run": run,
        "runs": [run],
        "recipe": "demo",
        "name": "demo",
        "path": "page.html",
        "out": "out",
        "results": [comparison],
        "comparison": comparison,
        "expectations": [{"metric": "drift.cosine", "at_least": 0.0}],
        "folders": ["saved"],
        "max_length": 16,
        "n_prompts": 2,
        "prompt_tokens": 3,
        "max_new_tokens": 2,
        "batch_size": 4,
        "n_texts": 4,
        "offsets": 2,
        "n_controls": 1,
        "n_random": 1,
        "n_directions": [1],
        "methods": ["greedy"],
        "strategies": ["greedy"],
        "alphas": [0.1],
        "alpha": 0.5,
        "k": 3,
        "seeds": [0],
        "probes": ["drift"],
        "controls": ["rows_and_columns"],
        "progress": False,
        "table": (),
    }


@cache
def special() -> dict[tuple[str, str], Any]:
    """Good values where an argument of the same name means something else."""
    base, tuned = shared()["model"], shared()["source"]
    pair, texts = {"one": (shared()["base"], shared()["tuned"])}, shared()["texts"]
    hooked = load_hooked(base, backend="residual")
    two = [{"context": "a", "a": "b", "b": "c"}, {"context": "a", "a": "c", "b": "d"}]
    return {
        ("attribute", "by"): "heads",
        ("attribute", "n_verified"): 1,
        ("attribute", "n_controls"): 2,
        ("compare_domains", "pairs"): pair,
        ("compare_domains", "corpora"): {"one": texts, "two": texts[::-1]},
        ("compare_domains", "out"): None,
        ("compare_variants", "variants"): {"one": shared()["tuned"]},
        ("trace_trajectory", "checkpoints"): {1: shared()["tuned"]},
        ("trace_trajectory", "out"): None,
        ("compare_training", "runs"): {"one": shared()["run"]},
        ("sweep", "last_k"): [1],
        ("reproduce", "base"): "run",
        ("reproduce", "trained"): None,
        ("reproduce", "scale"): "smoke",
        ("reproduce", "only"): ["Figure 4"],
        ("reproduce", "out"): "reproduction",
        ("reproduce", "mauve_features"): None,
        ("judge_continuations", "pairs"): two,
        ("judge_continuations", "prompt"): "paper",
        ("judge_models", "prompt"): None,
        ("patch_blocks", "controls"): False,
        ("patch_expansion", "n_texts"): 16,
        ("patch_hooks", "model"): hooked,
        ("patch_hooks", "activations"): {Site("resid_post", 1): torch.zeros(1, 4, 32)},
        ("record", "model"): hooked,
        ("changing", "site"): Site("resid_post", 1),
        ("changing", "change"): torch.Tensor.clone,
        ("load_hooked", "source"): base,
        ("load_hooked", "backend"): "residual",
        ("to_hooked", "backend"): "residual",
        ("LocalJudge", "source"): shared()["base"],
        ("merge", "source"): "adapter",
        ("merge", "base"): base,
        ("read_history", "source"): "run",
        ("read_texts", "source"): texts,
        ("hyperfit", "model"): shared()["base"],
        ("hyperfit", "out"): None,
        ("Endpoint", "model"): "model",
        ("Guard", "window"): 4,
        ("Recipe", "blocks"): None,
        ("Pair", "base"): tuned,
    }


def good(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Small good arguments; None for what is only kept, as in a record."""
    chosen = {}
    for one in inspect.signature(function).parameters.values():
        if (name, one.name) in special():
            chosen[one.name] = special()[name, one.name]
        elif one.default is not one.empty and one.name == "out":
            continue
        elif one.name in shared() and one.kind is not one.VAR_KEYWORD:
            chosen[one.name] = shared()[one.name]
        elif one.default is one.empty and one.kind is not one.VAR_KEYWORD:
            chosen[one.name] = None
    return chosen | (TRAINING if name in ("hyperfit", "sweep") else {})


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The function's answer; what it gives back for a `with` is entered and left."""
    answer = function(**arguments)
    # Before Python 3.13 a path has an `__enter__`, too.
    if isinstance(answer, AbstractContextManager) and not isinstance(answer, Path):
        with answer:
            return None
    return answer
