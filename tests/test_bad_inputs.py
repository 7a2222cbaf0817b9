"""Every bad input ends in one line that names what is wrong and what to do about it."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import conftest
import peft
import pytest
import torch
import transformers
from conftest import D_VOCAB, lora, make_tiny, perturbed, token_texts
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hyperlens import Comparison, compare_models, load_hooked
from hyperlens.errors import (
    ActivationError,
    ArgumentError,
    CorpusError,
    HyperlensError,
    LoadingError,
    PairError,
    ParityError,
    ProbeError,
    ResultsError,
)
from hyperlens.probes import ResidualDrift

IDS = token_texts(4)
TL4 = int(version("transformer-lens").split(".")[0]) >= 4


def refused(error: type[HyperlensError], call: Callable[[], object], *expected: object) -> str:
    """The call fails with exactly this error, in one line that holds all expected words."""
    with pytest.raises(HyperlensError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert len(message.splitlines()) == 1, message
    assert message == message.strip()
    for words in expected:
        assert str(words) in message
    return message


def comparing(base: object, tuned: object, texts: object = IDS, **options: object) -> Callable:
    return lambda: compare_models(base, tuned, texts, progress=False, **options)


def loading(source: object, **options: object) -> Callable:
    return lambda: load_hooked(source, **options)


@pytest.fixture
def unchecked():
    """Arguments of a wrong type reach our own checks, as they do outside the tests."""
    with conftest.unchecked():
        yield


@pytest.fixture(scope="module")
def base():
    return make_tiny("llama")


@pytest.fixture(scope="module")
def tuned(base):
    return perturbed(base)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint, not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "good"
    copy.deepcopy(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good adapter of the base that names none, not to be changed."""
    folder = tmp_path_factory.mktemp("adapters") / "good"
    lora(copy.deepcopy(base), "llama").save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy of the good checkpoint, to be broken."""
    return Path(shutil.copytree(saved, tmp_path / "broken"))


@pytest.fixture
def broken_adapter(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


# Folders and checkpoints


@pytest.mark.transformer_lens
def test_missing_folder(base, tmp_path: Path) -> None:
    missing = tmp_path / "none"
    for source in (missing, str(missing), "./none", "models/deep/none"):
        for call in (comparing(source, base), comparing(base, source), loading(source)):
            refused(LoadingError, call, "none", "does not exist", "give a folder", "or a hub id")


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(base) -> None:
    for call in (comparing("owner/none", base), loading("none")):
        refused(LoadingError, call, "there is no such folder", "hub", "check the name")


def test_a_file_in_place_of_a_folder(base, saved: Path) -> None:
    refused(LoadingError, comparing(saved / "config.json", base), "is a file", "give a folder")


def test_folder_without_configuration(tmp_path: Path) -> None:
    refused(LoadingError, loading(tmp_path), "no config.json", "save_pretrained", "adapter")


def test_folder_without_weights(base, broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    for call in (comparing(base, broken), loading(broken)):
        refused(LoadingError, call, broken, "no weights", "*.safetensors", "save_pretrained")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_only_checkpoint_is_never_opened(base, broken: Path, name: str) -> None:
    (broken / "model.safetensors").unlink()
    # Whoever unpickled this would notice.
    (broken / name).write_bytes(b"cbuiltins\nexit\n(tR.")
    for call in (comparing(base, broken), loading(broken)):
        refused(LoadingError, call, name, "pickled", "convert them to safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:20],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"<html>404 not found</html>" * 50,
        lambda data: b"\xff" * len(data),
    ],
    ids=["half", "header", "last byte", "empty", "web page", "garbage"],
)
def test_corrupt_safetensors(base, broken: Path, damage: Callable[[bytes], bytes]) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused(LoadingError, comparing(base, broken), broken, "corrupt", "copy or download them again")


def test_checkpoint_lacking_weights(base, broken: Path) -> None:
    rewrite(broken, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    for call in (comparing(base, broken), loading(broken)):
        refused(
            LoadingError,
            call,
            "lacks 1 weights",
            "model.layers.1.mlp.up_proj.weight",
            "save the whole model again",
        )


def test_checkpoint_with_weights_of_other_sizes(base, broken: Path) -> None:
    key = "model.layers.1.mlp.up_proj.weight"
    rewrite(broken, lambda weights: weights.update({key: torch.zeros(3, 5)}))
    refused(LoadingError, comparing(base, broken), key, "(3, 5)", "(48, 32)", "save the model")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_the_model_does_not_use_are_noted(base, broken: Path) -> None:
    rewrite(broken, lambda weights: weights.update({"model.extra.weight": torch.zeros(2)}))
    notes = compare_models(base, broken, IDS, progress=False).meta["notes"]
    assert any("model.extra.weight" in note and "not used" in note for note in notes)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"a": 1}', '{"model_type": "nope"}'], ids=["cut", "list", "no", "new"]
)
def test_unreadable_configuration(base, broken: Path, content: str) -> None:
    (broken / "config.json").write_text(content)
    refused(LoadingError, comparing(base, broken), f"cannot load {broken}", "save_pretrained")


def test_unreadable_tokenizer(base, broken: Path) -> None:
    (broken / "tokenizer.json").write_text("{")
    refused(LoadingError, comparing(base, broken), "tokenizer", "(model, tokenizer)")


# Models of another kind


@pytest.mark.transformer_lens
def test_encoders(base, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=D_VOCAB,
    )
    for kind in (transformers.BertModel, transformers.BertForMaskedLM):
        model = kind(copy.deepcopy(config)).eval()
        model.save_pretrained(tmp_path / kind.__name__)
        for source in (model, tmp_path / kind.__name__):
            for call in (comparing(base, source), loading(source)):
                refused(LoadingError, call, kind.__name__, "expected a …ForCausalLM")
    # An encoder with a language modelling head is told by what it does, not by its name.
    model = transformers.BertLMHeadModel(copy.deepcopy(config)).eval()
    refused(LoadingError, comparing(base, model), "looks ahead", "expected a causal")


@pytest.mark.transformer_lens
def test_encoder_decoders(base, tmp_path: Path) -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=D_VOCAB
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "t5")
    for source in (model, tmp_path / "t5"):
        for call in (comparing(base, source), loading(source)):
            refused(LoadingError, call, "encoder-decoder", "t5", "expected a …ForCausalLM")


@pytest.mark.transformer_lens
def test_models_without_an_unembedding(base, tmp_path: Path) -> None:
    config = copy.deepcopy(base.config)
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "classifier")
    for source in (model, tmp_path / "classifier"):
        refused(LoadingError, comparing(base, source), "LlamaForSequenceClassification", "CausalLM")
    refused(LoadingError, comparing(base, base.model), "LlamaModel", "ForCausalLM")


def test_the_class_of_an_object_counts_not_where_its_configuration_was(base) -> None:
    model = perturbed(base)
    model.config.architectures = ["LlamaForSequenceClassification"]
    compare_models(base, model, IDS, progress=False)


@pytest.mark.transformer_lens
@pytest.mark.parametrize("source", [torch.nn.Linear(2, 2), 3, None, [1, 2]], ids=repr)
def test_what_is_no_model(unchecked, base, source: object) -> None:
    for call in (comparing(base, source), loading(source)):
        refused(LoadingError, call, "expected a", "hooked model")


# Pairs that cannot be compared


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 2}, "depth: base 3, tuned 2; compare models with the same blocks"),
        ({"hidden_size": 16, "head_dim": 8}, "width: base 32, tuned 16; compare models of one"),
    ],
    ids=["depth", "width"],
)
def test_different_sizes(base, changes: dict[str, int], expected: str) -> None:
    refused(PairError, comparing(base, make_tiny("llama", **changes)), expected)


WORDS = [f"w{i}" for i in range(D_VOCAB)]


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")


def test_tokenizers_that_differ(base, tuned) -> None:
    one, other = tokenizer_of(WORDS), tokenizer_of([WORDS[0], *WORDS[:0:-1]])
    refused(
        PairError,
        comparing((base, one), (tuned, other), ["w1 w2 w3"]),
        "tokenizers differ",
        "60 tokens have other ids ('w1' is 1 and 60)",
        "1 of 1 texts are split differently",
        "share a tokenizer",
    )
    # Token ids mean the same to both whatever the tokenizers say.
    compare_models((base, one), (tuned, other), IDS, progress=False)


def test_tokens_that_are_gone(base, tuned) -> None:
    one, other = tokenizer_of(WORDS), tokenizer_of([*WORDS[:-1], "new"])
    refused(
        PairError,
        comparing((base, one), (tuned, other), ["w1 w2 w3"]),
        "1 base tokens are gone ('w60')",
    )


def test_two_kinds_of_hooked_models(base, tuned) -> None:
    bridge, residual = load_hooked(base), load_hooked(tuned, backend="residual")
    refused(
        PairError,
        comparing(bridge, residual),
        "the base is a bridge model and the tuned one a residual model",
        "load both the same way",
    )
    refused(PairError, comparing(residual, bridge), "load both the same way")


class BatchDependent(torch.nn.Linear):
    """Like an 8-bit layer: its outputs depend on what else is in the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + 0.5 * float(x.abs().max()))


