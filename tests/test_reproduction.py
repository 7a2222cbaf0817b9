"""The paper's numbers, and the run that puts a model's own beside them."""

import html
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import D_VOCAB, SHARED, make_tiny, unchecked
from scipy import stats
from surface_for_tests import words_tokenizer

from hyperlens import cli, measure_behaviour, open_pair, read_results, reproduce
from hyperlens.decoding.generate import keeping_continuations
from hyperlens.errors import CorpusError, HyperlensError, LoadingError, ResultsError
from hyperlens.judging import Judgement
from hyperlens.judging.labelled import labelled_answer
from hyperlens.questions import QUESTIONS
from hyperlens.reproduction import ReproductionResult, paper_numbers, protocol_for
from hyperlens.reproduction.claims import RULES, by_interval, judge_claims
from hyperlens.reproduction.paper import (
    CONTRADICTIONS,
    NOT_MEASURED,
    SAID,
    STAGES,
    exhibits,
    stages_of,
)
from hyperlens.reproduction.plan import plan
from hyperlens.reproduction.protocol import SCALES, Protocol
from hyperlens.reproduction.readings import pooled_p
from hyperlens.reproduction.result import reference_of

# What changes from one run to the next without any number of a model being another.
TIMES = ("hours", "speedup", "hours_ttr_peak")


def judge(prompt: str) -> str:
    """Has no preference, in the paper's form and in ours."""
    if "coherence_score_a" in prompt:
        return labelled_answer(Judgement((5, 5), (5, 5), "tie", ""))
    scores = {"first": 5, "second": 5}
    return json.dumps({"reason": "", "coherence": scores, "diversity": scores, "winner": "tie"})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny("llama").save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return str(folder)


def words(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in rng.integers(3, D_VOCAB, 30)) for _ in range(n)]


TEXTS = {"FS": words(12), "AG": words(12, seed=1)}


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """Every stage once, in a folder, and what was said."""
    folder, said = tmp_path_factory.mktemp("run") / "out", []
    # Every experiment has tests of its own, with their shapes and types checked.
    with unchecked():
        result = reproduce(
            base, TEXTS, out=folder, scale="smoke", judge=judge, progress=False, say=said.append
        )
    return SimpleNamespace(result=result, folder=folder, said=said)


# The paper as data


def test_every_number_stands_in_the_paper() -> None:
    file = SHARED / "paper" / "paper_numbers.json"
    if not file.exists():
        pytest.skip("the paper is not here (../shared/paper)")
    text = (SHARED / "paper" / "beyond-temperature.txt").read_text()
    quoted = json.loads(file.read_text())
    ours = paper_numbers()
    assert len(ours) == len(quoted)
    for one, number in zip(quoted, ours, strict=True):
        assert (one["exhibit"], one["row"], one["column"]) == number[0:1] + number[2:4]
        assert one["value"] == number.value
        assert one["quote_line"] in text
        # ".658" for 0.658, "57" for 57.0, "10^{0}" for 1.
        digits = {f"{number.value:g}", f"{number.value:g}".removeprefix("0"), one["value_text"]}
        assert any(d in one["quote_line"] for d in digits if d), one


def test_every_exhibit_is_measured_or_says_why_not() -> None:
    for exhibit in exhibits():
        assert bool(stages_of(exhibit)) != (exhibit in NOT_MEASURED), exhibit
        assert set(stages_of(exhibit)) <= set(STAGES), exhibit
    tables = {f"Table {n}" for n in range(1, 17)} | {f"Figure {n}" for n in range(1, 15)}
    assert tables <= set(exhibits())
    assert CONTRADICTIONS.keys() <= set(exhibits())


def test_one_quantity_is_one_number_of_a_model_or_a_known_contradiction() -> None:
    found: dict = {}
    for one in paper_numbers():
        if one.quantity and one.relation == "=":
            key = one.model, one.quantity
            found.setdefault(key, {}).setdefault(one.value, []).append(one.exhibit)
    for (model, quantity), values in found.items():
        exact = [v for v in values if not any(round(w, 2) == v != w for w in values)]
        if len(exact) > 1:
            places = {place for value in exact for place in values[value]}
            known = places & CONTRADICTIONS.keys() or {"Table 5"} & places
            assert known, (model, quantity, values)


# The run


