"""What every comparison and experiment returns: a table, the facts to repeat it, its presentation.

A subclass names the columns of its table and says what was found (`verdicts`) and what that rests
on (`evidence`); text, notebook display, page, figures and files come from those.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
from abc import ABC
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ..checks import check_field_types, check_type, check_types
from ..errors import ResultsError, shortened
from ..files import expand_user, new_folder, write_text
from ..render import charts, tables
from ..render.blocks import Block, Text, Verdict
from ..render.format import one_line
from ..render.labels import label_of, name_of
from ..render.page import notebook_html, write_report
from ..render.terminal import to_text
from ..render.tokens import TokenView, token_view

if TYPE_CHECKING:
    import altair
    import pandas as pd

# 1 was written by version 0.1; it is still read.
FORMAT = 2
# Besides the columns, the keys of extras that hold words of ours; other strings may be tokens or
# texts of people, which keep theirs.
LABEL_KEYS = ("against", "effect", "cell")

# So many values that there are stand in a message about one that there is not.
LISTED = 24
# What a cell of a table holds.
CELL = str | float | bool | None

AnyResult = TypeVar("AnyResult", bound="Result")


@dataclass(frozen=True, repr=False)
class Result(ABC):
    """The result of one question.

    Attributes:
        name: what the question is called; its file is `<name>.json`.
        title: the question, as a heading.
        columns: the columns of the table, in order.
        old_names: what files of version 0.1 call it.
        is_overview: whether its verdicts sum up those of the other results on a page.
        renamed: columns, keys and words of version 0.1 to what they are called now.
        table: one mapping per row, with exactly these columns; JSON values, NaN allowed.
        extras: what does not fit a table (texts, histograms), as JSON values.
        meta: everything needed to repeat the run: models and their hashes, `corpus`, `options`,
            `seed`, `versions`, and `notes` for the reader.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    old_names: ClassVar[tuple[str, ...]] = ()
    renamed: ClassVar[Mapping[str, str]] = {}
    is_overview: ClassVar[bool] = False

    table: tuple[Mapping[str, Any], ...]
    extras: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __init_subclass__(cls) -> None:
        """What people ask a result is checked as the arguments of functions are."""
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method) and not name.startswith("_"):
                setattr(cls, name, check_types(method))

    def __post_init__(self) -> None:
        check_field_types(self)
        for row in self.table:
            if set(row) != set(self.columns):
                raise ResultsError(
                    f"a row of {self.name} has the columns {sorted(row)}, expected "
                    f"{sorted(self.columns)}"
                )

    def verdicts(self) -> list[Verdict]:
        """The answers, each with the number that decides it; cautions last."""
        return []

    def evidence(self) -> list[Block]:
        """Tables, charts and texts that the verdicts rest on."""
        return []

    @property
    def base_name(self) -> str:
        """What the base model is called in tables and charts."""
        return self._name("base")

    @property
    def tuned_name(self) -> str:
        """What the tuned model is called in tables and charts."""
        return self._name("tuned")

    def _name(self, side: str) -> str:
        """Two models in memory have the name of their class: then the side tells them apart."""
        base, tuned = name_of(self, "base"), name_of(self, "tuned")
        name = base if side == "base" else tuned
        return f"{name} ({side})" if base == tuned else name

    @property
    def notes(self) -> list[str]:
        """What a reader should know of the models and the data."""
        return [one_line(note) for note in self.meta.get("notes", [])]

    def blocks(self) -> list[Block]:
        """All that is shown of the result: verdicts, evidence, notes."""
        notes = [Text(note, role="note") for note in self.notes]
        return [*self.verdicts(), *self.evidence(), *notes]

    def conclusions(self) -> list[str]:
        """The verdicts as sentences."""
        return [verdict.answer for verdict in self.verdicts()]

    def summary(self) -> str:
        """Verdicts and tables in a screenful of plain text."""
        return to_text(f"{self.title}  {label_of(self)}", self.blocks())

    def plot(self) -> altair.TopLevelMixin | None:
        """The charts as one Altair figure, which shows itself in notebooks; None without any.

        It can be restyled, and saved with `.save("figure.svg")` (or .png, .pdf, .html).
        """
        return charts.figure(self.blocks(), label_of(self))

    def to_frame(self) -> pd.DataFrame:
        """The table as pandas."""
        import pandas as pd

        return pd.DataFrame([dict(row) for row in self.table], columns=list(self.columns))

    @check_types
    def to_latex(self, part: str | None = None) -> str:
        """Tables as LaTeX, with the numbers as `print` shows them and captions that name the texts.

        Args:
            part: the heading above a table, or words of it that no other has, such as "output";
                tables that are folded away on the page are found, too. None for all others.

        Raises:
            ResultsError: if no table, or more than one, is called so.
        """
        return tables.to_latex(self.name, self._captioned(part))

    @check_types
    def to_markdown(self, part: str | None = None) -> str:
        """The same tables as Markdown, each under its caption; see `to_latex`.

        Args:
            part: as in `to_latex`.

        Raises:
            ResultsError: if no table, or more than one, is called so.
        """
        return tables.to_markdown(self._captioned(part))

    @check_types
    def show_tokens(self, example: int = 0) -> TokenView:
        """The texts of one example in circuitsvis, each token coloured by its base rank.

        In a notebook the view shows itself, offline too; `save` writes it as a page.

        Args:
            example: which of the examples whose tokens have ranks, from 0 up.

        Raises:
            ResultsError: if there is no such example.
        """
        return token_view(self.blocks(), example)

    def _captioned(self, part: str | None) -> list[tuple[tables.Part, str]]:
        chosen = tables.chosen(tables.parts(self.blocks()), part)
        return [(one, tables.caption(self, one)) for one in chosen]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, NaN and infinity included as floats."""
        return {
            "format": FORMAT,
            "name": self.name,
            "meta": dict(self.meta),
            "extras": dict(self.extras),
            "table": [dict(row) for row in self.table],
        }

    def rows(self, **wanted: Any) -> list[Mapping[str, Any]]:
        """Rows whose columns have these values, in order; none where nothing was measured.

        Raises:
            ResultsError: if there is no such column.
        """
        for column, value in wanted.items():
            if column not in self.columns:
                raise ResultsError(unknown("column", column, self.columns))
            check_type(column, value, CELL)
        return matching(self.table, wanted)

    def select(self, **wanted: Any) -> list[Mapping[str, Any]]:
        """Rows whose columns have these values, in order.

        Raises:
            ResultsError: if there is no such column, or no row has one of the values.
        """
        found = self.rows(**wanted)
        for column, value in wanted.items():
            known = list(dict.fromkeys(row[column] for row in self.table))
            if value not in known:
                raise ResultsError(unknown(column, value, known))
        return found

    def at(self, **wanted: Any) -> Mapping[str, Any]:
        """The one row whose columns have these values.

        Raises:
            ResultsError: if there is none, or more than one.
        """
        found = self.select(**wanted)
        if len(found) != 1:
            raise ResultsError(
                f"{len(found)} rows of {self.name} have {shortened(wanted)}: name the columns that "
                f"tell one row from the others, among {', '.join(self.columns)}"
            )
        return found[0]

    def value(self, **wanted: Any) -> float:
        """The number in the one row whose columns have these values.

        Raises:
            ResultsError: if there is no such row, or more than one.
        """
        if "value" not in self.columns:
            raise ResultsError(f"{self.name} has no column of values: read a row with at(…)")
        return float(self.at(**wanted)["value"])

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({label_of(self)}, {len(self.table)} rows)"

    def _repr_html_(self) -> str:
        return notebook_html(self)

    @check_types
    def save(self, folder: str | Path, *, figures: bool = False) -> Path:
        """Write <name>.json, <name>.csv, summary.txt and report.html into a new folder.

        The folder appears whole or not at all.

        Args:
            folder: a new one.
            figures: write the charts as <name>.svg and <name>.png, too.

        Raises:
            ResultsError: if the folder exists and is not empty, or cannot be written.
        """
        folder = expand_user(folder)
        with new_folder(folder) as staging:
            self.write_texts(staging)
            write_report(staging / "report.html", [self])
            figure = self.plot() if figures else None
            if figure is not None:
                write_text(staging / f"{self.name}.svg", charts.svg(figure))
                (staging / f"{self.name}.png").write_bytes(charts.png(figure))
        return folder

    @classmethod
    def csv_name(cls) -> str:
        """What the table is called in a saved folder."""
        return f"{cls.name}.csv"

    @check_types
    def write_texts(self, folder: str | Path) -> None:
        """Write <name>.json, <name>.csv and summary.txt into a folder that exists; each atomic.

        Raises:
            ResultsError: if the folder does not exist or cannot be written.
        """
        folder = expand_user(folder)
        self.write(folder)
        write_text(folder / self.csv_name(), self.to_frame().to_csv(index=False))
        write_text(folder / "summary.txt", self.summary() + "\n")

    def to_json(self) -> str:
        """The text of <name>.json: `to_dict()`, with one-key objects for NaN and infinity.

        Raises:
            ResultsError: if the result holds something that is not JSON.
        """
        return to_json(self.name, self.to_dict())

    def write(self, folder: Path) -> Path:
        """Write only <name>.json into a folder that exists; atomic."""
        path = folder / f"{self.name}.json"
        write_text(path, self.to_json())
        return path

    @classmethod
    @check_types
    def load(cls: type[AnyResult], folder: str | Path) -> AnyResult:
        """Read back what `save` or `write` wrote; every number returns bit for bit.

        Raises:
            ResultsError: if the folder holds no readable result of this kind.
        """
        folder = expand_user(folder)
        names = [f"{name}.json" for name in (cls.name, *cls.old_names)]
        path = next((folder / name for name in names if (folder / name).exists()), None)
        if path is None:
            raise ResultsError(f"no {names[0]} in {folder}: expected it as save() wrote it")
        try:
            data = _unmark(json.loads(path.read_text(encoding="utf-8")))
            if data["format"] not in (1, FORMAT):
                raise ResultsError(
                    f"{path} has format {data['format']}, this version reads formats 1 and "
                    f"{FORMAT}: run it again, or install the version that wrote it"
                )
            if data["format"] == 1:
                data = cls.from_format_1(data)
            if data["name"] != cls.name:
                raise ResultsError(f"{path} is of {data['name']!r}, expected {cls.name!r}")
            if not isinstance(data["meta"], dict) or not isinstance(data["extras"], dict):
                raise TypeError("meta and extras must be objects")
            return cls(table=tuple(data["table"]), extras=data["extras"], meta=data["meta"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ResultsError(f"{path} is not readable as {cls.name}: {error}") from None

    @classmethod
    def from_format_1(cls, data: dict[str, Any]) -> dict[str, Any]:
        """What version 0.1 wrote, with the names of today."""
        if data["name"] not in (cls.name, *cls.old_names):
            raise ResultsError(f"a file of {data['name']!r}, expected {cls.name!r}")
        meta = dict(data["meta"])
        if "data" in meta:
            meta["corpus"] = meta.pop("data")
        labels = {*cls.columns, *LABEL_KEYS}
        if "options" in meta:
            meta["options"] = _rename(meta["options"], cls.renamed, labels)
        return {
            **data,
            "name": cls.name,
            "meta": meta,
            "table": _rename(data["table"], cls.renamed, labels),
            "extras": _rename(data["extras"], cls.renamed, labels),
        }


def to_json(name: str, value: Any) -> str:
    """JSON text of a document of this name; NaN and infinity as one-key objects.

    >>> print(to_json("example", {"value": math.nan}))
    {
     "value": {
      "float": "nan"
     }
    }
    """
    try:
        return json.dumps(_mark(value), indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ResultsError(
            f"{name} holds something that is not JSON ({error}): probes and experiments "
            "return plain numbers, strings, lists and dicts"
        ) from None


def matching(
    rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """The rows that have these values, in order."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def only(
    what: str, rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The first row that has these values.

    Raises:
        ResultsError: if there is none, with the values of the others.
    """
    for row in matching(rows, wanted):
        return row
    known = list(dict.fromkeys(" ".join(str(row[key]) for key in wanted) for row in rows))
    raise ResultsError(unknown(what, " ".join(map(str, wanted.values())), known))


def unknown(what: str, given: Any, known: Sequence[Any]) -> str:
    """The message about a name that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(str(given), list(map(str, known)), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(map(str, known[:LISTED])) + (", …" if known[LISTED:] else "")
    return f"no {what} {shortened(given)}: expected one of {listed}{hint}"


def _rename(value: Any, renamed: Mapping[str, str], labels: Collection[str], key: str = "") -> Any:
    """Keys, and the words under keys that hold labels, by their names of today.

    Args:
        value: any part of a file.
        renamed: old names and new ones.
        labels: keys (new names) under which strings are words of ours.
        key: what the value stands under.
    """
    if isinstance(value, Mapping):
        return {
            renamed.get(name, name): _rename(inner, renamed, labels, renamed.get(name, name))
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_rename(inner, renamed, labels) for inner in value]
    return renamed.get(value, value) if isinstance(value, str) and key in labels else value


_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _mark(value: Any) -> Any:
    """JSON has no NaN and no infinity: a one-key object stands for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, Mapping):
        return {key: _mark(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_mark(inner) for inner in value]
    return value


def _unmark(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"float"} and value["float"] in _NOT_FINITE:
            return _NOT_FINITE[value["float"]]
        return {key: _unmark(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_unmark(inner) for inner in value]
    return value
