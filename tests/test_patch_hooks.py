"""Activations of one model in another: at every site, on every backend, and nothing left behind."""

import copy

import pytest
import torch
import transformers
from conftest import (
    ARCHITECTURES,
    GPT_SIZES,
    SIZES,
    lora,
    make_tiny,
    perturbed,
    short,
    token_texts,
)
from test_hooked_models import BACKENDS, padded, supported

import hyperlens.patching
from hyperlens import compare_models, load_hooked
from hyperlens.decoding.generate import continuations
from hyperlens.errors import HyperlensError, PatchError
from hyperlens.hooks.partial_forward import check_resumes, read, resume, run_patched
from hyperlens.hooks.residual import ResidualModel
from hyperlens.hooks.sites import positions_mask
from hyperlens.hooks.surface import resid_post, resid_pre, site_hook
from hyperlens.patching import Site, changing, donating, in_blocks, patch_hooks, record
from hyperlens.validation.constructions import with_noise_in_blocks

pytestmark = pytest.mark.transformer_lens

# Whose blocks keep states only; a state or keys and values; and both in one block.
STATE_SPACE = {
    "mamba": (
        "MambaConfig",
        GPT_SIZES | {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4},
    ),
    "lfm2": ("Lfm2Config", SIZES | {"layer_types": ["conv", "full_attention", "conv"]}),
    "falcon_h1": (
        "FalconH1Config",
        SIZES
        | {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
        | {"mamba_d_state": 8, "head_dim": 8},
    ),
}
IN_A_BLOCK = ("resid_pre", "attn_out", "mlp_out", "resid_post")


def blocks_perturbed(model, blocks=range(3), scale=0.1, seed=5):
    """A copy that differs in these blocks only."""
    return with_noise_in_blocks(model, blocks, scale, seed)


def overflowing_together():
    """Two models in float16, each of which fits; one's state in the other's blocks does not."""
    base = make_tiny("gpt2").half()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        base.transformer.h[1].mlp.c_proj.bias[0] = 40_000
        tuned.transformer.h[0].mlp.c_proj.bias[0] = 40_000
        tuned.transformer.h[1].mlp.c_proj.bias[0] = -40_000
    return base, tuned


def state_space(name, **changes):
    """A tiny model that keeps states of what it has read, alone or beside keys and values."""
    kind, options = STATE_SPACE[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**(options | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def has(model, site):
    return site_hook(site.kind, site.block) in model.hook_dict


@pytest.mark.parametrize("largest", [1.0, 1e5], ids=["", "beside one huge activation"])
@pytest.mark.parametrize("kind", ["attn_out", "mlp_out"])
def test_a_block_with_a_third_branch_has_no_branches(kind, largest) -> None:
    """Falcon-H1 adds a state-space model's output too, which is in neither of the two."""
    plain = state_space("falcon_h1")
    with torch.no_grad():
        plain.get_input_embeddings().weight[:, 0] *= largest
    model = load_hooked(plain)
    with pytest.raises(PatchError, match="choose resid_pre or resid_post"):
        record(model, torch.tensor([[3, 4, 5]]), None, in_blocks(kind, [0]))
    assert record(model, torch.tensor([[3, 4, 5]]), None, in_blocks("resid_post", [0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_stream_over_weights_in_half_precision(dtype) -> None:
    base = state_space("mamba").to(dtype)
    found = compare_models(base, blocks_perturbed(base), token_texts(8), progress=False)
    assert 0 < found.value("rank_reordering", "top1_agreement", 3, "final_norm") < 1
    tokens = torch.tensor([token_texts(1)[0]])
    with torch.no_grad():
        wanted = base(tokens).logits
    assert torch.equal(ResidualModel(base)(tokens), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sites_mean_the_same_everywhere(name, backend):
    if not supported(name, backend):
        pytest.skip("TransformerLens 3.9 has no HookedTransformer for this architecture")
    model = make_tiny(name)
    loaded = load_hooked(model, backend=backend)
    tokens, mask = padded("right")
    real = mask.bool()
    seen = record(
        loaded, tokens, mask, [site for k in IN_A_BLOCK for site in in_blocks(k, range(3))]
    )
    for block in range(3):
        pre, attention, mlp, post = (seen[Site(kind, block)][real] for kind in IN_A_BLOCK)
        torch.testing.assert_close(pre + attention + mlp, post, atol=2e-5, rtol=2e-5)
    plain = record(load_hooked(model, backend="residual"), tokens, mask, list(seen))
    for site, value in seen.items():
        torch.testing.assert_close(value[real], plain[site][real], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_blocks_patched_speak_as_the_donor(name, backend):
    if not supported(name, backend):
        pytest.skip("TransformerLens 3.9 has no HookedTransformer for this architecture")
    base = make_tiny(name)
    tuned = blocks_perturbed(base)
    target, source = (load_hooked(model, backend=backend) for model in (base, tuned))
    tokens, mask = padded("right")
    real = mask.bool()
    with torch.no_grad():
        expected = source.run_with_hooks(tokens, attention_mask=mask)[real]
        before = target.run_with_hooks(tokens, attention_mask=mask)[real]
        assert (before - expected).abs().max() > 0.01
        # Before the blocks both streams are the same, so what the branches add is all there is.
        for kinds in (("resid_post",), ("attn_out", "mlp_out"), IN_A_BLOCK):
            where = [site for kind in kinds for site in in_blocks(kind, range(3))]
            hooks = patch_hooks(target, record(source, tokens, mask, where), attention_mask=mask)
            logits = target.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)[real]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        after = target.run_with_hooks(tokens, attention_mask=mask)[real]
    assert torch.equal(before, after)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_final_norm_is_a_site_or_refused_by_name(backend):
    base = make_tiny("llama")
    tuned = perturbed(base, 0.2)
    with torch.no_grad():
        tuned.lm_head.weight.copy_(base.lm_head.weight)
    target, source = (load_hooked(model, backend=backend) for model in (base, tuned))
    tokens, mask = padded("right", (6, 6))
    site = Site("final_norm")
    if backend == "hooked_transformer":
        with pytest.raises(PatchError, match=r"HookedTransformer has no hook for final_norm"):
            record(source, tokens, mask, [site])
        return
    hooks = patch_hooks(target, record(source, tokens, mask, [site]))
    with torch.no_grad():
        patched = target.run_with_hooks(tokens, fwd_hooks=hooks)
        torch.testing.assert_close(patched, source.run_with_hooks(tokens), atol=1e-5, rtol=1e-5)


def test_blocks_that_add_three_things_have_no_branches():
    model = make_tiny("llama")
    layer = model.model.layers[1]
    inner = layer.mlp.forward
    layer.forward_before = layer.forward
    layer.forward = lambda *args, **kwargs: layer.forward_before(*args, **kwargs) * 1.5
    assert inner
    loaded = ResidualModel(model)
    assert loaded.structure.branches is None
    with pytest.raises(PatchError, match=r"ResidualModel has no hook for mlp_out of block 1"):
        record(loaded, *padded("right"), [Site("mlp_out", 1)])


@pytest.mark.parametrize("positions", [None, slice(2, None), slice(-3, -1), [0, 2], -1, 1])
def test_only_chosen_positions_change(positions):
    base = make_tiny("llama")
    target, source = (ResidualModel(model) for model in (base, perturbed(base, 0.2)))
    for side in ("right", "left"):
        tokens, mask = padded(side)
        site = Site("resid_post", 2)
        activations = record(source, tokens, mask, [site])
        hooks = patch_hooks(target, activations, attention_mask=mask, positions=positions)
        own = record(target, tokens, mask, [site])[site]
        cache = {}
        keep = [(resid_post(2), lambda x, hook, cache=cache: cache.update(x=x))]
        with torch.no_grad():
            target.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=[*hooks, *keep])
        chosen = positions_mask(positions, mask)
        for row, real in enumerate(mask.bool()):
            numbers = torch.arange(int(real.sum()))
            wanted = numbers if positions is None else numbers[positions]
            assert chosen[row, real].nonzero().flatten().tolist() == wanted.reshape(-1).tolist()
        there = mask.bool() if positions is None else chosen
        assert torch.equal(cache["x"][there], activations[site][there])
        assert torch.equal(cache["x"][~there & mask.bool()], own[~there & mask.bool()])


def test_refusals_say_what_is_there():
    target = ResidualModel(make_tiny("llama"))
    tokens, mask = padded("right")
    with pytest.raises(PatchError, match="this model has blocks 0 to 2"):
        record(target, tokens, mask, [Site("resid_post", 3)])
    with pytest.raises(PatchError, match="a site is one of resid_pre"):
        in_blocks("q", [1])
    with pytest.raises(PatchError, match="needs the number of a block"):
        Site("resid_pre")
    with pytest.raises(PatchError, match="needs the number of a block"):
        Site("final_norm", 1)
    with pytest.raises(PatchError, match="choose from 0 to 8"):
        positions_mask([9], mask)
    with pytest.raises(PatchError, match="expected positions as None"):
        positions_mask([True], mask)
    with pytest.raises(PatchError, match="without a step"):
        positions_mask(slice(0, 5, 2), mask)
    activations = {Site("resid_post", 1): torch.zeros(1, 2, 32)}
    with pytest.raises(PatchError, match="record it on the same tokens"):
        target.run_with_hooks(
            tokens, attention_mask=mask, fwd_hooks=patch_hooks(target, activations)
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_resumed_blocks_end_where_they_ended(name):
    target = ResidualModel(make_tiny(name))
    for side in ("right", "left"):
        tokens, mask = padded(side)
        stream, _ = read(target, tokens, mask, [])
        for block in range(4):
            again = resume(target, tokens, mask, block, stream[block])
            assert torch.equal(again[mask.bool()], stream[-1][mask.bool()])
        check_resumes(target, tokens, mask, stream)


def test_blocks_that_hand_on_more_are_found_out():
    model = make_tiny("llama")
    memory = {}
    first, last = model.model.layers[0], model.model.layers[2]
    first.register_forward_hook(lambda m, a, out: memory.update(x=out.detach().mean()))
    last.register_forward_hook(lambda m, a, out: out + memory.pop("x", 0.0))
    target = ResidualModel(model)
    tokens, mask = padded("right")
    stream, _ = read(target, tokens, mask, [])
    with pytest.raises(PatchError, match="pass on more than the residual stream"):
        check_resumes(target, tokens, mask, stream)


@pytest.mark.parametrize("without", ["nothing comes", "it fails"])
def test_what_late_blocks_leave_for_the_last_is_found_out(without):
    """Half-way nothing is missing: the block that leaves it still runs."""
    model = make_tiny("llama", num_hidden_layers=6)
    memory = {}
    third, last = model.model.layers[3], model.model.layers[5]
    third.register_forward_hook(lambda m, a, out: memory.update(x=out.detach().mean()))
    default = [0.0] if without == "nothing comes" else []
    last.register_forward_hook(lambda m, a, out: out + memory.pop("x", *default))
    target = ResidualModel(model)
    tokens, mask = padded("right")
    stream, _ = read(target, tokens, mask, [])
    assert torch.equal(resume(target, tokens, mask, 3, stream[3]), stream[-1])
    with pytest.raises(PatchError, match=r"pass on more than the residual .*at block 5"):
        check_resumes(target, tokens, mask, stream)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("kind", [*IN_A_BLOCK, "final_norm"])
def test_a_cell_equals_a_whole_forward_pass_with_hooks(name, kind):
    base = make_tiny(name)
    target, source = (ResidualModel(model) for model in (base, perturbed(base, 0.1)))
    tokens, mask = padded("right")
    site = Site(kind, None if kind == "final_norm" else 1)
    stream, _ = read(target, tokens, mask, [])
    _, activations = read(source, tokens, mask, [site])
    normed = run_patched(target, tokens, mask, stream, site, activations[site])
    hooks = patch_hooks(target, {site: activations[site]}, attention_mask=mask)
    with torch.no_grad():
        expected = target.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)
        logits = target.unembed(normed)
        cap = target.cfg.output_logits_soft_cap
        logits = cap * torch.tanh(logits / cap) if cap else logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


PROMPTS = [[1, 5, 9, 20], [1, 7], [1, 30, 31, 32, 33, 34]]


def generated(model, **options):
    options = {"max_new_tokens": 8, "stop_at_eos": False, "progress": False} | options
    return continuations(model, None, PROMPTS, **options)


def slowly(target, source, site, prompt, steps, positions=None):
    """The obvious way: one prompt, no cache, both models over the whole text at every step."""
    target, source = ResidualModel(target), ResidualModel(source)
    ids = list(prompt)
    for _ in range(steps):
        tokens = torch.tensor([ids])
        activations = record(source, tokens, None, [site])
        chosen = positions if positions is None else list(range(len(ids)))[positions]
        if chosen == []:
            hooks = []
        else:
            hooks = patch_hooks(target, activations, positions=chosen)
        with torch.no_grad():
            ids.append(int(target.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", short(["llama", "gpt2", "gemma2", "gpt_neox"], "gpt2", "gemma2"))
@pytest.mark.parametrize("positions", [None, slice(5, None)])
def test_free_running_equals_the_slow_way(name, positions):
    # Padded on the left in float64, transformers' own Gemma-2 gives NaN.
    base = make_tiny(name) if name == "gemma2" else make_tiny(name).double()
    tuned = perturbed(base, 0.2)
    for site in (Site("resid_post", 1), Site("mlp_out", 2), Site("resid_pre", 1)):
        with donating(base, tuned, [site], positions=positions):
            got = generated(base, batch_size=2)
        for prompt, tokens in zip(PROMPTS, got, strict=True):
            assert tokens == slowly(base, tuned, site, prompt, 8, positions)


def test_all_of_the_donor_writes_as_the_donor():
    base = make_tiny("qwen2").double()
    tuned = blocks_perturbed(base, scale=0.3)
    with donating(base, tuned, [Site("resid_post", 2)]):
        got = generated(base)
    assert got == generated(tuned)
    assert got != generated(base), "the two must differ for this test"


def test_an_adapter_can_donate_to_the_base_it_sits_on():
    base = make_tiny("llama").double()
    adapted = lora(copy.deepcopy(base), "llama").double()
    with donating(base, adapted, [Site("resid_post", 2)]):
        got = generated(base)
    assert got == generated(adapted)


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1"])
def test_a_copy_lends_what_the_host_has(name):
    base = state_space(name)
    with donating(base, copy.deepcopy(base), [Site("resid_post", 2)]):
        got = generated(base)
    assert got == generated(base)


def test_a_donor_that_keeps_its_past_in_another_way_is_refused():
    base = state_space("mamba")
    with (
        pytest.raises(PatchError, match="MambaForCausalLM takes no past_key_values"),
        donating(base, perturbed(base), [Site("resid_post", 2)]),
    ):
        pass


def test_a_model_does_not_lend_to_itself():
    base = make_tiny("llama")
    for source in (base, lora(base, "llama")):
        with (
            pytest.raises(PatchError, match="target and source are one model"),
            donating(base, source, [Site("resid_post", 1)]),
        ):
            pass


def test_beams_are_refused_and_nothing_is_left():
    base = make_tiny("llama")
    prompt = {"input_ids": torch.tensor(PROMPTS[:1]), "attention_mask": torch.ones(1, 4).long()}
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    with (
        pytest.raises(PatchError, match="cannot follow beams"),
        donating(base, perturbed(base), [Site("resid_post", 1)]),
    ):
        base.generate(**prompt, **options)
    assert base.generate(**prompt, **options).shape == (1, 8)


def test_a_host_goes_on_only_from_what_the_donor_has_read():
    base = make_tiny("llama")
    tokens = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        past = base(input_ids=tokens, use_cache=True).past_key_values
    with donating(base, perturbed(base), [Site("resid_post", 1)]), torch.no_grad():
        with pytest.raises(PatchError, match="after 4 tokens, of which the source has kept 0"):
            base(input_ids=tokens[:, :1], past_key_values=past, use_cache=True)
        past = base(input_ids=tokens, use_cache=True).past_key_values
        past.crop(-2)
        with pytest.raises(PatchError, match="after 2 tokens, of which the source has kept 4"):
            base(input_ids=tokens[:, 2:], past_key_values=past, use_cache=True)


@pytest.mark.parametrize("interrupt", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_after_whatever_happens(interrupt):
    base = make_tiny("llama")
    tuned = perturbed(base)
    tuned.train()
    before = generated(base)

    def explode(own, activations):
        raise interrupt("stop here")

    with pytest.raises(interrupt), donating(base, tuned, [Site("resid_post", 1)], mix=explode):
        generated(base)
    with pytest.raises(interrupt), changing(base, Site("resid_post", 1), lambda x: explode(x, x)):
        generated(base)
    for model in (base, tuned):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert tuned.training
    assert generated(base) == before


def test_positions_of_a_text_being_written_count_from_its_start():
    base = make_tiny("llama")
    with (
        pytest.raises(PatchError, match="count from its start"),
        donating(base, base, [Site("resid_post", 1)], positions=[-1]),
    ):
        pass
    with (
        pytest.raises(HyperlensError, match="blocks 0 to 2"),
        donating(base, perturbed(base), [Site("resid_post", 7)]),
    ):
        pass
    assert resid_pre(0) == site_hook("resid_pre", 0)


def test_the_package_shows_what_it_has():
    assert {"Site", "record", "patch_hooks", "donating", "changing", "transplanted"} <= set(
        dir(hyperlens.patching)
    )
    for name in hyperlens.patching.__all__:
        assert getattr(hyperlens.patching, name) is not None
