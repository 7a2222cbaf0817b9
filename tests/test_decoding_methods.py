"""Methods of decoding side by side: every number is that of the continuations, one by one."""

import html
import itertools
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_VOCAB, lora, make_tiny, perturbed, short, token_texts
from scipy import stats as scipy_stats
from test_mauve import Stub

from hyperlens import cli, load_hooked, open_pair
from hyperlens.decoding.contrastive import adaptive_contrastive_search
from hyperlens.decoding.diversity import MEASURES, distinct
from hyperlens.decoding.generate import continuations
from hyperlens.decoding.guard import Guard
from hyperlens.decoding.prompts import choose_examples
from hyperlens.embedded import embedded_base, embedded_tales
from hyperlens.errors import (
    ArgumentError,
    CorpusError,
    DecodingError,
    HyperlensError,
    LoadingError,
)
from hyperlens.experiments.decoding import (
    DRAWN,
    METHODS,
    REFERENCE,
    WORDS,
    DecodingResult,
    Generated,
    MethodRunner,
    compare_decoding,
)
from hyperlens.experiments.mauve import few_texts_notes
from hyperlens.render.blocks import Chart, Samples, flat
from hyperlens.render.format import FRACTION, SIGNED_FRACTION, interval
from hyperlens.render.page import write_report
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
def result(models) -> DecodingResult:
    return compare_decoding(*models, TEXTS, n_examples=len(TEXTS), **SHORT)


def examples_of(found: DecodingResult) -> list[tuple[list[int], list[str]]]:
    """Prompts and texts in the order of the corpus, on which sampled text depends."""
    return sorted(
        ([int(i) for i in one["prompt"].split()], [text["text"] for text in one["texts"]])
        for one in found.extras["examples"]
    )


def row_of(found: DecodingResult, model: str, method: str, metric: str) -> Mapping[str, Any]:
    return found.at(model=model, method=method, metric=metric)


def prompts_of(found: DecodingResult) -> list[list[int]]:
    return [prompt for prompt, _ in examples_of(found)]


def written(
    models, prompts: list[list[int]], model: str, method: str, seed: int = 0, **options: object
) -> list[list[int]]:
    """What a method of decoding generates, asked for directly."""
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


def test_every_row_is_that_of_the_continuations(models, result) -> None:
    prompts = prompts_of(result)
    assert sorted(prompts) == sorted(text[:6] for text in TEXTS)
    drawn = [[int(i) for i in one["prompt"].split()] for one in result.extras["examples"]]
    assert drawn == [prompts[i] for i in choose_examples(10, 10, 0)] != prompts
    reference = written(models, prompts, *REFERENCE)
    assert len(result.table) == 7 * 7
    assert result.conditions == [*(("base", name) for name in METHODS), REFERENCE]
    p_values = []
    for condition in result.conditions:
        texts = written(models, prompts, *condition)
        shown = [of_all[result.conditions.index(condition)] for _, of_all in examples_of(result)]
        assert shown == [" ".join(map(str, t)) for t in texts]
        for metric, measure in MEASURES.items():
            row = row_of(result, *condition, metric)
            values, others = ([measure(t) for t in side] for side in (texts, reference))
            expected = significance.estimate(values)
            found = [row[key] for key in expected._fields]
            assert found == pytest.approx(list(expected), nan_ok=True)
            if condition == REFERENCE:
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
        together = row_of(result, *condition, "distinct_2")
        assert together["value"] == pytest.approx(distinct(texts, 2))
        if condition != REFERENCE:
            gap = distinct(texts, 2) - distinct(reference, 2)
            assert together["difference"] == pytest.approx(gap)
        lengths = [row.index(2) if 2 in row else 12 for row in texts]
        assert row_of(result, *condition, "length")["value"] == np.mean(lengths)
    assert all(min(raw, 1) - 1e-12 <= p <= min(1, 42 * raw) + 1e-12 for raw, p in p_values)
    assert any(p > raw + 1e-9 for raw, p in p_values)


