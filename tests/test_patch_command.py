"""`hyperlens patch`: all parts in one folder, kept as they are done, and refusals in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_VOCAB, make_tiny, perturbed
from test_cli import tokenizer

from hyperlens import cli
from hyperlens.cli import patch
from hyperlens.questions import read_results


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, tuned/ and texts.jsonl: forty texts of 30 words."""
    folder = tmp_path_factory.mktemp("patch")
    base = make_tiny("llama")
    for name, model in (("base", base), ("tuned", perturbed(base, 0.2))):
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, D_VOCAB, (40, 30), generator=generator).tolist()
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in rows]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


def command(home: Path, *more: str) -> list[str]:
    pair = ["patch", str(home / "base"), str(home / "tuned"), "--texts", str(home / "texts.jsonl")]
    quick = ["--prompt-tokens", "5", "--max-new-tokens", "2", "--n-prompts", "3"]
    return [*pair, *quick, "--n-texts", "8", "-q", *more]


def test_every_part_is_saved_and_the_same_command_reads_them_again(
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "patched"
    first = command(home, "--what", "blocks,norm", "--out", str(out))
    assert cli.main(first) == cli.OK
    capsys.readouterr()
    everything = command(home, "--out", str(out))
    assert cli.main(everything) == cli.OK
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {*patch.PARTS, "patch.json", "report.html"}
    found = {result.name for result in read_results([out])}
    assert found == {f"patch_{part}" for part in patch.PARTS}
    page = (out / "report.html").read_text()
    for section in (f"patch_{part}" for part in patch.PARTS):
        assert f'data-section="{section}"' in page, section

    def again(*_: object, **__: object) -> None:
        raise AssertionError("a part was run a second time")

    monkeypatch.setattr("hyperlens.patching.blocks.patch_blocks", again)
    monkeypatch.setattr("hyperlens.patching.weights.patch_weights", again)
    assert cli.main(everything) == cli.OK
    assert capsys.readouterr().out == printed


def test_other_inputs_are_not_mixed_into_a_folder(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "patched"
    norm = command(home, "--what", "norm", "--out", str(out))
    assert cli.main(norm) == cli.OK
    assert cli.main([*norm, "--seed", "1"]) == cli.FAILED
    error = capsys.readouterr().err
    assert "choose a new folder" in error
    assert error.count("\n") == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file.txt").write_text("mine")
    assert cli.main(command(home, "--what", "norm", "--out", str(tmp_path / "mine"))) == cli.FAILED
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("earlier", [False, True])
def test_a_command_that_failed_leaves_its_folder_to_the_corrected_one(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], earlier: bool
) -> None:
    out = tmp_path / "patched"
    good = command(home, "--what", "norm", "--out", str(out))
    typo = [part.replace(f"{home / 'tuned'}", f"{home / 'tund'}") for part in good]
    assert cli.main(typo) == cli.FAILED
    assert "tund" in capsys.readouterr().err
    assert not out.exists()
    if earlier:  # what earlier versions left, and what a full disk leaves
        out.mkdir()
        (out / patch.STAMP).write_text(json.dumps({"hyperlens": "0", "tuned": "tund"}))
    assert cli.main(good) == cli.OK
    assert {path.name for path in out.iterdir()} == {"norm", patch.STAMP, "report.html"}


def test_a_folder_taken_meanwhile_is_not_mixed(
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "patched"
    one = command(home, "--what", "norm", "--out", str(out))
    found = patch._result

    def slowly(*args: Any) -> Any:
        monkeypatch.setattr(patch, "_result", found)
        assert cli.main([*one, "--seed", "1"]) == cli.OK
        return found(*args)

    monkeypatch.setattr(patch, "_result", slowly)
    assert cli.main(one) == cli.FAILED
    assert "with other inputs" in capsys.readouterr().err
    assert json.loads((out / patch.STAMP).read_text())["options"]["seed"] == "1"


def test_the_page_has_the_parts_of_earlier_calls(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "patched"
    for what in ("norm", "positions"):
        assert cli.main(command(home, "--what", what, "--out", str(out))) == cli.OK
    page = (out / "report.html").read_text()
    for section in ("patch_norm", "patch_positions"):
        assert page.count(f'data-section="{section}"') == 1, section


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--what", "q"], cli.USAGE, "expected some of blocks"),
        (["--positions", "a:b"], cli.USAGE, "expected token numbers"),
        (["--what", "blocks", "--positions", "99"], cli.FAILED, "choose from 0 to"),
        (["--what", "blocks", "--n-texts", "0"], cli.FAILED, "--n-texts must be at least 1"),
        (["--what", "weights", "--prompt-tokens", "900"], cli.FAILED, "lower"),
    ],
)
def test_refusals_are_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, words: str
) -> None:
    assert cli.main(command(home, *more)) == code
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_positions_are_read_as_people_type_them() -> None:
    assert patch.positions("5:") == slice(5, None)
    assert patch.positions(":3") == slice(None, 3)
    assert patch.positions("0,3") == [0, 3]
