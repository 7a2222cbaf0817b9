"""What a weight transplant must say of pairs whose change is known."""

import copy
import math

import pytest
import torch
from conftest import ARCHITECTURES, lora, make_tiny, perturbed, token_texts
from test_hooked_models import padded
from test_patch_hooks import blocks_perturbed, overflowing_together

from hyperlens.errors import ActivationError, HyperlensError, PatchError
from hyperlens.hooks.partial_forward import read, run_patched
from hyperlens.hooks.surface import evaluating, run_logits
from hyperlens.pair import open_pair
from hyperlens.patching import Site
from hyperlens.patching.outcomes import METRICS
from hyperlens.patching.parts import HEAD, last_residual, logits_of, moved, targets
from hyperlens.patching.weights import WeightsResult, close, patch_weights, smallest_suffixes
from hyperlens.render.blocks import Chart, Table, flat
from hyperlens.render.format import PERCENT, interval

INTO_BASE, INTO_TUNED = "tuned into base", "base into tuned"
TOWARDS = {INTO_BASE: "to_tuned", INTO_TUNED: "to_base"}
MODELS = ("base", "tuned")
TEXTS = token_texts(8, shortest=6, longest=16)
# Eight texts that all say the same leave room for a third of others.
ENOUGH = 0.5
SILENT = {"max_new_tokens": 0, "enough": ENOUGH, "progress": False}
SHORT = {"n_prompts": 4, "prompt_tokens": 5, "max_new_tokens": 8, "enough": ENOUGH}
SHORT |= {"progress": False}


def share(found, direction, kind, number=-1):
    (row,) = found.select(direction=direction, kind=kind, number=number, metric=TOWARDS[direction])
    return row["value"]


