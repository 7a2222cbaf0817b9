"""What both models write: means over prompts, paired tests, examples with ranks."""

import html
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, D_VOCAB, make_tiny, perturbed, token_texts
from scipy import stats as scipy_stats
from test_prompts import one_token_per_byte
from transformers import AutoTokenizer

from hyperlens import cli, load_hooked, measure_behaviour, write_report
from hyperlens.decoding.diversity import type_token_ratio
from hyperlens.decoding.generate import GenerationRunner, Generations, continuations
from hyperlens.decoding.prompts import choose_examples
from hyperlens.embedded import embedded_base, embedded_tales
from hyperlens.errors import HyperlensError, LoadingError, ResultsError
from hyperlens.experiments.behaviour import WORDS, BehaviourResult
from hyperlens.render.blocks import Chart, Details, Table
from hyperlens.render.format import FRACTION, interval

TEXTS = token_texts(10, shortest=8, longest=20)
SHORT = {"prompt_tokens": 6, "max_new_tokens": 12, "n_examples": 2, "progress": False}


def test_a_model_against_itself_is_exactly_the_same(tiny) -> None:
    found = measure_behaviour(tiny, tiny, TEXTS, **SHORT)
    assert found.strategies == ["greedy", "sample"]
    for row in found.select(model="difference"):
        assert (row["value"], row["low"], row["high"]) == (0, 0, 0), row
        assert math.isnan(row["p"]), row
    assert "equally diverse" in found.summary()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_means_and_tests_are_those_of_the_continuations(name: str) -> None:
    base = make_tiny(name)
    tuned = perturbed(base, 0.5)
    found = measure_behaviour(base, tuned, TEXTS, strategies=("greedy",), **SHORT)
    prompts = sorted(text[:6] for text in TEXTS)
    ratios = [
        [
            type_token_ratio(row)
            for row in continuations(
                model, None, prompts, max_new_tokens=12, stop_at_eos=False, progress=False
            )
        ]
        for model in (base, tuned)
    ]
    for side, of_side in zip(("base", "tuned"), ratios, strict=True):
        assert found.at(strategy="greedy", model=side, metric="ttr")["value"] == pytest.approx(
            np.mean(of_side)
        )
        assert found.at(strategy="greedy", model=side, metric="ttr")["se"] == pytest.approx(
            np.std(of_side, ddof=1) / math.sqrt(len(of_side))
        )
    tests = len(found.metrics)
    p = scipy_stats.ttest_rel(ratios[1], ratios[0]).pvalue
    gap = found.at(strategy="greedy", model="difference", metric="ttr")
    assert gap["value"] == pytest.approx(np.mean(ratios[1]) - np.mean(ratios[0]))
    assert min(p, 1) - 1e-12 <= gap["p"] <= min(1, tests * p) + 1e-12


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_bases_own_greedy_tokens_have_rank_one(name: str) -> None:
    base = make_tiny(name)
    found = measure_behaviour(base, perturbed(base, 0.5), TEXTS, strategies=("greedy",), **SHORT)
    examples = found.extras["examples"]
    for example in examples:
        assert example["base"]["base_rank"] == [1] * 12
        assert len(example["tuned"]["tokens"]) == 12
    assert max(rank for example in examples for rank in example["tuned"]["base_rank"]) > 1


def test_ranks_are_those_of_the_plain_model(tiny) -> None:
    found = measure_behaviour(tiny, perturbed(tiny, 0.5), TEXTS, strategies=("sample",), **SHORT)
    example = found.extras["examples"][0]
    prompt = [int(i) for i in example["prompt"].split()]
    made = [int(i) for i in example["tuned"]["text"].split()]
    with torch.no_grad():
        logits = tiny(torch.tensor([prompt + made])).logits[0, len(prompt) - 1 : -1]
    ranks = [1 + int((row > row[token]).sum()) for row, token in zip(logits, made, strict=True)]
    assert example["tuned"]["base_rank"] == ranks
    assert max(ranks) <= D_VOCAB


