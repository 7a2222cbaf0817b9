"""Layer x position maps of pairs whose change is known; cells against whole forward passes."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, D_VOCAB, lora, make_tiny, perturbed, token_texts
from test_patch_hooks import STATE_SPACE, blocks_perturbed, overflowing_together, state_space

from hyperlens.errors import ActivationError, HyperlensError, PatchError
from hyperlens.hooks.residual import ResidualModel
from hyperlens.hooks.surface import run_logits, unembed
from hyperlens.patching import Site, patch_hooks
from hyperlens.patching.earlier_tokens import earlier_tokens
from hyperlens.patching.position_cells import (
    EVERY,
    MapCells,
    check_continues,
    patched_everywhere,
    patched_singly,
    read_endings,
)
from hyperlens.patching.positions import PositionsResult, patch_positions
from hyperlens.validation.constructions import with_position

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


def earlier_sentence(found, way):
    """What is said of earlier tokens."""
    answers = [a for a in found.conclusions() if a.startswith(way.capitalize())]
    return answers[1]


@pytest.fixture(scope="module")
def only_position_5():
    """A pair that differs in what it adds to position 5, and its result."""
    base = make_tiny("gpt2")
    tuned = with_position(base, 5, 20.0, seed=1)
    texts = [ids[:11] for ids in token_texts(40, shortest=8, longest=11)]
    return patch_positions(base, tuned, texts, offsets=6, n_texts=32, progress=False)


def test_a_position_that_has_no_fixed_offset_is_found(only_position_5):
    found = only_position_5
    for way in WAYS:
        # No single offset: in each text another number of tokens follows position 5.
        said = earlier_sentence(found, way)
        assert "no fixed offset before the last token moves the decision" in said
        position = found.earlier(way, "position", "moved")
        assert [(one["label"], one["layer"]) for one in position["chosen"]] == [(5, 0)] * 2
        assert position["value"] == pytest.approx(1.0, abs=1e-3)
        assert position["n"] >= 12
        assert position["p"] < 0.001
        assert found.earlier(way, "position", "recovered")["value"] == 1.0
        assert "position 5 at layer 0 (+1" in said
        # Where it is not the last token itself, it is each text's own best.
        assert found.earlier(way, "own", "recovered")["n"] == found.extras["decisions"]
    page = " ".join(found.summary().split())
    assert "each text's own best" in page


def test_a_token_that_has_no_fixed_place_is_found():
    base = make_tiny("llama", tie_word_embeddings=False)
    tuned = copy.deepcopy(base)
    special = 7
    with torch.no_grad():
        torch.manual_seed(1)
        tuned.model.embed_tokens.weight[special] += 20 * torch.randn(32)
    rng = np.random.default_rng(0)
    texts = rng.integers(10, D_VOCAB, (60, 9))
    texts[np.arange(60), rng.integers(3, 9, 60)] = special
    found = patch_positions(base, tuned, texts.tolist(), offsets=6, n_texts=32, progress=False)
    for way in WAYS:
        token = found.earlier(way, "token", "moved")
        assert [(one["label"], one["layer"]) for one in token["chosen"]] == [(special, 0)] * 2
        assert token["chosen"][0]["token"] == "7"
        assert token["value"] == pytest.approx(1.0, abs=1e-3)
        assert token["p"] < 0.001
        assert "token '7' at layer 0 (+1" in earlier_sentence(found, way)


def test_nothing_acts_through_earlier_tokens_where_the_last_block_changed():
    base = make_tiny("llama")
    found = patch_positions(base, blocks_perturbed(base, [2], 0.3), TEXTS, **FEW)
    for way in WAYS:
        for kind in ("position", "token"):
            row = found.earlier(way, kind, "moved")
            assert row["chosen"] == []
            assert row["n"] == 0
        assert found.earlier(way, "own", "moved")["value"] == 0
        said = earlier_sentence(found, way)
        assert "no fixed offset before the last token" in said
        assert "No fixed position and no fixed token" in said


def noise(seed, planted=None):
    """Cells of 24 texts that move at random; with `planted`, that token moves them all the way."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 20, rng.integers(8, 30)) for _ in range(24)]
    shape = (24, 4, 7)
    moved = torch.from_numpy(rng.normal(size=shape) * rng.lognormal(size=(24, 1, 1)))
    if planted is not None:
        moved *= 0.1
        for i, ids in enumerate(texts):
            for offset in range(1, 6):
                if ids[len(ids) - 1 - offset] == planted:
                    moved[i, 1, offset] += 2.0
    zero, one = torch.zeros(24, dtype=torch.long), torch.ones(24, dtype=torch.long)
    unpatched = {"base": -one.double(), "tuned": one.double()}
    differences = {INTO_BASE: moved - 1, INTO_TUNED: 1 - moved}
    top_1 = dict.fromkeys(WAYS, torch.zeros(shape, dtype=torch.long))
    offsets = (*range(6), EVERY)
    return MapCells(offsets, zero, one, unpatched, top_1, differences), texts


@pytest.mark.parametrize("rounds", [20, pytest.param(400, marks=pytest.mark.long)])
def test_the_best_of_many_tokens_is_no_finding_where_all_move_at_random(rounds):
    alarms = 0
    for seed in range(rounds):
        rows = list(earlier_tokens(*noise(seed)))
        assert {row["kind"] for row in rows} == {"position", "token", "own"}
        alarms += any(row["p"] < 0.05 for row in rows)
    # At 5%, more than this has a probability below 0.001.
    assert alarms <= {20: 5, 400: 35}[rounds]


def test_a_token_that_moves_beyond_the_noise_is_found():
    found = 0
    for seed in range(10):
        rows = earlier_tokens(*noise(seed, planted=3))
        (row,) = (r for r in rows if r["kind"] == "token" and r["direction"] == INTO_BASE
                  and r["metric"] == "moved")  # fmt: skip
        chosen = {(one["label"], one["layer"]) for one in row["chosen"]}
        found += chosen == {(3, 1)} and row["value"] > 0.5
    assert found >= 5


def test_a_map_without_earlier_tokens_says_nothing_of_them():
    base = make_tiny("llama")
    found = patch_positions(base, perturbed(base, 0.1), TEXTS, offsets=1, n_texts=4, progress=False)
    assert found.earlier(INTO_BASE, "own", "moved")["n"] == 0
    assert found.summary()


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
    # Of version 0.1, which looked at offsets only.
    old = replace(found, extras={k: v for k, v in found.extras.items() if k != "earlier"})
    assert "a token that matters in one text stands elsewhere" in earlier_sentence(old, INTO_BASE)
    assert "each text's own best" not in old.summary()
    page = (folder / "report.html").read_text()
    assert 'data-section="patch_positions"' in page
    assert "From which token does a changed decision come?" in page
    # A name that Vega would take for a path, or for the end of a string, is drawn as nothing.
    fields = set(re.findall(r'"field": ?"([^"]*)"', page))
    assert all(field.isidentifier() for field in fields)
    assert "the last token" in (folder / "summary.txt").read_text()
    assert found.plot().to_dict()
