"""Controls change as much as tuning did and nothing else; the tuned model stands beside them."""

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, lora, make_tiny, perturbed, short, token_texts
from hypothesis import given
from hypothesis import strategies as st

from hyperlens import compare_models, open_pair, run_null_test, write_report
from hyperlens.errors import HyperlensError, PairError
from hyperlens.experiments import NullTestResult
from hyperlens.experiments.null_test import (
    CONTROLS,
    RESCALED,
    changed_tensors,
    randomly_changed,
    rank_p,
    share_of_change,
)
from hyperlens.render.blocks import Chart, Table, flat
from hyperlens.render.charts import colours

SHUFFLES = ("rows_and_columns", "entries")
PLAIN = tuple(kind for kind in CONTROLS if not kind.endswith(RESCALED))
TEXTS = token_texts(10, shortest=8, longest=20)
SHORT = {"prompt_tokens": 6, "max_new_tokens": 6, "n_prompts": 4, "progress": False}


@pytest.mark.parametrize(
    ("name", "shuffle"),
    short(
        list(itertools.product(ARCHITECTURES, SHUFFLES)),
        *(("gpt2", "rows_and_columns"), ("qwen2", "entries"), ("gpt_neox", "rows_and_columns")),
    ),
)
def test_a_control_keeps_the_norm_and_the_values_of_every_change(name: str, shuffle: str) -> None:
    base = make_tiny(name)
    tuned = perturbed(base, 0.1)
    before = copy.deepcopy(base.state_dict())
    changes = changed_tensors(base, tuned)
    assert changes.keys() == dict(base.named_parameters()).keys()
    made = randomly_changed(base, changes, 3, shuffle)
    for key, old in before.items():
        assert torch.equal(base.state_dict()[key], old), key
    for key, parameter in made.named_parameters():
        change = (parameter.detach() - before[key]).flatten()
        assert torch.allclose(change.sort().values, changes[key].flatten().sort().values, atol=1e-6)
        if change.numel() > 8:
            assert not torch.allclose(change, changes[key].flatten())
    again, other = (
        randomly_changed(base, changes, 3, shuffle),
        randomly_changed(base, changes, 4, shuffle),
    )
    for a, b, c in zip(made.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.numel() < 8 or not torch.equal(a, c)


def test_rows_and_columns_keep_the_spectrum_and_entries_do_not() -> None:
    base = make_tiny("qwen2")
    tuned = copy.deepcopy(base)
    block, table = tuned.model.layers[1], tuned.model.embed_tokens
    with torch.no_grad():
        block.mlp.up_proj.weight += torch.randn(48, 2) @ torch.randn(2, 32)
        table.weight[5:9] += 1 + torch.rand(4, 32)
    changes = changed_tensors(base, tuned)
    made = {
        shuffle: changed_tensors(base, randomly_changed(base, changes, 0, shuffle))
        for shuffle in SHUFFLES
    }
    for name in changes:
        spectrum = torch.linalg.svdvals(changes[name])
        kept, lost = (torch.linalg.svdvals(made[shuffle][name]) for shuffle in SHUFFLES)
        assert torch.allclose(kept, spectrum, atol=1e-4)
        assert lost[4] > 0.1 > spectrum[4]
    # The change of an embedding stays with its tokens.
    (rows,) = made["rows_and_columns"]["model.embed_tokens.weight"].any(-1).nonzero(as_tuple=True)
    assert rows.tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("kind", PLAIN)
def test_a_control_has_the_norm_of_every_change_times_its_factor(kind: str) -> None:
    base = make_tiny("gpt2")
    changes = changed_tensors(base, perturbed(base, 0.1))
    made = changed_tensors(base, randomly_changed(base, changes, 1, kind, factor=2.5))
    for name, change in changes.items():
        assert made[name].norm() == pytest.approx(2.5 * float(change.norm()), rel=1e-3), name


def test_rotations_keep_the_spectrum_and_not_the_entries() -> None:
    base = make_tiny("qwen2")
    changes = changed_tensors(base, perturbed(base, 0.1))
    name = "model.layers.1.mlp.up_proj.weight"
    made = changed_tensors(base, randomly_changed(base, changes, 0, "rotations"))[name]
    spectrum, kept = (torch.linalg.svdvals(one) for one in (changes[name], made))
    assert torch.allclose(kept, spectrum, atol=1e-4)
    entries = changes[name].flatten().sort().values
    assert not torch.allclose(made.flatten().sort().values, entries, atol=1e-2)


@pytest.mark.parametrize("seed", [0, 1])
def test_rescaled_controls_move_the_stream_as_far(seed: int) -> None:
    base = make_tiny("llama")
    tuned = perturbed(base, 0.3)
    kinds = ["rows_and_columns_rescaled", "entries_rescaled"]
    found = run_null_test(base, tuned, TEXTS, controls=kinds, n_controls=2, seed=seed, **SHORT)
    assert found.controls == kinds
    for kind in kinds:
        row = found.last("relative_l2", "raw", kind)
        assert row is not None
        for end in ("control_low", "control_high"):
            assert row[end] == pytest.approx(row["tuned"], rel=0.025)
        assert len(found.extras["factors"][kind]) == 2


@given(st.lists(st.floats(-50, 50, width=16), min_size=1, max_size=12))
def test_ranks_of_all_models_are_a_permutation_tests(values: list[float]) -> None:
    """Over all choices of the tuned model, p at or below any level comes as often as it says."""
    ps = [rank_p(x, values[:i] + values[i + 1 :]) for i, x in enumerate(values)]
    for p in ps:
        assert sum(q <= p + 1e-9 for q in ps) / len(ps) <= p + 1e-9
    assert min(ps) >= 1 / len(values) - 1e-9


def test_what_did_not_change_is_shared_with_the_base() -> None:
    base = make_tiny("llama")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight += 0.1
    made = randomly_changed(base, changed_tensors(base, tuned), seed=0)
    shared = {
        name
        for (name, a), b in zip(made.named_parameters(), base.parameters(), strict=True)
        if a.data_ptr() == b.data_ptr()
    }
    changed = "model.layers.1.mlp.down_proj.weight"
    assert shared == {name for name, _ in base.named_parameters()} - {changed}


def test_tied_weights_stay_tied() -> None:
    base = make_tiny("qwen2")
    made = randomly_changed(base, changed_tensors(base, perturbed(base)), seed=0)
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_the_tuned_column_is_what_compare_models_says() -> None:
    base = make_tiny("llama")
    tuned = perturbed(base, 0.2)
    found = run_null_test(base, tuned, TEXTS, n_controls=2, batch_size=8, **SHORT)
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
            assert row["control_low"] <= row["control_mean"] <= row["control_high"]


@pytest.mark.long  # by default the nulls of `validate` ask the same
def test_a_random_change_is_not_beyond_other_random_changes() -> None:
    """The tuned model is itself a random change: it must look like a control on the whole."""
    base = make_tiny("llama")
    few = SHORT | {"n_prompts": 1, "max_new_tokens": 1}
    inside = 0
    for seed in range(4):
        tuned = perturbed(base, 0.1, seed=10 + seed)
        kind = ["rows_and_columns"]
        found = run_null_test(
            base, tuned, TEXTS[:6], controls=kind, n_controls=7, seed=100 * seed, **few
        )
        (row,) = found.select(metric="relative_l2", view="raw", layer=3)
        inside += row["control_low"] <= row["tuned"] <= row["control_high"]
    # Of 8 exchangeable numbers one is the greatest or least with probability 1/4.
    assert inside >= 1


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_change_with_structure_is_beyond_them(shuffle: str) -> None:
    base = make_tiny("llama")
    tuned = copy.deepcopy(base)
    # What the last MLP reads most: a change that answers to it moves far more than one of that
    # norm and rank that answers to anything else.
    read: list[torch.Tensor] = []
    down = base.model.layers[2].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        base(torch.tensor([text for text in TEXTS if len(text) == len(TEXTS[0])]))
        hook.remove()
        along = torch.linalg.svd(read[0], full_matrices=False).Vh[0]
        tuned.model.layers[2].mlp.down_proj.weight += 5 * torch.randn(32, 1) * along
    found = run_null_test(base, tuned, TEXTS, n_controls=3, controls=[shuffle], **SHORT)
    least, greatest = found.share_of_change("relative_l2", "raw")
    assert 0 < least <= greatest < 1
    rows = found.select(metric="relative_l2", view="raw")
    assert [row["tuned"] for row in rows if row["layer"] < 3] == [0, 0, 0]
    assert [row["control_high"] for row in rows if row["layer"] < 3] == [0, 0, 0]


def test_an_adapter_is_merged_and_left_alone() -> None:
    base = make_tiny("gpt2")
    adapter = lora(copy.deepcopy(base), "gpt2")
    before = copy.deepcopy(adapter.state_dict())
    found = run_null_test(base, adapter, TEXTS, n_controls=1, **SHORT)
    assert found.extras["changed_tensors"] == 3 * 4
    assert all(torch.equal(adapter.state_dict()[key], old) for key, old in before.items())


def test_refusals_say_what_to_do() -> None:
    base = make_tiny("llama")
    with pytest.raises(PairError, match="no change to compare"):
        run_null_test(base, base, TEXTS, **SHORT)
    with pytest.raises(HyperlensError, match="n_controls"):
        run_null_test(base, perturbed(base), TEXTS, n_controls=0, **SHORT)
    with pytest.raises(HyperlensError, match="controls must be one of rows_and_columns, rotations"):
        run_null_test(base, perturbed(base), TEXTS, controls=["all"], **SHORT)
    with pytest.raises(HyperlensError, match="controls is empty"):
        run_null_test(base, perturbed(base), TEXTS, controls=[], **SHORT)


def test_an_open_pair_gives_the_same() -> None:
    base = make_tiny("llama")
    tuned = perturbed(base)
    found = run_null_test(open_pair(base, tuned), TEXTS, n_controls=1, **SHORT)
    assert found.table == run_null_test(base, tuned, TEXTS, n_controls=1, **SHORT).table


def test_the_same_seed_gives_the_same_and_it_comes_back(tmp_path: Path) -> None:
    base = make_tiny("mistral")
    tuned = perturbed(base)
    first, again = (run_null_test(base, tuned, TEXTS, n_controls=2, **SHORT) for _ in range(2))
    assert first == again
    folder = first.save(tmp_path / "out")
    assert NullTestResult.load(folder) == first


def made(ttr: float, low: float, high: float, dimension: float = 5.0) -> NullTestResult:
    """A result whose base has the TTR 0.4 and repeats 0.3 of its bigrams."""
    ranges = {
        ("ttr", "greedy text"): (ttr, low, high),
        ("rep_2", "greedy text"): (0.1, 0.2, 0.25),
        ("top1_agreement", "final_norm"): (0.2, 0.5, 0.6),
        ("delta", "raw"): (dimension, 6.0, 8.0),
    }
    table = tuple(
        {
            "metric": metric, "layer": 3, "view": view, "control": "entries", "tuned": tuned,
            "control_mean": least, "control_low": least, "control_high": greatest,
            "n_controls": 3, "p": math.nan,
        }
        for (metric, view), (tuned, least, greatest) in ranges.items()
    )  # fmt: skip
    extras = {"base": {"ttr": 0.4, "rep_2": 0.3}, "changed_tensors": 9, "control_seeds": [0, 1, 2]}
    sides = {side: {"name": side} for side in ("base", "tuned")}
    return NullTestResult(table, extras, {"n_layers": 3, **sides})


@pytest.mark.parametrize(
    ("ttr", "low", "high", "said"),
    [
        (0.8, 0.5, 0.6, "give 25.0% to 50.0% of the gain in greedy TTR, 0.500 to 0.600. The tuned "
         "model has 0.800, the base 0.400."),
        (0.8, 0.3, 0.6, "give at most 50.0% of the gain in greedy TTR"),
        (0.8, 0.3, 0.4, "give none of the gain in greedy TTR"),
        (0.8, 0.7, 0.9, "give as much of the gain in greedy TTR as tuning (75.0% to 125.0%)"),
        (0.6, 0.7, 0.8, "give more than the whole gain in greedy TTR (150.0% to 200.0%)"),
        (0.2, 0.3, 0.35, "give 25.0% to 50.0% of the drop in greedy TTR"),
        (0.8, 0.6, 0.6, "give 50.0% of the gain in greedy TTR, 0.600. The tuned"),
        (0.4, 0.5, 0.6, "Tuning does not change greedy TTR (0.400); random changes of the same "
         "size (entries shuffled) reach 0.500 to 0.600."),
        (math.nan, 0.5, 0.6, "cannot be told"),
    ],
)  # fmt: skip
def test_the_first_verdict_says_where_the_tuned_text_lies(
    ttr: float, low: float, high: float, said: str
) -> None:
    result = made(ttr, low, high)
    first, second, *_ = result.verdicts()
    assert said in first.answer
    assert "50.0% of the drop in greedy repeated bigrams" in second.answer
    assert "the base 0.300" in second.answer


def test_random_changes_that_do_more_are_said_to() -> None:
    (dimension,) = (v for v in made(0.8, 0.5, 0.6).verdicts() if v.topic == "dimension")
    assert "more than the whole gain" in dimension.answer
    assert "all blocks together" in dimension.answer
    assert "+6.0 to +8.0. The tuned model has +5.0" in dimension.answer
    assert all(len(line) <= 100 for line in made(0.8, 0.5, 0.6).summary().splitlines())


@given(*[st.floats(-100, 100, width=16)] * 4)
def test_shares_of_a_change_are_linear(base: float, tuned: float, a: float, b: float) -> None:
    least, greatest = share_of_change(base, tuned, min(a, b), max(a, b))
    if tuned == base:
        assert math.isnan(least)
        assert math.isnan(greatest)
        return
    assert least <= greatest
    reached = sorted(base + share * (tuned - base) for share in (least, greatest))
    assert reached == pytest.approx(sorted((a, b)), rel=1e-6, abs=1e-6)


def test_page_terminal_and_notebook_show_the_same_with_the_base_first(tmp_path: Path) -> None:
    base = make_tiny("llama")
    found = run_null_test(base, perturbed(base, 0.3), TEXTS, n_controls=2, **SHORT)
    (table,) = (block for block in found.evidence() if isinstance(block, Table))
    assert list(table.head[1:4]) == [
        found.base_name, found.tuned_name, "2 controls: rows and columns shuffled",
    ]  # fmt: skip
    (ttr,) = (row for row in table.rows if "TTR" in row[0])
    assert ttr is table.rows[0]
    assert ttr[1] == f"{found.extras['base']['ttr']:.3f}"
    page = write_report(tmp_path / "page.html", found).read_text()
    shown = (found.summary(), page, found._repr_html_())
    for cell in (cell for row in table.rows for cell in row[1:] if cell[:1] not in "<>"):
        assert all(cell in text for text in shown), cell
    assert found.plot().to_dict()


def test_charts_hold_the_table_in_the_possible_range() -> None:
    base = make_tiny("llama")
    found = run_null_test(base, perturbed(base, 0.3), TEXTS, n_controls=2, **SHORT)
    text, *layers = (block for block in flat(found.evidence()) if isinstance(block, Chart))
    assert list(text.roles.values()) == ["base", "control", "control", "tuned"]
    assert text.x.scale == "share"
    assert all(0 <= row["value"] <= 1 for row in text.rows)
    assert len(text.rows) == 3 * 4
    assert len(layers) == 3
    for chart, (metric, view) in zip(
        layers, (("relative_l2", "raw"), ("delta", "raw"), ("delta", "final_norm")), strict=True
    ):
        control, rescaled, tuned = chart.series
        assert [chart.roles[s] for s in (control, rescaled, tuned)] == ["control"] * 2 + ["tuned"]
        kinds = {control: found.controls[0], tuned: found.controls[0], rescaled: found.controls[1]}
        for row in chart.rows:
            kind = kinds[row["series"]]
            known = found.at(metric=metric, view=view, layer=row["layer"], control=kind)
            if row["series"] == tuned:
                assert row["value"] == known["tuned"]
            else:
                assert (row["low"], row["high"]) == (known["control_low"], known["control_high"])


def test_two_kinds_of_control_can_be_told_apart() -> None:
    base = make_tiny("llama")
    found = run_null_test(base, perturbed(base, 0.3), TEXTS, n_controls=1, **SHORT)
    blocks = found.evidence()
    chosen = colours(blocks)
    for chart in (block for block in flat(blocks) if isinstance(block, Chart)):
        assert len({chosen[name] for name in chart.series}) == len(chart.series) >= 3


def test_folders_of_version_0_1_are_read(tmp_path: Path) -> None:
    old = made(0.8, 0.5, 0.6).to_dict() | {"format": 1}
    names = {new: old for old, new in NullTestResult.renamed.items()}
    old["table"] = [
        {names.get(key, key): value for key, value in row.items() if key not in ("control", "p")}
        for row in old["table"]
    ]
    old["extras"] = {names.get(key, key): value for key, value in old["extras"].items()}
    assert "placebo_low" in old["table"][0]
    (tmp_path / "null_test.json").write_text(json.dumps(old))
    assert NullTestResult.load(tmp_path) == made(0.8, 0.5, 0.6)
