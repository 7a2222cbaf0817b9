"""What every experiment returns: a small table, the facts needed to repeat it, and its file."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ..errors import ResultsError
from ..files import expand_user, new_folder, write_text

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas as pd

FORMAT = 2
# Version 0.1 wrote this format, with names that were changed since.
OLD_FORMAT = 1
# Where the extras keep labels of the experiment; other strings may be people's own text.
LABEL_KEYS = ("against", "effect", "cell")

Found = TypeVar("Found", bound="Result")


@dataclass(frozen=True)
class Result(ABC):
    """The result of one experiment. Subclasses name it, put it into words and draw it.

    Attributes:
        name: what the experiment is called; its file is `<name>.json`, and the report shows it
            with the section of this name.
        columns: the columns of the table, in order.
        old_names: names of its file in version 0.1.
        renamed: columns, labels and keys of version 0.1, and what they are called now.
        table: one mapping per row, with exactly these columns; JSON values, NaN allowed.
        extras: what does not fit a table (texts, histograms), as JSON values.
        meta: everything needed to repeat the run: models and their hashes, options, seeds,
            versions, data hash, and `notes` for the reader.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    old_names: ClassVar[tuple[str, ...]] = ()
    renamed: ClassVar[Mapping[str, str]] = {}

    table: tuple[Mapping[str, Any], ...]
    extras: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.table:
            if set(row) != set(self.columns):
                raise ResultsError(
                    f"a row of {self.name} has the columns {sorted(row)}, expected "
                    f"{sorted(self.columns)}"
                )

    @abstractmethod
    def summary(self) -> str:
        """What was found, in a screenful of plain text."""

    @abstractmethod
    def plot(self) -> matplotlib.figure.Figure:
        """The figure."""

    def to_frame(self) -> pd.DataFrame:
        """The table as pandas."""
        import pandas as pd

        return pd.DataFrame([dict(row) for row in self.table], columns=list(self.columns))

    def select(self, **wanted: Any) -> list[Mapping[str, Any]]:
        """Rows whose columns have these values, in order."""
        return [row for row in self.table if all(row[k] == v for k, v in wanted.items())]

    def __str__(self) -> str:
        return self.summary()

    def save(self, folder: str | Path) -> Path:
        """Write <name>.json, <name>.csv, summary.txt, the figure and report.html.

        The folder appears whole or not at all.

        Raises:
            ResultsError: if the folder exists and is not empty, or cannot be written.
        """
        from ..render import write_report

        folder = expand_user(folder)
        with new_folder(folder) as staging:
            self.write(staging)
            self.to_frame().to_csv(staging / f"{self.name}.csv", index=False)
            write_text(staging / "summary.txt", self.summary() + "\n")
            figure = self.plot()
            figure.savefig(staging / f"{self.name}.png", dpi=150)
            figure.savefig(staging / f"{self.name}.svg")
            write_report(staging / "report.html", [self])
        return folder

    def write(self, folder: Path) -> Path:
        """Write only <name>.json into a folder that exists; atomic."""
        data = {
            "format": FORMAT,
            "name": self.name,
            "meta": self.meta,
            "extras": self.extras,
            "table": self.table,
        }
        try:
            text = json.dumps(_marked(data), indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ResultsError(
                f"{self.name} holds something that is not JSON ({error}): experiments return plain "
                "numbers, strings, lists and dicts"
            ) from None
        path = folder / f"{self.name}.json"
        write_text(path, text)
        return path

    @classmethod
    def load(cls: type[Found], folder: str | Path) -> Found:
        """Read back what `save` or `write` wrote; every number returns bit for bit.

        What version 0.1 wrote is read too, under the names of today.

        Raises:
            ResultsError: if the folder holds no readable result of this experiment.
        """
        names = (cls.name, *cls.old_names)
        paths = [expand_user(folder) / f"{name}.json" for name in names]
        path = next((path for path in paths if path.is_file()), paths[0])
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] not in (OLD_FORMAT, FORMAT) or data["name"] not in names:
                raise ResultsError(
                    f"{path} has format {data['format']} of {data['name']!r}, expected format "
                    f"{FORMAT} of {cls.name!r}; run the experiment again"
                )
            plain = _unmarked(data)
            if data["format"] == OLD_FORMAT:
                plain = _with_new_names(plain, cls.renamed, {*cls.columns, *LABEL_KEYS})
            return cls(table=tuple(plain["table"]), extras=plain["extras"], meta=plain["meta"])
        except FileNotFoundError:
            raise ResultsError(
                f"no {path.name} in {folder}: expected it as save() wrote it"
            ) from None
        except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{path} is not readable as {cls.name}: {error}") from None


_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _marked(value: Any) -> Any:
    """JSON has no NaN and no infinity: a one-key object stands for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, Mapping):
        return {key: _marked(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(inner) for inner in value]
    return value


def _unmarked(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"float"} and value["float"] in _NOT_FINITE:
            return _NOT_FINITE[value["float"]]
        return {key: _unmarked(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_unmarked(inner) for inner in value]
    return value


def _with_new_names(
    data: Mapping[str, Any], renamed: Mapping[str, str], labels: Collection[str]
) -> dict[str, Any]:
    """A file of version 0.1 with the names of today.

    Args:
        data: what the file holds.
        renamed: old names and new ones.
        labels: keys (new) under which strings are labels and may be renamed.
    """

    def new(value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {
                renamed.get(name, name): new(inner, renamed.get(name, name))
                for name, inner in value.items()
            }
        if isinstance(value, list):
            return [new(inner) for inner in value]
        return renamed.get(value, value) if isinstance(value, str) and key in labels else value

    meta = {"corpus" if name == "data" else name: value for name, value in data["meta"].items()}
    if "options" in meta:
        meta["options"] = new(meta["options"])
    return {"table": new(data["table"]), "extras": new(data["extras"]), "meta": meta}