def test_the_same_seed_gives_the_same(tiny, tmp_path: Path) -> None:
    tuned = perturbed(tiny, 0.3)
    first, again = (measure_behaviour(tiny, tuned, TEXTS, **SHORT) for _ in range(2))
    assert first == again
    other = measure_behaviour(tiny, tuned, TEXTS, seed=1, **SHORT)
    assert other.table != first.table
    first.write(tmp_path)
    assert BehaviourResult.load(tmp_path) == first
    with pytest.raises(ResultsError, match=r"behaviour\.json"):
        BehaviourResult.load(tmp_path / "nothing")


def test_words_and_all_prompts_together_against_the_definitions(tmp_path: Path) -> None:
    base, texts = embedded_base(), embedded_tales()[:4]
    options = SHORT | {"strategies": ["greedy"], "n_examples": 9, "n_prompts": 4}
    found = measure_behaviour(base, base, texts, **options)
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = found.extras["examples"]
    assert len(examples) == 4
    ids, shares = [], {n: [] for n in (1, 2, 3)}
    for example in examples:
        words = re.findall(r"\w+", example["base"]["text"].lower())
        for n, of_all in shares.items():
            grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
            of_all.append(len(set(grams)) / len(grams))
        prompt = tokenizer(example["prompt"], add_special_tokens=False)["input_ids"]
        whole = tokenizer(example["prompt"] + example["base"]["text"], add_special_tokens=False)
        ids.append(whole["input_ids"][len(prompt) :])
        assert len(ids[-1]) == 12
    for metric, expected in (
        ("word_ttr", np.mean(shares[1])),
        ("word_rep_2", 1 - np.mean(shares[2])),
        ("word_rep_3", 1 - np.mean(shares[3])),
    ):
        assert found.at(strategy="greedy", model="base", metric=metric)["value"] == pytest.approx(
            expected
        )
    for n, value in found.distinct("greedy", "tuned").items():
        grams = [tuple(row[i : i + n]) for row in ids for i in range(len(row) - n + 1)]
        assert value == len(set(grams)) / len(grams)
    (folded,) = (b for b in found.blocks() if isinstance(b, Details) and "distinct" in b.summary)
    (table,) = (block for block in folded.blocks if isinstance(block, Table))
    assert [list(row) for row in table.rows] == [
        [f"n = {n}", *(FRACTION(found.distinct("greedy", side)[n]) for side in ("base", "tuned"))]
        for n in (1, 2, 3)
    ]
    page = (found.save(tmp_path / "out") / "report.html").read_text(encoding="utf-8")
    assert "repeated bigrams of words" in page
    assert "over all continuations together" in page


def test_examples_are_drawn_from_all_prompts_and_change_no_number(tiny) -> None:
    few, many = (
        measure_behaviour(tiny, tiny, TEXTS, **(SHORT | {"n_examples": n})) for n in (3, 9)
    )
    assert json.dumps(few.table) == json.dumps(many.table)
    shown = [
        [e["prompt"] for e in f.extras["examples"] if e["strategy"] == "greedy"]
        for f in (few, many)
    ]
    assert shown[0] == shown[1][:3]
    prompts = sorted(text[:6] for text in TEXTS)
    expected = [prompts[i] for i in choose_examples(len(prompts), 9, 0)]
    assert [[int(i) for i in prompt.split()] for prompt in shown[1]] == expected != prompts[:9]
    # Texts are read in the order of their tokens, of which the first few are no fair choice.
    drawn = [choose_examples(100, 8, seed) for seed in range(20)]
    assert max(min(one) for one in drawn) > 0
    assert np.mean(drawn) == pytest.approx(49.5, abs=3 * 29 / math.sqrt(160))
    assert sorted(choose_examples(5, 9, 0)) == list(range(5))


