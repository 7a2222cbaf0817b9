"""What an expansion's result says, writes, saves and refuses."""

import copy
import json
import re

import pytest
import torch
from conftest import lora, make_tiny, perturbed, token_texts
from test_patch_expansion import TEXTS, row_of, value_of

from hyperlens.errors import ActivationError, CorpusError, PatchError
from hyperlens.pair import open_inputs
from hyperlens.patching.engine import draw_texts, second_half, subset
from hyperlens.patching.expansion import ExpansionResult, patch_expansion
from hyperlens.patching.expansion.changes import BY_DIRECTIONS, METHODS, VARIANCE_CONTROL, side_of
from hyperlens.patching.expansion.result import CONDITIONS, NAMES, SHORT
from hyperlens.questions import QUESTIONS, result_class
from hyperlens.render.blocks import Chart, Details, Table, flat
from hyperlens.render.format import DIMENSIONS, PERCENT, POINTS, interval
from hyperlens.render.page import write_report
from hyperlens.statistics.shares import p_value
from hyperlens.statistics.significance import Estimate, holm
from hyperlens.validation.constructions import stretched

WRITING = {"n_prompts": 5, "prompt_tokens": 6, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def found():
    base = make_tiny("llama")
    return patch_expansion(
        base, stretched(base, TEXTS, 0.35), TEXTS, n_directions=[2, 4, 8, 16], n_random=2,
        progress=False, **WRITING,
    )  # fmt: skip


def test_what_is_written_follows_the_changes(found):
    """Planted: with the base's spectrum the tuned model writes as the base does, and back."""
    for metric in ("ttr", "rep_2", "rep_3"):
        own = {side: row_of(found, "none", 0, side, metric) for side in ("base", "tuned")}
        for method, side in (("base_spectrum", "base"), ("tuned_spectrum", "tuned")):
            row = row_of(found, method, 0, "itself", metric)
            assert [row[k] for k in ("value", "low", "high")] == [
                own[side][k] for k in ("value", "low", "high")
            ]
    assert value_of(found, "none", 0, "base", "ttr") != value_of(found, "none", 0, "tuned", "ttr")
    written = {(r["method"], r["condition"]) for r in found.table if r["metric"] == "ttr"}
    assert written == {("none", "base"), ("none", "tuned")} | {
        (method, condition)
        for method in NAMES
        if method != "tuned_coordinates"
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
            sizes = found.sizes(method)
            # All coordinates at once are the tuned model's output, which has no control.
            sizes = [found.judged(method)] if method == "tuned_coordinates" else sizes
            assert [row["n_directions"] for row in rows] == sizes
            for row in rows:
                values = [
                    value_of(found, method, row["n_directions"], a, metric)
                    for a in ("itself", control)
                ]
                assert row["value"] == pytest.approx(values[0] - values[1], abs=1e-12)
            alone = [p_value(Estimate(*(row[key] for key in Estimate._fields))) for row in rows]
            assert [row["p"] for row in rows] == pytest.approx(holm(alone))


def test_controls_are_means_over_their_draws(found):
    draws = [d for d in found.extras["draws"] if d["method"] == "tuned_spectrum"]
    assert [d["draw"] for d in draws] == [0, 1]
    mean = sum(d["to_tuned"] for d in draws) / 2
    assert value_of(found, "tuned_spectrum", 0, "shuffled_gains", "to_tuned") == pytest.approx(mean)


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
    assert tuple(NAMES) == tuple(SHORT) == METHODS
    assert {"itself", *VARIANCE_CONTROL.values()} < set(CONDITIONS)
    assert ExpansionResult in map(result_class, QUESTIONS)


def test_the_summary_says_what_the_verdict_rests_on(found):
    text = " ".join(found.summary().split())
    change = found.extras["dimension"]["delta"]
    assert "Supported: that the expansion causes the reordering. There is an expansion" in text
    assert f"the tuned model's change is {interval(change, DIMENSIONS)}" in text
    assert "needed: supported, enough: supported." in text
    assert "supported, an effect's lower bound is above 10.0 points" in text
    assert "Directions fitted on 24 texts, decisions read on 24 others" in text
    assert "! Directions were fitted on some texts and decisions read on others" in text
    assert all(len(line) <= 105 for line in found.summary().splitlines())
    # What decides each claim, with its interval.
    for claim, metric in (("Needed?", "to_base"), ("Enough?", "to_tuned")):
        (verdict,) = (v for v in found.verdicts() if v.answer.startswith(claim))
        method = next(method for method in NAMES if NAMES[method] in verdict.answer)
        effects = found.extras["evidence"][method]["effects"]
        assert any(interval(effect, POINTS) in verdict.answer for effect in effects.values())
        judged = found.judged(method), VARIANCE_CONTROL[method], metric
        assert PERCENT(value_of(found, method, *judged)) in verdict.answer


def test_every_change_stands_in_a_table_beside_its_controls(found):
    folded = [block for block in found.evidence() if isinstance(block, Details)]
    *tables, rules = folded
    for method, details in zip((*METHODS, "single_direction"), tables, strict=True):
        (table,) = details.blocks
        assert len(table.rows) == len(found.rows(method=method, metric="to_tuned"))
        if method != "tuned_coordinates":
            conditions = {r["condition"] for r in found.rows(method=method, metric="to_tuned")}
            assert len(table.rows) == len(found.sizes(method)) * len(conditions)
        marked = {row[0] for row in table.rows if row[0].endswith("*")}
        assert marked == ({f"{found.judged(method)}*"} if method in BY_DIRECTIONS else set())
    (rules,) = rules.blocks
    assert "A claim is supported if all changes that count support it" in rules.text
    assert "Smallest effect of interest: 10.0 points" in rules.text


def test_effects_stand_in_tables_with_their_answers(found):
    needed, enough = (block for block in found.evidence() if isinstance(block, Table))
    for table in (needed, enough):
        assert all(len(row) == len(table.head) == 6 for row in table.rows)
    cells = {row[0]: row for row in enough.rows}["tuned spectrum: brought"]
    own = value_of(found, "tuned_spectrum", 0, "itself", "to_tuned")
    assert cells[2] == PERCENT(own)
    assert cells[-1] == found.extras["verdict"]["methods"]["tuned_spectrum"] == "supported"


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
    assert "Supported: that the expansion causes the reordering" in page
    change = found.extras["dimension"]["delta"]
    shown = interval(change, DIMENSIONS)
    assert shown in page
    assert shown in found._repr_html_()
    assert shown in found.summary().replace("\n  ", " ")


def test_a_result_of_an_earlier_version_says_that_its_rules_were_others(found, tmp_path):
    """As version 0.2 left it: fewer methods, all of which were judged, and nothing of reading."""
    new = ("expanding_directions", "tuned_coordinates", "single_direction", "affine_map")
    extras = {name: value for name, value in found.extras.items() if name != "read_by_head"}
    extras["matched"] = {k: v for k, v in extras["matched"].items() if k not in new}
    extras["evidence"] = {k: v for k, v in extras["evidence"].items() if k not in new}
    old = found.extras["verdict"]
    methods = dict.fromkeys(extras["evidence"], "supported")
    extras["verdict"] = {k: old[k] for k in ("overall", "expansion", "needed", "enough")}
    extras["verdict"]["methods"] = methods
    table = tuple(row for row in found.table if row["method"] not in new)
    ExpansionResult(table, extras, found.meta).save(tmp_path / "old")
    again = ExpansionResult.load(tmp_path / "old")
    assert "Supported: that the expansion causes" in again.summary()
    assert "Judged by the rules of an earlier version" in " ".join(again.summary().split())
    assert "earlier version" not in found.summary()
    assert len(charts(again)) == 3
    assert again._repr_html_()


def test_two_pairs_on_one_page(found, tmp_path):
    other = copy.copy(found)
    object.__setattr__(other, "meta", found.meta | {"base": {"name": "<b>other"}})
    page = write_report(tmp_path / "r.html", [found, other]).read_text(encoding="utf-8")
    assert "&lt;b&gt;other → LlamaForCausalLM" in page
    assert "<b>other" not in page


def charts(found):
    return [block for block in flat(found.evidence()) if isinstance(block, Chart)]


def test_charts_have_every_change_and_its_control(found):
    taken, given, text = charts(found)
    assert found.plot().to_dict()
    for chart, side in ((taken, "tuned"), (given, "base")):
        methods = [method for method in METHODS if side_of(method) == side]
        sizes = sum(len(found.sizes(method)) for method in methods)
        # All of the tuned model's coordinates are its own output, which has no control.
        assert len(chart.rows) == 2 * sizes - (side == "base")
        assert len({row["change"] for row in chart.rows}) == sizes
    for chart in (taken, given, text):
        assert chart.x.scale == "share"
        assert all(0 <= row["value"] <= 1 for row in chart.rows)
    own, control = given.rows[:2]
    assert own["value"] == value_of(found, "tuned_spectrum", 0, "itself", "to_tuned")
    assert control["value"] == value_of(found, "tuned_spectrum", 0, "shuffled_gains", "to_tuned")
    assert given.roles[control["series"]] == "control"


def test_an_adapter_without_text_written():
    base = make_tiny("llama")
    adapted = lora(copy.deepcopy(base), "llama")
    found = patch_expansion(
        base, adapted, TEXTS, n_directions=[4], n_random=1, max_new_tokens=0, progress=False
    )
    assert not found.rows(metric="ttr")
    assert len(charts(found)) == 2
    assert found.plot().to_dict()
    assert re.match("(Contradicted|Supported|Cannot tell)", found.conclusions()[0])


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
