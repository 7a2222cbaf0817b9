"""Layer x position maps of pairs whose change is known; cells against whole forward passes."""

import copy
import re

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, D_VOCAB, lora, make_tiny, perturbed, token_texts
from test_patch_hooks import STATE_SPACE, blocks_perturbed, overflowing_together, state_space

from hyperlens.errors import ActivationError, HyperlensError, PatchError
from hyperlens.hooks.residual import ResidualModel
from hyperlens.hooks.surface import run_logits, unembed
from hyperlens.patching import Site, patch_hooks
from hyperlens.patching.position_cells import (
    EVERY,
    check_continues,
    patched_everywhere,
    patched_singly,
    read_endings,
)
from hyperlens.patching.positions import PositionsResult, patch_positions

INTO_BASE, INTO_TUNED = "tuned into base", "base into tuned"
WAYS = (INTO_BASE, INTO_TUNED)
TEXTS = token_texts(10, shortest=8, longest=18)
FEW = {"offsets": 3, "n_texts": 5, "progress": False}


def values(found, direction, offset, metric="recovered"):
    """Layer by layer."""
    return [row["value"] for row in found.column(direction, offset, metric)]


def site_of(layer):
    return Site("resid_pre", 0) if layer == 0 else Site("resid_post", layer - 1)


@pytest.mark.transformer_lens
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_cell_equals_a_whole_forward_pass_with_a_hook(name):
    base = make_tiny(name)
    target, source = ResidualModel(base), ResidualModel(perturbed(base, 0.1))
    texts = [torch.tensor(ids) for ids in (*TEXTS[1:3], TEXTS[0][:5])]
    width = max(map(len, texts))
    tokens = torch.stack([torch.nn.functional.pad(t, (width - len(t), 0)) for t in texts])
    mask = torch.stack([torch.arange(width) >= width - len(t) for t in texts]).long()
    target, source = (read_endings("", model, tokens, mask, 5) for model in (target, source))
    check_continues(target)
    with torch.no_grad():
        for layer in range(4):
            donated = source.stream[layer]
            made = patched_singly(target, donated, layer, 4)
            every = patched_everywhere(target, donated, layer)
            for row, ids in enumerate(texts):
                n = len(ids)
                for offset, normed in ((0, made[row, 0]), (4, made[row, 4]), (None, every[row])):
                    hooks = patch_hooks(
                        target.model,
                        {site_of(layer): donated[row : row + 1, width - n :]},
                        positions=None if offset is None else [n - 1 - offset],
                    )
                    whole = run_logits(target.model, ids[None], torch.ones(1, n).long(), hooks)
                    got = unembed(target.model, normed[None])[0]
                    torch.testing.assert_close(got, whole[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "block"), [("llama", 1), ("gpt2", 0), ("gpt_neox", 1), ("gemma2", 2), ("qwen2", 0)]
)
def test_a_change_in_one_block_acts_after_it(name, block):
    base = make_tiny(name)
    found = patch_positions(base, blocks_perturbed(base, [block], 0.3), TEXTS, **FEW)
    for way in WAYS:
        expected = [float(layer > block) for layer in range(4)]
        assert values(found, way, EVERY) == expected
        assert values(found, way, EVERY, "moved") == pytest.approx(expected, abs=1e-4)
        # Norm and unembedding are shared: what stands at the last token is the decision.
        assert values(found, way, 0)[-1] == 1.0
        for offset in range(3):
            moved = values(found, way, offset, "moved")
            assert moved[: block + 1] == [0.0] * (block + 1)
            assert offset == 0 or moved[-1] == 0.0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_what_acts_through_an_earlier_token_starts_there_and_arrives_at_the_last(name):
    base = make_tiny(name)
    tuned = copy.deepcopy(base)
    special, back, length = 7, 2, 6
    with torch.no_grad():
        table = tuned.get_input_embeddings().weight
        torch.manual_seed(1)
        # Not the unembedding, where the two are tied.
        head = torch.nn.Parameter(tuned.get_output_embeddings().weight.clone())
        tuned.get_output_embeddings().weight = head
        # Far larger than the others, so that later tokens cannot but attend to it.
        table[special] += 20 * torch.randn(table.shape[1])
    rng = np.random.default_rng(0)
    texts = rng.integers(10, D_VOCAB, (96, length))
    texts[:, length - 1 - back] = special
    # The texts have just as many tokens as are asked for: the decision is that after the last.
    found = patch_positions(base, tuned, texts.tolist(), offsets=length, n_texts=5, progress=False)
    for way in WAYS:
        for offset in range(length):
            first, *_, last = values(found, way, offset)
            assert first == float(offset == back)
            assert last == float(offset == 0)
            first, *_, last = values(found, way, offset, "moved")
            assert first == pytest.approx(float(offset == back), abs=1e-4)
            assert last == pytest.approx(float(offset == 0), abs=1e-4)
    assert found.arrival(INTO_BASE) is not None


