"""The result of a comparison: one long table, the facts needed to repeat it, and its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import ResultsError
from .files import new_folder, write_text

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
        from .report import summary

        return summary(self)

    def plot(self) -> matplotlib.figure.Figure:
        """Figure 5 of arXiv 2605.22579, drawn for all measured views."""
        from .plots import plot_layers

        return plot_layers(self)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"Comparison({self.meta['base']['name']} -> {self.meta['tuned']['name']})"

    def _repr_html_(self) -> str:
        from .report import notebook_html

        return notebook_html(self)

    def save(self, folder: str | Path) -> Path:
        """Write comparison.json, layers.csv, summary.txt and the figure into a new folder.

        The folder appears whole or not at all.

        Raises:
            ResultsError: if the folder exists and is not empty, or cannot be written.
        """
        with new_folder(Path(folder)) as staging:
            write_text(staging / "comparison.json", self._to_json())
            self.to_frame().to_csv(staging / "layers.csv", index=False)
            write_text(staging / "summary.txt", self.summary() + "\n")
            figure = self.plot()
            figure.savefig(staging / "layers.png", dpi=150)
            figure.savefig(staging / "layers.svg")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read back what `save` wrote; every number returns bit for bit.

        Raises:
            ResultsError: if the folder holds no readable comparison.
        """
        path = Path(folder) / "comparison.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ResultsError(
                    f"{path} has format {data['format']}, this version reads format {FORMAT}; "
                    "run the comparison again or install the version that wrote it"
                )
            rows = tuple(Row(*_floats_back(row)) for row in data["rows"])
            return cls(rows=rows, extras=data["extras"], meta=data["meta"])
        except FileNotFoundError:
            raise ResultsError(
                f"no comparison in {folder}: expected {path.name} as written by save()"
            ) from None
        except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{path} is not a readable comparison: {error}") from None

    def _to_json(self) -> str:
        rows = [[None if _is_nan(v) else v for v in row] for row in self.rows]
        data = {"format": FORMAT, "meta": self.meta, "extras": self.extras, "rows": rows}
        return json.dumps(data, indent=1, ensure_ascii=False)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _floats_back(row: Sequence[Any]) -> list[Any]:
    return [math.nan if v is None else v for v in row]


def describe_options(options: Any) -> dict[str, Any]:
    """A dataclass of options as JSON values."""
    return json.loads(json.dumps(asdict(options), default=str))  # type: ignore[no-any-return]