def test_what_is_called_deterministic_is(models, result) -> None:
    other = compare_decoding(*models, TEXTS, seed=1, **SHORT)
    for condition in result.conditions:
        for seed, found in ((0, result), (1, other)):
            row = row_of(found, *condition, "ttr")
            assert row["deterministic"] == METHODS[condition[1]].deterministic, seed
        same = [
            row_of(result, *condition, m)["value"] == row_of(other, *condition, m)["value"]
            for m in MEASURES
        ]
        assert all(same) == METHODS[condition[1]].deterministic, condition
    assert [name for name, method in METHODS.items() if method.deterministic] == [
        *("greedy", "contrastive")
    ]
    again = compare_decoding(*models, TEXTS, n_examples=len(TEXTS), **SHORT)
    assert again.table == result.table
    assert again.extras["examples"] == result.extras["examples"]


def test_samples_are_averaged_by_prompt(models) -> None:
    found = compare_decoding(*models, TEXTS, n_samples=3, seed=5, n_examples=len(TEXTS), **SHORT)
    assert found.about("base", "greedy")["n_samples"] == 1
    for method in STOCHASTIC:
        assert found.about("base", method)["n_samples"] == 3
        samples = [written(models, prompts_of(found), "base", method, seed) for seed in (5, 6, 7)]
        ratios = np.mean([[MEASURES["ttr"](t) for t in texts] for texts in samples], axis=0)
        row = row_of(found, "base", method, "ttr")
        assert row["value"] == pytest.approx(ratios.mean())
        assert row["se"] == pytest.approx(scipy_stats.sem(ratios))
        assert row["n"] == len(TEXTS)
        together = np.mean([distinct(texts, 2) for texts in samples])
        assert row_of(found, "base", method, "distinct_2")["value"] == pytest.approx(together)


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
        found = compare_decoding(base, tuned, TEXTS, stop_at_eos=True, **options)
        whole = compare_decoding(base, tuned, TEXTS, **options)
    finally:
        base.config.eos_token_id = tuned.config.eos_token_id = before
    ended, others_ended = (
        [list(itertools.takewhile(lambda t, own=own: t not in (own, 2), row)) for row in rows]
        for own, rows in ((first, through), (second, others))
    )
    assert [] in ended
    kept = [row for row in ended if row]
    row = row_of(found, "base", "greedy", "ttr")
    assert row["n"] == len(kept) < len(TEXTS)
    assert row["value"] == pytest.approx(np.mean([MEASURES["ttr"](t) for t in kept]))
    for method in ("greedy", "contrastive"):
        # Where text ends is the same whether what follows is written or not.
        a, b = (row_of(f, "base", method, "length")["value"] for f in (found, whole))
        assert a == b
    for side, texts in (("base", ended), ("tuned", others_ended)):
        length = row_of(found, side, "greedy", "length")["value"]
        assert length == np.mean([len(t) for t in texts])
        assert length == row_of(whole, side, "greedy", "length")["value"]


def test_a_model_beside_itself_differs_in_nothing(models) -> None:
    found = compare_decoding(models[0], models[0], TEXTS, **SHORT)
    for metric in found.metrics:
        row = row_of(found, "base", "greedy", metric)
        assert (row["difference"], row["difference_low"]) == (0, 0)
        assert math.isnan(row["p"])
    assert "not clearly different with greedy" in " ".join(found.summary().split())


def test_an_adapter_is_read_as_one() -> None:
    base = make_tiny("gpt2")
    found = compare_decoding(
        base, lora(make_tiny("gpt2"), "gpt2"), TEXTS, methods=["greedy", "contrastive"], **SHORT
    )
    assert row_of(found, "base", "contrastive", "ttr")["n"] == len(TEXTS)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"methods": []}, DecodingError, "methods must be some of greedy"),
        ({"methods": ["beam"]}, DecodingError, "methods must be some of greedy"),
        ({"methods": ["greedy", "greedy"]}, DecodingError, "once"),
        ({"methods": "greedy"}, ArgumentError, "must be a list"),
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
        compare_decoding(*models, TEXTS, **(SHORT | options))
    assert "\n" not in str(caught.value)


