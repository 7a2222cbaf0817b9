"""The command line: exit codes, one-line errors, and nothing written on failure."""

import inspect
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import D_VOCAB, make_tiny, perturbed
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hyperlens import Comparison, __version__, cli, compare, compare_models, options
from hyperlens.errors import LoadingError
from hyperlens.probes import default_probes
from hyperlens.training import Recipe, hyperfit, preset

ROOT = Path(__file__).resolve().parent.parent
SAVED = {"comparison.json", "layers.csv", "layers.png", "summary.txt"}


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
SHORT = ("--n-sequences", "4", "--sequence-length", "6", "--epochs", "2", "--batch-size", "2")


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

    monkeypatch.setattr(compare, "open_pair", opened)
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
    assert set(os.listdir(out)) >= SAVED
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
        "--text-column story --limit 4"
    )
    argv = ["compare", "base", "tuned", "--texts", "tales.csv", *flags.split()]
    assert cli.main([*argv, "--out", str(tmp_path / "out")]) == cli.OK
    # TransformerLens says where it moves a model; that is not our output.
    assert "Moving model" not in capsys.readouterr().out
    ((args, kwargs),) = calls
    assert args[:2] == ("base", "tuned")
    assert len(args[2]) == 4
    assert [probe.name for probe in kwargs.pop("probes")] == ["logit_lens", "drift"]
    assert kwargs == {
        "max_length": 7,
        "batch_size": 3,
        "include_bos": True,
        "sink_threshold": 0.0,
        "backend": "bridge",
        "device": "cpu",
        "dtype": "float32",
        "seed": 5,
        "progress": False,
    }
    meta = Comparison.load(tmp_path / "out").meta
    assert (meta["dtype"], meta["backend"], meta["seed"]) == ("float32", "bridge", 5)
    assert meta["options"]["include_bos"] is True


def test_defaults_and_names_are_those_of_the_library() -> None:
    args = vars(options.build_parser().parse_args(list(COMPARE)))
    parameters = inspect.signature(compare_models).parameters
    for name, parameter in parameters.items():
        assert name in args
        if parameter.default is not inspect.Parameter.empty:
            assert args[name] == parameter.default, name
    assert tuple(probe.name for probe in default_probes()) == options.PROBES


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
    assert err == ""
    assert f"weights in {out}" in printed
    record = json.loads((out / "hyperfit.json").read_text())
    assert record["recipe"]["epochs"] == 2
    assert len(record["history"]) == 2
    assert f"{record['history'][-1]:.3f} in the last" in printed
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
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[4:] == [
        *("--texts", "tales.csv", "--text-column", "story", "--limit", "9"),
        *("--out", f"{out}-comparison"),
    ]


def test_every_field_of_the_recipe_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(*args: object, **kwargs: object) -> None:
        calls.append((args, kwargs))
        raise LoadingError("enough")

    monkeypatch.setattr("hyperlens.training.hyperfit", spy, raising=False)
    changes = {
        "n_sequences": 3,
        "sequence_length": 9,
        "packed": False,
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
        "lora_r": 7,
        "lora_alpha": 8.5,
        "lora_dropout": 0.25,
        "target_modules": ("q_proj", "v_proj"),
        "gradient_checkpointing": True,
        "bf16": True,
        "seed": 11,
    }
    assert {"preset", "method", *changes} == {field.name for field in fields(Recipe)}
    argv = [*HYPERFIT, "--out", "out", "--method", "late_lora", "--device", "cpu", "-q"]
    argv += ["--dtype", "float64"]
    for name, value in changes.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            argv += [f"--{flag}", ",".join(value) if isinstance(value, tuple) else str(value)]
    assert cli.main(argv) == cli.FAILED
    ((args, kwargs),) = calls
    assert args[0] == "base"
    assert len(args[1]) == 12
    assert kwargs.pop("recipe") == preset("demo", "late_lora", **changes)
    assert kwargs == {"out": Path("out"), "device": "cpu", "dtype": "float64", "progress": False}
    assert {*kwargs, "recipe"} <= inspect.signature(hyperfit).parameters.keys()


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
        ({"--batch-size": "0"}, "batch_size must be at least 1"),
        ({"--max-length": "1"}, "max_length must be at least 2"),
        ({"--sink-threshold": "-1"}, "sink_threshold must be"),
        ({"--seed": "-1"}, "seed must not be negative"),
        ({"--device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"--probes": "drift,drift"}, "two probes are named 'drift'"),
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
        (("--learning-rate", "0"), "learning_rate must be a number above 0"),
        (("--sequence-length", "200"), "positions for 64 tokens"),
        (("--sequence-length", "60", "--no-packed"), "hyperlens: error: "),
    ],
    ids=str,
)
def test_errors_of_hyperfit(
    flags: tuple, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failed(capsys, cli.FAILED, (*HYPERFIT, *flags, "--out", tmp_path / "out"), expected)
    assert line.startswith("hyperlens: error: ")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), "required: COMMAND"),
        (("cmp",), "invalid choice: 'cmp'"),
        (COMPARE[:3], "required: --texts"),
        (("compare", "base", "--texts", "texts.txt"), "required: TUNED"),
        ((*COMPARE, "--text", "x"), "unrecognized arguments: --text x"),
        ((*COMPARE, "--batch-size", "two"), "invalid int value: 'two'"),
        ((*COMPARE, "--backend", "nnsight"), "choose from"),
        ((*COMPARE, "--dtype", "int8"), "choose from"),
        ((*COMPARE, "--probes", "drift,ranks"), "no probe 'ranks': choose among drift, part"),
        ((*COMPARE, "--probes", ","), "choose among drift"),
        (HYPERFIT, "required: --out"),
        ((*HYPERFIT, "--out", "out", "--recipe", "nature"), "choose from"),
        ((*HYPERFIT, "--out", "out", "--method", "half"), "choose from"),
    ],
    ids=str,
)
def test_wrong_usage(
    no_models: None, argv: tuple, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failed(capsys, cli.USAGE, argv, expected)
    assert re.match(r"hyperlens( \w+)?: error: ", line)


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


# output


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


@pytest.mark.parametrize("command", [(), ("compare",), ("hyperfit",)], ids=str)
def test_help_can_be_read(command: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--help"]) == cli.OK
    out, err = capsys.readouterr()
    assert err == ""
    assert "Examples:" in out
    assert "None" not in out.replace("None for all", "")
    # Every example is a command that parses.
    for line in out[out.index("Examples:") :].splitlines():
        if line.startswith("  hyperlens "):
            options.build_parser().parse_args(shlex.split(line)[1:])


def test_every_option_says_what_it_does_and_its_default() -> None:
    (commands,) = (
        action.choices
        for action in options.build_parser()._actions
        if isinstance(action.choices, dict)
    )
    assert set(commands) == {"compare", "hyperfit"}
    for parser in commands.values():
        for action in parser._actions:
            assert action.help, action
            optional = action.option_strings and not action.required
            if optional and action.dest not in ("help", "debug"):
                assert "default" in action.help, action.option_strings


# as a program


def program(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hyperlens", *argv],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


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
        "import sys; from hyperlens.cli import main; main(['hyperfit', '--help']); "
        "main(['compare', 'a', 'b', '--texts', 'none.txt']); "
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stderr.split())
    assert "hyperlens.options" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "pandas", "datasets", "peft"}


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
    # Opening our end returns once the program has opened its own.
    with process, pipe.open("w"):
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (cli.INTERRUPTED, "", "hyperlens: interrupted\n")
    assert os.listdir(tmp_path) == ["texts.txt"]