def test_every_quantity_of_the_paper_is_measured(whole) -> None:
    missing = {row["quantity"] for row in whole.result.table if math.isnan(row["value"])}
    # Without a model for MAUVE, a third domain, the paper's other alphas and 60 epochs.
    allowed = re.compile(r".*/mauve|cross_domain/WP/.*|static_bias/0\.(01|05|2)/.*|.*_at_60")
    # A tiny model's diversity need not double, nor its text vary with alpha.
    allowed_here = {"training/late_lora/epoch_ttr_doubled", "static_bias/trend/rho",
                    "static_bias/trend/p"}  # fmt: skip
    late = {"judge/total/p"}  # the judge sees no difference
    p_values = {q for q in missing if q.startswith("temperature/p/")}
    assert {q for q in missing if not allowed.fullmatch(q)} <= allowed_here | late | p_values


def test_the_same_quantity_is_the_same_number_everywhere(whole) -> None:
    seen: dict = {}
    for row in whole.result.table:
        scale = 100 if row["unit"] == "%" else 1
        seen.setdefault(row["quantity"], set()).add(f"{row['value'] / scale:.10g}")
    assert all(len(values) == 1 for values in seen.values())
    at = lambda quantity: whole.result.select(quantity=quantity)[0]["value"]  # noqa: E731
    for metric in ("ttr", "rep_2", "entropy", "top1_agreement"):
        assert at(f"temperature/tuned/{metric}") == at(f"variants/full/{metric}")
        assert at(f"temperature/original/{metric}") == at(f"variants/original/{metric}")
    for metric in ("ttr", "rep_2"):
        tuned = {at(f"{stage}/tuned/{metric}") for stage in ("temperature", "static_bias",
                                                              "decoding")}  # fmt: skip
        assert len(tuned) == 1
        assert at(f"decoding/greedy/{metric}") == at(f"variants/original/{metric}")
    assert whole.result.value(quantity="provenance/teacher_forced/rank_1") == pytest.approx(
        100 * at("variants/full/top1_agreement")
    )


def test_all_of_it_is_on_disk_and_on_one_page(whole) -> None:
    names = {path.name for path in whole.folder.iterdir()}
    assert {"reproduction.json", "reproduction.csv", "summary.txt", "report.html"} <= names
    loaded = ReproductionResult.load(whole.folder)
    assert [str(row) for row in loaded.table] == [str(row) for row in whole.result.table]
    kinds = {result.name for result in read_results([whole.folder])}
    assert {"reproduction", "temperature", "variants", "training", "judge"} <= kinds
    page = (whole.folder / "report.html").read_text()
    assert "Does the paper hold for this model?" in page
    findings = page[page.index('id="findings"') : page.index("</section>")]
    assert all(claim.claim in html.unescape(findings) for claim in whole.result.claims)
    assert "Full fine-tuning" not in findings
    assert "a demonstration, not evidence" in page


def test_the_papers_protocol_stands_beside_its_judge_and_ours_below(whole) -> None:
    row = whole.result.select(exhibit="Table 5", quantity="judge/total/tie")[0]
    # Clopper and Pearson's interval of 4 of 4.
    assert (row["value"], row["high"]) == (100, 100)
    assert row["low"] == pytest.approx(100 * 0.025 ** (1 / 4))
    page = html.unescape((whole.folder / "report.html").read_text())
    assert "Judged blind and in both orders" in page
    assert "Asked once, with the paper's prompt" in page


def test_what_the_paper_says_without_a_number_stands_beside_this_runs_answer(whole, base) -> None:
    ((exhibit, sentences),) = whole.result.extras["said"].items()
    assert exhibit == "Appendix A.3"
    assert stages_of(exhibit) == ("weights",)
    assert sentences[0].startswith("Leading singular vectors rotate")
    assert sentences[1].startswith("Changed singular values account for")
    page = html.unescape((whole.folder / "report.html").read_text())
    assert f"{SAID[exhibit]}. This run: {sentences[0]}" in page
    only = plan(base, TEXTS, protocol=protocol_for("smoke"), only=[exhibit], device="cpu")
    assert [stage.name for stage in only.stages] == ["training full"]


