"""Training: the caller's model stays as it is, and the result is what the recipe says."""

import copy
import gc
import html
import json
import random
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hyperlens import load_hooked
from hyperlens.errors import HyperlensError, ResultsError
from hyperlens.training import (
    HyperfitRun,
    Recipe,
    callbacks,
    fitting,
    hyperfit,
    hyperfitting,
    preset,
    to_hooked,
)
from hyperlens.training import trainer as trainer_module
from hyperlens.training.weights import trainers_randomness, without_dropout

ROOT = Path(__file__).resolve().parent.parent
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
GRIMM = ROOT.parent / "shared" / "corpora" / "grimms.txt"

VOCAB, D, KV, FF, BLOCKS, LENGTH = 64, 32, 16, 48, 4, 16
FEW = {"n_sequences": 4, "sequence_length": LENGTH, "batch_size": 2, "progress": False}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # Tiny models gain nothing from more, and lose much on a busy machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=D,
            intermediate_size=FF,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
        )
    )


def gpt2(dropout: float = 0.1) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=D,
            n_layer=3,
            n_head=4,
            n_positions=32,
            initializer_range=0.1,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def texts(n: int = 4, length: int = LENGTH + 3, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, VOCAB, (n, length)).tolist()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusal(*args: Any, **options: Any) -> str:
    """The message of the error that hyperfit raises, which must be one line."""
    with pytest.raises(HyperlensError) as caught:
        hyperfit(*args, **({**FEW, "epochs": 1} | options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def late() -> tuple[LlamaForCausalLM, HyperfitRun]:
    """A base and a late-stage LoRA run on it."""
    base = llama()
    run = hyperfit(base, texts(), "late_lora", last_k=2, lora_r=4, epochs=3, **FEW)
    return base, run


def test_data_that_do_not_fit_the_model_are_refused() -> None:
    assert "positions for 32" in refusal(llama(), texts(), sequence_length=33)
    assert "drop_last" in refusal(llama(), texts(), drop_last=True, batch_size=8)
    assert "vocabulary of 64" in refusal(llama(), [[VOCAB] * LENGTH])
    assert "no tokenizer" in refusal(llama(), ["some words"])


# Full fine-tuning


def test_four_sequences_are_learnt_by_heart_and_the_caller_sees_nothing() -> None:
    base = llama().train()
    base.model.layers[1].eval()
    base.model.embed_tokens.weight.requires_grad_(False)
    before, copied = weights(base), copy.deepcopy(base.config.to_dict())
    modes = [module.training for module in base.modules()]
    numbers = torch.get_rng_state()
    run = hyperfit(base, texts(), epochs=40, learning_rate=1e-2, **FEW)
    assert len(run.history) == 40
    assert run.history[0] > 2
    assert run.history[-1] < 0.02
    assert same(before, weights(base))
    assert modes == [module.training for module in base.modules()]
    assert base.config.to_dict() == copied
    assert all(p.grad is None for p in base.parameters())
    assert not base.model.embed_tokens.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), numbers)
    own = {p.data_ptr() for p in run.model.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in base.parameters())
    assert not any(module.training for module in run.model.modules())
    assert run.model.config.use_cache == base.config.use_cache
    assert not torch.equal(run.model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert run.manifest["trained_parameters"] == sum(p.numel() for p in base.parameters())
    json.dumps(run.manifest)


def by_hand(base: Any, ids: list[list[int]], recipe: Recipe) -> tuple[Any, list[float]]:
    """The same training in plain PyTorch, all sequences in every batch."""
    model = copy.deepcopy(base).eval()
    tokens = torch.tensor(ids)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    losses = []
    for _ in range(recipe.epochs):
        logits = model(tokens).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses


@pytest.mark.parametrize(("batch", "accumulation"), [(5, 1), (2, 3)])
def test_training_is_the_textbook_loop(batch: int, accumulation: int) -> None:
    # Five sequences in batches of two: the last is smaller, and its tokens must weigh the same.
    # Dropout of 0.1 in the model: the loop by hand has none, and neither must ours.
    base, ids = gpt2(), texts(5, LENGTH)
    changes = {"epochs": 4, "learning_rate": 1e-3, "weight_decay": 0.1}
    options = FEW | {"n_sequences": 5, "batch_size": batch, "gradient_accumulation": accumulation}
    run = hyperfit(base, ids, **changes, **options)
    model, losses = by_hand(base, ids, preset("li2026", **changes))
    assert run.history == pytest.approx(losses, rel=1e-5)
    # Logits, not weights: a bias that softmax ignores has no gradient but rounding, which Adam
    # blows up to whole steps.
    torch.testing.assert_close(logits(run.model), logits(model), atol=1e-4, rtol=1e-4)


def test_random_numbers_go_on_as_before() -> None:
    def drawn() -> tuple[float, ...]:
        return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002

    set_seed(1)
    expected = drawn()
    set_seed(1)
    with trainers_randomness(2, torch.device("cpu")):
        set_seed(3)
    assert drawn() == expected


def test_dropout_rates_come_back() -> None:
    model = gpt2()
    with without_dropout(model):
        assert model.transformer.drop.p == 0
        assert model.config.attn_pdrop == 0
    assert model.transformer.drop.p == model.config.attn_pdrop == 0.1


@pytest.mark.parametrize(
    ("kind", "noise", "kept"),
    [
        ("Mixtral", "router_jitter_noise", None),
        # There it is a threshold, and the noise has another name.
        ("Phimoe", "input_jitter_noise", "router_jitter_noise"),
    ],
)
def test_noise_that_is_not_called_dropout_is_turned_off(
    kind: str, noise: str, kept: str | None
) -> None:
    torch.manual_seed(0)
    rates = {noise: 0.3} | ({kept: 0.2} if kept else {})
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        **rates,
    )
    model = AutoModelForCausalLM.from_config(config)
    evaluated = logits(model.eval())
    modes = [module.training for module in model.modules()]
    values = [dict(vars(module)) for module in model.modules()]
    with without_dropout(model):
        assert torch.equal(logits(model), evaluated)
        noisy = [m for m in model.modules() if getattr(m, "jitter_noise", 0.0) > 0]
        noisy += [m for m in model.modules() if getattr(m, "input_jitter_noise", 0.0) > 0]
        assert noisy == []
        if kept:
            assert any(getattr(m, kept, 0.0) == 0.2 for m in model.modules())
        else:
            assert torch.equal(logits(model.train()), evaluated)
            model.eval()
    assert [module.training for module in model.modules()] == modes
    assert str([dict(vars(module)) for module in model.modules()]) == str(values)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_seed_decides_every_bit(method: str) -> None:
    def trained(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(random.randrange(1000))  # whatever the caller did before
        options = {"epochs": 2, "seed": seed, "learning_rate": 1e-2, **FEW}
        return weights(hyperfit(llama(), texts(), method, **options).model)

    first = trained(0)
    assert same(first, trained(0))
    assert not same(first, trained(1))


@pytest.mark.parametrize("model", [llama(tied=True), gpt2()], ids=["llama", "gpt2"])
def test_tied_weights_stay_tied(model: Any, tmp_path: Path) -> None:
    run = hyperfit(model, texts(), epochs=1, learning_rate=1e-2, out=tmp_path / "run", **FEW)
    assert run.model.get_input_embeddings().weight is run.model.get_output_embeddings().weight
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert same(weights(loaded), weights(run.model))


def test_weights_are_float32_unless_asked_otherwise() -> None:
    base = llama().to(torch.bfloat16)
    run = hyperfit(base, texts(), epochs=1, **FEW)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    kept = hyperfit(base, texts(), epochs=1, dtype="bfloat16", learning_rate=1e-3, **FEW)
    assert {p.dtype for p in kept.model.parameters()} == {torch.bfloat16}
    adapted = hyperfit(base, texts(), "lora", epochs=1, **FEW)
    frozen = {p.dtype for p in adapted.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


def test_steps_that_bfloat16_would_round_away_are_refused() -> None:
    steps = {"dtype": "bfloat16", "learning_rate": 5e-6}
    line = refusal(llama(), texts(), **steps)
    assert "float32" in line
    assert "bf16=True" in line
    # The rule foretells which weights a first step leaves as they are.
    told = float(re.search(r"(\d+)%", line).group(1)) / 100
    model = llama().to(torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    step = torch.optim.AdamW(model.parameters(), lr=5e-6, weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    step.step()
    stuck = sum(int((a == b).sum()) for a, b in zip(before, model.parameters(), strict=True))
    assert stuck / sum(p.numel() for p in before) == pytest.approx(told, abs=0.01)
    for allowed in ({"learning_rate": 5e-6}, {"learning_rate": 5e-6, "bf16": True}):
        hyperfit(llama(), texts(), epochs=1, **FEW | allowed)
    hyperfit(llama().to(torch.bfloat16), texts(), "lora", epochs=1, **FEW | steps)


def test_float16_weights_are_refused_where_they_would_be_trained() -> None:
    line = refusal(llama(), texts(), dtype="float16")
    assert "float32" in line
    assert "bf16=True" in line
    run = hyperfit(llama().half(), texts(), "lora", epochs=1, **FEW)
    assert run.manifest["dtype"] == "float16"


def test_no_second_copy_is_held_while_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that had to be cast is the trained one's model, or gone."""
    opened: list[weakref.ref[nn.Module]] = []
    open_source, fit = hyperfitting.open_source, fitting.fit

    def opens(*args: Any, **options: Any) -> Any:
        made = open_source(*args, **options)
        opened.append(weakref.ref(made.model))
        return made

    def fits(model: Any, *args: Any) -> Any:
        gc.collect()
        assert opened[-1]() in (None, model)
        return fit(model, *args)

    monkeypatch.setattr(hyperfitting, "open_source", opens)
    monkeypatch.setattr(fitting, "fit", fits)
    base = llama().to(torch.bfloat16)
    before = weights(base)
    hyperfit(base, texts(), epochs=1, **FEW)
    assert len(opened) == 1
    assert same(before, weights(base))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_saving_memory_changes_little_and_leaves_no_trace(method: str) -> None:
    options = {"epochs": 3, "learning_rate": 1e-3, **FEW}
    plain = hyperfit(llama(), texts(), method, **options)
    recomputed = hyperfit(llama(), texts(), method, gradient_checkpointing=True, **options)
    assert recomputed.history == pytest.approx(plain.history, rel=1e-6)
    mixed = hyperfit(llama(), texts(), method, bf16=True, **options)
    assert mixed.history == pytest.approx(plain.history, rel=2e-2)
    assert mixed.history != plain.history
    for run in (recomputed, mixed):
        assert not any("forward" in vars(module) for module in run.model.modules())
        copy.deepcopy(run.model)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in recomputed.model.modules())


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_schedule_warms_up(schedule: str) -> None:
    options = {"epochs": 3, "learning_rate": 1e-2, "schedule": schedule, **FEW}
    cold = hyperfit(llama(), texts(), warmup_steps=4, **options)
    assert cold.history[1] > hyperfit(llama(), texts(), **options).history[1]


def test_an_adapter_is_folded_in_before_full_training(
    late: tuple[LlamaForCausalLM, HyperfitRun],
) -> None:
    _, made = late
    before = weights(made.model)
    run = hyperfit(made.model, texts(), epochs=2, learning_rate=1e-2, **FEW)
    assert isinstance(run.model, LlamaForCausalLM)
    assert same(before, weights(made.model))
    assert run.history[0] < 1.1 * made.history[-1]
    assert "merge" in refusal(made.model, texts(), "lora")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_adapter_inside_a_plain_model_is_refused(method: str) -> None:
    from peft import LoraConfig

    base = llama()
    base.add_adapter(LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert "PeftModel.from_pretrained" in refusal(base, texts(), method)


def test_a_loss_that_leaves_the_numbers_stops_the_run(tmp_path: Path) -> None:
    steep = {"learning_rate": 3e37, "weight_decay": 11.0, "out": tmp_path / "run"}
    assert "at step 2 of 2" in refusal(llama(), texts(4), **steep)
    assert "NaN or infinite by step 1" in refusal(llama(), texts(2), **steep)
    assert list(tmp_path.iterdir()) == []
    # Its advice is followed, also where there is a checkpoint of the run that failed.
    kept = {"out": tmp_path / "run", "checkpoint_minutes": 0.0}
    assert "at step 2 of 2" in refusal(llama(), texts(4), **steep | kept)
    assert (tmp_path / "run.partial" / "checkpoint").exists()
    assert "at step 2 of 2" in refusal(llama(), texts(4), **steep | kept)
    hyperfit(llama(), texts(4), epochs=1, **FEW | kept)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_running_out_of_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 GiB")

    monkeypatch.setattr(Trainer, "training_step", full)
    assert "gradient_checkpointing" in refusal(llama(), texts())


def test_the_bar_shows_epoch_and_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    hyperfit(llama(), texts(), epochs=2, **FEW | {"progress": True})
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "epoch 2/2, loss " in shown.err
    hyperfit(llama(), texts(), epochs=1, **FEW)
    quiet = capsys.readouterr()
    assert (quiet.out, quiet.err) == ("", "")


RECORDED = {"record_every": 2, "n_validation": 2, "prompt_tokens": 4, "new_tokens": 6}


def test_records_are_shown_above_the_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run = hyperfit(llama(), texts(6), epochs=2, **FEW | {"progress": True} | RECORDED)
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = [line for line in re.split(r"[\r\n]+", shown.err) if "held-out text" in line]
    assert [line.split(",")[0] for line in lines] == ["hyperfit: epoch 0/2", "hyperfit: epoch 2/2"]
    last = run.records[-1]
    assert f"TTR {last.ttr:.3f}, validation loss {last.validation_loss:.4f}" in lines[-1]


@pytest.mark.parametrize(("seconds", "every_step"), [(30.0, False), (0.0, True)])
def test_off_a_terminal_lines_say_how_far_it_is(
    seconds: float,
    every_step: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(callbacks, "SECONDS_PER_LINE", seconds)
    run = hyperfit(llama(), texts(6), epochs=4, **FEW | {"progress": True} | RECORDED)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "\r" not in shown.err
    lines = [line for line in shown.err.splitlines() if line.startswith("hyperfit: ")]
    records = [line for line in lines if "held-out text: TTR 0." in line or "TTR 1." in line]
    assert [line.split(",")[0] for line in records] == [f"hyperfit: epoch {n}/4" for n in (0, 2, 4)]
    assert "the base" in records[0]
    steps = [line for line in lines if " left" in line]
    # Each epoch has a line however short it is.
    expected = range(1, 9) if every_step else (2, 4, 6, 8)
    assert [line.split(",")[1] for line in steps] == [f" step {step}/8" for step in expected]
    assert steps[-1].startswith(f"hyperfit: epoch 4/4, step 8/8, loss {run.history[-1]:.4f}, ")


def test_lines_of_a_resumed_run_start_where_it_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = callbacks.Checkpoints.on_save

    def interrupting(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        saved(self, args, state, *rest, **kwargs)
        if state.global_step == 5:
            raise KeyboardInterrupt

    options = FEW | {"progress": True, "checkpoint_minutes": 0.0, "epochs": 4} | RECORDED
    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Checkpoints, "on_save", interrupting)
        with pytest.raises(KeyboardInterrupt):
            hyperfit(llama(), texts(6), out=tmp_path / "run", **options)
    capsys.readouterr()
    hyperfit(llama(), texts(6), out=tmp_path / "run", **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if "hyperfit: " in line]
    assert lines[0] == "hyperfit: continuing after step 5/8"
    assert [line.split(",")[:2] for line in lines[1:]] == [
        ["hyperfit: epoch 3/4", " step 6/8"],
        ["hyperfit: epoch 4/4", " step 8/8"],
        ["hyperfit: epoch 4/4", lines[-1].split(",")[1]],
    ]
    assert "held-out text: TTR " in lines[-1]


def test_a_run_shows_itself_in_a_few_lines(
    late: tuple[LlamaForCausalLM, HyperfitRun], tmp_path: Path
) -> None:
    _, run = late
    assert repr(run).startswith("HyperfitRun(late_lora, 3 epochs, loss ")
    assert repr(run).endswith(", not saved)")
    assert len(repr(run)) < 100
    assert "late_lora on blocks 2, 3 (0-based) of 4" in run.summary()
    assert "weights in" not in run.summary()
    assert run._repr_html_() == f"<pre>{html.escape(run.summary())}</pre>"
    recorded = hyperfit(llama(), texts(6), epochs=2, out=tmp_path / "a<b", **FEW | RECORDED)
    assert f"saved in '{tmp_path}/a<b')" in repr(recorded)
    assert "held-out text after epoch 2 (the base): TTR " in recorded.summary()
    assert "a&lt;b" in recorded._repr_html_()
    assert len(recorded.summary().splitlines()) <= 6


def test_a_setting_that_the_method_ignores_is_refused() -> None:
    assert "lora_r has no effect with the method full" in refusal(llama(), texts(), lora_r=8)
    assert "last_k has no effect" in refusal(llama(), texts(), "full", last_k=2)
    recipe = preset("demo", "late_lora", last_k=2)
    assert "lora or late_lora" in refusal(llama(), texts(), "full", recipe=recipe, lora_dora=True)


def test_losses_reach_the_loggers_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    losses: list[float] = []
    records: dict[int, dict[str, float]] = {}

    class Logger(TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
        ) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])
            if "eval_loss" in logs:
                records[state.global_step] = logs

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mine", Logger)
    run = hyperfit(llama(), texts(6), epochs=3, report_to="mine", **FEW | RECORDED)
    assert losses == pytest.approx(run.history, rel=1e-4)
    assert list(records) == [record.step for record in run.records] == [0, 4, 6]
    for record in run.records:
        logged = records[record.step]
        assert logged["epoch"] == record.epoch
        assert logged["eval_loss"] == record.validation_loss
        # Everything else by its name in history.csv; rank_1 is the agreement with the base.
        for name in ("ttr", "rank_1", "top1_error", "perplexity", "entropy", "bigram_repetition"):
            assert logged[f"eval_{name}"] == getattr(record, name)
    assert "nobody is not supported" in refusal(llama(), texts(), report_to=["nobody"])


def test_loggers_get_the_figure_before_they_close(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    board, wandb, mlflow = [], ModuleType("wandb"), ModuleType("mlflow")

    class Board(TrainerCallback):
        """As transformers' own: a writer while it trains, which is closed at the end."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.tb_writer = SimpleNamespace(
                add_image=lambda name, pixels, dataformats: board.append((name, pixels.ndim))
            )

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.tb_writer = None

    class Run(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            wandb.run = SimpleNamespace(log=board.append)  # type: ignore[attr-defined]

        def on_train_end(self, *_: Any, **__: Any) -> None:
            wandb.run = None  # type: ignore[attr-defined]

    wandb.Image = lambda path: Path(path).read_bytes()[:4]  # type: ignore[attr-defined]
    for name, kind in (("tensorboard", Board), ("wandb", Run), ("mlflow", TrainerCallback)):
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, kind)
    for module in (wandb, mlflow):  # the second one fails: it takes no files
        monkeypatch.setitem(sys.modules, module.__name__, module)
    loggers = ["tensorboard", "wandb", "mlflow"]
    run = hyperfit(llama(), texts(6), epochs=2, report_to=loggers, **FEW | RECORDED)
    assert board == [("history", 3), {"history": b"\x89PNG"}]
    (note,) = run.manifest["notes"]
    assert "mlflow did not take the figure (AttributeError" in note


def test_files_of_loggers_are_part_of_the_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    class Board(TrainerCallback):
        """Writes where transformers' TensorBoardCallback does."""

        def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
            folder = Path(args.output_dir) / "runs" / "Jan01_host"
            folder.mkdir(parents=True)
            (folder / "events").write_text("written")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "board", Board)
    options = {"epochs": 1, "report_to": "board", "checkpoint_minutes": 0.0, **FEW}
    hyperfit(llama(), texts(), out=tmp_path / "run", **options)
    assert (tmp_path / "run" / "runs" / "Jan01_host" / "events").read_text() == "written"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("name", ["TrainingArguments", "TokenTrainer"])
def test_an_error_without_words_is_called_by_its_kind(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise ValueError

    monkeypatch.setattr(fitting if name == "TokenTrainer" else trainer_module, name, fails)
    assert refusal(llama(), texts()) == "cannot train here: ValueError"


# LoRA


def test_late_lora_trains_the_last_blocks_and_nothing_else(
    late: tuple[LlamaForCausalLM, HyperfitRun],
) -> None:
    base, run = late
    assert run.manifest["trained_blocks"] == [2, 3]
    trained = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    assert {name.split(".layers.")[1].split(".")[0] for name in trained} == {"2", "3"}
    q_o, k_v, mlp = 2 * (D + D), 2 * (D + KV), 3 * (D + FF)
    expected = 2 * 4 * (q_o + k_v + mlp)
    assert run.manifest["trained_parameters"] == expected
    assert sum(p.numel() for p in trained.values()) == expected
    assert any(bool(p.any()) for n, p in trained.items() if "lora_B" in n)
    now = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in run.model.state_dict().items()
        if "lora_" not in name
    }
    assert same(now, weights(base))


def test_lora_on_gpt2_learns_too() -> None:
    run = hyperfit(gpt2(), texts(), "lora", epochs=60, learning_rate=2e-2, **FEW)
    assert run.history[-1] < run.history[0] / 2
    assert run.manifest["target_modules"] == ["c_attn", "c_proj", "c_fc"]
    assert run.manifest["trained_blocks"] == [0, 1, 2]


# Folders and hooked form


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(texts())).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    llama().save_pretrained(folder)
    return folder


def test_a_saved_model_opens_everywhere(base_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    run = hyperfit(base_folder, texts(), epochs=2, learning_rate=1e-2, device="cpu", out=out, **FEW)
    assert run.folder == out
    expected = logits(run.model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), expected)
    hooked = load_hooked(out, backend="residual", device="cpu")
    assert torch.equal(hooked(torch.tensor(texts())), expected)
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    record = json.loads((out / "hyperfit.json").read_text())
    assert record["history"] == list(run.history)
    assert record["manifest"] == run.manifest
    assert record["recipe"]["learning_rate"] == 1e-2
    assert record["origins"]["learning_rate"] == "yours"
    assert record["origins"]["batch_size"] == "yours"
    assert record["origins"]["schedule"] == "ours"
    assert record["seed"] == 0
    assert {"torch", "transformers", "hyperlens"} <= record["versions"].keys()


def test_a_saved_adapter_opens_everywhere(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    out = tmp_path / "run"
    monkeypatch.chdir(base_folder.parent)
    options = {"last_k": 2, "epochs": 2, "learning_rate": 1e-2, "device": "cpu", **FEW}
    run = hyperfit(base_folder.name, texts(), "late_lora", out=out, **options)
    monkeypatch.chdir(tmp_path)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_folder)
    assert config["layers_to_transform"] == [2, 3]
    assert not (out / "model.safetensors").exists()
    expected = logits(run.model)
    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    assert torch.equal(logits(PeftModel.from_pretrained(plain, out).eval()), expected)
    hooked = load_hooked(out, backend="residual", device="cpu")
    assert torch.equal(hooked(torch.tensor(texts())), expected)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_card_says_what_was_trained_and_how_to_open_it(
    base_folder: Path, tmp_path: Path, method: str
) -> None:
    options = {"epochs": 2, "device": "cpu", **FEW | RECORDED}
    run = hyperfit(base_folder, texts(6), method, out=tmp_path / "run", **options)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "More Information Needed" not in card
    assert f"`{base_folder}`" in card
    assert f"{run.manifest['trained_parameters']:,} weights" in card
    assert f"{run.history[-1]:.3f} in the last" in card
    assert f"validation loss {run.records[-1].validation_loss:.3f}" in card
    code = re.search(r"```python\n(.*)```", card, re.DOTALL).group(1)
    names: dict[str, Any] = {}
    exec(code.replace("path/of/this/folder", str(tmp_path / "run")), names)
    assert torch.equal(logits(names["model"].eval()), logits(run.model))
    metadata = card.split("---")[1]
    assert f"library_name: {'peft' if method != 'full' else 'transformers'}\n" in metadata
    assert "base_model" not in metadata  # it names a model on the hub, and this is a folder


def test_an_adapter_of_a_nameless_model_names_no_base(tmp_path: Path) -> None:
    hyperfit(llama(), texts(), "lora", epochs=1, out=tmp_path / "run", **FEW)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    with pytest.raises(HyperlensError, match="names no base model"):
        load_hooked(tmp_path / "run", backend="residual")


def test_a_folder_in_use_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ResultsError, match="already exists"):
        hyperfit("no/such-model", ["never read"], out=tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("backend", ["residual", "bridge"])
def test_a_run_comes_back_as_a_hooked_model(
    late: tuple[LlamaForCausalLM, HyperfitRun], backend: Any
) -> None:
    _, run = late
    before = weights(run.model)
    hooked = to_hooked(run, backend)
    tokens = torch.tensor(texts())
    found = hooked.run_with_hooks(tokens, return_type="logits", fwd_hooks=[])
    torch.testing.assert_close(found, logits(run.model), atol=1e-4, rtol=1e-4)
    assert same(before, weights(run.model))
    assert "hooked model" in refusal(hooked, texts())


# The package


def test_importing_training_is_light() -> None:
    heavy = ("torch", "transformers", "peft")
    code = (
        "import sys, hyperlens.training as t; t.preset\n"
        f"print(*[name for name in {heavy} if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []


def test_the_function_is_not_shadowed_by_a_module() -> None:
    import hyperlens.training as training

    for _ in range(2):
        assert all(callable(getattr(training, name)) for name in training.__all__)


# A real model


@pytest.mark.skipif(
    not (STORIES.exists() and GRIMM.exists()), reason="needs ../shared/models and ../shared/corpora"
)
@pytest.mark.slow
def test_a_real_model_learns_passages_by_heart(tmp_path: Path) -> None:
    run = hyperfit(
        STORIES,
        GRIMM,
        recipe="demo",
        out=tmp_path / "run",
        device="cpu",
        progress=False,
        n_sequences=8,
        sequence_length=48,
        epochs=60,
    )
    assert run.history[0] > 2
    assert run.history[-1] < 0.2
    assert run.manifest["data"]["bos_prepended"]
    assert run.manifest["data"]["n_sequences"] == 8
    hooked = load_hooked(tmp_path / "run", backend="residual", device="cpu")
    assert hooked.tokenizer is not None


class EndsAtStepFive(TrainerCallback):
    """In the middle of the third epoch."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        control.should_training_stop = state.global_step == 5


def test_callbacks_of_the_caller_see_every_step_and_can_end_the_run() -> None:
    options: dict[str, Any] = {"epochs": 6, **FEW}
    ends = EndsAtStepFive()
    run = hyperfit(llama(), texts(), callbacks=[ends], **options)
    assert ends.steps == 5
    assert len(run.history) == 3
    assert run.manifest["ending"] == "a callback ended it in epoch 3"
    whole = hyperfit(llama(), texts(), callbacks=(TrainerCallback,), **options)
    assert whole.history[:2] == run.history[:2]
    line = refusal(llama(), texts(), callbacks=["print"])
    assert "TrainerCallback objects of transformers, got str" in line
