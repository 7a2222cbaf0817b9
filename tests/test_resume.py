"""Killed at any moment, the same call goes on and ends with the same weights, bit for bit."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, short
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from hyperlens.errors import ResourceError, ResultsError, TrainingError
from hyperlens.training import callbacks, hyperfit, hyperfitting
from hyperlens.training.callbacks import Recording
from hyperlens.training.folders import WorkingFolder

LENGTH = 12
OPTIONS = {
    "n_sequences": 8,
    "sequence_length": LENGTH,
    "batch_size": 3,
    "epochs": 6,
    "learning_rate": 1e-2,
    "record_every": 2,
    "n_validation": 4,
    "n_prompts": 2,
    "prompt_tokens": 4,
    "new_tokens": 6,
    "checkpoint_minutes": 0.0,
    "device": "cpu",
    "progress": False,
}

# Runs in a process of its own, which can be killed: every choice is in its arguments.
SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
from hyperlens.training import hyperfit
llama_folder, ids_file, out, method, options = sys.argv[1:]
options = json.loads(options)
print("ready", flush=True)
hyperfit(llama_folder, json.load(open(ids_file)), method, out=out, **options)
"""


def start(
    llama_folder: Path, ids_file: Path, out: Path, method: str, **options
) -> subprocess.Popen:
    arguments = [str(llama_folder), str(ids_file), str(out), method, json.dumps(OPTIONS | options)]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(next(out.glob("*.safetensors")))


