"""Ways of decoding side by side: every number is that of the continuations, one by one."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import D_VOCAB, lora, make_tiny, perturbed, token_texts
from scipy import stats as scipy_stats
from test_mauve import Stub

from hyperlens import DecodingResult, cli, decoding_baselines, load_hooked
from hyperlens.decoding.contrastive import adaptive_contrastive_search
from hyperlens.decoding.diversity import MEASURES, distinct
from hyperlens.decoding.generate import continuations
from hyperlens.decoding.guard import Guard
from hyperlens.decoding.prompts import choose_examples
from hyperlens.embedded import embedded_base, embedded_tales
from hyperlens.errors import CorpusError, DecodingError, HyperlensError, LoadingError
from hyperlens.experiments.decoding_finding import METHODS, REFERENCE, WORDS
from hyperlens.experiments.decoding_methods import Writing, Written
from hyperlens.experiments.mauve_scores import few_texts
from hyperlens.statistics import significance

TEXTS = token_texts(10, shortest=8, longest=20)
SHORT = {"prompt_tokens": 6, "max_new_tokens": 12, "progress": False}
STOCHASTIC = [name for name, method in METHODS.items() if not method.deterministic]


@pytest.fixture(scope="module")
def models():
    """A base and a tuned model, of which the base is sure of itself now and then."""
    base = make_tiny("llama")
    with torch.no_grad():
        base.lm_head.weight *= 3
    return base, perturbed(base, 0.5)


@pytest.fixture(scope="module")
def finding(models) -> DecodingResult:
    return decoding_baselines(*models, TEXTS, n_examples=len(TEXTS), **SHORT)


def examples_of(found: DecodingResult) -> list[tuple[list[int], list[str]]]:
    """Prompts and texts in the order of the corpus, on which sampled text depends."""
    return sorted(
        ([int(i) for i in one["prompt"].split()], [text["text"] for text in one["texts"]])
        for one in found.extras["examples"]
    )


def prompts_of(found: DecodingResult) -> list[list[int]]:
    return [prompt for prompt, _ in examples_of(found)]


def written(
    models, prompts: list[list[int]], model: str, method: str, seed: int = 0, **options: object
) -> list[list[int]]:
    """What a way of decoding writes, asked for directly."""
    options = {"max_new_tokens": 12, "stop_at_eos": False, "progress": False} | options
    which = models[model == "tuned"]
    if method == "contrastive":
        return adaptive_contrastive_search(which, None, prompts, **options)
    sampling: dict[str, dict] = {
        "greedy": {"do_sample": False},
        "temperature": {"temperature": 0.7},
        "top_p": {"top_p": 0.95},
        "min_p": {"min_p": 0.1},
        "guard": {"logits_processors": [Guard(7)]},
    }
    given = {"do_sample": True, "seed": seed} | sampling[method]
    return continuations(which, None, prompts, **given, **options)


def test_every_row_is_that_of_the_continuations(models, finding) -> None:
    prompts = prompts_of(finding)
    assert sorted(prompts) == sorted(text[:6] for text in TEXTS)
    drawn = [[int(i) for i in one["prompt"].split()] for one in finding.extras["examples"]]
    assert drawn == [prompts[i] for i in choose_examples(10, 10, 0)] != prompts
    reference = written(models, prompts, *REFERENCE)
    assert len(finding.table) == 7 * 7
    assert finding.ways == [*(("base", name) for name in METHODS), REFERENCE]
    p_values = []
    for way in finding.ways:
        texts = written(models, prompts, *way)
        shown = [of_all[finding.ways.index(way)] for _, of_all in examples_of(finding)]
        assert shown == [" ".join(map(str, t)) for t in texts]
        for metric, measure in MEASURES.items():
            row = finding.value(*way, metric)
            values, others = ([measure(t) for t in side] for side in (texts, reference))
            expected = significance.estimate(values)
            assert [row[key] for key in expected._fields] == pytest.approx(list(expected))
            if way == REFERENCE:
                assert math.isnan(row["p"])
                assert math.isnan(row["difference"])
                continue
            gaps = np.subtract(values, others)
            assert row["difference"] == pytest.approx(gaps.mean())
            if gaps.std():
                half = scipy_stats.t.ppf(0.975, len(gaps) - 1) * scipy_stats.sem(gaps)
                assert row["difference_high"] == pytest.approx(gaps.mean() + half)
                if metric != "windowed_ttr":  # of texts this short the same test as TTR's
                    p_values.append((scipy_stats.ttest_rel(values, others).pvalue, row["p"]))
        together = finding.value(*way, "distinct_2")
        assert together["value"] == pytest.approx(distinct(texts, 2))
        if way != REFERENCE:
            gap = distinct(texts, 2) - distinct(reference, 2)
            assert together["difference"] == pytest.approx(gap)
        lengths = [row.index(2) if 2 in row else 12 for row in texts]
        assert finding.value(*way, "length")["value"] == np.mean(lengths)
    assert all(min(raw, 1) - 1e-12 <= p <= min(1, 42 * raw) + 1e-12 for raw, p in p_values)
    assert any(p > raw + 1e-9 for raw, p in p_values)


def test_what_is_called_deterministic_is(models, finding) -> None:
    other = decoding_baselines(*models, TEXTS, seed=1, **SHORT)
    for way in finding.ways:
        for seed, found in ((0, finding), (1, other)):
            row = found.value(*way, "ttr")
            assert row["deterministic"] == METHODS[way[1]].deterministic, seed
        same = [finding.value(*way, m)["value"] == other.value(*way, m)["value"] for m in MEASURES]
        assert all(same) == METHODS[way[1]].deterministic, way
    assert [name for name, method in METHODS.items() if method.deterministic] == [
        *("greedy", "contrastive")
    ]
    again = decoding_baselines(*models, TEXTS, n_examples=len(TEXTS), **SHORT)
    assert again.table == finding.table
    assert again.extras["examples"] == finding.extras["examples"]


def test_samples_are_averaged_by_prompt(models) -> None:
    found = decoding_baselines(*models, TEXTS, n_samples=3, seed=5, n_examples=len(TEXTS), **SHORT)
    assert found.about("base", "greedy")["n_samples"] == 1
    for method in STOCHASTIC:
        assert found.about("base", method)["n_samples"] == 3
        samples = [written(models, prompts_of(found), "base", method, seed) for seed in (5, 6, 7)]
        ratios = np.mean([[MEASURES["ttr"](t) for t in texts] for texts in samples], axis=0)
        row = found.value("base", method, "ttr")
        assert row["value"] == pytest.approx(ratios.mean())
        assert row["se"] == pytest.approx(scipy_stats.sem(ratios))
        assert row["n"] == len(TEXTS)
        together = np.mean([distinct(texts, 2) for texts in samples])
        assert found.value("base", method, "distinct_2")["value"] == pytest.approx(together)


def test_texts_may_end_and_some_have_no_token(models) -> None:
    base, tuned = models
    prompts = [text[:6] for text in TEXTS]
    through, others = (written(models, prompts, side, "greedy") for side in ("base", "tuned"))
    # Each model has an end of its own, beside the one in its generation settings.
    first, second = through[0][0], others[0][1]
    assert first != second
    before = base.config.eos_token_id
    base.config.eos_token_id, tuned.config.eos_token_id = first, second
    try:
        options = {"methods": ["greedy", "guard", "contrastive"], **SHORT}
        found = decoding_baselines(base, tuned, TEXTS, stop_at_eos=True, **options)
        whole = decoding_baselines(base, tuned, TEXTS, **options)
    finally:
        base.config.eos_token_id = tuned.config.eos_token_id = before
    ended, others_ended = (
        [list(itertools.takewhile(lambda t, own=own: t not in (own, 2), row)) for row in rows]
        for own, rows in ((first, through), (second, others))
    )
    assert [] in ended
    kept = [row for row in ended if row]
    row = found.value("base", "greedy", "ttr")
    assert row["n"] == len(kept) < len(TEXTS)
    assert row["value"] == pytest.approx(np.mean([MEASURES["ttr"](t) for t in kept]))
    for method in ("greedy", "contrastive"):
        # Where text ends is the same whether what follows is written or not.
        a, b = (f.value("base", method, "length")["value"] for f in (found, whole))
        assert a == b
    for side, texts in (("base", ended), ("tuned", others_ended)):
        length = found.value(side, "greedy", "length")["value"]
        assert length == np.mean([len(t) for t in texts])
        assert length == whole.value(side, "greedy", "length")["value"]


def test_a_model_beside_itself_differs_in_nothing(models) -> None:
    found = decoding_baselines(models[0], models[0], TEXTS, **SHORT)
    for metric in found.metrics:
        row = found.value("base", "greedy", metric)
        assert (row["difference"], row["difference_low"]) == (0, 0)
        assert math.isnan(row["p"])
    assert "not clearly different: greedy" in " ".join(found.summary().split())


def test_an_adapter_is_read_as_one() -> None:
    base = make_tiny("gpt2")
    found = decoding_baselines(
        base, lora(make_tiny("gpt2"), "gpt2"), TEXTS, methods=["greedy", "contrastive"], **SHORT
    )
    assert found.value("base", "contrastive", "ttr")["n"] == len(TEXTS)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"methods": []}, DecodingError, "methods must be some of greedy"),
        ({"methods": ["beam"]}, DecodingError, "methods must be some of greedy"),
        ({"methods": ["greedy", "greedy"]}, DecodingError, "once"),
        ({"methods": "greedy"}, DecodingError, "as a list"),
        ({"n_examples": -1}, CorpusError, "n_examples must be at least 0"),
        ({"seed": -1}, CorpusError, "seed must be"),
        ({"temperature": 0.0}, DecodingError, "temperature"),
        ({"top_p": 1.2}, DecodingError, "top_p"),
        ({"min_p": 0.0}, DecodingError, "min_p"),
        ({"guard_window": 1}, DecodingError, "window"),
        ({"contrastive_q": -1.0}, DecodingError, "q must"),
        ({"n_samples": 0}, CorpusError, "n_samples"),
        ({"batch_size": 0}, CorpusError, "batch_size"),
        ({"max_new_tokens": 90}, CorpusError, "context"),
        ({"prompt_tokens": 30}, CorpusError, "longer texts"),
    ],
)
def test_bad_options_are_one_line(models, options: dict, kind: type, said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        decoding_baselines(*models, TEXTS, **(SHORT | options))
    assert "\n" not in str(caught.value)


def test_a_hooked_model_is_refused(models) -> None:
    with pytest.raises(LoadingError, match="hooked"):
        decoding_baselines(load_hooked(models[0], backend="residual"), models[1], TEXTS, **SHORT)


def test_words_figure_and_what_is_written_returns(finding, tmp_path: Path) -> None:
    summary = finding.summary()
    assert max(map(len, summary.splitlines())) <= 100
    for words in ("det.", "GUARD (w=7)", "min-p (p=0.1)", "Diversity is not quality"):
        assert words in summary
    assert len(finding.plot().axes) == 3
    assert all(one["seconds"] > 0 for one in finding.extras["methods"])
    finding.write(tmp_path)
    again = DecodingResult.load(tmp_path)
    assert again.summary() == summary
    assert finding.metrics == [metric for metric in WORDS if metric != "mauve"]


def test_nothing_written_is_not_called_no_difference(models) -> None:
    base, tuned = models
    ends = list(range(D_VOCAB))
    before = base.generation_config.eos_token_id
    base.generation_config.eos_token_id = tuned.generation_config.eos_token_id = ends
    try:
        found = decoding_baselines(
            base, tuned, TEXTS, methods=["greedy", "top_p"], stop_at_eos=True, **SHORT
        )
    finally:
        base.generation_config.eos_token_id = tuned.generation_config.eos_token_id = before
    assert math.isnan(found.value("base", "greedy", "ttr")["value"])
    said = " ".join(found.conclusions())
    assert said.count("cannot be told: greedy, top-p") == 2
    assert "not clearly different" not in said


def test_a_measure_under_two_names_is_one_test(finding, models) -> None:
    # No text is longer than a window.
    for way in finding.ways[:-1]:
        ttr, windowed = (finding.value(*way, metric) for metric in ("ttr", "windowed_ttr"))
        assert windowed["difference"] == ttr["difference"]
        assert math.isnan(windowed["p"])
    long = SHORT | {"max_new_tokens": 51, "methods": ["top_p"]}
    found = decoding_baselines(*models, TEXTS, **long)
    assert not math.isnan(found.value("base", "top_p", "windowed_ttr")["p"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, file = str(embedded_base()), tmp_path / "texts.txt"
    file.write_text("\n\n".join(f"The {who} went into the wood." for who in ("king", "cat", "fox")))
    short = ["--prompt-tokens", "5", "--max-new-tokens", "6", "--n-samples", "2", "-q"]
    chosen = ["--methods", "greedy,guard,contrastive", "--guard-window", "3"]
    command = ["decoding", base, base, "--texts", str(file), *short, *chosen]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == cli.OK
    printed = capsys.readouterr().out
    found = DecodingResult.load(tmp_path / "out")
    assert printed.startswith(found.summary())
    assert found.meta["options"]["parameters"] == {"guard": 3, "contrastive": 1.0}
    assert found.about("base", "guard")["n_samples"] == 2
    prompts = {example["prompt"] for example in found.extras["examples"]}
    assert prompts == {f"The {who} went into" for who in ("king", "cat", "fox")}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for words in ("Would another way of decoding", "Det.", "base, GUARD (w=3)"):
        assert words in page
    assert cli.main([*command, "--top-p", "7"]) == cli.FAILED
    assert "top_p must be above 0 and at most 1" in capsys.readouterr().err


@pytest.mark.parametrize(("readable", "mauve"), [(5, 0.7), (3, 0.7), (1, math.nan), (0, math.nan)])
def test_mauve_says_what_it_could_not_read(
    readable: int, mauve: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub, base = Stub(), str(embedded_base())
    monkeypatch.setitem(sys.modules, "mauve", stub)
    real, calls = Writing.run, []

    def run(self: Writing, loaded: object, method: str, seeds: object) -> Written:
        """The tuned model writes nothing but special tokens after some prompts."""
        made = real(self, loaded, method, seeds)
        calls.append(method)
        if len(calls) > 1:
            made.samples[0][readable:] = [[0] * 12] * (5 - readable)
        return made

    monkeypatch.setattr(Writing, "run", run)
    options = {"methods": ["greedy"], "mauve_features": base, **SHORT}
    found = decoding_baselines(base, base, embedded_tales()[:5], **options)
    assert found.value("base", "greedy", "mauve")["value"] == pytest.approx(0.7)
    assert found.value("tuned", "greedy", "mauve")["value"] == pytest.approx(mauve, nan_ok=True)
    assert {len(one["q_features"]) for one in stub.given} == {5, readable} - {0, 1}
    notes = "; ".join(found.meta["notes"])
    left_out = f"MAUVE of tuned, greedy: {5 - readable} of 5 texts have no token and are left out"
    assert (left_out in notes) == (readable < 5)
    assert ("MAUVE of tuned, greedy is unknown" in notes) == (readable < 2)
    found.summary()
    found.plot()


def test_mauve_stands_beside_the_rest(models, monkeypatch: pytest.MonkeyPatch) -> None:
    stub, base = Stub(), str(embedded_base())
    monkeypatch.setitem(sys.modules, "mauve", stub)
    tales = embedded_tales()[:5]
    options = {"methods": ["greedy", "top_p"], "n_samples": 2, "mauve_features": base, **SHORT}
    found = decoding_baselines(base, base, tales, **options)
    assert len(stub.given) == (1 + 2 + 1) * 5
    for way in found.ways:
        row = found.value(*way, "mauve")
        assert (row["value"], row["n"]) == (pytest.approx(0.7), 5)
        assert math.isnan(row["low"])
    assert found.value("base", "top_p", "mauve")["difference"] == pytest.approx(0.0)
    assert found.meta["notes"][-1] == few_texts(5)[0]
    assert max(map(len, found.summary().splitlines())) <= 100
    humans = stub.given[0]["p_features"]
    assert all(np.array_equal(one["p_features"], humans) for one in stub.given)
    with pytest.raises(CorpusError, match="no tokenizer to write them with"):
        decoding_baselines(*models, token_texts(4, shortest=18), **options)
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(HyperlensError, match="pip install"):
        decoding_baselines(*models, TEXTS, **options)
