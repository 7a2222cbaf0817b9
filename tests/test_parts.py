"""Weights of one model in another: any part, nothing copied, everything back as it was."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, lora, make_tiny, perturbed
from test_hooked_models import padded

from hyperlens.errors import PatchError
from hyperlens.patching.parts import (
    NAMED,
    changed_parts,
    chosen_parts,
    matched,
    transplanted,
)

PARTS = (0, 1, 2, *NAMED)


def logits_of(model):
    tokens, mask = padded("right")
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask).logits[mask.bool()]


def tensors(model):
    """The very objects that every module holds."""
    return {
        (name, kind, key): id(value)
        for name, module in model.named_modules()
        for kind in ("_parameters", "_buffers")
        for key, value in getattr(module, kind).items()
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_belongs_to_one_part(name):
    base = make_tiny(name)
    slots = matched(base, perturbed(base))
    assert list(slots) == list(PARTS)
    places = [(id(slot.target), slot.key) for found in slots.values() for slot in found]
    held = [
        (id(kind), key)
        for module in base.modules()
        for kind in (module._parameters, module._buffers)
        for key, value in kind.items()
        if value is not None
    ]
    assert len(places) == len(set(places))
    assert set(places) == set(held)
    assert all(slots[part] for part in PARTS)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_with_all_parts_the_target_is_the_source_bit_for_bit(name):
    base, tuned = make_tiny(name), perturbed(make_tiny(name), 0.1)
    before, expected = logits_of(base), logits_of(tuned)
    held, theirs = tensors(base), tensors(tuned)
    with transplanted(base, tuned, "all"):
        assert torch.equal(logits_of(base), expected)
        assert torch.equal(logits_of(tuned), expected)
    with transplanted(base, tuned, ["last 3", "final_norm", "unembedding", "embedding"]):
        assert torch.equal(logits_of(base), expected)
    assert tensors(base) == held
    assert tensors(tuned) == theirs
    assert torch.equal(logits_of(base), before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_part_is_what_loading_its_weights_makes_of_it(name):
    """Against the obvious way: a copy whose tensors of that part are overwritten, untied first."""
    base = make_tiny(name)
    tuned = perturbed(base, 0.1)
    for part in PARTS:
        by_hand = with_part_loaded(base, tuned, part)
        with transplanted(base, tuned, part):
            got = logits_of(base)
        assert torch.equal(got, logits_of(by_hand))
        assert not torch.equal(got, logits_of(base))


def with_part_loaded(base, tuned, part):
    by_hand = copy.deepcopy(base)
    head = by_hand.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    names = {slot.name for slot in matched(base, tuned)[part]}
    theirs = dict(tuned.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for key, parameter in by_hand.named_parameters():
            if key in names:
                parameter.copy_(theirs[key])
    return by_hand


def test_what_is_tied_stays_behind():
    base, tuned = make_tiny("qwen2"), perturbed(make_tiny("qwen2"), 0.1)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    own = base.lm_head.weight
    with transplanted(base, tuned, "embedding"):
        assert base.lm_head.weight is own
        assert base.model.embed_tokens.weight is tuned.model.embed_tokens.weight
    with transplanted(base, tuned, "unembedding"):
        assert base.lm_head.weight is tuned.lm_head.weight
        assert base.model.embed_tokens.weight is own
    assert base.lm_head.weight is base.model.embed_tokens.weight is own


@pytest.mark.parametrize("interrupt", [RuntimeError, KeyboardInterrupt])
def test_weights_are_back_after_whatever_happens(interrupt):
    base, tuned = make_tiny("gpt2"), perturbed(make_tiny("gpt2"))
    held, theirs = tensors(base), tensors(tuned)

    def explode():
        with transplanted(base, tuned, [1, "final_norm"]):
            assert tensors(base) != held
            with transplanted(base, tuned, ["embedding", 1]):
                raise interrupt("stop here")

    with pytest.raises(interrupt):
        explode()
    assert tensors(base) == held
    assert tensors(tuned) == theirs


def test_parts_as_they_may_be_written():
    assert chosen_parts([], 3) == frozenset()
    assert chosen_parts("last 0", 3) == frozenset()
    assert chosen_parts("last 2", 3) == {1, 2}
    assert chosen_parts(0, 3) == {0}
    assert chosen_parts({2, "final_norm"}, 3) == {2, "final_norm"}
    assert chosen_parts("all", 2) == {0, 1, *NAMED}
    for wrong in (3, -1, True, "last 4", "last", "norm"):
        with pytest.raises(PatchError, match="give blocks from 0 to 2"):
            chosen_parts([wrong], 3)


def test_only_what_differs_has_changed():
    base = make_tiny("llama")
    tuned = copy.deepcopy(base)
    assert changed_parts(matched(base, tuned)) == frozenset()
    with torch.no_grad():
        tuned.model.layers[1].input_layernorm.weight[3] += 1e-3
        tuned.lm_head.weight[5, 5] += 1e-3
    assert changed_parts(matched(base, tuned)) == {1, "unembedding"}


def test_models_that_do_not_fit_are_refused_in_one_line():
    base = make_tiny("llama")
    for other, words in (
        (make_tiny("llama", num_hidden_layers=2), "3 blocks and the source 2"),
        (
            make_tiny("llama", intermediate_size=40),
            r"shape \(32, 48\) in the target and \(32, 40\)",
        ),
        (make_tiny("llama").double(), "dtype torch.float32 in the target and torch.float64"),
        (make_tiny("qwen3"), "the target has no model.layers.0.self_attn.k_norm.weight"),
        (lora(make_tiny("llama"), "llama"), "the source is a PeftModel.*merge it first"),
        (torch.nn.Linear(2, 2), "the source is a Linear"),
    ):
        held = tensors(base)
        with pytest.raises(PatchError, match=words) as caught, transplanted(base, other, "all"):
            pass
        assert "\n" not in str(caught.value)
        assert tensors(base) == held
    with (
        pytest.raises(PatchError, match="the target is a PeftModel"),
        transplanted(lora(make_tiny("llama"), "llama"), base, 0),
    ):
        pass