def test_what_is_done_is_not_done_again(whole, base) -> None:
    def again(**changes):
        said = []
        protocol = protocol_for("smoke", **changes)
        reproduce(base, TEXTS, out=whole.folder, protocol=protocol, judge=judge, progress=False,
                  say=said.append)  # fmt: skip
        return said

    assert whole.said.count("training all weights on FS") == 1
    assert again() == []
    assert again(alphas=(0.5, 1.0)) == ["measuring static bias"]
    assert again(min_p=0.2) == ["measuring decoding"]
    trained = again(lora_epochs=1)
    assert trained == [
        *("training LoRA on all blocks on FS", "training LoRA on the last blocks on FS"),
        *("measuring training", "measuring variants", "measuring judge"),
    ]


def test_other_prompts_train_nothing_anew_unless_they_are_recorded() -> None:
    for record_every, is_same in ((0, True), (1, False)):
        one, other = (
            protocol_for("smoke", record_every=record_every, n_prompts=n).recipe_changes("full")
            for n in (2, 3)
        )
        assert (one == other) == is_same


def test_only_what_an_exhibit_needs(base, tmp_path) -> None:
    said = []
    result = reproduce(base, TEXTS["FS"], out=tmp_path / "r", scale="smoke", only=["Figure 4"],
                       progress=False, say=said.append)  # fmt: skip
    assert said == ["training all weights", "measuring provenance"]
    assert {row["quantity"] for row in result.table if not math.isnan(row["value"])} == {
        f"provenance/{mode}/{bucket}"
        for mode, buckets in (
            ("free_running", ("rank_1", "rank_2_10", "rank_gt_1", "rank_gt_10")),
            ("teacher_forced", ("rank_1", "rank_2_10", "rank_gt_10")),
        )
        for bucket in buckets
    }
    assert all(claim.outcome == "cannot tell here" for claim in result.claims)
    # A model that is trained already is taken as it is.
    (folder,) = (tmp_path / "r" / "models").glob("*/full")
    said.clear()
    again = reproduce(base, TEXTS["FS"], out=tmp_path / "s", scale="smoke", only=["Figure 4"],
                      trained={"full": folder}, progress=False, say=said.append)  # fmt: skip
    assert said == ["measuring provenance"]
    assert [str(row) for row in again.table] == [str(row) for row in result.table]


def test_text_is_written_once(tmp_path) -> None:
    model, tuned = make_tiny("llama"), make_tiny("llama", seed=1)
    pair = open_pair((model, words_tokenizer()), (tuned, words_tokenizer()))
    options = {"n_prompts": 4, "prompt_tokens": 4, "max_new_tokens": 4, "progress": False}
    calls = []
    plain = type(model).generate
    for one in (model, tuned):
        hooked = pair.base.model if one is model else pair.tuned.model

        def counted(*args, _model=hooked, **kwargs):
            calls.append(_model)
            return plain(_model, *args, **kwargs)

        hooked.generate = counted
    with keeping_continuations(tmp_path / "written"):
        first = measure_behaviour(pair, words(8), **options)
        n = len(calls)
        second = measure_behaviour(pair, words(8), **options)
        assert len(calls) == n > 0
        measure_behaviour(pair, words(8), **options | {"seed": 1, "strategies": ["sample"]})
        assert len(calls) > n
    assert first.table == second.table
    n = len(calls)
    assert measure_behaviour(pair, words(8), **options).table == first.table
    assert len(calls) > n


@pytest.mark.long
def test_killed_at_any_moment_it_ends_the_same(base, tmp_path) -> None:
    def table(folder):
        found = ReproductionResult.load(folder).table
        return [str(row) for row in found if row["quantity"].rpartition("/")[2] not in TIMES]

    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS["FS"]))
    command = [sys.executable, "-m", "hyperlens", "reproduce", base, "--texts", str(file),
               "--scale", "smoke", "--judge-rule", "-q", "--out"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment)
    rng = np.random.default_rng(0)
    for wait in (12 + 30 * rng.random(5)).tolist():
        process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(tmp_path / "killed")], check=True, env=environment)
    assert table(tmp_path / "killed") == table(tmp_path / "whole")


# What is concluded


def test_an_interval_decides() -> None:
    assert by_interval(0.1, 0.2, 0.0) == "reproduced"
    assert by_interval(-0.2, 0.0, 0.0) == "not reproduced"
    assert by_interval(-0.1, 0.1, 0.0) == "cannot tell here"
    assert by_interval(math.nan, math.nan, 0.0) == "cannot tell here"


