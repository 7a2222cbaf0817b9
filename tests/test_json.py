"""--json: one document on stdout whatever happens, which the documented schema describes."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_VOCAB, make_tiny, perturbed
from jsonschema import Draft202012Validator
from test_cli import COMMANDS, SHORT, Broken, parsers, tokenizer
from test_results import make_comparison

from hyperlens import Comparison, cli, compare
from hyperlens.cli.schema import json_schema
from hyperlens.errors import LoadingError
from hyperlens.questions import QUESTIONS, result_class

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = Draft202012Validator(json_schema())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, tuned/ and texts.txt: forty texts of 30 words."""
    folder = tmp_path_factory.mktemp("json")
    base = make_tiny("llama")
    for name, model in (("base", base), ("tuned", perturbed(base, 0.2))):
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, D_VOCAB, (40, 30), generator=generator).tolist()
    texts = [" ".join(f"w{i}" for i in row) for row in rows]
    (folder / "texts.txt").write_text("\n\n".join(texts))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    pairs = [{"context": "Once", "a": f"short {i}", "b": f"long long {i}"} for i in range(4)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


@pytest.fixture(autouse=True)
def _here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.delenv("HYPERLENS_DEBUG", raising=False)


PAIR = ("base", "tuned", "--texts", "texts.txt")
COMPARE = ("compare", *PAIR, "--probes", "drift,logit_lens", "--limit", "8")
FEW = ("--n-prompts", "4", "--prompt-tokens", "5", "--max-new-tokens", "4")


def document(
    capsys: pytest.CaptureFixture[str], *argv: object, code: int = cli.OK
) -> tuple[dict[str, Any], str]:
    """What a command prints with --json, checked against the schema, and its stderr."""
    assert cli.main([*map(str, argv), "--json"]) == code
    out, err = capsys.readouterr()
    found = json.loads(out)
    SCHEMA.validate(found)
    assert "NaN" not in out
    assert "Infinity" not in out
    return found, err


# the schema


def test_the_schema_in_the_docs_is_that_of_the_code() -> None:
    Draft202012Validator.check_schema(json_schema())
    written = json.loads((ROOT / "docs/hyperlens.schema.json").read_text(encoding="utf-8"))
    assert written == json_schema(), "run scripts/write_schema.py"


def test_every_result_has_its_own_schema() -> None:
    defined = json_schema()["$defs"]
    for question in QUESTIONS:
        table = defined[question.name]["properties"]["table"]
        assert tuple(table["items"]["properties"]) == result_class(question).columns


def valid(change: Any) -> bool:
    """Whether a changed comparison is one of the documents."""
    found = json.loads(make_comparison(2).to_json())
    found["table"] = found["table"][:2]
    change(found)
    return bool(SCHEMA.is_valid(found))


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.pop("format"),
        lambda one: one.update(name="comparisons"),
        lambda one: one.update(format=1),
        lambda one: one.update(more={}),
        lambda one: one["table"][0].pop("low"),
        lambda one: one["table"][0].update(p=0.5),
        lambda one: one["table"][0].update(layer="1"),
        lambda one: one["table"][0].update(value=None),
        lambda one: one["table"][0].update(value={"float": "NaN"}),
        lambda one: one["meta"].update(notes="none"),
        lambda one: one["meta"]["base"].pop("name"),
        lambda one: one.update(error={"kind": "a", "message": "b"}),
    ],
)
def test_the_schema_refuses_other_documents(change: Any) -> None:
    assert valid(lambda one: None)
    assert not valid(change)


def test_not_a_number_is_an_object() -> None:
    rows = json.loads(make_comparison(2).to_json())["table"]
    nowhere = [row for row in rows if row["low"] == {"float": "nan"}]
    assert nowhere
    SCHEMA.validate({**json.loads(make_comparison(2).to_json()), "table": nowhere})


# documents


def test_every_command_has_it() -> None:
    commands = parsers()
    assert list(commands) == COMMANDS
    for parser in commands.values():
        (option,) = (one for one in parser._actions if one.dest == "json")
        assert option.option_strings == ["--json"]


def test_a_comparison_is_the_file_that_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    found, err = document(capsys, *COMPARE, "--out", out)
    assert found == json.loads((out / "comparison.json").read_text())
    assert err.startswith(f"saved in {out}: comparison.json, ")
    # The same numbers as in Python, bit for bit.
    loaded = Comparison.load(out)
    values = [row["value"] for row in found["table"]]
    assert values == [row.value for row in loaded.long if math.isfinite(row.value)]

    page = tmp_path / "page.html"
    several, err = document(capsys, "report", tmp_path, "--out", page)
    assert (several["name"], several["results"]) == ("report", [found])
    assert err.startswith(f"{page}: 1 result (comparison)")


def test_without_a_folder_stderr_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    found, err = document(capsys, "weights", "base", "tuned", "-q")
    assert found["name"] == "weights"
    assert len(found["table"]) > 20
    assert err == ""


