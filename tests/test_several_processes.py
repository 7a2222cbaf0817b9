"""Two processes train as one does: same losses, same weights, one folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from hyperlens.errors import LoadingError, TrainingError
from hyperlens.training import hyperfit

LENGTH = 12
OPTIONS = {
    "n_sequences": 8,
    "sequence_length": LENGTH,
    "batch_size": 4,
    "epochs": 4,
    "learning_rate": 1e-3,
    "record_every": 2,
    "n_validation": 4,
    "n_prompts": 2,
    "prompt_tokens": 4,
    "new_tokens": 6,
    "device": "cpu",
    "progress": False,
}
SCRIPT = """
import json, os, sys, torch
torch.set_num_threads(1)
from hyperlens.training import hyperfit
from hyperlens.training.trainer import TokenTrainer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
# Which blocks run in the steps of training: none of those that the cache replaces.
ran, compute, forward = [], TokenTrainer.compute_loss, LlamaDecoderLayer.forward
def counting(block, *args, **kwargs):
    ran.append(block.self_attn.layer_idx)
    return forward(block, *args, **kwargs)
def computing(*args, **kwargs):
    LlamaDecoderLayer.forward = counting
    try:
        return compute(*args, **kwargs)
    finally:
        LlamaDecoderLayer.forward = forward
TokenTrainer.compute_loss = computing
llama_folder, ids_file, out, method, options = sys.argv[1:]
run = hyperfit(llama_folder, json.load(open(ids_file)), method, out=out, **json.loads(options))
print(f"rank {os.environ.get('RANK', '0')}", json.dumps(run.history), flush=True)
print("ran", json.dumps(sorted(ran)), flush=True)
"""


def start(processes: int, llama_folder: Path, ids_file: Path, out: Path, method: str, **options):
    script = out.parent / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    arguments = [str(llama_folder), str(ids_file), str(out), method, json.dumps(OPTIONS | options)]
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*args, **options):
    process = start(*args, **options)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def record(out: Path) -> dict:
    return json.loads((out / "hyperfit.json").read_text())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param(
            "full",
            {"stop_at_plateau": True, "near_zero_loss": 100.0, "checkpoint_minutes": 0.0},
            marks=pytest.mark.long,
        ),
        ("late_lora", {"last_k": 1, "gradient_accumulation": 2}),
    ],
    ids=["full", "late_lora"],
)
def test_two_processes_give_the_losses_of_one(llama_folder, ids_file, tmp_path, method, options):
    ids = json.loads(ids_file.read_text())
    hyperfit(llama_folder, ids, method, out=tmp_path / "1", **OPTIONS | options)
    done = run(2, llama_folder, ids_file, tmp_path / "2", method, **options)
    assert done.returncode == 0, done.stderr
    # Both processes return the same run.
    assert len({line.split(" ", 2)[2] for line in done.stdout.splitlines() if "rank" in line}) == 1
    if method == "late_lora":
        # Of 3 blocks the last is trained: 4 epochs of 2 batches in each process.
        ran = [json.loads(line[4:]) for line in done.stdout.splitlines() if line[:4] == "ran "]
        assert ran == [[2] * 8] * 2
    one, two = record(tmp_path / "1"), record(tmp_path / "2")
    assert two["history"] == pytest.approx(one["history"], abs=1e-5)
    assert len(two["records"]) == len(one["records"])
    for mine, other in zip(one["records"], two["records"], strict=True):
        assert other["validation_loss"] == pytest.approx(mine["validation_loss"], abs=1e-5)
        assert other["ttr_per_prompt"] == pytest.approx(mine["ttr_per_prompt"])
    a, b = (load_file(next((tmp_path / n).glob("*.safetensors"))) for n in "12")
    for name in a:
        torch.testing.assert_close(b[name], a[name], atol=1e-4, rtol=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "script.py"]


@pytest.mark.long
def test_two_processes_answer_sigterm_and_hold_one_lock(llama_folder, ids_file, tmp_path):
    """As Slurm ends a job: both leave after a step, with a checkpoint to go on from."""
    out, ids = tmp_path / "run", json.loads(ids_file.read_text())
    options = {"epochs": 400, "checkpoint_minutes": 60.0, "record_every": 0}
    process = start(2, llama_folder, ids_file, out, "late_lora", last_k=1, **options)
    cache = tmp_path / "run.partial"
    while not list(cache.glob("prefix-cache-*.bin")) and process.poll() is None:
        time.sleep(0.01)
    with pytest.raises(TrainingError, match="is working in"):
        hyperfit(llama_folder, ids, "late_lora", out=out, **OPTIONS)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert err.count("ended by SIGTERM after step") == 1, err
    assert not (cache / "lock.json").exists()
    done = run(2, llama_folder, ids_file, out, "late_lora", last_k=1, **options)
    assert done.returncode == 0, done.stderr
    whole = run(2, llama_folder, ids_file, tmp_path / "whole", "late_lora", last_k=1, **options)
    assert whole.returncode == 0, whole.stderr
    assert record(out)["history"] == record(tmp_path / "whole")["history"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3}, "choose a multiple of 2"),
        ({"n_sequences": 6}, "last batch of 2, which 2 processes cannot share"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    llama_folder, ids_file, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=message):
        hyperfit(
            llama_folder,
            json.loads(ids_file.read_text()),
            out=tmp_path / "run",
            **OPTIONS | changes,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_divided_weights_are_refused_before_anything_is_opened(
    ids_file, tmp_path, monkeypatch, kind
):
    # What `accelerate launch` sets; one process alone has all weights in any case.
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(LoadingError):
        hyperfit(tmp_path / "nowhere", json.loads(ids_file.read_text()), **OPTIONS)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=f"(?i){kind}.*launch with torchrun") as caught:
        hyperfit(tmp_path / "nowhere", json.loads(ids_file.read_text()), **OPTIONS)
    assert "\n" not in str(caught.value)


FSDP = """
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP}
num_processes: 2
num_machines: 1
mixed_precision: 'no'
use_cpu: true
"""


@pytest.mark.long
def test_a_configuration_of_accelerate_for_fsdp_is_refused(llama_folder, ids_file, tmp_path):
    """Two CPU processes: accelerate itself would train whole models there, without a word."""
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", tmp_path / "fsdp.yaml", tmp_path / "script.py"),
            *(llama_folder, ids_file, tmp_path / "out", "late_lora"),
            json.dumps(OPTIONS | {"last_k": 1}),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode
    assert "divides the weights by FSDP" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
