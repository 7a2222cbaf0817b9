"""Placebos change as much as tuning did and nothing else; the tuned model stands beside them."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, lora, make_tiny, perturbed, token_texts

from hyperlens import NullTestResult, compare_models, null_test
from hyperlens.errors import HyperlensError, PairError
from hyperlens.experiments.null_test_finding import verdict
from hyperlens.experiments.placebo import changed_tensors, placebo

TEXTS = token_texts(10, shortest=8, longest=20)
SHORT = {"prompt_tokens": 6, "max_new_tokens": 6, "n_prompts": 4, "progress": False}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_placebo_keeps_the_norm_and_the_values_of_every_change(name: str) -> None:
    base = make_tiny(name)
    tuned = perturbed(base, 0.1)
    before = copy.deepcopy(base.state_dict())
    changes = changed_tensors(base, tuned)
    assert changes.keys() == dict(base.named_parameters()).keys()
    made = placebo(base, changes, seed=3)
    for key, old in before.items():
        assert torch.equal(base.state_dict()[key], old), key
    for key, parameter in made.named_parameters():
        change = (parameter.detach() - before[key]).flatten()
        assert torch.allclose(change.sort().values, changes[key].flatten().sort().values, atol=1e-6)
        if change.numel() > 8:
            assert not torch.allclose(change, changes[key].flatten())
    again, other = placebo(base, changes, seed=3), placebo(base, changes, seed=4)
    for a, b, c in zip(made.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.numel() < 8 or not torch.equal(a, c)


def test_what_did_not_change_is_shared_with_the_base() -> None:
    base = make_tiny("llama")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight += 0.1
    made = placebo(base, changed_tensors(base, tuned), seed=0)
    shared = {
        name
        for (name, a), b in zip(made.named_parameters(), base.parameters(), strict=True)
        if a.data_ptr() == b.data_ptr()
    }
    changed = "model.layers.1.mlp.down_proj.weight"
    assert shared == {name for name, _ in base.named_parameters()} - {changed}


def test_tied_weights_stay_tied() -> None:
    base = make_tiny("qwen2")
    made = placebo(base, changed_tensors(base, perturbed(base)), seed=0)
    assert made.lm_head.weight is made.model.embed_tokens.weight


@pytest.mark.transformer_lens
def test_the_tuned_column_is_what_compare_models_says() -> None:
    base = make_tiny("llama")
    tuned = perturbed(base, 0.2)
    found = null_test(base, tuned, TEXTS, n_placebos=2, **SHORT)
    comparison = compare_models(base, tuned, TEXTS, progress=False)
    for metric, probe in (
        ("relative_l2", "drift"),
        ("delta", "participation_ratio"),
        ("spearman", "rank_reordering"),
        ("kl", "logit_lens"),
    ):
        for row in found.select(metric=metric):
            same = comparison.value(probe, metric, row["layer"], row["view"])
            assert row["tuned"] == pytest.approx(same, rel=1e-9, abs=1e-12), row
            assert row["placebo_low"] <= row["placebo_mean"] <= row["placebo_high"]


def test_a_random_change_is_not_beyond_other_random_changes() -> None:
    """The tuned model is itself a random change: it must look like a placebo on the whole."""
    base = make_tiny("llama")
    few = SHORT | {"n_prompts": 1, "max_new_tokens": 1}
    inside = 0
    for seed in range(4):
        tuned = perturbed(base, 0.1, seed=10 + seed)
        found = null_test(base, tuned, TEXTS[:6], n_placebos=7, seed=100 * seed, **few)
        (row,) = found.select(metric="relative_l2", view="raw", layer=3)
        inside += verdict(row) == "within their range"
    # Of 8 exchangeable numbers one is the greatest or least with probability 1/4.
    assert inside >= 1


def test_a_change_with_structure_is_beyond_them() -> None:
    base = make_tiny("llama")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        # Every vector of the last block moves the same way: far more than noise of that norm.
        tuned.model.layers[2].mlp.down_proj.weight += 0.5 * torch.ones(32, 1)
    found = null_test(base, tuned, TEXTS, n_placebos=3, **SHORT)
    assert "every placebo" in found.summary()
    rows = found.select(metric="relative_l2", view="raw")
    assert [row["tuned"] for row in rows if row["layer"] < 3] == [0, 0, 0]
    assert [row["placebo_high"] for row in rows if row["layer"] < 3] == [0, 0, 0]


def test_an_adapter_is_merged_and_left_alone() -> None:
    base = make_tiny("gpt2")
    adapter = lora(copy.deepcopy(base), "gpt2")
    before = copy.deepcopy(adapter.state_dict())
    found = null_test(base, adapter, TEXTS, n_placebos=1, **SHORT)
    assert found.extras["changed_tensors"] == 3 * 4
    assert all(torch.equal(adapter.state_dict()[key], old) for key, old in before.items())


def test_refusals_say_what_to_do() -> None:
    base = make_tiny("llama")
    with pytest.raises(PairError, match="no change to test"):
        null_test(base, base, TEXTS, **SHORT)
    with pytest.raises(HyperlensError, match="n_placebos"):
        null_test(base, perturbed(base), TEXTS, n_placebos=0, **SHORT)


def test_the_same_seed_gives_the_same_and_it_comes_back(tmp_path: Path) -> None:
    base = make_tiny("mistral")
    tuned = perturbed(base)
    first, again = (null_test(base, tuned, TEXTS, n_placebos=2, **SHORT) for _ in range(2))
    assert first == again
    assert len(first.plot().axes) == 3
    folder = first.save(tmp_path / "out")
    assert NullTestResult.load(folder) == first
    assert "every placebo" in (folder / "report.html").read_text() or "range" in first.summary()
