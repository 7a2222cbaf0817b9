"""Every way of loading a model against the plain Hugging Face model, padded on either side."""

import copy
import inspect
import logging
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, D_VOCAB, lora, make_tiny
from typing_extensions import get_protocol_members

from hyperlens import load_hooked
from hyperlens.errors import LoadingError, ParityError
from hyperlens.hooks import surface as hooked
from hyperlens.hooks.parity import check_parity
from hyperlens.hooks.residual import ResidualModel
from hyperlens.hooks.surface import HookedModel, import_transformer_lens
from hyperlens.models.kinds import backend_of

pytestmark = pytest.mark.transformer_lens

HAS_HOOKED_TRANSFORMER = "HookedTransformer" in dir(import_transformer_lens())
BACKENDS = ["residual", "bridge"] + ["hooked_transformer"] * HAS_HOOKED_TRANSFORMER
FUSED = ["gpt2", "gpt_neox", "phi3"]
# What TransformerLens 3.9 itself cannot turn into a HookedTransformer from a local model.
NO_HOOKED_TRANSFORMER = {"gemma2"}


def padded(side, lengths=(9, 4, 7)):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, D_VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        start = 0 if side == "right" else max(lengths) - length
        mask[row, start : start + length] = 1
    return tokens * mask, mask


def plain_logits(model, tokens, mask):
    """Each sequence alone: what the model says without any padding to get wrong."""
    with torch.no_grad():
        return torch.cat(
            [model(t[m.bool()][None]).logits[0] for t, m in zip(tokens, mask, strict=True)]
        )


def plain_residuals(model, tokens, mask):
    """Hugging Face's own hidden states; the last one is after the final norm, so left out."""
    kept = []
    with torch.no_grad():
        for t, m in zip(tokens, mask, strict=True):
            states = model(t[m.bool()][None], output_hidden_states=True).hidden_states[:-1]
            kept.append(torch.stack(states)[:, 0])
    return torch.cat(kept, dim=1)


def supported(name, backend):
    return backend != "hooked_transformer" or name not in NO_HOOKED_TRANSFORMER


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hooked_models_equal_plain_ones(name, backend, side):
    model = make_tiny(name)
    if not supported(name, backend):
        with pytest.raises(LoadingError, match="no HookedTransformer for"):
            load_hooked(model, backend=backend)
        return
    loaded = load_hooked(model, backend=backend)
    assert isinstance(loaded, HookedModel)
    assert backend_of(loaded) == backend
    tokens, mask = padded(side)
    real = mask.bool()
    with torch.no_grad():
        logits = hooked.run_logits(loaded, tokens, mask)[real]
        residuals = hooked.run_residuals(loaded, tokens, mask)
        lens = hooked.unembed(loaded, hooked.final_norm(loaded, residuals[-1][real]))
    expected = plain_logits(model, tokens, mask)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lens, expected, atol=1e-5, rtol=1e-5)
    below = torch.stack(residuals[:-1])[:, real]
    torch.testing.assert_close(below, plain_residuals(model, tokens, mask), atol=1e-5, rtol=1e-5)
    assert len(residuals) == loaded.cfg.n_layers + 1 == 4
    assert loaded.cfg.d_model == 32
    assert loaded.cfg.d_vocab == D_VOCAB


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_surface_is_seen_without_running_any_code(backend):
    """As `isinstance` looks from Python 3.12 on, which does not find what `__getattr__` finds."""
    loaded = load_hooked(make_tiny("gpt2"), backend=backend)
    for name in get_protocol_members(HookedModel):
        inspect.getattr_static(loaded, name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_residual_backend_is_bit_identical(name):
    model = make_tiny(name)
    loaded = load_hooked(model, backend="residual")
    tokens = padded("right", (8, 8))[0]
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens).logits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "gemma2", *FUSED])
def test_unmerged_lora_is_right_on_every_backend(name, backend):
    if not supported(name, backend):
        pytest.skip("TransformerLens 3.9 has no HookedTransformer for this architecture")
    adapted = lora(make_tiny(name), name)
    tokens, mask = padded("left")
    expected = plain_logits(adapted, tokens, mask)
    without = plain_logits(make_tiny(name), tokens, mask)
    assert (expected - without).abs().max() > 0.05, "the adapter must matter for this test"
    loaded = load_hooked(adapted, backend=backend)
    with torch.no_grad():
        logits = hooked.run_logits(loaded, tokens, mask)[mask.bool()]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_lora", [False, True])
