"""Read texts from lists, files, tables, datasets and hub dataset names."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from numbers import Integral
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from ..checks import check_types, is_list
from ..errors import CorpusError, first_line
from ..models.kinds import HUB_ID
from .reading import EVERYTHING, Reading

if TYPE_CHECKING:
    import pandas as pd

READERS = (".txt", ".jsonl", ".csv", ".parquet")
# How .txt, .jsonl and .csv may be compressed, as in texts.jsonl.gz.
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
COLUMN = "text"
# Paragraphs of a file are put into blocks, at least so many, of at most so many paragraphs.
FEWEST_BLOCKS, MOST_IN_BLOCK = 40, 20
# As an ordinary file, or with the byte order mark that some editors put in front.
ENCODING = "utf-8-sig"


class Texts(list[str]):
    """A list of texts with a record of where they came from.

    Args:
        texts: the texts.
        source: kind, name and hash or fingerprint of where they were read, as JSON values.
        groups: for each text what it belongs to, such as its document; None where each text is by
            itself. Intervals and tests take groups, not texts, as independent.
        reading: which of their tokens are counted.
    """

    def __init__(
        self,
        texts: Iterable[str],
        source: Mapping[str, Any],
        groups: Sequence[Hashable] | None = None,
        reading: Reading = EVERYTHING,
    ) -> None:
        super().__init__(texts)
        self.source = source
        self.groups = None if groups is None else tuple(groups)
        self.reading = reading

    def __getitem__(self, at: Any) -> Any:
        """One text, or a slice of them that keeps their groups, and which tokens are counted."""
        if not isinstance(at, slice):
            return super().__getitem__(at)
        texts = super().__getitem__(at)
        if self.groups is None and self.reading is EVERYTHING:
            return texts
        reading = self.reading[at]
        if self.groups is None:
            return Texts(texts, {"kind": "list"}, None, reading)
        source = {"kind": "list", "groups": self.source["groups"]}
        return Texts(texts, source, self.groups[at], reading)


@check_types
def read_texts(
    source: Any,
    *,
    column: str | None = None,
    split: str = "train",
    limit: int | None = None,
    groups: str | int | Sequence[Hashable] | None = None,
) -> Texts:
    """Texts from a list, a file, a table, a `datasets.Dataset` or the name of a hub dataset.

    A `.txt` file is split at blank lines, one text per paragraph; one without blank lines has a
    text per line. `.jsonl`, `.csv`, `.parquet`, data frames and datasets need a text column:
    `column`, else "text", else the only column that holds strings. `.txt`, `.jsonl` and `.csv` may
    be compressed (`.gz`, `.zst`).

    Args:
        source: list of strings, path, data frame, dataset, or hub name ("owner/name").
        column: which column holds the texts.
        split: which split of a hub dataset.
        limit: keep only the first so many texts; a hub dataset is then streamed, not downloaded.
        groups: what texts belong together, such as those of one document: they resemble each
            other, so that intervals and tests count each group once. The name of a column, one
            value per text, or how many consecutive texts make a group (1: each text by itself).
            None keeps the groups of `Texts`, makes blocks of the paragraphs of a `.txt` file (see
            `paragraphs_per_block`), and takes all other texts by themselves.

    Returns:
        A list of strings; its `source` says where they came from, its `groups` what belongs
        together.

    Raises:
        CorpusError: if there is no such source, no text in it, the list holds names of files, or
            the groups do not fit.

    >>> texts = read_texts(["Once upon a time.", "The end."], limit=1)
    >>> texts, texts.source
    (['Once upon a time.'], {'kind': 'list', 'limit': 1})
    """
    _check_not_file_names(source)
    check_limit(limit)
    streaming = limit is not None
    limit = None if limit is None else min(int(limit), sys.maxsize)
    texts = Texts(islice(_texts(source, column, split, streaming), limit), {})
    texts.source = origin_of(source, column, split, limit)
    if not texts:
        raise CorpusError(f"no texts in {_describe(source)}: expected at least one")
    return grouped(texts, source, groups, split, limit)


def check_limit(limit: Any) -> None:
    """Raise unless a limit is None or a number of texts."""
    if limit is not None and not (isinstance(limit, Integral) and int(limit) >= 1):
        raise CorpusError(f"limit must be at least 1 text (a whole number), got {limit}")


T = TypeVar("T", bound="Grouped")


@runtime_checkable
class Grouped(Protocol):
    """Texts or conversations: a list that says where it came from, and what belongs together."""

    source: Mapping[str, Any]
    groups: tuple[Hashable, ...] | None
    reading: Reading

    def __len__(self) -> int:
        """How many there are."""


def grouped(
    texts: T,
    source: Any,
    groups: str | int | Sequence[Hashable] | None,
    split: str,
    limit: int | None,
) -> T:
    """The same texts with their groups, and how those were made in their source."""
    if groups is None:
        if isinstance(source, Texts):
            texts.groups = None if source.groups is None else source.groups[: len(texts)]
            texts.reading = source.reading[: len(texts)]
            return texts
        is_file = isinstance(source, str | Path) and _kind(Path(source)) == ".txt"
        size = paragraphs_per_block(len(texts)) if is_file else 1
        return _in_blocks(texts, size) if size > 1 else texts
    if isinstance(groups, str):
        values = islice(_values(source, groups, split, limit is not None), limit)
        texts.groups, how = _one_per_text(values, len(texts)), groups
    elif isinstance(groups, Integral):
        if groups < 1:
            raise CorpusError(f"groups must be at least 1 text each, got {groups}")
        return _in_blocks(texts, int(groups))
    else:
        texts.groups, how = _one_per_text(groups, len(texts)), "given"
    texts.source = {**texts.source, "groups": how}
    return texts


def _check_not_file_names(source: Any) -> None:
    """A list of file names would be measured as if the names were the texts."""
    if isinstance(source, list | tuple) and source and all(map(_is_file_name, source)):
        names = repr(source[0]) + (", …" if source[1:] else "")
        raise CorpusError(
            f"expected texts, got a list of file names ({names}): "
            "pass one path instead of a list, or read each file with read_texts and join the texts"
        )


def _is_file_name(text: Any) -> bool:
    if not isinstance(text, str) or not text.strip():
        return False
    named = _kind(Path(text)) in READERS and not any(c.isspace() for c in text)
    return named or (_exists(Path(text)) and Path(text).expanduser().is_file())


def _kind(path: Path) -> str:
    """How the name of a file ends, compressed or not: ".jsonl" of texts.jsonl and texts.jsonl.gz.

    >>> [_kind(Path(name)) for name in ("a.txt", "b.JSONL.gz", "c.parquet.zst", "d.gz")]
    ['.txt', '.jsonl', '.parquet.zst', '.gz']
    """
    kind = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    if kind not in COMPRESSED:
        return kind
    return inner if inner in READERS and inner != ".parquet" else inner + kind


def _texts(source: Any, column: str | None, split: str, streaming: bool) -> Iterator[str]:
    if isinstance(source, str | Path):
        return _named(source, column, split, streaming)
    if hasattr(source, "column_names"):
        return _dataset(source, column)
    if hasattr(source, "columns") and hasattr(source, "iloc"):
        return _table(source, column, "the data frame")
    if is_list(source) and not isinstance(source, set | frozenset):
        return _strings(source)
    raise CorpusError(
        f"expected a list of strings, a path, a dataset or a hub name; got {type(source).__name__}"
    )


def paragraphs_per_block(n: int) -> int:
    """How many consecutive paragraphs of one file count as one unit: at most 20, of at least 40.

    Paragraphs of one document resemble their neighbours. In books, intervals over single paragraphs
    are up to 1.8 times too narrow, and blocks of about 20 hold most of that; with fewer than some
    forty units intervals rest on too little.

    >>> [paragraphs_per_block(n) for n in (34, 100, 400, 5000)]
    [1, 2, 10, 20]
    """
    return min(MOST_IN_BLOCK, max(1, n // FEWEST_BLOCKS))


def _in_blocks(texts: T, size: int) -> T:
    texts.groups = tuple(i // size for i in range(len(texts)))
    texts.source = {**texts.source, "groups": size}
    return texts


def _one_per_text(groups: Any, n: int) -> tuple[Hashable, ...]:
    """Groups as they were given, one for each text.

    Raises:
        CorpusError: if they are something else.
    """
    values = tuple(groups) if isinstance(groups, Iterable) else None
    if values is None or len(values) != n or not all(map(_is_label, values)):
        what = f"{len(values)} values" if values is not None else type(groups).__name__
        raise CorpusError(
            f"groups must be a column, a number of consecutive texts, or one label for each of the "
            f"{n} texts (a string or a whole number); got {what}"
        )
    return values


def _is_label(value: Any) -> bool:
    return isinstance(value, str | Integral)


def _values(source: Any, column: str, split: str, streaming: bool) -> Iterator[Any]:
    """What a column of a table or dataset holds, row by row.

    Raises:
        CorpusError: if there is no such column.
    """
    rows = rows_of(source, split, streaming)
    if rows is None:
        raise CorpusError(
            f"groups={column!r} names a column, and {_describe(source)} has none: give one label "
            "per text, or how many consecutive texts make a group"
        )
    for number, row in enumerate(rows, 1):
        if column not in row:
            raise CorpusError(
                f"row {number} has no column {column!r} for groups; columns: {', '.join(row)}"
            )
        yield row[column]


def rows_of(source: Any, split: str, streaming: bool) -> Iterator[Any] | None:
    """The rows of a table, dataset or list of objects; None where a source has no columns."""
    path = Path(source) if isinstance(source, str | Path) and _exists(Path(source)) else None
    kind = "" if path is None else _kind(path)
    rows: Any = None
    if path is not None and kind == ".jsonl":
        rows = (record for _, record in _json_records(path.expanduser()))
    elif path is not None and kind in (".csv", ".parquet"):
        rows = _read_table(path.expanduser(), kind).to_dict("records")
    elif is_hub_name(source):
        import datasets

        rows = datasets.load_dataset(source, split=split, streaming=streaming)
    elif hasattr(source, "iloc"):
        rows = source.to_dict("records")
    elif hasattr(source, "column_names") or _is_objects(source):
        rows = source
    return None if rows is None else iter(rows)


def is_hub_name(source: Any) -> bool:
    """Whether a source can only be the name of a hub dataset."""
    if not isinstance(source, str) or _exists(Path(source)) or _kind(Path(source)) in READERS:
        return False
    return HUB_ID.fullmatch(source) is not None


def loaded(source: Any, split: str, streaming: bool) -> Any:
    """The hub dataset that a source names; any other source, or one that fails, as it is."""
    if not is_hub_name(source):
        return source
    import datasets

    try:
        return datasets.load_dataset(source, split=split, streaming=streaming)
    except Exception:  # told by whoever reads it next
        return source


def _is_objects(source: Any) -> bool:
    return isinstance(source, list | tuple) and bool(source) and isinstance(source[0], Mapping)


def origin_of(source: Any, column: str | None, split: str, limit: int | None) -> dict[str, Any]:
    """Where texts came from, without paths: the same on another machine."""
    options = {"column": column, "limit": limit}
    chosen = {name: value for name, value in options.items() if value is not None}
    if isinstance(source, Texts):
        return dict(source.source) | chosen
    if hasattr(source, "column_names"):
        name = getattr(getattr(source, "info", None), "dataset_name", None)
        known = {
            "name": name,
            "split": str(getattr(source, "split", None) or ""),
            "fingerprint": getattr(source, "_fingerprint", None),
        }
        return {"kind": "dataset"} | {key: v for key, v in known.items() if v} | chosen
    if not isinstance(source, str | Path):
        return {"kind": "data frame" if hasattr(source, "iloc") else "list"} | chosen
    path = Path(source)
    if not _exists(path):
        return {"kind": "hub dataset", "name": str(source), "split": split} | chosen
    path = path.expanduser()
    origin = {"kind": "file", "name": path.name}
    if path.is_file():  # what came through a pipe cannot be read twice
        with path.open("rb") as file:
            origin["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return origin | chosen


def _strings(source: Iterable[Any]) -> Iterator[str]:
    for i, text in enumerate(source):
        if not isinstance(text, str):
            raise CorpusError(f"text {i} is a {type(text).__name__}: expected strings")
        yield encodable(text, f"text {i}")


def _named(source: str | Path, column: str | None, split: str, streaming: bool) -> Iterator[str]:
    path = Path(source)
    kind = _kind(path)
    is_file = _exists(path)
    if is_file and kind in READERS:
        return _file(path.expanduser(), kind, column)
    if is_file:
        raise CorpusError(
            f"cannot read texts from {_describe(source)}{_hint(path.expanduser(), kind)}: expected "
            f"a file ending in {', '.join(READERS)} (or .gz or .zst after the first three)"
        )
    if isinstance(source, Path) or kind in READERS or not HUB_ID.fullmatch(source):
        raise CorpusError(
            f"no text file {_describe(source)}: give an existing file, a hub dataset name, or a "
            "list of texts"
        )
    return _hub(source, column, split, streaming)


def _hint(path: Path, kind: str) -> str:
    """What a source that exists, but cannot be read, is."""
    if path.is_dir():
        return ", a folder (one that datasets saved is opened by datasets.load_from_disk)"
    return ", a single JSON value (.jsonl has one JSON object per line)" if kind == ".json" else ""


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # a text passed by mistake is no valid file name
        return False


def _file(path: Path, kind: str, column: str | None) -> Iterator[str]:
    try:
        if kind == ".txt":
            with _reading(path) as file:
                yield from _paragraphs(file.read())
        elif kind == ".jsonl":
            yield from _jsonl(path, column)
        else:
            yield from _table(_read_table(path, kind), column, str(path))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text (byte {error.start}): convert it") from None
    except OSError as error:
        raise CorpusError(
            f"cannot read {path} ({error.strerror or first_line(error)}): give a readable file"
        ) from None


def _paragraphs(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.splitlines()]
    blocks = [block.strip() for block in "\n".join(lines).split("\n\n")]
    texts = [block for block in blocks if block]
    return texts if len(texts) > 1 else [line for line in lines if line.strip()]


def _jsonl(path: Path, column: str | None) -> Iterator[str]:
    chosen = None
    for place, record in _json_records(path):
        if chosen is None:
            strings = {key for key, value in record.items() if isinstance(value, str)}
            chosen = _choose_column(strings, column, place)
        yield _string_in(record, chosen, place)


@contextmanager
def _reading(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """A file as text, decompressed as it is read.

    Args:
        path: the file.
        newline: "" leaves line ends as they are.

    Raises:
        CorpusError: if what is compressed is cut off or damaged.
    """
    how = COMPRESSED.get(path.suffix.lower())
    if how is None:
        with path.open(encoding=ENCODING, newline=newline) as file:
            yield file
        return
    import pyarrow as pa

    try:
        with pa.input_stream(str(path), compression=how) as content:
            yield io.TextIOWrapper(content, encoding=ENCODING, newline=newline)
    except OSError as error:
        if error.errno is not None:
            raise
        raise CorpusError(
            f"{path} is not whole {how} ({first_line(error)}): copy or compress it again"
        ) from None
    except pa.ArrowException as error:
        raise CorpusError(
            f"{path} cannot be decompressed here ({first_line(error)}): decompress it yourself"
        ) from None


def _json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _reading(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except UnicodeDecodeError:
                raise
            except (ValueError, RecursionError):
                raise CorpusError(f"{place} is not JSON: expected one value per line") from None
            if not isinstance(record, str | dict):
                raise CorpusError(f"{place}: expected an object or a string")
            yield place, {COLUMN: record} if isinstance(record, str) else record


def _read_table(path: Path, kind: str) -> pd.DataFrame:
    import pandas as pd

    try:
        if kind == ".csv":
            with _reading(path, newline="") as file:
                return pd.read_csv(file, dtype=str, keep_default_na=False)
        return pd.read_parquet(path)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except (CorpusError, UnicodeDecodeError, FileNotFoundError, PermissionError):
        raise
    except (ValueError, OSError, ImportError) as error:
        raise CorpusError(
            f"{path} is not readable as {kind} ({first_line(error)}): write it again"
        ) from None


def _table(table: pd.DataFrame, column: str | None, where: str) -> Iterator[str]:
    if not len(table):
        return
    names = [str(name) for name in table.columns]
    filled = [table.iloc[:, i].map(lambda v: isinstance(v, str)).any() for i in range(len(names))]
    strings = {name for name, has_text in zip(names, filled, strict=True) if has_text}
    chosen = _choose_column(strings, column, where)
    for number, value in enumerate(table.iloc[:, names.index(chosen)], 1):
        yield _string_in({chosen: value}, chosen, f"{where}, row {number}")


def _choose_column(strings: set[str], column: str | None, where: str) -> str:
    columns = ", ".join(sorted(strings)) or "none"
    if column is not None:
        if column not in strings:
            raise CorpusError(
                f"{where} has no text in column {column!r}: columns of text: {columns}"
            )
        return column
    if COLUMN in strings:
        return COLUMN
    if len(strings) == 1:
        return next(iter(strings))
    raise CorpusError(
        f"{where} has no column {COLUMN!r}; columns of text: {columns}: read it with "
        "read_texts(…, column=…), or --text-column on the command line"
    )


def _string_in(record: Mapping[str, Any], column: str, place: str) -> str:
    value = record.get(column)
    if not isinstance(value, str):
        raise CorpusError(
            f"{place} has no string in {column!r}: remove it or put a text there "
            f"(found {type(value).__name__})"
        )
    return encodable(value, place)


def encodable(text: str, place: str) -> str:
    """Raise for a lone surrogate (half of a cut emoji), which no tokenizer can read.

    Raises:
        CorpusError: saying where it is.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{place} is no valid Unicode (half of a character at {error.start}): mend or remove it"
        ) from None
    return text