def same(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    records = [json.loads((out / "hyperfit.json").read_text()) for out in (one, other)]
    assert records[0]["history"] == records[1]["history"]
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in r["records"]] for r in records
    ]
    assert str(timeless[0]) == str(timeless[1])  # as text, where the base's missing loss is NaN


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("late_lora", {"last_k": 1, "lora_dropout": 0.1, "gradient_accumulation": 2}),
        pytest.param(
            "full",
            {"stop_at_plateau": True, "near_zero_loss": 100.0, "patience": 2},
            marks=pytest.mark.long,
        ),
    ],
    ids=["late_lora", "full"],
)
def test_killed_at_random_moments_it_ends_the_same(
    llama_folder, ids_file, tmp_path, method, options, kills
):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    ids = json.loads(ids_file.read_text())
    began = time.monotonic()
    hyperfit(llama_folder, ids, method, out=whole, **OPTIONS | options)
    takes = time.monotonic() - began
    checkpoint = tmp_path / "killed.partial" / "checkpoint" / "progress.json"
    rng = random.Random(method)
    for kill in range(kills):  # ten in the long form, over both methods
        process = start(llama_folder, ids_file, out, method, **options)
        process.stdout.readline()
        wait = rng.uniform(0.05, 0.9) * takes
        if kill == 0:  # with something to go on from, and much to do
            while not checkpoint.exists() and process.poll() is None:
                time.sleep(0.01)
            wait = rng.uniform(0, 0.3) * takes
        try:
            process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        if out.exists():  # earlier checkpoints had left it little to do
            same(whole, out)
            shutil.rmtree(out)
        else:
            assert process.returncode == -signal.SIGKILL
    hyperfit(llama_folder, ids, method, out=out, **OPTIONS | options)
    same(whole, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.fixture
def control_c():
    """As in a terminal: a shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("control_c")
@pytest.mark.parametrize("at", [4, 6], ids=["within an epoch", "at its end"])
def test_control_c_ends_with_a_checkpoint_of_the_step(
    llama_folder, ids_file, tmp_path, monkeypatch, at
):
    from hyperlens.training.trainer import TokenTrainer

    compute = TokenTrainer.compute_loss

    def pressed(self, *args, **kwargs):
        if self.state.global_step == at - 1:
            signal.raise_signal(signal.SIGINT)
        return compute(self, *args, **kwargs)

    ids = json.loads(ids_file.read_text())
    options = OPTIONS | {"checkpoint_minutes": 60.0}
    with monkeypatch.context() as patch:
        patch.setattr(TokenTrainer, "compute_loss", pressed)
        with pytest.raises(KeyboardInterrupt):
            hyperfit(llama_folder, ids, out=tmp_path / "run", **options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    state = tmp_path / "run.partial" / "checkpoint" / "trainer_state.json"
    assert json.loads(state.read_text())["global_step"] == at
    hyperfit(llama_folder, ids, out=tmp_path / "run", **options)
    hyperfit(llama_folder, ids, out=tmp_path / "whole", **options)
    same(tmp_path / "whole", tmp_path / "run")


def test_sigterm_ends_with_a_checkpoint_and_one_line(
    llama_folder, ids_file, tmp_path, monkeypatch, capsys
):
    """As Slurm sends before it takes the machine, and perhaps more than once."""
    from hyperlens.training.trainer import TokenTrainer

    compute = TokenTrainer.compute_loss

    def terminated(self, *args, **kwargs):
        if self.state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return compute(self, *args, **kwargs)

    ids = json.loads(ids_file.read_text())
    options = OPTIONS | {"checkpoint_minutes": 60.0}
    with monkeypatch.context() as patch:
        patch.setattr(TokenTrainer, "compute_loss", terminated)
        with pytest.raises(SystemExit) as ended:
            hyperfit(llama_folder, ids, out=tmp_path / "run", **options)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    (line,) = capsys.readouterr().err.splitlines()
    assert "after step 4/18: the same command continues" in line
    state = tmp_path / "run.partial" / "checkpoint" / "trainer_state.json"
    assert json.loads(state.read_text())["global_step"] == 4
    hyperfit(llama_folder, ids, out=tmp_path / "run", **options)
    hyperfit(llama_folder, ids, out=tmp_path / "whole", **options)
    same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.long
def test_the_command_answers_sigterm_and_a_second_run_at_once(llama_folder, ids_file, tmp_path):
    """In processes of their own: the second is refused, the first ended, the third goes on."""
    out = tmp_path / "run"
    first = start(llama_folder, ids_file, out, "full", epochs=2000)
    checkpoint = tmp_path / "run.partial" / "checkpoint" / "progress.json"
    while not checkpoint.exists() and first.poll() is None:
        time.sleep(0.01)
    second = start(llama_folder, ids_file, out, "full", epochs=3)
    _, err = second.communicate(timeout=200)
    assert second.returncode == 1
    assert f"process {first.pid} on {socket.gethostname()} is working in" in err.splitlines()[-1]
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=200)
    assert first.returncode == 128 + signal.SIGTERM
    (line,) = (line for line in err.splitlines() if line.startswith("hyperfit: "))
    assert "the same command continues from there" in line
    shutil.rmtree(tmp_path / "run.partial")
    hyperfit(llama_folder, json.loads(ids_file.read_text()), out=out, **OPTIONS)


@pytest.mark.usefixtures("control_c")
def test_a_second_control_c_ends_at_once(llama_folder, ids_file, tmp_path, monkeypatch):
    from hyperlens.training.trainer import TokenTrainer

    def pressed_twice(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("still running")

    monkeypatch.setattr(TokenTrainer, "compute_loss", pressed_twice)
    with pytest.raises(KeyboardInterrupt):
        hyperfit(llama_folder, json.loads(ids_file.read_text()), out=tmp_path / "run", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


class Interrupted(Exception):
    pass


def interrupted_at(step: int, monkeypatch, llama_folder, ids, out, method="late_lora", **options):
    """A run that breaks off inside a step, with its partial folder left behind."""
    from hyperlens.training.trainer import TokenTrainer

    compute = TokenTrainer.compute_loss

    def breaks(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Interrupted
        return compute(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TokenTrainer, "compute_loss", breaks)
        with pytest.raises(Interrupted):
            hyperfit(llama_folder, ids, method, out=out, **OPTIONS | options)


@pytest.fixture(scope="module")
def unbroken(llama_folder, ids_file, tmp_path_factory):
    """The folder of a run that nothing broke off."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    hyperfit(
        llama_folder, json.loads(ids_file.read_text()), "late_lora", out=out, last_k=1, **OPTIONS
    )
    return out


@pytest.mark.parametrize("step", short([1, 3, 4, 8, 17], 3, 8))
def test_from_every_kind_of_step(llama_folder, ids_file, tmp_path, monkeypatch, unbroken, step):
    """After the first, at an epoch's end, just after it, between records, before the last."""
    ids = json.loads(ids_file.read_text())
    interrupted_at(step, monkeypatch, llama_folder, ids, tmp_path / "broken", last_k=1)
    assert json.loads((tmp_path / "broken.partial/checkpoint/progress.json").read_text())
    hyperfit(llama_folder, ids, "late_lora", out=tmp_path / "broken", last_k=1, **OPTIONS)
    same(unbroken, tmp_path / "broken")
    tables = [(out / "history.csv").read_text() for out in (unbroken, tmp_path / "broken")]
    assert tables[0].count("\n") == tables[1].count("\n") == 1 + 4  # epochs 0, 2, 4 and 6


