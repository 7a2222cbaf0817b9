"""Planted truths: what differs in one place is found there, and nowhere else."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, SIZES, make_tiny, perturbed, token_texts
from test_patch_hooks import blocks_perturbed, overflowing_together, state_space
from transformers import AutoModelForCausalLM, GraniteConfig

from hyperlens.data.corpus import build_corpus
from hyperlens.errors import ActivationError, HyperlensError, PatchError
from hyperlens.hooks.residual import ResidualModel
from hyperlens.hooks.sites import in_blocks
from hyperlens.hooks.surface import run_logits
from hyperlens.pair import open_pair
from hyperlens.patching import BlocksResult, patch_blocks, patch_expansion, patch_weights
from hyperlens.patching.blocks import Cell, Sweep, run_sweep
from hyperlens.patching.outcomes import INTO_BASE, INTO_TUNED, METRICS
from hyperlens.render.blocks import Chart, flat
from hyperlens.render.format import PERCENT, interval
from hyperlens.validation.constructions import with_cancelling_blocks, with_noise_in_unembedding

TEXTS = token_texts(14, shortest=6, longest=20)
LONG = pytest.mark.long
QUICK = {"max_new_tokens": 0, "progress": False}
SHORT = {"n_prompts": 4, "prompt_tokens": 6, "max_new_tokens": 6, "progress": False}


def along(finding, direction, metric, activation="source"):
    return [row["value"] for row in finding.along(direction, metric, activation)]


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=LONG), "gpt_neox"])
def test_the_same_model_twice_shows_nothing_anywhere(name):
    base = make_tiny(name)
    found = patch_blocks(base, copy.deepcopy(base), TEXTS, **SHORT)
    for row in found.table:
        if row["metric"] in ("kl_tuned", "kl_base"):
            if row["activation"] not in ("other_text",):
                assert row["value"] == 0, row
        elif row["metric"] in ("to_tuned", "to_base", "logit_difference"):
            assert math.isnan(row["value"])
            assert row["n"] == 0
        elif row["metric"].startswith("agreement") and row["activation"] != "other_text":
            assert row["value"] == 1
    assert found.extras["changed"] == 0
    assert "changed no decision" in found.summary()


@pytest.mark.parametrize(
    ("name", "block"),
    [
        # Each block once, each in another architecture.
        pytest.param(name, block, marks=() if i == block else LONG)
        for i, name in enumerate(ARCHITECTURES)
        for block in range(3)
    ],
)
def test_a_change_of_one_block_is_found_in_that_block(name, block):
    base = make_tiny(name)
    tuned = blocks_perturbed(base, [block], scale=0.3)
    found = patch_blocks(base, tuned, TEXTS, **QUICK)
    assert found.extras["changed"] > 5
    # Layer l is the output of block l - 1: all of it from there on, none before.
    expected = [float(layer > block) for layer in range(4)]
    for direction, metric in ((INTO_BASE, "to_tuned"), (INTO_TUNED, "to_base")):
        assert along(found, direction, metric) == expected
    assert along(found, INTO_BASE, "kl_tuned")[block + 1 :] == pytest.approx(
        [0.0] * (3 - block), abs=1e-6
    )
    state = {e["layer"]: e["value"] for e in found.effect("incoming_residual")}
    stack = {e["layer"]: e["value"] for e in found.effect("late_blocks")}
    both = {e["layer"]: e["value"] for e in found.effect("interaction")}
    for layer in range(4):
        assert state[layer] == float(layer > block)
        assert stack[layer] == float(layer <= block)
        assert both[layer] == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "attn_out"),
        ("gpt2", "mlp_out"),
        ("gemma2", "mlp_out"),
        ("gpt_neox", "attn_out"),
        pytest.param("llama", "mlp_out", marks=LONG),
        pytest.param("gpt2", "attn_out", marks=LONG),
        pytest.param("gemma2", "attn_out", marks=LONG),
        pytest.param("gpt_neox", "mlp_out", marks=LONG),
    ],
)
def test_a_change_of_one_branch_is_found_in_that_branch(name, kind):
    base = make_tiny(name)
    tuned = copy.deepcopy(base)
    module = ResidualModel(tuned).structure.branches[1][kind == "mlp_out"]
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    for swept in ("attn_out", "mlp_out"):
        found = patch_blocks(base, tuned, TEXTS, site=swept, controls=False, **QUICK)
        assert found.extras["changed"] > 5
        into_base = dict(zip(range(3), along(found, INTO_BASE, "to_tuned"), strict=True))
        if swept == kind:
            assert into_base[1] == 1
        assert into_base[0] == 0
        assert not found.extras["effects"], "a branch is no state: there is no 2 x 2 of it"


@pytest.mark.parametrize("name", [pytest.param("llama", marks=LONG), "qwen2", "gpt2"])
def test_a_change_of_the_final_norm_or_the_head_is_in_no_block(name):
    base = make_tiny(name, tie_word_embeddings=False)
    for part in ("norm", "head"):
        tuned = copy.deepcopy(base)
        structure = ResidualModel(tuned).structure
        module = structure.final_norm if part == "norm" else structure.head
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.7 * torch.randn_like(parameter)
        found = patch_blocks(base, tuned, TEXTS, **QUICK)
        assert found.extras["changed"] > 5
        assert along(found, INTO_BASE, "to_tuned") == [0] * 4
        assert along(found, INTO_TUNED, "to_base") == [0] * 4
        assert [e["value"] for e in found.effect("late_blocks")] == [1] * 4
        normed = patch_blocks(base, tuned, TEXTS, site="final_norm", controls=False, **QUICK)
        assert along(normed, INTO_BASE, "to_tuned") == [float(part == "norm")]


def brute_force(base, tuned, site, texts):
    """Shares by whole forward passes, one text at a time, hooks on the stock model."""
    from hyperlens.patching import patch_hooks, record

    target, source = ResidualModel(base), ResidualModel(tuned)
    hits = changed = 0
    for ids in texts:
        tokens = torch.tensor([ids])
        mask = torch.ones_like(tokens)
        with torch.no_grad():
            first = run_logits(target, tokens, mask)[0, 1:].argmax(-1)  # BOS decides nothing
            second = run_logits(source, tokens, mask)[0, 1:].argmax(-1)
            hooks = patch_hooks(target, record(source, tokens, mask, [site]))
            third = run_logits(target, tokens, mask, hooks)[0, 1:].argmax(-1)
        changed += int((first != second).sum())
        hits += int(((first != second) & (third == second)).sum())
    return hits / changed


@pytest.mark.transformer_lens
@pytest.mark.parametrize("kind", ["resid_post", "attn_out", "mlp_out"])
def test_shares_equal_whole_forward_passes(kind):
    base = make_tiny("qwen3")
    tuned = perturbed(base, 0.15)
    found = patch_blocks(base, tuned, TEXTS, site=kind, **QUICK)
    for site in in_blocks(kind, range(3)):
        (row,) = [r for r in found.along(INTO_BASE, "to_tuned") if r["block"] == site.block
                  and r["site"] == kind]  # fmt: skip
        assert row["value"] == pytest.approx(brute_force(base, tuned, site, TEXTS), abs=1e-9)


@pytest.fixture(scope="module")
def in_fives():
    """A pair in float64, and its result with five texts side by side."""
    base = make_tiny("llama").double()
    tuned = perturbed(base, 0.15)
    return base, tuned, patch_blocks(base, tuned, TEXTS, batch_size=5, **QUICK)


@pytest.mark.parametrize("side_by_side", [pytest.param(1, marks=LONG), 3, 14])
def test_batches_change_nothing(in_fives, side_by_side):
    base, tuned, whole = in_fives
    other = patch_blocks(base, tuned, TEXTS, batch_size=side_by_side, **QUICK)
    for one, two in zip(whole.table, other.table, strict=True):
        assert one.keys() == two.keys()
        assert one["value"] == pytest.approx(two["value"], abs=1e-6), one
        assert one["low"] == pytest.approx(two["low"], abs=1e-6, nan_ok=True)


def test_a_patch_at_some_positions_does_not_reach_back():
    base = make_tiny("llama")
    tuned = blocks_perturbed(base, [1], scale=0.3)
    pair = open_pair(base, tuned)
    corpus = build_corpus([t[:12] for t in TEXTS if len(t) >= 12], None, max_length=12, bos_id=1)
    site = in_blocks("resid_post", [1])
    outcomes = run_sweep(pair, corpus, Sweep(site, slice(7, None), False, 0), 4, False)
    patched = outcomes.patched[Cell(INTO_BASE, site[0], "source")]
    base_itself = outcomes.models["base"]
    assert 0 < patched.sums["to_tuned"].sum() < patched.changed.sum()
    assert patched.sums["agreement_base"].sum() < base_itself.sums["agreement_base"].sum()
    with pytest.raises(PatchError, match="choose from 0 to 11"):
        run_sweep(pair, corpus, Sweep(site, [40], False, 0), 4, False)


def test_generated_text_is_the_sources_where_all_of_it_is_patched():
    base = make_tiny("llama")
    tuned = blocks_perturbed(base, [0, 2], scale=0.4)
    found = patch_blocks(base, tuned, TEXTS, **SHORT)
    for metric in ("ttr", "rep_2"):
        assert along(found, INTO_BASE, metric)[3] == found.unpatched("tuned", metric)["value"]
        assert along(found, INTO_TUNED, metric)[3] == found.unpatched("base", metric)["value"]
        assert along(found, INTO_BASE, metric)[0] == found.unpatched("base", metric)["value"]
    against = {c["activation"] for c in found.contrasts(INTO_BASE, "ttr")}
    assert against == {"unpatched", "rotated"}


def test_controls_do_not_pass_for_the_source():
    base = make_tiny("llama")
    tuned = blocks_perturbed(base, [1], scale=0.3)
    found = patch_blocks(base, tuned, token_texts(40, shortest=8, longest=20), **QUICK)
    for layer in (2, 3):
        assert found.beats_controls(INTO_BASE, layer) is True
    for layer in (0, 1):
        # Nothing to put in: controls of size zero are the target itself.
        assert found.beats_controls(INTO_BASE, layer) is False
    for name in ("random_direction", "rotated"):
        assert max(along(found, INTO_BASE, "to_tuned", name)) < 0.7
        assert along(found, INTO_BASE, "to_tuned", name)[:2] == [0, 0]


def test_it_comes_back_from_disk_and_draws(tmp_path: Path) -> None:
    base = make_tiny("llama")
    found = patch_blocks(base, perturbed(base, 0.15), TEXTS, **SHORT)
    again = patch_blocks(base, perturbed(base, 0.15), TEXTS, **SHORT)
    assert found == again
    folder = found.save(tmp_path / "out")
    assert BlocksResult.load(folder) == found
    assert found.plot().to_dict()
    kinds = [block for block in flat(found.blocks()) if isinstance(block, Chart)]
    assert len(kinds) == 4
    assert all(chart.y.scale == "share" for chart in kinds if "2 x 2" not in chart.title)
    page = (folder / "report.html").read_text()
    assert 'data-section="patch_blocks"' in page
    assert "the head (final norm and unembedding)" in found.conclusions()[0]
    metrics = {row["metric"] for row in found.table}
    assert metrics == {*METRICS, "ttr", "rep_2", "rep_3"}


def test_an_unembedding_alone_is_not_called_a_block() -> None:
    base = make_tiny("llama", tie_word_embeddings=False)
    tuned = with_noise_in_unembedding(base, 0.3, seed=0)
    found = patch_blocks(base, tuned, TEXTS, controls=False, **QUICK)
    assert found.parts()["head"]["value"] == 1.0
    assert found.parts()["last_block"]["value"] == 0.0
    assert "head alone (final norm and unembedding)" in found.conclusions()[0]
    assert "brings about 100.0% [" in found.conclusions()[0]
    said = " ".join(v.answer for v in found.verdicts() if v.topic in ("cause", "interaction"))
    assert "last block" not in said
    moved = patch_weights(base, tuned, TEXTS, enough=0.5, **QUICK).conclusions()
    assert "no block at all is needed (100.0% [" in moved[0]
    assert "the head (final norm and unembedding) alone 100.0% [" in " ".join(moved)
    assert "last block" not in " ".join(moved)


def test_blocks_that_cancel_out_beside_a_changed_unembedding_are_no_interaction() -> None:
    plain = make_tiny("llama", tie_word_embeddings=False).double()
    base, shifted = with_cancelling_blocks(plain, 3.0, seed=5)
    tuned = with_noise_in_unembedding(shifted, 0.3, seed=0)
    found = patch_blocks(base, tuned, TEXTS, controls=False, **QUICK)
    assert found.extras["changed"] > 5
    cut = {e["layer"]: e for e in found.effect("interaction")}
    assert cut[2]["low"] > 0.2  # what was taken for an interaction of blocks
    assert cut[3]["value"] == 0
    assert found.parts()["head"]["value"] == 1.0
    topics = [verdict.topic for verdict in found.verdicts()]
    assert topics.count("cause") == 1
    assert "interaction" not in topics
    assert "no block is needed" in found.conclusions()[0]


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=LONG) for name in ("gpt2", "gemma2"))]
)
def test_the_last_block_and_the_head_alone_are_what_patch_weights_moves(name) -> None:
    base = make_tiny(name, tie_word_embeddings=False)
    tuned = perturbed(base, 0.15)
    parts = patch_blocks(base, tuned, TEXTS, controls=False, **QUICK).parts()
    moved = patch_weights(base, tuned, TEXTS, **QUICK)
    place = {"direction": INTO_BASE, "metric": "to_tuned"}
    block = moved.value(kind="block", number=2, **place)
    head = moved.value(kind="suffix_and_head", number=0, **place)
    assert 0 < block < 1
    assert 0 < head < 1
    assert parts["last_block"]["value"] == pytest.approx(block)
    assert parts["head"]["value"] == pytest.approx(head)
    shares = [parts[part]["value"] for part in ("incoming_residual", "last_block", "head")]
    assert parts["beyond_parts"]["value"] == pytest.approx(1 - sum(shares))
    (said,) = (v.answer for v in moved.verdicts() if v.topic == "one part alone")
    for part in ("last_block", "head"):
        assert interval(parts[part], PERCENT) in said


@pytest.mark.parametrize("block", [1, 2])
def test_a_change_before_or_in_the_last_block_is_named_for_what_it_is(block) -> None:
    base = make_tiny("llama")
    tuned = blocks_perturbed(base, [block], scale=0.3)
    texts = token_texts(24, shortest=8, longest=20)
    found = patch_blocks(base, tuned, texts, controls=False, **QUICK)
    part = "the last block" if block == 2 else "what enters the last block"
    assert f"By itself {part} does most" in found.conclusions()[0]
    assert "interaction" not in [verdict.topic for verdict in found.verdicts()]


def test_a_result_that_did_not_tell_block_and_head_apart_says_so(tmp_path: Path) -> None:
    base = make_tiny("llama")
    found = patch_blocks(base, perturbed(base, 0.15), TEXTS, controls=False, **QUICK)
    extras = {key: value for key, value in found.extras.items() if key != "parts"}
    replace(found, extras=extras).write(tmp_path)
    old = BlocksResult.load(tmp_path)
    assert old.parts() == {}
    assert "last block and head together on the base's incoming residual" in old.conclusions()[0]
    assert "interaction" not in [verdict.topic for verdict in old.verdicts()]


@pytest.mark.parametrize("n_layers", [1, 3])
def test_the_last_cut_is_the_same_whichever_end_of_a_block_is_patched(n_layers):
    base = make_tiny("llama", num_hidden_layers=n_layers)
    tuned = perturbed(base, 0.15)
    post, pre = (
        patch_blocks(base, tuned, TEXTS, site=site, controls=False, **SHORT)
        for site in ("resid_post", "resid_pre")
    )
    said = {
        name: [text for text in found.conclusions() if "Generated text" not in text]
        for name, found in (("post", post), ("pre", pre))
    }
    assert said["pre"] == said["post"]
    assert "the head (final norm and unembedding)" in said["pre"][0]
    # What enters the last block is the layer before the last.
    answers = [" ".join(found.conclusions()) for found in (pre, post)]
    assert f"tuned into base at layer {n_layers - 1}:" in answers[0]
    assert "tuned into base at the last layer:" in answers[1]


def test_a_state_that_overflows_in_the_other_model_is_refused():
    with pytest.raises(ActivationError, match=r"tuned into base, source at resid_post of block 0"):
        patch_blocks(*overflowing_together(), TEXTS, controls=False, **QUICK)


def test_models_that_keep_their_past_in_another_way_are_read_but_not_written_with(monkeypatch):
    base = state_space("mamba")
    tuned = perturbed(base, 0.1)
    found = patch_blocks(base, tuned, TEXTS, controls=False, **QUICK)
    assert along(found, INTO_BASE, "agreement_tuned")[-1] > 0

    def not_yet(*_):
        raise AssertionError("what cannot be finished must not be begun")

    monkeypatch.setattr("hyperlens.patching.blocks.run_sweep", not_yet)
    with pytest.raises(PatchError, match=r"takes no past_key_values.*max_new_tokens=0"):
        patch_blocks(base, tuned, TEXTS, **SHORT)


def test_refusals_say_what_to_do() -> None:
    base = make_tiny("llama")
    tuned = perturbed(base)
    with pytest.raises(PatchError, match="a site is one of"):
        patch_blocks(base, tuned, TEXTS, site="q", **QUICK)
    with pytest.raises(PatchError, match="max_new_tokens=0"):
        patch_blocks(base, tuned, TEXTS, positions=[-1], progress=False)
    with pytest.raises(HyperlensError, match="n_texts"):
        patch_blocks(base, tuned, TEXTS, n_texts=0, **QUICK)
    scaled = GraniteConfig(**SIZES, residual_multiplier=0.5)
    without_branches = AutoModelForCausalLM.from_config(scaled)
    with pytest.raises(
        PatchError, match=r"no hook for attn_out .*: choose resid_pre or resid_post"
    ):
        patch_blocks(without_branches, perturbed(without_branches), TEXTS, site="attn_out", **QUICK)
    with pytest.raises(HyperlensError, match="hooked model"):
        patch_blocks(ResidualModel(base), tuned, TEXTS, **QUICK)


@pytest.mark.parametrize("experiment", [patch_blocks, patch_weights, patch_expansion])
def test_prompts_go_through_in_batches_of_the_size_asked_for(experiment, monkeypatch):
    base = make_tiny("llama")
    sizes = set()
    generate = type(base).generate

    def watched(self, *args, **options):
        sizes.add(len(options["input_ids"] if "input_ids" in options else args[0]))
        return generate(self, *args, **options)

    monkeypatch.setattr(type(base), "generate", watched)
    texts = token_texts(16, shortest=12, longest=20)
    options = {"n_prompts": 4, "prompt_tokens": 6, "max_new_tokens": 2, "progress": False}
    experiment(base, perturbed(base, 0.1), texts, batch_size=3, **options)
    assert sizes == {3, 1}
