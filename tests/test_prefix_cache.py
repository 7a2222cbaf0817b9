"""The prefix cache changes how long training takes, and not one bit of what comes out."""

from functools import partial
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import D_VOCAB, make_tiny, short
from transformers import MixtralConfig, MixtralForCausalLM

from hyperlens.errors import ResourceError
from hyperlens.training import hyperfit
from hyperlens.training import prefix as prefix_module
from hyperlens.training.adapters import find_block_list
from hyperlens.training.prefix import PrefixCache, is_exact, plan

LENGTH = 12
MEMORY = prefix_module.Plan(0, "memory", Path())


def sequences(n: int = 7, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, D_VOCAB, (n, LENGTH), generator=generator).tolist()


# Seven sequences in batches of three: every epoch mixes them anew and ends on a batch of one.
OPTIONS = {
    "n_sequences": 7,
    "sequence_length": LENGTH,
    "batch_size": 3,
    "epochs": 4,
    "learning_rate": 1e-2,
    "record_every": 0,
    "progress": False,
}


def same_weights(one, other) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def both(model, method="late_lora", **options):
    options = OPTIONS | options
    cached = hyperfit(model, sequences(), method, **options)
    plain = hyperfit(model, sequences(), method, prefix_cache=False, **options)
    assert plain.manifest["prefix_cache"] is None
    return cached, plain