def test_going_on_with_other_options_says_which(llama_folder, ids_file, tmp_path, monkeypatch):
    ids = json.loads(ids_file.read_text())
    out = tmp_path / "run"
    interrupted_at(5, monkeypatch, llama_folder, ids, out, last_k=1)
    with pytest.raises(TrainingError, match=r"learning_rate 0\.01 there, 0\.02 here") as refused:
        hyperfit(
            llama_folder,
            ids,
            "late_lora",
            out=out,
            **OPTIONS | {"last_k": 1, "learning_rate": 0.02},
        )
    assert "batch_size" not in str(refused.value)
    with pytest.raises(TrainingError, match="texts '"):
        hyperfit(llama_folder, ids[1:], "late_lora", out=out, last_k=1, **OPTIONS)
    # What does not change the result may change.
    options = OPTIONS | {"last_k": 1, "checkpoint_minutes": 5.0, "prefix_cache": False}
    assert hyperfit(llama_folder, ids, "late_lora", out=out, **options).folder == out


def test_a_foreign_partial_folder_is_left_alone(llama_folder, ids_file, tmp_path):
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "mine.txt").write_text("mine")
    ids = json.loads(ids_file.read_text())
    with pytest.raises(TrainingError, match="in the way"):
        hyperfit(llama_folder, ids, "late_lora", out=tmp_path / "run", last_k=1, **OPTIONS)
    assert (tmp_path / "run.partial" / "mine.txt").read_text() == "mine"


