"""Half precision that hides what pads do, or chooses other experts when it rounds otherwise."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import make_tiny, perturbed
from transformers import MixtralConfig, MixtralForCausalLM

import hyperlens
from hyperlens import compare_models, experiments, open_pair, patching
from hyperlens.errors import ParityError
from hyperlens.hooks import parity
from hyperlens.hooks.loading import hook
from hyperlens.models.sources import open_source

TEXTS = [[(i * j) % 50 + 3 for j in range(1, 6 + i % 3)] for i in range(1, 12)]


def mixtral(near: float = 0.01, dtype: torch.dtype = torch.bfloat16) -> MixtralForCausalLM:
    """12 blocks of experts; `near` is how far the router's rows are from one another.

    Some machines round a row in a batch as they round it alone. Here routers do not, on any.
    """
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("gate.weight"):
                weight.copy_(weight.mean(0, keepdim=True) * 3 + near * weight)
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_pre_hook(round_by_shape)
    return model.to(dtype)


def round_by_shape(router, args) -> tuple | None:
    """In half precision what enters differs in its last bits by the number of rows."""
    x, *rest = args
    if x.dtype == torch.float32:
        return None
    rows = x.shape[:-1].numel()
    return (x + rows % 7 * 2**-9 * x.roll(1, -1), *rest)


def test_experts_by_close_margins_are_read_without_pads() -> None:
    base = mixtral()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.lm_head.weight *= 1.1
    pair = open_pair(base, tuned)
    assert pair.base.unpadded
    assert pair.tuned.unpadded
    assert "without pads; dtype='float32' avoids it" in pair.notes[0]
    corpus = pair.tokenize(TEXTS)
    batches = list(corpus.batches(3))
    assert all(batch.real.all() for batch in batches)
    assert sum(len(batch.tokens) for batch in batches) == len(TEXTS)
    assert max(len(batch.tokens) for batch in batches) == 3
    comparison = compare_models(pair, TEXTS, probes=["drift"], progress=False)
    assert any("without pads" in note for note in comparison.meta["notes"])


def test_in_float32_they_are_read_as_all_others() -> None:
    loaded = hook(open_source(mixtral(dtype=torch.float32)), "residual")
    assert not loaded.unpadded
    pair = open_pair(mixtral(), mixtral(), dtype="float32")
    assert pair.notes == ()
    assert not pair.tokenize(TEXTS).unpadded


def test_a_hooked_model_is_checked_without_its_plain_one() -> None:
    hooked = hook(open_source(mixtral()), "residual").hooked
    assert hook(open_source(hooked), "residual").unpadded


def test_close_margins_excuse_no_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs in batches of one shape is no matter of rounding."""
    plain = mixtral()
    opened = open_source(plain)
    loaded = hook(opened, "residual")
    another = mixtral()
    with torch.no_grad():
        another.model.layers[6].mlp.experts.down_proj *= 2
    with pytest.raises(ParityError, match="right-padded batch in bfloat16 differ by"):
        parity.check_parity(loaded.hooked, another)


@pytest.mark.transformer_lens
def test_a_backend_that_rounds_otherwise_is_refused() -> None:
    with pytest.raises(ParityError, match="load it in float32, or use backend='residual'"):
        hook(open_source(mixtral()), "bridge")


def test_float32_holds_one_block_at_a_time() -> None:
    """The copy that the check runs casts a block when it runs, and leaves the source alone."""
    plain = mixtral()
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    wide = open_source(plain).model
    parity.compute_in_float32(wide, wide.model.layers)
    seen = []
    for block in wide.model.layers:
        block.register_forward_pre_hook(
            lambda module, args: seen.append(
                sum(next(one.parameters()).dtype == torch.float32 for one in wide.model.layers)
            )
        )
    tokens = torch.tensor([TEXTS[0]])
    with torch.no_grad():
        got = wide(input_ids=tokens, use_cache=False).logits
        expected = plain.float()(input_ids=tokens, use_cache=False).logits
    assert seen == [1] * 12
    assert next(wide.model.layers[0].parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)
    assert all(torch.equal(plain.state_dict()[name], w.float()) for name, w in before.items())


FEW = {"n_prompts": 3, "prompt_tokens": 4, "max_new_tokens": 3, "progress": False}
WITHOUT_PADS = {
    "compare": lambda *of: compare_models(*of, batch_size=4, progress=False),
    "behaviour": lambda *of: hyperlens.measure_behaviour(*of, **FEW),
    "provenance": lambda *of: hyperlens.trace_provenance(*of, **FEW),
    "divergence": lambda *of: experiments.find_first_divergence(*of, **FEW),
    "temperature": lambda *of: hyperlens.match_temperature(*of, **FEW),
    "blocks": lambda *of: hyperlens.patch_blocks(
        *of, batch_size=4, max_new_tokens=0, progress=False
    ),
    "positions": lambda *of: patching.patch_positions(
        *of, offsets=3, n_texts=6, batch_size=4, progress=False
    ),
    "weights": lambda *of: patching.patch_weights(*of, **FEW),
    "norm": lambda *of: patching.patch_norm(*of, batch_size=4, progress=False),
}


@pytest.mark.parametrize("name", WITHOUT_PADS)
def test_no_experiment_lets_such_a_model_see_pads(name: str) -> None:
    seen: list[bool] = []

    def look(model, args, given) -> None:
        mask = given.get("attention_mask")
        seen.append(mask is None or bool(mask.bool().all()))

    base = make_tiny("llama")
    tuned = perturbed(base, 0.1)
    expected = WITHOUT_PADS[name](base, tuned, TEXTS)
    for model in (base, tuned):
        model.register_forward_pre_hook(look, with_kwargs=True)
    pair = open_pair(base, tuned)
    pair = replace(pair, **{s: replace(getattr(pair, s), unpadded=True) for s in ("base", "tuned")})
    seen.clear()  # opening looks at pads on purpose
    found = WITHOUT_PADS[name](pair, TEXTS)
    assert seen
    assert all(seen)
    for row, other in zip(found.to_frame().value, expected.to_frame().value, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4, nan_ok=True)