def _dataset(dataset: Any, column: str | None) -> Iterator[str]:
    if isinstance(dataset.column_names, dict):
        raise CorpusError(
            f"this dataset has splits {', '.join(dataset.column_names)}: pass one of them, as in "
            f"dataset[{next(iter(dataset.column_names), 'train')!r}]"
        )
    records = iter(dataset)
    first = next(records, None)
    if first is None:
        return
    strings = {name for name, value in first.items() if isinstance(value, str)}
    chosen = _choose_column(strings, column, "the dataset")
    for number, record in enumerate(chain([first], records), 1):
        yield _string_in(record, chosen, f"the dataset, row {number}")


def _hub(name: str, column: str | None, split: str, streaming: bool) -> Iterator[str]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split, streaming=streaming)
        yield from _dataset(dataset, column)
    except CorpusError:
        raise
    except Exception as error:
        raise CorpusError(
            f"no text file {name!r} here, and no such hub dataset could be loaded "
            f"({first_line(error)}): check the name, and the split {split!r}"
        ) from error


def _describe(source: Any) -> str:
    if not isinstance(source, str | Path):
        return type(source).__name__
    text = str(source)
    # Both ends of a long path are informative.
    return repr(text if len(text) <= 60 else f"{text[:24]}…{text[-35:]}")
