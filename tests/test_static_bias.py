"""Is it a static bias? Planted biases are recovered, controls change nothing that they must not."""

import copy
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, D_VOCAB, SIZES, make_tiny, perturbed, token_texts
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize as scipy_optimize
from scipy import special as scipy_special
from scipy import stats as scipy_stats

from hyperlens.cli import main
from hyperlens.errors import CorpusError, LoadingError, ProbeError, ResultsError
from hyperlens.experiments.fitted_bias import fit_biases
from hyperlens.experiments.static_bias import (
    BIASES,
    CONTROL_BAND,
    CONTROLS,
    TESTED,
    WORDS,
    LogitBias,
    Shift,
    StaticBiasResult,
    biases,
    check_alphas,
    inject_static_bias,
    mean_shift,
    promoted,
)
from hyperlens.hooks.loading import load_hooked
from hyperlens.pair import open_inputs, open_pair
from hyperlens.passes.contexts import read_contexts
from hyperlens.render.blocks import Chart, flat
from hyperlens.render.format import POINTS, interval
from hyperlens.render.page import write_report
from hyperlens.statistics.significance import exact_p, rho_and_p, trend
from hyperlens.validation.constructions import with_bias, with_head_bias

TEXTS = token_texts(10, shortest=8, longest=20)
SMALL = {
    "n_prompts": 5,
    "prompt_tokens": 5,
    "max_new_tokens": 10,
    "k": 12,
    "alphas": (0.1, 0.5, 1.0),
    "progress": False,
}


def biased_head(name: str):
    """A tiny model whose unembedding has a bias."""
    import transformers

    if name == "phi":  # has one by itself
        torch.manual_seed(0)
        return transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES)).eval()
    return with_head_bias(make_tiny(name, tie_word_embeddings=False))


def planted(seed: int = 0, scale: float = 1.0):
    return scale * torch.randn(D_VOCAB, generator=torch.Generator().manual_seed(seed))


def shift_of(base, tuned):
    opened = open_inputs(base, tuned, TEXTS, max_length=256)
    return mean_shift(
        read_contexts(opened.pair.base.hooked, opened.pair.tuned.hooked, opened.corpus, 4, False),
        False,
    )


def rows_of_logits(model) -> np.ndarray:
    """Logits at every context that counts, by one forward pass per text."""
    with torch.no_grad():
        rows = [model(torch.tensor([ids])).logits[0].double().numpy() for ids in TEXTS]
    return np.concatenate([row[np.array(ids) != 1] for row, ids in zip(rows, TEXTS, strict=True)])


@pytest.fixture(scope="module")
def result() -> StaticBiasResult:
    base = make_tiny("llama")
    return inject_static_bias(base, perturbed(base, 0.1), TEXTS, **SMALL)


@pytest.mark.parametrize("name", ["phi", "llama", "gpt_neox"])
def test_a_planted_bias_is_recovered(name: str) -> None:
    base = biased_head(name)
    bias = planted()
    tuned = with_bias(base, bias)
    shift = shift_of(base, tuned)
    assert shift.delta == pytest.approx((bias - bias.mean()).double(), abs=1e-4)
    assert shift.level == pytest.approx(float(bias.mean()), abs=1e-4)
    assert shift.static_share == pytest.approx(1.0, abs=1e-4)
    result = inject_static_bias(base, tuned, TEXTS, **(SMALL | {"k": D_VOCAB}))
    assert result.value(bias="none", alpha=0.0, metric="agreement_tuned") < 0.9
    assert result.value(bias="all", alpha=1.0, metric="agreement_tuned") == 1.0
    for metric in ("ttr", "rep_2", "rep_3"):
        met = result.at(bias="all", alpha=1.0, metric=metric)
        assert met | {"bias": "tuned", "alpha": 0.0} == result.at(
            bias="tuned", alpha=0.0, metric=metric
        )
    assert "base plus a bias" in result.summary()
    assert result.gain("fitted", 1.0)["low"] > 0.1
    # The same numbers on other tokens do not get there, nor does one number for all.
    assert result.value(bias="shuffled", alpha=1.0, metric="agreement_tuned") < 0.9
    assert result.value(bias="constant", alpha=1.0, metric="agreement_tuned") < 0.9