def test_a_prompt_that_ends_inside_a_character_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = one_token_per_byte()
    texts = ["你好吗, she said", "它们在哪里? he asked"]
    ids = [reads(text)["input_ids"] for text in texts]

    def run(self: GenerationRunner, *_: object, **__: object) -> Generations:
        """Both models write what the text itself has."""
        return Generations([next(i[5:17] for i in ids if i[:5] == p) for p in self.prompts], {})

    monkeypatch.setattr(GenerationRunner, "run", run)
    model = make_tiny("llama", vocab_size=256)
    options = SHORT | {"prompt_tokens": 5, "strategies": ("greedy",)}
    found = measure_behaviour((model, reads), (model, reads), texts, **options)
    shown = {e["prompt"]: (e["base"]["text"], e["tuned"]["text"]) for e in found.extras["examples"]}
    expected = (reads.decode(i[:17]) for i in ids)
    assert shown == {whole[0]: (whole[1:], whole[1:]) for whole in expected}


def test_one_prompt_is_too_few_to_tell(tiny) -> None:
    found = measure_behaviour(tiny, perturbed(tiny, 0.5), TEXTS, n_prompts=1, **SHORT)
    said = " ".join(found.conclusions())
    assert "Greedy decoding: so few prompts cannot tell whether diversity differs (TTR " in said
    assert "no clear difference" not in said


def test_refusals_say_what_to_do(tiny) -> None:
    for options, said in (
        ({"strategies": "greedy"}, "strategies must be a list"),
        ({"strategies": ["beam"]}, "list of greedy and sample"),
        ({"strategies": ["greedy", "greedy"]}, "each once at most"),
        ({"n_examples": -1}, "n_examples must be at least 0"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**64}, "numbers are below 2\\^64"),
        ({"seed": True}, "seed must be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 90}, "context"),
        ({"prompt_tokens": 30}, "longer texts"),
    ):
        with pytest.raises(HyperlensError, match=said):
            measure_behaviour(tiny, tiny, TEXTS, **(SHORT | options))
    with pytest.raises(LoadingError, match="hooked"):
        measure_behaviour(load_hooked(tiny, backend="residual"), tiny, TEXTS, **SHORT)


def test_the_charts_have_both_models_and_every_measure(tiny) -> None:
    found = measure_behaviour(tiny, perturbed(tiny), TEXTS, **SHORT)
    charts = [block for block in found.blocks() if isinstance(block, Chart)]
    assert len(charts) == len(found.strategies) == 2
    names = {"base": found.base_name, "tuned": found.tuned_name}
    for chart, strategy in zip(charts, found.strategies, strict=True):
        assert [
            (r["series"], r["measure"], r["value"], r["low"], r["high"]) for r in chart.rows
        ] == [
            (names[row["model"]], WORDS[row["metric"]], row["value"], row["low"], row["high"])
            for side in names
            for row in found.select(strategy=strategy, model=side)
        ]
        assert all(0 <= row["value"] <= 1 for row in chart.rows)
        assert chart.x.scale == "share"
        assert chart.roles == {names["base"]: "base", names["tuned"]: "tuned"}
    figure = found.plot()
    assert figure is not None
    assert figure.to_dict()


def test_text_page_and_notebook_show_the_same_numbers(tiny, tmp_path: Path) -> None:
    found = measure_behaviour(tiny, perturbed(tiny, 0.5), TEXTS, **SHORT)
    page = write_report(tmp_path / "page.html", [found]).read_text(encoding="utf-8")
    texts = (
        " ".join(found.summary().split()),
        html.unescape(page),
        html.unescape(found._repr_html_()),
    )
    for strategy in found.strategies:
        for side in ("base", "tuned"):
            shown = interval(found.at(strategy=strategy, model=side, metric="ttr"), FRACTION)
            assert all(shown in text for text in texts), shown


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, file = str(embedded_base()), tmp_path / "texts.txt"
    file.write_text("\n\n".join(f"The {who} went into the wood." for who in ("king", "cat", "fox")))
    short = ["--prompt-tokens", "5", "--max-new-tokens", "6", "--n-prompts", "4", "-q"]
    command = ["behaviour", base, base, "--texts", str(file), *short]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == cli.OK
    printed = capsys.readouterr().out
    found = BehaviourResult.load(tmp_path / "out")
    assert printed.startswith(found.summary())
    prompts = {example["prompt"] for example in found.extras["examples"]}
    assert prompts == {f"The {who} went into" for who in ("king", "cat", "fox")}
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        *("behaviour.json", "behaviour.csv", "summary.txt", "report.html"),
    }
