"""Texts, files, checkpoints and saved results as nobody expects them: an answer, or one line."""

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import lora, make_tiny, perturbed
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from surface_for_tests import TRAINING, words_tokenizer

from hyperlens import Comparison, compare_models, load_hooked, open_pair, read_results
from hyperlens.data.texts import read_texts
from hyperlens.errors import CorpusError, HyperlensError, LoadingError
from hyperlens.training import hyperfit, read_history

# The same cases at every run; each test says how many more `make test-long` tries.
FUZZ = {"derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
WORDS = [" ".join(f"w{i * j % 50 + 3}" for i in range(1, 12)) for j in range(1, 6)]
ODD_VALUES = [None, -1, 0, 1.5, "nonsense", "", [], {}, True, 10**6, [None], {"a": 1}, "\ud83d"]
ODD_BYTES = [b"", b"[]", b"null", b"1", b'"a"', b"\xff\xfe", b"{}", b"[" * 100_000, b'{"a":NaN}']


@pytest.fixture(autouse=True)
def _unchecked():
    """Arguments reach our own checks, as they do outside the tests."""
    with conftest.unchecked():
        yield


def answered(call: Callable[[], Any]) -> bool:
    """Whether there was an answer; False after one line of an error, other errors are raised."""
    try:
        call()
    except HyperlensError as error:
        message = str(error)
    else:
        return True
    assert len(message.splitlines()) == 1
    assert len(message) < 900
    return False


# Texts

TEXTS = st.one_of(
    st.text(st.characters(categories=["L", "N", "P", "S", "Z", "C"]), max_size=40),
    st.sampled_from(
        [
            "",
            "\0",
            "\ud83d",
            "👋🏽",
            "w5",
            "a\r\nb\r\n\r\nc",
            "\x85\u2028x",
            "\ufeffbom",
            "<s> w5 w6",
        ]
    ),
    st.lists(st.sampled_from(["w5", "w6", "</s>", "\x1b[31m", "نص"]), max_size=30).map(" ".join),
)


@pytest.fixture(scope="module")
def pair():
    base = make_tiny("llama", num_hidden_layers=2)
    return open_pair((base, words_tokenizer()), (perturbed(base), words_tokenizer()))


def check_texts(pair, texts: list[str]) -> None:
    answered(
        lambda: compare_models(
            pair, texts, probes=["drift"], max_length=16, progress=False
        ).summary()
    )


@settings(**FUZZ, max_examples=12)
@example(["w5 " * 20_000])
@given(st.lists(TEXTS, max_size=4))
def test_texts(pair, texts: list[str]) -> None:
    check_texts(pair, texts)


@pytest.mark.long
@settings(**FUZZ, max_examples=400)
@given(st.lists(TEXTS, max_size=4))
def test_more_texts(pair, texts: list[str]) -> None:
    check_texts(pair, texts)


# Files of texts

ROWS = st.one_of(
    TEXTS,
    st.none(),
    st.integers(),
    st.floats(),
    st.lists(st.none(), max_size=2),
    st.dictionaries(st.sampled_from(["text", "a"]), TEXTS | st.none(), max_size=2),
)
SUFFIXES = [".txt", ".jsonl", ".csv", ".parquet", ".JSONL", ".json", ""]
# What a file is compressed with, and how its name ends; some of them do not fit.
COMPRESSED = [
    (None, ""),
    (None, ""),
    ("gzip", ".gz"),
    ("zstd", ".zst"),
    ("gzip", ""),
    ("zstd", ".gz"),
    (None, ".ZST"),
]


def as_jsonl(rows: list[Any]) -> bytes:
    return "\r\n".join(json.dumps({"text": row}) for row in rows).encode()


def as_text(rows: list[Any]) -> bytes:
    return "\r\n\r\n".join(map(str, rows)).encode("utf-8", "surrogatepass")


def as_csv(rows: list[Any]) -> bytes:
    return pd.DataFrame({"text": [str(row) for row in rows]}).to_csv().encode("utf-8", "replace")


def as_parquet(rows: list[Any]) -> bytes:
    """What pyarrow cannot hold in one column is left out."""
    kind = type(rows[0]) if rows else str
    rows = [row for row in rows if row is None or type(row) is kind]
    try:
        return pd.DataFrame({"text": rows, "also": rows}).to_parquet()
    except (ValueError, OverflowError):  # half a character, a number of more than 64 bits
        return b"PAR1"


CONTENTS = st.one_of(
    st.binary(max_size=200),
    st.sampled_from(ODD_BYTES),
    st.tuples(
        st.sampled_from([as_jsonl, as_text, as_csv, as_parquet]), st.lists(ROWS, max_size=4)
    ).map(lambda made: made[0](made[1])),
)


def compressed(content: bytes, how: str | None) -> bytes:
    if how is None:
        return content
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, how) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def check_file(
    folder: Path, content: bytes, suffix: str, packing: tuple[str | None, str], cut: float
) -> None:
    how, end = packing
    content = compressed(content, how)
    path = folder / f"texts{suffix}{end}"
    path.write_bytes(content[: round(len(content) * cut)])
    answered(lambda: read_texts(path))
    answered(lambda: read_texts(str(path), column="text", limit=1))