def test_a_bias_fitted_on_half_the_texts_predicts_the_other() -> None:
    base, bias = biased_head("llama"), planted(3)
    texts = token_texts(90, shortest=8, longest=20)
    few = {"alphas": (1.0,), "n_prompts": 2, "max_new_tokens": 2}
    result = inject_static_bias(base, with_bias(base, bias), texts, **(SMALL | few))
    assert result.value(bias="none", alpha=0.0, metric="agreement_tuned") < 0.7
    assert result.fitted["value"] > 0.97
    assert result.value(bias="none", alpha=0.0, metric="kl_tuned") > 0.3
    assert result.value(bias="fitted", alpha=1.0, metric="kl_tuned") < 0.005
    assert result.kl_gain("fitted", 1.0)["high"] < -0.3
    (answer,) = (v.answer for v in result.verdicts() if v.topic == "fitted bias")
    assert "fitted on one half of the texts and read on the other" in answer


def test_a_fitted_bias_is_the_least_divergent_of_all() -> None:
    # Against scipy's own minimiser of the penalised KL on the other half of the texts.
    base = make_tiny("llama")
    tuned = perturbed(base, 0.2)
    opened = open_inputs(base, tuned, TEXTS, max_length=256)
    contexts = read_contexts(
        opened.pair.base.hooked, opened.pair.tuned.hooked, opened.corpus, 4, False
    )
    fitted = fit_biases(contexts, False)
    halves = contexts.text % 2
    rows = [(base.double(), tuned.double()) for _, base, tuned in contexts.rows()]
    a, b = (torch.cat(side) for side in zip(*rows, strict=True))
    for half in (0, 1):
        x, p = a[halves != half].numpy(), b[halves != half].softmax(-1).numpy()

        def loss(bias, x=x, p=p):
            kl = scipy_special.logsumexp(x + bias, axis=-1) - (p * (x + bias)).sum(-1)
            slope = scipy_special.softmax(x + bias, axis=-1).mean(0) - p.mean(0)
            return kl.mean() + (bias @ bias) / (18 * len(x)), slope + bias / (9 * len(x))

        best = scipy_optimize.minimize(loss, np.zeros(D_VOCAB), jac=True, tol=1e-8).x
        assert fitted[half].numpy() == pytest.approx(best, abs=0.03)


def test_no_bias_helps_where_tuning_is_none() -> None:
    base = make_tiny("llama", tie_word_embeddings=False)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.norm.weight.neg_()  # the order of all tokens turns round in every context
    result = inject_static_bias(base, tuned, TEXTS, **SMALL)
    gain = result.gain("fitted", 1.0)
    assert not gain["low"] > 0
    assert result.fitted["value"] < 0.3
    (answer,) = (v.answer for v in result.verdicts() if v.topic == "fitted bias")
    assert answer.endswith("no clear gain in predictions.")


def test_divergences_equal_a_loop_over_contexts(result) -> None:
    base = make_tiny("llama")
    tuned = perturbed(base, 0.1)
    delta = shift_of(base, tuned).delta
    for name, bias in (("none", torch.zeros(D_VOCAB)), ("all", delta)):
        per_text = []
        for ids in TEXTS:
            with torch.no_grad():
                a, b = (m(torch.tensor([ids])).logits[0].double() for m in (base, tuned))
            kl = torch.nn.functional.kl_div(
                (a + bias).log_softmax(-1), b.log_softmax(-1), reduction="none", log_target=True
            )
            per_text.append(float(kl.sum(-1)[torch.tensor(ids) != 1].mean()))
        alpha = 1.0 if name == "all" else 0.0
        found = result.value(bias=name, alpha=alpha, metric="kl_tuned")
        assert found == pytest.approx(np.mean(per_text), abs=1e-5)
    change = result.kl_gain("all", 1.0)["value"]
    before = result.value(bias="none", alpha=0.0, metric="kl_tuned")
    assert before + change == pytest.approx(found)


def test_one_text_leaves_nothing_to_read_a_fitted_bias_on() -> None:
    base = make_tiny("llama")
    opened = open_inputs(base, perturbed(base), TEXTS[:1], max_length=256)
    contexts = read_contexts(
        opened.pair.base.hooked, opened.pair.tuned.hooked, opened.corpus, 4, False
    )
    assert fit_biases(contexts, False) is None


