"""The result of a comparison: one long table, the facts needed to repeat it, and its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..errors import ResultsError
from ..files import expand_user, new_folder, write_text

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas as pd

FORMAT = 1
COLUMNS = ("probe", "metric", "layer", "view", "value", "low", "high", "n")


class Row(NamedTuple):
    """One number of the table.

    Attributes:
        probe, metric: what was measured.
        layer: 0 for the embedding output, l for the output of block l - 1, L for the last.
        view: "raw", "unit_rms" or "final_norm".
        value: the number.
        low, high: its 95% interval over sequences; NaN where there is none.
        n: how many tokens it is taken over.
    """

    probe: str
    metric: str
    layer: int
    view: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class ProbeResult:
    """What a probe computes: rows of the table, and anything else (JSON values only)."""

    rows: tuple[Row, ...]
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """What fine-tuning changed, block by block.

    Attributes:
        rows: the table, row by row; `to_frame()` gives it as pandas.
        extras: per probe, what does not fit a table (histograms), as JSON values.
        meta: everything needed to repeat the run: models and their hashes, options, versions,
            seed, corpus hash, counts of what was excluded, and `notes` for the reader.
    """

    name: ClassVar[str] = "comparison"

    rows: tuple[Row, ...]
    extras: Mapping[str, Mapping[str, Any]]
    meta: Mapping[str, Any]

    @property
    def n_layers(self) -> int:
        """Number of blocks L of the compared models."""
        return int(self.meta["n_layers"])

    def to_frame(self) -> pd.DataFrame:
        """The table: columns probe, metric, layer, view, value, low, high, n."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=list(COLUMNS))

    def select(self, probe: str, metric: str, view: str | None = None) -> list[Row]:
        """Rows of one metric in order of layer, in one view if given."""
        chosen = (r for r in self.rows if (r.probe, r.metric) == (probe, metric))
        return sorted((r for r in chosen if view in (None, r.view)), key=lambda r: r.layer)

    def value(self, probe: str, metric: str, layer: int, view: str) -> float:
        """One number of the table; NaN if it was not measured."""
        found = (r.value for r in self.select(probe, metric, view) if r.layer == layer)
        return next(found, math.nan)

    def summary(self) -> str:
        """What changed, where, and how much of it is an artefact, in a screenful of text."""
        from ..render import summary

        return summary(self)

    def plot(self) -> matplotlib.figure.Figure:
        """Figure 5 of arXiv 2605.22579, drawn for all measured views."""
        from ..render.plots import plot_layers

        return plot_layers(self)

    def plot_ranks(self) -> matplotlib.figure.Figure | None:
        """Figure 4 of the same paper: base ranks of the tuned model's winners, if measured."""
        from ..render.plots import plot_ranks

        return plot_ranks(self) if "rank_reordering" in self.extras else None

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        names = [self.meta.get(role, {}).get("name", "?") for role in ("base", "tuned")]
        return f"Comparison({names[0]} -> {names[1]})"

    def _repr_html_(self) -> str:
        from ..render import notebook_html

        return notebook_html(self)

    def save(self, folder: str | Path) -> Path:
        """Write comparison.json, layers.csv, summary.txt, the figures and report.html.

        The folder appears whole or not at all.

        Raises:
            ResultsError: if the folder exists and is not empty, or cannot be written.
        """
        from ..render import write_report

        folder = expand_user(folder)
        with new_folder(folder) as staging:
            write_text(staging / "comparison.json", self._to_json())
            self.to_frame().to_csv(staging / "layers.csv", index=False)
            write_text(staging / "summary.txt", self.summary() + "\n")
            write_report(staging / "report.html", [self])
            figures = {"layers": self.plot(), "ranks": self.plot_ranks()}
            for stem, figure in figures.items():
                if figure is not None:
                    figure.savefig(staging / f"{stem}.png", dpi=150)
                    figure.savefig(staging / f"{stem}.svg")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read back what `save` wrote; every number returns bit for bit.

        Raises:
            ResultsError: if the folder holds no readable comparison.
        """
        path = expand_user(folder) / "comparison.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ResultsError(
                    f"{path} has format {data['format']}, this version reads format {FORMAT}; "
                    "run the comparison again or install the version that wrote it"
                )
            rows = tuple(_row_from_json(row) for row in data["rows"])
            if not isinstance(data["meta"], dict) or not isinstance(data["extras"], dict):
                raise TypeError("meta and extras must be objects")
            return cls(rows=rows, extras=data["extras"], meta=data["meta"])
        except FileNotFoundError:
            raise ResultsError(
                f"no comparison in {folder}: expected {path.name} as written by save()"
            ) from None
        except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{path} is not a readable comparison: {error}") from None

    def _to_json(self) -> str:
        rows = [[_to_plain(value) for value in row] for row in self.rows]
        data = {"format": FORMAT, "meta": self.meta, "extras": self.extras, "rows": rows}
        try:
            text = json.dumps(data, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ResultsError(
                f"a result holds something that is not JSON ({error}): probes must return plain "
                "numbers, strings, lists and dicts as extras"
            ) from None
        return text


def _to_plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null and the words stand for them."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _row_from_json(row: Any) -> Row:
    """A row as it was, checked field by field."""
    if not isinstance(row, list) or len(row) != len(COLUMNS):
        raise TypeError(f"a row must have {len(COLUMNS)} fields")
    probe, metric, layer, view, *numbers, n = row
    value, low, high = (math.nan if number is None else float(number) for number in numbers)
    return Row(str(probe), str(metric), int(layer), str(view), value, low, high, int(n))
