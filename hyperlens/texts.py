"""Read texts from what people have: lists, files, datasets, hub dataset names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import CorpusError
from .hub import HUB_ID

READERS = (".txt", ".jsonl", ".csv", ".parquet")
COLUMN = "text"


def read_texts(
    source: Any,
    *,
    column: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> list[str]:
    """Texts from a list, a file, a `datasets.Dataset` or the name of a hub dataset.

    A `.txt` file is split at blank lines, one text per paragraph; one without blank lines has a
    text per line. `.jsonl`, `.csv`, `.parquet` and datasets need a text column: `column`, else
    "text", else the only column that holds strings.

    Args:
        source: list of strings, path, dataset, or hub name ("owner/name").
        column: which column holds the texts.
        split: which split of a hub dataset.
        limit: keep only the first so many texts.

    Raises:
        CorpusError: if there is no such source, or no text in it.
    """
    if limit is not None and limit < 1:
        raise CorpusError(f"limit must be at least 1 text, got {limit}")
    texts = list(islice(_texts(source, column, split), limit))
    if not texts:
        raise CorpusError(f"no texts in {_describe(source)}: expected at least one")
    return texts


def _texts(source: Any, column: str | None, split: str) -> Iterator[str]:
    if isinstance(source, str | Path):
        return _named(source, column, split)
    if hasattr(source, "column_names"):
        return _dataset(source, column)
    if isinstance(source, Iterable):
        return _strings(source)
    raise CorpusError(
        f"expected a list of strings, a path, a dataset or a hub name; got {type(source).__name__}"
    )


def _strings(source: Iterable[Any]) -> Iterator[str]:
    for i, text in enumerate(source):
        if not isinstance(text, str):
            raise CorpusError(f"text {i} is a {type(text).__name__}: expected strings")
        yield text


def _named(source: str | Path, column: str | None, split: str) -> Iterator[str]:
    path = Path(source).expanduser()
    is_file = _exists(path)
    if is_file and path.suffix in READERS:
        return _file(path, column)
    if is_file:
        raise CorpusError(
            f"cannot read texts from {path}: expected a file ending in {', '.join(READERS)}"
        )
    if isinstance(source, Path) or path.suffix in READERS or not HUB_ID.fullmatch(source):
        shown = f"{str(source)[:60]!r}"
        raise CorpusError(
            f"no text file {shown}: give an existing file, a hub dataset name, or a list of texts"
        )
    return _hub(source, column, split)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a long text passed by mistake is no valid file name
        return False


def _file(path: Path, column: str | None) -> Iterator[str]:
    try:
        if path.suffix == ".txt":
            return iter(_paragraphs(path.read_text(encoding="utf-8")))
        if path.suffix == ".jsonl":
            return iter(_jsonl(path, column))
        return iter(_table(path, column))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text (byte {error.start}): convert it") from None
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror or error}") from None


def _paragraphs(text: str) -> list[str]:
    blocks = [
        block.strip() for block in "\n".join(map(str.rstrip, text.splitlines())).split("\n\n")
    ]
    texts = [block for block in blocks if block]
    return texts if len(texts) > 1 else [line for line in text.splitlines() if line.strip()]


def _jsonl(path: Path, column: str | None) -> list[str]:
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                raise CorpusError(f"{path}, line {number} is not JSON") from None
            records.append({COLUMN: record} if isinstance(record, str) else record)
            if not isinstance(records[-1], dict):
                raise CorpusError(f"{path}, line {number}: expected an object or a string")
    if not records:
        return []
    chosen = _choose_column({k for k, v in records[0].items() if isinstance(v, str)}, column, path)
    missing = next(
        (i for i, r in enumerate(records, 1) if not isinstance(r.get(chosen), str)), None
    )
    if missing is not None:
        raise CorpusError(f"{path}, record {missing} has no string in {chosen!r}")
    return [record[chosen] for record in records]


def _table(path: Path, column: str | None) -> list[str]:
    import pandas as pd

    try:
        if path.suffix == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        else:
            table = pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise CorpusError(f"{path} is not readable: {str(error).splitlines()[0]}") from None
    strings = {
        str(name)
        for name in table.columns
        if len(table) and table[name].map(lambda v: isinstance(v, str)).all()
    }
    if not len(table):
        return []
    return list(table[_choose_column(strings, column, path)])


def _choose_column(strings: set[str], column: str | None, where: Any) -> str:
    if column is not None:
        if column not in strings:
            raise CorpusError(
                f"{where} has no text column {column!r}; it has {', '.join(sorted(strings)) or 'none'}"
            )
        return column
    if COLUMN in strings:
        return COLUMN
    if len(strings) == 1:
        return next(iter(strings))
    raise CorpusError(
        f"{where} has no column {COLUMN!r}: name one of {', '.join(sorted(strings)) or 'none'} "
        "(column=…, --text-column)"
    )


def _dataset(dataset: Any, column: str | None) -> Iterator[str]:
    if isinstance(dataset.column_names, dict):
        raise CorpusError(
            f"this dataset has splits {', '.join(dataset.column_names)}: pass one, as dataset['train']"
        )
    first = next(iter(dataset), None)
    if first is None:
        return
    strings = {name for name, value in first.items() if isinstance(value, str)}
    chosen = _choose_column(strings, column, "the dataset")
    for record in dataset:
        yield record[chosen]


def _hub(name: str, column: str | None, split: str) -> Iterator[str]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorpusError(
            f"no text file {name!r} here, and no such hub dataset could be loaded ({reason})"
        ) from None
    return _dataset(dataset, column)


def _describe(source: Any) -> str:
    return f"{str(source)[:60]!r}" if isinstance(source, str | Path) else type(source).__name__
