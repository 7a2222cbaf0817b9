"""Whether the expansion causes the reordering, as a result: its words, its figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...results.result import Result
from ..wording import share_of, signed_share
from .interventions import ADDING, REMOVING, VARIANCE_CONTROL, side_of
from .verdict import RULES

if TYPE_CHECKING:
    import matplotlib.figure

NAMES = {
    "base_directions": "kept to the base model's first directions",
    "new_directions": "rid of the directions that grew most",
    "base_spectrum": "given the base model's spectrum",
    "tuned_spectrum": "given the tuned model's spectrum",
    "tuned_covariance": "given the tuned model's covariance",
}
DOSES = {"base_directions": "kept", "new_directions": "removed"}
ARMS = {
    "same_dimension": "random directions, as many",
    "same_variance": "random directions, as much variance",
    "dealt_gains": "the same gains dealt at random",
}
EFFECTS = {
    "lost": "no longer the tuned model's",
    "returned": "the base model's again",
    "brought": "the tuned model's",
}
WHOLE = {
    "supports": "SUPPORTS that the expansion causes the reordering.",
    "contradicts": "CONTRADICTS that the expansion causes the reordering.",
    "cannot tell": "CANNOT TELL whether the expansion causes the reordering.",
}
SCOPE = (
    "Tried are affine changes of the last block's output about its mean, fitted on some texts and "
    "read on others. What spreads over directions only within some contexts is not touched by them."
)
WIDTH = 98


@dataclass(frozen=True)
class ExpansionResult(Result):
    """What is decided and written once the expansion is taken away, or brought about.

    The table has a row per way (see `hyperlens.patching.expansion.interventions`; "none" for the
    models as they are), dose, arm ("itself" or a control, the mean over its random draws) and
    metric: those of `hyperlens.patching.outcomes.METRICS`, TTR, rep-2 and rep-3 of greedy
    continuations, and, without intervals, `dimension` (participation ratio, naive, where
    decisions are read), `dimension_fitted` (where directions are fitted) and `variance` (the
    share that is left).

    Extras: the `verdict` and its `evidence`, whose intervals hold together; `contrasts`, each way
    less a control, paired, p corrected over the doses (Holm); `draws`, every random draw;
    `dimension`, the participation ratios of both models with intervals; `naive`, those of each
    half; `matched` doses; how many `texts` and `tokens` each half has, how many `decisions` are
    read, and how many of them tuning `changed`.
    """

    name = "expansion"
    columns = ("way", "dose", "arm", "metric", "value", "low", "high", "se", "n")

    def doses(self, way: str) -> list[int]:
        """The doses of a way, in order."""
        return sorted({row["dose"] for row in self.table if row["way"] == way})

    def judged(self, way: str) -> int | None:
        """The dose that the verdict looks at; None if the way cannot take the expansion away."""
        dose: int | None = self.extras["matched"].get(way, 0)
        return dose

    def at(self, way: str, dose: int, arm: str, metric: str) -> Mapping[str, Any] | None:
        """One row; None if it was not measured."""
        found = self.select(way=way, dose=dose, arm=arm, metric=metric)
        return found[0] if found else None

    def value(self, way: str, dose: int, arm: str, metric: str) -> float:
        """The value of one row; NaN if it was not measured."""
        row = self.at(way, dose, arm, metric)
        return math.nan if row is None else float(row["value"])

    def contrast(self, way: str, dose: int, against: str, metric: str) -> Mapping[str, Any] | None:
        """A way less a control; None if it was not measured."""
        wanted = {"way": way, "dose": dose, "against": against, "metric": metric}
        found = [c for c in self.extras["contrasts"] if wanted.items() <= c.items()]
        return found[0] if found else None

    def conclusions(self) -> list[str]:
        """What the intervals allow to say, sentence by sentence."""
        verdict, changed = self.extras["verdict"], self.extras["changed"]
        if not changed:
            return [
                "No change: tuning changed no decision on these texts, so there is nothing to be "
                "caused.",
                f"This {WHOLE['cannot tell']}",
            ]
        said = [
            f"Tuning changed {changed:,} of {self.extras['decisions']:,} decisions "
            f"({changed / self.extras['decisions']:.1%}); shares are of these.",
            self._of_the_dimension(),
        ]
        if verdict["expansion"] is not False:
            said += [self._of_claim("needed", REMOVING), self._of_claim("enough", ADDING)]
        return [*said, *self._of_writing(), f"This {WHOLE[verdict['whole']]}"]

    def _of_the_dimension(self) -> str:
        base, tuned, change = (self.extras["dimension"][key] for key in ("base", "tuned", "delta"))
        text = (
            f"The last block's raw outputs spread over {base['value']:.1f} dimensions in the base "
            f"model and {tuned['value']:.1f} in the tuned one ({change['value']:+.1f} "
            f"[{change['low']:+.1f}, {change['high']:+.1f}])"
        )
        return (
            text
            + {
                True: ".",
                False: ": there is no expansion, so it cannot be the cause.",
                None: ": whether there is an expansion cannot be told.",
            }[self.extras["verdict"]["expansion"]]
        )

    def _of_claim(self, claim: str, ways: tuple[str, ...]) -> str:
        what = {
            "needed": "Is the expansion needed? Taken away from the tuned model",
            "enough": "Is it enough? Brought about in the base model",
        }[claim]
        said = "; ".join(text for way in ways if (text := self._of_way(way)))
        answer = self.extras["verdict"][claim]
        return f"{what}, {said or 'it cannot be'}. That it is {claim}: {answer}."

    def _of_way(self, way: str) -> str:
        """What a way did; empty if it does not count."""
        dose, answer = self.judged(way), self.extras["verdict"]["ways"][way]
        if dose is None or answer is None:
            return ""
        count = f" ({dose} {DOSES[way]})" if way in DOSES else ""
        shares = []
        for name, effect in self.extras["evidence"][way]["effects"].items():
            metric = "to_base" if name == "returned" else "to_tuned"
            values = [
                self.value(way, dose, arm, metric) for arm in ("itself", VARIANCE_CONTROL[way])
            ]
            own, other = (1 - value if name == "lost" else value for value in values)
            shares.append(
                f"{own:.1%} are {EFFECTS[name]} (control {other:.1%}, difference "
                f"{signed_share(effect)} points)"
            )
        effects = self.extras["evidence"][way]["effects"].values()
        if answer == "contradicted" and any(effect["low"] > 0 for effect in effects):
            answer += " (there is an effect, too small to be of interest)"
        return f"{NAMES[way]}{count}: {' and '.join(shares)}, {answer}"

    def _of_writing(self) -> Iterator[str]:
        own = {side: self.value("none", 0, side, "ttr") for side in ("base", "tuned")}
        if not all(map(math.isfinite, own.values())):
            return
        parts = []
        for way in NAMES:
            dose = self.judged(way)
            row = None if dose is None else self.at(way, dose, "itself", "ttr")
            if row is not None and dose is not None:
                control = self.value(way, dose, VARIANCE_CONTROL[way], "ttr")
                side = side_of(way)
                parts.append(
                    f"the {side} model {NAMES[way]} {row['value']:.3f} [{row['low']:.3f}, "
                    f"{row['high']:.3f}] (control {control:.3f})"
                )
        yield (
            f"Type-token ratio of greedy text: base {own['base']:.3f}, tuned {own['tuned']:.3f}; "
            f"{'; '.join(parts)}."
        )

    def summary(self) -> str:
        """The doses, what is decided and written, the verdict and its rules."""
        texts, options = self.extras["texts"], self.meta["options"]
        lines = [
            f"Is it the extra dimensions?  {self.meta['base']['name']} → "
            f"{self.meta['tuned']['name']}",
            f"directions fitted on {texts['fitted']} texts, decisions read on {texts['read']} "
            f"others; controls: the mean of {options['n_random']} random draws",
            "",
        ]
        for way in NAMES:
            lines += self._block(way)
        lines += ["* the dose that just undoes the expansion; the verdict looks at it", ""]
        lines += [line for text in self.conclusions() for line in _wrapped(text)]
        lines += ["", *_wrapped(f"Rules, smallest effect {options['smallest_effect']:g}: {RULES}")]
        lines += _wrapped(SCOPE)
        lines += [line for note in self.meta["notes"] for line in _wrapped(f"note: {note}")]
        return "\n".join(lines)

    def _block(self, way: str) -> list[str]:
        side = side_of(way)
        control = VARIANCE_CONTROL[way]
        lines = [
            f"the {side} model {NAMES[way]}",
            f"{DOSES.get(way, ''):>8}{'dimension':>11}{'tuned model’s [95%]':>24}{'control':>9}"
            f"{'base model’s [95%]':>24}{'control':>9}{'TTR':>8}{'control':>9}",
        ]
        for dose in self.doses(way):
            mark = "*" if way in DOSES and dose == self.judged(way) else " "
            cells = f"{dose if way in DOSES else '':>7}{mark}"
            cells += f"{self.value(way, dose, 'itself', 'dimension'):>11.1f}"
            for metric in ("to_tuned", "to_base"):
                (row,) = self.select(way=way, dose=dose, arm="itself", metric=metric)
                cells += f"{share_of(row):>24}{percent(self.value(way, dose, control, metric)):>9}"
            ttr = [self.value(way, dose, arm, "ttr") for arm in ("itself", control)]
            if math.isfinite(ttr[0]):
                cells += f"{ttr[0]:>8.3f}{ttr[1]:>9.3f}"
            lines.append(cells)
        return [*lines, ""]

    def plot(self) -> matplotlib.figure.Figure:
        """Decisions over the dimension that is left or made, and what is written."""
        from .plot import draw

        return draw(self)


def percent(value: float) -> str:
    """A share without an interval."""
    return f"{value:.1%}" if math.isfinite(value) else "n/a"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH)