def test_one_text_is_shown_with_its_tokens_cell_by_cell():
    base = make_tiny("llama")
    tuned = perturbed(base, 0.1)
    found = patch_positions(base, tuned, TEXTS, **FEW)
    example = found.extras["example"]
    assert len(example["tokens"]) == 3
    assert len(example["cells"]) == 2 * 4 * 3
    by_place = {(c["direction"], c["layer"], c["offset"]): c for c in example["cells"]}
    last = by_place[INTO_BASE, 3, 0]
    # No tokenizer: tokens are called by their ids.
    windows = [[str(i) for i in ids[j : j + 3]] for ids in TEXTS for j in range(len(ids))]
    assert example["tokens"] in windows
    assert example["base_top_1"] != example["tuned_top_1"]
    assert by_place[INTO_BASE, 3, 1]["top_1"] == example["base_top_1"]
    assert by_place[INTO_TUNED, 3, 2]["top_1"] == example["tuned_top_1"]
    assert 0 < abs(last["moved"]) < 5


def test_batches_are_invisible_and_the_seed_is_not():
    base = make_tiny("gemma2")
    tuned = perturbed(base, 0.1)
    one, many = (
        patch_positions(base, tuned, TEXTS, batch_size=size, seed=3, **FEW) for size in (3, 64)
    )
    for a, b in zip(one.table, many.table, strict=True):
        for column, value in a.items():
            expected = b[column]
            if isinstance(value, float):
                expected = pytest.approx(expected, abs=1e-4, nan_ok=True)
            assert value == expected, (column, a)
    for key in ("decisions", "looked_at", "too_short", "unchanged"):
        assert one.extras[key] == many.extras[key]
    assert one.extras["example"]["tokens"] == many.extras["example"]["tokens"]
    other = patch_positions(base, tuned, TEXTS, seed=4, **FEW)
    assert other.table != many.table


def test_an_unmerged_adapter_is_patched_as_it_runs():
    base = make_tiny("gpt2")
    adapter = lora(copy.deepcopy(base), "gpt2", layers_to_transform=[2], layers_pattern="h")
    found = patch_positions(base, adapter, TEXTS, **FEW)
    for way in WAYS:
        assert values(found, way, EVERY) == [0.0, 0.0, 0.0, 1.0]


def test_texts_that_do_not_serve_are_counted():
    base = make_tiny("llama")
    tuned = perturbed(base, 0.1)
    short = [[1, 5, 6], [1, 8, 8], [1, 9, 9, 9]]
    found = patch_positions(base, tuned, TEXTS + short, offsets=6, n_texts=99, progress=False)
    assert found.extras["looked_at"] == 13
    assert found.extras["too_short"] == 3
    assert found.extras["decisions"] + found.extras["unchanged"] == 10
    assert "3 of 13 texts have fewer than 6 tokens" in found.notes[0]
    fewer = patch_positions(base, tuned, TEXTS + short, offsets=6, n_texts=2, progress=False)
    assert fewer.extras["decisions"] == 2
    assert fewer.extras["looked_at"] < 13


def test_a_model_that_needs_more_than_keys_and_values_is_found_out():
    model = make_tiny("llama")
    tokens = torch.arange(3, 13)[None]
    ending = (ResidualModel(model), tokens, torch.ones_like(tokens), 4)
    check_continues(read_endings("base", *ending))
    # A block that looks at all tokens by another way than attention.
    model.model.layers[2].register_forward_hook(lambda m, given, out: out + out.mean(1, True))
    with pytest.raises(PatchError, match="does not read on from kept keys"):
        check_continues(read_endings("base", *ending))


@pytest.mark.parametrize("name", STATE_SPACE)
def test_states_that_are_no_keys_and_values_are_refused(name):
    target = ResidualModel(state_space(name))
    tokens = torch.arange(3, 13)[None]
    with pytest.raises(PatchError, match="something other than keys and values"):
        read_endings("base", target, tokens, torch.ones_like(tokens), 4)
    # Nothing is kept where every token is patched.
    check_continues(read_endings("base", target, tokens, torch.ones_like(tokens), 10))


def test_a_state_that_overflows_in_the_other_model_is_refused():
    with pytest.raises(ActivationError, match=r"tuned into base, layer 1\) has NaN or infinite"):
        patch_positions(*overflowing_together(), TEXTS, **FEW)


def test_refusals_say_what_to_do():
    base = make_tiny("llama")
    with pytest.raises(PatchError, match="in 0 of 10 texts, and intervals need two"):
        patch_positions(base, copy.deepcopy(base), TEXTS, **FEW)
    with pytest.raises(PatchError, match=r"with 19 tokens before it.*fewer offsets"):
        patch_positions(base, perturbed(base), TEXTS, offsets=19, progress=False)
    with pytest.raises(HyperlensError, match="offsets must be at least 1"):
        patch_positions(base, perturbed(base), TEXTS, offsets=0, progress=False)


def test_it_comes_back_from_its_folder_and_has_a_section(tmp_path):
    base = make_tiny("llama")
    found = patch_positions(base, perturbed(base, 0.1), TEXTS, **FEW)
    folder = found.save(tmp_path / "out")
    assert PositionsResult.load(folder) == found
    page = (folder / "report.html").read_text()
    assert 'data-section="patch_positions"' in page
    assert "From which token does a changed decision come?" in page
    # A name that Vega would take for a path, or for the end of a string, is drawn as nothing.
    fields = set(re.findall(r'"field": ?"([^"]*)"', page))
    assert all(field.isidentifier() for field in fields)
    assert "the last token" in (folder / "summary.txt").read_text()
    assert found.plot().to_dict()
