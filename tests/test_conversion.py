"""Models in other dtypes: what is cast, what is not, and that the caller's stays as it was."""

import copy

import pytest
import torch
from conftest import lora, make_tiny, perturbed, token_texts
from torch import nn

from hyperlens import compare_models, load_hooked
from hyperlens.errors import LoadingError
from hyperlens.models.weight_sharing import converted, weight_sharing_copy
from hyperlens.probes import ResidualDrift
from hyperlens.training import hyperfit

pytestmark = pytest.mark.transformer_lens

TEXTS = token_texts()


def frequencies(model):
    return {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}


def dtypes(model):
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("asked", [None, "bfloat16", torch.float16])
def test_rotary_frequencies_stay_float32_as_in_the_plain_model(tmp_path, asked):
    make_tiny("llama").bfloat16().save_pretrained(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=asked or "auto")
    given = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for source in (tmp_path / "model", given):
        hooked = load_hooked(source, backend="residual", dtype=asked, device="cpu")
        assert dtypes(hooked.model) == dtypes(plain)
        for name, found in frequencies(hooked.model).items():
            assert found.dtype == torch.float32
            assert torch.equal(found, plain.get_buffer(name))
        tokens = torch.arange(3, 60)[None]
        assert torch.equal(hooked(tokens), plain(tokens).logits)


def test_an_adapter_keeps_its_float32_on_a_half_precision_base():
    tuned = lora(make_tiny("llama").bfloat16(), "llama")
    before = dtypes(tuned)
    assert {torch.float32, torch.bfloat16} == set(before.values())
    hooked = load_hooked(tuned, backend="residual")
    assert dtypes(hooked.model) == before
    tokens = torch.arange(3, 20)[None]
    assert torch.equal(hooked(tokens), tuned(tokens).logits)
    base = make_tiny("llama").bfloat16()
    assert compare_models(base, tuned, TEXTS, progress=False).meta["dtype"] == "bfloat16"


def test_casting_covers_weights_and_stored_buffers_and_keeps_ties():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
            self.two.weight = self.one.weight
            self.register_buffer("stored", torch.ones(2))
            self.register_buffer("computed", torch.ones(2), persistent=False)
            self.register_buffer("counted", torch.ones(2, dtype=torch.int64))
            self.one.register_buffer("shared", self.stored)

    model = Model()
    cast = converted(weight_sharing_copy(model), None, torch.float64)
    assert cast.one.weight is cast.two.weight
    assert cast.one.shared is cast.stored
    assert cast.one.weight.dtype == cast.two.bias.dtype == cast.stored.dtype == torch.float64
    assert cast.computed.dtype == torch.float32
    assert cast.counted.dtype == torch.int64
    assert {t.dtype for t in (*model.parameters(), model.stored)} == {torch.float32}


def test_a_model_that_accelerate_dispatched_is_not_changed():
    accelerate = pytest.importorskip("accelerate")
    base = make_tiny("llama")
    expected = compare_models(base, perturbed(base), TEXTS, dtype="float64", progress=False)
    dispatched = accelerate.dispatch_model(copy.deepcopy(base), {"": "cpu"}, force_hooks=True)
    assert "to" in vars(dispatched)  # and it moves and casts this very model
    state = copy.deepcopy(dispatched.state_dict())
    found = compare_models(dispatched, perturbed(base), TEXTS, dtype="float64", progress=False)
    assert [row.value for row in found.long] == [row.value for row in expected.long]
    for name, tensor in dispatched.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("how", ["empty", "adapted"])
def test_a_model_without_its_weights_is_refused(how):
    base = make_tiny("llama")
    model = copy.deepcopy(base)
    if how == "empty":
        model = model.to("meta")
    else:
        model = lora(model, "llama")
        model.base_model.model.model.layers[1].to("meta")
    for call in (
        lambda: compare_models(model, base, TEXTS, progress=False),
        lambda: load_hooked(model, backend="residual"),
        lambda: hyperfit(model, TEXTS, "full", epochs=1, progress=False),
    ):
        with pytest.raises(LoadingError, match=r"weights of LlamaForCausalLM have no values") as e:
            call()
        assert "\n" not in str(e.value)


def test_a_spread_model_is_not_pulled_together():
    model = make_tiny("llama")
    model.model.layers[1].to("meta")
    with pytest.raises(LoadingError, match=r"spread over several devices.* leave device out"):
        converted(weight_sharing_copy(model), torch.device("cpu"), None)


@pytest.mark.parametrize("dtype", ["float32", None])
def test_a_quantised_model_is_never_cast(dtype):
    model = make_tiny("llama")
    model.quantization_method = "bitsandbytes"  # what transformers marks such models with

    def run():
        probes = [ResidualDrift()]
        return compare_models(
            model, perturbed(make_tiny("llama")), TEXTS, dtype=dtype, probes=probes, progress=False
        )

    if dtype is None:
        assert run().meta["dtype"] == "float32"
    else:
        with pytest.raises(LoadingError, match=r"quantised and cannot be cast .* leave dtype out"):
            run()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on import of the compiler
def test_a_compiled_model_is_the_model_inside():
    base = make_tiny("llama")
    compiled = torch.compile(base)  # compiles nothing before it is called
    hooked = load_hooked(compiled, backend="residual")
    tokens = torch.arange(3, 20)[None]
    assert torch.equal(hooked(tokens), base(tokens).logits)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "half a float", torch.int64])
def test_dtypes_that_models_do_not_run_in(dtype):
    with pytest.raises(LoadingError, match="dtype must be float32, bfloat16, float16 or float64"):
        load_hooked(make_tiny("llama"), dtype=dtype)


def test_what_accelerate_wraps_around_a_model_is_left_out() -> None:
    """As a model is right after `Trainer(bf16=True).train()`."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    base = make_tiny("llama")
    tuned = perturbed(base)
    texts = token_texts(6)
    wanted = compare_models(base, tuned, texts, progress=False)
    # One for all of a process: another test's Trainer may have set it to float32.
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(mixed_precision="bf16", cpu=True).prepare_model(tuned)
    AcceleratorState._reset_state(reset_partial_state=True)
    forward = tuned.forward
    found = compare_models(base, tuned, texts, progress=False)
    assert str(found.long) == str(wanted.long)
    assert tuned.forward == forward
