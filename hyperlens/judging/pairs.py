"""Two continuations of the same opening: what a judge compares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.texts import ENCODING
from ..errors import CorpusError


class Pair(NamedTuple):
    """One opening and its two continuations.

    Attributes:
        context: the opening that both texts continue.
        a, b: what the two models wrote.
    """

    context: str
    a: str
    b: str

    @property
    def is_identical(self) -> bool:
        """Whether there is nothing to choose between."""
        return self.a == self.b


def read_pairs(source: Any) -> list[Pair]:
    """Pairs from a list of mappings with the keys context, a and b, or from a JSONL file of them.

    Raises:
        CorpusError: if the file cannot be read, or a pair lacks a text.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        pairs = [_pair(record, place) for record, place in _lines(path)]
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        pairs = [_pair(record, f"pair {i}") for i, record in enumerate(source)]
    else:
        raise CorpusError(
            "expected a list of pairs or the path of a JSONL file, got " + type(source).__name__
        )
    if not pairs:
        raise CorpusError("there are no pairs to judge: expected at least one")
    return pairs


def pairs_sha256(pairs: Sequence[Pair]) -> str:
    """SHA-256 over all texts, in order."""
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _lines(path: Path) -> Iterable[tuple[Any, str]]:
    try:
        lines = path.read_text(encoding=ENCODING).split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise CorpusError(
            f"cannot read pairs from {path} ({reason}): expected a JSONL file of objects with "
            "context, a and b"
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            yield json.loads(line), place
        except (ValueError, RecursionError):
            raise CorpusError(f"{place} is not JSON: expected one object per line") from None


def _pair(record: Any, place: str) -> Pair:
    if isinstance(record, Pair):
        return record
    if not isinstance(record, Mapping):
        raise CorpusError(
            f"{place} is a {type(record).__name__}: expected an object with context, a and b"
        )
    texts = [record.get(name) for name in Pair._fields]
    for name, text in zip(Pair._fields, texts, strict=True):
        if not isinstance(text, str):
            raise CorpusError(
                f"{place} has no string in {name!r}: expected an object with context, a and b"
            )
    return Pair(*map(str, texts))
