"""Every row says what the single experiments say, and an interrupted table is gone on with."""

import html
import json
import math
import sys
from pathlib import Path

import pytest
from conftest import ARCHITECTURES, make_tiny, perturbed, short, token_texts
from test_mauve import Stub, real

from hyperlens import cli, compare_models, measure_behaviour, open_pair
from hyperlens.decoding.generate import GenerationRunner
from hyperlens.embedded import embedded_base, embedded_tales
from hyperlens.errors import (
    CorpusError,
    HyperlensError,
    LoadingError,
    PairError,
    ResultsError,
)
from hyperlens.experiments import cross_domain as module
from hyperlens.experiments.cross_domain import (
    DRAWN,
    LAST_LAYER,
    CrossDomainResult,
    compare_domains,
)
from hyperlens.hooks.loading import load_hooked
from hyperlens.render.blocks import Chart, flat
from hyperlens.render.format import DIMENSIONS, PERCENT, SIGNED_FRACTION, interval
from hyperlens.render.page import write_report
from hyperlens.statistics import significance

CORPORA = {
    "a": token_texts(10, shortest=8, longest=20),
    "b": token_texts(9, seed=3, shortest=8, longest=20),
}
SMALL = {"n_prompts": 6, "prompt_tokens": 5, "max_new_tokens": 10, "progress": False}


def pairs_of(*names: str) -> dict:
    bases = {name: make_tiny(name) for name in names}
    return {name: (base, perturbed(base, 0.2)) for name, base in bases.items()}


@pytest.fixture(scope="module")
def result() -> CrossDomainResult:
    return compare_domains(pairs_of("llama", "gpt2"), CORPORA, **SMALL)


def as_written(result: CrossDomainResult) -> str:
    """Compared as text: NaN is not equal to itself."""
    return json.dumps([dict(row) for row in result.table])