FILES = (
    CONTENTS,
    st.sampled_from(SUFFIXES),
    st.sampled_from(COMPRESSED),
    st.sampled_from([1.0, 1.0, 0.9, 0.5]),
)


@settings(**FUZZ, max_examples=60)
@given(*FILES)
def test_files(tmp_path: Path, content: bytes, suffix: str, packing, cut: float) -> None:
    check_file(tmp_path, content, suffix, packing, cut)


@pytest.mark.long
@settings(**FUZZ, max_examples=3000)
@given(*FILES)
def test_more_files(tmp_path: Path, content: bytes, suffix: str, packing, cut: float) -> None:
    check_file(tmp_path, content, suffix, packing, cut)


@pytest.mark.parametrize(("how", "end"), [("gzip", ".gz"), ("zstd", ".zst")])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_a_compressed_file_cut_anywhere_is_refused(
    tmp_path: Path, suffix: str, how: str, end: str
) -> None:
    """A file of which a part is missing is no shorter list of texts."""
    made = {".txt": as_text, ".jsonl": as_jsonl, ".csv": as_csv}[suffix](WORDS * 20)
    content, path = compressed(made, how), tmp_path / f"texts{suffix}{end}"
    path.write_bytes(content)
    assert read_texts(path, column=None if suffix == ".txt" else "text") == WORDS * 20
    for length in [*range(1, len(content), len(content) // 20), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CorpusError, match="copy or compress it again") as error:
            read_texts(path, column="text")
        assert len(str(error.value).splitlines()) == 1


# Checkpoints and adapters


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A checkpoint in one file ("whole"), one in shards, and an adapter; not to be changed."""
    folder = tmp_path_factory.mktemp("sources")
    base = make_tiny("llama", num_hidden_layers=2)
    base.save_pretrained(folder / "whole")
    words_tokenizer().save_pretrained(folder / "whole")
    base.save_pretrained(folder / "shards", max_shard_size="20KB")
    lora(copy.deepcopy(base), "llama").save_pretrained(folder / "adapter")
    return folder


def opened(source: Path, base: Path | None = None) -> bool:
    if base is not None:
        return answered(lambda: open_pair(base, source))
    return answered(lambda: load_hooked(source, backend="residual"))


@pytest.fixture
def broken(sources: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copied(name: str) -> Path:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return Path(shutil.copytree(sources / name, tmp_path / name))

    return copied


def check_json(folder: Path, file: str, values: list[Any], base: Path | None = None) -> None:
    """Every field of a JSON file, with each of the values in its place."""
    good = json.loads((folder / file).read_text())
    for name in good:
        for value in values:
            (folder / file).write_text(json.dumps({**good, name: value}))
            opened(folder, base)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fields_of_an_adapters_configuration(sources: Path, broken) -> None:
    for value in ([], 1.5):
        folder = broken("adapter")
        config = json.loads((folder / "adapter_config.json").read_text())
        for name in ("peft_type", "base_model_name_or_path", "r", "target_modules"):
            (folder / "adapter_config.json").write_text(json.dumps({**config, name: value}))
            opened(folder, sources / "whole")


@pytest.mark.parametrize("value", [10**30, 10**6])
def test_sizes_beyond_any_models_are_refused_before_building(broken, value: int) -> None:
    """Built, a million blocks would take hours."""
    folder = broken("whole")
    config = json.loads((folder / "config.json").read_text())
    for name in ("num_hidden_layers", "hidden_size", "head_dim", "num_key_value_heads"):
        for changed in ({name: value}, {"text_config": {name: value}}):
            (folder / "config.json").write_text(json.dumps({**config, **changed}))
            with pytest.raises(LoadingError, match=f"says {name} = {value:.3g}".replace("+", ".")):
                load_hooked(folder, backend="residual")


def test_a_context_of_no_tokens_is_not_known(broken) -> None:
    folder = broken("whole")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": -1}))
    assert open_pair(folder, folder).tokenize(WORDS).counts.n_cut == 0


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_field_of_every_configuration(sources: Path, broken) -> None:
    check_json(broken("whole"), "config.json", ODD_VALUES)
    check_json(broken("whole"), "generation_config.json", ODD_VALUES)
    check_json(broken("whole"), "tokenizer_config.json", ODD_VALUES)
    check_json(broken("adapter"), "adapter_config.json", ODD_VALUES, sources / "whole")


def check_damage(sources: Path, broken, name: str, file: str, damage: bytes | float) -> None:
    """One file of a source with other content (bytes), or cut to a share of it."""
    folder = broken(name)
    file = min(folder.glob(file)).name
    content = (folder / file).read_bytes()
    is_cut = isinstance(damage, float)
    (folder / file).write_bytes(content[: int(len(content) * damage)] if is_cut else damage)
    is_answer = opened(folder, sources / "whole" if name == "adapter" else None)
    if file.endswith(".safetensors"):
        assert not is_answer


FILES_OF = {
    "whole": ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"],
    "shards": ["model.safetensors.index.json", "model-00002-of-*.safetensors"],
    "adapter": ["adapter_config.json", "adapter_model.safetensors"],
}
DAMAGES = [(name, file) for name, files in FILES_OF.items() for file in files]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "file"), DAMAGES)
def test_damaged_files(sources: Path, broken, name: str, file: str) -> None:
    for damage in (0.6, b"[" * 100_000):
        check_damage(sources, broken, name, file, damage)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "file"), DAMAGES)
def test_files_damaged_in_more_ways(sources: Path, broken, name: str, file: str) -> None:
    for damage in (*ODD_BYTES, *(i / 20 for i in range(20))):
        check_damage(sources, broken, name, file, damage)


def test_files_that_are_no_files(broken) -> None:
    for file in ("config.json", "model.safetensors"):
        for make in (
            lambda path: path.mkdir(),
            lambda path: path.symlink_to("/nowhere/blob"),
            lambda path: path.symlink_to(path),
        ):
            folder = broken("whole")
            (folder / file).unlink()
            make(folder / file)
            assert not opened(folder)


def test_links_as_in_the_hubs_cache(sources: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(sources / "shards", blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert opened(snapshot)
    min(blobs.glob("*.safetensors")).unlink()
    assert not opened(snapshot)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_a_wrong_dtype(broken, dtype: torch.dtype) -> None:
    file = broken("whole") / "model.safetensors"
    weights = {name: weight.to(dtype) for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    opened(file.parent)


# Saved results


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "saved"
    return compare_models(pair, WORDS, probes=["drift"], progress=False).save(folder)


def check_cut(saved: Path, folder: Path, length: int) -> None:
    """Whoever reads a file of which only this much is there says so."""
    content = (saved / "comparison.json").read_bytes()
    (folder / "comparison.json").write_bytes(content[:length])
    for read in (lambda: Comparison.load(folder), lambda: read_results([folder])):
        assert answered(read) == (length == len(content))


def test_results_cut_anywhere(saved: Path, tmp_path: Path) -> None:
    n = (saved / "comparison.json").stat().st_size
    for length in [*range(0, n, n // 40), n - 2, n - 1, n]:
        check_cut(saved, tmp_path, length)


@pytest.mark.long
def test_results_cut_at_every_byte(saved: Path, tmp_path: Path) -> None:
    for length in range((saved / "comparison.json").stat().st_size):
        check_cut(saved, tmp_path, length)


def begun(out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a run that was interrupted after its first checkpoint."""
    step = torch.optim.AdamW.step

    def interrupted(*args: Any, **options: Any) -> Any:
        if (out.with_name(f"{out.name}.partial") / "checkpoint").exists():
            raise KeyboardInterrupt
        return step(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training(out)
    return out.with_name(f"{out.name}.partial")


def training(out: Path) -> Any:
    return hyperfit(
        (make_tiny("llama", num_hidden_layers=2), words_tokenizer()),
        WORDS * 3,
        recipe="demo",
        out=out,
        checkpoint_minutes=0,
        progress=False,
        **(TRAINING | {"epochs": 3}),
    )


@pytest.mark.long
def test_unfinished_runs_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed, or refused in one line."""
    whole = begun(tmp_path / "run", monkeypatch)
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert len(files) > 5
    for number, (file, share) in enumerate(itertools.product(files, (0.0, 0.5, 0.99))):
        folder = tmp_path / f"{number}.partial"
        shutil.copytree(whole, folder)
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])
        answered(lambda number=number: training(tmp_path / str(number)))


@settings(**FUZZ, max_examples=30)
@given(st.data())
def test_results_with_a_value_of_another_kind(saved: Path, tmp_path: Path, data) -> None:
    """What can be loaded can be shown, or the file is refused."""
    content = json.loads((saved / "comparison.json").read_text())
    part: Any = content
    while isinstance(part, dict | list) and len(part):
        keys = list(part) if isinstance(part, dict) else range(len(part))
        holder, key = part, data.draw(st.sampled_from(keys))
        part = part[key]
        if data.draw(st.integers(0, 3)) == 0:
            break
    holder[key] = data.draw(st.sampled_from(ODD_VALUES))
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    answered(lambda: Comparison.load(tmp_path))


@settings(**FUZZ, max_examples=30)
@example(b"[" * 100_000)
@given(st.binary(max_size=60) | st.sampled_from(ODD_BYTES))
def test_files_in_place_of_results(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "comparison.json").write_bytes(content)
    (tmp_path / "history.csv").write_bytes(content)
    assert not answered(lambda: Comparison.load(tmp_path))
    assert not answered(lambda: read_results([tmp_path]))
    assert not answered(lambda: read_history(tmp_path))