def test_a_quantised_model_that_does_not_reproduce_itself(base) -> None:
    quantised = copy.deepcopy(base)
    for layer in quantised.model.layers:
        layer.mlp.down_proj.__class__ = BatchDependent
    call = loading(quantised, backend="residual")
    assert "quantised" not in refused(ParityError, call, "architecture is not supported")
    quantised.quantization_method = "bitsandbytes"
    message = refused(
        ParityError, call, "quantised (bitsandbytes)", "load it unquantised", "bfloat16"
    )
    assert "architecture" not in message


def test_short_names_of_dtypes(base) -> None:
    for short, dtype in {"bf16": "bfloat16", "fp16": "float16", "half": "float16"}.items():
        assert load_hooked(base, backend="residual", dtype=short).cfg.dtype == getattr(torch, dtype)
    assert load_hooked(base, backend="residual", dtype="fp32").cfg.dtype == torch.float32


def test_hooked_models_of_two_dtypes(base, tuned) -> None:
    residual = load_hooked(base, backend="residual")
    half = load_hooked(tuned, backend="residual", dtype="bfloat16")
    refused(PairError, comparing(residual, half), "torch.bfloat16", "load both with the same dtype")


# Adapters


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 16, "head_dim": 8}, {"num_hidden_layers": 2}, {"num_hidden_layers": 4}],
    ids=["width", "fewer blocks", "more blocks"],
)
def test_adapter_of_another_base(adapter: Path, changes: dict[str, int]) -> None:
    other = make_tiny("llama", **changes)
    refused(PairError, comparing(other, adapter), adapter, "does not fit", "give that base")