def test_the_callers_model_is_untouched(backend, with_lora):
    model = make_tiny("gpt2")
    if with_lora:
        model = lora(model, "gpt2")
    model.train()
    plain = model.get_base_model() if with_lora else model
    logger = logging.getLogger("transformers")
    before = {
        "keys": list(model.state_dict()),
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "parameters": [id(p) for p in model.parameters()],
        "grad": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "modules": [type(m) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attention": plain.config._attn_implementation,
        "config": plain.config.to_dict(),
        "level": logger.level,
    }
    loaded = load_hooked(model, backend=backend)
    hooked.run_residuals(loaded, *padded("left"))
    after = model.state_dict()
    assert list(after) == before["keys"]
    assert all(torch.equal(after[k], v) for k, v in before["weights"].items())
    assert [id(p) for p in model.parameters()] == before["parameters"]
    assert [p.requires_grad for p in model.parameters()] == before["grad"]
    assert [m.training for m in model.modules()] == before["training"]
    assert [type(m) for m in model.modules()] == before["modules"]
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == before[
        "hooks"
    ]
    assert plain.config._attn_implementation == before["attention"]
    assert plain.config.to_dict() == before["config"]
    assert logger.level == before["level"]


def test_weights_are_shared_not_copied(tiny):
    loaded = load_hooked(tiny, backend="residual")
    theirs = {p.data_ptr() for p in tiny.parameters()}
    assert {p.data_ptr() for p in loaded.parameters()} == theirs


def test_tied_weights_stay_tied():
    model = make_tiny("qwen2")
    loaded = load_hooked(model, backend="residual").model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_casting_makes_a_copy_and_leaves_the_original(tiny):
    loaded = load_hooked(tiny, backend="residual", dtype="bfloat16")
    assert loaded.cfg.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in tiny.parameters())