def test_training_and_merging(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    lora = ("--method", "lora", "--lora-r", "2", "--record-every", "0", "-q")
    argv = ("hyperfit", "base", "--texts", "texts.txt", "--recipe", "demo", *SHORT, *lora)
    found, err = document(capsys, *argv, "--out", adapter)
    record = json.loads((adapter / "hyperfit.json").read_text())
    assert found == {"format": 2, "name": "hyperfit", "folder": str(adapter), **record}
    assert err == f"weights in {adapter}\n"
    found, err = document(capsys, "merge", adapter, "--out", merged)
    assert found == {"format": 2, "name": "merge", "folder": str(merged)}
    assert err == f"merged weights in {merged}\n"


def test_a_validation_and_a_judge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"norm": "all", "part alone": "unembedding"}
    monkeypatch.setattr("hyperlens.validation.experiment.answers_of", lambda *_, **__: answers)
    found, err = document(capsys, "validate", "--only", "norm", "--planted", "1", "-q")
    assert (found["name"], err) == ("validation", "")
    found, err = document(capsys, "judge", "--pairs", "pairs.jsonl", "--judge-rule", "-q")
    assert (found["name"], err) == ("judge", "")


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("behaviour", (*PAIR, *FEW)),
        ("null-test", (*PAIR, *FEW, "--n-controls", "1")),
        ("provenance", (*PAIR, *FEW)),
        ("temperature", (*PAIR, *FEW)),
        ("static-bias", (*PAIR, *FEW, "--alphas", "0.1")),
        ("decoding", (*PAIR, *FEW)),
        ("variants", ("base", "--variant", "one", "tuned", "--texts", "texts.txt", *FEW)),
        (
            "cross-domain",
            (
                *("--pair", "one", "base", "tuned", "--texts", "a", "texts.txt"),
                *("--texts", "b", "texts.jsonl", *FEW),
            ),
        ),
        ("patch", (*PAIR, *FEW, "--n-texts", "8")),
        ("judge", (*PAIR, *FEW, "--judge-rule")),
        ("mauve", ("texts.txt", "texts.jsonl", "--features", "base")),
        ("reproduce", ("--scale", "smoke", "--dry-run", "--out", "never")),
        ("compare", (*PAIR, "--dry-run")),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_what_each_command_prints_fits_the_schema(
    name: str, argv: tuple, capsys: pytest.CaptureFixture[str]
) -> None:
    found, err = document(capsys, name, *argv, "-q")
    planned = {"reproduce": "plan", "compare": "comparison_plan"}
    assert found["name"] == planned.get(name, name.replace("-", "_"))
    assert err == ""


# errors


def test_an_error_is_a_document_and_the_same_line_and_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["compare", "./none", "tuned", "--texts", "texts.txt"]
    assert cli.main(argv) == cli.FAILED
    line = capsys.readouterr().err
    found, err = document(capsys, *argv, code=cli.FAILED)
    assert err == line
    assert found["error"]["kind"] == "LoadingError"
    assert line == f"hyperlens: error: {found['error']['message']}\n"


@pytest.mark.parametrize(
    ("error", "code", "kind", "message"),
    [
        (KeyboardInterrupt(), cli.INTERRUPTED, "KeyboardInterrupt", "interrupted"),
        (MemoryError(), cli.FAILED, "MemoryError", "out of memory: lower --batch-size"),
        (LoadingError("no\nmodel"), cli.FAILED, "LoadingError", "no model"),
        (Broken("no\nidea"), cli.FAILED, "Broken", "Broken: no idea"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_every_failure_is_a_document(
    error: BaseException,
    code: int,
    kind: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(compare, "compare_models", broken)
    found, err = document(capsys, *COMPARE, code=code)
    assert found["error"]["kind"] == kind
    assert found["error"]["message"].startswith(message)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((*COMPARE, "--batch-siz", "3"), "did you mean --batch-size?"),
        (("compare", "base", "tuned"), "required: --texts"),
        (("cmpare", *PAIR), "did you mean compare?"),
    ],
    ids=str,
)
def test_wrong_usage_is_a_document(
    argv: tuple, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, err = document(capsys, *argv, code=cli.USAGE)
    assert found["error"]["kind"] == "UsageError"
    assert message in found["error"]["message"]
    assert err.startswith("usage: ")


def test_what_is_no_json_is_an_error_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def odd(*_: object, **__: object) -> Comparison:
        return Comparison.of((), {"drift": {"a set": {1}}}, {"n_layers": 2})

    monkeypatch.setattr(compare, "compare_models", odd)
    found, _ = document(capsys, *COMPARE, code=cli.FAILED)
    assert found["error"]["kind"] == "ResultsError"
    assert "not JSON" in found["error"]["message"]


# stdout is the document's alone


@pytest.mark.parametrize("debug", [(), ("--debug",)], ids=str)
def test_other_libraries_print_elsewhere(
    debug: tuple, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy(*_: object, **__: object) -> Comparison:
        print("Moving model to device")
        return make_comparison(2)

    monkeypatch.setattr(compare, "compare_models", noisy)
    with warnings.catch_warnings():
        _, err = document(capsys, *COMPARE, *debug)
    assert ("Moving" in err) is bool(debug)


def test_of_several_processes_one_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "compare_models", lambda *_, **__: make_comparison(2))
    monkeypatch.setenv("RANK", "1")
    assert cli.main([*COMPARE, "--json"]) == cli.OK
    assert cli.main(["compare", "./none", "tuned", "--texts", "none.txt", "--json"]) == cli.FAILED
    assert capsys.readouterr().out == ""
