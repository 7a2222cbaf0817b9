"""Every row says what the single experiments say, and an interrupted table is gone on with."""

import json
import math
import sys
from pathlib import Path

import matplotlib.figure
import pytest
from conftest import ARCHITECTURES, make_tiny, perturbed, token_texts
from test_mauve import Stub, real

from hyperlens import (
    CrossDomainResult,
    cli,
    compare_models,
    cross_domain,
    measure_behaviour,
)
from hyperlens.decoding.generate import GenerationRunner
from hyperlens.embedded import embedded_base, embedded_tales
from hyperlens.errors import CorpusError, HyperlensError, LoadingError, PairError
from hyperlens.experiments import cross_domain as module
from hyperlens.experiments.cross_domain_finding import READ
from hyperlens.hooks.loading import load_hooked
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
def finding() -> CrossDomainResult:
    return cross_domain(pairs_of("llama", "gpt2"), CORPORA, **SMALL)


def as_written(finding: CrossDomainResult) -> str:
    """Compared as text: NaN is not equal to itself."""
    return json.dumps([dict(row) for row in finding.table])


def test_there_is_a_row_for_every_pair_and_corpus(finding) -> None:
    assert [(row["pair"], row["corpus"]) for row in finding.table] == [
        *(("llama", "a"), ("llama", "b"), ("gpt2", "a"), ("gpt2", "b")),
    ]
    assert finding.pairs == ["llama", "gpt2"]
    assert finding.corpora == ["a", "b"]


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_row_says_what_the_single_experiments_say(name: str, corpus: str) -> None:
    base, tuned = pairs_of(name)[name]
    # All texts are continued: a draw depends on where texts are cut.
    options = SMALL | {"n_prompts": 20}
    row = cross_domain({name: (base, tuned)}, CORPORA, **options).row(name, corpus)
    written = measure_behaviour(base, tuned, CORPORA[corpus], strategies=("greedy",), **options)
    for metric in ("ttr", "rep_2", "rep_3"):
        for side in ("base", "tuned", "difference"):
            same = written.value("greedy", side, metric)
            assert row[f"{metric}_{side}"] == pytest.approx(same["value"])
        assert row[f"{metric}_low"] == pytest.approx(same["low"])
        assert row[f"{metric}_high"] == pytest.approx(same["high"])
    assert row["n"] == same["n"] == len(CORPORA[corpus])
    inside = compare_models(base, tuned, CORPORA[corpus], progress=False)
    assert row["n_texts"] == len(CORPORA[corpus])
    for column, (metric, view) in READ.items():
        (same,) = (
            r for r in inside.rows if (r.metric, r.view, r.layer) == (metric, view, 3)
            and r.probe in ("rank_reordering", "participation_ratio")
        )  # fmt: skip
        for end, expected in (("", same.value), ("_low", same.low), ("_high", same.high)):
            assert row[f"{column}{end}"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_against_itself_has_not_changed(name: str) -> None:
    base = make_tiny(name)
    found = cross_domain({"same": (base, base)}, CORPORA, **SMALL)
    for row in found.table:
        assert row["ttr_base"] == row["ttr_tuned"]
        assert (row["ttr_difference"], row["ttr_low"], row["ttr_high"]) == (0, 0, 0)
        assert math.isnan(row["ttr_p"])
        assert (row["top1_agreement"], row["spearman"]) == (1, 1)
        assert (row["delta_raw"], row["delta_final_norm"]) == (0, 0)
        assert math.isnan(row["mauve_base"])
    assert "more diverse in 0 of 2 rows and less in 0" in " ".join(found.summary().split())


def test_p_values_are_corrected_over_the_whole_table(finding) -> None:
    raw, corrected = [], []
    for name, (base, tuned) in pairs_of("llama", "gpt2").items():
        for corpus, texts in CORPORA.items():
            alone = cross_domain({"x": (base, tuned)}, {"y": texts}, **SMALL).table[0]
            # Of a table of one row: three tests, the smallest p times three is its own.
            smallest = min(("ttr_p", "rep_2_p", "rep_3_p"), key=lambda key: alone[key])
            raw.append(alone[smallest] / 3)
            corrected.append(finding.row(name, corpus)[smallest])
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
    cross_domain(pairs, CORPORA, **SMALL)
    assert len(opened) == 2


BASE = make_tiny("llama")


@pytest.mark.parametrize(
    ("pairs", "corpora", "options", "kind", "says"),
    [
        ({}, CORPORA, {}, PairError, "one at least"),
        ({"x": (BASE,)}, CORPORA, {}, PairError, "pair 'x' must be"),
        ({"x": (BASE, "./no/such")}, CORPORA, {}, LoadingError, "pair 'x': model folder"),
        ({"x": (BASE, 7)}, CORPORA, {}, LoadingError, "pair 'x': expected a hub id"),
        ({"x": (BASE, BASE)}, {}, {}, CorpusError, "one at least"),
        ({"x": (BASE, BASE)}, {"y": "no.txt"}, {}, CorpusError, "corpus 'y': no text file"),
        ({"x": (BASE, BASE)}, CORPORA, {"n_prompts": 0}, CorpusError, "n_prompts"),
        ({"x": (BASE, BASE)}, CORPORA, {"seed": -1}, CorpusError, "seed must be"),
        ({"x": (BASE, BASE)}, CORPORA, {"max_length": 4}, CorpusError, "raise max_length to 5"),
    ],
)
def test_what_can_be_told_early_is(monkeypatch, pairs, corpora, options, kind, says) -> None:
    monkeypatch.setattr(module, "open_pair", lambda *a, **k: pytest.fail("a model was opened"))
    with pytest.raises(kind, match=says) as caught:
        cross_domain(pairs, corpora, **(SMALL | options))
    assert "\n" not in str(caught.value)


def test_errors_name_the_pair_and_the_corpus(monkeypatch) -> None:
    with pytest.raises(LoadingError, match="pair 'x': base is a hooked model"):
        cross_domain({"x": (load_hooked(BASE, backend="residual"), BASE)}, CORPORA, **SMALL)
    short = {"fine": CORPORA["a"], "short": [[1, 5, 6]]}
    # Said before the first corpus is measured.
    monkeypatch.setattr(module, "measure_row", lambda *a: pytest.fail("a row was measured"))
    with pytest.raises(CorpusError, match="pair 'x' on corpus 'short': 0 of 1 texts"):
        cross_domain({"x": (BASE, BASE)}, short, **SMALL)
    with pytest.raises(CorpusError, match="pair 'x': 5 prompt tokens and 90 new ones"):
        cross_domain({"x": (BASE, BASE)}, CORPORA, **(SMALL | {"max_new_tokens": 90}))


def test_words_figure_and_page(finding, tmp_path: Path) -> None:
    summary = finding.summary()
    assert max(map(len, summary.splitlines())) <= 100
    assert "no independent repetitions" in " ".join(summary.split())
    figure = finding.plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    assert len(figure.axes) == 3
    folder = finding.save(tmp_path / "out")
    again = CrossDomainResult.load(folder)
    assert again.summary() == summary
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Does it hold on other texts?" in page
    assert "2 pairs of models on a, b" in page
    assert "MAUVE, tuned" not in page


def test_names_that_look_like_mathematics_are_names(tmp_path: Path) -> None:
    names = {"$\\foo$": CORPORA["a"]}
    cross_domain({"$\\bar$": (BASE, BASE)}, names, out=tmp_path / "out", **SMALL)
    assert (tmp_path / "out" / "cross_domain.png").stat().st_size > 0


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
    found = cross_domain({"x": (base, base)}, TALES, mauve_features=base, **SMALL)
    assert len(stub.given) == 2 * 2 * 5
    humans, ours, theirs = read[:3]
    assert ours == theirs  # the same model twice
    for text in humans:
        assert any(text in tale for tale in TALES["odd"])
        assert not any(tale.startswith(text) for tale in TALES["odd"])
    for row in found.table:
        assert row["mauve_base"] == pytest.approx(0.7)
        assert (row["mauve_tuned_low"], row["mauve_tuned_high"]) == pytest.approx((0.5, 0.9))
    assert "MAUVE over 6 texts a side: below 1,000" in found.meta["notes"][0]
    assert found.meta["mauve"]["seeds"] == [0, 1, 2, 3, 4]
    assert "0.700 (0.500 to 0.900)" in found.summary()
    assert max(map(len, found.summary().splitlines())) <= 100


@pytest.mark.parametrize("readable", [4, 1, 0])
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
    found = cross_domain({"x": (base, base)}, {"odd": TALES["odd"]}, mauve_features=base, **SMALL)
    (row,) = found.table
    assert row["mauve_base"] == pytest.approx(0.7)
    assert math.isnan(row["mauve_tuned"]) == (readable < 2)
    notes = " ".join(found.meta["notes"])
    assert f"x on odd: MAUVE of tuned: {6 - readable} of 6 texts have no token" in notes
    assert ("MAUVE of tuned is unknown" in notes) == (readable < 2)
    assert ("n/a" in found.summary()) == (readable < 2)


def test_mauve_needs_texts_and_room(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mauve", Stub())
    base = str(embedded_base())
    with pytest.raises(CorpusError, match="raise max_length to 15"):
        cross_domain(
            {"x": (base, base)}, TALES, mauve_features=base, **(SMALL | {"max_length": 14})
        )
    with pytest.raises(CorpusError, match="no tokenizer to write them with"):
        cross_domain({"x": (BASE, BASE)}, CORPORA, mauve_features=base, **SMALL)
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(HyperlensError, match="pip install"):
        cross_domain({"x": (BASE, BASE)}, CORPORA, mauve_features=base, **SMALL)


@real
def test_the_same_model_has_the_same_mauve() -> None:
    base = str(embedded_base())
    found = cross_domain({"x": (base, base)}, TALES, mauve_features=base, **SMALL)
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
    assert found.row("same, all=1", "one")["n"] == 4

    for wrong, code, says in (
        (["--pair", "same, all=1", base, base], cli.FAILED, "is the name of two"),
        (["--texts", "three", "no.txt"], cli.FAILED, "corpus 'three': no text file"),
        (["--pair", "x", base], cli.USAGE, "expected 3 arguments"),
    ):
        assert cli.main([*command, *texts, *short, *wrong]) == code
        assert says in capsys.readouterr().err