def test_there_is_a_row_for_every_pair_and_corpus(result) -> None:
    assert [(row["pair"], row["corpus"]) for row in result.table] == [
        *(("llama", "a"), ("llama", "b"), ("gpt2", "a"), ("gpt2", "b")),
    ]
    assert result.pairs == ["llama", "gpt2"]
    assert result.corpora == ["a", "b"]


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_row_says_what_the_single_experiments_say(name: str, corpus: str) -> None:
    base, tuned = pairs_of(name)[name]
    # All texts are continued: a draw depends on where texts are cut.
    options = SMALL | {"n_prompts": 20}
    row = compare_domains({name: (base, tuned)}, CORPORA, **options).at(pair=name, corpus=corpus)
    written = measure_behaviour(base, tuned, CORPORA[corpus], strategies=("greedy",), **options)
    for metric in ("ttr", "rep_2", "rep_3"):
        for side in ("base", "tuned", "difference"):
            same = written.at(strategy="greedy", model=side, metric=metric)
            assert row[f"{metric}_{side}"] == pytest.approx(same["value"])
        assert row[f"{metric}_low"] == pytest.approx(same["low"])
        assert row[f"{metric}_high"] == pytest.approx(same["high"])
    assert row["n"] == same["n"] == len(CORPORA[corpus])
    inside = compare_models(base, tuned, CORPORA[corpus], progress=False)
    assert row["n_texts"] == len(CORPORA[corpus])
    for column, (metric, view) in LAST_LAYER.items():
        probe = "participation_ratio" if metric == "delta" else "rank_reordering"
        same = inside.at(probe, metric, 3, view)
        for end, expected in (("", same.value), ("_low", same.low), ("_high", same.high)):
            assert row[f"{column}{end}"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_against_itself_has_not_changed(name: str) -> None:
    base = make_tiny(name)
    found = compare_domains({"same": (base, base)}, CORPORA, **SMALL)
    for row in found.table:
        assert row["ttr_base"] == row["ttr_tuned"]
        assert (row["ttr_difference"], row["ttr_low"], row["ttr_high"]) == (0, 0, 0)
        assert math.isnan(row["ttr_p"])
        assert (row["top1_agreement"], row["spearman"]) == (1, 1)
        assert (row["delta_raw"], row["delta_final_norm"]) == (0, 0)
        assert math.isnan(row["mauve_base"])
    assert "more diverse than the base's in 0 of 2 rows and less diverse in 0 (" in " ".join(
        found.summary().split()
    )


def test_p_values_are_corrected_over_the_whole_table(result) -> None:
    raw, corrected = [], []
    for name, (base, tuned) in pairs_of("llama", "gpt2").items():
        for corpus, texts in CORPORA.items():
            alone = compare_domains({"x": (base, tuned)}, {"y": texts}, **SMALL).table[0]
            # Of a table of one row: three tests, the smallest p times three is its own.
            smallest = min(("ttr_p", "rep_2_p", "rep_3_p"), key=lambda key: alone[key])
            raw.append(alone[smallest] / 3)
            corrected.append(result.at(pair=name, corpus=corpus)[smallest])
    best = min(range(4), key=lambda i: raw[i])
    assert corrected[best] == pytest.approx(min(1.0, 12 * raw[best]))
    assert significance.holm([0.01] * 12)[0] == pytest.approx(0.12)


def test_a_pair_is_opened_once_and_a_finished_one_not_at_all(tmp_path, monkeypatch) -> None:
    opened = []
    original = module.open_pair
    monkeypatch.setattr(
        module, "open_pair", lambda *a, **k: opened.append(1) or original(*a, **k)
    )  # fmt: skip
    pairs = pairs_of("llama", "gpt2")
    compare_domains(pairs, CORPORA, **SMALL)
    assert len(opened) == 2


BASE = make_tiny("llama")


@pytest.mark.parametrize(
    ("pairs", "corpora", "options", "kind", "says"),
    [
        ({}, CORPORA, {}, PairError, "at least one"),
        (
            {"x": (BASE,)},
            CORPORA,
            {},
            PairError,
            "pair 'x': expected .base, tuned.",
        ),
        ({"x": (BASE, "./no/such")}, CORPORA, {}, LoadingError, "pair 'x': model folder"),
        ({"x": (BASE, 7)}, CORPORA, {}, LoadingError, "pair 'x': expected a hub id"),
        ({"x": (BASE, BASE)}, {}, {}, CorpusError, "at least one"),
        ({"x": (BASE, BASE)}, {"y": "no.txt"}, {}, CorpusError, "corpus 'y': no text file"),
        ({"x": (BASE, BASE)}, CORPORA, {"n_prompts": 0}, CorpusError, "n_prompts"),
        ({"x": (BASE, BASE)}, CORPORA, {"seed": -1}, CorpusError, "seed must be"),
        ({"x": (BASE, BASE)}, CORPORA, {"max_length": 4}, CorpusError, "raise max_length to 5"),
    ],
)
def test_what_can_be_told_early_is(monkeypatch, pairs, corpora, options, kind, says) -> None:
    monkeypatch.setattr(module, "open_pair", lambda *a, **k: pytest.fail("a model was opened"))
    with pytest.raises(kind, match=says) as caught:
        compare_domains(pairs, corpora, **(SMALL | options))
    assert "\n" not in str(caught.value)


def test_errors_name_the_pair_and_the_corpus(monkeypatch) -> None:
    with pytest.raises(LoadingError, match="pair 'x': base is a hooked model"):
        compare_domains({"x": (load_hooked(BASE, backend="residual"), BASE)}, CORPORA, **SMALL)
    short = {"fine": CORPORA["a"], "short": [[1, 5, 6]]}
    # Said before the first corpus is measured.
    monkeypatch.setattr(module, "measure_row", lambda *a: pytest.fail("a row was measured"))
    with pytest.raises(CorpusError, match="pair 'x' on corpus 'short': 0 of 1 texts"):
        compare_domains({"x": (BASE, BASE)}, short, **SMALL)
    with pytest.raises(CorpusError, match="pair 'x': 5 prompt tokens and 90 new ones"):
        compare_domains({"x": (BASE, BASE)}, CORPORA, **(SMALL | {"max_new_tokens": 90}))


def test_summary_page_and_notebook_show_the_same_numbers(result, tmp_path: Path) -> None:
    summary = result.summary()
    assert max(map(len, summary.splitlines())) <= 100
    folder = result.save(tmp_path / "out")
    again = CrossDomainResult.load(folder)
    assert again.summary() == summary
    pages = [
        summary,
        (folder / "report.html").read_text(encoding="utf-8"),
        write_report(tmp_path / "page.html", [result]).read_text(encoding="utf-8"),
        html.unescape(result._repr_html_()),
    ]
    numbers = [
        interval(module._estimate(row, column), form)
        for row in result.table
        for column, form in (
            ("ttr_difference", SIGNED_FRACTION),
            ("top1_agreement", PERCENT),
            ("delta_raw", DIMENSIONS),
        )
    ]
    for page in pages:
        assert "not independent repetitions" in " ".join(page.split())
        assert "Does it hold on other texts?" in page
        assert "2 pairs of models on a, b" in page
        assert "MAUVE" not in page
        assert all(number in page for number in numbers)


def test_charts_hold_every_row_inside_what_is_possible(result) -> None:
    charts = [block for block in flat(result.blocks()) if isinstance(block, Chart)]
    for (column, _, form, scale), chart in zip(DRAWN, charts, strict=True):
        assert (chart.kind, chart.x.scale) == ("dots", scale)
        assert chart.series == ["llama", "gpt2"]
        assert [row["value"] for row in chart.rows] == [row[column] for row in result.table]
        for row in chart.rows:
            assert form.lowest <= row["low"] <= row["value"] <= row["high"] <= form.highest
    assert [len(row["hconcat"]) for row in result.plot().to_dict()["vconcat"]] == [2, 2]


def test_names_that_look_like_mathematics_are_names(tmp_path: Path) -> None:
    names = {"$\\foo$": CORPORA["a"]}
    found = compare_domains({"$\\bar$": (BASE, BASE)}, names, out=tmp_path / "out", **SMALL)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for text in (found.summary(), page):
        assert "$\\foo$" in text
        assert "$\\bar$" in text


def test_one_prompt_has_no_interval() -> None:
    found = compare_domains(pairs_of("llama"), {"a": CORPORA["a"]}, **(SMALL | {"n_prompts": 1}))
    assert "nan" not in found.summary()
    assert "too few prompts to tell in 1" in found.verdicts()[0].answer
    found.plot().to_dict()


def test_an_open_pair_is_measured_as_it_is(result) -> None:
    pairs = {name: open_pair(*both) for name, both in pairs_of("llama", "gpt2").items()}
    assert as_written(compare_domains(pairs, CORPORA, **SMALL)) == as_written(result)
    with pytest.raises(PairError, match="pair 'llama': dtype is decided when a pair is opened"):
        compare_domains(pairs, CORPORA, dtype="float64", **SMALL)


def test_what_version_0_1_wrote_still_loads(result, tmp_path: Path) -> None:
    result.write(tmp_path)
    path = tmp_path / "cross_domain.json"
    data = json.loads(path.read_text("utf-8"))
    data["format"] = 1
    data["meta"]["data"] = data["meta"].pop("corpus")
    path.write_text(json.dumps(data), "utf-8")
    again = CrossDomainResult.load(tmp_path)
    assert again.summary() == result.summary()
    assert again.meta == result.meta


TALES = {"odd": embedded_tales()[1:12:2], "even": embedded_tales()[:12:2]}


def test_mauve_gets_the_texts_own_continuations(monkeypatch) -> None:
    stub = Stub()
    monkeypatch.setitem(sys.modules, "mauve", stub)
    base = str(embedded_base())
    read: list[list[str]] = []
    original = module.Featurizer.features

    def remember(self, texts, progress=False):
        read.append(list(texts))
        return original(self, texts, progress)

    monkeypatch.setattr(module.Featurizer, "features", remember)
    found = compare_domains({"x": (base, base)}, TALES, mauve_features=base, **SMALL)
    assert len(stub.given) == 2 * 2 * 5
    humans, ours, theirs = read[:3]
    assert ours == theirs  # the same model twice
    for text in humans:
        assert any(text in tale for tale in TALES["odd"])
        assert not any(tale.startswith(text) for tale in TALES["odd"])
    for row in found.table:
        assert row["mauve_base"] == pytest.approx(0.7)
        assert (row["mauve_tuned_low"], row["mauve_tuned_high"]) == pytest.approx((0.5, 0.9))
    assert "MAUVE over 6 texts in each set: below 1,000" in found.meta["notes"][0]
    assert found.meta["mauve"]["seeds"] == [0, 1, 2, 3, 4]
    assert "0.700 (0.500 to 0.900)" in found.summary()
    assert max(map(len, found.summary().splitlines())) <= 100


@pytest.mark.parametrize("readable", short([4, 1, 0], 1))
def test_a_model_that_writes_nothing_to_read_has_no_mauve(readable: int, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mauve", Stub())
    original, calls = GenerationRunner.run, []

    def run(self, *given, **options):
        """Every second model to write, the tuned one, writes special tokens."""
        made = original(self, *given, **options)
        calls.append(1)
        if len(calls) % 2 == 0:
            made.tokens[readable:] = [[0] * 10] * (6 - readable)
        return made

    monkeypatch.setattr(GenerationRunner, "run", run)
    base = str(embedded_base())
    found = compare_domains(
        {"x": (base, base)}, {"odd": TALES["odd"]}, mauve_features=base, **SMALL
    )
    (row,) = found.table
    assert row["mauve_base"] == pytest.approx(0.7)
    assert math.isnan(row["mauve_tuned"]) == (readable < 2)
    notes = " ".join(found.meta["notes"])
    assert f"x on odd: MAUVE of tuned: {6 - readable} of 6 texts without a token" in notes
    assert ("MAUVE of tuned is unknown" in notes) == (readable < 2)
    assert ("n/a" in found.summary()) == (readable < 2)


def test_mauve_needs_texts_and_room(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mauve", Stub())
    base = str(embedded_base())
    with pytest.raises(CorpusError, match="raise max_length to 15"):
        compare_domains(
            {"x": (base, base)}, TALES, mauve_features=base, **(SMALL | {"max_length": 14})
        )
    with pytest.raises(CorpusError, match="no tokenizer to turn tokens into text"):
        compare_domains({"x": (BASE, BASE)}, CORPORA, mauve_features=base, **SMALL)
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(HyperlensError, match="pip install"):
        compare_domains({"x": (BASE, BASE)}, CORPORA, mauve_features=base, **SMALL)


@real
def test_the_same_model_has_the_same_mauve() -> None:
    base = str(embedded_base())
    found = compare_domains({"x": (base, base)}, TALES, mauve_features=base, **SMALL)
    for row in found.table:
        assert 0 < row["mauve_base_low"] <= row["mauve_base"] <= row["mauve_base_high"] <= 1 + 1e-9
        assert row["mauve_base"] == row["mauve_tuned"]


def test_the_command(tmp_path: Path, capsys, monkeypatch) -> None:
    # Names and paths may hold whatever a shell lets through.
    files = [tmp_path / "a=b,c.txt", tmp_path / "C:d e.txt"]
    for file, texts in zip(files, TALES.values(), strict=True):
        file.write_text("\n\n".join(" ".join(text.split()[:40]) for text in texts), "utf-8")
    base = str(embedded_base())
    command = ["cross-domain", "--pair", "same, all=1", base, base]
    texts = ["--texts", "one", str(files[0]), "--texts", "the other", str(files[1])]
    short = ["--prompt-tokens", "5", "--max-new-tokens", "6", "--n-prompts", "4", "-q"]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "measure_row", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
        )  # fmt: skip
        code = cli.main([*command, *texts, *short, "--out", str(out)])
    assert code == cli.INTERRUPTED
    assert "the same command goes on" in capsys.readouterr().err
    assert cli.main([*command, *texts, *short, "--out", str(out)]) == cli.OK
    printed = capsys.readouterr().out
    found = CrossDomainResult.load(out)
    assert printed.startswith(found.summary())
    assert found.pairs == ["same, all=1"]
    assert found.corpora == ["one", "the other"]
    assert found.at(pair="same, all=1", corpus="one")["n"] == 4

    for wrong, code, says in (
        (["--pair", "same, all=1", base, base], cli.FAILED, "is given twice"),
        (["--texts", "three", "no.txt"], cli.FAILED, "corpus 'three': no text file"),
        (["--pair", "x", base], cli.USAGE, "expected 3 arguments"),
    ):
        assert cli.main([*command, *texts, *short, *wrong]) == code
        assert says in capsys.readouterr().err


# --- interrupted, and gone on with


class Interruption(Exception):
    """Stands for a killed process."""


def stop_after(monkeypatch, rows: int) -> list:
    """Let so many rows be measured, then fail; the list grows with each."""
    measured: list = []
    original = module.measure_row

    def measure(*given):
        if len(measured) == rows:
            raise Interruption
        measured.append(1)
        return original(*given)

    monkeypatch.setattr(module, "measure_row", measure)
    return measured


def test_the_same_call_goes_on(tmp_path: Path, monkeypatch, result) -> None:
    result = compare_domains(pairs_of("llama", "gpt2"), CORPORA, **SMALL)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interruption):
            compare_domains(pairs_of("llama", "gpt2"), CORPORA, out=out, **SMALL)
    assert not out.exists()
    assert len(list(partial.iterdir())) == 3
    # What cannot be read is measured again; what is not ours stays.
    next(partial.iterdir()).write_text("{half a li")
    (partial / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        measured = stop_after(patch, 99)
        again = compare_domains(pairs_of("llama", "gpt2"), CORPORA, out=out, **SMALL)
    assert len(measured) == 2
    assert as_written(again) == as_written(result)
    assert CrossDomainResult.load(out).summary() == result.summary()
    assert [file.name for file in partial.iterdir()] == ["notes.txt"]
    with pytest.raises(ResultsError, match="already exists"):
        compare_domains(pairs_of("llama"), CORPORA, out=out, **SMALL)


@pytest.mark.parametrize("change", short(["seed", "tuned", "texts"], "tuned"))
def test_another_call_takes_none_of_the_rows(tmp_path: Path, monkeypatch, change: str) -> None:
    out, pairs = tmp_path / "out", pairs_of("llama")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Interruption):
            compare_domains(pairs, CORPORA, out=out, **SMALL)
    options, corpora = dict(SMALL), dict(CORPORA)
    if change == "seed":
        options["seed"] = 1
    elif change == "tuned":
        pairs = {"llama": (pairs["llama"][0], perturbed(pairs["llama"][0], 0.3))}
    else:
        corpora["a"] = CORPORA["a"][:-1]
    measured = stop_after(monkeypatch, 99)
    found = compare_domains(pairs, corpora, out=out, **options)
    # Corpus "b" had not been reached.
    assert len(measured) == 2
    assert as_written(found) == as_written(compare_domains(pairs, corpora, **options))
