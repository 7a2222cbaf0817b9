"""The checkpoints of a run beside their base: the comparisons themselves, and when it changed."""

import copy
import gc
import json
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_for_tests import CHATML, D_VOCAB, letters
from conftest import lora, make_tiny, perturbed, token_texts
from surface_for_tests import words_tokenizer

from hyperlens import cli, compare_models, trace_trajectory
from hyperlens import pair as pair_module
from hyperlens.compare import TrajectoryResult
from hyperlens.compare import trajectory as module
from hyperlens.compare.trajectory import QUANTITIES, onset
from hyperlens.data.conversations import read_examples
from hyperlens.errors import LoadingError, PairError, ResultsError
from hyperlens.models.training_steps import TRAINER_STATE, find_checkpoints
from hyperlens.pair import open_pairs
from hyperlens.render.blocks import Chart, flat
from hyperlens.results import fingerprint
from hyperlens.statistics import shares, significance

TEXTS = token_texts(10, shortest=10, longest=16)
QUIET = {"progress": False}


def with_narrow_end(model, by: float):
    """A copy whose last block adds one direction to the stream, and changes nothing before."""
    tuned = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        weight = tuned.model.layers[-1].mlp.down_proj.weight
        weight += by * torch.outer(torch.randn(len(weight)), torch.randn(weight.shape[1]))
    return tuned


@pytest.fixture(scope="module")
def checkpoints() -> dict:
    """Nothing has changed at the first two, and the end has from step 30 on."""
    base = make_tiny("llama", num_hidden_layers=2)
    planted = {30: with_narrow_end(base, 1.5), 40: with_narrow_end(base, 3.0)}
    return {10: base, 20: base, **planted}


@pytest.fixture(scope="module")
def result(checkpoints) -> TrajectoryResult:
    return trace_trajectory(checkpoints[10], checkpoints, TEXTS, **QUIET)


def as_written(result) -> str:
    """Compared as text: NaN is not equal to itself."""
    return json.dumps(result.to_dict())


def test_every_checkpoint_is_compared_as_by_itself_bit_for_bit(result, checkpoints) -> None:
    for step, tuned in checkpoints.items():
        alone = compare_models(checkpoints[10], tuned, TEXTS, **QUIET)
        assert as_written(alone) == as_written(result.comparison(step)), step


def test_so_are_adapters_and_folders_on_one_base(tmp_path) -> None:
    def tiny():
        return make_tiny("llama", num_hidden_layers=2)

    tiny().save_pretrained(tmp_path / "base")
    run = tmp_path / "run"
    for step in (5, 10):
        lora(tiny(), "llama", seed=step).save_pretrained(run / f"checkpoint-{step}")
    perturbed(tiny()).save_pretrained(run / "checkpoint-100")
    found = trace_trajectory(tmp_path / "base", run, TEXTS, **QUIET)
    assert found.steps == [5, 10, 100]
    assert [one["kind"] for one in found.meta["checkpoints"]] == ["adapter", "adapter", "folder"]
    for step in found.steps:
        folder = run / f"checkpoint-{step}"
        alone = compare_models(tmp_path / "base", folder, TEXTS, **QUIET)
        assert as_written(alone) == as_written(found.comparison(step)), step


def test_a_checkpoint_in_another_dtype_does_not_change_the_next(tmp_path) -> None:
    base = make_tiny("llama", num_hidden_layers=2).to(torch.bfloat16)
    sources = {1: perturbed(base).float(), 2: perturbed(base, seed=3)}
    found = trace_trajectory(base, sources, TEXTS, **QUIET)
    assert [found.comparison(step).meta["dtype"] for step in (1, 2)] == ["float32", "bfloat16"]
    alone = compare_models(base, sources[2], TEXTS, **QUIET)
    assert as_written(alone) == as_written(found.comparison(2))


def test_a_planted_change_is_found_where_it_begins(result) -> None:
    for quantity in ("dimension_raw", "dimension_final_norm", "other_top1", "kl"):
        assert result.onset(quantity) == (30, 20, [30, 40]), quantity
    summary = " ".join(result.summary().split())
    assert "dimension of the raw last block: surely below 0 from step 30 on" in summary
    assert "unchanged at step 20, before it" in summary
    assert "moved most from step 20 to 30" in summary
    assert "moves most in block 1" in summary
    assert "as at every other one" in summary


