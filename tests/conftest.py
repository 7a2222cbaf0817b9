"""Shared fixtures: tiny random models of several architectures, and the real one where it is."""

import inspect
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

# Before transformers is imported anywhere: no test may reach a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import checking_for_tests  # before hyperlens, whose imports it checks
import hypothesis
import pytest

# Time limits per example measure the machine, and are not what is tested here.
# `make test-long` tries more examples.
EXAMPLES = int(os.environ.get("HYPERLENS_EXAMPLES", "30"))
hypothesis.settings.register_profile("hyperlens", deadline=None, max_examples=EXAMPLES)
hypothesis.settings.load_profile("hyperlens")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
STORIES = SHARED / "models" / "stories260K"
D_VOCAB = 61

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": D_VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT_SIZES = {
    "vocab_size": D_VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# Options that make each architecture differ from Llama where it matters here: windows shorter
# than the texts, a soft cap that bends, biases, learned positions, parallel blocks.
ARCHITECTURES = {
    "llama": ("LlamaConfig", SIZES),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        SIZES | {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0},
    ),
    "gpt2": (
        "GPT2Config",
        GPT_SIZES | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        GPT_SIZES
        | {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "phi3": ("Phi3Config", SIZES),
}

LORA_TARGETS = {
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h"],
    "phi3": ["qkv_proj", "gate_up_proj"],
}


# A test that says one of these says something about TransformerLens.
OF_TRANSFORMER_LENS = re.compile(
    r"load_hooked|\bloading\(|to_hooked|run_with_hooks|ResidualModel|transformer[-_]lens|"
    r"hooked_transformer|HookedTransformer|HookedModel|\bbridge\b|\bBACKENDS\b|\bTL4\b"
)


def pytest_runtest_setup() -> None:
    """Functions are checked anew in each test, and while its fixtures are made."""
    checking_for_tests.Test.number += 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what may differ between TransformerLens 3.9 and 4, beside what is marked by hand."""
    of_it: dict[object, bool] = {}
    for item in items:
        test = getattr(item, "function", None)
        if test is not None:
            if test not in of_it:
                plain = inspect.unwrap(test)
                of_it[test] = bool(OF_TRANSFORMER_LENS.search(inspect.getsource(plain)))
            if of_it[test]:
                item.add_marker("transformer_lens")


def short(all_cases, *kept):
    """All cases for `parametrize`, of which only `kept` are run outside of `make test-long`."""
    assert all(case in all_cases for case in kept)
    marks = {True: (), False: pytest.mark.long}
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks[case in kept])
        for case in all_cases
    ]


def make_tiny(name: str, seed: int = 0, **changes: object):
    """A random model whose norms, biases and embeddings are not at their tidy initial values."""
    import torch
    import transformers

    kind, options = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**(options | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def perturbed(model, scale: float = 0.05, seed: int = 1):
    """A slightly different copy, standing for a fine-tuned model."""
    import copy

    import torch

    torch.manual_seed(seed)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += scale * torch.randn_like(parameter)
    return tuned


def lora(model, name: str, seed: int = 2, **options: object):
    """An unmerged adapter with non-zero weights on a tiny model."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    targets = LORA_TARGETS.get(name, ["q_proj", "v_proj", "down_proj"])
    config = LoraConfig(
        r=4,
        target_modules=targets,
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
        task_type="CAUSAL_LM",
        **options,
    )
    return get_peft_model(model, config).eval()


def trials(n: int):
    """The numbers below n. Shapes and types, half of a short trial's time, are checked once."""
    yield from range(min(n, 1))
    with unchecked():
        yield from range(1, n)


@contextmanager
def unchecked():
    """Shapes and types are not checked inside."""
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def token_texts(n: int = 12, seed: int = 0, shortest: int = 5, longest: int = 20):
    """Token ids of several lengths, each starting with BOS."""
    import numpy as np

    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, n)
    return [[1, *rng.integers(3, D_VOCAB, length).tolist()] for length in lengths]


@pytest.fixture
def tiny():
    """A tiny Llama."""
    return make_tiny("llama")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A tiny Llama's folder, for other processes to open."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    make_tiny("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ids_file(tmp_path_factory) -> Path:
    """Twelve random sequences of twelve token ids as JSON."""
    import torch

    file = tmp_path_factory.mktemp("texts") / "ids.json"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, D_VOCAB, (12, 12), generator=generator)
    file.write_text(json.dumps(ids.tolist()))
    return file


@pytest.fixture(scope="session")
def stories():
    """Folder of the real 260K-parameter Llama."""
    if not STORIES.is_dir():
        pytest.skip("the real model is not here (../shared/models/stories260K)")
    return STORIES


@pytest.fixture(scope="session")
def fairy_tales():
    """Folder of public-domain books."""
    folder = SHARED / "corpora"
    if not folder.is_dir():
        pytest.skip("the real texts are not here (../shared/corpora)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread_in_fixtures():
    """Also while what tests share is made: sums of several threads differ from run to run."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from threads, and two processes of two threads each crawl."""
    import torch

    torch.set_num_threads(1)
