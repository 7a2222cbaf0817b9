"""Several processes divide a comparison and return what one returns, or fail in one line."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hyperlens import compare_models, measure_behaviour, processes, share_work
from hyperlens.cli import FAILED, USAGE, main
from hyperlens.data.corpus import build_corpus
from hyperlens.embedded import embedded_base
from hyperlens.errors import PairError

READING = {"batch_size": 2, "probes": ["participation_ratio", "logit_lens"], "progress": False}
WRITING = {"n_prompts": 6, "prompt_tokens": 4, "max_new_tokens": 8, "batch_size": 2}
SCRIPT = """
import json, os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from hyperlens import compare_models, measure_behaviour, share_work
base, tuned, ids_file, out, reading, writing = sys.argv[1:]
ids = json.load(open(ids_file))
with share_work():
    read = compare_models(base, tuned, ids, **json.loads(reading))
    # A single batch: all but the first process have nothing to read.
    few = compare_models(base, tuned, ids[:2], **json.loads(reading))
    written = measure_behaviour(base, tuned, ids, progress=False, **json.loads(writing))
rank = os.environ["RANK"]
for name, result in (("read", read), ("few", few), ("written", written)):
    os.mkdir(f"{out}/{name}-{rank}")
    result.write(Path(f"{out}/{name}-{rank}"))
"""
# The second process is gone after its first batch; the others have more to read.
KILLED = """
import os, signal, sys, torch
from hyperlens.passes import streaming
update = streaming._update
def updating(*args):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*args)
streaming._update = updating
from hyperlens.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def adapter(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder)
    return folder


def launched(
    processes_: int, script: str, place: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    file = place / "script.py"
    file.write_text(script)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes_}"]
    return subprocess.run(
        [sys.executable, *launcher, str(file), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def numbers(row: Mapping[str, Any]) -> list[float]:
    return [value for value in row.values() if not isinstance(value, str)]


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.long)])
def test_processes_return_what_one_does(
    llama_folder: Path, adapter: Path, ids_file: Path, tmp_path: Path, n: int
) -> None:
    """Of all but ratios as most code has them, whose outer products are summed in float32."""
    models, ids = (str(llama_folder), str(adapter)), json.loads(ids_file.read_text())
    read = compare_models(*models, ids, **READING)
    few = compare_models(*models, ids[:2], **READING)
    written = measure_behaviour(*models, ids, progress=False, **WRITING)
    settings = json.dumps(READING), json.dumps(WRITING)
    done = launched(n, SCRIPT, tmp_path, *models, str(ids_file), str(tmp_path), *settings)
    assert done.returncode == 0, done.stderr
    assert len(ids) > n * READING["batch_size"], "each process has to read some"
    for rank in range(n):
        for name, ours in (("read", read), ("few", few)):
            theirs = type(ours).load(tmp_path / f"{name}-{rank}")
            assert theirs.meta["excluded"] == ours.meta["excluded"]
            assert theirs.extras == ours.extras
            for mine, other in zip(ours.table, theirs.table, strict=True):
                tolerance = 1e-6 if "with_sinks" in mine["metric"] else 1e-9
                close = pytest.approx(numbers(mine), rel=tolerance, abs=tolerance, nan_ok=True)
                assert numbers(other) == close, mine
        assert type(written).load(tmp_path / f"written-{rank}").to_dict() == written.to_dict()


@pytest.mark.long
def test_a_killed_process_ends_all(tmp_path: Path) -> None:
    texts, out = tmp_path / "texts.jsonl", tmp_path / "out"
    texts.write_text(
        "".join(json.dumps({"text": "once upon a time " * k}) + "\n" for k in range(1, 40))
    )
    base = str(embedded_base())
    options = ["--texts", str(texts), "--out", str(out)]
    started = time.monotonic()
    done = launched(2, KILLED, tmp_path, "compare", base, base, *options)
    assert done.returncode != 0
    assert time.monotonic() - started < 100
    assert not out.exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("hyperlens: ")]
    assert len(lines) <= 1, lines
    assert "SIGKILL" in done.stderr


def test_shares_make_up_all_batches() -> None:
    ids = [list(range(2, 3 + n)) for n in range(1, 12)]
    corpus = build_corpus(ids, None, max_length=64)
    whole = [batch.tokens.tolist() for batch in corpus.batches(2)]
    shares = [[b.tokens.tolist() for b in corpus.batches(2, share=(i, 3))] for i in range(3)]
    assert [shares[k % 3][k // 3] for k in range(len(whole))] == whole
    assert sum(map(len, shares)) == len(whole)


def test_alone_nothing_is_shared() -> None:
    with share_work():
        assert not processes.sharing()
        assert processes.share() == (0, 1)


def test_what_is_divided_comes_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three processes does its share, but only where all of them come by."""
    items, done = list(range(7)), list[int]()

    def square(item: int) -> int:
        done.append(item)
        return item**2

    assert processes.divided(square, items) == [item**2 for item in items]
    monkeypatch.setattr(processes, "sharing", lambda: True)
    monkeypatch.setattr(processes, "share", lambda: (1, 3))
    others = {i: [item**2 for item in items[i::3]] for i in range(3)}
    monkeypatch.setattr(processes, "from_all", lambda own: [*others.values()])
    done.clear()
    assert processes.divided(square, items) == [item**2 for item in items]
    assert done == items
    done.clear()
    with processes.in_step():
        assert processes.divided(square, items) == [item**2 for item in items]
    assert done == [1, 4]


def test_other_texts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "sharing", lambda: True)
    monkeypatch.setattr(processes, "from_all", lambda value: [value, "other"])
    with pytest.raises(PairError, match="process 1 reads other texts than the first one"):
        processes.check_same("texts", "hash")


def test_commands_that_do_not_share_are_refused_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("hyperlens.cli.UNTIL_SAID", 0.0)
    for rank, said in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["weights", "a", "b"]) == FAILED
        err = capsys.readouterr().err
        assert err.count("runs in one process") == said
        assert main(["compare"]) == USAGE
        assert capsys.readouterr().err.count("the following arguments are required") == said