def test_adapter_of_another_architecture(adapter: Path) -> None:
    refused(PairError, comparing(make_tiny("gpt2"), adapter), "does not fit", "give that base")


def test_adapter_put_on_a_base_that_it_does_not_name(base, broken_adapter: Path) -> None:
    rename_base(broken_adapter, "owner/original")
    notes = compare_models(base, broken_adapter, IDS, progress=False).meta["notes"]
    assert any("names owner/original as its base" in note for note in notes)


def rename_base(folder: Path, name: str | None) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": name}
    path.write_text(json.dumps(config))


def test_adapter_alone_that_names_no_base(adapter: Path) -> None:
    refused(LoadingError, loading(adapter), "names no base model", "give the base yourself")


def test_adapter_alone_whose_base_is_gone(broken_adapter: Path, tmp_path: Path) -> None:
    rename_base(broken_adapter, str(tmp_path / "gone"))
    refused(LoadingError, loading(broken_adapter), broken_adapter, "gone does not exist", "give a")


def test_adapter_with_pickled_weights_only(base, broken_adapter: Path) -> None:
    (broken_adapter / "adapter_model.safetensors").rename(broken_adapter / "adapter_model.bin")
    refused(
        LoadingError, comparing(base, broken_adapter), "no adapter_model.safetensors", "pickled"
    )


def test_corrupt_adapter(base, broken_adapter: Path) -> None:
    file = broken_adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    refused(LoadingError, comparing(base, broken_adapter), "corrupt", "copy or download them again")


@pytest.mark.parametrize("content", ["{", "[]", '{"peft_type": "NEW"}'])
def test_unreadable_adapter_configuration(base, broken_adapter: Path, content: str) -> None:
    (broken_adapter / "adapter_config.json").write_text(content)
    refused(LoadingError, comparing(base, broken_adapter), broken_adapter, "again")


@pytest.mark.parametrize(
    "kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"]
)
def test_prompt_learning_adapters(base, tmp_path: Path, kind: str) -> None:
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / kind)
    for source in (model, tmp_path / kind):
        refused(LoadingError, comparing(base, source), "prompt-learning", "such as LoRA")