class Table:
    """As much of a result as the rules ask for."""

    def __init__(self, rows=(), **more):
        self.table = rows
        self.__dict__ |= more

    def at(self, **wanted):
        (row,) = (r for r in self.table if all(r[key] == value for key, value in wanted.items()))
        return row

    def value(self, **wanted):
        return self.at(**wanted)["value"]


def span(low, high):
    return {"value": (low + high) / 2, "low": float(low), "high": float(high)}


def outcome(name, results):
    return {claim.name: claim.outcome for claim in judge_claims(results)}[name]


@pytest.mark.parametrize(
    ("greedy", "sampled", "expected"),
    [
        ((0.1, 0.2), (0.1, 0.2), "reproduced"),
        ((0.1, 0.2), (-0.1, 0.2), "cannot tell here"),
        # Greedy text at T* is the base's own: it alone decides nothing.
        ((0.1, 0.2), (-0.2, -0.1), "cannot tell here"),
        ((-0.2, -0.1), (-0.2, -0.1), "not reproduced"),
    ],
)
def test_temperature_needs_greedy_and_sampled_text(greedy, sampled, expected) -> None:
    tests = {"greedy": span(*greedy), "sampled": span(*sampled)}
    result = SimpleNamespace(test=lambda decoding, *_: {"difference": tests[decoding]})
    assert outcome("not temperature", {"temperature": result}) == expected


@pytest.mark.parametrize(
    ("gain", "expected"),
    [((0.0, 0.1), "reproduced"), ((0.3, 0.45), "not reproduced"), ((0.2, 0.3), "cannot tell here")],
)
def test_a_bias_must_bring_back_half(gain, expected) -> None:
    rows = [{"bias": "none", "alpha": 0.0, "metric": "agreement_tuned", "value": 0.5}]
    result = Table(rows, fitted={}, gain=lambda *_: span(*gain))
    assert outcome("not a static bias", {"static_bias": result}) == expected


def geometry(before, last):
    layers = {1: span(*before), 2: span(*last)}
    rows = [
        SimpleNamespace(layer=layer, _asdict=lambda r=row: r, value=row["value"])
        for layer, row in layers.items()
    ]
    return SimpleNamespace(
        n_layers=2,
        meta={},
        long=(),
        measured=lambda probe, metric, view=None: (
            rows if (metric, view) == ("delta", "raw") else []
        ),
    )


@pytest.mark.parametrize(
    ("before", "last", "expected"),
    [
        ((0, 2), (20, 30), "reproduced"),
        ((20, 25), (20, 30), "not reproduced"),
        ((5, 12), (20, 30), "cannot tell here"),
        ((-3, -2), (-30, -20), "not reproduced"),
    ],
)
def test_the_end_must_make_most_of_it(before, last, expected) -> None:
    assert outcome("localised at the end", {"geometry": geometry(before, last)}) == expected


@pytest.mark.parametrize(
    ("last", "control", "p", "expected"),
    [
        ((10, 20), 5, 0.05, "reproduced"),
        ((10, 20), 16, 0.3, "cannot tell here"),
        ((10, 20), 5, 0.2, "cannot tell here"),
        ((-5, 0), 5, 0.05, "not reproduced"),
        ((-5, 5), 1, 0.05, "cannot tell here"),
    ],
)
def test_an_expansion_must_beat_random_changes(last, control, p, expected) -> None:
    row = {"metric": "delta", "view": "raw", "layer": 2, "tuned": sum(last) / 2,
           "control_high": float(control), "p": p}  # fmt: skip
    results = {"geometry": geometry((0, 1), last), "null_test": Table([row])}
    assert outcome("terminal expansion", results) == expected


@pytest.mark.parametrize(
    ("between", "late_low", "lora_low", "expected"),
    [
        ((-0.02, 0.1), 0.1, 0.3, "reproduced"),
        ((-0.3, -0.2), 0.1, 0.3, "not reproduced"),
        ((-0.2, 0.1), 0.1, 0.3, "cannot tell here"),
        ((-0.02, 0.1), -0.1, 0.3, "cannot tell here"),
        ((-0.02, 0.1), 0.1, -0.3, "cannot tell here"),
    ],
)
def test_late_stage_may_lose_a_quarter(between, late_low, lora_low, expected) -> None:
    rows = [
        {"variant": "late_lora", "metric": "ttr", "value": 0.6, "difference": 0.3,
         "difference_low": late_low},
        {"variant": "lora", "metric": "ttr", "value": 0.6, "difference": 0.4,
         "difference_low": lora_low},
    ]  # fmt: skip
    result = Table(rows, between=lambda *_: span(*between))
    assert outcome("late-stage suffices", {"variants": result}) == expected


