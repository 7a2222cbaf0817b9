"""The JSON schema of what commands print with --json, made from the questions and their results.

`scripts/write_schema.py` writes it into the docs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_type_hints

from ..questions import QUESTIONS, result_class
from ..results.result import FORMAT, Result
from ..results.rows import COLUMNS, Row

DRAFT = "https://json-schema.org/draft/2020-12/schema"
# Commands that answer with several results.
SEVERAL = ("demo", "patch", "report")
NOT_FINITE = ["nan", "inf", "-inf"]
KINDS = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"$ref": "#/$defs/number"},
}
MODEL = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "sha256": {"type": ["string", "null"]}},
}


def json_schema() -> dict[str, Any]:
    """The schema of every document that a command prints with --json.

    Returns:
        A JSON schema of draft 2020-12. `$defs` has one schema for each result, by its name, and
        those of the other documents.
    """
    results = {one.name: _result(one) for one in _results()}
    others = {
        "hyperfit": _hyperfit(),
        "merge": _named("merge", folder={"type": "string"}),
        "plan": _plan(),
        "comparison_plan": _comparison_plan(),
        "expectations": _named("expectations", file={"type": "string"}),
        **{name: _named(name, results=_list({"$ref": "#/$defs/result"})) for name in SEVERAL},
    }
    return {
        "$schema": DRAFT,
        "title": "What the commands of hyperlens print with --json",
        "if": {"type": "object", "required": ["error"]},
        "then": {"$ref": "#/$defs/error"},
        "else": _by_name([*results, *others]),
        "$defs": {
            "number": _number(),
            "cell": {
                "anyOf": [{"type": ["string", "boolean", "null"]}, {"$ref": "#/$defs/number"}]
            },
            "meta": _meta(),
            "result": _by_name([*results]),
            **results,
            **others,
            "error": _error(),
        },
    }


def _results() -> list[type[Result]]:
    from ..validation.result import ValidationResult

    return [*map(result_class, QUESTIONS), ValidationResult]


def _by_name(names: Sequence[str]) -> dict[str, Any]:
    """The schema of the document's name, and no other: messages are about that one."""
    branches = [
        {"if": {"properties": {"name": {"const": name}}}, "then": {"$ref": f"#/$defs/{name}"}}
        for name in names
    ]
    named = {"name": {"enum": [*names]}}
    return {"type": "object", "required": ["name"], "properties": named, "allOf": branches}


def _object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An object that has all of these keys and, unless said, no others."""
    closed = {"type": "object", "required": [*properties], "additionalProperties": False}
    return {**closed, "properties": properties, **more}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _named(name: str, **properties: Any) -> dict[str, Any]:
    return _object({"format": {"const": FORMAT}, "name": {"const": name}, **properties})


def _number() -> dict[str, Any]:
    """JSON has no NaN and no infinity: a one-key object stands for them."""
    marked = _object({"float": {"enum": NOT_FINITE}})
    return {"anyOf": [{"type": "number"}, marked]}


def _meta() -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "base": MODEL,
            "tuned": MODEL,
            "notes": _list({"type": "string"}),
            "options": {"type": "object"},
            "seed": {"type": ["integer", "null"]},
            "versions": {"type": "object"},
        },
    }


def _result(kind: type[Result]) -> dict[str, Any]:
    """One row has exactly the columns of its result."""
    row = _object({column: _column(kind.columns, column) for column in kind.columns})
    return _named(
        kind.name,
        meta={"$ref": "#/$defs/meta"},
        extras={"type": "object"},
        table=_list(row),
    )


def _column(columns: Sequence[str], name: str) -> dict[str, Any]:
    """The types of a comparison's columns are known; other cells are text, numbers or truths."""
    if columns == COLUMNS:
        return KINDS[get_type_hints(Row)[name]]
    return {"$ref": "#/$defs/cell"}


def _hyperfit() -> dict[str, Any]:
    """What hyperfit.json holds, and where it is."""
    parts = ("recipe", "origins", "manifest", "versions")
    return _named(
        "hyperfit",
        folder={"type": "string"},
        seed={"type": "integer"},
        history=_list({"$ref": "#/$defs/number"}),
        records=_list({"type": "object"}),
        **{part: {"type": "object"} for part in parts},
    )


def _plan() -> dict[str, Any]:
    amounts = ("tokens", "flops", "memory", "disk", "seconds")
    stage = {"name": {"type": "string"}, **{name: {"type": "number"} for name in amounts}}
    return _named(
        "plan",
        model={"type": "string"},
        device={"type": "string"},
        seconds={"type": "number"},
        stages=_list(_object(stage)),
    )


def _comparison_plan() -> dict[str, Any]:
    amounts = ("n_texts", "n_tokens", "n_passes", "bytes_read", "memory", "seconds", "flops")
    part = {"name": {"type": "string"}, "flops": {"type": "number"}, "seconds": {"type": "number"}}
    return _named(
        "comparison_plan",
        model={"type": "string"},
        device={"type": "string"},
        **{name: {"type": "number"} for name in amounts},
        parts=_list(_object(part)),
        notes=_list({"type": "string"}),
    )


def _error() -> dict[str, Any]:
    words = {"type": "string"}
    return _object({"error": _object({"kind": words, "message": words})})