def test_a_base_that_peft_has_put_layers_into() -> None:
    model = make_tiny("llama")
    around = lora(model, "llama")
    for base in (model, around.get_base_model()):
        refused(LoadingError, comparing(base, around), "holds adapter layers", "load the base anew")
    # What transformers puts in itself, and knows of, is a tuned model like any other.
    tuned = make_tiny("llama")
    tuned.add_adapter(around.peft_config["default"])
    tuned.load_state_dict(
        {k.replace("base_model.model.", ""): v for k, v in around.state_dict().items()}
    )
    fresh = make_tiny("llama")
    found, expected = (comparing(fresh, other)().long for other in (tuned, around))
    assert [row.value for row in found] == [row.value for row in expected]


def test_a_tokenizer_given_by_name(base, tuned) -> None:
    message = "must be a Hugging Face tokenizer, got str"
    refused(LoadingError, comparing((base, "folder"), tuned), message, "AutoTokenizer")


@pytest.mark.transformer_lens
def test_an_adapter_needs_a_plain_base(base, adapter: Path, saved: Path, tmp_path: Path) -> None:
    wrapped = lora(copy.deepcopy(base), "llama")
    hooked = load_hooked(base, backend="residual")
    folder = Path(shutil.copytree(adapter, tmp_path / "named"))
    rename_base(folder, str(saved))
    for source in (wrapped, hooked, folder):
        refused(
            PairError,
            comparing(source, adapter),
            "needs a plain Hugging Face base",
            "give the base as a folder, hub id or PreTrainedModel",
        )


# Texts


def test_empty_and_short_texts(base, tuned) -> None:
    pair = (base, tokenizer_of(WORDS)), tuned
    refused(CorpusError, comparing(*pair, [""]), "1 are empty", "give longer texts")
    refused(CorpusError, comparing(*pair, ["  ", ""]), "2 are empty", "give longer texts")
    refused(CorpusError, comparing(*pair, ["w5"]), "two tokens or more", "give longer texts")
    refused(CorpusError, comparing(base, tuned, [[5]]), "two tokens or more", "give longer texts")
    refused(CorpusError, comparing(base, tuned, [[1, 5]]), "two tokens or more")
    refused(CorpusError, comparing(base, tuned, []), "no texts", "expected at least one")


def test_a_few_short_texts_are_counted_not_fatal(base, tuned) -> None:
    corpus = compare_models(base, tuned, [*IDS, [], [5]], progress=False).meta["corpus"]
    assert (corpus["n_texts"], corpus["n_empty"], corpus["n_short"]) == (len(IDS) + 2, 1, 1)


def test_texts_over_the_context_are_cut_and_it_is_said(base, tuned) -> None:
    meta = compare_models(base, tuned, [list(range(3, 60)) * 2, *IDS], progress=False).meta
    assert meta["corpus"]["n_cut"] == 1
    assert meta["corpus"]["max_length"] == 64
    assert any("1 of 5 texts are longer than the model's context of 64" in n for n in meta["notes"])


def test_texts_without_a_tokenizer(base, tuned) -> None:
    refused(CorpusError, comparing(base, tuned, ["once upon"]), "pass (model, tokenizer)", "ids")


def test_a_bare_string_that_is_no_file(base, tuned) -> None:
    refused(CorpusError, comparing(base, tuned, "Once upon a time"), "no text file", "a list of")
    refused(CorpusError, comparing(base, tuned, "tales.txt"), "no text file", "an existing file")


def test_what_is_no_text(unchecked, base, tuned) -> None:
    refused(CorpusError, comparing(base, tuned, 7), "expected a list of strings", "int")
    refused(CorpusError, comparing(base, tuned, [1, 2]), "text 0 is a int", "expected strings")
    encoded = {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 1]]}
    refused(CorpusError, comparing(base, tuned, encoded), "expected a list of strings", "dict")


@pytest.mark.parametrize("cut", ["\ud83d", "an emoji cut in two \ud83d", "\udc4b?"])
def test_half_characters(base, tuned, tmp_path: Path, cut: str) -> None:
    expected = "is no valid Unicode", "mend or remove"
    refused(CorpusError, comparing(base, tuned, ["fine", cut]), "text 1", *expected)
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": cut}))
    refused(CorpusError, comparing(base, tuned, str(path)), "texts.jsonl, line 1", *expected)


