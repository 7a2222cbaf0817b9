"""MAUVE: the vectors are those of the plain model, and the package behind it is optional."""

import html
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, lora, make_tiny

from hyperlens import cli
from hyperlens.embedded import embedded_base, embedded_tales
from hyperlens.errors import CorpusError, LoadingError, ProbeError
from hyperlens.experiments import MauveResult, measure_mauve
from hyperlens.experiments.mauve import few_texts_notes, mauve_scores, open_featurizer
from hyperlens.hooks.loading import load_hooked
from hyperlens.render.blocks import Chart, flat
from hyperlens.render.page import write_report

real = pytest.mark.skipif(
    importlib.util.find_spec("mauve") is None,
    reason="mauve-text is not installed: pip install 'hyperlens[mauve]'",
)
WORDS = ["a", "dog", "hedgehogs", "", "the old mill", "fox", "cab", "o", "moon over the sea"]


class Letters:
    """A tokenizer that spells: ids 3 to 28 for letters, BOS in front of every text."""

    bos_token_id = 1

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + i): 3 + i for i in range(26)}

    def __call__(self, texts, add_special_tokens: bool = True, verbose: bool = True) -> dict:
        several = [texts] if isinstance(texts, str) else texts
        ids = [[3 + (ord(c) - 97) % 26 for c in text] for text in several]
        if add_special_tokens:
            ids = [[1, *row] for row in ids]
        return {"input_ids": ids[0] if isinstance(texts, str) else ids}


def by_hand(model, text: str, limit: int = 1024) -> torch.Tensor:
    """The last hidden state of the last token, one text at a time, without padding."""
    ids = [1, *Letters()(text, add_special_tokens=False)["input_ids"]][:limit]
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    return out.hidden_states[-1][0, -1]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_vectors_are_the_plain_models(name: str, batch_size: int) -> None:
    model = make_tiny(name)
    found = open_featurizer((model, Letters()), batch_size=batch_size).features(WORDS)
    expected = torch.stack([by_hand(model, text) for text in WORDS if text])
    assert torch.allclose(found.vectors, expected, atol=1e-5)
    assert (found.n_empty, found.n_cut) == (1, 0)


def test_an_adapter_reads_as_itself_and_long_texts_up_to_the_limit() -> None:
    model = lora(make_tiny("llama"), "llama")
    found = open_featurizer((model, Letters()), max_length=4).features(WORDS)
    expected = torch.stack([by_hand(model, text, 4) for text in WORDS if text])
    assert torch.allclose(found.vectors, expected, atol=1e-5)
    assert found.n_cut == sum(len(text) + 1 > 4 for text in WORDS)
    # The model's own context bounds it, too.
    assert open_featurizer((model, Letters())).max_length == 64


def test_a_hooked_model_reads_as_well() -> None:
    model = make_tiny("llama")
    hooked = load_hooked(model, backend="bridge")
    found = open_featurizer((hooked, Letters())).features(WORDS).vectors
    plain = open_featurizer((model, Letters())).features(WORDS).vectors
    assert torch.allclose(found, plain, atol=1e-4)


class Stub(ModuleType):
    """Stands for the package: remembers what it was given, and answers by the seed."""

    def __init__(self) -> None:
        super().__init__("mauve")
        self.given: list[dict] = []

    def compute_mauve(self, **given) -> SimpleNamespace:
        self.given.append(given)
        value = 0.5 + 0.1 * given["seed"]
        return SimpleNamespace(
            mauve=value,
            mauve_star=value / 2,
            divergence_curve=np.array([[0.0, 1.0], [0.9, 0.9], [1.0, 0.0]]),
            num_buckets=2,
        )


@pytest.fixture
def stub(monkeypatch) -> Stub:
    module = Stub()
    monkeypatch.setitem(sys.modules, "mauve", module)
    return module


