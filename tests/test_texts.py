"""Reading texts: every kind of source, the choice of the column, and one-line errors."""

import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperlens.data.texts import read_texts
from hyperlens.errors import CorpusError

TEXTS = ["Once upon a time.", "There was a king.", "He had three sons: ä, ß, 三."]


def fails(source: object, *expected: str, **options: object) -> None:
    """Reading fails with one line that holds all the expected words."""
    with pytest.raises(CorpusError) as caught:
        read_texts(source, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for words in expected:
        assert words in message


def written(path: Path, content: str | bytes) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return path


# sources in memory


def test_lists_tuples_and_generators_of_strings() -> None:
    assert read_texts(TEXTS) == TEXTS
    assert read_texts(tuple(TEXTS)) == TEXTS
    assert read_texts(text for text in TEXTS) == TEXTS
    assert read_texts(np.array(TEXTS)) == TEXTS
    assert read_texts(pd.Series(TEXTS)) == TEXTS


def test_a_limit_reads_no_further() -> None:
    def endless():
        while True:
            yield "again"

    assert read_texts(endless(), limit=3) == ["again"] * 3
    assert read_texts(TEXTS, limit=1) == TEXTS[:1]
    assert read_texts(TEXTS, limit=10) == TEXTS


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    fails(TEXTS, "limit must be at least 1", limit=limit)


def test_what_is_no_text_is_refused() -> None:
    fails([], "no texts in list", "at least one")
    fails([*TEXTS, 3], "text 3 is a int", "expected strings")
    fails([None], "text 0 is a NoneType")
    fails(3, "expected a list of strings", "int")
    fails(None, "NoneType")
    # A mapping would be read as its keys, bytes as numbers, a set in another order every time.
    fails({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, "dict")
    fails(b"bytes", "bytes")
    fails({"a", "b"}, "set")


def test_data_frames_are_read_by_column() -> None:
    frame = pd.DataFrame({"id": [1, 2, 3], "text": TEXTS, "title": ["a", "b", "c"]})
    assert read_texts(frame) == TEXTS
    assert read_texts(frame, column="title") == ["a", "b", "c"]
    fails(frame, "no text in column 'id'", "text, title", column="id")


# .txt


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_txt_is_split_at_blank_lines(tmp_path: Path, newline: str, mark: str) -> None:
    lines = ["", "one", "still one  ", "", " \t", "", "two", "", "three", ""]
    path = written(tmp_path / "t.txt", (mark + newline.join(lines)).encode())
    assert read_texts(path) == ["one\nstill one", "two", "three"]
    assert read_texts(str(path), limit=2) == ["one\nstill one", "two"]


def test_txt_without_blank_lines_has_a_text_per_line(tmp_path: Path) -> None:
    assert read_texts(written(tmp_path / "t.TXT", "one\ntwo\n")) == ["one", "two"]
    assert read_texts(written(tmp_path / "u.txt", "alone")) == ["alone"]


@settings(deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1),
        min_size=2,
    )
)
def test_paragraphs_come_back_as_they_were(paragraphs: list[str]) -> None:
    from hyperlens.data.texts import _paragraphs

    assert _paragraphs("\n\n".join(paragraphs)) == paragraphs
    assert _paragraphs("\r\n\r\n\r\n".join(paragraphs)) == paragraphs


def test_txt_errors(tmp_path: Path) -> None:
    fails(written(tmp_path / "empty.txt", " \n\n "), "no texts", "empty.txt")
    fails(written(tmp_path / "latin.txt", "für".encode("latin-1")), "not UTF-8", "byte 1")


# .jsonl


def test_jsonl_of_objects_and_of_strings(tmp_path: Path) -> None:
    objects = "\n\n".join(json.dumps({"n": i, "text": text}) for i, text in enumerate(TEXTS))
    assert read_texts(written(tmp_path / "o.jsonl", "\ufeff" + objects)) == TEXTS
    strings = "\n".join(json.dumps(text, ensure_ascii=False) for text in TEXTS)
    assert read_texts(written(tmp_path / "s.jsonl", strings)) == TEXTS