def test_k_of_all_tokens_recovers_it_too() -> None:
    base, bias = biased_head("phi"), planted(1)
    special = torch.arange(D_VOCAB) < 3
    # Special tokens never get a bias: neither plant one on them nor let them win.
    base = with_bias(base, torch.where(special, -30.0, 0.0))
    tuned = with_bias(base, torch.where(special, 0.0, bias))
    result = inject_static_bias(base, tuned, TEXTS, **(SMALL | {"k": D_VOCAB - 3}))
    assert result.extras["k_used"] == D_VOCAB - 3
    assert result.value(bias="none", alpha=0.0, metric="agreement_tuned") < 0.9
    assert result.value(bias="promoted", alpha=1.0, metric="agreement_tuned") == 1.0


def test_a_shift_of_all_logits_is_no_change() -> None:
    base = biased_head("llama")
    tuned = with_bias(base, torch.full((D_VOCAB,), 3.0))
    shift = shift_of(base, tuned)
    assert shift.delta.abs().max() < 1e-5
    assert shift.rank_gain.abs().max() < 1e-6
    result = inject_static_bias(base, tuned, TEXTS, **SMALL)
    assert result.value(bias="none", alpha=0.0, metric="agreement_tuned") == 1.0
    assert "there is no change to explain" in result.conclusions()[0]


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_shift_equals_a_loop_over_contexts(name: str) -> None:
    base = make_tiny(name)
    tuned = perturbed(base, 0.1)
    found = shift_of(base, tuned)
    a, b = rows_of_logits(base), rows_of_logits(tuned)
    change = (b - b.mean(-1, keepdims=True)) - (a - a.mean(-1, keepdims=True))
    assert found.delta.numpy() == pytest.approx(change.mean(0), abs=1e-4)
    gain = scipy_stats.rankdata(b, axis=-1) - scipy_stats.rankdata(a, axis=-1)
    # Two logits within a rounding error of each other may change places in a context.
    assert found.rank_gain.numpy() == pytest.approx(gain.mean(0), abs=0.05)
    assert -0.5 < found.static_share < 1.0


def test_tied_logits_share_their_average_rank() -> None:
    base = make_tiny("llama")
    tuned = perturbed(base, 0.1)
    with torch.no_grad():
        # Two and two tokens that the base cannot tell apart.
        base.lm_head.weight[1:60:2] = base.lm_head.weight[0:59:2]
    a, b = rows_of_logits(base), rows_of_logits(tuned)
    assert (a[:, 1:60:2] == a[:, 0:59:2]).all()
    gain = scipy_stats.rankdata(b, axis=-1) - scipy_stats.rankdata(a, axis=-1)
    assert shift_of(base, tuned).rank_gain.numpy() == pytest.approx(gain.mean(0), abs=0.05)


def test_shifts_that_cancel_out_have_no_static_share() -> None:
    base = make_tiny("llama", tie_word_embeddings=False)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.norm.weight.neg_()  # every logit changes its sign, in every context
    plain, biased = shift_of(base, tuned), shift_of(biased_head("llama"), biased_head("llama"))
    assert plain.static_share < 0.9
    assert math.isnan(biased.static_share)


gains = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]) | st.floats(-5, 5), min_size=1, max_size=30)


@given(gains, st.integers(0, 5), st.integers(1, 40))
def test_the_most_promoted_tokens(gain, n_special: int, k: int) -> None:
    allowed = torch.ones(len(gain), dtype=torch.bool)
    allowed[:n_special] = False
    found = promoted(torch.tensor(gain, dtype=torch.float64), allowed, k).tolist()
    expected = sorted(range(n_special, len(gain)), key=lambda i: (-gain[i], i))[:k]
    assert found == expected


def test_controls() -> None:
    delta = planted().double()
    allowed = torch.ones(D_VOCAB, dtype=torch.bool)
    allowed[:3] = False
    chosen = torch.arange(10, 30)
    shift = Shift(delta, delta, 2.0, 0.0)
    found = biases(shift, chosen, allowed, 0)
    assert set(found) == set(BIASES)
    outside = torch.ones(D_VOCAB, dtype=torch.bool)
    outside[chosen] = False
    assert torch.equal(found["promoted"][chosen], delta[chosen])
    assert (found["promoted"][outside] == 0).all()
    assert torch.equal(found["all"], delta)
    assert sorted(found["shuffled"][chosen].tolist()) == sorted(delta[chosen].tolist())
    assert not torch.equal(found["shuffled"], found["promoted"])
    drawn = found["random"] != 0
    assert drawn.sum() == len(chosen)
    assert not drawn[:3].any()
    assert torch.equal(found["random"][drawn], delta[drawn])
    assert found["constant"].unique().tolist() == [float(delta[chosen].mean())]
    assert torch.equal(found["uncentred"][chosen], delta[chosen] + 2.0)
    assert (found["uncentred"][outside] == 0).all()
    again, other = biases(shift, chosen, allowed, 0), biases(shift, chosen, allowed, 1)
    assert torch.equal(again["random"], found["random"])
    assert not torch.equal(other["random"], found["random"])