def test_a_hooked_model_is_refused(models) -> None:
    with pytest.raises(LoadingError, match="hooked"):
        compare_decoding(load_hooked(models[0], backend="residual"), models[1], TEXTS, **SHORT)


def test_summary_page_notebook_and_figure_show_the_same_numbers(result, tmp_path: Path) -> None:
    summary = result.summary()
    lines = [line for line in summary.splitlines() if line.startswith(("GUARD", "min-p"))]
    assert max(map(len, lines)) <= 100
    page = write_report(tmp_path / "page.html", [result]).read_text(encoding="utf-8")
    notebook = html.unescape(result._repr_html_())
    for words in ("det.", "GUARD (w = 7)", "min-p (p = 0.1)", "Diversity is not quality"):
        assert words in summary
        assert words in page
        assert words in notebook
    for condition in result.conditions:
        value = interval(row_of(result, *condition, "rep_2"), FRACTION)
        assert value in summary
        assert value in page
        assert value in notebook
    gap = row_of(result, "base", "guard", "ttr")["difference"]
    assert f"GUARD ({SIGNED_FRACTION(gap)})" in result.verdicts()[0].answer
    assert all(one["seconds"] > 0 for one in result.extras["methods"])
    result.write(tmp_path)
    again = DecodingResult.load(tmp_path)
    assert again.summary() == summary
    assert result.metrics == [metric for metric in WORDS if metric != "mauve"]


def test_charts_and_examples_are_those_of_the_table(result) -> None:
    blocks = flat(result.blocks())
    charts = [block for block in blocks if isinstance(block, Chart)]
    assert len(charts) == len(DRAWN)
    for metric, chart in zip(DRAWN, charts, strict=True):
        assert (chart.kind, chart.x.scale) == ("dots", "share")
        expected = [row_of(result, *condition, metric) for condition in result.conditions]
        assert [(row["value"], row["low"]) for row in chart.rows] == [
            (row["value"], row["low"]) for row in expected
        ]
        assert [row["method"] for row in chart.rows][::6] == ["greedy", "greedy"]
        assert chart.roles == {result.base_name: "base", result.tuned_name: "tuned"}
        (line,) = chart.references
        assert line.value == expected[-1]["value"]
    assert result.plot().to_dict()["hconcat"]
    examples = [block for block in blocks if isinstance(block, Samples)]
    assert [block.prompt for block in examples] == [
        one["prompt"] for one in result.extras["examples"]
    ]
    labels = [sample.label for sample in examples[0].texts]
    assert labels[0] == f"{result.base_name}, greedy"
    assert labels[-1] == f"{result.tuned_name}, greedy"


def test_what_version_0_1_wrote_still_loads(result, tmp_path: Path) -> None:
    result.write(tmp_path)
    path = tmp_path / "decoding.json"
    data = json.loads(path.read_text("utf-8"))
    data["format"] = 1
    data["meta"]["data"] = data["meta"].pop("corpus")
    path.write_text(json.dumps(data), "utf-8")
    assert DecodingResult.load(tmp_path).summary() == result.summary()


def test_an_open_pair_gives_the_same_numbers(models, result) -> None:
    options = SHORT | {"n_examples": len(TEXTS)}
    assert compare_decoding(open_pair(*models), TEXTS, **options).table == result.table


def test_one_prompt_has_no_interval(models) -> None:
    found = compare_decoding(*models, TEXTS, n_prompts=1, **SHORT)
    assert "nan" not in found.summary()
    assert "1 prompt of 6 tokens" in " ".join(found.summary().split())
    assert found.verdicts()[0].answer.startswith("Too few texts to tell")


def test_nothing_written_is_not_called_no_difference(models) -> None:
    base, tuned = models
    ends = list(range(D_VOCAB))
    before = base.generation_config.eos_token_id
    base.generation_config.eos_token_id = tuned.generation_config.eos_token_id = ends
    try:
        found = compare_decoding(
            base, tuned, TEXTS, methods=["greedy", "top_p"], stop_at_eos=True, **SHORT
        )
    finally:
        base.generation_config.eos_token_id = tuned.generation_config.eos_token_id = before
    assert math.isnan(row_of(found, "base", "greedy", "ttr")["value"])
    said = " ".join(found.conclusions())
    assert said.count("unclear with greedy, top-p") == 2
    assert found.verdicts()[0].answer.startswith("Too few texts to tell")
    assert "not clearly different" not in said