def test_equal_checkpoints_have_not_changed() -> None:
    base = make_tiny("gpt2", n_layer=2)
    found = trace_trajectory(base, {1: base, 2: copy.deepcopy(base)}, TEXTS, **QUIET)
    for quantity in QUANTITIES:
        for row in found.changes(quantity.name):
            assert (row["value"], row["low"], row["high"]) == (0, 0, 0)
            assert math.isnan(row["p"])
        (_, second) = found.changes(quantity.name)
        assert (second["growth"], second["growth_low"], second["growth_high"]) == (0, 0, 0)
        assert found.onset(quantity.name) == (None, None, [])
    (verdict,) = found.verdicts()
    assert verdict.answer.startswith("At none of the checkpoints")


def test_an_equal_checkpoint_among_others_is_said_to_be_unchanged(result) -> None:
    assert result.value(step=20, probe="drift", metric="l2", layer=2, view="raw") == 0
    assert [row["value"] for row in result.changes("kl")][:2] == [0, 0]


def test_changes_are_the_rows_and_growth_is_paired_by_text(result) -> None:
    raw = result.changes("dimension_raw")
    output = result.changes("other_top1")
    for one, other in zip(raw, output, strict=True):
        at = result.comparison(one["step"])
        row = at.at("participation_ratio", "delta", -1, "raw")
        assert (one["value"], one["low"], one["high"]) == (row.value, row.low, row.high)
        same = at.at("rank_reordering", "top1_agreement", -1, "final_norm")
        assert (other["value"], other["low"]) == (1 - same.value, 1 - same.high)
    assert raw[-1]["growth"] == pytest.approx(raw[-1]["value"] - raw[-2]["value"], abs=1e-9)
    assert output[-1]["growth"] == pytest.approx(output[-1]["value"] - output[-2]["value"])
    assert math.isnan(raw[0]["growth"])


def test_growth_equals_plain_transformers(checkpoints, result) -> None:
    """The paired jackknife of the share of other top-1 tokens, from logits by hand."""
    differs, n = [], []
    for ids in TEXTS:
        with torch.no_grad():
            base, first, last = (
                checkpoints[s](torch.tensor([ids])).logits[0, 1:].argmax(-1) for s in (10, 30, 40)
            )
        differs.append(float((last != base).sum() - (first != base).sum()))
        n.append(float(len(ids) - 1))
    expected = shares.ratio(torch.tensor(differs), torch.tensor(n), within=(-1.0, 1.0))
    row = result.changes("other_top1")[-1]
    found = (row["growth"], row["growth_low"], row["growth_high"])
    assert found == pytest.approx(expected[:3], abs=1e-12)
    # Two tests, as the first two checkpoints are equal: 30 against 20, and this one.
    first = module._grown(QUANTITIES[2], *records(checkpoints, 30, 20))
    both = [shares.p_value(one) for one in (first, expected)]
    assert row["growth_p"] == pytest.approx(significance.holm(both)[1])


def records(checkpoints: dict, *steps: int) -> list[dict]:
    """What is kept of single checkpoints."""
    pairs = open_pairs(checkpoints[10], [checkpoints[step] for step in steps])
    options = module.checked_options(8, 10.0, 0, False)
    reading = {"max_length": 256, "include_bos": False}
    return [module._measured(pair, TEXTS, options, reading) for pair in pairs]


def test_growth_of_a_dimension_has_the_interval_of_a_comparison(checkpoints, result) -> None:
    """From the base's checkpoint on, growth is the change that a comparison of the two gives."""
    pairs = open_pairs(checkpoints[10], [checkpoints[10], checkpoints[40]])
    reading = {"max_length": 256, "include_bos": False}
    options = module.checked_options(8, 10.0, 0, False)
    unchanged, changed = (module._measured(pair, TEXTS, options, reading) for pair in pairs)
    for quantity in QUANTITIES[:2]:
        row = result.changes(quantity.name)[-1]
        for found in (
            module._estimate(quantity, changed["texts"][quantity.name]),
            module._grown(quantity, changed, unchanged),
        ):
            assert found[:3] == pytest.approx((row["value"], row["low"], row["high"]))
            assert (shares.p_value(found) < 0.05) == (found.low > 0 or found.high < 0)


def test_p_values_are_corrected_over_the_checkpoints(result, checkpoints) -> None:
    found = records(checkpoints, 30, 40)
    for quantity in QUANTITIES:
        alone = [
            shares.p_value(module._estimate(quantity, r["texts"][quantity.name])) for r in found
        ]
        both = [row["p"] for row in result.changes(quantity.name)]
        assert [math.isnan(p) for p in both] == [True, True, False, False]
        assert both[2:] == significance.holm(alone)