def test_the_package_gets_our_vectors_and_every_seed(stub: Stub) -> None:
    model = make_tiny("llama")
    reader = (model, Letters())
    result = measure_mauve(WORDS, WORDS[:5], reader, seeds=(3, 1), progress=False)
    assert [given["seed"] for given in stub.given] == [3, 1]
    for given in stub.given:
        assert set(given) == {"p_features", "q_features", "seed"}
        expected = np.stack([by_hand(model, text).numpy() for text in WORDS if text])
        np.testing.assert_allclose(given["p_features"], expected, atol=1e-5)
        np.testing.assert_allclose(given["q_features"], expected[:4], atol=1e-5)
    assert [row["value"] for row in result.table] == pytest.approx([0.8, 0.6])
    assert result.mean == pytest.approx(0.7)
    assert result.spread == pytest.approx((0.6, 0.8))
    assert result.meta["options"]["seeds"] == [3, 1]
    assert result.meta["p"]["n"] == 8
    assert result.meta["p"]["n_empty"] == 1
    assert result.meta["p"]["texts_sha256"] != result.meta["q"]["texts_sha256"]
    assert "1 of 9 texts without a token" in result.summary()


def test_few_texts_are_said_and_enough_are_not(stub: Stub) -> None:
    reader = (make_tiny("llama"), Letters())
    many = [f"{'abcdefghij'[i % 10]}{'klm' * (i % 3)}" for i in range(1000)]
    enough = measure_mauve(many, many, reader, seeds=[0], progress=False)
    assert enough.meta["notes"] == []
    few = measure_mauve(many, many[1:], reader, seeds=[0], progress=False)
    assert "below 1,000 it is too high" in few.meta["notes"][0]
    assert "note: MAUVE over 999 to 1,000 texts" in few.summary()
    assert few_texts_notes(1000, 1000) == []


def test_it_is_saved_shown_and_read_back(stub: Stub, tmp_path: Path) -> None:
    result = measure_mauve(WORDS, WORDS[::-1], (make_tiny("gpt2"), Letters()), progress=False)
    folder = result.save(tmp_path / "out")
    assert MauveResult.load(folder) == result
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "How close are two sets of texts?" in page
    assert "below 1,000 it is too high" in page
    summary, notebook = result.summary(), html.unescape(result._repr_html_())
    assert max(map(len, summary.splitlines())) <= 100
    for words in ("0.700", "0.500 to 0.900", "5 clusterings"):
        assert words in summary
        assert words in page
        assert words in notebook


def test_the_curves_are_those_of_the_package(stub: Stub, tmp_path: Path) -> None:
    reader = (make_tiny("gpt2"), Letters())
    results = [
        measure_mauve(WORDS, WORDS[:n], reader, seeds=(0, 2), progress=False) for n in (9, 5)
    ]
    (chart,) = (block for block in flat(results[0].blocks()) if isinstance(block, Chart))
    assert (chart.x.scale, chart.y.scale) == ("share", "share")
    points = [(row["q_in_p"], row["p_in_q"]) for row in chart.rows]
    assert points == [(0.0, 1.0), (0.9, 0.9), (1.0, 0.0)] * 2
    assert chart.series == ["seed 0", "seed 2"]
    assert results[0].plot().to_dict()
    # Several results on one page keep their curves apart.
    page = write_report(tmp_path / "page.html", results).read_text(encoding="utf-8")
    assert "P and Q (2)" in page


@pytest.mark.parametrize("module", [None, ModuleType("mauve")])
def test_without_the_package_one_line_says_what_to_install(module, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "mauve", module)
    with pytest.raises(ProbeError, match=r"pip install 'hyperlens\[mauve\]'") as caught:
        measure_mauve(WORDS, WORDS, (make_tiny("llama"), Letters()), progress=False)
    assert "\n" not in str(caught.value)
    # Before texts and model are even looked for.
    assert cli.main(["mauve", "no.txt", "nor-this.txt", "--features", "none"]) == cli.FAILED
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install 'hyperlens[mauve]'" in said


