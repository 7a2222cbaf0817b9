"""What an expansion's result says, writes, saves and refuses."""

import copy
import json
import re

import pytest
import torch
from conftest import lora, make_tiny, perturbed, token_texts
from test_patch_expansion import TEXTS, rescaled

from hyperlens.errors import ActivationError, CorpusError, PatchError
from hyperlens.pair import open_inputs
from hyperlens.patching.engine import draw_texts, second_half, subset
from hyperlens.patching.expansion.changes import BY_DIRECTIONS, METHODS, VARIANCE_CONTROL
from hyperlens.patching.expansion.experiment import patch_expansion
from hyperlens.patching.expansion.result import COUNTED, NAMES, ExpansionResult
from hyperlens.questions import QUESTIONS, result_class
from hyperlens.render.page import write_report
from hyperlens.statistics.ratios import p_value
from hyperlens.statistics.significance import Estimate, holm

WRITING = {"n_prompts": 5, "prompt_tokens": 6, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def found():
    base = make_tiny("llama")
    return patch_expansion(
        base, rescaled(base, 0.35), TEXTS, n_directions=[2, 4, 8, 16], n_random=2, progress=False,
        **WRITING,
    )  # fmt: skip


def test_what_is_written_follows_the_changes(found):
    """Planted: with the base's spectrum the tuned model writes as the base does, and back."""
    for metric in ("ttr", "rep_2", "rep_3"):
        own = {side: found.row("none", 0, side, metric) for side in ("base", "tuned")}
        for method, side in (("base_spectrum", "base"), ("tuned_spectrum", "tuned")):
            row = found.row(method, 0, "itself", metric)
            assert [row[k] for k in ("value", "low", "high")] == [
                own[side][k] for k in ("value", "low", "high")
            ]
    assert found.value_of("none", 0, "base", "ttr") != found.value_of("none", 0, "tuned", "ttr")
    written = {(r["method"], r["condition"]) for r in found.table if r["metric"] == "ttr"}
    assert written == {("none", "base"), ("none", "tuned")} | {
        (method, condition)
        for method in NAMES
        for condition in ("itself", VARIANCE_CONTROL[method])
    }
    sizes = {r["n_directions"] for r in found.select(method="new_directions", metric="ttr")}
    assert len(sizes) == 3
    assert found.judged("new_directions") in sizes


def test_contrasts_are_paired_and_corrected(found):
    for method in NAMES:
        control = VARIANCE_CONTROL[method]
        for metric in ("to_tuned", "to_base"):
            rows = [
                c for c in found.extras["contrasts"]
                if (c["method"], c["against"], c["metric"]) == (method, control, metric)
            ]  # fmt: skip
            assert [row["n_directions"] for row in rows] == found.sizes(method)
            for row in rows:
                values = [
                    found.value_of(method, row["n_directions"], a, metric)
                    for a in ("itself", control)
                ]
                assert row["value"] == pytest.approx(values[0] - values[1], abs=1e-12)
            alone = [p_value(Estimate(*(row[key] for key in Estimate._fields))) for row in rows]
            assert [row["p"] for row in rows] == pytest.approx(holm(alone))


def test_controls_are_means_over_their_draws(found):
    draws = [d for d in found.extras["draws"] if d["method"] == "tuned_spectrum"]
    assert [d["draw"] for d in draws] == [0, 1]
    mean = sum(d["to_tuned"] for d in draws) / 2
    assert found.value_of("tuned_spectrum", 0, "shuffled_gains", "to_tuned") == pytest.approx(mean)


def test_a_change_that_overflows_is_refused():
    """In float16: a large mean, about which one axis is to spread sixty times as far."""
    base = make_tiny("gpt2").half()
    with torch.no_grad():
        base.transformer.h[-1].mlp.c_proj.weight[:, 0] *= 500
        tuned = copy.deepcopy(base)
        base.transformer.h[-1].mlp.c_proj.bias[0] = 60_000
        tuned.transformer.h[-1].mlp.c_proj.weight[:, 0] *= 60
    with pytest.raises(ActivationError, match=r"the base model \(tuned_spectrum, itself\) has NaN"):
        patch_expansion(
            base, tuned, TEXTS, n_directions=[4], n_random=1, max_new_tokens=0, progress=False
        )


def test_the_names_are_those_of_the_experiment():
    assert tuple(NAMES) == METHODS
    assert tuple(COUNTED) == BY_DIRECTIONS
    assert ExpansionResult in map(result_class, QUESTIONS)


def test_the_summary_says_what_the_verdict_rests_on(found):
    text = " ".join(found.summary().split())
    assert "SUPPORTS that the expansion causes the reordering" in text
    assert "That it is needed: supported" in text
    assert "directions fitted on 24 texts, decisions read on 24 others" in text
    assert "A claim is supported if one method supports it" in text
    assert "smallest effect 0.1" in text
    assert all(len(line) <= 105 for line in found.summary().splitlines())
    assert f"{found.judged('base_directions')}*" in found.summary()


def test_a_result_returns_from_its_folder(found, tmp_path):
    found.save(tmp_path / "out")
    again = ExpansionResult.load(tmp_path / "out")
    assert again.summary() == found.summary()
    assert again.to_frame().equals(found.to_frame())
    assert (
        json.loads((tmp_path / "out" / "patch_expansion.json").read_text())["name"]
        == "patch_expansion"
    )
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Is it the extra dimensions?" in page
    assert "SUPPORTS" in page


def test_two_pairs_on_one_page(found, tmp_path):
    other = copy.copy(found)
    object.__setattr__(other, "meta", found.meta | {"base": {"name": "<b>other"}})
    page = write_report(tmp_path / "r.html", [found, other]).read_text(encoding="utf-8")
    assert "&lt;b&gt;other → LlamaForCausalLM" in page
    assert "<b>other" not in page


def test_the_figure_has_a_panel_per_question(found):
    figure = found.plot()
    assert len(figure.axes) == 3
    assert "dimension" in figure.axes[0].get_xlabel()


def test_an_adapter_without_text_written():
    base = make_tiny("llama")
    adapted = lora(copy.deepcopy(base), "llama")
    found = patch_expansion(
        base, adapted, TEXTS, n_directions=[4], n_random=1, max_new_tokens=0, progress=False
    )
    assert found.row("none", 0, "base", "ttr") is None
    assert len(found.plot().axes) == 2
    assert re.search("(CONTRADICTS|SUPPORTS|CANNOT TELL)", found.summary())


def test_seeds_choose_halves_and_draws():
    base = make_tiny("llama")
    tuned = perturbed(base, 0.1)
    same, again, other = (
        patch_expansion(base, tuned, TEXTS, n_directions=[4], n_random=1, max_new_tokens=0,
                        seed=seed, progress=False).to_frame()
        for seed in (3, 3, 4)
    )  # fmt: skip
    assert same.equals(again)
    assert not same.equals(other)


def test_halves_and_draws_of_texts():
    base = make_tiny("llama")
    opened = open_inputs(base, base, TEXTS, max_length=64)
    fewer = draw_texts(opened, 10, 5)
    assert len(fewer.corpus.sequences) == fewer.corpus.counts.n_sequences == 10
    assert fewer.corpus.counts.n_tokens == sum(map(len, fewer.corpus.sequences))
    assert fewer.corpus.counts.n_bos == 10
    assert "10 of 48 texts were drawn" in fewer.notes[-1]
    assert draw_texts(opened, 48, 5) is opened
    half = second_half(fewer.corpus, 0)
    assert int(half.sum()) == 5
    first, second = subset(fewer.corpus, ~half), subset(fewer.corpus, half)
    together = [*first.sequences, *second.sequences]
    assert sorted(s.tobytes() for s in together) == sorted(
        s.tobytes() for s in fewer.corpus.sequences
    )


def test_refusals_are_one_line():
    base = make_tiny("llama")
    options = {"max_new_tokens": 0, "progress": False}
    for texts, message in (
        (token_texts(3), "expected at least 4 texts"),
        (token_texts(4, longest=6), r"covariance of 32 directions needs 64 at least"),
    ):
        with pytest.raises(CorpusError, match=message) as error:
            patch_expansion(base, base, texts, **options)
        assert "\n" not in str(error.value)
    for wrong, message in (
        ({"n_directions": [0]}, r"n_directions\[0\] must be at least 1"),
        ({"n_random": 0}, "n_random must be at least 1"),
    ):
        with pytest.raises(CorpusError, match=message):
            patch_expansion(base, base, TEXTS, **options, **wrong)
    for wrong in ({"n_directions": []}, {"smallest_effect": 0.0}, {"smallest_effect": 2.0}):
        with pytest.raises(PatchError, match="expected"):
            patch_expansion(base, base, TEXTS, **options, **wrong)


def test_few_tokens_are_said():
    base = make_tiny("llama")
    found = patch_expansion(
        base, perturbed(base, 0.1), TEXTS[:20], n_directions=[4], n_random=1, max_new_tokens=0,
        progress=False,
    )  # fmt: skip
    assert any("steeper than they are" in note for note in found.meta["notes"])
