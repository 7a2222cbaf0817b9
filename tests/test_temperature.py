"""Is it temperature? Planted temperatures are found, and the table keeps its promises."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import ARCHITECTURES, lora, make_tiny, perturbed, short, token_texts
from scipy import stats as scipy_stats

from hyperlens.cli import main
from hyperlens.decoding.entropy_matching import EntropyMatched
from hyperlens.errors import CorpusError, HyperlensError, LoadingError, ResultsError
from hyperlens.experiments.temperature import (
    TEACHER_FORCED,
    VARIANTS,
    TemperatureResult,
    match_temperature,
)
from hyperlens.hooks.loading import load_hooked
from hyperlens.pair import open_pair
from hyperlens.render.blocks import Chart, Details, Table, flat
from hyperlens.render.format import NATS, PERCENT, interval, number
from hyperlens.render.page import write_report
from hyperlens.statistics import significance
from hyperlens.validation.constructions import at_temperature

TEXTS = token_texts(10, shortest=8, longest=20)
SMALL = {"n_prompts": 6, "prompt_tokens": 5, "max_new_tokens": 10, "progress": False}


@pytest.fixture(scope="module")
def result() -> TemperatureResult:
    base = make_tiny("llama")
    return match_temperature(base, perturbed(base, 0.1), TEXTS, **SMALL)


@pytest.mark.parametrize(
    "name", short(["llama", "gpt_neox", "mistral", "phi3", "qwen3"], "llama", "gpt_neox")
)
@pytest.mark.parametrize("t", [0.5, 1.7])
def test_a_planted_temperature_is_found(name: str, t: float) -> None:
    base = make_tiny(name, tie_word_embeddings=False)
    result = match_temperature(base, at_temperature(base, t), TEXTS, **SMALL)
    found = result.extras["temperature"]
    assert found["shared"] == pytest.approx(t, rel=1e-4)
    assert found["shared_reached"]
    assert found["own_reached"] == found["n_contexts"]
    assert list(found["own_quantiles"].values()) == pytest.approx([t] * 5, rel=1e-3)
    for variant in VARIANTS:
        assert (
            result.value(variant=variant, decoding="teacher-forced", metric="top1_agreement") == 1.0
        )
        # Two logits within a rounding error of each other may change places.
        rho = result.value(variant=variant, decoding="teacher-forced", metric="spearman")
        assert rho == pytest.approx(1.0, abs=1e-4)
    if t == 0.5:  # where no logit is rounded
        assert result.value(variant="tuned", decoding="teacher-forced", metric="spearman") == 1.0
        assert result.at(variant=variant, decoding="greedy", metric="ttr") == result.at(
            variant="original", decoding="greedy", metric="ttr"
        ) | {"variant": variant}
    for metric in ("ttr", "rep_2", "rep_3"):
        # The same temperature, seed and random numbers: sampled texts are the same, too.
        tuned, matched = (
            result.at(variant=v, decoding="sampled", metric=metric) for v in ("tuned", "matched")
        )
        assert tuned["value"] == matched["value"]
    assert result.extras["greedy_tokens_changed"] == dict.fromkeys(VARIANTS, 0)
    assert "no more than a temperature" in " ".join(result.summary().split())


@pytest.mark.parametrize("name", short(list(ARCHITECTURES), "llama", "gemma2", "gpt2"))
def test_entropies_match_on_every_architecture(name: str) -> None:
    base = make_tiny(name)
    result = match_temperature(base, perturbed(base), TEXTS, **SMALL)
    target = result.at(variant="tuned", decoding="teacher-forced", metric="entropy")
    matched = result.at(variant="matched", decoding="teacher-forced", metric="entropy")
    each = result.at(variant="matched_per_context", decoding="teacher-forced", metric="entropy")
    assert matched["value"] == pytest.approx(target["value"], abs=1e-4)
    assert each["value"] == pytest.approx(target["value"], abs=1e-4)
    assert each["se"] < 1e-4  # every single text, not only their mean
    assert result.extras["greedy_tokens_changed"]["matched"] == 0


def test_teacher_forced_statistics_equal_a_loop_over_contexts(result) -> None:
    base = make_tiny("llama")
    tuned = perturbed(base, 0.1)
    expected: dict[str, list[float]] = {metric: [] for metric in TEACHER_FORCED}
    for ids in TEXTS:
        with torch.no_grad():
            logits = [m(torch.tensor([ids])).logits[0].double().numpy() for m in (base, tuned)]
        per_text: dict[str, list[float]] = {metric: [] for metric in TEACHER_FORCED}
        for position, token in enumerate(ids):
            if token == 1:  # BOS
                continue
            a, b = logits[0][position], logits[1][position]
            per_text["top1_agreement"].append(float(a.argmax() == b.argmax()))
            per_text["spearman"].append(scipy_stats.spearmanr(a, b).statistic)
            p = torch.tensor(b).softmax(-1)
            per_text["entropy"].append(float(-(p * p.log()).sum()))
        for metric, values in per_text.items():
            expected[metric].append(sum(values) / len(values))
    for metric, values in expected.items():
        row, estimate = (
            result.at(variant="tuned", decoding="teacher-forced", metric=metric),
            significance.estimate(values),
        )
        for end in ("value", "low", "high", "se", "n"):
            assert row[end] == pytest.approx(getattr(estimate, end), abs=1e-5)


def test_the_table_is_complete_and_tests_are_corrected(result) -> None:
    assert len(result.table) == 4 * (3 + 3 + 3)
    tests = result.extras["tests"]
    assert len(tests) == 2 * 9
    for kind in ("paired_p", "welch_p"):
        raw = [test[kind] for test in tests]
        assert [test[f"{kind}_holm"] for test in tests] == pytest.approx(
            significance.holm(raw), nan_ok=True
        )
    greedy = result.test("greedy", "ttr", "matched", "original")
    assert greedy["difference"]["value"] == 0.0
    # What holds by construction is no test, and weighs down no other.
    given = {
        *(("greedy", metric, "matched") for metric in ("ttr", "rep_2", "rep_3")),
        *(("teacher-forced", metric, "matched") for metric in ("top1_agreement", "spearman")),
        ("teacher-forced", "entropy", "tuned"),
    }
    for test in tests:
        if (test["decoding"], test["metric"], test["first"]) in given:
            assert math.isnan(test["paired_p_holm"])
            assert math.isnan(test["welch_p_holm"])
    assert not math.isnan(result.test("greedy", "ttr", "tuned", "matched")["paired_p"])


def test_greedy_generation_per_context_works_in_plain_transformers() -> None:
    base = make_tiny("llama")
    prompt = torch.tensor([[1, 5, 9, 11]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = base.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    scaled = base.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        logits_processor=[EntropyMatched(1.0)],
        **options,
    )
    assert torch.equal(plain, scaled)


def test_ties_are_counted() -> None:
    base = make_tiny("llama")
    with torch.no_grad():
        # Two tokens whose logits are always the same, and often the largest.
        base.lm_head.weight[7] = base.lm_head.weight[8] = 3 * base.lm_head.weight[7]
    result = match_temperature(base, perturbed(base), TEXTS, **SMALL)
    contexts = [t for text in TEXTS for t in text[1:]]
    with torch.no_grad():
        tied = sum(
            int((base(torch.tensor([ids])).logits[0, 1:].argmax(-1) == 7).sum()) for ids in TEXTS
        )
    assert 0 < tied < len(contexts)
    assert result.extras["tied_contexts"]["original"] == tied
    assert result.extras["tied_contexts"]["matched"] == tied
    assert result.extras["changed_contexts"]["matched"] == 0


def test_an_entropy_out_of_reach_is_said() -> None:
    base = make_tiny("llama")
    with torch.no_grad():
        # Every logit twice: entropy never falls below log 2.
        base.lm_head.weight[1:61:2] = base.lm_head.weight[2:61:2]
    tuned = at_temperature(make_tiny("llama"), 0.01)
    result = match_temperature(base, tuned, TEXTS, **SMALL)
    found = result.extras["temperature"]
    assert not found["shared_reached"]
    assert found["target_entropy"] < found["reachable"][0]
    assert any("no temperature" in note for note in result.meta["notes"])
    assert "comes closest" in result.summary()
    assert "at the closest reachable mean entropy" in " ".join(result.conclusions())


def test_the_same_seed_gives_the_same_result(result) -> None:
    base = make_tiny("llama")
    again = match_temperature(base, perturbed(base, 0.1), TEXTS, **SMALL)
    assert again.table == result.table
    assert again.extras == result.extras
    other = match_temperature(base, perturbed(base, 0.1), TEXTS, **SMALL, seed=1)
    sampled = [f.at(variant="original", decoding="sampled", metric="ttr") for f in (other, result)]
    assert sampled[0] != sampled[1]


def test_the_batch_size_does_not_change_what_is_deterministic(result) -> None:
    base = make_tiny("llama")
    other = match_temperature(base, perturbed(base, 0.1), TEXTS, **SMALL, batch_size=4)
    for row in result.table:
        if row["decoding"] == "sampled":
            continue
        twin = other.at(variant=row["variant"], decoding=row["decoding"], metric=row["metric"])
        assert twin["value"] == pytest.approx(row["value"], abs=1e-5)


def test_an_unmerged_adapter_is_read_as_one() -> None:
    base = make_tiny("llama")
    result = match_temperature(base, lora(copy.deepcopy(base), "llama"), TEXTS, **SMALL)
    assert result.value(variant="tuned", decoding="teacher-forced", metric="top1_agreement") < 1.0


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"n_prompts": 0}, CorpusError, "n_prompts"),
        ({"batch_size": 0}, CorpusError, "batch_size"),
        ({"seed": -1}, CorpusError, "seed must be"),
        ({"prompt_tokens": 40}, CorpusError, "lower prompt_tokens"),
        ({"max_new_tokens": 64}, CorpusError, "lower max_new_tokens to 59"),
    ],
)
def test_bad_options_are_one_line(change, kind, says: str) -> None:
    base = make_tiny("llama")
    with pytest.raises(kind, match=says) as caught:
        match_temperature(base, perturbed(base), TEXTS, **(SMALL | change))
    assert "\n" not in str(caught.value)


def test_a_hooked_model_is_refused() -> None:
    base = make_tiny("llama")
    with pytest.raises(LoadingError, match="cannot generate"):
        match_temperature(load_hooked(base, backend="residual"), perturbed(base), TEXTS, **SMALL)


def test_one_text_answers_first_in_a_screenful(result) -> None:
    summary = result.summary()
    assert summary.startswith("Is it just temperature?")
    words = " ".join(summary.split())
    for word in ("T* =", "greedy", "sampled", "teacher-forced", "Not to be concluded"):
        assert word in words
    for old in ("first token", "±", "TTR knows"):
        assert old not in words
    row = result.at(variant="tuned", decoding="teacher-forced", metric="top1_agreement")
    changed = {"value": 1 - row["value"], "low": 1 - row["high"], "high": 1 - row["low"]}
    assert interval(changed, PERCENT) in result.conclusions()[0]
    assert result.verdicts()[-1].caution


def test_tables_hold_every_row_and_every_test(result) -> None:
    tables = [block for block in flat(result.blocks()) if isinstance(block, Table)]
    shown = {cell for table in tables for row in table.rows for cell in row}
    for row in result.table:
        form = PERCENT if row["metric"] == "top1_agreement" else None
        if form or row["metric"] == "ttr":
            text = interval(row, form) if form else f"{row['value']:.3f}"
            assert any(text in cell for cell in shown), (row, text)
    folded = [block for block in result.blocks() if isinstance(block, Details)]
    tests = folded[-1].blocks[0]
    assert len(tests.rows) == 9


def test_charts_have_every_variant_within_the_possible_range(result) -> None:
    charts = [block for block in flat(result.blocks()) if isinstance(block, Chart)]
    assert [chart.kind for chart in charts] == ["dots", "dots", "bars"]
    for chart, decoding in zip(charts, ("greedy", "sampled"), strict=False):
        assert chart.x.scale == "share"
        values = {(row["measure"], row["value"]) for row in chart.rows}
        for metric, words in (("ttr", "TTR"), ("rep_2", "repeated bigrams")):
            for row in result.select(decoding=decoding, metric=metric):
                assert (words, row["value"]) in values
        assert len(chart.rows) == 4 * 3
    histogram = charts[2]
    assert sum(row["contexts"] for row in histogram.rows) == len([t for x in TEXTS for t in x[1:]])
    assert sum(row["value"] for row in histogram.rows) == pytest.approx(100)
    # No empty bins at the ends.
    assert histogram.rows[0]["contexts"]
    assert histogram.rows[-1]["contexts"]
    assert len({row["temperature"] for row in histogram.rows}) == len(histogram.rows)
    assert result.plot().to_dict()


def test_page_and_notebook_show_the_numbers_of_the_summary(result, tmp_path) -> None:
    page = write_report(tmp_path / "report.html", result).read_text(encoding="utf-8")
    html = result._repr_html_()
    row = result.at(variant="tuned", decoding="teacher-forced", metric="top1_agreement")
    for text in (page, html, result.summary()):
        assert interval(row, PERCENT) in text
    assert "Is it just temperature?" in page


def test_unknown_tests_are_an_error(result) -> None:
    with pytest.raises(ResultsError, match="tuned and matched"):
        result.test("sampled", "ttr", "tuned", "original")


def test_ranks_below_an_unchanged_prediction_are_more_than_a_temperature(result) -> None:
    table = tuple(
        row | {"value": 1.0, "low": 1.0, "high": 1.0}
        if row["metric"] == "top1_agreement" and row["variant"] == "tuned"
        else row
        for row in result.table
    )
    answer = replace(result, table=table).conclusions()[0]
    assert "the ranks below them changed" in answer
    assert "tuning did more than sharpen" in answer


def test_an_open_pair_gives_the_same(result) -> None:
    base = make_tiny("llama")
    again = match_temperature(open_pair(base, perturbed(base, 0.1)), TEXTS, **SMALL)
    assert again.table == result.table


def test_what_cannot_be_told_is_not_called_no_difference(result) -> None:
    base = make_tiny("llama")
    one = match_temperature(base, perturbed(base, 0.1), TEXTS, **(SMALL | {"n_prompts": 1}))
    said = " ".join(one.conclusions())
    assert "So few prompts cannot tell whether entropy explains the diversity of text" in said
    assert "No clear difference" not in said
    same = match_temperature(base, base, TEXTS, **SMALL)
    assert "No clear difference" in " ".join(same.conclusions())


def test_an_interval_of_a_share_stays_a_share(result) -> None:
    row = result.at(variant="tuned", decoding="teacher-forced", metric="top1_agreement")
    for value, high, low, shown in (
        (0.986, 1.009, 0.962, "0.0%, 3.8%"),
        (0.02, 0.1, -0.1, "100.0%]"),
    ):
        changed = row | {"value": value, "low": low, "high": high}
        table = tuple(changed if one == row else one for one in result.table)
        assert shown in " ".join(replace(result, table=table).conclusions())


def test_what_is_written_returns(result, tmp_path) -> None:
    result.write(tmp_path)
    again = TemperatureResult.load(tmp_path)
    assert again.summary() == result.summary()
    assert again.extras["temperature"] == result.extras["temperature"]


def test_the_command(tmp_path, capsys, llama_folder, ids_file, monkeypatch) -> None:
    tuned = tmp_path / "tuned"
    perturbed(make_tiny("llama"), 0.1).save_pretrained(tuned)
    monkeypatch.setattr("hyperlens.cli.experiments.texts_for", lambda *_: TEXTS)
    options = ["--n-prompts", "4", "--prompt-tokens", "5", "--max-new-tokens", "6", "-q"]
    command = ["temperature", str(llama_folder), str(tuned), "--texts", str(ids_file)]
    assert main([*command, *options, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "Is it just temperature?" in printed
    assert "report.html" in printed
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Is it just temperature?" in page
    loaded = TemperatureResult.load(tmp_path / "out")
    assert loaded.meta["options"]["max_new_tokens"] == 6
    assert loaded.meta["options"]["n_prompts"] == 4


@pytest.mark.parametrize("reached", [True, False])
def test_the_page_says_how_far_temperature_goes(result, reached: bool, tmp_path) -> None:
    found = result.extras["temperature"] | {"shared_reached": reached}
    other = replace(
        result,
        extras=result.extras | {"temperature": found},
        meta=result.meta | {"notes": ["no <entropy> that low"]},
    )
    page = write_report(tmp_path / "report.html", [other]).read_text(encoding="utf-8")
    said = f"T* = {number(found['shared'])} "
    assert (f"{said}gives the base model" in page) == reached
    assert (f"{said}comes closest to giving the base model" in page) != reached
    assert NATS(found["target_entropy"]) in page
    assert "Note: no &lt;entropy&gt; that low" in page


@pytest.mark.slow
def test_a_real_model(stories, fairy_tales) -> None:
    from hyperlens.data.texts import read_texts

    texts = read_texts(fairy_tales / "andersen.txt", limit=12)
    result = match_temperature(stories, stories, texts, **SMALL)
    assert result.extras["temperature"]["shared"] == pytest.approx(1.0, abs=1e-6)
    assert math.isfinite(result.value(variant="tuned", decoding="sampled", metric="ttr"))


def test_errors_are_of_one_family() -> None:
    with pytest.raises(HyperlensError):
        match_temperature("no/such/folder/here", "neither", TEXTS, **SMALL)