def test_agreement_equals_a_loop_over_contexts(result) -> None:
    base = make_tiny("llama")
    tuned = perturbed(base, 0.1)
    delta = shift_of(base, tuned).delta.numpy()
    per_text = []
    for ids in TEXTS:
        with torch.no_grad():
            a, b = (m(torch.tensor([ids])).logits[0].double().numpy() for m in (base, tuned))
        keep = np.array(ids) != 1
        per_text.append(((a + 0.5 * delta).argmax(-1) == b.argmax(-1))[keep].mean())
    row = result.at(bias="all", alpha=0.5, metric="agreement_tuned")
    assert row["value"] == pytest.approx(np.mean(per_text), abs=1e-9)
    assert row["se"] == pytest.approx(np.std(per_text, ddof=1) / len(per_text) ** 0.5, abs=1e-9)


def test_the_processor_works_in_plain_transformers() -> None:
    base = biased_head("phi")
    bias = planted(2)
    prompt = torch.tensor([[1, 5, 9, 11], [1, 7, 8, 30]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    injected = base.generate(
        prompt, attention_mask=mask, logits_processor=[LogitBias(bias)], **options
    )
    own = with_bias(base, bias).generate(prompt, attention_mask=mask, **options)
    assert torch.equal(injected, own)
    with pytest.raises(ProbeError, match="make it for this model"):
        LogitBias(bias[:-1])(prompt, torch.zeros(2, D_VOCAB))


def test_a_constant_bias_changes_no_text(result) -> None:
    for alpha, metric in itertools.product(result.alphas, ("ttr", "rep_2", "agreement_base")):
        constant, none = (
            result.at(bias="constant", alpha=alpha, metric=metric),
            result.at(bias="none", alpha=0.0, metric=metric),
        )
        assert constant["value"] == none["value"]
    assert math.isnan(result.trend("constant", "ttr")["rho"])


def test_special_tokens_get_no_bias_and_k_may_be_too_large() -> None:
    base = make_tiny("llama")
    result = inject_static_bias(base, perturbed(base), TEXTS, **(SMALL | {"k": 500}))
    assert result.extras["k_used"] == D_VOCAB - 3
    assert any("K = 500 is more than the 58 tokens" in note for note in result.meta["notes"])
    few = inject_static_bias(base, perturbed(base), TEXTS, **(SMALL | {"k": 3}))
    assert {one["id"] for one in few.extras["promoted"]}.isdisjoint({0, 1, 2})
    most = inject_static_bias(base, perturbed(base), TEXTS, **(SMALL | {"k": 40}))
    assert any("69% of the 58 tokens" in note for note in most.meta["notes"])


@given(st.integers(0, 1000), st.integers(3, 6), st.booleans())
def test_exact_p_by_trying_all_orders(seed: int, n: int, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    x = np.arange(n, dtype=float).tolist()
    y = (rng.integers(0, 3, n) if tied else rng.random(n)).astype(float).tolist()
    found = exact_p(x, y)
    if len(set(y)) < 2:
        assert math.isnan(found)
        return
    rho = abs(rho_and_p(x, y)[0])
    every = [abs(rho_and_p(x, list(order))[0]) for order in itertools.permutations(y)]
    assert found == pytest.approx(np.mean([other >= rho - 1e-9 for other in every]))


def test_the_papers_own_trend() -> None:
    # Table 2: α with the original baseline at 0, and TTR.
    ttr = (0.449, 0.409, 0.384, 0.408, 0.356, 0.215)
    found = trend([0.0, 0.01, 0.05, 0.1, 0.2, 0.5], [[x] for x in ttr])
    assert found["rho"] == pytest.approx(-0.94, abs=0.005)
    assert found["p"] < 0.01
    # With six settings there are only 720 orders: the paper's p is the t approximation's.
    assert found["p_exact"] == pytest.approx(12 / 720)


def test_the_same_seed_gives_the_same_result(result) -> None:
    base = make_tiny("llama")
    again = inject_static_bias(base, perturbed(base, 0.1), TEXTS, **SMALL)
    assert again.table == result.table
    assert str(again.extras) == str(result.extras)
    other = inject_static_bias(base, perturbed(base, 0.1), TEXTS, **(SMALL | {"seed": 1}))
    assert other.table != result.table


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"k": 0}, CorpusError, "k must be at least 1"),
        ({"alphas": ()}, ProbeError, "alphas"),
        ({"seed": 2**63}, CorpusError, "seed must be"),
        ({"alphas": (0.1, 0.1)}, ProbeError, "alphas"),
        ({"alphas": (0.0, 0.1)}, ProbeError, "alphas"),
        ({"alphas": (math.nan,)}, ProbeError, "alphas"),
        ({"max_new_tokens": 0}, CorpusError, "max_new_tokens"),
    ],
)
def test_bad_options_are_one_line(change, kind, says: str) -> None:
    base = make_tiny("llama")
    with pytest.raises(kind, match=says) as caught:
        inject_static_bias(base, perturbed(base), TEXTS, **(SMALL | change))
    assert "\n" not in str(caught.value)