def both(base, tuned):
    pair = open_pair(base, tuned)
    return targets(pair.base, pair.tuned)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_suffix_is_the_base_state_in_the_tuned_stack(name):
    base, tuned = make_tiny(name), perturbed(make_tiny(name), 0.1)
    sides = both(base, tuned)
    tokens, mask = padded("right")
    target, source = sides[INTO_BASE], sides[INTO_TUNED]
    stream, _ = read(target.model, tokens, mask, [])
    theirs, _ = read(source.model, tokens, mask, [])
    real = mask.bool()
    for k in range(4):
        parts = frozenset(range(3 - k, 3)) | HEAD
        got = logits_of(target, parts, last_residual(target, parts, tokens, mask, stream)[real])
        site = Site("resid_post", 2 - k) if k < 3 else Site("resid_pre", 0)
        entering = stream[3 - k]
        normed = run_patched(source.model, tokens, mask, theirs, site, entering)[real]
        expected = source.model.unembed(normed[:, None])[:, 0]
        cap = source.model.cfg.output_logits_soft_cap
        expected = cap * torch.tanh(expected / cap) if cap else expected
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.transformer_lens
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_hybrid_is_a_whole_pass_of_the_mixed_model(name):
    """What is saved makes no difference: against the mixed model run from its tokens on."""
    sides = both(make_tiny(name), perturbed(make_tiny(name), 0.1))
    tokens, mask = padded("right")
    real = mask.bool()
    for target in sides.values():
        stream, _ = read(target.model, tokens, mask, [])
        for parts in (
            frozenset(),
            HEAD,
            frozenset({1}),
            frozenset({0, 2, "final_norm"}),
            frozenset({"embedding", 1}),
            target.changed,
        ):
            got = logits_of(target, parts, last_residual(target, parts, tokens, mask, stream)[real])
            with moved(target.slots, parts), evaluating(target.model):
                expected = run_logits(target.model, tokens, mask)[real]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert sides[INTO_BASE].changed == sides[INTO_TUNED].changed == {
        *range(3), "embedding", *HEAD
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen2"])
def test_nothing_moved_is_the_target_and_everything_the_source(name):
    base = make_tiny(name)
    found = patch_weights(base, perturbed(base, 0.1), TEXTS, **SILENT)
    assert found.extras["changed"] > 0
    for direction, target, source in (
        (INTO_BASE, "base", "tuned"),
        (INTO_TUNED, "tuned", "base"),
    ):
        for kind, number, model in (("suffix", 0, target), ("all", -1, source)):
            for metric in METRICS:
                (row,) = found.select(direction=direction, kind=kind, number=number, metric=metric)
                (own,) = found.select(direction="unpatched", kind=model, metric=metric)
                # Bit for bit: the same operations on the same numbers.
                assert row["value"] == own["value"], (direction, kind, metric)
    assert found.smallest(INTO_BASE, "suffix")["number"] in (-1, 1, 2, 3)


@pytest.mark.parametrize(
    ("name", "block"), [("llama", 0), ("gpt2", 1), ("gpt_neox", 0), ("gemma2", 2)]
)
def test_a_change_in_one_block_is_found_there(name, block):
    base = make_tiny(name)
    found = patch_weights(base, blocks_perturbed(base, [block], 0.2), TEXTS, **SILENT)
    assert found.extras["changed_parts"] == [str(block)]
    for direction in TOWARDS:
        for k in range(4):
            for kind in ("suffix", "suffix_and_head"):
                assert share(found, direction, kind, k) == float(block >= 3 - k)
        for other in range(3):
            assert share(found, direction, "block", other) == float(other == block)
        for kind in ("embedding", "final_norm", "unembedding"):
            assert share(found, direction, kind) == 0.0
        for kind in ("suffix", "suffix_and_head"):
            assert found.smallest(direction, kind)["number"] == 3 - block
    (alone,) = (v.answer for v in found.verdicts() if v.topic == "one part alone")
    for direction in TOWARDS:
        assert f"{direction}, block {block} has the highest share (100.0%" in alone


def tuned_in(base, part):
    """A copy that differs in its final norm, or in an unembedding that is untied for it."""
    tuned = copy.deepcopy(base)
    torch.manual_seed(3)
    head = tuned.get_output_embeddings()
    if part == "unembedding":
        head.weight = torch.nn.Parameter(head.weight + 0.3 * torch.randn_like(head.weight))
    else:
        norm = tuned.model.norm if hasattr(tuned, "model") else tuned.transformer.ln_f
        norm.weight.data = norm.weight + 2.0 * torch.randn_like(norm.weight)
    return tuned


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("part", ["final_norm", "unembedding"])
def test_a_change_of_norm_or_unembedding_is_found_there(name, part):
    base = make_tiny(name)
    found = patch_weights(base, tuned_in(base, part), TEXTS, **SILENT)
    assert found.extras["changed_parts"] == [part]
    for direction in TOWARDS:
        for kind in ("embedding", "final_norm", "unembedding"):
            assert share(found, direction, kind) == float(kind == part)
        for block in range(3):
            assert share(found, direction, "block", block) == 0.0
        for k in range(4):
            assert share(found, direction, "suffix", k) == 0.0
            assert share(found, direction, "suffix_and_head", k) == 1.0
        assert found.smallest(direction, "suffix")["number"] == -1
        assert found.smallest(direction, "suffix_and_head")["number"] == 0
    answers = [verdict.answer for verdict in found.verdicts()]
    for answer, direction in zip(answers, TOWARDS, strict=False):
        assert answer.startswith(direction.capitalize())
        assert "without final norm and unembedding, no suffix of blocks does anything" in answer
        assert "with final norm and unembedding, no block at all is needed (100.0%" in answer
        assert "lower bound above 50.0% of the changed decisions" in answer
        assert f"{direction}, {part.replace('_', ' ')} has the highest share (100.0%" in answers[2]


def test_too_few_texts_cannot_show_that_no_suffix_suffices():
    base = make_tiny("llama")
    found = patch_weights(base, tuned_in(base, "final_norm"), TEXTS[:8], **SILENT | {"enough": 0.9})
    assert share(found, INTO_BASE, "suffix_and_head", 0) == 1.0
    answer = found.verdicts()[0].answer
    of_both = answer.partition("with final norm and unembedding, ")[2].partition(" To")[0]
    assert "it cannot be told whether a suffix suffices (the most:" in of_both
    assert "100.0%" in of_both
    assert "no suffix" not in of_both


def test_a_tied_table_takes_both_of_its_ends():
    base = make_tiny("qwen2")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        torch.manual_seed(0)
        tuned.lm_head.weight += 0.5 * torch.randn_like(tuned.lm_head.weight)
    assert tuned.lm_head.weight is tuned.model.embed_tokens.weight
    found = patch_weights(base, tuned, TEXTS, **SILENT)
    assert found.extras["changed_parts"] == ["embedding", "unembedding"]
    assert share(found, INTO_BASE, "all") == 1.0
    for direction in TOWARDS:
        assert 0 < share(found, direction, "unembedding") < 1
        assert 0 < share(found, direction, "embedding") < 1


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_equal_models_show_no_effect_at_all(name):
    base = make_tiny(name)
    found = patch_weights(base, copy.deepcopy(base), TEXTS, **SHORT)
    assert found.extras["changed"] == 0
    assert found.extras["changed_parts"] == []
    for row in found.table:
        if row["metric"] in ("to_tuned", "to_base", "logit_difference"):
            assert math.isnan(row["value"])
        if row["metric"].startswith("kl"):
            assert row["value"] == row["high"] == 0.0
        if row["metric"].startswith("agreement"):
            assert row["value"] == 1.0
    assert {row["value"] for row in found.extras["contrasts"]} == {0.0}
    assert {row["p"] for row in found.extras["contrasts"]} == {1.0}
    assert {one["number"] for one in found.extras["smallest"]} == {-1}
    assert "changed no decision" in found.summary()
    assert found.plot().to_dict()


def test_batches_are_invisible_and_texts_are_the_callers():
    base = make_tiny("gemma2")
    tuned = perturbed(base, 0.05)
    held = {key: value.clone() for key, value in base.state_dict().items()}
    one, many = (patch_weights(base, tuned, TEXTS, batch_size=size, **SILENT) for size in (1, 8))
    for a, b in zip(one.table, many.table, strict=True):
        for column, value in a.items():
            expected = b[column]
            if isinstance(value, float):
                expected = pytest.approx(expected, abs=1e-5, nan_ok=True)
            assert value == expected, a
    assert one.extras["smallest"] == many.extras["smallest"]
    for key, value in base.state_dict().items():
        assert torch.equal(value, held[key])


def test_an_adapter_is_merged_and_its_frozen_blocks_stay_out_of_it():
    base = make_tiny("llama")
    adapter = lora(copy.deepcopy(base), "llama", layers_to_transform=[1, 2])
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    found = patch_weights(base, adapter, TEXTS, **SHORT)
    assert found.extras["changed_parts"] == ["1", "2"]
    assert found.smallest(INTO_BASE, "suffix")["number"] == 2
    assert found.smallest(INTO_BASE, "suffix")["by_text"] in (True, False)
    assert "the adapter was merged" in " ".join(found.summary().split())
    assert "left these parts as they were: block 0, embedding" in " ".join(found.summary().split())
    for key, value in adapter.state_dict().items():
        assert torch.equal(value, before[key])


def test_text_is_that_of_the_mixed_model():
    base = make_tiny("llama")
    tuned = blocks_perturbed(base, [2], 0.5)
    found = patch_weights(base, tuned, TEXTS, **SHORT)
    for metric in ("ttr", "rep_2", "rep_3"):
        own = {
            name: found.select(direction="unpatched", kind=name, metric=metric)[0]["value"]
            for name in ("base", "tuned")
        }
        for row in found.select(direction=INTO_BASE, kind="suffix", metric=metric):
            assert row["value"] == own["tuned" if row["number"] else "base"]
        for row in found.select(direction=INTO_TUNED, kind="block", metric=metric):
            assert row["value"] == own["base" if row["number"] == 2 else "tuned"]
        assert own["base"] != own["tuned"], "the two must differ for this test"
    differences = [c for c in found.extras["contrasts"] if c["against"] == "source"]
    for difference in differences:
        if (
            difference["direction"] == INTO_BASE
            and difference["kind"] == "suffix"
            and difference["number"]
        ):
            assert difference["value"] == 0


def row_of(number, low, **more):
    return {"direction": INTO_BASE, "kind": "suffix", "number": number, "metric": "to_tuned",
            "value": low, "low": low, "high": 1.0} | more  # fmt: skip


def test_the_smallest_suffix_follows_its_rule():
    table = [row_of(k, low) for k, low in enumerate((0.0, 0.5, 0.91, 0.95, 1.0))]
    (found,) = [s for s in smallest_suffixes(table, [], 0.9) if s[:2] == (INTO_BASE, "suffix")]
    assert (found.number, found.by_text) == (2, False)
    assert next(smallest_suffixes(table[:2], [], 0.9)).number == -1
    change = row_of(-1, 0.2, kind="source", metric="ttr", against="target", value=0.4, high=0.6)
    differences = [
        row_of(k, low, metric="ttr", against="source", high=high)
        for k, (low, high) in enumerate(
            ((-0.5, -0.3), (-0.1, 0.1), (-0.3, 0.1), (0.01, 0.05), (-0.1, 0.15))
        )
    ]
    # Of those with enough decisions: 2 may lie further than half the change, 3 differs.
    assert next(smallest_suffixes(table, [change, *differences], 0.9))[2:] == (4, True)
    assert close(differences[1], 0.2)
    unclear = change | {"low": -0.1}
    assert next(smallest_suffixes(table, [unclear, *differences], 0.9))[2:] == (2, False)
    nan = [row_of(1, math.nan)]
    assert next(smallest_suffixes(nan, [], 0.9)).number == -1


def test_refusals_say_what_to_do():
    base = make_tiny("llama")
    with pytest.raises(PatchError, match="enough is a share"):
        patch_weights(base, base, TEXTS, **SILENT | {"enough": 1.0})
    with pytest.raises(HyperlensError, match="n_texts"):
        patch_weights(base, base, TEXTS, n_texts=0, **SILENT)
    with pytest.raises(HyperlensError, match="lower max_new_tokens"):
        patch_weights(base, base, TEXTS, max_new_tokens=99, progress=False)
    with pytest.raises(PatchError, match="one architecture"):
        patch_weights(base, make_tiny("qwen3"), TEXTS, **SILENT)


def test_other_configurations_are_noticed():
    base, tuned = make_tiny("llama"), make_tiny("llama", rms_norm_eps=0.5)
    tuned.load_state_dict(perturbed(base, 0.05).state_dict())
    found = patch_weights(base, tuned, TEXTS, **SILENT)
    assert "differ in more than their weights" in " ".join(found.summary().split())


def test_it_comes_back_from_its_folder_and_has_a_section(tmp_path):
    base = make_tiny("llama")
    found = patch_weights(base, perturbed(base, 0.1), TEXTS, **SHORT)
    folder = found.save(tmp_path / "out")
    assert WeightsResult.load(folder) == found
    page = (folder / "report.html").read_text()
    assert 'data-section="patch_weights"' in page
    assert "Which weights are needed?" in page
    # The same numbers everywhere.
    every = found.at(direction=INTO_BASE, kind="suffix_and_head", number=3, metric="to_tuned")
    for shown in (page, found.summary(), found._repr_html_()):
        assert interval(every, PERCENT) in shown
    assert all(len(line) <= 105 for line in found.summary().splitlines())
    assert found.plot().to_dict()


def test_tables_and_charts_have_every_suffix_and_part():
    base = make_tiny("llama")
    found = patch_weights(base, perturbed(base, 0.1), TEXTS, **SHORT)
    into_base, into_tuned, parts = (b for b in found.evidence() if isinstance(b, Table))
    for table, direction in ((into_base, INTO_BASE), (into_tuned, INTO_TUNED)):
        assert table.caption.startswith(direction)
        assert [row[0] for row in table.rows] == ["0", "1", "2", "3"]
    assert [row[0] for row in parts.rows] == [
        *("embedding", "final norm", "unembedding", "all weights")
    ]
    charts = [block for block in flat(found.evidence()) if isinstance(block, Chart)]
    assert [chart.kind for chart in charts] == ["lines", "lines", "dots", "lines", "lines"]
    for chart in charts:
        assert "share" in (chart.x.scale, chart.y.scale)
        assert all(0 <= row["value"] <= 1 for row in chart.rows)
    decisions, _, alone, text, _ = charts
    assert [row["number"] for row in decisions.rows] == [0, 1, 2, 3] * 2
    (enough,) = decisions.references
    assert enough.value == ENOUGH
    assert len(alone.rows) == 2 * 6
    own = [found.value(direction="unpatched", kind=side, metric="ttr") for side in MODELS]
    assert [line.value for line in text.references] == own


def test_a_mixed_model_that_overflows_is_refused():
    with pytest.raises(ActivationError, match=r"mixed model \(tuned into base, parts 0\) has NaN"):
        patch_weights(*overflowing_together(), TEXTS, **SILENT)


def test_too_few_texts_for_a_strict_bound_are_said():
    base = make_tiny("llama")
    found = patch_weights(base, blocks_perturbed(base, [1], 0.2), TEXTS, **SILENT | {"enough": 0.9})
    assert found.smallest(INTO_BASE, "suffix")["number"] == -1
    # 1 - 0.05^(1/8) of all texts could be otherwise.
    assert "Of 8 texts no more could be shown than 68.8%" in found.verdicts()[0].answer
