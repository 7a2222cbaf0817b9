"""How often experiments claim what is not there, and name what is: shares with exact intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from ..render.blocks import Axis, Block, Chart, Details, Role, Table, Text, Verdict
from ..render.format import PERCENT, count, interval, listed
from ..results.result import Result
from ..statistics.significance import clopper_pearson

RIGHT, WRONG, UNDECIDED, OPEN = "right", "wrong", "undecided", "open"
LEVEL = 0.05
"""More false alarms than this are too many."""

Row = Mapping[str, Any]


class Share(NamedTuple):
    """How many of how many, with an exact 95% interval."""

    hits: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share; NaN of none."""
        return self.hits / self.n if self.n else float("nan")

    def __str__(self) -> str:
        row = {"value": self.value, "low": self.low, "high": self.high}
        return f"{self.hits} of {self.n:,}: {interval(row, PERCENT)}" if self.n else ""


def share_of(rows: Sequence[bool]) -> Share:
    """The share that is true.

    >>> str(share_of([True, False]))
    '1 of 2: 50.0% [1.3%, 98.7%]'
    """
    hits = sum(rows)
    return Share(hits, len(rows), *clopper_pearson(hits, len(rows)))


class ValidationResult(Result):
    """What every experiment said of every planted pair.

    The table has a row per kind of pair, number of the pair and verdict: its answer, whether there
    was a truth to name (`due`), and the outcome: "right" names what was planted, "wrong" is false
    of it (a false alarm), "undecided" is any other answer where something was to be named (a miss)
    or something false could have been said; "open" is an answer that could go either way.

    Extras: `contradictions`, the pairs of verdicts on one pair that cannot both be true; `kinds`,
    what was planted, in words; `nulls`, the kinds where nothing was.
    """

    name: ClassVar[str] = "validation"
    title: ClassVar[str] = "Do the experiments name what was planted?"
    columns: ClassVar[tuple[str, ...]] = ("kind", "pair", "verdict", "answer", "outcome", "due")

    @property
    def kinds(self) -> list[str]:
        """The kinds of planted pair, in order."""
        return list(dict.fromkeys(row["kind"] for row in self.table))

    @property
    def nulls(self) -> list[str]:
        """The kinds where nothing was planted."""
        return [kind for kind in self.kinds if kind in self.extras["nulls"]]

    @property
    def n_pairs(self) -> int:
        """How many pairs were planted."""
        return len({(row["kind"], row["pair"]) for row in self.table})

    def false_alarms(self, kind: str, verdict: str | None = None) -> Share:
        """In how many pairs of a kind a verdict is false of it; without one, in how many any is.

        Only pairs count in which something false could have been said.
        """
        rows = [row for row in self.rows(kind=kind) if row["outcome"] != OPEN]
        return _of_pairs(rows, verdict, lambda found: any(one == WRONG for one in found))

    def detections(self, kind: str, verdict: str | None = None) -> Share:
        """In how many pairs of a kind a verdict names the truth; without one, in how many all do.

        Only verdicts count that had something to name.
        """
        rows = self.rows(kind=kind, due=True)
        return _of_pairs(rows, verdict, lambda found: all(one == RIGHT for one in found))

    def verdicts_of(self, kind: str) -> list[str]:
        """The verdicts of which something is known for a kind."""
        rows = self.rows(kind=kind)
        return list(dict.fromkeys(row["verdict"] for row in rows if row["outcome"] != OPEN))

    def verdicts(self) -> list[Verdict]:
        """False alarms on nulls, truths that were named, verdicts that contradict each other."""
        found = []
        if self.nulls:
            found.append(Verdict("false alarms", self._of_nulls()))
        if len(self.nulls) < len(self.kinds):
            found.append(Verdict("planted truths", self._of_planted()))
        return [
            *found,
            Verdict("contradictions", self._of_contradictions()),
            Verdict(
                "reach",
                "Small random models with constructed changes: that a verdict is right here shows "
                "that its rule does what it says, not that it is right about large models.",
                caution=True,
            ),
        ]

    def _of_nulls(self) -> str:
        families = [(self.false_alarms(kind, verdict), verdict, kind)
                    for kind in self.nulls for verdict in self.verdicts_of(kind)]  # fmt: skip
        families.sort(key=lambda one: -one[0].value)
        named = [f"{verdict} ({kind}, {share})" for share, verdict, kind in families]
        sure = [words for words, (share, *_) in zip(named, families, strict=True)
                if share.low > LEVEL]  # fmt: skip
        unsure = [words for words, (share, *_) in zip(named, families, strict=True)
                  if share.value > LEVEL >= share.low]  # fmt: skip
        n = count(len(families), "verdict")
        if sure:
            found = f"more than 5% of pairs have an alarm, by the lower bound, in {listed(sure)}"
        else:
            found = "none has alarms in more than 5% of pairs by its lower bound"
        if unsure:
            found += f"; above 5%, but not told from it: {listed(unsure)}"
        elif not sure:
            found += f"; most: {named[0]}" if families[0][0].hits else "; none has any at all"
        return f"Of {n} on null pairs, {found}."

    def _of_planted(self) -> str:
        kinds = [kind for kind in self.kinds if kind not in self.nulls]
        named = [self.detections(kind) for kind in kinds]
        false = [self.false_alarms(kind) for kind in kinds]
        n = sum(one.n for one in named)
        some = [kind for kind, one in zip(kinds, false, strict=True) if one.hits]
        where = f" ({listed(some)})" if some else ""
        missed = [kind for kind, one in zip(kinds, named, strict=True) if one.hits < one.n]
        miss = f" (not in all of {listed(missed)})" if missed else ""
        return (
            f"Of {count(n, 'planted pair')} of {count(len(kinds), 'kind')}, every verdict that had "
            f"a truth to name named it in {sum(one.hits for one in named)}{miss}; something false "
            f"was said in {sum(one.hits for one in false)}{where}."
        )

    def _of_contradictions(self) -> str:
        found = self.extras["contradictions"]
        pairs = {(one["kind"], one["pair"]) for one in found}
        if not pairs:
            return (
                f"On none of {count(self.n_pairs, 'pair')} do two verdicts contradict each other."
            )
        words = Counter(f"{one['words']} ({one['kind']})" for one in found)
        most = ", ".join(f"{text}, {n}" for text, n in words.most_common(3))
        return f"On {len(pairs)} of {self.n_pairs} pairs verdicts contradict each other: {most}."

    def evidence(self) -> list[Block]:
        """False alarms by verdict, planted truths by kind, and every answer."""
        blocks: list[Block] = [
            Text(
                "Each pair is a small random model and a copy with one known change. Every "
                "experiment is run on it, and what the words of its verdicts say is held against "
                "what was planted. Intervals are exact (Clopper and Pearson)."
            )
        ]
        if self.nulls:
            blocks += [self._null_table(), self._null_chart()]
        if len(self.nulls) < len(self.kinds):
            blocks.append(self._planted_table())
        if self.extras["contradictions"]:
            blocks.append(self._contradiction_table())
        return [*blocks, Details("every verdict", [self._answer_table()])]

    def _null_table(self) -> Table:
        rows = [
            [f"{verdict} ({kind})", str(self.false_alarms(kind, verdict))]
            for kind in self.nulls
            for verdict in self.verdicts_of(kind)
        ]
        planted = "; ".join(f"{kind}: {self.extras['kinds'][kind]}" for kind in self.nulls)
        return Table(["verdict on null pairs", "false alarms"], rows, planted)

    def _null_chart(self) -> Chart:
        rows = [
            {"series": kind, "verdict": verdict, "value": share.value, "low": share.low,
             "high": share.high, "pairs": share.n}
            for kind in self.nulls
            for verdict in self.verdicts_of(kind)
            for share in [self.false_alarms(kind, verdict)]
        ]  # fmt: skip
        title = "False alarms on null pairs, exact 95% intervals"
        roles: dict[str, Role] = dict.fromkeys(self.nulls, "other")
        x, y = Axis("value", "share of pairs", "zero"), Axis("verdict", "", is_category=True)
        return Chart("dots", title, title, rows, x, y, roles)

    def _planted_table(self) -> Table:
        rows = [
            [
                self.extras["kinds"][kind],
                str(self.detections(kind)),
                str(self.false_alarms(kind)),
                "; ".join(self._missed(kind)),
            ]
            for kind in self.kinds
            if kind not in self.nulls
        ]
        caption = (
            "named: pairs in which every verdict that had something to name named it; false: in "
            "which any verdict says what is false of the pair"
        )
        return Table(["planted", "named", "false", "otherwise said (pairs)"], rows, caption)

    def _missed(self, kind: str) -> Iterator[str]:
        """Answers that did not name the truth, by how often they were given."""
        found = Counter(
            f"{row['verdict']}: {row['answer']}"
            for row in self.rows(kind=kind)
            if row["outcome"] == WRONG or (row["outcome"] == UNDECIDED and row["due"])
        )
        for words, n in found.most_common():
            yield f"{words} ({n})"

    def _contradiction_table(self) -> Table:
        words = Counter((one["words"], one["kind"]) for one in self.extras["contradictions"])
        rows = [[text, kind, str(n)] for (text, kind), n in words.most_common()]
        return Table(["verdicts that contradict each other", "planted", "pairs"], rows)

    def _answer_table(self) -> Table:
        found = Counter(
            (row["kind"], row["verdict"], row["answer"], row["outcome"]) for row in self.table
        )
        rows = [[kind, verdict, answer, outcome, str(n)]
                for (kind, verdict, answer, outcome), n in found.items()]  # fmt: skip
        return Table(["planted", "verdict", "answer", "outcome", "pairs"], rows)


def _of_pairs(rows: Sequence[Row], verdict: str | None, holds: Any) -> Share:
    """The share of pairs of which something holds, given the outcomes of their verdicts."""
    by_pair: dict[int, list[str]] = {}
    for row in rows:
        if verdict in (None, row["verdict"]):
            by_pair.setdefault(row["pair"], []).append(row["outcome"])
    return share_of([bool(holds(found)) for found in by_pair.values()])
