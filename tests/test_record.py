"""The record of training: every number as plain code computes it, and no trace on the model."""

import copy
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, D_VOCAB, lora, make_tiny
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from scipy.stats import rankdata
from torch.nn import functional
from transformers import AutoModelForCausalLM, MambaConfig
from transformers.cache_utils import DynamicLayer

from hyperlens.errors import ResultsError, TrainingError
from hyperlens.models.structure import find_structure
from hyperlens.training import history, read_history, record
from hyperlens.training.greedy import cache_bytes
from hyperlens.training.history import Record
from hyperlens.training.recipes import Recipe
from hyperlens.training.record import Recorder, greedy
from hyperlens.training.token_loss import last_position_only
from hyperlens.training.weights import gradient_checkpointing

ROOT = Path(__file__).resolve().parent.parent
N, LENGTH, PROMPT, NEW = 6, 24, 5, 20
N_DECISIONS = N * (LENGTH - 1)
SMALL = Recipe(batch_size=4, n_prompts=5, prompt_tokens=PROMPT, new_tokens=NEW)


def a_record(**changes: Any) -> Record:
    numbers = {name: 0.1 * i for i, name in enumerate(history.COLUMNS)}
    values: dict[str, Any] = {**numbers, "epoch": 10, "step": 40, "ttr_per_prompt": (0.5, 0.25)}
    return Record(**values | changes)


def held_out(n: int = N, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(3, D_VOCAB, (n, length)))


