"""`hyperlens judge` against a real server: goes on after an interruption, keeps keys to itself."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import short
from judge_for_tests import KEY, Act, after, fails, longer, says, serving, verdict

from hyperlens import cli, write_report
from hyperlens.cli.judge import GENERATION
from hyperlens.errors import JudgeError
from hyperlens.judging import Endpoint, JudgeResult, judge_continuations, judge_models

ROOT = Path(__file__).resolve().parent.parent
N = 8
EVIL = '<script>alert("x")</script><img src=x onerror=y> & \ud800 {}'


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    records = (
        {"context": f"Once {i}", "a": f"short {i}", "b": f"rather long {i}"} for i in range(N)
    )
    file.write_text("\n".join(map(json.dumps, records)))
    return file


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


def command(pairs: Path, url: str, out: Path) -> list[str]:
    judge = ["--judge-url", url, "--judge-model", "m", "--key-env", "MY_KEY", "--retries", "1"]
    return ["judge", "--pairs", str(pairs), *judge, "--out", str(out)]


def files_with(secret: str, *folders: Path) -> list[Path]:
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert files
    return [file for file in files if secret.encode() in file.read_bytes()]


def test_every_pair_is_asked_in_both_orders(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    with serving(lambda n, prompt: says(f"Sure!\n{longer(prompt)}")) as server:
        assert cli.main(command(pairs, server.url, out)) == cli.OK
    printed, err = capsys.readouterr()
    found = JudgeResult.load(out)
    assert printed.startswith(found.summary())
    assert err == ""
    assert found.value(criterion="overall", metric="b_wins") == 1
    assert found.meta["judge"] == {
        "kind": "endpoint",
        "url": server.url,
        "model": "m",
        "parameters": {"temperature": 0, "max_tokens": 800},
    }
    prompts = set(server.prompts)
    assert len(server.requests) == len(prompts) == 2 * N
    for i in range(N):
        shown = [p.index(f"short {i}") < p.index(f"rather long {i}")
                 for p in prompts if f"Once {i}\n" in p]  # fmt: skip
        assert sorted(shown) == [False, True]
    kept = tmp_path / "deep" / "out.answers"
    assert len(list(kept.iterdir())) == 2 * N
    assert not files_with(KEY, out, kept)
    assert {request["headers"]["Authorization"] for request in server.requests} == {f"Bearer {KEY}"}


def test_what_was_answered_is_not_asked_again(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, kept = tmp_path / "out", tmp_path / "out.answers"

    def runs_out(n: int, prompt: str) -> Act:
        return says(longer(prompt)) if n < 5 else fails(401, f"no more for {KEY}")

    with serving(runs_out) as server:
        assert cli.main([*command(pairs, server.url, out), "--workers", "1"]) == cli.FAILED
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(r"HTTP 401: no more for \[key\]\): check .* MY_KEY; 5 answers are", line)
        assert not out.exists()
        assert len(list(kept.iterdir())) == 5
        assert len(server.requests) == 6
        server.script = lambda n, prompt: says(longer(prompt))
        assert cli.main(command(pairs, server.url, out)) == cli.OK
        assert len(server.requests) == 6 + 2 * N - 5
        # A third run, whatever the number of workers, asks nothing and finds the same.
        again = [*command(pairs, server.url, tmp_path / "again"), "--cache", str(kept)]
        assert cli.main([*again, "--workers", "2"]) == cli.OK
        assert len(server.requests) == 6 + 2 * N - 5
        assert JudgeResult.load(tmp_path / "again") == JudgeResult.load(out)
        # Another question, another answer: parameters are part of it.
        hotter = [*command(pairs, server.url, tmp_path / "hot"), "--cache", str(kept)]
        assert cli.main([*hotter, "--judge-parameters", '{"temperature": 1}']) == cli.OK
        assert len(server.requests) == 6 + 4 * N - 5
    assert not files_with(KEY, out, kept, tmp_path / "hot")


def test_answers_that_could_not_be_read_are_kept_too(pairs: Path, tmp_path: Path) -> None:
    def script(n: int, prompt: str) -> Act:
        return says(longer(prompt) if "no use" in prompt else longer(prompt)[:-9])

    with serving(script) as server:
        judge = Endpoint(server.url, "m", pause=0.001)
        options: dict[str, Any] = {"cache": tmp_path / "kept", "progress": False}
        found = judge_continuations(pairs, judge=judge, **options)
        assert len(server.requests) == 4 * N
        assert judge_continuations(pairs, judge=judge, **options) == found
        assert len(server.requests) == 4 * N
        assert found.extras["counts"]["judged"] == N
        # Damage to one of them costs one request, and is said.
        next((tmp_path / "kept").iterdir()).write_text("{")
        mended = judge_continuations(pairs, judge=judge, **options)
        assert len(server.requests) == 4 * N + 1
        assert mended.table == found.table
        assert "1 kept answers were damaged" in mended.summary()


def test_a_function_says_who_it_is_before_its_answers_are_kept(pairs: Path, tmp_path: Path) -> None:
    def judge(prompt: str) -> str:
        return longer(prompt)

    with pytest.raises(JudgeError, match="attribute `identity`"):
        judge_continuations(pairs, judge=judge, cache=tmp_path / "kept", progress=False)
    assert not (tmp_path / "kept").exists()
    judge.identity = {"version": 1}
    found = judge_continuations(pairs, judge=judge, cache=tmp_path / "kept", progress=False)
    assert found.meta["judge"]["version"] == 1
    assert len(list((tmp_path / "kept").iterdir())) == 2 * N


@pytest.mark.parametrize("script", short(["error", "signal"], "signal"))
def test_ctrl_c_and_the_same_command_go_on(pairs: Path, tmp_path: Path, script: str) -> None:
    enough = threading.Event()

    def slow(n: int, prompt: str) -> Act:
        if n >= 6:
            enough.set()
            return after(30, says(longer(prompt)))
        return says(longer(prompt))

    out = tmp_path / "out"
    with serving(slow) as server:
        argv = [sys.executable, "-m", "hyperlens", *command(pairs, server.url, out)]
        process = subprocess.Popen(
            [*argv, *(["--timeout", "1"] if script == "error" else [])],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        with process:
            assert enough.wait(60)
            kept = tmp_path / "out.answers"
            if script == "signal":
                while len(list(kept.glob("*.json"))) < 6 and process.poll() is None:
                    time.sleep(0.01)
                process.send_signal(signal.SIGINT)
            try:
                printed, err = process.communicate(timeout=20)
            finally:
                process.kill()
        assert printed == ""
        (line,) = err.splitlines()
        assert "6 answers are kept in" in line
        assert KEY not in line
        if script == "signal":
            assert process.returncode == cli.INTERRUPTED
            assert "interrupted" in line
        else:
            assert process.returncode == cli.FAILED
            assert "no answer after 1 retries (" in line
        assert not out.exists()
        before = len(server.requests)
        server.script = lambda n, prompt: says(longer(prompt))
        assert cli.main(command(pairs, server.url, out)) == cli.OK
        assert len(server.requests) == before + 2 * N - 6
    assert JudgeResult.load(out).value(criterion="overall", metric="b_wins") == 1
    assert not files_with(KEY, out, tmp_path / "out.answers")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--judge-rule"], "two models and --texts, or --pairs alone"),
        (["a", "--pairs", "PAIRS", "--judge-rule"], "two models and --texts, or --pairs alone"),
        (["a", "b", "--judge-rule"], "two models and --texts, or --pairs alone"),
        (["--pairs", "PAIRS", "--judge-url", "http://h/v1"], "--judge-url needs --judge-model"),
        (["--pairs", "none.jsonl", "--judge-rule"], "cannot read pairs from none.jsonl"),
        (["--pairs", "PAIRS", "--judge-folder", "./none"], "./none does not exist"),
        (["--pairs", "PAIRS", "--judge-rule", "--tries", "0"], "tries must be at least 1"),
        (["--pairs", "PAIRS", "--judge-rule", "--cache", "PAIRS"], "cannot keep answers in"),
        (
            ["--pairs", "PAIRS", "--judge-rule", "--limit", "3"],
            "--limit is for two models and --texts",
        ),
        (["--pairs", "PAIRS", "--judge-rule", "--n-prompts", "100"], "--n-prompts is for"),
        (["--pairs", "PAIRS", "--judge-rule", "--seed", "0"], "--seed is for"),
        (["--pairs", "PAIRS", "--judge-rule", "--split", "test"], "--split is for"),
        (["--pairs", "PAIRS", "--judge-rule", "--text-column", "a"], "--text-column is for"),
        (["--pairs", "PAIRS", "--judge-rule", "--dtype", "float32"], "--dtype is for"),
    ],
)
def test_errors_are_one_line(
    options: list[str], said: str, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(pairs) if option == "PAIRS" else option for option in options]
    assert cli.main(["judge", *argv]) == cli.FAILED
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert said in line


def test_what_models_write_is_as_the_command_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    def spy(*_: Any, **options: Any) -> None:
        asked.append(options)
        raise JudgeError("enough")

    monkeypatch.setattr("hyperlens.judging.judge.judge_models", spy)
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    command = ["judge", "a", "b", "--texts", str(tmp_path / "texts.txt"), "--judge-rule"]
    cli.main([*command, "--n-prompts", "7", "--seed", "0", "--tries", "2"])
    cli.main(command)
    first, second = asked
    assert (first["n_prompts"], first["seed"], first["tries"]) == (7, 0, 2)
    # What is not on the command line is the library's default, which --help names.
    assert not set(GENERATION) & second.keys()
    assert cli.main(["judge", "--help"]) == cli.OK
    text = " ".join(capsys.readouterr().out.split())
    for name in (*GENERATION, "tries", "n_examples"):
        default = inspect.signature(judge_models).parameters[name].default
        option = f"--{name.replace('_', '-')}"
        assert re.search(rf"{option} N [^(]*\(default: {default}\)", text), name


def test_wrong_usage(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--judge-rule", "--judge-folder", "x"], ["--judge-parameters", "3"]):
        assert cli.main(["judge", "--pairs", str(pairs), *options]) == cli.USAGE
        assert "usage:" in capsys.readouterr().err


def test_the_page_escapes_what_judges_and_models_say(tmp_path: Path) -> None:
    records = [{"context": EVIL, "a": EVIL, "b": f"{EVIL} {i}"} for i in range(3)]

    def judge(prompt: str) -> str:
        return "<b>no</b>" if " 2\n" in prompt else verdict("tie", (1, 10), reason=EVIL)

    found = judge_continuations(records, judge=judge, names=(EVIL, "$\\frac$"), progress=False)
    page = write_report(tmp_path / "page.html", [found]).read_text(encoding="utf-8")
    body = page[page.index("<body>") : page.index("<script>")]
    assert "&lt;script&gt;" in body
    for raw in ("<script>alert", "<img", "<b>no"):
        assert raw not in body
    assert "answers that could not be read" in body
    found.save(tmp_path / "out")