@pytest.mark.parametrize("rows", [[[1, 5, 6, 7], [1, 8, 0, 0]], [[1, 5, 6, 7], [0, 0, 1, 8]]])
def test_padded_rectangles(base, tuned, rows: list[list[int]]) -> None:
    tokenizer = tokenizer_of([f"w{i}" for i in range(D_VOCAB)])
    tokenizer.pad_token = "w0"
    for texts in (torch.tensor(rows), torch.tensor(rows).numpy(), rows):
        refused(
            CorpusError, comparing((base, tokenizer), tuned, texts), "text 1 is padded", "without"
        )
    # Texts of several lengths are as long as they are meant to be, and a single id may be meant.
    comparing((base, tokenizer), tuned, [*rows, [1, 5, 6]])()
    comparing((base, tokenizer), tuned, torch.tensor([[1, 5, 6, 0]]))()


@pytest.mark.parametrize("reverse", [False, True])
def test_what_looks_like_padding_is_said_where_no_tokenizer_tells(base, tuned, reverse) -> None:
    rows = [[5, 6, 7, 8, 9, 4], [5, 6, 0, 0, 0, 0], [7, 8, 9, 4, 5, 6]]
    rows = [row[::-1] for row in rows] if reverse else rows
    found = comparing(base, tuned, rows)()
    (note,) = (note for note in found.meta["notes"] if "padding" in note)
    assert note.startswith("1 of 3 texts, all of one length,")
    assert "4 times id 0" in note
    clean = comparing(base, tuned, [[5, 6, 7], [8, 9, 0, 0, 0, 0]])()
    assert not any("padding" in note for note in clean.meta["notes"])


@pytest.mark.parametrize("bad", [-1, D_VOCAB, 2**40])
def test_token_ids_out_of_range(base, tuned, bad: int) -> None:
    refused(
        CorpusError,
        comparing(base, tuned, [[3, 4, bad]]),
        f"token id {bad} is outside the model's vocabulary of {D_VOCAB}",
        "own tokenizer",
    )


# Activations


def poisoned(model, block: int, value: float):
    model = copy.deepcopy(model)
    model.model.layers[block].mlp.down_proj.weight.data[:] = value
    return model


