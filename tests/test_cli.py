"""The command line: exit codes, one-line errors, and nothing written on failure."""

import argparse
import inspect
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import D_VOCAB, make_tiny, perturbed
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hyperlens import Comparison, __version__, cli, compare, compare_models
from hyperlens.cli import build_parser
from hyperlens.cli.experiments import SPECIAL, command_of
from hyperlens.cli.options import BACKENDS, as_options
from hyperlens.errors import LoadingError
from hyperlens.models.kinds import Backend
from hyperlens.probes import default_probes
from hyperlens.questions import QUESTIONS, Question
from hyperlens.training import Recipe, hyperfit, preset
from hyperlens.training.recipes import HELP, Method

ROOT = Path(__file__).resolve().parent.parent
SAVED = {"comparison.json", "layers.csv", "report.html", "summary.txt"}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(3, D_VOCAB)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, tuned/, texts.txt and tales.csv; not to be changed."""
    folder = tmp_path_factory.mktemp("cli")
    base = make_tiny("llama")
    for name, model in (("tuned", perturbed(base)), ("base", base)):
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    texts = [" ".join(f"w{3 + (7 * i + j * j) % 58}" for j in range(5 + i)) for i in range(12)]
    (folder / "texts.txt").write_text("\n\n".join(texts) + "\n")
    rows = "".join(f"{i},{text}\n" for i, text in enumerate(texts))
    (folder / "tales.csv").write_text("id,story\n" + rows)
    return folder


@pytest.fixture(autouse=True)
def _here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.delenv("HYPERLENS_DEBUG", raising=False)


COMPARE = ("compare", "base", "tuned", "--texts", "texts.txt")
HYPERFIT = ("hyperfit", "base", "--texts", "texts.txt", "--recipe", "demo")
SHORT = (
    *("--n-sequences", "4", "--sequence-length", "6", "--epochs", "2", "--batch-size", "2"),
    *("--prompt-tokens", "3", "--new-tokens", "4"),
)


def failed(capsys: pytest.CaptureFixture[str], code: int, argv: tuple, *expected: str) -> str:
    """The command fails with this code and one line on stderr, without a traceback."""
    assert cli.main([str(part) for part in argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    *usage, line = err.splitlines()
    if code == cli.USAGE:
        assert usage[0].startswith("usage: ")
    else:
        assert usage == []
    for words in expected:
        assert words in line
    return line


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a model is a mistake here."""

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("hyperlens.pair.open_pair", opened)
    monkeypatch.setattr("hyperlens.training.hyperfitting.open_source", opened)


# compare


def test_compare_prints_the_summary_and_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    assert cli.main([*COMPARE, "--out", str(out)]) == cli.OK
    printed, err = capsys.readouterr()
    assert err == ""
    comparison = Comparison.load(out)
    assert printed.startswith(comparison.summary())
    assert f"saved in {out}: comparison.json, layers.csv" in printed
    assert set(os.listdir(out)) == SAVED
    assert os.listdir(out.parent) == ["out"]
    texts = (Path("texts.txt")).read_text().strip().split("\n\n")
    same = compare_models("base", "tuned", texts, progress=False)
    assert comparison.to_frame().equals(same.to_frame())


def test_compare_without_out_only_prints(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(home.rglob("*"))
    assert cli.main([*COMPARE, "--probes", "drift"]) == cli.OK
    out, err = capsys.readouterr()
    assert "base" in out
    assert "saved" not in out
    assert err == ""
    assert sorted(home.rglob("*")) == before


def test_every_option_of_compare_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def spy(*args: object, **kwargs: object) -> Comparison:
        calls.append((args, kwargs))
        return compare_models(*args, **kwargs)

    monkeypatch.setattr(compare, "compare_models", spy)
    flags = (
        "--max-length 7 --batch-size 3 --include-bos --sink-threshold 0 --backend bridge "
        "--device cpu --dtype float32 --seed 5 --quiet --probes logit_lens,drift "
        "--lens-tokens 3 --text-column story --limit 4"
    )
    argv = ["compare", "base", "tuned", "--texts", "tales.csv", *flags.split()]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == cli.OK
    # TransformerLens says where it moves a model; that is not our output.
    assert "Moving model" not in capsys.readouterr().out
    ((args, kwargs),) = calls
    assert args[:2] == ("base", "tuned")
    assert len(args[2]) == 4
    assert kwargs == {
        "probes": ("logit_lens", "drift"),
        "max_length": 7,
        "batch_size": 3,
        "include_bos": True,
        "sink_threshold": 0.0,
        "lens_tokens": 3,
        "backend": "bridge",
        "device": "cpu",
        "dtype": "float32",
        "seed": 5,
        "out": tmp_path / "out",
        "report_to": (),
        "progress": False,
    }
    meta = Comparison.load(tmp_path / "out").meta
    assert (meta["dtype"], meta["backend"], meta["seed"]) == ("float32", "bridge", 5)
    assert meta["options"]["include_bos"] is True


def test_several_tuned_models_are_pointed_to_their_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*COMPARE, "checkpoint-10", "checkpoint-20"]) == cli.USAGE
    assert "are for `hyperlens trajectory`" in capsys.readouterr().err


