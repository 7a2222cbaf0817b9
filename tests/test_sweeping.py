"""A sweep's cells are hyperfit's runs, whatever they share; the rule says what the numbers say."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_tiny, perturbed, token_texts, unchecked
from safetensors.torch import load_file
from surface_for_tests import words_tokenizer

from hyperlens import cli, compare_models, read_results
from hyperlens.cli.sweep import last_k, spans
from hyperlens.errors import HyperlensError
from hyperlens.training import SweepResult, hyperfit, sweep, sweeping
from hyperlens.training.prefix import LastResiduals, Plan, PrefixCache
from hyperlens.training.sweeping import dimension, final_states, needed

OPTIONS = {
    "recipe": "demo", "n_sequences": 5, "sequence_length": 8, "batch_size": 2, "epochs": 2,
    "n_validation": 4, "n_prompts": 3, "prompt_tokens": 3, "new_tokens": 5, "progress": False,
}  # fmt: skip
N_BLOCKS = 3


def texts() -> list[list[int]]:
    return token_texts(12, shortest=8, longest=20)


def base():
    return make_tiny("llama", num_hidden_layers=N_BLOCKS)


def small_sweep(out: Path | None = None, **options: object) -> SweepResult:
    return sweep(base(), texts(), **{**OPTIONS, "seeds": [0, 1], "out": out, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("sweep") / "out"
    # Shapes and types are checked where single cells are made.
    with unchecked():
        small_sweep(place)
    return place


@pytest.fixture(scope="module")
def result(folder) -> SweepResult:
    return SweepResult.load(folder)


def cell_folder(folder: Path, k: int, seed: int) -> Path:
    (found,) = (folder / "cells").glob(f"k{k}-rank16-seed{seed}-*")
    return found


# What a cell is


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_cell_is_what_hyperfit_makes_by_itself_bit_for_bit(folder, k, tmp_path) -> None:
    """Though its prefix comes from the cells before it: k = 1 from 2, seed 1 from seed 0."""
    alone = hyperfit(
        base(), texts(), "late_lora", last_k=k, seed=1, prefix_cache=False,
        record_every=2, out=tmp_path / "alone", **OPTIONS,
    )  # fmt: skip
    cell = cell_folder(folder, k, 1)
    name = "adapter_model.safetensors"
    one, other = load_file(cell / name), load_file(tmp_path / "alone" / name)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    saved = json.loads((cell / "hyperfit.json").read_text())
    assert tuple(saved["history"]) == alone.history
    assert saved["records"][-1]["ttr"] == alone.records[-1].ttr
    assert bool(saved["manifest"]["prefix_cache"]) == (k < N_BLOCKS)


def test_what_the_last_run_left_is_used() -> None:
    """Other residuals than those of the model show in what follows from them."""
    model, tokens = base(), torch.tensor([text[:8] for text in texts()[:4]])
    last = LastResiduals()
    PrefixCache(model, 1, Plan(0, "memory", Path()), last).fill(model, tokens, rows=2)
    right = PrefixCache(model, 2, Plan(0, "memory", Path()))
    right.fill(model, tokens, rows=2)
    assert last.residuals is not None
    last.residuals[3] *= 2
    cache = PrefixCache(model, 2, Plan(0, "memory", Path()), last)
    cache.fill(model, tokens, rows=2)
    assert torch.equal(cache._residuals[:3], right._residuals[:3])
    assert not torch.equal(cache._residuals[3], right._residuals[3])
    again = PrefixCache(model, 2, Plan(0, "memory", Path()), last)
    again.fill(model, tokens, rows=2)
    assert again._residuals is cache._residuals


def test_the_scale_of_the_update_is_the_same_at_every_rank(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sweeping, "write_report", lambda *_: None)
    small_sweep(tmp_path / "out", last_k=[1], ranks=[2, 8], seeds=[0], epochs=1)
    configs = [
        json.loads(file.read_text()) for file in tmp_path.glob("out/cells/*/adapter_config.json")
    ]
    assert {config["lora_alpha"] / config["r"] for config in configs} == {2.0}
    assert {config["r"] for config in configs} == {2, 8}


# Numbers


def test_numbers_are_those_of_the_cells(folder, result) -> None:
    saved = [
        json.loads((cell_folder(folder, 2, seed) / "hyperfit.json").read_text()) for seed in (0, 1)
    ]
    last = [one["records"][-1] for one in saved]
    for metric, name in (
        ("ttr", "ttr"),
        ("rep_2", "bigram_repetition"),
        ("top1_agreement", "rank_1"),
    ):
        mean = sum(record[name] for record in last) / 2
        assert result.value(last_k=2, metric=metric) == pytest.approx(mean)
    row = result.at(last_k=2, metric="train_loss")
    a, b = (one["history"][-1] for one in saved)
    assert row["value"] == pytest.approx((a + b) / 2)
    # Student's t of one degree of freedom: 12.706 standard errors.
    assert row["high"] - row["value"] == pytest.approx(12.7062 * abs(a - b) / 2, rel=1e-4)
    assert result.value(last_k=0, metric="ttr") == saved[0]["records"][0]["ttr"]
    assert (result.last_k, result.ranks) == ([1, 2, 3], [16])


def test_the_dimension_is_that_of_compare_models() -> None:
    model, tuned = base(), perturbed(base())
    rows = [text[:9] for text in token_texts(9, shortest=9)]
    comparison = compare_models(
        model, tuned, rows, probes=["participation_ratio"], sink_threshold=0.0, progress=False
    )
    for metric, one in (("base", model), ("tuned", tuned)):
        expected = comparison.value(
            probe="participation_ratio", metric=metric, layer=N_BLOCKS, view="final_norm"
        )
        assert dimension(final_states(one, torch.tensor(rows), 4)) == pytest.approx(expected)


def test_padding_does_not_count_in_the_dimension() -> None:
    states = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([6, 4, 3, 6, 5, 6])
    found = dimension(states, lengths)
    for row, length in zip(states, lengths.tolist(), strict=True):
        row[length - 1 :] = 100.0
    assert dimension(states, lengths) == pytest.approx(found)
    assert dimension(states) != pytest.approx(found)
    assert dimension(states, torch.full((6,), 6)) == dimension(states)


def test_what_is_enough_is_decided_by_intervals() -> None:
    clear = {1: [0.1, 0.12, 0.11], 2: [0.29, 0.31, 0.3], 3: [0.3, 0.32, 0.31]}
    assert needed(clear)[:3] == (2, [1], [])
    # The same means, other spreads: nothing is sure of k = 2 any more.
    noisy = needed({**clear, 2: [0.1, 0.5, 0.3]})
    assert (noisy.k, noisy.too_few, noisy.open) == (None, [1], [2])
    assert "no smaller k surely reaches 90%" in noisy.why
    short = needed({k: values for k, values in clear.items() if k != 2})
    assert (short.k, short.too_few) == (3, [1])


@pytest.mark.parametrize(
    ("gains", "why"),
    [
        ({1: [0.3], 2: [0.3]}, "one seed"),
        ({2: [0.3, 0.31, 0.32]}, "only one k"),
        ({1: [0.3, 0.31, 0.32], 2: [-0.1, 0.3, 0.1]}, "not surely above 0"),
    ],
)
def test_what_cannot_be_told_is_said(gains, why) -> None:
    found = needed(gains)
    assert found.k is None
    assert why in found.why


def made_up(gains: dict[int, list[float]]) -> SweepResult:
    cells = [
        {"last_k": k, "rank": 16, "seed": seed, "seconds": 1.0, "ttr": 0.3 + gain}
        | dict.fromkeys(
            ("rep_2", "top1_agreement", "delta_pr", "train_loss", "validation_loss"), 0.5
        )
        for k, values in gains.items()
        for seed, gain in enumerate(values)
    ]
    row = {"low": math.nan, "high": math.nan, "se": math.nan, "n": 1}
    table = [
        {"last_k": k, "rank": 16 if k else 0, "metric": metric, "value": 0.3, **row}
        for k in (0, *gains)
        for metric, _, _ in sweeping.METRICS
    ]
    meta = {
        "title": "t", "n_blocks": 10, "options": {"recipe": {"epochs": 1, "sequence_length": 8}},
        "corpus": {"n_sequences": 1, "n_held_out": 2},
    }  # fmt: skip
    return SweepResult(tuple(table), {"cells": cells}, meta)


def test_the_verdict_says_the_rule_and_its_number() -> None:
    answer = made_up(
        {1: [0.1, 0.12, 0.11], 2: [0.29, 0.31, 0.3], 3: [0.3, 0.32, 0.31]}
    ).conclusions()[0]
    assert answer.startswith("The last 2 blocks of 10 are enough: they surely gain 90%")
    assert "3 seeds" in answer
    assert "Surely too few: k = 1." in answer
    short = made_up({1: [0.1, 0.12, 0.11], 3: [0.3, 0.32, 0.31]})
    assert short.conclusions()[0].startswith("All of the last 3 blocks are needed")
    single = made_up({1: [0.1], 3: [0.3]})
    assert "Cannot tell" in single.conclusions()[0]
    assert "no intervals" in single.summary()


# Going on


def test_a_killed_sweep_goes_on_and_finished_cells_stay(folder, tmp_path, monkeypatch) -> None:
    train_and_save, calls = sweeping.train_and_save, []
    monkeypatch.setattr(sweeping, "write_report", lambda *_: None)

    def counted(*args: object) -> object:
        calls.append(args[3])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_and_save(*args)

    monkeypatch.setattr(sweeping, "train_and_save", counted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        small_sweep(out, last_k=[1, 2])
    before = {p: p.stat().st_mtime_ns for p in out.rglob("cells/*/*")}
    assert len({p.parent for p in before}) == 2
    found = small_sweep(out, last_k=[1, 2])
    assert len(calls) == 3 + 2
    assert {p: p.stat().st_mtime_ns for p in before} == before
    # NaNs are equal as text.
    whole = [row for row in SweepResult.load(folder).table if row["last_k"] < 3]
    assert str(list(found.table)) == str(whole)
    # One more seed: one more run for each k. Other options: every run anew.
    wider = small_sweep(out, last_k=[1, 2], seeds=[0, 1, 5])
    assert len(calls) == 3 + 2 + 2
    assert wider.at(last_k=1, metric="ttr")["n"] == 3
    small_sweep(out, last_k=[1], seeds=[0], learning_rate=1e-3)
    assert len(calls) == 3 + 2 + 2 + 1
    assert not (out / sweeping.LOCK).exists()


def test_within_a_cell_it_goes_on_from_the_checkpoint(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sweeping, "write_report", lambda *_: None)
    from hyperlens.training.callbacks import Checkpoints

    saved = Checkpoints.on_save

    def interrupting(self: Checkpoints, *args: object, **kwargs: object) -> None:
        saved(self, *args, **kwargs)
        raise KeyboardInterrupt

    out = tmp_path / "out"
    options = {"last_k": [2], "seeds": [1], "checkpoint_minutes": 0.0}
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "on_save", interrupting)
        with pytest.raises(KeyboardInterrupt):
            small_sweep(out, **options)
    assert [path.name.endswith(".partial") for path in (out / "cells").iterdir()] == [True]
    small_sweep(out, **options)
    name = "adapter_model.safetensors"
    one, whole = (load_file(cell_folder(where, 2, 1) / name) for where in (out, folder))
    assert all(torch.equal(one[key], whole[key]) for key in whole)


def test_nothing_is_kept_without_out(result) -> None:
    found = small_sweep(None, last_k=[1])
    assert found.value(last_k=1, metric="ttr") == result.value(last_k=1, metric="ttr")


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last_k": [1, 9]}, "last_k is 9 but the model has 3 blocks: choose 1 to 3"),
        ({"last_k": [0]}, "last_k must be a whole number from 1 up"),
        ({"last_k": [2, 1, 2]}, "last_k has 2 twice"),
        ({"last_k": []}, "last_k is empty"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [1, 1]}, "seeds has 1 twice"),
        ({"seeds": [-1]}, "seed"),
        ({"ranks": [0]}, "lora_r must be"),
        ({"seed": 3}, "give seeds instead"),
        ({"lora_r": 3}, "give ranks instead"),
        ({"method": "full"}, "a sweep sets method itself"),
        ({"record_every": 0}, "needs the record"),
        ({"sequence_length": 30}, "none of the 12 texts has 30 tokens"),
        ({"n_sequences": 11}, "1 are left"),
        ({"epoch": 3}, "epochs"),
    ],
)
def test_odd_inputs_are_one_line_before_any_training(
    options, message, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(sweeping, "train_and_save", None)
    with pytest.raises(HyperlensError, match=message) as caught:
        small_sweep(tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HyperlensError, match="not empty and not a sweep"):
        small_sweep(tmp_path)


def test_two_sweeps_in_one_folder_are_kept_apart(tmp_path) -> None:
    sweeping._work_folder(tmp_path / "out").claim()
    # Of another process on another host, which cannot be asked.
    (tmp_path / "out" / sweeping.LOCK).write_text(
        json.dumps({"pid": 1, "host": "elsewhere", "boot": "another"})
    )
    with pytest.raises(HyperlensError, match="process 1 on elsewhere is working in"):
        small_sweep(tmp_path / "out")


def test_what_goes_wrong_names_the_cell(tmp_path) -> None:
    with pytest.raises(HyperlensError, match=r"^last_k 3, rank 16, seed 0: the loss became"):
        small_sweep(tmp_path / "out", learning_rate=1e30, seeds=[0])


def test_a_damaged_cell_is_told(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "out")
    (cell_folder(tmp_path / "out", 1, 0) / "hyperfit.json").write_text("{")
    with pytest.raises(HyperlensError, match="remove it, and the cell is trained again"):
        small_sweep(tmp_path / "out")


# On the command line


def test_the_command_sweeps_and_report_draws_it(tmp_path, capsys) -> None:
    base().save_pretrained(tmp_path / "base")
    words_tokenizer().save_pretrained(tmp_path / "base")
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in text[1:])}) for text in texts()]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    argv = ["sweep", str(tmp_path / "base"), "--texts", str(tmp_path / "texts.jsonl")]
    for name, value in OPTIONS.items():
        argv += [] if name == "progress" else [f"--{name.replace('_', '-')}", str(value)]
    argv += ["--last-k", "1..2", "--seeds", "0..1", "--out", str(out)]
    assert cli.main(argv) == cli.OK
    printed = capsys.readouterr()
    assert "How many late blocks are needed?" in printed.out
    assert "sweep: 4/4, last_k 1, rank 16, seed 1" in printed.err
    assert {"sweep.json", "sweep.csv", "summary.txt", "report.html", "cells"} <= {
        path.name for path in out.iterdir()
    }
    assert [found.name for found in read_results([out])] == ["sweep"]
    assert cli.main(["report", str(out), "--out", str(tmp_path / "page.html")]) == cli.OK
    page = (tmp_path / "page.html").read_text()
    assert "How many late blocks are needed?" in page
    # A run beside it is still drawn.
    (lora,) = out.glob("cells/k1-rank16-seed0-*")
    shutil.copytree(lora, tmp_path / "lora")
    names = [found.name for found in read_results([out, tmp_path / "lora"])]
    assert names == ["training", "sweep"]


def test_numbers_of_blocks_are_spans() -> None:
    assert spans("1..3,8") == (1, 2, 3, 8)
    assert last_k("1..L") is None
    assert last_k("2,5") == (2, 5)


@pytest.mark.parametrize("text", ["1..", "x", "1-3", "2..L"])
def test_mistyped_spans_are_wrong_usage(text, capsys) -> None:
    argv = ["sweep", "base", "--texts", "t", "--out", "o", "--last-k", text]
    assert cli.main(argv) == cli.USAGE
    assert "expected whole numbers such as 1..8,12" in capsys.readouterr().err


def test_ctrl_c_says_that_it_goes_on(monkeypatch, tmp_path, capsys) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hyperlens.training.sweep", interrupted, raising=False)
    (tmp_path / "t.txt").write_text("a text")
    argv = ["sweep", "base", "--texts", str(tmp_path / "t.txt"), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == cli.INTERRUPTED
    assert "the same command goes on where it stopped" in capsys.readouterr().err