@pytest.mark.parametrize(
    ("p", "options", "kind", "says"),
    [
        ([], {}, CorpusError, "no texts"),
        (["", ""], {}, CorpusError, "none of the 2 texts has a token"),
        (["a"], {}, CorpusError, "two texts in each set"),
        (["dog", "dog"], {}, CorpusError, "all 4 texts have the same features"),
        (WORDS, {"seeds": ()}, ProbeError, "seeds"),
        (WORDS, {"seeds": (1, 1)}, ProbeError, "seeds"),
        (WORDS, {"seeds": (-1,)}, ProbeError, "seeds"),
        (WORDS, {"max_length": 1}, CorpusError, "max_length"),
        (WORDS, {"batch_size": 0}, CorpusError, "batch_size"),
    ],
)
def test_refusals_say_what_to_do(stub: Stub, p, options, kind, says: str) -> None:
    reader = (make_tiny("llama"), Letters())
    q = ["dog", "dog"] if p == ["dog", "dog"] else WORDS
    with pytest.raises(kind, match=says) as caught:
        measure_mauve(p, q, reader, progress=False, **options)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_tokenizer_or_a_head_is_refused(stub: Stub, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    with pytest.raises(CorpusError, match="no tokenizer"):
        measure_mauve(WORDS, WORDS, make_tiny("llama"), progress=False)
    encoder = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(LoadingError, match="no causal language model"):
        measure_mauve(WORDS, WORDS, (encoder, Letters()), progress=False)
    with pytest.raises(LoadingError, match="does not exist"):
        measure_mauve(WORDS, WORDS, tmp_path / "none", progress=False)


def test_the_command(stub: Stub, tmp_path: Path, capsys) -> None:
    files = [tmp_path / "human.txt", tmp_path / "written.txt"]
    for file, texts in zip(files, (embedded_tales()[:4], embedded_tales()[4:7]), strict=True):
        file.write_text("\n\n".join(" ".join(text.split()[:20]) for text in texts), "utf-8")
    command = ["mauve", *map(str, files), "--features", str(embedded_base()), "--seeds", "0,2"]
    assert cli.main([*command, "--out", str(tmp_path / "out"), "-q"]) == cli.OK
    printed = capsys.readouterr().out
    found = MauveResult.load(tmp_path / "out")
    assert printed.startswith(found.summary())
    assert "human.txt and written.txt" in printed
    assert found.mean == pytest.approx(0.6)
    assert cli.main([*command, "--seeds", "many"]) == cli.USAGE
    assert "numbers with commas" in capsys.readouterr().err


# --- with the package itself


@real
def test_equal_sets_read_one_and_disjoint_ones_next_to_nothing(capfd) -> None:
    tales = [tale[:400] for tale in embedded_tales()]
    same = measure_mauve(tales, tales[::-1], embedded_base(), progress=False)
    assert [row["value"] for row in same.table] == pytest.approx([1.0] * 5)
    code = [f"def f{i}(x): return x[{i}] + {i * i}" for i in range(66)]
    other = measure_mauve(tales, code, embedded_base(), progress=False)
    assert other.mean < 0.05
    halves = measure_mauve(tales[::2], tales[1::2], embedded_base(), progress=False)
    assert other.mean < 0.5 < halves.mean
    # The package's own remarks on few texts are not passed on; ours is in the notes.
    assert "WARNING" not in "".join(capfd.readouterr())
    assert "below 1,000" in same.summary()


@real
def test_the_batch_size_does_not_show() -> None:
    # Of several lengths.
    tales = [tale[: 200 + 10 * i] for i, tale in enumerate(embedded_tales())]
    values = [
        measure_mauve(tales[:30], tales[30:], embedded_base(), batch_size=size, progress=False).mean
        for size in (7, 64)
    ]
    assert values == pytest.approx([values[0]] * 2, abs=1e-6)


@real
def test_vectors_are_those_the_package_takes_itself() -> None:
    from mauve.utils import featurize_tokens_from_model

    model = make_tiny("gpt2", n_positions=64)
    ids = [[1, *Letters()(text, add_special_tokens=False)["input_ids"]] for text in WORDS if text]
    theirs = featurize_tokens_from_model(
        model.transformer, [torch.tensor([one]) for one in ids], batch_size=3
    )
    ours = open_featurizer((model, Letters())).features(WORDS).vectors
    assert torch.allclose(ours, theirs, atol=1e-5)


@real
def test_moving_apart_lowers_it_and_a_seed_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 300, 8, generator=generator)
    shifted = [mauve_scores(p, q + torch.eye(8)[0] * by, [0, 1]).mean for by in (0.0, 1.0, 4.0)]
    assert shifted[0] > shifted[1] > shifted[2]
    assert mauve_scores(p, q, [5]) == mauve_scores(p, q, [5])
    assert mauve_scores(p, q, [5]).n_clusters == 30