def test_one_strength_alone_is_no_list_of_them() -> None:
    for alphas in (0.5, None, "a"):
        with pytest.raises(ProbeError, match="alphas must be different finite numbers"):
            check_alphas(alphas)
    assert check_alphas(iter([0.5, 0.1])) == (0.1, 0.5)


def test_a_hooked_model_is_refused() -> None:
    base = make_tiny("llama")
    with pytest.raises(LoadingError, match="cannot generate"):
        inject_static_bias(base, load_hooked(perturbed(base), backend="residual"), TEXTS, **SMALL)


def test_text_answers_first_in_a_screenful(result) -> None:
    summary = result.summary()
    assert summary.startswith("Is it just a bias on some tokens?")
    words = " ".join(summary.split())
    for word in ("top K", "shuffled", "α = 0.5", "controls", "Not to be concluded"):
        assert word in words
    for old in ("placebo", "first token", "±", "No bias"):
        assert old not in words
    best = result.best()
    assert interval(result.gain(best["bias"], best["alpha"]), POINTS) in result.conclusions()[0]
    assert "The best of 9 biases tried" in result.conclusions()[0]
    assert result.verdicts()[-1].caution


def test_charts_show_biases_base_and_tuned_and_the_range_of_controls(result) -> None:
    charts = [block for block in flat(result.blocks()) if isinstance(block, Chart)]
    metrics = ("ttr", "rep_2", "agreement_tuned")
    for chart, metric in zip(charts, metrics, strict=True):
        assert chart.y.scale == "share"
        assert chart.series == ["top K", "top K, uncentred", "all tokens", CONTROL_BAND]
        assert chart.roles[CONTROL_BAND] == "control"
        for row in chart.rows:
            if row["series"] == CONTROL_BAND:
                values = [
                    result.value(bias=bias, alpha=row["alpha"], metric=metric) for bias in CONTROLS
                ]
                assert (row["low"], row["high"]) == (min(values), max(values))
            else:
                (bias,) = (name for name in TESTED if WORDS[name] == row["series"])
                assert row["value"] == result.value(bias=bias, alpha=row["alpha"], metric=metric)
        assert [line.value for line in chart.references] == [
            result.value(bias=side, alpha=0.0, metric=metric) for side in ("none", "tuned")
        ]
        assert [line.role for line in chart.references] == ["base", "tuned"]
    assert result.plot().to_dict()


def test_page_and_notebook_show_the_numbers_of_the_summary(result, tmp_path) -> None:
    page = write_report(tmp_path / "report.html", result).read_text(encoding="utf-8")
    best = result.best()
    gain = interval(result.gain(best["bias"], best["alpha"]), POINTS)
    for text in (page, result._repr_html_(), " ".join(result.summary().split())):
        assert gain in text
    assert "placebo" not in page