def test_nothing_of_another_run_gets_into_the_result(llama_folder, ids_file, tmp_path):
    """Killed before its first checkpoint, a run leaves its table behind, and here much more."""
    partial = tmp_path / "run.partial"
    for name in ("finished", ".finished.0123", "writing/runs"):
        (partial / name).mkdir(parents=True)
        (partial / name / "old").write_text("old")
    (partial / "run.json").write_text('{"epochs": 100}')
    (partial / "history.csv").write_text("old")
    (partial / "best-2.safetensors").write_text("old")
    ids = json.loads(ids_file.read_text())
    options = OPTIONS | {"epochs": 1, "record_every": 0}
    hyperfit(llama_folder, ids, out=tmp_path / "run", **options)
    assert not any("old" in path.name for path in tmp_path.rglob("*"))
    assert not (tmp_path / "run" / "history.csv").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_result_that_cannot_be_moved_is_kept_and_blocks_no_retry(
    llama_folder, ids_file, tmp_path, monkeypatch
):
    ids = json.loads(ids_file.read_text())
    out = tmp_path / "run"
    save, saved = hyperfitting.save, []

    def meanwhile(folder, *args, **kwargs):
        save(folder, *args, **kwargs)
        saved.append(folder)
        out.mkdir()
        (out / "mine.txt").write_text("mine")

    for options in (OPTIONS, OPTIONS | {"checkpoint_minutes": 60.0}):
        with monkeypatch.context() as patch:
            patch.setattr(hyperfitting, "save", meanwhile)
            with pytest.raises(ResultsError, match=r"the finished run is in .*partial/finished"):
                hyperfit(llama_folder, ids, out=out, **options)
        assert (out / "mine.txt").read_text() == "mine"
        assert weights(saved[-1])
        shutil.rmtree(out)
        hyperfit(llama_folder, ids, out=out, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        shutil.rmtree(out)


def test_what_a_checkpoint_needs_is_there_until_the_next_is(
    llama_folder, ids_file, tmp_path, monkeypatch
):
    """Of a run in which each record is the best so far."""
    best = property(lambda self: self._progress.records[-1].epoch or None)
    monkeypatch.setattr(Recording, "best_epoch", best)
    set_checkpoint, kept = WorkingFolder.set_checkpoint, []

    def watched(self, written, progress):
        kept.append({path.name for path in self.folder.glob("best-*.safetensors")})
        set_checkpoint(self, written, progress)

    monkeypatch.setattr(WorkingFolder, "set_checkpoint", watched)
    options = OPTIONS | {"stop_at_plateau": True, "near_zero_loss": 100.0}
    hyperfit(llama_folder, json.loads(ids_file.read_text()), out=tmp_path / "run", **options)
    assert {"best-2.safetensors", "best-4.safetensors"} in kept
    *_, last, _ = kept  # and one more when the run has ended
    assert last == {"best-4.safetensors"}


@pytest.mark.parametrize("asked", [False, True])
def test_a_stop_that_was_asked_for_stays_asked_for(
    llama_folder, ids_file, tmp_path, monkeypatch, asked
):
    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = asked

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "asks", Asks)
    options = OPTIONS | {"stop_at_plateau": True, "record_every": 1, "report_to": "asks"}
    run = hyperfit(llama_folder, json.loads(ids_file.read_text()), **options)
    assert len(run.history) == (1 if asked else OPTIONS["epochs"])


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(
    llama_folder, ids_file, tmp_path, monkeypatch
):
    ids = json.loads(ids_file.read_text())
    interrupted_at(
        5, monkeypatch, llama_folder, ids, tmp_path / "run", last_k=1, checkpoint_minutes=9.0
    )
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_spares_the_last_checkpoint(
    llama_folder, ids_file, tmp_path, monkeypatch
):
    """A limit on file sizes stands for the full disk: writing stops half-way."""
    from hyperlens.training.callbacks import Checkpoints

    ids = json.loads(ids_file.read_text())
    on_save, saves = Checkpoints.on_save, []

    def then_full(self, *args, **kwargs):
        on_save(self, *args, **kwargs)
        saves.append(1)
        if len(saves) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "on_save", then_full)
            with pytest.raises(ResultsError, match=r"checkpoint at step 4 .*free some space"):
                hyperfit(llama_folder, ids, "full", out=tmp_path / "run", **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, handler)
    partial = tmp_path / "run.partial"
    state = json.loads((partial / "checkpoint" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    hyperfit(llama_folder, ids, "full", out=tmp_path / "run", **OPTIONS)
    hyperfit(llama_folder, ids, "full", out=tmp_path / "whole", **OPTIONS)
    same(tmp_path / "whole", tmp_path / "run")


def full_disk(monkeypatch, module, name):
    """Let `module.name` meet a full disk, by a limit on the size of files."""
    function = getattr(module, name)

    def on_full_disk(*args, **kwargs):
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
        try:
            return function(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            signal.signal(signal.SIGXFSZ, handler)

    monkeypatch.setattr(module, name, on_full_disk)


def test_a_disk_that_is_full_at_the_end_costs_nothing(
    llama_folder, ids_file, tmp_path, monkeypatch
):
    """Before the first checkpoint that was due; the same call saves, and trains nothing."""
    from hyperlens.training.trainer import TokenTrainer

    def no_space(*args):  # nor for the table of records
        raise ResultsError("cannot write history.csv (No space left on device): free some space")

    ids, out = json.loads(ids_file.read_text()), tmp_path / "run"
    options = OPTIONS | {"checkpoint_minutes": 60.0, "stop_at_plateau": True, "near_zero_loss": 9.0}
    with monkeypatch.context() as patch:
        full_disk(patch, hyperfitting, "save")
        patch.setattr(callbacks, "history", SimpleNamespace(write=no_space))
        with pytest.raises(ResultsError, match=r"free some space.*saves the trained weights, kept"):
            hyperfit(llama_folder, ids, out=out, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["run.partial"]
    with monkeypatch.context() as patch:
        patch.setattr(TokenTrainer, "compute_loss", lambda *_, **__: pytest.fail("trains again"))
        hyperfit(llama_folder, ids, out=out, **options)
    hyperfit(llama_folder, ids, out=tmp_path / "whole", **options)
    same(tmp_path / "whole", out)
    ends = [json.loads((tmp_path / n / "hyperfit.json").read_text()) for n in ("run", "whole")]
    assert ends[0]["manifest"]["ending"] == ends[1]["manifest"]["ending"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


@pytest.mark.parametrize("writer", ["_save_best", "save_trained_weights"])
def test_every_error_of_writing_says_how_to_go_on(
    llama_folder, ids_file, tmp_path, monkeypatch, writer
):
    """The best weights; the last checkpoint, without which the result can still be saved."""
    from hyperlens.training import fitting

    ids, out = json.loads(ids_file.read_text()), tmp_path / "run"
    options = OPTIONS | {"stop_at_plateau": True, "near_zero_loss": 100.0}
    full_disk(monkeypatch, callbacks if writer == "_save_best" else fitting, writer)
    if writer == "_save_best":
        with pytest.raises(ResultsError, match=r"space; the same command then continues after ste"):
            hyperfit(llama_folder, ids, out=out, **options)
        assert (tmp_path / "run.partial" / "checkpoint").is_dir()
    else:
        assert hyperfit(llama_folder, ids, out=out, **options).folder == out
        assert weights(out)


def test_room_for_the_end_is_taken_at_the_start(llama_folder, ids_file, tmp_path, monkeypatch):
    from hyperlens.training.trainer import TokenTrainer

    reserved, sizes = tmp_path / "run.partial" / "reserved", []
    compute = TokenTrainer.compute_loss

    def watched(self, *args, **kwargs):
        sizes.append(reserved.stat().st_size if reserved.exists() else 0)
        return compute(self, *args, **kwargs)

    ids = json.loads(ids_file.read_text())
    with monkeypatch.context() as patch:
        patch.setattr(TokenTrainer, "compute_loss", watched)
        hyperfit(llama_folder, ids, out=tmp_path / "run", **OPTIONS)
    result = sum(file.stat().st_size for file in (tmp_path / "run").iterdir())
    assert sizes[0] >= 2 * result  # the last checkpoint, and the result beside it
    assert not any(sizes[1:])  # after the first checkpoint
    shutil.rmtree(tmp_path / "run")
    usage = SimpleNamespace(free=sizes[0] - 1)
    monkeypatch.setattr("hyperlens.training.folders.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(ResourceError, match=r"take .* MiB .*free some space"):
        hyperfit(llama_folder, ids, out=tmp_path / "run", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_killed_while_it_cleans_up_it_is_cleaned_up_by_the_next_call(
    llama_folder, ids_file, tmp_path, monkeypatch
):
    ids, out = json.loads(ids_file.read_text()), tmp_path / "run"
    options = OPTIONS | {"epochs": 1, "record_every": 0}

    def killed(self):
        raise Interrupted

    for is_there in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(WorkingFolder, "remove", killed)
            with pytest.raises(Interrupted):
                hyperfit(llama_folder, ids, out=out, **options)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.partial"]
        if is_there:
            with pytest.raises(ResultsError, match="already exists"):
                hyperfit(llama_folder, ids, out=out, **options)
            assert [path.name for path in tmp_path.iterdir()] == ["run"]
        shutil.rmtree(out)
    # A finished run is no unfinished one with other options.
    hyperfit(llama_folder, ids, out=out, **options | {"epochs": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_second_run_into_one_folder_is_refused(llama_folder, ids_file, tmp_path, monkeypatch):
    ids, out = json.loads(ids_file.read_text()), tmp_path / "run"
    from hyperlens.training.trainer import TokenTrainer

    compute, refusals = TokenTrainer.compute_loss, []

    def meanwhile(self, *args, **kwargs):
        if self.state.global_step == 4 and not refusals:
            for options in (OPTIONS, OPTIONS | {"epochs": 2}):
                with pytest.raises(TrainingError) as refused:
                    hyperfit(llama_folder, ids, out=out, **options)
                refusals.append(str(refused.value))
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(TokenTrainer, "compute_loss", meanwhile)
    assert len(hyperfit(llama_folder, ids, out=out, **OPTIONS).history) == 6
    assert len(refusals) == 2
    for line in refusals:
        assert f"process {os.getpid()} on {socket.gethostname()} is working in {out}.part" in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("method", ["full", "late_lora"])
def test_recording_changes_nothing(llama_folder, ids_file, method):
    ids = json.loads(ids_file.read_text())
    options = OPTIONS | {"lora_dropout": 0.2, "last_k": 1} if method != "full" else OPTIONS
    recorded = hyperfit(llama_folder, ids, method, **options)
    plain = hyperfit(llama_folder, ids, method, **options | {"record_every": 0})
    assert recorded.history == plain.history
    a, b = recorded.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [record.epoch for record in recorded.records] == [0, 2, 4, 6]
    assert recorded.records[0].rank_1 == 1.0
    assert plain.records == ()