def options_of(command: str) -> dict[str, argparse.Action]:
    """The options of a command by their names in Python."""
    return {action.dest: action for action in parsers()[command]._actions}


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command."""
    (commands,) = (a.choices for a in build_parser()._actions if isinstance(a.choices, dict))
    return commands


@pytest.mark.parametrize(
    "question",
    [one for one in QUESTIONS if not one.command and one.name not in SPECIAL],
    ids=lambda one: one.name,
)
def test_defaults_and_names_are_those_of_the_library(question: Question) -> None:
    function = getattr(import_module(f"hyperlens.{question.module}"), question.function)
    args = vars(build_parser().parse_args([command_of(question), *COMPARE[1:]]))
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "tokens":  # a function or a mask
            continue
        assert name in args
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert plain(args[name]) == plain(parameter.default), name


def plain(value: Any) -> Any:
    """Lists and the keys of dictionaries are given as tuples on the command line."""
    return tuple(value) if isinstance(value, list | dict) else value


def test_probes_and_backends_are_named_in_full() -> None:
    named = options_of("compare")["probes"].help or ""
    assert all(probe.name in named for probe in default_probes())
    assert get_args(Backend) == BACKENDS == options_of("compare")["backend"].choices


def test_the_split_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(name: str, **given: object) -> datasets.Dataset:
        calls.append((name, given))
        return datasets.Dataset.from_dict({"text": ["w3 w4 w5 w6", "w7 w8 w9"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    argv = ("compare", "base", "base", "--texts", "owner/tales", "--split", "test")
    assert cli.main([*argv, "--probes", "drift"]) == cli.OK
    assert calls == [("owner/tales", {"split": "test", "streaming": False})]


# hyperfit


def test_hyperfit_trains_saves_and_names_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hyper fitted"
    assert cli.main([*HYPERFIT, *SHORT, "--out", str(out)]) == cli.OK
    printed, err = capsys.readouterr()
    # Not a terminal: plain lines, one for each epoch and each record.
    assert "hyperfit: epoch 0/2, the base, held-out text: TTR " in err
    assert "hyperfit: epoch 1/2, step " in err
    assert "hyperfit: epoch 2/2, held-out text: TTR " in err
    assert "\r" not in err
    assert f"weights in {out}" in printed
    record = json.loads((out / "hyperfit.json").read_text())
    assert record["recipe"]["epochs"] == 2
    assert len(record["history"]) == 2
    assert f"{record['history'][-1]:.3f} in the last" in printed
    assert "full on blocks 0, 1, 2 (0-based) of 3" in printed
    first, last = record["records"][0], record["records"][-1]
    assert (first["epoch"], last["epoch"]) == (0, 2)
    assert f"held-out text after epoch 2 (the base): TTR {last['ttr']:.3f}" in printed
    assert f"perplexity {last['perplexity']:,.1f} ({first['perplexity']:,.1f})" in printed
    # The command that is printed works as it stands.
    command = shlex.split(printed.splitlines()[-1])
    assert command[:4] == ["hyperlens", "compare", "base", str(out)]
    assert cli.main(command[1:]) == cli.OK
    assert Comparison.load(f"{out}-comparison").meta["tuned"]["name"].endswith(out.name)


def test_hyperfit_can_make_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "adapter"
    flags = ("--method", "late_lora", "--last-k", "1", "--lora-r", "2", "--text-column", "story")
    argv = ("hyperfit", "base", "--texts", "tales.csv", "--limit", "9", "--recipe", "demo")
    assert cli.main([*argv, *SHORT, *flags, "--out", str(out)]) == cli.OK
    assert (out / "adapter_config.json").exists()
    printed = capsys.readouterr().out
    assert "late_lora on blocks 2 (0-based) of 3" in printed
    command = shlex.split(printed.splitlines()[-1])
    assert command[4:] == [
        *("--texts", "tales.csv", "--text-column", "story", "--limit", "9"),
        *("--out", f"{out}-comparison"),
    ]


def test_without_a_record_nothing_is_said_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main([*HYPERFIT, *SHORT, "--record-every", "0", "--out", str(out)]) == cli.OK
    assert "held-out" not in capsys.readouterr().out


def test_held_out_texts_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = ["w3 w4 w5 w6 w7 w8 w9", "w9 w8 w7 w6 w5 w4 w3"]
    (tmp_path / "held_out.csv").write_text("id,story\n" + "".join(f"0,{t}\n" for t in held_out))
    flags = ("--validation", str(tmp_path / "held_out.csv"), "--text-column", "story")
    argv = ("hyperfit", "base", "--texts", "tales.csv", "--recipe", "demo", "--no-packed")
    out = tmp_path / "out"
    assert cli.main([*argv, *SHORT, *flags, "--out", str(out)]) == cli.OK
    data = json.loads((out / "hyperfit.json").read_text())["manifest"]["data"]
    assert (data["n_sequences"], data["n_held_out"]) == (4, 2)
    assert data["source"]["name"] == "tales.csv"
    assert data["validation"]["source"]["name"] == "held_out.csv"
    assert "note: only 2 of 32 held-out sequences were found" in capsys.readouterr().out


def test_held_out_texts_from_another_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(name: str, split: str, **_: object) -> datasets.Dataset:
        calls.append((name, split))
        return datasets.Dataset.from_dict({"text": [f"w3 w4 {split}"]})

    def spy(_: object, texts: list, *, validation: list, **__: object) -> None:
        calls.append((list(texts), list(validation)))
        raise LoadingError("enough")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("hyperlens.training.hyperfit", spy, raising=False)
    argv = ["hyperfit", "base", "--texts", "a/tales", "--validation", "b/tales", "--out", "out"]
    cli.main([*argv, "--split", "train", "--validation-split", "test"])
    cli.main([*argv, "--split", "dev"])
    assert calls == [
        ("a/tales", "train"),
        ("b/tales", "test"),
        (["w3 w4 train"], ["w3 w4 test"]),
        ("a/tales", "dev"),
        ("b/tales", "dev"),
        (["w3 w4 dev"], ["w3 w4 dev"]),
    ]


CHANGES = {
    "n_sequences": 3,
    "sequence_length": 9,
    "packed": True,
    "selection": "random",
    "loss_on": "all",
    "add_eos": True,
    "pad_short": True,
    "epochs": 4,
    "batch_size": 5,
    "drop_last": True,
    "gradient_accumulation": 2,
    "learning_rate": 0.125,
    "schedule": "cosine",
    "warmup_steps": 6,
    "weight_decay": 0.5,
    "max_grad_norm": 1.5,
    "last_k": 2,
    "blocks": (0, 2),
    "lora_r": 7,
    "lora_alpha": 8.5,
    "lora_dropout": 0.25,
    "lora_init": "gaussian",
    "lora_dora": True,
    "lora_rslora": True,
    "target_modules": ("q_proj", "v_proj"),
    "gradient_checkpointing": True,
    "bf16": True,
    "record_every": 3,
    "keep_every": 17,
    "n_validation": 12,
    "n_prompts": 13,
    "prompt_tokens": 14,
    "new_tokens": 15,
    "stop_at_plateau": True,
    "near_zero_loss": 0.75,
    "patience": 16,
    "seed": 11,
}


@pytest.mark.parametrize(
    ("method", "left_out"),
    [("lora", ("last_k", "packed")), ("late_lora", ("blocks", "add_eos", "pad_short"))],
)
def test_every_field_of_the_recipe_is_an_option(
    method: Method, left_out: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def spy(*args: object, **kwargs: object) -> None:
        calls.append((args, kwargs))
        raise LoadingError("enough")

    monkeypatch.setattr("hyperlens.training.hyperfit", spy, raising=False)
    assert {"preset", "method", *CHANGES} == {field.name for field in fields(Recipe)}
    changes = {name: value for name, value in CHANGES.items() if name not in left_out}
    default = preset("demo", method)
    assert all(getattr(default, name) != value for name, value in changes.items())
    argv = [*HYPERFIT, "--out", "out", "--method", method, "--device", "cpu", "-q"]
    argv += ["--dtype", "float64", "--validation", "tales.csv", "--text-column", "story"]
    argv += ["--no-prefix-cache", "--checkpoint-minutes", "2.5", "--report-to", "wandb,tensorboard"]
    for name, value in changes.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            several = isinstance(value, tuple)
            argv += [f"--{flag}", ",".join(map(str, value)) if several else str(value)]
    assert cli.main(argv) == cli.FAILED
    ((args, kwargs),) = calls
    assert args[0] == "base"
    assert len(args[1]) == 12
    assert kwargs.pop("recipe") == preset("demo", method, **changes)
    assert len(kwargs.pop("validation")) == 12
    assert kwargs == {
        "out": Path("out"),
        "device": "cpu",
        "dtype": "float64",
        "prefix_cache": False,
        "checkpoint_minutes": 2.5,
        "report_to": ("wandb", "tensorboard"),
        "progress": False,
    }


def test_defaults_and_names_are_those_of_hyperfit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(*_: object, **kwargs: object) -> None:
        calls.append(kwargs)
        raise LoadingError("enough")

    monkeypatch.setattr("hyperlens.training.hyperfit", spy, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.main([*HYPERFIT, "--out", "out"])
    (kwargs,) = calls
    parameters = inspect.signature(hyperfit).parameters
    # Callbacks are objects, which no command line can name.
    passed = {"model", "texts", "method", "overrides", "callbacks", *kwargs}
    assert passed == parameters.keys()
    for name in kwargs.keys() - {"recipe", "out"}:
        assert kwargs[name] == parameters[name].default, name


def test_without_options_the_recipe_is_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*_: object, recipe: Recipe, **__: object) -> None:
        seen.append(recipe)
        raise LoadingError("enough")

    monkeypatch.setattr("hyperlens.training.hyperfit", spy, raising=False)
    cli.main([*HYPERFIT, "--out", "out"])
    cli.main([*HYPERFIT[:4], "--out", "out", "--method", "lora"])
    assert seen == [preset("demo"), preset("li2026", "lora")]


# errors


def test_an_existing_folder_is_refused_before_any_work(
    no_models: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("precious")
    for command in (COMPARE, HYPERFIT):
        missing = [*command[:-1], "none.txt"] if command is COMPARE else list(command)
        argv = (*missing, "--out", tmp_path)
        failed(capsys, cli.FAILED, argv, "hyperlens: error:", "already exists: choose a new folder")
        argv = (*missing, "--out", tmp_path / "mine" / "out")
        failed(capsys, cli.FAILED, argv, "not a writable folder")
    assert os.listdir(tmp_path) == ["mine"]
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"base": "./none"}, "model folder ./none does not exist"),
        ({"tuned": "texts.txt"}, "hyperlens: error: "),
        ({"texts.txt": "none.txt"}, "no text file 'none.txt'"),
        ({"texts.txt": "tales.csv", "--text-column": "title"}, "columns of text: id, story"),
        ({"--limit": "0"}, "limit must be at least 1"),
        ({"--batch-size": "0"}, "--batch-size must be at least 1"),
        ({"--max-length": "1"}, "--max-length must be at least 2"),
        ({"--sink-threshold": "-1"}, "--sink-threshold must be"),
        ({"--seed": "-1"}, "seed must be a whole number from 0 to 9223372036854775807, got -1"),
        ({"--device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"--probes": "drift,drift"}, "two probes are named 'drift'"),
        ({"--probes": "drift,ranks"}, "no probe 'ranks': expected one of drift, part"),
        ({"--probes": ","}, "name at least one"),
    ],
    ids=str,
)
def test_errors_of_compare(
    change: dict[str, str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [change.get(part, part) for part in COMPARE]
    argv += [part for key, value in change.items() if key[0] == "-" for part in (key, value)]
    line = failed(capsys, cli.FAILED, (*argv, "--out", tmp_path / "out"), expected)
    assert line.startswith("hyperlens: error: ")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--epochs", "0"), "epochs must be a whole number from 1 up"),
        (("--learning-rate", "0"), "--learning-rate must be a number above 0"),
        (("--sequence-length", "200"), "positions for 64 tokens"),
        (("--sequence-length", "60", "--no-packed"), "hyperlens: error: "),
        (("--method", "late_lora", "--last-k", "4"), "choose 1 to 3"),
        (("--method", "late_lora", "--blocks", "1"), "set --last-k"),
        (("--lora-r", "8"), "--lora-r has no effect with the method full"),
        (("--method", "lora", "--last-k", "2"), "--last-k has no effect with the method lora"),
        (("--patience", "2"), "--patience has no effect without --stop-at-plateau"),
        (("--method", "lora", "--blocks", "1,3"), "indices go from 0 to 2"),
        (("--method", "lora", "--target-modules", "q_porj"), "did you mean q_proj"),
        (("--stop-at-plateau", "--record-every", "0"), "set --record-every"),
        (("--validation", "none.txt"), "no text file 'none.txt'"),
        (("--validation", "texts.txt", "--record-every", "0"), "--record-every is 0"),
        (("--validation", "texts.txt", "--no-packed", "--limit", "4"), "also trained on"),
    ],
    ids=str,
)
def test_errors_of_hyperfit(
    flags: tuple, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = (*HYPERFIT, *SHORT, *flags, "--out", tmp_path / "out")
    line = failed(capsys, cli.FAILED, argv, expected)
    assert line.startswith("hyperlens: error: ")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("cmp",), "invalid choice: 'cmp'"),
        (COMPARE[:3], "required: --texts"),
        (("compare", "base", "--texts", "texts.txt"), "required: TUNED"),
        ((*COMPARE, "--text", "x"), "unrecognized arguments: --text x"),
        ((*COMPARE, "--batch-size", "two"), "invalid int value: 'two'"),
        ((*COMPARE, "--backend", "nnsight"), "choose from"),
        ((*COMPARE, "--dtype", "int8"), "choose from"),
        (HYPERFIT, "required: --out"),
        ((*HYPERFIT, "--out", "out", "--recipe", "nature"), "choose from"),
        ((*HYPERFIT, "--out", "out", "--recipe", "./run"), "there is no ./run: give the folder"),
        ((*HYPERFIT, "--out", "out", "--config", "no.toml"), "cannot read no.toml for --config"),
        ((*HYPERFIT, "--out", "out", "--config"), "argument --config: expected a file"),
        ((*HYPERFIT, "--out", "out", "--method", "half"), "choose from"),
        ((*HYPERFIT, "--out", "out", "--blocks", "last"), "expected indices such as 0,5"),
        (("merge", "adapter"), "required: --out"),
    ],
    ids=str,
)
def test_wrong_usage(
    no_models: None, argv: tuple, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failed(capsys, cli.USAGE, argv, expected)
    assert re.match(r"hyperlens( \w+)?: error: ", line)


def test_a_file_of_options_comes_before_those_that_are_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('texts = "t.txt"\npacked = false\nblocks = [0, 5]\nlora_r = 4\nbf16 = true\n')
    same = tmp_path / "run.json"
    same.write_text(json.dumps({**tomllib.loads(file.read_text()), "device": None}))
    for path in (file, same):
        argv = ["hyperfit", "base", "--out", "out", "--lora-r", "8", "--config", str(path)]
        args = build_parser().parse_args(argv)
        found = (args.texts, args.packed, args.blocks, args.lora_r, args.bf16, args.device)
        assert found == ("t.txt", False, (0, 5), 8, True, None)
    for text, expected in (
        ("lerning_rate = 3", "did you mean --learning-rate?"),
        ("lora_r = ", "cannot read"),
        ("[lora]\nr = 3", "has a table [lora]"),
    ):
        file.write_text(text)
        argv = ("hyperfit", "base", "--texts", "t", "--out", "out", f"--config={file}")
        failed(capsys, cli.USAGE, argv, expected)


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        ((*COMPARE, "--batch-siz", "3"), "--batch-size"),
        ((*COMPARE, "--batch-siz=3"), "--batch-size"),
        ((*COMPARE, "--no-progres"), "--no-progress"),
        (("null-test", *COMPARE[1:], "--n-control", "3", "--seed", "1"), "--n-controls"),
        ((*HYPERFIT, "--out", "out", "--epoch", "3"), "--epochs"),
        (("merge", "adapter", "--out", "out", "--dtyp", "float32"), "--dtype"),
        (("report", "comparison", "--out", "page.html", "--titel", "T"), "--title"),
        (("--verison",), "--version"),
    ],
    ids=str,
)
def test_a_mistyped_option_is_told_which_was_meant(
    no_models: None, argv: tuple, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failed(capsys, cli.USAGE, argv, "unrecognized arguments: ")
    assert line.endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (("compare", "a", "b", "--text", "t.txt"), "--texts instead of --text"),
        ((*HYPERFIT, "--out", "out", "--lr", "3"), "--learning-rate"),
        ((*HYPERFIT, "--out", "out", "--method", "late-lora"), "late_lora"),
        (("hyperfitt", "base"), "hyperfit"),
    ],
    ids=str,
)
def test_names_that_are_nearly_right_are_told_too(
    no_models: None, argv: tuple, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failed(capsys, cli.USAGE, argv, "error").endswith(f"; did you mean {meant}?")


def test_without_a_command_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.OK
    out, err = capsys.readouterr()
    assert err == ""
    assert out == build_parser().format_help()
    assert cli.main(["--help"]) == cli.OK
    assert capsys.readouterr().out == out


class Broken(Exception):
    """Something nobody foresaw."""


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(compare, "compare_models", broken)


def test_the_unforeseen_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, Broken("no\nidea"))
    line = failed(capsys, cli.FAILED, COMPARE, "unexpected error: Broken: no idea", "--debug")
    assert "report" in line


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no\nmore"), MemoryError()])
def test_full_memory_is_no_mistake_of_the_program(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, error)
    line = failed(capsys, cli.FAILED, COMPARE, "error: out of memory: lower --batch-size")
    assert "unexpected" not in line


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if how == "environment":
        monkeypatch.setenv("HYPERLENS_DEBUG", "1")
    for error in (Broken("no idea"), LoadingError("no model")):
        raising(monkeypatch, error)
        assert cli.main([*COMPARE, *(["--debug"] if how == "option" else [])]) == cli.FAILED
        err = capsys.readouterr().err
        assert err.startswith("Traceback")
        assert err.splitlines()[-1].startswith("hyperlens: ")
        assert str(error) in err.splitlines()[-1]


def test_an_interruption_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Comparison) -> None:
        raise KeyboardInterrupt

    # While the folder is being written, the worst moment.
    monkeypatch.setattr(Comparison, "to_frame", interrupted)
    argv = (*COMPARE, "--probes", "drift", "--out", tmp_path / "out")
    assert failed(capsys, cli.INTERRUPTED, argv) == "hyperlens: interrupted"
    assert os.listdir(tmp_path) == []


def test_an_interrupted_training_says_whether_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hyperlens.training.hyperfit", interrupted, raising=False)
    argv = (*HYPERFIT, "--out", tmp_path / "out")
    assert failed(capsys, cli.INTERRUPTED, argv) == "hyperlens: interrupted"
    (tmp_path / "out.partial").mkdir()
    line = failed(capsys, cli.INTERRUPTED, argv, "the same command continues")
    assert line.startswith("hyperlens: interrupted: ")


@pytest.mark.parametrize("method", [(), ("--method", "lora", "--lora-init", "pissa")], ids=str)
def test_the_same_command_goes_on(
    method: tuple,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hyperlens.training.callbacks import Checkpoints

    argv = [*HYPERFIT, *SHORT, *method, "--checkpoint-minutes", "0", "--quiet", "--out"]
    assert cli.main([*argv, str(tmp_path / "whole")]) == cli.OK
    saved = Checkpoints.on_save

    def interrupting(self: Checkpoints, *args: object, **kwargs: object) -> None:
        saved(self, *args, **kwargs)
        raise KeyboardInterrupt

    capsys.readouterr()
    out = str(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "on_save", interrupting)
        failed(capsys, cli.INTERRUPTED, (*argv, out), "continues from the last checkpoint")
    assert not Path(out).exists()
    failed(capsys, cli.FAILED, (*argv, out, "--seed", "3"), "seed 0 there, 3 here")
    assert cli.main([*argv, out]) == cli.OK
    name = "adapter_model.safetensors" if method else "model.safetensors"
    whole, resumed = (tmp_path / folder / name for folder in ("whole", "out"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


# merge


def test_merge_writes_a_folder_that_can_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    lora = ("--method", "lora", "--lora-r", "2", "--quiet")
    assert cli.main([*HYPERFIT, *SHORT, *lora, "--out", adapter]) == cli.OK
    # The adapter names its base as it was given, from here.
    assert cli.main(["merge", adapter, "--out", merged]) == cli.OK
    printed, err = capsys.readouterr()
    assert err == ""
    assert printed.splitlines()[-1] == f"merged weights in {merged}"
    assert cli.main(["compare", "base", merged, "--texts", "texts.txt"]) == cli.OK
    argv = ["merge", adapter, "--base", "base", "--dtype", "bfloat16", "--out"]
    assert cli.main([*argv, str(tmp_path / "small")]) == cli.OK
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("merge", "none"), "adapter folder none does not exist"),
        (("merge", "tuned"), "is not an adapter folder"),
    ],
    ids=str,
)
def test_errors_of_merge(
    argv: tuple, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failed(capsys, cli.FAILED, (*argv, "--out", tmp_path / "out"), expected)
    assert line.startswith("hyperlens: error: ")
    assert os.listdir(tmp_path) == []


# output


def test_several_processes_answer_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main([*COMPARE, "--probes", "drift"]) == cli.OK
    assert capsys.readouterr().out == ""


@pytest.mark.transformer_lens
def test_noise_of_other_libraries_is_kept_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import logging

    def noisy(*args: object, **kwargs: object) -> Comparison:
        print("Moving model to device")
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
        logging.getLogger("transformers.tokenization").warning("sequence is too long")
        return compare_models(*args, **kwargs)

    monkeypatch.setattr(compare, "compare_models", noisy)
    level = logging.root.manager.disable
    assert cli.main([*COMPARE, "--probes", "drift"]) == cli.OK
    out, err = capsys.readouterr()
    assert err == ""
    assert "Moving" not in out
    assert logging.root.manager.disable == level


def test_an_alphabet_without_greek(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.main([*COMPARE, "--probes", "drift,participation_ratio"]) == cli.OK
    sys.stdout.flush()
    assert b"?PR" in raw.getvalue()


def test_a_bar_is_shown_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def spy(*_: object, progress: bool, **__: object) -> None:
        seen.append(progress)
        raise LoadingError("enough")

    monkeypatch.setattr(compare, "compare_models", spy)
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        cli.main(list(COMPARE))
        cli.main([*COMPARE, "--no-progress"])
    assert seen == [True, False, False, False]
    capsys.readouterr()


COMMANDS = [*parsers()]


def test_every_question_has_a_command() -> None:
    own = {"check", "judge", "patch", "reproduce", "sweep"}
    assert {question.command for question in QUESTIONS if question.command} == {
        f"cli.{name.replace('-', '_')}" for name in own
    }
    made = {command_of(question) for question in QUESTIONS if not question.command}
    assert made >= {"compare", "behaviour", "null-test", "temperature", "cross-domain", "mauve"}
    assert set(COMMANDS) == made | own | {"demo", "hyperfit", "merge", "report", "validate"}


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=str)
def test_help_can_be_read(command: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--help"]) == cli.OK
    out, err = capsys.readouterr()
    assert err == ""
    assert "Examples:" in out
    assert "None" not in out
    # Every example is a command that parses, over as many lines as it takes.
    for line in out[out.index("Examples:") :].replace("\\\n", " ").splitlines():
        if line.startswith("  hyperlens "):
            build_parser().parse_args(shlex.split(line)[1:])


def test_the_commands_of_the_readme_parse() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"(?:^|`)(hyperlens \w+ (?!--help)[^`\n]+)", readme, re.M)
    assert len(commands) >= 6
    for command in commands:
        build_parser().parse_args(shlex.split(command, comments=True)[1:])


def test_every_option_says_what_it_does_and_its_default() -> None:
    for parser in parsers().values():
        for action in parser._actions:
            assert action.help, action
            optional = action.option_strings and not action.required
            if optional and action.dest not in ("help", "debug"):
                assert "default" in action.help, action.option_strings


def test_help_says_whose_choice_each_default_is() -> None:
    helps = {name: action.help for name, action in options_of("hyperfit").items()}
    theirs = {name for name in HELP if "the paper's" in (helps.get(name) or "")}
    assert theirs == {"method", "n_sequences", "epochs", "weight_decay", "last_k"}
    for name in HELP.keys() - theirs - {"preset"}:
        assert re.search(r"\(default: .*, ours", helps[name]), name
    assert helps["lora_r"].endswith("(default: 16, ours)")
    assert helps["epochs"].endswith("(default: 260, the paper's; carlsson2025: 30; demo: 60)")


# as a program


def program(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hyperlens", *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.transformer_lens
@pytest.mark.slow
def test_the_program_compares(tmp_path: Path) -> None:
    # Other libraries' warnings must stay away here too, where pytest does not hide them.
    done = program(*COMPARE, "--out", str(tmp_path / "out"), PYTHONWARNINGS="default")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"saved in {tmp_path / 'out'}" in done.stdout


def test_the_program_fails_with_one_line(tmp_path: Path) -> None:
    done = program("compare", "./none", "tuned", "--texts", "texts.txt")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "hyperlens: error: model folder ./none does not exist: give a folder written by "
        "save_pretrained, or a hub id\n"
    )
    assert program("compare").returncode == cli.USAGE


def test_version_and_help_load_nothing_heavy() -> None:
    done = program("--version")
    assert (done.returncode, done.stdout) == (0, f"hyperlens {__version__}\n")
    code = (
        "import sys; from hyperlens.cli import main\n"
        f"codes = [main([*command, '--help']) for command in [[], *([c] for c in {COMMANDS})]]\n"
        "codes += [main([]), main(['compare', 'a', 'b', '--texts', 'none.txt'])]\n"
        "codes += [main(['compare', 'a', 'b', '--texts', 'none.txt', '--text', 'x'])]\n"
        "print(*codes, *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    *_, last = done.stderr.splitlines()
    n_helps = len(COMMANDS) + 2
    codes, loaded = last.split()[: n_helps + 2], set(last.split()[n_helps + 2 :])
    assert [int(code) for code in codes] == [cli.OK] * n_helps + [cli.FAILED, cli.USAGE]
    for command in COMMANDS:
        assert f"usage: hyperlens {command} " in done.stdout
    assert "hyperlens.cli.options" in loaded
    heavy = {"torch", "transformers", "numpy", "pandas", "scipy", "altair", "datasets", "peft"}
    assert not loaded & heavy


def test_a_signal_interrupts_the_program(tmp_path: Path) -> None:
    # Interrupted for certain while texts are read: from a pipe that nobody writes to.
    pipe = tmp_path / "texts.txt"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hyperlens", "compare", "base", "tuned"),
            *("--texts", str(pipe), "--out", str(tmp_path / "out")),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # Opening our end returns once the program has opened its own; a moment later it is reading.
    # (In between, the interrupt could meet code whose exceptions Python drops.)
    with process, pipe.open("w"):
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (cli.INTERRUPTED, "", "hyperlens: interrupted\n")
    assert os.listdir(tmp_path) == ["texts.txt"]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("lower batch_size, now 8", "lower --batch-size, now 8"),
        ("pass dtype='float32' or base=… (--base)", "pass --dtype float32 or --base …"),
        ("set packed=True or drop_last=False", "set --packed or --no-drop-last"),
        ("read_texts(…, groups=1), or --groups 1", "read_texts(…, groups=1), or --groups 1"),
        ("no /tmp/batch_size/x; 'batch_size' is no field", None),
        ("lower other_size, or a=1", None),
        ("keep dtype=False", None),
        ("dtype must be one of these", "--dtype must be one of these"),
        ("models must be one of these", None),
    ],
)
def test_errors_name_options_not_arguments(message: str, said: str | None) -> None:
    known = ["--batch-size", "--dtype", "--base", "--packed", "--no-drop-last", "--groups"]
    assert as_options(message, known) == (said or message)


def test_an_error_of_a_command_is_in_its_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, LoadingError("lower batch_size, or pass include_bos=False"))
    said = "error: lower --batch-size, or pass --no-include-bos"
    failed(capsys, cli.FAILED, COMPARE, said)
