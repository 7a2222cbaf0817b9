"""Is the change within bounds? A comparison against stated expectations, judged by intervals."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..checks import check_types, is_list, is_number
from ..errors import ExpectationError, shortened
from ..files import expand_user, write_text
from ..render.blocks import Block, Table, Verdict
from ..render.format import NUMBER, count, interval, listed
from ..results.result import Result, unknown
from ..results.rows import COLUMNS, Row
from .comparison import FORMS, Comparison

MET, NOT_MET, CANNOT_TELL = "met", "not met", "cannot tell"
# The worst first: one that is not met decides.
OUTCOMES = (NOT_MET, CANNOT_TELL, MET)
KEYS = ("metric", "view", "layer", "at_least", "at_most")
# What a first file holds bounds of, at the last layer.
STARTING = (
    ("drift", "relative_l2", "raw"),
    ("participation_ratio", "delta", "raw"),
    ("participation_ratio", "delta", "final_norm"),
    ("logit_lens", "kl", "final_norm"),
    ("rank_reordering", "top1_agreement", "final_norm"),
    ("rank_reordering", "spearman", "final_norm"),
)
STARTING_NOTE = """\
# Bounds for `hyperlens check`, made from a comparison: the interval of each number at the last
# layer, widened on both sides by its own width. Delete the bounds that do not matter, and replace
# the others by what you can accept.
"""


@dataclass(frozen=True)
class Expectation:
    """Bounds of one metric, in one view and at one layer or in several.

    Attributes:
        metric: "probe.metric", such as "participation_ratio.delta".
        view: "raw", "unit_rms" or "final_norm"; None for each that was measured.
        layer: a layer, or several; negative ones count from the last; None for each that was
            measured.
        at_least, at_most: the bounds; None where there is none.
    """

    metric: str
    view: str | None = None
    layer: int | Sequence[int] | None = None
    at_least: float | None = None
    at_most: float | None = None


class CheckResult(Result):
    """Which bounds a comparison keeps.

    The table has a row for each bounded number of the comparison, with its bounds (None where
    there is none) and the outcome: "met" if the whole interval is inside the bounds, "not met" if
    it is wholly outside, "cannot tell" if it is neither, or if there is no interval. Ends of
    intervals beyond what is possible, such as a share above 1, are taken as they are shown.
    """

    name: ClassVar[str] = "check"
    title: ClassVar[str] = "Is the change within bounds?"
    columns: ClassVar[tuple[str, ...]] = (*COLUMNS, "at_least", "at_most", "outcome")

    @property
    def outcome(self) -> str:
        """That of all bounds together: "not met" decides, then "cannot tell"."""
        return min((str(row["outcome"]) for row in self.table), key=OUTCOMES.index)

    def verdicts(self) -> list[Verdict]:
        """All bounds together, then each that is not met or cannot be told."""
        counts = {one: len(self.rows(outcome=one)) for one in OUTCOMES}
        said = [f"{n} {one}" for one, n in counts.items() if n and one != MET]
        n = len(self.table)
        answer = f"{self.outcome}: {counts[MET]} of {count(n, 'bound')} met" + "".join(
            f", {words}" for words in said
        )
        each = [
            Verdict(outcome, f"{outcome}: {_sentence(row)}", caution=outcome == CANNOT_TELL)
            for outcome in (NOT_MET, CANNOT_TELL)
            for row in self.rows(outcome=outcome)
        ]
        return [Verdict("bounds", f"{answer}."), *each]

    def evidence(self) -> list[Block]:
        """Every number beside its bounds."""
        head = ["metric, view", "layer", "measured [95%]", "expected", "outcome"]
        caption = (
            "met: the whole interval is inside the bounds; not met: it is wholly outside; cannot "
            "tell: neither, or there is no interval"
        )
        return [Table(head, [*map(_cells, self.table)], caption)]


@check_types
def check_comparison(
    comparison: Comparison, expectations: str | Path | Sequence[Mapping[str, Any]]
) -> CheckResult:
    """Check a comparison against bounds, as a gate of continuous integration does.

    Judged by interval: a bound is met if the whole 95% interval is inside it, not met if it is
    wholly outside, and otherwise cannot be told.

    Args:
        comparison: of two models.
        expectations: a .toml or .json file with a list `expect`, or that list: mappings with
            `metric` ("probe.metric"), `at_least` or `at_most` or both, and if not all layers and
            views are meant, `layer` (one or several, negative ones from the last) and `view`.

    Returns:
        The outcome of each bound; `outcome` is that of all together.

    Raises:
        ExpectationError: if the file cannot be read, or names what does not exist or was not
            measured.

    Example::

        bounds = [{"metric": "rank_reordering.top1_agreement", "at_least": 0.9}]
        assert check_comparison(comparison, bounds).outcome == "met"
    """
    wanted = read_expectations(expectations)
    rows = [
        {**row._asdict(), **bounds, "outcome": _outcome(row, **bounds)}
        for place, one in enumerate(wanted, start=1)
        for bounds in [{"at_least": one.at_least, "at_most": one.at_most}]
        for row in _bounded(comparison, one, place)
    ]
    meta = {**comparison.meta, "expectations": [asdict(one) for one in wanted]}
    return CheckResult(tuple(rows), {}, meta)


@check_types
def read_expectations(source: str | Path | Sequence[Mapping[str, Any]]) -> list[Expectation]:
    """Read bounds from a file or a list, as `check_comparison` takes them.

    Raises:
        ExpectationError: if the file cannot be read, has keys that do not exist, or no bounds.

    >>> read_expectations([{"metric": "drift.cosine", "layer": -1, "at_least": 0.5}])[0].layer
    -1
    """
    listed_bounds, where = _in_file(source) if isinstance(source, str | Path) else (source, "")
    if not listed_bounds:
        raise ExpectationError(f"there are no bounds{where}: give at least one [[expect]]")
    return [
        _expectation(one, f"expectation {place}{where}")
        for place, one in enumerate(listed_bounds, start=1)
    ]


@check_types
def check_new_expectations(path: Path) -> None:
    """Raise before the work for a file that `write_expectations` would refuse after it.

    Raises:
        ExpectationError: if it exists, or its name is that of another kind of file.
    """
    if path.exists():
        raise ExpectationError(f"{path} already exists: choose a new file or remove it first")
    if path.suffix != ".toml":
        raise ExpectationError(f"bounds are written as TOML: call the file {path.stem}.toml")


def write_expectations(comparison: Comparison, path: str | Path) -> Path:
    """Write a first .toml file of bounds for `check_comparison` from a comparison.

    Each bound is the end of a number's interval moved outward by the interval's width, so that the
    comparison itself meets it, and its like on as many other texts of the same kind meets it with
    a probability of 0.994.

    Args:
        comparison: what is accepted now.
        path: a new file.

    Raises:
        ExpectationError: if the file exists or is no .toml file, or no number of the last layer
            has an interval.
        ResultsError: if it cannot be written.
    """
    path = expand_user(path)
    check_new_expectations(path)
    found = list(_starting(comparison))
    if not found:
        raise ExpectationError(
            "no number at the last layer has an interval: compare on at least 5 texts"
        )
    entries = "\n".join("[[expect]]\n" + "".join(_toml_lines(one)) for one in found)
    write_text(path, f"{STARTING_NOTE}\n{entries}")
    return path


def _starting(comparison: Comparison) -> Iterator[Expectation]:
    for probe, metric, view in STARTING:
        for row in comparison.measured(probe, metric, view):
            if row.layer == comparison.n_layers and math.isfinite(row.low + row.high):
                width = row.high - row.low
                low, high = row.low - width, row.high + width
                yield Expectation(f"{probe}.{metric}", view, -1, low, high)


def _toml_lines(one: Expectation) -> Iterator[str]:
    for key, value in asdict(one).items():
        yield f"{key} = {json.dumps(value)}\n"


def _in_file(file: str | Path) -> tuple[Sequence[Any], str]:
    """The list in a file, and words for messages."""
    path = expand_user(file)
    readers: dict[str, Any] = {".toml": tomllib.loads, ".json": json.loads}
    if path.suffix not in readers:
        raise ExpectationError(f"expected a .toml or .json file of bounds, got {str(path)!r}")
    try:
        data = readers[path.suffix](path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ExpectationError(f"no file of bounds {str(path)!r}: give a .toml or .json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ExpectationError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from None
    if not isinstance(data, dict):
        raise ExpectationError(f'{path} must hold {{"expect": [...]}}, got {shortened(data)}')
    for key in data:
        if key != "expect":
            raise ExpectationError(f"{path}: {unknown('key', key, ['expect'])}")
    bounds = data.get("expect", [])
    if not isinstance(bounds, list):
        raise ExpectationError(f"expect in {path} must be a list: write [[expect]] in TOML")
    return bounds, f" in {path}"


def _expectation(given: Any, where: str) -> Expectation:
    """One checked entry."""
    if not isinstance(given, Mapping):
        raise ExpectationError(f"{where} must hold {', '.join(KEYS)}; got {shortened(given)}")
    for key in given:
        if key not in KEYS:
            raise ExpectationError(f"{where}: {unknown('key', key, KEYS)}")
    for key in ("metric", "view"):
        if not isinstance(given.get(key, ""), str):
            raise ExpectationError(f"{where}: {key} must be a string, got {shortened(given[key])}")
    if "metric" not in given:
        raise ExpectationError(f"{where} has no metric: expected such as 'drift.cosine'")
    layers, bounds = _checked_layers(given, where), _checked_bounds(given, where)
    return Expectation(given["metric"], given.get("view"), layers, **bounds)


def _checked_layers(given: Mapping[str, Any], where: str) -> int | list[int] | None:
    layer = given.get("layer")
    if layer is None or is_number(layer, int):
        return None if layer is None else int(layer)
    several = list(layer) if is_list(layer) else []
    if not several or not all(is_number(one, int) for one in several):
        raise ExpectationError(
            f"{where}: layer must be a whole number or a list of some, got {shortened(layer)}"
        )
    return [int(one) for one in several]


def _checked_bounds(given: Mapping[str, Any], where: str) -> dict[str, float]:
    bounds = {key: given[key] for key in ("at_least", "at_most") if given.get(key) is not None}
    for key, value in bounds.items():
        if not is_number(value, float) or not math.isfinite(value):
            raise ExpectationError(f"{where}: {key} must be a number, got {shortened(value)}")
    if not bounds:
        raise ExpectationError(f"{where} has no bound: give at_least or at_most")
    if len(bounds) == 2 and bounds["at_least"] > bounds["at_most"]:
        raise ExpectationError(
            f"{where}: at_least {bounds['at_least']:g} is above at_most {bounds['at_most']:g}"
        )
    return {key: float(value) for key, value in bounds.items()}


def _bounded(comparison: Comparison, one: Expectation, place: int) -> list[Row]:
    """The rows of a comparison that an expectation is about; at least one."""
    where = f"expectation {place}"
    rows = [row for row in comparison.long if f"{row.probe}.{row.metric}" == one.metric]
    if not rows:
        known = list(dict.fromkeys(f"{row.probe}.{row.metric}" for row in comparison.long))
        same = [name for name in known if name.endswith(f".{one.metric}")]
        hint = f"; did you mean {listed(same)}?" if same else ""
        raise ExpectationError(f"{where}: {unknown('metric', one.metric, known)}{hint}")
    if one.view is not None:
        views = list(dict.fromkeys(row.view for row in rows))
        if one.view not in views:
            raise ExpectationError(f"{where}: {unknown('view', one.view, views)}")
        rows = [row for row in rows if row.view == one.view]
    return rows if one.layer is None else _at_layers(comparison.n_layers, rows, one.layer, where)


def _at_layers(
    n_layers: int, rows: Sequence[Row], layer: int | Sequence[int], where: str
) -> list[Row]:
    measured = sorted({row.layer for row in rows})
    wanted = []
    for one in [layer] if isinstance(layer, int) else layer:
        wanted.append(one + n_layers + 1 if one < 0 else one)
        if wanted[-1] not in measured:
            raise ExpectationError(
                f"{where}: layer {one} was not measured: expected some of {measured}"
            )
    return [row for row in rows if row.layer in wanted]


def _outcome(row: Row, at_least: float | None, at_most: float | None) -> str:
    form = FORMS.get(row.metric, NUMBER)
    low, high = max(row.low, form.lowest), min(row.high, form.highest)
    if math.isnan(row.low) or math.isnan(row.high):
        return CANNOT_TELL
    least = -math.inf if at_least is None else at_least
    most = math.inf if at_most is None else at_most
    if least <= low and high <= most:
        return MET
    return NOT_MET if high < least or low > most else CANNOT_TELL


def _cells(row: Mapping[str, Any]) -> list[str]:
    where = [f"{_metric(row)}, {row['view']}", str(row["layer"])]
    return [*where, _shown(row), _bounds(row), row["outcome"]]


def _metric(row: Mapping[str, Any]) -> str:
    return f"{row['probe']}.{row['metric']}"


def _shown(row: Mapping[str, Any]) -> str:
    return interval(row, FORMS.get(row["metric"], NUMBER))


def _bounds(row: Mapping[str, Any]) -> str:
    bounds = {"at least": row["at_least"], "at most": row["at_most"]}
    return listed([f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None])


def _sentence(row: Mapping[str, Any]) -> str:
    nothing = "" if math.isfinite(row["low"]) else ", without an interval"
    return (
        f"{_metric(row)} at layer {row['layer']}, {row['view']}, is {_shown(row)}{nothing}; "
        f"expected {_bounds(row)}."
    )