@pytest.mark.parametrize(
    ("hours", "expected"),
    [((4, 3, 2), "reproduced"), ((4, 2.2, 2), "cannot tell here"), ((4, 1, 2), "not reproduced")],
)
def test_time_is_compared_by_epoch(hours, expected) -> None:
    # The epochs differ; what an epoch takes decides.
    epochs = {"full": 10, "lora": 20, "late_lora": 40}
    known = {
        run: {"hours": hour * epochs[run], "epochs": epochs[run]}
        for run, hour in zip(epochs, hours, strict=True)
    }
    result = SimpleNamespace(runs=list(epochs), known=known.get)
    assert outcome("late-stage saves time", {"training": result}) == expected


def test_what_was_not_measured_is_not_judged() -> None:
    claims = judge_claims({})
    assert len(claims) == len(RULES) == 6
    assert {claim.outcome for claim in claims} == {"cannot tell here"}
    assert all("was not measured" in claim.decided_by for claim in claims)


def test_the_papers_test_is_students(whole) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.2, 1, 30), rng.normal(0, 2, 30)
    rows = [{"value": x.mean(), "se": x.std(ddof=1) / math.sqrt(30), "n": 30} for x in (a, b)]
    assert pooled_p(*rows) == pytest.approx(stats.ttest_ind(a, b).pvalue)
    same = {"value": 1.0, "se": 0.0, "n": 30}
    assert math.isnan(pooled_p(same, same))


def test_directions_and_distances_are_the_papers(whole) -> None:
    for row in whole.result.table:
        if row["within"] is not None and math.isfinite(row["paper_uncertainty"]):
            gap = abs(row["value"] - row["paper"])
            assert row["within"] == (gap <= 2 * row["paper_uncertainty"])
    assert reference_of("temperature/p/ttr") is None
    row = whole.result.select(exhibit="Table 3", quantity="variants/lora/ttr")[0]
    original = whole.result.select(exhibit="Table 3", quantity="variants/original/ttr")[0]
    ours, theirs = row["value"] - original["value"], row["paper"] - original["paper"]
    assert row["same_direction"] == (ours * theirs > 0)
    # The paper's own difference is within its noise.
    matched = whole.result.select(exhibit="Table 1", quantity="temperature/matched/ttr")[0]
    assert matched["same_direction"] is None
    keys = [(r["exhibit"], r["model"], r["quantity"], r["paper"]) for r in whole.result.table]
    assert len(keys) == len(set(keys))
    settings = whole.result.select(exhibit="Table 1")[0]["settings"]
    assert "n_prompts 4 (paper 30)" in settings


# The protocol


def test_every_scale_is_a_protocol_and_says_whose_it_is() -> None:
    for scale in SCALES:
        protocol = protocol_for(scale)
        assert protocol.origins().keys() == protocol.to_json().keys()
    origins = Protocol().origins()
    assert origins["epochs"] == "paper, section 2.1"
    assert origins["prompt_tokens"] == "ours"
    assert protocol_for("paper", epochs=3).origins()["epochs"] == "ours"
    # What the paper states is in its text.
    stated = {one.value for one in paper_numbers()}
    for name, origin in origins.items():
        if origin != "ours":
            value = getattr(Protocol(), name)
            assert set(value if isinstance(value, tuple) else (value,)) <= stated, name


@pytest.mark.parametrize(
    "changes", [{"epochs": 0}, {"seed": -1}, {"prompt_tokens": 300}, {"colour": 1}]
)
def test_settings_that_cannot_be(changes) -> None:
    with pytest.raises(HyperlensError) as caught:
        protocol_for("paper", **changes)
    assert next(iter(changes)) in str(caught.value)