def test_what_was_not_measured_is_an_error(result) -> None:
    with pytest.raises(ResultsError, match="no gains of"):
        result.gain("promoted", 0.3)
    with pytest.raises(ResultsError, match="no trends of"):
        result.trend("promoted", "agreement_tuned")


def test_a_clear_gain_is_a_share_of_what_changed(result) -> None:
    gains = [
        row | {"value": 0.1, "low": 0.05, "high": 0.15}
        if (row["bias"], row["alpha"]) == (result.best()["bias"], result.best()["alpha"])
        else row
        for row in result.extras["gains"]
    ]
    base = result.value(bias="none", alpha=0.0, metric="agreement_tuned")
    answer = replace(result, extras={**result.extras, "gains": gains}).conclusions()[0]
    assert "adds +10.0 [+5.0, +15.0] points" in answer
    assert f"accounts for {10 / (1 - base):.1f}% of what changed" in answer


def test_an_open_pair_gives_the_same(result) -> None:
    base = make_tiny("llama")
    again = inject_static_bias(open_pair(base, perturbed(base, 0.1)), TEXTS, **SMALL)
    assert again.table == result.table


def test_what_is_written_returns(result, tmp_path) -> None:
    result.write(tmp_path)
    again = StaticBiasResult.load(tmp_path)
    assert again.summary() == result.summary()
    assert again.to_frame().equals(result.to_frame())


def test_a_file_of_version_0_1_is_read(result, tmp_path) -> None:
    path = result.write(tmp_path)
    data = json.loads(path.read_text(encoding="utf-8")) | {"format": 1}
    data["meta"]["data"] = data["meta"].pop("corpus")
    # It fitted no bias and measured no divergence.
    data["table"] = [row for row in data["table"] if row["metric"] != "kl_tuned"]
    data["table"] = [row for row in data["table"] if row["bias"] != "fitted"]
    data["extras"]["gains"] = [r for r in data["extras"]["gains"] if r["bias"] != "fitted"]
    del data["extras"]["kl_gains"]
    path.write_text(json.dumps(data), encoding="utf-8")
    again = StaticBiasResult.load(tmp_path)
    assert again.meta == result.meta
    of_fitted = [v.answer for v in result.verdicts() if v.topic == "fitted bias"]
    assert [*again.conclusions(), *of_fitted] == sorted(
        result.conclusions(), key=lambda answer: answer in of_fitted
    )
    assert "fitted on other texts" in result.summary()
    assert "fitted on other texts" not in again.summary()


def test_two_pairs_on_one_page(result, tmp_path) -> None:
    # A token is text of the model's making: on the page it must stay text.
    token = {"id": 5, "token": "<script>alert(1)</script>", "rank_gain": 1.0, "delta": 0.5}
    other = replace(
        result,
        meta=result.meta | {"base": {"name": "<b>other"}, "notes": ["k <is> large"]},
        extras=result.extras | {"promoted": [token]},
    )
    page = write_report(tmp_path / "report.html", [result, other]).read_text(encoding="utf-8")
    assert "LlamaForCausalLM → LlamaForCausalLM" in page
    assert "&lt;b&gt;other → LlamaForCausalLM" in page
    assert "<script>alert(1)" not in page
    # A note that only one pair has stands under the name of that pair.
    assert "Note: &lt;b&gt;other → LlamaForCausalLM: k &lt;is&gt; large" in page


def test_the_command(tmp_path, capsys, llama_folder, monkeypatch) -> None:
    tuned = tmp_path / "tuned"
    perturbed(make_tiny("llama"), 0.1).save_pretrained(tuned)
    monkeypatch.setattr("hyperlens.cli.experiments.texts_for", lambda *_: TEXTS)
    options = ["--n-prompts", "4", "--prompt-tokens", "5", "--max-new-tokens", "6", "-q"]
    options += ["--k", "9", "--alphas", "0.2,1", "--out", str(tmp_path / "out")]
    command = ["static-bias", str(llama_folder), str(tuned), "--texts", "ids.txt"]
    assert main([*command, *options]) == 0
    title = "Is it just a bias on some tokens?"
    assert title in capsys.readouterr().out
    assert title in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    loaded = StaticBiasResult.load(tmp_path / "out")
    assert loaded.alphas == [0.2, 1.0]
    assert loaded.extras["k_used"] == 9
    assert main([*command, "--alphas", "much"]) == 2
    assert "numbers with commas" in capsys.readouterr().err
