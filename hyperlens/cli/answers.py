"""What commands answer: text for people or, with --json, one JSON document for programs.

Light to import, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

JSON_HELP = (
    "one JSON document on stdout, also of an error; notes and progress on stderr (default: text)"
)


class Answer(NamedTuple):
    """What a command answers.

    Attributes:
        text: for people.
        name: of the document.
        document: for programs, as JSON values; NaN and infinity included as floats.
        note: what of the text is said on stderr beside a document, such as where files are.
        code: the exit code.
    """

    text: str
    name: str
    document: Mapping[str, Any]
    note: str = ""
    code: int = 0

    def to_json(self) -> str:
        """The document as text."""
        from ..results.result import to_json

        return to_json(self.name, self.document)


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


def answer_of(result: Any, note: str = "") -> Answer:
    """One result: its summary, or what its JSON file holds."""
    text = f"{result.summary()}\n\n{note}" if note else result.summary()
    return Answer(text, result.name, result.to_dict(), note)


def answer_of_several(name: str, text: str, results: Sequence[Any], note: str = "") -> Answer:
    """Several results of one command, each as its JSON file holds it."""
    return Answer(text, name, named(name, results=[one.to_dict() for one in results]), note)


def named(name: str, **content: Any) -> dict[str, Any]:
    """A document that is no result's, with the two keys that all have but errors."""
    from ..results.result import FORMAT

    return {"format": FORMAT, "name": name, **content}


def error_document(kind: str, message: str) -> str:
    """The document of a command that failed.

    >>> error_document("LoadingError", "no such model")
    '{"error": {"kind": "LoadingError", "message": "no such model"}}'
    """
    return json.dumps({"error": {"kind": kind, "message": message}})