def shake(model: Any, scale: float = 0.1, seed: int = 1) -> None:
    """What training does to a model: other weights, in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn_like(parameter)


# Every number, by other means


def all_logits(model: Any, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1]
    return logits.flatten(0, 1).double().numpy()  # type: ignore[no-any-return]


def generated(model: Any, prompts: torch.Tensor, new_tokens: int) -> np.ndarray:
    """What transformers itself generates, without an end-of-text token."""
    model.generation_config.eos_token_id = None
    whole = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )
    return whole[:, prompts.shape[1] :].numpy()  # type: ignore[no-any-return]


def by_hand(base: Any, tuned: Any, tokens: torch.Tensor, recipe: Recipe) -> dict[str, float]:
    reference = tokens[:, 1:].flatten().numpy()
    base_logits, logits = all_logits(base, tokens), all_logits(tuned, tokens)
    log_p = log_softmax(logits, axis=-1)
    winners = logits.argmax(-1)
    ranks = rankdata(-base_logits, method="min", axis=-1)[np.arange(len(winners)), winners]
    loss = -log_p[np.arange(len(reference)), reference].mean()
    prompts = tokens[: recipe.n_prompts, : recipe.prompt_tokens]
    made = generated(tuned, prompts, recipe.new_tokens)[:, -96:].tolist()
    pairs = [list(pairwise(row)) for row in made]
    return {
        "validation_loss": loss,
        "perplexity": np.exp(loss),
        "top1_error": np.mean(winners != reference),
        "ttr": np.mean([len(set(row)) / len(row) for row in made]),
        "bigram_repetition": np.mean([1 - len(set(row)) / len(row) for row in pairs]),
        "rank_1": np.mean(ranks == 1),
        "rank_2_10": np.mean((ranks >= 2) & (ranks <= 10)),
        "rank_gt_10": np.mean(ranks > 10),
        "entropy": -(np.exp(log_p) * log_p).sum(-1).mean(),
    }


def check(found: Record, expected: dict[str, float], rel: float = 1e-5) -> None:
    for name, value in expected.items():
        # Two logits a rounding apart may change places, once.
        share = name.startswith(("rank", "top1"))
        tolerance = {"abs": 1.5 / N_DECISIONS} if share else {"rel": rel}
        assert getattr(found, name) == pytest.approx(value, **tolerance), name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_number_of_a_fully_trained_model(name: str) -> None:
    model, tokens = make_tiny(name), held_out()
    base = copy.deepcopy(model)
    recorder = Recorder(model, tokens, SMALL)
    shake(model)
    found = recorder.measure(7, 21, 0.5, 1.25)
    assert (found.epoch, found.step, found.train_loss, found.seconds) == (7, 21, 0.5, 1.25)
    expected = by_hand(base, model, tokens, SMALL)
    assert expected["rank_1"] < 0.9
    check(found, expected)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
def test_every_number_of_an_adapted_model(name: str) -> None:
    base, tokens = make_tiny(name), held_out()
    model = lora(copy.deepcopy(base), name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_B" in path:
                parameter.zero_()
    recipe = replace(SMALL, method="lora")
    recorder = Recorder(model, tokens, recipe)
    assert recorder.measure(0, 0, math.nan, 0.0).rank_1 == 1.0
    shake(model, 0.3)
    expected = by_hand(base, model, tokens, recipe)
    assert expected["rank_1"] < 0.95
    check(recorder.measure(1, 1, 1.0, 1.0), expected)


def test_training_some_blocks_leaves_the_head() -> None:
    model, tokens = make_tiny("llama"), held_out()
    base = copy.deepcopy(model)
    recipe = replace(SMALL, blocks=(1, 2))
    for part in (model.get_input_embeddings(), model.model.norm, model.lm_head):
        part.requires_grad_(False)
    recorder = Recorder(model, tokens, recipe)
    shake(model)
    check(recorder.measure(1, 1, 1.0, 1.0), by_hand(base, model, tokens, recipe))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_every_number_in_bfloat16(name: str) -> None:
    model, tokens = make_tiny(name).to(torch.bfloat16), held_out()
    base = copy.deepcopy(model)
    recorder = Recorder(model, tokens, SMALL)
    shake(model)
    found = recorder.measure(1, 1, 1.0, 1.0)
    expected = by_hand(base, model, tokens, SMALL)
    assert found.validation_loss == pytest.approx(expected["validation_loss"], rel=1e-2)
    assert found.entropy == pytest.approx(expected["entropy"], rel=1e-2)
    assert found.rank_1 == pytest.approx(expected["rank_1"], abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_base_is_its_own_first_choice(name: str, dtype: torch.dtype) -> None:
    found = Recorder(make_tiny(name).to(dtype), held_out(), SMALL).measure(0, 0, math.nan, 0.0)
    assert (found.rank_1, found.rank_2_10, found.rank_gt_10) == (1.0, 0.0, 0.0)
    assert math.isnan(found.train_loss)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_frozen_prefix_from_the_cache_gives_the_same_numbers(name: str) -> None:
    model, tokens = make_tiny(name), held_out()
    blocks = find_structure(model).blocks
    cached, plain = (Recorder(model, tokens, SMALL, frozen) for frozen in (2, 0))
    shake(blocks[2])
    expected = plain.measure(1, 1, 1.0, 1.0)
    assert expected.rank_1 < 1.0
    assert cached.measure(1, 1, 1.0, 1.0) == expected
    # The cache does not see a change before block 2, and the other recorder does.
    shake(blocks[0])
    losses = [one.measure(1, 1, 1.0, 1.0).validation_loss for one in (cached, plain)]
    assert losses[0] == expected.validation_loss != losses[1]


def test_shares_and_means_hang_together() -> None:
    model = make_tiny("llama")
    recorder = Recorder(model, held_out(), SMALL)
    shake(model, 0.3)
    found = recorder.measure(1, 1, 1.0, 1.0)
    assert found.rank_1 + found.rank_2_10 + found.rank_gt_10 == pytest.approx(1.0)
    assert len(found.ttr_per_prompt) == SMALL.n_prompts
    assert found.ttr == pytest.approx(np.mean(found.ttr_per_prompt))
    assert 0 < found.entropy < math.log(D_VOCAB)


def test_only_the_last_96_tokens_count() -> None:
    model, tokens = make_tiny("llama", max_position_embeddings=160), held_out(2)
    recipe = replace(SMALL, new_tokens=130)
    found = Recorder(model, tokens, recipe).measure(0, 0, math.nan, 0.0)
    made = generated(model, tokens[:, :PROMPT], 130)
    last = [len(set(row)) / 96 for row in made[:, -96:].tolist()]
    assert found.ttr_per_prompt == pytest.approx(last)
    assert last != [len(set(row)) / 130 for row in made.tolist()]


def test_with_fewer_sequences_than_prompts_all_are_continued() -> None:
    recorder = Recorder(make_tiny("llama"), held_out(3), replace(SMALL, n_prompts=100))
    assert len(recorder.measure(0, 0, math.nan, 0.0).ttr_per_prompt) == 3


def test_a_loss_beyond_all_bounds_has_infinite_perplexity() -> None:
    model, tokens = make_tiny("llama"), held_out()
    recorder = Recorder(model, tokens, SMALL)
    with torch.no_grad():
        model.lm_head.weight *= 1e6
    found = recorder.measure(1, 1, 1.0, 1.0)
    assert found.validation_loss > 1000
    assert found.perplexity == math.inf


# No trace


def numbers(found: Record) -> dict[str, Any]:
    return found.to_json()


def states() -> list[Any]:
    legacy = np.random.get_state()  # noqa: NPY002 - the Trainer seeds it
    return [random.getstate(), legacy[1].tolist(), legacy[2], torch.get_rng_state().tolist()]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_measuring_leaves_no_trace(name: str) -> None:
    model = make_tiny(name).train()
    with gradient_checkpointing(model, True):
        check_no_trace(model)


def check_no_trace(model: Any) -> None:
    model.config.use_cache = False
    next(model.children()).training = False
    model(input_ids=held_out()).logits.float().sum().backward()
    tokens = held_out()

    def facts() -> dict[str, Any]:
        return {
            "modes": [m.training for m in model.modules()],
            "use_cache": model.config.use_cache,
            "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
            "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
            "weights": [p.tolist() for p in model.parameters()],
            "trained": [p.requires_grad for p in model.parameters()],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
            "forward": [vars(m).get("forward") for m in model.modules()],
            "attributes": [sorted(vars(m)) for m in model.modules()],
            "grad enabled": torch.is_grad_enabled(),
            "generators": states(),
        }

    before = facts()
    recorder = Recorder(model, tokens, SMALL)
    assert facts() == before
    recorder.measure(1, 1, 1.0, 1.0)
    assert facts() == before


def test_how_the_model_is_being_trained_does_not_show() -> None:
    model, tokens = make_tiny("gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3), held_out()
    recorder = Recorder(model, tokens, SMALL)
    shake(model)
    quiet = numbers(recorder.measure(1, 1, 1.0, 1.0))
    model.train()
    model.config.use_cache = False
    with gradient_checkpointing(model, True):
        assert numbers(recorder.measure(1, 1, 1.0, 1.0)) == quiet
    assert numbers(Recorder(model, tokens, SMALL).measure(1, 1, 1.0, 1.0)) != quiet


def test_mixed_precision_does_not_show() -> None:
    from accelerate.utils import convert_outputs_to_fp32

    model, tokens = make_tiny("llama"), held_out()
    recorder = Recorder(model, tokens, SMALL)
    expected = recorder.measure(0, 0, 1.0, 1.0)
    mixed = torch.autocast("cpu", torch.bfloat16)(model.forward)
    model.forward = convert_outputs_to_fp32(mixed)
    wrapped = vars(model)["forward"]
    assert recorder.measure(0, 0, 1.0, 1.0) == expected
    assert vars(model)["forward"] is wrapped
    assert expected.rank_1 == 1.0


def test_a_failed_measurement_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no more")

    model = make_tiny("llama").train()
    recorder = Recorder(model, held_out(), SMALL)
    before = states()
    monkeypatch.setattr(record, "greedy", full)
    with pytest.raises(torch.OutOfMemoryError):
        recorder.measure(1, 1, 1.0, 1.0)
    assert states() == before
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert not model.lm_head._forward_pre_hooks


def train_a_little(recording: bool) -> list[list[float]]:
    """A few steps with dropout, so that any number drawn in between would show."""
    model = make_tiny("gpt2", attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1).train()
    recorder = Recorder(model, held_out(seed=1), SMALL) if recording else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(5)
    tokens = held_out()
    for step in range(4):
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        if recorder is not None:
            recorder.measure(step, step, 1.0, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [p.flatten().tolist() for p in model.parameters()]


def test_training_is_bit_identical_with_and_without_records() -> None:
    assert train_a_little(True) == train_a_little(False)


def test_measuring_twice_gives_the_same() -> None:
    model = make_tiny("llama")
    recorder = Recorder(model, held_out(), SMALL)
    shake(model)
    assert recorder.measure(1, 1, 1.0, 1.0) == recorder.measure(1, 1, 1.0, 1.0)


# Memory


def test_logits_never_exist_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make_tiny("llama"), held_out()
    whole = Recorder(model, tokens, SMALL).measure(0, 0, 1.0, 1.0)
    monkeypatch.setattr(record, "logit_chunk_rows", lambda d_vocab, device: 17)
    seen: list[int] = []

    def count(module: Any, given: Any, output: torch.Tensor) -> None:
        seen.append(output.numel() // D_VOCAB)

    recorder = Recorder(model, tokens, SMALL)
    with model.lm_head.register_forward_hook(count):
        chunked = recorder.measure(0, 0, 1.0, 1.0)
    assert max(seen) == 17
    check(chunked, {name: getattr(whole, name) for name in history.COLUMNS[3:-1]})


@pytest.mark.parametrize("batch_size", [1, 2, 6, 50])
def test_batches_do_not_show(batch_size: int) -> None:
    model, tokens = make_tiny("gemma2"), held_out()
    found = []
    for size in (batch_size, SMALL.batch_size):
        trained = copy.deepcopy(model)
        recorder = Recorder(trained, tokens, replace(SMALL, batch_size=size))
        shake(trained)
        found.append(recorder.measure(1, 1, 1.0, 1.0))
    check(found[0], {name: getattr(found[1], name) for name in history.COLUMNS[3:-1]})


# What does not fit


def refusal(tokens: torch.Tensor, **changes: Any) -> str:
    with pytest.raises(TrainingError) as caught:
        Recorder(make_tiny("llama"), tokens, replace(SMALL, **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_said_beforehand() -> None:
    assert "lower prompt_tokens to 23 or less" in refusal(held_out(), prompt_tokens=24)
    assert "positions for 64" in refusal(held_out(), new_tokens=60)
    assert "new_tokens (now 60)" in refusal(held_out(), new_tokens=60)
    assert "no held-out sequences" in refusal(held_out(0))
    Recorder(make_tiny("llama"), held_out(), replace(SMALL, prompt_tokens=23, new_tokens=41))


# Greedy generations (their repetition is in test_diversity)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_transformers_greedy(name: str) -> None:
    model, prompts = make_tiny(name), held_out(length=PROMPT)
    with torch.no_grad():
        made = greedy(model, prompts, 40)
    assert made.tolist() == generated(model, prompts, 40).tolist()


def test_greedy_copies_no_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the prompt: transformers' own layer would make new ones of all of them each time."""
    model, prompts = make_tiny("llama"), held_out(length=PROMPT)
    calls: list[int] = []
    update = DynamicLayer.update

    def counting(self: Any, keys: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(keys.shape[-2])
        return update(self, keys, *args, **kwargs)

    monkeypatch.setattr(DynamicLayer, "update", counting)
    with torch.no_grad():
        greedy(model, prompts, 8)
    assert calls == [PROMPT] * 3


def test_as_many_prompts_share_a_batch_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make_tiny("llama"), held_out(20)

    def at_once(**changes: Any) -> int:
        return Recorder(model, tokens, replace(SMALL, **changes))._prompts_at_once()

    # 4 x 24 tokens are a batch: of prompts of 5 tokens, 19.
    assert at_once() == 19
    monkeypatch.setattr(record, "CACHE_BYTES", 10 * cache_bytes(model, PROMPT + NEW))
    assert at_once() == 10
    monkeypatch.setattr(record, "CACHE_BYTES", 0)
    assert at_once() == 3
    assert at_once(batch_size=1) == 1


def test_greedy_without_a_key_value_cache_reads_everything_again() -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=D_VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    whole = prompts = held_out()[:2, :PROMPT]
    with torch.no_grad():
        for _ in range(NEW):
            chosen = model(input_ids=whole, use_cache=False).logits[:, -1].argmax(-1)
            whole = torch.cat([whole, chosen[:, None]], dim=1)
        assert torch.equal(greedy(model, prompts, NEW), whole[:, PROMPT:])
    assert Recorder(model, held_out(), SMALL).measure(0, 0, math.nan, 0.0).rank_1 == 1.0


def test_an_end_of_text_token_does_not_end_a_continuation() -> None:
    model, prompts = make_tiny("llama"), held_out(length=PROMPT)
    with torch.no_grad():
        made = greedy(model, prompts, NEW)
        model.generation_config.eos_token_id = model.config.eos_token_id = int(made[0, 0])
        assert torch.equal(greedy(model, prompts, NEW), made)
    assert made.shape == (N, NEW)


def test_the_head_is_left_as_it_was_after_an_error() -> None:
    model = make_tiny("llama")
    with pytest.raises(RuntimeError, match="inside"), last_position_only(model.lm_head):
        raise RuntimeError("inside")
    assert not model.lm_head._forward_pre_hooks


# JSON and CSV


any_float = st.floats(allow_nan=True, allow_infinity=True)
# Built into a record inside the test: hypothesis forbids the dice that beartype throws.
fields = st.fixed_dictionaries(
    {
        **dict.fromkeys(history.COLUMNS, any_float),
        **dict.fromkeys(history.WHOLE_NUMBERS, st.integers(0, 10**9)),
        "ttr_per_prompt": st.lists(st.floats(0, 1), max_size=3).map(tuple),
    }
)


def exactly(one: Record) -> list[str]:
    return [repr(value) for value in one.to_json().values()]


@given(fields)
def test_a_record_survives_json(values: dict[str, Any]) -> None:
    one = Record(**values)
    text = json.dumps(one.to_json(), allow_nan=False)
    assert exactly(Record.from_json(json.loads(text))) == exactly(one)


def test_a_foreign_record_is_refused() -> None:
    values = a_record().to_json()
    values["loss"] = values.pop("train_loss")
    with pytest.raises(TrainingError, match="loss, train_loss"):
        Record.from_json(values)


@given(st.lists(fields, max_size=4))
def test_a_history_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("history") / history.FILE
    records = [Record(**values) for values in rows]
    history.write(path, records)
    for source in (path, str(path.parent)):
        table = read_history(source)
        assert len(table) == len(records)
        for name in history.COLUMNS:
            expected = [repr(getattr(one, name)) for one in records]
            assert [repr(value) for value in table[name].tolist()] == expected


def test_the_columns_are_a_promise(tmp_path: Path) -> None:
    history.write(tmp_path / "history.csv", [a_record()])
    assert (tmp_path / "history.csv").read_text().splitlines()[0] == (
        "epoch,step,train_loss,validation_loss,perplexity,top1_error,ttr,bigram_repetition,"
        "rank_1,rank_2_10,rank_gt_10,entropy,seconds"
    )
    assert read_history(tmp_path)["epoch"].dtype == "int64"


def no_history(source: Any) -> str:
    with pytest.raises(TrainingError) as caught:
        read_history(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_history_is_said(tmp_path: Path) -> None:
    assert "record_every" in no_history(tmp_path)
    assert "record_every" in no_history(tmp_path / "nowhere" / "history.csv")
    file = tmp_path / "history.csv"
    for text in ("", "a,b\n1,2\n", "\x00"):
        file.write_text(text)
        assert "expected the columns epoch, step" in no_history(file)
    file.write_bytes(b"\xff\xfe")
    assert "cannot read" in no_history(file)
    history.write(file, [a_record()])
    whole = file.read_text()
    for broken in (whole[:-20], whole + "1,2\n", whole.replace("40", "forty")):
        file.write_text(broken)
        assert "is not a history" in no_history(file)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="cannot write"):
        history.write(tmp_path / "nowhere" / "history.csv", [a_record()])


def test_a_reader_never_sees_half_a_row(tmp_path: Path) -> None:
    """Another process writes without pause and is killed; every read in between is whole."""
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT / 'tests'), str(ROOT)]}\n"
        "from pathlib import Path\n"
        "from hyperlens.training import history\n"
        "numbers = dict.fromkeys(history.COLUMNS, 0.1) | {'epoch': 1, 'step': 1}\n"
        "one = history.Record(**numbers, ttr_per_prompt=())\n"
        f"path = Path({str(tmp_path)!r}) / history.FILE\n"
        "for n in range(1, 10**9): history.write(path, [one] * (n % 500 + 1))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as writer:
        try:
            lengths = set()
            while len(lengths) < 20:
                assert writer.poll() is None, writer.communicate()[1]
                if (tmp_path / history.FILE).exists():
                    lengths.add(len(read_history(tmp_path)))
        finally:
            writer.kill()
    assert 1 <= len(read_history(tmp_path)) <= 500


def test_reading_a_history_is_light(tmp_path: Path) -> None:
    history.write(tmp_path / history.FILE, [a_record()])
    code = (
        "import sys; from hyperlens.training import read_history\n"
        f"read_history({str(tmp_path)!r})\n"
        "print(*[name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []


# A real model


def test_a_real_model_reads_as_transformers_says(stories: Path, fairy_tales: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories).eval()
    text = (fairy_tales / "andersen.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(stories)(text[:40000])["input_ids"]
    tokens = torch.tensor(ids[: 8 * 96]).view(8, 96)
    recipe = replace(SMALL, n_prompts=8, prompt_tokens=16, new_tokens=32)
    found = Recorder(model, tokens, recipe).measure(0, 0, math.nan, 0.0)
    with torch.no_grad():
        loss = float(model(input_ids=tokens, labels=tokens).loss)
    assert found.validation_loss == pytest.approx(loss, rel=1e-5)
    assert 5 < found.perplexity < model.config.vocab_size / 4
    assert 0.3 < found.top1_error < 0.9
    assert 0 < found.entropy < math.log(model.config.vocab_size)
    assert found.rank_1 == 1.0
    assert 0.05 < found.ttr < 0.95
