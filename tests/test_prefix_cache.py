"""The prefix cache changes how long training takes, and not one bit of what comes out."""

from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import D_VOCAB, make_tiny, short
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback

from hyperlens.errors import ResourceError
from hyperlens.training import hyperfit
from hyperlens.training import prefix as prefix_module
from hyperlens.training.prefix import PrefixCache, ResidualFile, is_exact, plan

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


@pytest.mark.parametrize(
    ("name", "threads"),
    short(
        list(product(["llama", "qwen2", "gemma2", "gpt2", "mistral", "gpt_neox"], [1, 2])),
        *[("gemma2", 1), ("gpt2", 2), ("gpt_neox", 1)],
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
    # The frozen blocks run on 3 batches before the first of 4 epochs of 3 batches, which the later
    # block runs on; all run on one batch to see that the cache is exact, and to find the blocks.
    assert seen.count(0) == seen.count(1)
    assert seen.count(2) - seen.count(0) == 12 - 3


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
    cache = PrefixCache(tiny, 2, MEMORY)
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
    cache = PrefixCache(tiny, 2, MEMORY)
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
    cache = PrefixCache(tiny, 2, MEMORY)
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


def test_a_file_comes_first_where_it_is_of_use(monkeypatch, tmp_path):
    """For several processes, which share it, and for a run that can be resumed."""
    size = 1000 * 256 * 64 * 2

    def place(**options):
        return plan((1000, 256, 64), torch.bfloat16, tmp_path, **options).place

    set_free_memory(monkeypatch, 8 * size)
    assert place() == "memory"
    assert place(keep=True) == "disk"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert place() == "disk"
    # Without room for a file, each of four processes has its own in memory.
    monkeypatch.setattr(prefix_module, "SPARE_DISK_SHARE", 0.0)
    monkeypatch.setattr(prefix_module, "DISK_SHARE", 0.0)
    assert place(keep=True) == "memory"
    set_free_memory(monkeypatch, 8 * size - 2)
    with pytest.raises(ResourceError, match="lower n_sequences"):
        place()


def test_a_resumed_run_finds_the_file_again(tiny, tmp_path, monkeypatch):
    class Breaks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise InterruptedError

    options = OPTIONS | {"last_k": 1, "checkpoint_minutes": 0.0}
    whole = hyperfit(tiny, sequences(), "late_lora", **options)
    run = partial(hyperfit, tiny, sequences(), "late_lora", out=tmp_path / "run", **options)
    with pytest.raises(InterruptedError):
        run(callbacks=[Breaks()])
    (file,) = (tmp_path / "run.partial").glob("prefix-cache-*")
    assert file.suffix == ".bin"
    with monkeypatch.context() as patch:
        patch.setattr(PrefixCache, "_fill", lambda *args: pytest.fail("filled again"))
        resumed = run()
    assert resumed.history == whole.history
    assert same_weights(resumed.model, whole.model)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def residual_file(folder: Path, **identity) -> ResidualFile:
    return ResidualFile.named(folder, {"base": "a"} | identity)


def filled(file: ResidualFile, residuals: torch.Tensor) -> None:
    stored, is_complete = file.open(tuple(residuals.shape), residuals[:1], keep=True)
    assert not is_complete
    stored.copy_(residuals)
    file.close(stored, keep=True)


def test_only_a_complete_file_of_the_same_residuals_is_found_again(tmp_path):
    residuals = torch.randn(4, 2, 3)
    shape = tuple(residuals.shape)
    filled(residual_file(tmp_path), residuals)
    found, is_complete = residual_file(tmp_path).open(shape, residuals[:1], keep=True)
    assert is_complete
    assert torch.equal(found, residuals)
    # Rounded otherwise, as by another machine; of another base; not filled to the end.
    assert not residual_file(tmp_path).open(shape, residuals[:1] + 1e-6, keep=True)[1]
    filled(residual_file(tmp_path), residuals)
    assert not residual_file(tmp_path, base="b").open(shape, residuals[:1], keep=True)[1]
    assert not residual_file(tmp_path, base="b").open(shape, residuals[:1], keep=True)[1]
    # What is of no use any more is deleted.
    assert [path.suffix for path in tmp_path.iterdir()] == [".unfinished"]


def test_machines_that_share_a_folder_have_files_of_their_own(tmp_path, monkeypatch):
    residuals = torch.randn(4, 2, 3)
    for machine in ("0", "1"):
        monkeypatch.setenv("GROUP_RANK", machine)
        filled(residual_file(tmp_path), residuals)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_is_not_kept_has_no_name(tmp_path):
    residuals = torch.randn(4, 2, 3)
    stored, _ = residual_file(tmp_path).open(tuple(residuals.shape), residuals[:1], keep=False)
    assert list(tmp_path.iterdir()) == []
    stored.copy_(residuals)
    assert torch.equal(stored, residuals)


def test_what_fits_nowhere_is_refused_before_training(tiny, monkeypatch):
    with pytest.raises(ResourceError, match=r"lower n_sequences .*--no-prefix-cache"):
        plan((10**9, 1024, 4096), torch.float32, Path("/"))
    for share in ("MEMORY_SHARE", "DISK_SHARE", "SPARE_DISK_SHARE"):
        monkeypatch.setattr(prefix_module, share, 0.0)
    with pytest.raises(ResourceError, match="prefix cache needs"):
        hyperfit(tiny, sequences(), "late_lora", last_k=1, **OPTIONS)
    hyperfit(tiny, sequences(), "late_lora", last_k=1, prefix_cache=False, **OPTIONS)


def test_a_file_that_cannot_grow_is_one_clear_error(tmp_path):
    with pytest.raises(ResourceError, match="cannot store the prefix cache") as caught:
        residual_file(tmp_path).open((2**50, 1, 1), torch.zeros(1, 1, 1), keep=True)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