def test_jsonl_stops_at_the_limit(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", '"one"\n"two"\nbroken\n')
    assert read_texts(path, limit=2) == ["one", "two"]
    fails(path, "line 3 is not JSON")


def test_jsonl_errors(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    fails(written(path, ""), "no texts")
    fails(written(path, "[1]\n"), "line 1: expected an object or a string")
    fails(written(path, '{"text": "a"}\n\n{"text": 2}\n'), "line 3", "'text'", "int")
    fails(written(path, '{"text": "a"}\n{"other": "b"}\n'), "line 2", "'text'")
    fails(written(path, '{"a": "1", "b": "2"}\n'), "a, b", "column=", "--text-column")
    fails(written(path, '{"a": 1}\n'), "none")
    fails(written(path, b'"ok"\n"\xff"\n'), "not UTF-8")
    fails(written(path, '"ok"\n' + "[" * 100_000), "line 2 is not JSON")


# .csv and .parquet


def table(path: Path, **columns: list) -> Path:
    frame = pd.DataFrame(columns)
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_are_read_by_column(tmp_path: Path, kind: str) -> None:
    path = table(tmp_path / f"t.{kind}", text=TEXTS, title=["NA", "null", "7"])
    assert read_texts(path) == TEXTS
    # Words that look like missing values, and numbers, stay the strings they are.
    assert read_texts(path, column="title") == ["NA", "null", "7"]
    assert read_texts(path, column="title", limit=2) == ["NA", "null"]
    fails(path, "no text in column 'body'", "text, title", column="body")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_only_column_of_strings_needs_no_name(tmp_path: Path, kind: str) -> None:
    assert read_texts(table(tmp_path / f"t.{kind}", story=TEXTS)) == TEXTS
    both = table(tmp_path / f"u.{kind}", story=TEXTS, title=["a", "b", "c"])
    fails(both, "no column 'text'", "story, title", "--text-column")


def test_numbers_are_no_texts(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", n=[1, 2, 3], story=TEXTS)
    assert read_texts(path) == TEXTS
    fails(path, "no text in column 'n'", column="n")


def test_a_missing_text_names_its_row(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", text=["one", None, "three"])
    assert read_texts(path, limit=1) == ["one"]
    fails(path, "row 2", "'text'")
    # A short row of a .csv is an empty text, which the corpus counts.
    assert read_texts(written(tmp_path / "t.csv", "n,text\n1,one\n2\n")) == ["one", ""]


def test_a_csv_with_a_mark_and_quoted_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", '\ufefftext,n\n"one, and\n\ntwo",1\n')
    assert read_texts(path) == ["one, and\n\ntwo"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_without_rows_has_no_texts(tmp_path: Path, kind: str) -> None:
    fails(table(tmp_path / f"t.{kind}", text=[]), "no texts")


def test_table_errors(tmp_path: Path) -> None:
    fails(written(tmp_path / "t.csv", ""), "no texts")
    fails(written(tmp_path / "t.csv", 'text\n"open'), "not readable as .csv", "write it again")
    fails(written(tmp_path / "t.csv", "text\nfür".encode("latin-1")), "not UTF-8")
    fails(written(tmp_path / "t.parquet", b"PAR1 garbage"), "not readable as .parquet")


# compressed


@pytest.mark.parametrize(("how", "end"), [("gzip", ".gz"), ("zstd", ".ZST")])
def test_compressed_files_are_read_as_what_is_in_them(tmp_path: Path, how: str, end: str) -> None:
    lines = "".join(json.dumps({"text": text, "of": text[:1]}) + "\n" for text in TEXTS)
    csv = "text,n\n" + "".join(f'"{text}\r\n",1\n' for text in TEXTS)
    for name, content in (
        ("t.txt", "\ufeff" + "\r\n\r\n".join(TEXTS)),
        ("t.jsonl", lines),
        ("t.csv", csv),
    ):
        plain, packed = tmp_path / name, tmp_path / f"{name}{end}"
        plain.write_text(content, newline="")
        with pa.output_stream(packed, compression=how) as stream:
            stream.write(content.encode())
        assert read_texts(packed) == read_texts(plain)
        assert read_texts(packed, limit=1) == read_texts(plain, limit=1)
    assert read_texts(tmp_path / f"t.jsonl{end}", groups="of").groups == tuple(
        text[:1] for text in TEXTS
    )
    fails([f"t.txt{end}"], "list of file names")


def test_what_is_not_compressed_is_no_compressed_file(tmp_path: Path) -> None:
    for end in ("gz", "zst"):
        fails(written(tmp_path / f"t.txt.{end}", "plain"), f"t.txt.{end} is not whole", "again")
        fails(written(tmp_path / f"t.txt.{end}", ""), "no texts")
        fails(written(tmp_path / f"t.{end}", "x"), "ending in .txt", ".gz or .zst after")
        fails(written(tmp_path / f"t.parquet.{end}", "x"), "ending in .txt")


# names that lead nowhere


def test_a_path_must_exist_and_be_of_a_known_kind(tmp_path: Path) -> None:
    fails(tmp_path / "none.txt", "no text file", "give an existing file")
    fails("none.txt", "no text file", "hub dataset name")
    fails(tmp_path, "expected a file ending in .txt, .jsonl, .csv, .parquet")
    fails(written(tmp_path / "t.docx", "x"), "ending in .txt")


def test_a_text_in_place_of_a_list_is_explained() -> None:
    fails("Once upon a time there was a king.", "no text file", "a list of texts")
    fails("A text\nof two lines " * 500, "no text file", "a list of texts")
    fails("null\0byte and blank", "no text file")
    fails("", "cannot read texts from ''")


# datasets


def test_datasets_are_read_by_column() -> None:
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3]})
    assert read_texts(dataset) == TEXTS
    assert read_texts(dataset, limit=2) == TEXTS[:2]
    assert read_texts(dataset.to_iterable_dataset()) == TEXTS
    assert read_texts(dataset.rename_column("text", "story")) == TEXTS
    fails(dataset, "no text in column 'n'", column="n")
    fails(datasets.Dataset.from_dict({"text": []}), "no texts in Dataset")
    fails(datasets.Dataset.from_dict({"text": ["a", None]}), "row 2")


def test_a_dataset_with_splits_asks_for_one() -> None:
    splits = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": TEXTS})})
    fails(splits, "splits test", "dataset['test']")
    assert read_texts(splits["test"]) == TEXTS


def test_a_hub_name_is_loaded_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(name: str, **options: object) -> datasets.Dataset:
        calls.append((name, options))
        return datasets.Dataset.from_dict({"story": TEXTS, "title": ["a", "b", "c"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_texts("owner/fairy-tales", column="story") == TEXTS
    assert read_texts("tales", column="title", split="validation", limit=2) == ["a", "b"]
    assert calls == [
        ("owner/fairy-tales", {"split": "train", "streaming": False}),
        ("tales", {"split": "validation", "streaming": True}),
    ]
    fails("owner/fairy-tales", "no column 'text'", "story, title")


def test_a_hub_name_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: object) -> datasets.Dataset:
        raise FileNotFoundError(f"Couldn't find {name}\non the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    fails("owner/none", "no text file 'owner/none' here", "Couldn't find owner/none", "'train'")


def test_a_hub_dataset_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows():
        yield {"text": "one"}
        raise ConnectionError("gone")

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows)
    )
    assert read_texts("owner/tales", limit=1) == ["one"]
    fails("owner/tales", "gone", limit=2)


# file names in place of texts


def test_a_list_of_file_names_is_not_measured_as_texts(tmp_path: Path) -> None:
    existing = [str(written(tmp_path / name, "one\n\ntwo")) for name in ("a", "b.md")]
    for names in (["a.txt", "b.TXT"], ["some/where.jsonl"], ("c.parquet",), existing):
        fails(names, "list of file names", repr(names[0]), "pass one path", "read_texts")
    for texts in (["a.txt", "A tale."], ["It is in a.txt", "see also b.txt"], [*existing, "more"]):
        assert read_texts(texts) == texts
    assert read_texts([" "]) == [" "]


def test_folders_and_json_files_are_told_apart(tmp_path: Path) -> None:
    fails(tmp_path, "a folder", "load_from_disk", "expected a file ending in .txt")
    fails(str(tmp_path), "a folder", ".parquet")
    fails(written(tmp_path / "t.json", "[]"), "single JSON value", "expected a file ending in .txt")
