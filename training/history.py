"""The records of a run: one row per measurement, written as a CSV that is always complete.

Imports neither torch nor transformers, so that reading a history is quick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError
from ..files import write_text

if TYPE_CHECKING:
    import pandas as pd

# What `hyperfit` writes beside the weights: the records, and how the model was made.
FILE = "history.csv"
RUN_FILE = "hyperfit.json"


@dataclass(frozen=True)
class Record:
    """Loss, rank and quality of a model in training (arXiv 2605.22579, Figure 2).

    Everything but `train_loss` is measured on held-out sequences. Losses and entropy are in nats
    per token; errors and ranks are shares of the next-token decisions, teacher-forced.

    Attributes:
        epoch: epochs trained; 0 is the base.
        step: optimiser steps made.
        train_loss: mean over the last epoch, each batch before the step on it; NaN before the first
            epoch.
        validation_loss: mean next-token loss.
        perplexity: exp of it.
        top1_error: share of tokens that are not the model's top-1 prediction.
        ttr: distinct tokens / tokens of the greedy generations, mean over prompts.
        bigram_repetition: 1 - distinct bigrams / bigrams of the same.
        rank_1, rank_2_10, rank_gt_10: rank, in the base model's logits, of the model's top-1
            token; tied logits share the best rank.
        entropy: of the model's predictions.
        seconds: training time so far, without the time that records take.
        ttr_per_prompt: what `ttr` is the mean of, for paired comparisons; not in the CSV.
    """

    epoch: int
    step: int
    train_loss: float
    validation_loss: float
    perplexity: float
    top1_error: float
    ttr: float
    bigram_repetition: float
    rank_1: float
    rank_2_10: float
    rank_gt_10: float
    entropy: float
    seconds: float
    ttr_per_prompt: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Every field as a JSON value; floats come back bit for bit."""
        values = {name: _to_json_value(value) for name, value in asdict(self).items()}
        return values | {"ttr_per_prompt": list(self.ttr_per_prompt)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """The record that `to_json` wrote.

        Raises:
            TrainingError: if fields are missing or unknown.
        """
        unexpected = values.keys() ^ {f.name for f in fields(cls)}
        if unexpected:
            raise TrainingError(
                "this record was written by another version of hyperlens (missing or unknown: "
                f"{', '.join(sorted(unexpected))}): start the run again"
            )
        numbers: dict[str, Any] = {
            name: values[name] if name in WHOLE_NUMBERS else _from_json_value(values[name])
            for name in COLUMNS
        }
        return cls(**numbers, ttr_per_prompt=tuple(values["ttr_per_prompt"]))


# The columns of the CSV, in this order, on which users' scripts may rely.
COLUMNS = tuple(f.name for f in fields(Record) if f.name != "ttr_per_prompt")
WHOLE_NUMBERS = ("epoch", "step")


def write(path: Path, records: Sequence[Record]) -> None:
    """Write the records so far as a CSV, which `read_history` returns bit for bit.

    The small file is replaced as a whole each time, so a reader never sees half a row, even after
    this process was killed.

    Raises:
        ResultsError: if it cannot be written.
    """
    rows = [[repr(getattr(record, name)) for name in COLUMNS] for record in records]
    write_text(path, "".join(",".join(row) + "\n" for row in [COLUMNS, *rows]))


def read_history(source: str | Path) -> pd.DataFrame:
    """The records of a run as a table, one row each; `Record` says what the columns are.

    Args:
        source: the folder of a run, or its history.csv.

    Raises:
        TrainingError: if there is no history, or the file is not one.
    """
    import pandas as pd

    path = Path(source).expanduser()
    path = path / FILE if path.is_dir() else path
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    except (FileNotFoundError, NotADirectoryError):
        raise TrainingError(
            f"no {path}: expected the folder of a run that kept a record (record_every above 0), "
            f"or its {FILE}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read {path} as a history of training: {error}") from None
    if header != ",".join(COLUMNS):
        raise TrainingError(
            f"{path} is not a history of training: expected the columns {', '.join(COLUMNS)}"
        )
    try:
        rows = [_numbers(line) for line in lines]
    except ValueError as error:
        raise TrainingError(f"{path} is not a history of training: {error}") from None
    kinds = {name: "int64" if name in WHOLE_NUMBERS else "float64" for name in COLUMNS}
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(kinds)


def _numbers(line: str) -> list[int | float]:
    cells = zip(COLUMNS, line.split(","), strict=True)
    return [int(cell) if name in WHOLE_NUMBERS else float(cell) for name, cell in cells]


def _to_json_value(value: Any) -> Any:
    """NaN as null and infinities as strings, which JSON has no numbers for."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _from_json_value(value: Any) -> float:
    return math.nan if value is None else float(value)
