"""The record of a run: one row per measurement, kept as a CSV that is whole at every moment."""

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

FILE = "history.csv"


@dataclass(frozen=True)
class Record:
    """Loss, rank and quality of a model in training (arXiv 2605.22579, Figure 2).

    Everything but `train_loss` is measured on held-out sequences. Losses and entropy are in nats
    per token; errors and ranks are shares of the next-token decisions, teacher-forced.

    Attributes:
        epoch: epochs trained; 0 is the base.
        step: optimiser steps made.
        train_loss: mean over the last epoch, as it was seen; NaN before the first.
        validation_loss: mean next-token loss.
        perplexity: exp of it.
        top1_error: share of tokens that the model does not put first.
        ttr: distinct tokens / tokens of the greedy continuations, mean over prompts.
        bigram_repetition: 1 - distinct bigrams / bigrams of the same.
        rank_1, rank_2_10, rank_gt_10: rank, in the base model's logits, of the token that the
            model puts first; tied logits share the best rank.
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
        plain = {name: _to_plain(value) for name, value in asdict(self).items()}
        return plain | {"ttr_per_prompt": list(self.ttr_per_prompt)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """The record that `to_json` wrote.

        Raises:
            TrainingError: if fields are missing or unknown.
        """
        wrong = values.keys() ^ {f.name for f in fields(cls)}
        if wrong:
            raise TrainingError(
                f"not a record of this version, for {', '.join(sorted(wrong))}: start the run again"
            )
        numbers: dict[str, Any] = {
            name: values[name] if name in WHOLE_NUMBERS else _from_plain(values[name])
            for name in COLUMNS
        }
        return cls(**numbers, ttr_per_prompt=tuple(values["ttr_per_prompt"]))


# The columns of the CSV and their order: a promise.
COLUMNS = tuple(f.name for f in fields(Record) if f.name != "ttr_per_prompt")
WHOLE_NUMBERS = ("epoch", "step")


def write(path: Path, records: Sequence[Record]) -> None:
    """Write the records so far as a CSV, which `read_history` gives back bit for bit.

    The file is small and written anew each time, beside the old one and then in its place: who
    reads it, or kills this process, never meets half a row.

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


def _to_plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null and the word stand for them."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _from_plain(value: Any) -> float:
    return math.nan if value is None else float(value)
