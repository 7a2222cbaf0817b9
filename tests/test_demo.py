"""The demo runs, reuses what is done, goes on after Ctrl-C, and leaves other folders alone."""

from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import pytest
from conftest import unchecked

from hyperlens import Comparison, cli, demo
from hyperlens.training import hyperfit


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One epoch, few prompts, one control: what is tested is the order of things."""
    methods = {
        name: MappingProxyType({**options, "epochs": 1, "n_sequences": 4, "sequence_length": 32})
        for name, options in demo.METHODS.items()
    }
    monkeypatch.setattr(demo, "METHODS", methods)
    look, measure, test = demo.compare_models, demo.measure_behaviour, demo.run_null_test
    monkeypatch.setattr(
        demo, "compare_models", lambda *a, **k: look(*a[:2], a[2][:4], max_length=32, **k)
    )
    few = {"n_prompts": 2, "max_new_tokens": 4}
    monkeypatch.setattr(
        demo, "measure_behaviour", lambda *a, **k: measure(*a[:2], a[2][:4], **k, **few)
    )
    monkeypatch.setattr(
        demo,
        "run_null_test",
        lambda *a, **k: test(*a[:2], a[2][:4], max_length=32, **k, **few),
    )
    monkeypatch.setattr(demo, "N_CONTROLS", 1)
    monkeypatch.setattr(demo, "_train", short_training)
    # Whether shapes and types fit is tested function by function.
    with unchecked():
        yield


def short_training(name: str, tales: list[str], out: Path, progress: bool) -> None:
    options = dict(demo.METHODS[name])
    hyperfit(demo.embedded_base(), tales[:8], recipe="demo", out=out, record_every=0,
             progress=progress, **options)  # fmt: skip


@pytest.mark.usefixtures("short")
def test_it_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    command = ["demo", "--out", str(out), "-q"]
    real = demo.run_null_test

    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_null_test", interrupted)
    assert cli.main(command) == cli.INTERRUPTED
    assert "goes on" in capsys.readouterr().err
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert out / "results/all-weights/behaviour/behaviour.json" in done
    assert not (out / "report.html").exists()

    monkeypatch.setattr(demo, "run_null_test", real)
    assert cli.main(command) == cli.OK
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    ttr, controls = (
        next(i for i, line in enumerate(lines) if line.startswith(words))
        for words in ("greedy type-token ratio", "    1 random change")
    )
    assert controls == ttr + 1
    assert sum("random change" in line and "0." in line for line in lines) >= 2
    for words in (
        "greedy repeated bigrams",
        "Δ dimension at the last layer, all blocks together",
        "... added by the last block",
        "... that scripts see the last block add, BOS counted in",
        "all-weights: ",
        # Which words the verdict has depends on numbers of models that hardly trained.
        "andom changes of the same size",
        "not evidence about large models",
    ):
        assert words in " ".join(printed.split())
    assert str(out / "report.html") in printed
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    late = Comparison.load(out / "results/late-stage-lora/comparison")
    frozen = [row.value for row in late.select("drift", "relative_l2", "raw")[:6]]
    assert frozen == [0] * 6

    def again(*args: object) -> None:
        raise AssertionError("nothing is to be done again")

    monkeypatch.setattr(demo, "_train", again)
    monkeypatch.setattr(demo, "run_null_test", again)
    assert cli.main(command) == cli.OK
    assert capsys.readouterr().out == printed


def test_it_leaves_other_folders_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert cli.main(["demo", "--out", str(tmp_path)]) == cli.FAILED
    assert "choose a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    other = tmp_path / "other"
    other.mkdir()
    (other / demo.STAMP).write_text("{}")
    assert cli.main(["demo", "--out", str(other)]) == cli.FAILED
    assert "another version" in capsys.readouterr().err
    assert cli.main(["demo", "--out", str(tmp_path / "mine.txt")]) == cli.FAILED
    assert "choose" in capsys.readouterr().err