@pytest.mark.parametrize("threads", short([1, 2], 2))
@pytest.mark.parametrize(
    "name",
    short(
        ["llama", "qwen2", "gemma2", "gpt2", "mistral", "gpt_neox"], "gemma2", "gpt2", "gpt_neox"
    ),
)
def test_losses_and_weights_are_bit_identical(name, threads):
    torch.set_num_threads(threads)
    cached, plain = both(make_tiny(name), last_k=1)
    assert "in memory" in cached.manifest["prefix_cache"]
    assert cached.manifest["trained_blocks"] == [2]
    assert cached.history == plain.history
    assert same_weights(cached.model, plain.model)
    assert cached.history[-1] < cached.history[0]


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation": 2},
        {"gradient_checkpointing": True},
        {"lora_dropout": 0.2},
        {"bf16": True},
        {"last_k": 2, "target_modules": ("q_proj",)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_of_training_is_bit_identical(tiny, options):
    cached, plain = both(tiny, **{"last_k": 1} | options)
    assert cached.manifest["prefix_cache"]
    assert cached.history == plain.history
    assert same_weights(cached.model, plain.model)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_hooks_inside_the_checkpoint_change_nothing(tiny, monkeypatch, method):
    """As in transformers 5.18, which recomputes a block with its hooks, when they are gone."""
    block = type(tiny.model.layers[0])
    # Where the forward pass alone is checkpointed, it is wrapped.
    forward = getattr(block.forward, "__wrapped__", block.forward)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        whole = partial(torch.nn.Module.__call__, self, **kwargs)
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(whole, *args)
        return whole(*args)

    monkeypatch.setattr(block, "forward", forward)
    monkeypatch.setattr(block, "__call__", call)
    cached, plain = both(tiny, method, blocks=(1, 2), gradient_checkpointing=True)
    assert cached.manifest["prefix_cache"]
    assert cached.history == plain.history
    assert same_weights(cached.model, plain.model)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_any_frozen_prefix_is_cached(tiny, method):
    cached, plain = both(tiny, method, blocks=(1, 2))
    assert cached.manifest["prefix_cache"]
    assert cached.history == plain.history
    assert same_weights(cached.model, plain.model)
    everything, _ = both(tiny, method)
    assert everything.manifest["prefix_cache"] is None


def test_a_mapped_file_serves_as_well_and_leaves_nothing_behind(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(prefix_module, "MEMORY_SHARE", 0.0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cached, plain = both(tiny, last_k=1)
    assert "in a file" in cached.manifest["prefix_cache"]
    assert cached.history == plain.history
    assert same_weights(cached.model, plain.model)
    assert list(tmp_path.iterdir()) == []


def test_the_frozen_blocks_run_once_per_sequence(tiny, monkeypatch):
    seen = []
    block = type(tiny.model.layers[0])
    forward = block.forward

    def counting(self, hidden_states, *args, **kwargs):
        seen.append(self.self_attn.layer_idx)
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(block, "forward", counting)
    hyperfit(tiny, sequences(), "late_lora", last_k=1, **OPTIONS)
    # Of 4 epochs of 3 batches the frozen blocks run in the first; once before it, the cache serves
    # a batch to see that it is exact.
    assert seen.count(0) == seen.count(1) < 12
    assert seen.count(2) - seen.count(0) == 9 + 1


@pytest.mark.parametrize("missed", [0.0, None], ids=["silently", "with an error"])
def test_a_model_that_passes_on_more_than_the_residual_is_not_cached(tiny, missed):
    """A side channel around the frozen blocks: its reader would see nothing of it."""
    first, last = tiny.model.layers[0], tiny.model.layers[2]
    channel = {}
    first_forward, last_forward = first.forward, last.forward

    def writes(hidden_states, *args, **kwargs):
        channel["aside"] = 0.1 * hidden_states.detach().cumsum(1)
        return first_forward(hidden_states, *args, **kwargs)

    def reads(hidden_states, *args, **kwargs):
        return last_forward(hidden_states, *args, **kwargs) + channel.pop(
            "aside", *([] if missed is None else [missed])
        )

    first.forward, last.forward = writes, reads
    tokens = torch.tensor(sequences())
    cache = PrefixCache(find_block_list(tiny).blocks, 2, len(tokens), MEMORY)
    assert not is_exact(tiny, cache, tokens[:3])


def test_frozen_blocks_that_draw_random_numbers_are_not_cached(tiny):
    """They do in training mode only, where the cache would freeze what they drew."""
    first = tiny.model.layers[0]
    forward = first.forward

    def jittered(hidden_states, *args, **kwargs):
        noise = 1 + 0.1 * torch.rand_like(hidden_states) if first.training else 1
        return forward(hidden_states * noise, *args, **kwargs)

    first.forward = jittered
    tokens = torch.tensor(sequences())
    cache = PrefixCache(find_block_list(tiny).blocks, 2, len(tokens), MEMORY)
    assert not is_exact(tiny, cache, tokens[:3])


def test_without_the_jitter_of_routers_the_cache_is_exact():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=D_VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        router_jitter_noise=0.3,
    )
    # Batches of one size: an expert that gets a single token rounds otherwise than one with more.
    cached, plain = both(MixtralForCausalLM(config), last_k=1, n_sequences=6)
    assert cached.manifest["prefix_cache"]
    assert cached.history == plain.history
    assert same_weights(cached.model, plain.model)


def test_exactness_leaves_the_model_as_it_was(tiny):
    tiny.train()
    tiny.model.layers[1].eval()
    before = [module.training for module in tiny.modules()]
    tokens = torch.tensor(sequences())
    cache = PrefixCache(find_block_list(tiny).blocks, 2, len(tokens), MEMORY)
    assert is_exact(tiny, cache, tokens[:3])
    assert [module.training for module in tiny.modules()] == before
    assert not any("forward" in vars(module) for module in tiny.modules())
    assert not any(module._forward_pre_hooks for module in tiny.modules())


def set_free_memory(monkeypatch, n_bytes: int) -> None:
    memory = SimpleNamespace(available=n_bytes)
    monkeypatch.setattr(prefix_module.psutil, "virtual_memory", lambda: memory)


def test_the_size_is_known_beforehand_and_decides_the_place(monkeypatch, tmp_path):
    shape = (1000, 256, 64)
    size = 1000 * 256 * 64 * 2
    set_free_memory(monkeypatch, 4 * size)
    roomy = plan(shape, torch.bfloat16, tmp_path)
    assert (roomy.n_bytes, roomy.place) == (size, "memory")
    assert str(roomy) == "31 MiB of residuals in memory"
    set_free_memory(monkeypatch, size)
    tight = plan(shape, torch.bfloat16, tmp_path)
    assert tight.place == "disk"
    assert str(tmp_path) in str(tight)


def test_processes_share_what_is_free_on_their_machine(monkeypatch, tmp_path):
    size = 1000 * 256 * 64 * 2
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for memory, place in ((8 * size, "memory"), (8 * size - 2, "disk")):
        set_free_memory(monkeypatch, memory)
        made = plan((1000, 256, 64), torch.bfloat16, tmp_path)
        assert (made.n_bytes, made.place) == (size, place)
    monkeypatch.setattr(prefix_module, "DISK_SHARE", 0.0)
    set_free_memory(monkeypatch, size)
    with pytest.raises(ResourceError, match="in each of 4 processes"):
        plan((1000, 256, 64), torch.bfloat16, tmp_path)


def test_two_caches_in_one_folder_do_not_meet(tmp_path, monkeypatch):
    """Both files are there at once: neither is taken for, nor removed with, the other."""
    mapped = prefix_module._mapped
    seen = []

    def slowly(path, *args):
        seen.append(path)
        if len(seen) == 1:
            other = Thread(target=lambda: cache()._allocate(torch.zeros(1, 2, 3)))
            other.start()
            other.join()
        return mapped(path, *args)

    def cache():
        block = torch.nn.Identity()
        return PrefixCache([block, block], 1, 4, prefix_module.Plan(0, "disk", tmp_path))

    monkeypatch.setattr(prefix_module, "_mapped", slowly)
    kept = cache()._allocate(torch.zeros(1, 2, 3))
    assert kept.shape == (4, 2, 3)
    assert len(set(seen)) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_gone_already_is_no_error(tmp_path, monkeypatch):
    from_file = torch.from_file

    def removing(name, **options):
        made = from_file(name, **options)
        Path(name).unlink()
        return made

    monkeypatch.setattr(torch, "from_file", removing)
    assert prefix_module._mapped(tmp_path / "cache", (2, 3), torch.float32).shape == (2, 3)


def test_what_fits_nowhere_is_refused_before_training(tiny, monkeypatch):
    with pytest.raises(ResourceError, match=r"lower n_sequences .*--no-prefix-cache"):
        plan((10**9, 1024, 4096), torch.float32, Path("/"))
    monkeypatch.setattr(prefix_module, "MEMORY_SHARE", 0.0)
    monkeypatch.setattr(prefix_module, "DISK_SHARE", 0.0)
    with pytest.raises(ResourceError, match="prefix cache needs"):
        hyperfit(tiny, sequences(), "late_lora", last_k=1, **OPTIONS)
    hyperfit(tiny, sequences(), "late_lora", last_k=1, prefix_cache=False, **OPTIONS)


def test_a_file_that_cannot_grow_is_one_clear_error(tmp_path):
    with pytest.raises(ResourceError, match="cannot store the prefix cache"):
        prefix_module._mapped(tmp_path / "cache", (2**50,), torch.float32)
    assert list(tmp_path.iterdir()) == []