@pytest.mark.transformer_lens
@pytest.mark.parametrize("backend", ["residual", "bridge"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_activations_that_are_not_finite(base, tuned, value: float, backend: str) -> None:
    for role, block, models_ in (
        ("tuned", 1, (base, poisoned(tuned, 1, value))),
        ("base", 2, (poisoned(base, 2, value), tuned)),
    ):
        refused(
            ActivationError,
            comparing(*models_, backend=backend),
            f"the {role} model",
            "NaN or infinite",
            f"block {block}",
            "check its weights",
        )


def test_an_embedding_of_one_token_that_is_not_finite(base, tuned) -> None:
    tuned = copy.deepcopy(tuned)
    tuned.model.embed_tokens.weight.data[IDS[0][2]] = float("nan")
    refused(ActivationError, comparing(base, tuned), "the tuned model", "embedding", "check its")


def test_logits_that_overflow_are_not_hidden(base, tuned) -> None:
    tuned = copy.deepcopy(tuned)
    tuned.lm_head.weight.data[5] = float("nan")
    with pytest.raises(HyperlensError) as caught:
        comparing(base, tuned)()
    assert len(str(caught.value).splitlines()) == 1


# Options


@pytest.mark.transformer_lens
@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"batch_size": 0}, CorpusError, "batch_size must be at least 1 (a whole number), got 0"),
        (
            {"max_length": 1},
            CorpusError,
            "max_length must be at least 2 tokens (a whole number), got 1",
        ),
        ({"sink_threshold": 0.5}, CorpusError, "sink_threshold must be 0 (off) or more than 1"),
        ({"sink_threshold": float("nan")}, CorpusError, "sink_threshold"),
        ({"sink_threshold": "10"}, ArgumentError, "sink_threshold must be a number, got"),
        ({"sink_threshold": None}, ArgumentError, "sink_threshold must be a number, got"),
        ({"lens_tokens": 0}, ProbeError, "lens_tokens must be a number of tokens of each text"),
        ({"lens_tokens": 1.5}, ProbeError, "or a share of them, such as 0.1, got 1.5"),
        ({"lens_tokens": True}, ArgumentError, "lens_tokens must be"),
        ({"seed": -1}, CorpusError, "seed must be a whole number from 0 to"),
        ({"seed": 1.5}, ArgumentError, "seed must be a whole number"),
        ({"seed": None}, ArgumentError, "seed must be a whole number"),
        ({"device": "gpu"}, LoadingError, "device 'gpu' cannot be used here"),
        ({"dtype": "f32"}, LoadingError, "dtype must be float32, bfloat16, float16 or float64"),
        ({"dtype": "int8"}, LoadingError, "got 'int8'"),
        ({"backend": "hooked"}, LoadingError, "one of residual, bridge, hooked_transformer; got"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options(unchecked, base, tuned, options: dict, error: type, expected: str) -> None:
    refused(error, comparing(base, tuned, **options), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_here(base, tuned) -> None:
    refused(LoadingError, comparing(base, tuned, device="cuda"), "'cuda' cannot be used here")
    refused(LoadingError, loading(base, device="cuda"), "'cuda' cannot be used here")


def test_options_of_load_hooked(unchecked, base) -> None:
    refused(LoadingError, loading(base, backend="nnsight"), "one of residual, bridge")
    refused(LoadingError, loading(base, dtype="half precision"), "dtype must be float32")
    refused(LoadingError, loading(base, device="gpu:"), "cannot be used here")


@pytest.mark.skipif(not TL4, reason="this TransformerLens still has HookedTransformer")
def test_a_backend_that_this_transformer_lens_lacks(base, tuned) -> None:
    for call in (
        comparing(base, tuned, backend="hooked_transformer"),
        loading(base, backend="hooked_transformer"),
    ):
        refused(
            LoadingError,
            call,
            "removed in 4.0",
            "'transformer-lens>=3.9,<4'",
            "backend='bridge' or 'residual'",
        )


# Probes


class Failing(ResidualDrift):
    """Raises in one step."""

    name = "failing"

    def __init__(self, step: str, error: Exception) -> None:
        super().__init__()
        self._step, self._error = step, error

    def sum_shapes(self, spec):
        if self._step == "open":
            raise self._error
        return super().sum_shapes(spec)

    def update(self, pair) -> None:
        if self._step == "update":
            raise self._error
        super().update(pair)

    def compute(self):
        if self._step == "compute":
            raise self._error
        return super().compute()


@pytest.mark.parametrize("step", ["open", "update", "compute"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("too few tokens"), "ValueError: too few tokens"),
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line"),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
    ids=["line", "lines", "silent"],
)
def test_a_probe_that_raises_is_named(base, tuned, step, error, expected) -> None:
    where = "state_bytes" if step == "open" else step
    refused(
        ProbeError,
        comparing(base, tuned, probes=[ResidualDrift(), Failing(step, error)]),
        f"probe 'failing' failed in {where}",
        expected,
    )


def test_bad_lists_of_probes(unchecked, base, tuned) -> None:
    refused(ArgumentError, comparing(base, tuned, probes=[ResidualDrift]), "ResidualDrift() rather")
    refused(ArgumentError, comparing(base, tuned, probes=[3]), "probes must be a list", "a Probe")
    refused(
        ProbeError, comparing(base, tuned, probes=["drfit"]), "no probe 'drfit'", "mean 'drift'?"
    )
    refused(ProbeError, comparing(base, tuned, probes=[]), "name at least one, or pass None")
    twice = [ResidualDrift(), ResidualDrift()]
    refused(ProbeError, comparing(base, tuned, probes=twice), "two probes are named 'drift'")


def test_layers_that_do_not_exist(base, tuned) -> None:
    probe = ResidualDrift(layers=(7,))
    refused(ProbeError, comparing(base, tuned, probes=[probe]), "layers [7] do not exist", "choose")


# Results


@pytest.fixture(scope="module")
def comparison(base, tuned) -> Comparison:
    return compare_models(base, tuned, IDS, probes=[ResidualDrift()], progress=False)


def test_existing_output_folder(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for place in (tmp_path, tmp_path / "mine.txt"):
        refused(ResultsError, lambda place=place: comparison.save(place), "already exists", "new")
    assert os.listdir(tmp_path) == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_unwritable_output_folder(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(
        ResultsError,
        lambda: comparison.save(tmp_path / "file" / "out"),
        "file is not a writable folder",
        "choose another folder",
    )
    assert os.listdir(tmp_path) == ["file"]


def test_folders_that_hold_no_comparison(saved: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "none", saved):
        refused(ResultsError, lambda place=place: Comparison.load(place), "as save() wrote it")
    (tmp_path / "comparison.json").write_text('{"format": 1}')
    refused(ResultsError, lambda: Comparison.load(tmp_path), "not readable as comparison")
    (tmp_path / "comparison.json").write_text('{"format": 99}')
    refused(ResultsError, lambda: Comparison.load(tmp_path), "format 99", "run it again")