def test_importing_transformer_lens_keeps_the_logger():
    code = (
        "import transformers; transformers.logging.set_verbosity_info();"
        "from hyperlens.hooks.surface import import_transformer_lens; import_transformer_lens();"
        "print(transformers.logging.get_verbosity())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(logging.INFO)


@pytest.mark.parametrize("backend", BACKENDS)
def test_folders_and_adapter_folders_load(tmp_path, backend):
    model = make_tiny("llama")
    model.save_pretrained(tmp_path / "base")
    adapted = lora(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "llama")
    adapted.save_pretrained(tmp_path / "adapter")
    tokens, mask = padded("right")
    for folder, source in (("base", model), ("adapter", adapted)):
        loaded = load_hooked(tmp_path / folder, backend=backend, device="cpu")
        with torch.no_grad():
            logits = hooked.run_logits(loaded, tokens, mask)[mask.bool()]
        torch.testing.assert_close(logits, plain_logits(source, tokens, mask), atol=1e-5, rtol=1e-5)


def test_merged_peft_models_load():
    adapted = lora(make_tiny("gpt2"), "gpt2")
    tokens, mask = padded("right")
    expected = plain_logits(adapted, tokens, mask)
    adapted.merge_adapter()
    for backend in BACKENDS:
        loaded = load_hooked(adapted, backend=backend)
        with torch.no_grad():
            logits = hooked.run_logits(loaded, tokens, mask)[mask.bool()]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_already_hooked_model_is_checked_and_returned(tiny, backend):
    loaded = load_hooked(tiny, backend=backend)
    loaded.train()
    assert load_hooked(loaded) is loaded
    assert loaded.training, "the caller's training mode must come back"


def test_hooks_can_change_the_residual_stream(tiny):
    loaded = load_hooked(tiny, backend="residual")
    tokens = padded("right", (6,))[0]
    with torch.no_grad():
        untouched = loaded(tokens)
        replaced = loaded.run_with_hooks(
            tokens, fwd_hooks=[(hooked.resid_post(1), lambda x, hook: torch.zeros_like(x))]
        )
        again = loaded(tokens)
        cache = {}

        def keep(x, hook):
            cache[hook.name] = x

        loaded.run_with_hooks(tokens, fwd_hooks=[(name, keep) for name in loaded.hook_dict])
    assert not torch.allclose(untouched, replaced)
    assert torch.equal(untouched, again), "hooks must be gone afterwards"
    kinds = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    assert set(cache) == {hooked.site_hook(kind, b) for kind in kinds for b in range(3)} | {
        hooked.site_hook("final_norm", None)
    }
    assert torch.equal(cache[hooked.resid_post(0)], cache[hooked.resid_pre(1)])


def test_hooks_leave_even_when_the_forward_pass_fails(tiny):
    loaded = load_hooked(tiny, backend="residual")
    tokens = padded("right", (6,))[0]

    def explode(x, hook):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        loaded.run_with_hooks(tokens, fwd_hooks=[(hooked.resid_post(1), explode)])
    inner = loaded.model.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in inner)
    assert not any(point.fwd_hooks for point in loaded.hook_points())


def test_text_needs_a_tokenizer(tiny):
    with pytest.raises(LoadingError, match="no tokenizer"):
        ResidualModel(tiny)("hello")


def test_scaled_logits_are_found():
    config = transformers.CohereConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=D_VOCAB, logit_scale=0.3, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    loaded = load_hooked(transformers.AutoModelForCausalLM.from_config(config), backend="residual")
    assert loaded.structure.logit_scale == pytest.approx(0.3)


def test_a_wrong_hooked_model_is_an_error(tiny):
    loaded = ResidualModel(copy.deepcopy(tiny))
    check_parity(loaded, tiny)
    with torch.no_grad():
        loaded.model.model.norm.weight += 0.5
    with pytest.raises(ParityError, match="does not reproduce its source: logits"):
        check_parity(loaded, tiny)


def test_a_wrong_lens_is_an_error(tiny):
    loaded = ResidualModel(tiny)
    loaded.ln_final.norm = torch.nn.Identity()
    with pytest.raises(ParityError, match="logit lens at the last layer"):
        check_parity(loaded, tiny)


def test_a_model_that_looks_ahead_is_an_error():
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=D_VOCAB, is_decoder=False,
    )  # fmt: skip
    config.architectures = None
    with pytest.raises(LoadingError, match=r"looks ahead|encoder"):
        load_hooked(transformers.BertLMHeadModel(config).eval(), backend="residual")


@pytest.mark.skipif(HAS_HOOKED_TRANSFORMER, reason="this TransformerLens has HookedTransformer")
def test_hooked_transformer_says_which_version_to_install(tiny):
    with pytest.raises(LoadingError, match=r"transformer-lens>=3.9,<4"):
        load_hooked(tiny, backend="hooked_transformer")


def test_a_model_that_cannot_be_run_as_its_check_runs_it_is_refused(monkeypatch):
    """As some hybrids, which need a cache of their own kind."""
    model = make_tiny("llama")

    def failing(*args, **kwargs):
        raise AttributeError("'NoneType' object has no attribute 'layers'\nmore")

    monkeypatch.setattr(model.model.layers[1], "forward", failing)
    with pytest.raises(
        LoadingError, match=r"\(AttributeError: .* has no attribute 'layers'\): its"
    ):
        load_hooked(model, backend="residual")