def change(step: int, value: float, p: float = 0.001, half: float = 0.1) -> dict:
    return {"step": step, "value": value, "low": value - half, "high": value + half, "p": p}


def test_when_it_began() -> None:
    assert onset([change(1, 1.0), change(2, 1.0)]) == (1, None, [1, 2])
    # Not sure at the end, or in the other direction before.
    assert onset([change(1, 1.0), change(2, 1.0, half=2.0)]) == (None, None, [1])
    assert onset([change(1, -1.0), change(2, 1.0)]) == (2, 1, [1, 2])
    # Both the interval and the corrected p have to say so.
    assert onset([change(1, 1.0, p=0.06)]) == (None, None, [])
    assert onset([change(1, 1.0, p=math.nan)]) == (None, None, [])
    # A lapse: it begins after it.
    lapse = [change(1, 1.0), change(2, 0.0), change(3, 1.0)]
    assert onset(lapse) == (3, 2, [1, 3])


def test_a_change_that_turns_round_is_said(result) -> None:
    """It begins where the last direction does, and was sure in the other one before."""
    rows = [dict(row) for row in result.extras["changes"]]
    for row in rows:
        if (row["quantity"], row["step"]) == ("dimension_raw", 30):
            row |= {"value": 9.0, "low": 8.0, "high": 10.0}
    turned = replace(result, extras={**result.extras, "changes": rows})
    assert turned.onset("dimension_raw") == (40, 30, [30, 40])
    summary = " ".join(turned.summary().split())
    assert "surely below 0 from step 40 on" in summary
    assert "surely above 0 at step 30, before it (+9.0 [+8.0, +10.0]" in summary


def test_what_cannot_be_told_is_said() -> None:
    base = make_tiny("llama")
    found = trace_trajectory(base, {7: perturbed(base)}, TEXTS[:4], **QUIET)
    summary = " ".join(found.summary().split())
    assert "cannot tell when, as its intervals need five texts" in summary
    assert found.onset("dimension_raw").step is None


def test_many_texts_are_tested_by_a_sample() -> None:
    base = make_tiny("llama", num_hidden_layers=2)
    texts = token_texts(150, shortest=6, longest=12)
    steps = {1: with_narrow_end(base, 0.5), 2: with_narrow_end(base, 1.5)}
    found = trace_trajectory(base, steps, texts, **QUIET)
    first, second = found.changes("dimension_raw")
    assert first["p"] < 0.05
    assert second["growth_p"] < 0.05
    # The spread of the sampled texts says of all 150 what the comparison's own interval says.
    half = (second["high"] - second["low"]) / 2
    options = module.checked_options(8, 10.0, 0, False)
    reading = {"max_length": 256, "include_bos": False}
    record = module._measured(next(open_pairs(base, [steps[2]])), texts, options, reading)
    assert len(record["texts"]["dimension_raw"]["left_out"]) == 128
    alone = module._estimate(QUANTITIES[0], record["texts"]["dimension_raw"])
    assert alone.high - alone.value == pytest.approx(half, rel=0.1)


def test_charts_and_files(result, tmp_path) -> None:
    charts = [block for block in flat(result.blocks()) if isinstance(block, Chart)]
    assert [chart.kind for chart in charts] == ["lines"] * 3 + ["heatmap"] * 4
    heat = charts[3]
    assert len(heat.rows) == 4 * 3
    assert (heat.rows[0]["layer"], heat.rows[0]["step"]) == (2, 10)
    result.save(tmp_path / "out")
    again = TrajectoryResult.load(tmp_path / "out")
    assert as_written(again) == as_written(result)
    assert again.summary() == result.summary()
    with pytest.raises(ResultsError, match="no step 31: expected one of 10, 20, 30"):
        again.comparison(31)
    with pytest.raises(ResultsError, match="no quantity 'dimension'"):
        again.onset("dimension")


# Going on


class Stopped(Exception):
    """What a killed process would be."""


def test_a_killed_run_goes_on_and_repeats_nothing(checkpoints, tmp_path, monkeypatch) -> None:
    steps = {step: checkpoints[step] for step in (10, 30, 40)}
    base, out = checkpoints[10], tmp_path / "out"
    whole = trace_trajectory(base, steps, TEXTS, **QUIET)
    calls = []

    def counted(pair, *rest, most=2):
        if len(calls) == most:
            raise Stopped
        calls.append(pair)
        return original(pair, *rest)

    original = module._measured
    monkeypatch.setattr(module, "_measured", counted)
    with pytest.raises(Stopped):
        trace_trajectory(base, steps, TEXTS, out=out, **QUIET)
    assert not out.exists()
    assert len(list((tmp_path / "out.partial").iterdir())) == 2
    calls.clear()
    found = trace_trajectory(base, steps, TEXTS, out=out, **QUIET)
    assert len(calls) == 1
    assert as_written(found) == as_written(whole)
    assert as_written(TrajectoryResult.load(out)) == as_written(whole)
    assert not (tmp_path / "out.partial").exists()


