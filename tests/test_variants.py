"""The variants table equals plain transformers and the single experiments."""

import math

import pytest
import torch
from conftest import lora, make_tiny, perturbed, token_texts
from surface_for_tests import words_tokenizer

from hyperlens import cli, match_temperature, open_pair
from hyperlens.errors import HyperlensError, PairError, ResultsError
from hyperlens.experiments import VariantsResult, compare_variants
from hyperlens.training import hyperfit

TEXTS = token_texts(10, shortest=8, longest=20)
SMALL = {"n_prompts": 6, "prompt_tokens": 5, "max_new_tokens": 10, "progress": False}


@pytest.fixture(scope="module")
def models():
    base = make_tiny("llama")
    return base, {"far": perturbed(base, 0.3), "near": lora(make_tiny("llama"), "llama")}


@pytest.fixture(scope="module")
def result(models) -> VariantsResult:
    base, variants = models
    return compare_variants(base, variants, TEXTS, **SMALL)


def plain(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def test_predictions_equal_plain_transformers(models, result) -> None:
    base, variants = models
    kept = []
    for ids in TEXTS:
        first, second = (plain(model, ids)[1:] for model in (base, variants["far"]))
        entropy = torch.distributions.Categorical(logits=second).entropy().mean()
        kept.append(
            (float(entropy), float((first.argmax(-1) == second.argmax(-1)).double().mean()))
        )
    for metric, values in zip(("entropy", "top1_agreement"), zip(*kept, strict=True), strict=True):
        expected = math.fsum(values) / len(values)
        assert result.value(variant="far", metric=metric) == pytest.approx(expected, rel=1e-5)


def test_own_text_is_read_as_the_models_wrote_it(models, result) -> None:
    base, variants = models
    pair = open_pair(base, variants["far"])
    from hyperlens.decoding.generate import GenerationRunner
    from hyperlens.decoding.prompts import choose_prompts

    prompts = choose_prompts(pair.tokenize(TEXTS), 6, 5, 0)
    written = GenerationRunner(prompts, 10, 16, 0, False).run(pair.tuned).tokens
    agreement = []
    for prompt, tokens in zip(prompts, written, strict=True):
        logits = plain(base, [*prompt, *tokens])[len(prompt) - 1 : -1]
        # The variant decodes greedily: what it wrote is its top-1 token everywhere.
        agreement.append(float((logits.argmax(-1) == torch.tensor(tokens)).double().mean()))
    found = result.value(variant="far", metric="written_top1_agreement")
    assert found == pytest.approx(sum(agreement) / len(agreement))


def test_the_single_experiment_says_the_same(models, result) -> None:
    base, variants = models
    single = match_temperature(base, variants["far"], TEXTS, **SMALL)
    for metric, decoding in (
        ("ttr", "greedy"),
        ("rep_2", "greedy"),
        ("entropy", "teacher-forced"),
        ("spearman", "teacher-forced"),
    ):
        for variant, side in (("far", "tuned"), ("original", "original")):
            expected = single.at(variant=side, decoding=decoding, metric=metric)
            row = result.at(variant=variant, metric=metric)
            assert row["value"] == expected["value"], (metric, variant)
            assert row["se"] == pytest.approx(expected["se"], abs=1e-15)


def test_differences_are_paired_and_turn_round(result) -> None:
    for metric in ("entropy", "ttr"):
        there = result.between("near", "far", metric)
        back = result.between("far", "near", metric)
        assert there["value"] == -back["value"]
        assert (there["low"], there["high"]) == (-back["high"], -back["low"])
        gap = result.value(variant="near", metric=metric) - result.value(
            variant="far", metric=metric
        )
        assert there["value"] == pytest.approx(gap)
    with pytest.raises(ResultsError, match="name two different variants"):
        result.between("far", "far", "ttr")
    with pytest.raises(ResultsError, match="did you mean 'near'"):
        result.between("nera", "far", "ttr")


def test_what_is_known_of_training_is_shown(tmp_path) -> None:
    base = make_tiny("llama"), words_tokenizer()
    options = {"recipe": "demo", "n_sequences": 4, "sequence_length": 8, "epochs": 2,
               "record_every": 0, "progress": False}  # fmt: skip
    run = hyperfit(base, TEXTS, "late_lora", last_k=1, out=tmp_path / "late", **options)
    found = compare_variants(base, {"late_lora": str(tmp_path / "late")}, TEXTS, **SMALL)
    assert found.value(variant="late_lora", metric="final_loss") == run.history[-1]
    weights = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert found.value(variant="late_lora", metric="trained_parameters") == weights
    assert "Late-Stage LoRA" in found.summary()


@pytest.mark.parametrize("variants", [{}, {"original": "x"}])
def test_names_that_cannot_be(variants, tiny) -> None:
    with pytest.raises(PairError, match="variants must map names"):
        compare_variants(tiny, variants, TEXTS, **SMALL)


def test_a_variant_that_does_not_fit_is_named(tiny) -> None:
    other = make_tiny("llama", num_hidden_layers=2)
    with pytest.raises(HyperlensError, match=r"variant 'b'.*differ in depth"):
        compare_variants(tiny, {"a": tiny, "b": other}, TEXTS, **SMALL)


def test_the_command(llama_folder, tmp_path, capsys: pytest.CaptureFixture) -> None:
    # Without a tokenizer texts cannot be read, which is one line.
    file = tmp_path / "t.txt"
    file.write_text("one\n\ntwo\n")
    words = ["variants", str(llama_folder), "--variant", "a", str(llama_folder)]
    assert cli.main([*words, "--texts", str(file)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert cli.main([*words, "--variant", "a", "x", "--texts", str(file)]) == 1
    assert "given twice" in capsys.readouterr().err