def test_a_measure_under_two_names_is_one_test(result, models) -> None:
    # No text is longer than a window.
    for condition in result.conditions[:-1]:
        ttr, windowed = (row_of(result, *condition, metric) for metric in ("ttr", "windowed_ttr"))
        assert windowed["difference"] == ttr["difference"]
        assert math.isnan(windowed["p"])
    long = SHORT | {"max_new_tokens": 51, "methods": ["top_p"]}
    found = compare_decoding(*models, TEXTS, **long)
    assert not math.isnan(row_of(found, "base", "top_p", "windowed_ttr")["p"])


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
    for words in ("Would another way of decoding", "det.", "GUARD (w = 3)"):
        assert words in page
    assert cli.main([*command, "--top-p", "7"]) == cli.FAILED
    assert "--top-p must be above 0 and at most 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("readable", "mauve"),
    short([(5, 0.7), (3, 0.7), (1, math.nan), (0, math.nan)], (3, 0.7), (1, math.nan)),
)
def test_mauve_says_what_it_could_not_read(
    readable: int, mauve: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub, base = Stub(), str(embedded_base())
    monkeypatch.setitem(sys.modules, "mauve", stub)
    real, calls = MethodRunner.run, []

    def run(self: MethodRunner, loaded: object, method: str, seeds: object) -> Generated:
        """The tuned model writes nothing but special tokens after some prompts."""
        made = real(self, loaded, method, seeds)
        calls.append(method)
        if len(calls) > 1:
            made.samples[0][readable:] = [[0] * 12] * (5 - readable)
        return made

    monkeypatch.setattr(MethodRunner, "run", run)
    options = {"methods": ["greedy"], "mauve_features": base, **SHORT}
    found = compare_decoding(base, base, embedded_tales()[:5], **options)
    assert row_of(found, "base", "greedy", "mauve")["value"] == pytest.approx(0.7)
    assert row_of(found, "tuned", "greedy", "mauve")["value"] == pytest.approx(mauve, nan_ok=True)
    assert {len(one["q_features"]) for one in stub.given} == {5, readable} - {0, 1}
    notes = "; ".join(found.meta["notes"])
    left_out = f"MAUVE of tuned, greedy: {5 - readable} of 5 texts without a token, left out"
    assert (left_out in notes) == (readable < 5)
    assert ("MAUVE of tuned, greedy is unknown" in notes) == (readable < 2)
    assert "MAUVE" in found.summary()
    found.plot().to_dict()


def test_mauve_stands_beside_the_rest(models, monkeypatch: pytest.MonkeyPatch) -> None:
    stub, base = Stub(), str(embedded_base())
    monkeypatch.setitem(sys.modules, "mauve", stub)
    tales = embedded_tales()[:5]
    options = {"methods": ["greedy", "top_p"], "n_samples": 2, "mauve_features": base, **SHORT}
    found = compare_decoding(base, base, tales, **options)
    assert len(stub.given) == (1 + 2 + 1) * 5
    for condition in found.conditions:
        row = row_of(found, *condition, "mauve")
        assert (row["value"], row["n"]) == (pytest.approx(0.7), 5)
        assert math.isnan(row["low"])
    assert row_of(found, "base", "top_p", "mauve")["difference"] == pytest.approx(0.0)
    assert found.meta["notes"][-1] == few_texts_notes(5)[0]
    assert max(map(len, found.summary().splitlines())) <= 100
    humans = stub.given[0]["p_features"]
    assert all(np.array_equal(one["p_features"], humans) for one in stub.given)
    with pytest.raises(CorpusError, match="no tokenizer to turn tokens into text"):
        compare_decoding(*models, token_texts(4, shortest=18), **options)
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(HyperlensError, match="pip install"):
        compare_decoding(*models, TEXTS, **options)