def test_two_models_are_in_memory_at_a_time(checkpoints, monkeypatch) -> None:
    alive = []

    def watched(pair, *rest):
        gc.collect()
        assert [one() for one in alive] == [None] * len(alive)
        alive.append(weakref.ref(pair.tuned.model))
        return original(pair, *rest)

    original = module._measured
    monkeypatch.setattr(module, "_measured", watched)
    trace_trajectory(checkpoints[10], {s: checkpoints[s] for s in (10, 30)}, TEXTS, **QUIET)
    assert len(alive) == 2


def test_the_base_is_opened_checked_and_hashed_once(checkpoints, monkeypatch) -> None:
    opened, hashed = [], []

    def hook(one, backend, original=pair_module.hook):
        opened.append(one.name)
        return original(one, backend)

    def digest(name, tensor, known, original=fingerprint._tensor_digest):
        place = tensor.data_ptr()
        hashed.append(place in {key[1] for key in known})
        return original(name, tensor, known)

    monkeypatch.setattr(pair_module, "hook", hook)
    monkeypatch.setattr(fingerprint, "_tensor_digest", digest)
    steps = {10: checkpoints[30], 20: checkpoints[40]}
    trace_trajectory(checkpoints[10], steps, TEXTS, **QUIET)
    assert len(opened) == 1 + len(steps)
    n = len(list(checkpoints[10].parameters()))
    assert len(hashed) == 4 * n
    assert not any(hashed[:n])  # the base's, read
    assert all(hashed[2 * n : 3 * n])  # and found again


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"sink_threshold": 5.0}, {"max_length": 10}, {"include_bos": True}]
)
def test_what_was_done_with_other_options_is_not_taken(other, tmp_path, monkeypatch) -> None:
    base = make_tiny("llama", num_hidden_layers=2)
    texts, out = TEXTS[:6], tmp_path / "out"
    monkeypatch.setattr(TrajectoryResult, "save", lambda *_: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        trace_trajectory(base, {1: perturbed(base)}, texts, out=out, **QUIET)
    calls = []
    original = module._measured
    monkeypatch.setattr(module, "_measured", lambda *a: calls.append(a) or original(*a))
    with pytest.raises(Stopped):
        trace_trajectory(base, {1: perturbed(base)}, texts, out=out, **QUIET)
    assert not calls
    with pytest.raises(Stopped):
        trace_trajectory(base, {1: perturbed(base)}, texts, out=out, **QUIET, **other)
    assert len(calls) == 1


def test_other_weights_texts_and_groups_are_other_work() -> None:
    base, options = make_tiny("llama"), module.checked_options(8, 10.0, 0, False)

    def identity(base=base, tuned=base, texts=TEXTS):
        return module._identities(base, {1: tuned}, texts, options, {})[1]

    assert identity() == identity()
    assert identity(tuned=perturbed(base)) != identity()
    assert identity(base=perturbed(base)) != identity()
    assert identity(texts=TEXTS[:3]) != identity()
    from hyperlens.data.texts import read_texts

    words = ["a b", "c d"]
    assert identity(texts=read_texts(words, groups=["x", "x"])) != identity(texts=read_texts(words))


# Checkpoints


def folder_of(path: Path, global_step: int | None = None) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    if global_step is not None:
        (path / TRAINER_STATE).write_text(json.dumps({"global_step": global_step}))
    return path


def test_checkpoints_are_found_in_order_of_steps(tmp_path) -> None:
    run = tmp_path / "run"
    for step in (1000, 9, 500):
        folder_of(run / f"checkpoint-{step}")
    (run / "runs").mkdir()
    (run / "checkpoint-7.txt").write_text("")
    assert [*find_checkpoints(run)] == [9, 500, 1000]
    assert [*find_checkpoints([run / "checkpoint-500", run / "checkpoint-9"])] == [9, 500]
    kept = tmp_path / "kept"
    folder_of(kept / "checkpoints" / "checkpoint-12", 12)
    assert [*find_checkpoints(str(kept))] == [12]
    assert [*find_checkpoints([run, kept])] == [9, 12, 500, 1000]


def test_the_trainers_own_record_of_the_step_counts(tmp_path) -> None:
    best = folder_of(tmp_path / "best", 250)
    assert find_checkpoints([best]) == {250: best}
    epoch = folder_of(tmp_path / "run" / "epoch_3", 750)
    assert find_checkpoints(tmp_path / "run") == {750: epoch}


def test_bad_checkpoints_are_one_line_each(tmp_path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    final = folder_of(tmp_path / "final")
    twins = [folder_of(tmp_path / name / "checkpoint-5") for name in ("a", "b")]
    for given, kind, message in (
        (empty, LoadingError, "no checkpoints in .*empty: expected folders such as"),
        (tmp_path / "none", LoadingError, "no folder .*none"),
        (final, LoadingError, "does not tell after which step it was saved"),
        (twins, PairError, "are both of step 5: give one of them"),
        ([], PairError, "expected the folder of a run"),
        ({}, PairError, "there are no checkpoints"),
        ({"5": final}, PairError, "whole numbers from 0 up"),
        ({True: final}, PairError, "whole numbers from 0 up"),
        ([make_tiny("llama")], PairError, "give checkpoints that are no folders as"),
        (3, PairError, "expected the folder of a run"),
    ):
        with pytest.raises(kind, match=message) as error:
            find_checkpoints(given)
        assert "\n" not in str(error.value)


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path) -> None:
    base = make_tiny("llama")
    other = make_tiny("llama", num_hidden_layers=2)
    with pytest.raises(PairError, match="checkpoint of step 9: the models differ in depth"):
        trace_trajectory(base, {3: base, 9: other}, TEXTS, **QUIET)
    folder_of(tmp_path / "run" / "checkpoint-4")
    with pytest.raises(LoadingError, match=r"checkpoint of step 4: .* has no weights"):
        trace_trajectory(base, tmp_path / "run", TEXTS, **QUIET)
    base_and = base, words_tokenizer()
    with pytest.raises(PairError, match="checkpoint of step 2: the tokenizers differ"):
        trace_trajectory(base_and, {1: base_and, 2: (base, _other_words())}, ["w3 w4"] * 5, **QUIET)


def _other_words():
    """The same words by other ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in reversed(range(3, 61)))]
    made = Tokenizer(models.WordLevel(dict(zip(words, range(61), strict=True)), "w3"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", pad_token="<pad>")


def test_checkpoints_of_two_tokenizers_without_a_base_are_refused() -> None:
    base = make_tiny("llama")
    sources = {1: (base, words_tokenizer()), 2: (base, _other_words())}
    with pytest.raises(PairError, match="steps 1 and 2 read the texts as different tokens"):
        trace_trajectory((base, None), sources, [f"w{i} w4 w5" for i in range(3, 9)], **QUIET)


def test_a_comparison_of_several_models_names_this_question(tiny) -> None:
    with pytest.raises(PairError, match=r"got 2: .*trace_trajectory") as error:
        compare_models(tiny, [tiny, tiny], TEXTS)
    assert "\n" not in str(error.value)


# The command


def test_conversations_are_compared_by_role() -> None:
    base = make_tiny("llama", num_hidden_layers=2, vocab_size=D_VOCAB)
    tuned = with_narrow_end(base, 1.5)
    source, end = (base, letters(CHATML)), (tuned, letters(CHATML))
    talks = read_examples(
        [
            {
                "messages": [
                    {"role": "user", "content": f"hi {i}"},
                    {"role": "assistant", "content": "ho"},
                ]
            }
            for i in range(6)
        ],
        roles=["assistant"],
    )
    found = trace_trajectory(source, {7: end}, talks, **QUIET)
    alone = compare_models(source, end, talks, **QUIET)
    assert as_written(found.comparison(7)) == as_written(alone)


def test_the_command(tmp_path, capsys: pytest.CaptureFixture) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    make_tiny("llama", num_hidden_layers=2).save_pretrained(base)
    words_tokenizer().save_pretrained(base)
    shutil.copytree(base, run / "checkpoint-3")
    file = tmp_path / "t.txt"
    file.write_text("\n\n".join(f"w{i} w4 w5 w6" for i in range(3, 9)))
    words = ["trajectory", str(base), str(run), "--texts", str(file)]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "At none of the checkpoints" in " ".join(out.split())
    assert (tmp_path / "out" / "trajectory.json").exists()
    assert cli.main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "p.html")]) == 0
    capsys.readouterr()
    assert cli.main(["trajectory", str(base), str(tmp_path), "--texts", str(file)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no checkpoints in" in line
