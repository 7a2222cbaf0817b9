"""The numbers of arXiv 2605.22579 as data, and what is known to be wrong with some of them.

`paper_numbers.csv` holds every value of the paper's tables and text. `quantity` names what was
measured in a way that does not depend on the model, such as "temperature/tuned/ttr": it is what a
run of `reproduce` measures, too. Settings, such as numbers of tokens, have none.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType
from typing import NamedTuple

# What is measured, in order. The first part of a quantity is the stage that measures it.
STAGES = (
    *("training", "temperature", "static_bias", "provenance", "geometry", "null_test"),
    *("decoding", "cross_domain", "variants", "judge", "weights"),
)


class PaperNumber(NamedTuple):
    """One number of the paper.

    Attributes:
        exhibit: where it stands, such as "Table 1", "Figure 5" or "Section 3.4".
        model: which model it is of.
        row, column: where in the exhibit.
        value: as printed, in `unit`.
        uncertainty: what is printed behind ±, a standard error where the paper says what it is;
            NaN where there is none.
        low, high: the printed interval; NaN where there is none.
        relation: "=", "~" (about), "<", ">", ">=", or "range" for one end of a range.
        unit: such as "ratio", "%" or "nats"; empty for plain numbers.
        quantity: what was measured, the same name for the same thing in every exhibit; empty for
            settings and for what follows from other numbers.
        note: on how it was read.
    """

    exhibit: str
    model: str
    row: str
    column: str
    value: float
    uncertainty: float
    low: float
    high: float
    relation: str
    unit: str
    quantity: str
    note: str

    @property
    def stage(self) -> str:
        """The measurement that gives this quantity; empty for settings."""
        return self.quantity.partition("/")[0]


@functools.cache
def paper_numbers() -> tuple[PaperNumber, ...]:
    """Every number of the paper, in the order of its exhibits.

    >>> first = paper_numbers()[0]
    >>> first.exhibit, first.value, first.uncertainty, first.quantity
    ('Table 1', 0.4, 0.015, 'temperature/original/ttr')
    """
    text = (files(__package__) / "paper_numbers.csv").read_text(encoding="utf-8")
    return tuple(map(_number, csv.DictReader(text.splitlines())))


def _number(row: dict[str, str]) -> PaperNumber:
    uncertainty, low, high = math.nan, math.nan, math.nan
    if " to " in row["uncertainty"]:
        low, high = map(float, row["uncertainty"].split(" to "))
    elif row["uncertainty"]:
        uncertainty = float(row["uncertainty"])
    return PaperNumber(
        row["exhibit"],
        row["model"],
        row["row"],
        row["column"],
        float(row["value"].replace(",", "")),
        uncertainty,
        low,
        high,
        row["relation"],
        row["unit"],
        row["quantity"],
        row["note"],
    )


def exhibits() -> list[str]:
    """Every exhibit of the paper, in order.

    >>> exhibits()[:3]
    ['Table 1', 'Table 9', 'Table 11']
    """
    return [*dict.fromkeys(number.exhibit for number in paper_numbers()), *SAID]


# What an exhibit shows beside its numbers: curves and bars that the paper only draws.
DRAWN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    dict.fromkeys(("Figure 2", "Figure 6", "Figure 8", "Figure 10"), ("training",))
    | dict.fromkeys(("Figure 12", "Figure 13", "Figure 14", "Table 8"), ("training",))
    | dict.fromkeys(("Figure 5", "Figure 7", "Figure 9", "Figure 11"), ("geometry",))
    | {"Appendix A.3": ("weights",)}
    | {"Section 4.1": ("geometry",), "Section 4.2": ("geometry",), "Figure 3": ("temperature",)}
)

# What the paper says of weights without a number of its own, and cites others for.
SAID: Mapping[str, str] = MappingProxyType(
    {
        "Appendix A.3": "rank reordering is driven by the rotation of singular vectors rather than "
        "magnitude shifts (after Wang et al. 2025; no number is given)"
    }
)

# Exhibits in which nothing is measured.
NOT_MEASURED: Mapping[str, str] = MappingProxyType(
    {
        "Figure 1": "a drawing of the idea, without measurements",
        "Section 2.1": "settings of the training: they are in the protocol",
        "Appendix G": "the judge's prompt: see `hyperlens judge --prompt paper`",
    }
)


def stages_of(exhibit: str) -> tuple[str, ...]:
    """The measurements that an exhibit needs; none for those in NOT_MEASURED.

    >>> stages_of("Table 1"), stages_of("Figure 5"), stages_of("Figure 1")
    (('temperature',), ('geometry',), ())
    """
    found = dict.fromkeys(
        number.stage for number in paper_numbers() if number.exhibit == exhibit and number.stage
    )
    return tuple(dict.fromkeys((*found, *DRAWN.get(exhibit, ()))))


# Where the paper contradicts itself, so that nobody looks for an error of theirs.
CONTRADICTIONS: Mapping[str, str] = MappingProxyType(
    {
        "Table 1": "the text solves T* for each context (section 3.2), the table has one T*; "
        "agreement reads 57% here, 60.9% in Figure 4 and 62% in Figure 2",
        "Table 2": "called monotonic, but TTR goes .384, .408 from alpha = .05 to .10",
        "Figure 2": "62% unchanged top-1 tokens at epoch 60, 57% in Table 1, 60.9% in Figure 4",
        "Figure 3": "error bars are called standard deviations, Table 1 calls the same numbers "
        "standard errors",
        "Figure 4": "60.9% unchanged top-1 tokens, 57% in Table 1",
        "Section 3": "entropy is about 1.5 nats here, .862 in section 3.2 and Table 1",
        "Figure 5": "compression spans layers 0 to 21 in the caption, 11 to 21 in the text",
        "Section 5": "78.3% fewer parameters follows from counting L + 1 layers; the last five "
        "layers of some captions are four blocks where L is the last index",
        "Table 5": "200 comparisons, but 57.3 / 41.2 / 1.5% fit 199 (114 / 82 / 3)",
        "Table 7": "hyperfitted greedy .67 to .69 and MAUVE .82 to .91; Table 6 has other values "
        "for the same two models",
        "Table 9": "the printed p of entropy does not follow from the printed ±; the original's "
        "repeated bigrams are .660 here and .662 in Tables 4 and 10",
        "Table 10": "the original's repeated bigrams are .662 here and .660 in Table 9",
        "Table 11": "the printed p of entropy does not follow from the printed ±; entropy of the "
        "hyperfitted model is 1.593 here and 1.608 in Table 12",
        "Table 12": "entropy of the hyperfitted model is 1.608 here and 1.593 in Table 11",
        "Table 13": "the printed p of entropy does not follow from the printed ±",
        "Table 15": "final losses .031 and .033; Figure 13 says .059",
        "Figure 13": "final loss .059; Table 15 says .031 and .033",
        "Table 16": "the late-stage row repeats Table 10's (another model), and full LoRA's "
        "agreement is .528 in Table 15 too",
        "Section 6 (training efficiency)": "6 to 11 hours for epochs 80 to 140 fits full "
        "fine-tuning (20.7 hours); late-stage LoRA would need 3.2 to 5.6",
        "Section 6 (token-level)": "the three ranges cannot all hold at their low ends: shares "
        "add up to 100%, and 60.9% (Figure 4) leaves 26.2% for ranks 2 to 10",
    }
)