@pytest.mark.parametrize(
    ("words_", "said"),
    [
        (["--out", "x"], "expected BASE and --texts"),
        (["b", "--texts", "a", "b", "c", "--out", "x"], "NAME SOURCE once for each domain"),
        (["--scale", "smoke", "--only", "Table 99", "--out", "x"], "only must be one of"),
        (["--scale", "smoke", "--only", "Figure 1", "--out", "x"], "nothing is measured"),
        (["--scale", "smoke", "--trained", "half=x", "--out", "x"], "METHOD=FOLDER"),
        (["--scale", "smoke", "--trained", "full=none", "--out", "x"], "to folders of models"),
        (["--scale", "smoke", "--epochs", "0", "--out", "x"], "epochs must be at least 1"),
        (["--scale", "smoke", "--n-held-out", "99", "--out", "x"], "99 are held out"),
    ],
)
def test_mistakes_are_one_line(words_, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", *words_]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "x").exists()


def test_a_folder_of_something_else_is_left_alone(base, tmp_path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ResultsError, match="not empty and not a reproduction"):
        reproduce(base, TEXTS, out=tmp_path, scale="smoke", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(LoadingError, match="a folder or hub id as base"):
        reproduce(make_tiny("llama"), TEXTS, out=tmp_path / "new", scale="smoke", progress=False)
    with pytest.raises(CorpusError, match="at least one"):
        reproduce(base, {}, out=tmp_path / "new", scale="smoke", progress=False)


# The plan


def test_a_plan_needs_a_configuration_only(base, tmp_path) -> None:
    config = json.loads((Path(base) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    protocol = protocol_for("smoke")
    found = plan(str(tmp_path), TEXTS["FS"], protocol=protocol, device="cpu")
    weights = sum(p.numel() for p in make_tiny("llama").parameters())
    assert found.model.endswith(f"({weights / 1e6:,.1f}M parameters, 3 blocks)")
    stages = {stage.name: stage for stage in found.stages}
    assert list(stages)[:3] == ["training full", "training lora", "training late_lora"]
    tokens = protocol.epochs * protocol.n_train * protocol.sequence_length
    assert stages["training full"].tokens == tokens
    # Weights, gradients and both moments of Adam, in float32.
    assert stages["training full"].memory == 16 * weights
    assert stages["training late_lora"].flops < stages["training lora"].flops
    assert found.seconds == sum(stage.seconds for stage in found.stages) > 0
    assert "all" in str(found)


def test_a_plan_follows_the_protocol(base) -> None:
    def tokens(**options):
        found = plan(base, TEXTS, device="cpu", **options)
        return {stage.name: stage.tokens for stage in found.stages}

    once = tokens(protocol=protocol_for("smoke"))
    twice = tokens(protocol=protocol_for("smoke", epochs=4))
    assert twice["training full"] == 2 * once["training full"]
    only = tokens(protocol=protocol_for("smoke"), only=["Figure 4"])
    assert list(only) == ["training full", "provenance"]
    given = tokens(protocol=protocol_for("smoke"), only=["Figure 4"], trained={"full": base})
    assert list(given) == ["provenance"]


def test_a_plan_of_no_model_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(LoadingError) as caught:
            plan(str(folder), TEXTS, device="cpu")
        assert len(str(caught.value).splitlines()) == 1


def test_what_does_not_fit_the_model_is_said_before_training(base, tmp_path) -> None:
    said = []
    with pytest.raises(CorpusError, match="64 positions, and the protocol needs 288"):
        reproduce(base, TEXTS, out=tmp_path / "r", protocol=protocol_for("smoke", prompt_tokens=32,
                  max_length=64, max_new_tokens=256), progress=False, say=said.append)  # fmt: skip
    assert said == []
    assert not (tmp_path / "r").exists()


def test_the_same_option_has_the_same_default_in_every_command() -> None:
    defaults: dict = {}
    for question in QUESTIONS:
        module = import_module(f"hyperlens.{question.module}")
        for one in inspect.signature(getattr(module, question.function)).parameters.values():
            if one.name in ("n_prompts", "prompt_tokens", "max_new_tokens", "max_length", "seed"):
                defaults.setdefault(one.name, {}).setdefault(one.default, set()).add(question.name)
    # Patching runs every text once for each block: shorter ones. MAUVE's is its authors'.
    assert defaults.pop("max_length").keys() == {256, 128, 1024}
    assert {name: list(values) for name, values in defaults.items()} == {
        "n_prompts": [32],
        "prompt_tokens": [17],
        "max_new_tokens": [96],
        "seed": [0],
    }
