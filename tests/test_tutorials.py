"""Every tutorial runs from its first cell to its last, and is kept with what it printed."""

import os
import re
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))

# The check runs every cell on less than readers do: these keywords stand for at most so much...
AT_MOST = {
    "epochs": 2,
    "lora_epochs": 2,
    "n_train": 8,
    "n_held_out": 10,
    "record_every": 1,
    "sequence_length": 48,
    "n_validation": 4,
    "n_prompts": 3,
    "new_tokens": 12,
    "max_new_tokens": 6,
    "batch_size": 8,
    "n_controls": 2,
    "n_verified": 3,
}
# ... and these words for others. Each of them must be found in some tutorial.
INSTEAD = {
    "tales[:32], tales[32:]": "tales[:8], tales[32:44]",
    'strategies=("greedy",)': 'strategies=("greedy",), max_new_tokens=6',
    "held_out[:24], n_controls=2": "held_out[:6], n_controls=1",
    "pair, held_out, progress": "pair, held_out, max_length=64, progress",
    "held_out[:16], max_length=64": "held_out[:6], max_length=32",
    "    pair,\n    held_out,\n": "    pair,\n    held_out,\n    max_length=64,\n",
}
NUMBER = re.compile(rf"\b({'|'.join(AT_MOST)})=(\d+)")


def notebook(path: Path):
    import nbformat

    return nbformat.read(path, as_version=4)


def shortened(source: str, seen: set[str]) -> str:
    """A cell's code with smaller numbers; what was found is added to `seen`."""

    def lower(found: re.Match[str]) -> str:
        seen.add(found[1])
        return f"{found[1]}={min(int(found[2]), AT_MOST[found[1]])}"

    source = NUMBER.sub(lower, source)
    for old, new in INSTEAD.items():
        if old in source:
            seen.add(old)
            source = source.replace(old, new)
    return source


def execute(book, folder: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """Run all cells in a kernel of their own, and return how many seconds that took."""
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    here = {"metadata": {"path": folder}}
    client = nbclient.NotebookClient(book, timeout=900, kernel_name="python3", resources=here)
    started = time.monotonic()
    client.execute()
    return time.monotonic() - started


def slower() -> float:
    return float(os.environ.get("HYPERLENS_SLOWER", "1"))


def test_there_are_tutorials() -> None:
    names = [path.stem for path in TUTORIALS]
    assert names[:2] == ["01_compare_two_models", "02_hyperfit_and_late_stage_lora"]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_outputs_are_kept(path: Path) -> None:
    cells = [cell for cell in notebook(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) > len(cells) / 2
    assert not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = path.read_text(encoding="utf-8")
    for private in ("/home/", "/root/", "/work/", "site-packages"):
        assert private not in text, private


def test_what_is_shortened_is_there() -> None:
    """A keyword that got another name would make the check long without a word."""
    seen: set[str] = set()
    for path in TUTORIALS:
        for cell in notebook(path).cells:
            if cell.cell_type == "code":
                shortened(cell.source, seen)
    assert seen == AT_MOST.keys() | INSTEAD.keys()


@pytest.mark.tutorial
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell, on fewer and shorter texts."""
    book = notebook(path)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.source = shortened(cell.source, set())
    assert execute(book, tmp_path, monkeypatch) < 120 * slower()


@pytest.mark.long
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_it_runs_as_readers_run_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Twice what is promised of two cores: tests share them.
    assert execute(notebook(path), tmp_path, monkeypatch) < 240 * slower()
