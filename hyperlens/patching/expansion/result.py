"""Whether the expansion causes the reordering, as a result: its words and its figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...render.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, NotebookFigure, plain_frame
from ...results.result import Result
from ..outcomes import RENAMED
from ..wording import share_of, signed_share
from .changes import ADDING, REMOVING, VARIANCE_CONTROL, side_of
from .verdict import RULES

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

NAMES = {
    "base_directions": "kept to the base model's first directions",
    "new_directions": "rid of the directions that grew most",
    "base_spectrum": "given the base model's spectrum",
    "tuned_spectrum": "given the tuned model's spectrum",
    "tuned_covariance": "given the tuned model's covariance",
}
COUNTED = {"base_directions": "kept", "new_directions": "removed"}
CONDITIONS = {
    "same_dimension": "random directions, as many",
    "same_variance": "random directions, as much variance",
    "shuffled_gains": "the same gains dealt at random",
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
    "Only affine changes of the last block's output about its mean were tried, fitted on some "
    "texts and read on others. What spreads over directions only within some contexts is not "
    "touched by them."
)
WIDTH = 98


@dataclass(frozen=True)
class ExpansionResult(Result):
    """What is decided and generated once the expansion is taken away, or brought about.

    The table has a row per method (see `hyperlens.patching.expansion.changes`; "none" for the
    models as they are), number of directions (0 where the whole spectrum changes), condition
    ("itself" or a control, the mean over its random draws) and metric: those of
    `hyperlens.patching.outcomes.METRICS`, TTR, rep-2 and rep-3 of greedy text, and, without
    intervals, `dimension` (participation ratio, naive, where decisions are read),
    `dimension_fitted` (where directions are fitted) and `variance` (the share that is left).

    Extras: the `verdict` and its `evidence`, whose intervals hold together; `contrasts`, each
    method less a control, paired, p corrected over the numbers of directions (Holm); `draws`, every
    random draw; `dimension`, the participation ratios of both models with intervals; `naive`, those
    of each half; `matched` numbers of directions; how many `texts` and `tokens` each half has, how
    many `decisions` are read, and how many of them tuning `changed`.
    """

    name = "patch_expansion"
    title = "Is it the extra dimensions?"
    old_names: ClassVar[tuple[str, ...]] = ("expansion",)
    renamed: ClassVar[Mapping[str, str]] = {
        **RENAMED,
        "way": "method",
        "ways": "methods",
        "dose": "n_directions",
        "doses": "n_directions",
        "arm": "condition",
        "whole": "overall",
        "dealt_gains": "shuffled_gains",
        "untouched": "unchanged",
    }
    columns = ("method", "n_directions", "condition", "metric", "value", "low", "high", "se", "n")

    def sizes(self, method: str) -> list[int]:
        """The numbers of directions of a method, in order."""
        return sorted({row["n_directions"] for row in self.table if row["method"] == method})

    def judged(self, method: str) -> int | None:
        """The number of directions that the verdict looks at; None if none undoes the expansion."""
        size: int | None = self.extras["matched"].get(method, 0)
        return size

    def row(self, method: str, size: int, condition: str, metric: str) -> Mapping[str, Any] | None:
        """One row; None if it was not measured."""
        found = self.rows(method=method, n_directions=size, condition=condition, metric=metric)
        return found[0] if found else None

    def value_of(self, method: str, size: int, condition: str, metric: str) -> float:
        """The value of one row; NaN if it was not measured."""
        row = self.row(method, size, condition, metric)
        return math.nan if row is None else float(row["value"])

    def contrast(
        self, method: str, size: int, against: str, metric: str
    ) -> Mapping[str, Any] | None:
        """A method less a control; None if it was not measured."""
        wanted = {"method": method, "n_directions": size, "against": against, "metric": metric}
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
        sentences = [
            f"Tuning changed {changed:,} of {self.extras['decisions']:,} decisions "
            f"({changed / self.extras['decisions']:.1%}); shares are of these.",
            self._of_the_dimension(),
        ]
        if verdict["expansion"] is not False:
            sentences += [self._of_claim("needed", REMOVING), self._of_claim("enough", ADDING)]
        return [*sentences, *self._of_generation(), f"This {WHOLE[verdict['overall']]}"]

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

    def _of_claim(self, claim: str, methods: tuple[str, ...]) -> str:
        what = {
            "needed": "Is the expansion needed? Taken away from the tuned model",
            "enough": "Is it enough? Brought about in the base model",
        }[claim]
        sentences = "; ".join(text for method in methods if (text := self._of_method(method)))
        answer = self.extras["verdict"][claim]
        return f"{what}, {sentences or 'it cannot be'}. That it is {claim}: {answer}."

    def _of_method(self, method: str) -> str:
        """What a method did; empty if it does not count."""
        size, answer = self.judged(method), self.extras["verdict"]["methods"][method]
        if size is None or answer is None:
            return ""
        count = f" ({size} {COUNTED[method]})" if method in COUNTED else ""
        shares = []
        for name, effect in self.extras["evidence"][method]["effects"].items():
            metric = "to_base" if name == "returned" else "to_tuned"
            values = [
                self.value_of(method, size, condition, metric)
                for condition in ("itself", VARIANCE_CONTROL[method])
            ]
            own, other = (1 - value if name == "lost" else value for value in values)
            shares.append(
                f"{own:.1%} are {EFFECTS[name]} (control {other:.1%}, difference "
                f"{signed_share(effect)} points)"
            )
        effects = self.extras["evidence"][method]["effects"].values()
        if answer == "contradicted" and any(effect["low"] > 0 for effect in effects):
            answer += " (there is an effect, too small to be of interest)"
        return f"{NAMES[method]}{count}: {' and '.join(shares)}, {answer}"

    def _of_generation(self) -> Iterator[str]:
        own = {side: self.value_of("none", 0, side, "ttr") for side in ("base", "tuned")}
        if not all(map(math.isfinite, own.values())):
            return
        parts = []
        for method in NAMES:
            size = self.judged(method)
            row = None if size is None else self.row(method, size, "itself", "ttr")
            if row is not None and size is not None:
                control = self.value_of(method, size, VARIANCE_CONTROL[method], "ttr")
                side = side_of(method)
                parts.append(
                    f"the {side} model {NAMES[method]} {row['value']:.3f} [{row['low']:.3f}, "
                    f"{row['high']:.3f}] (control {control:.3f})"
                )
        yield (
            f"Type-token ratio of greedy text: base {own['base']:.3f}, tuned {own['tuned']:.3f}; "
            f"{'; '.join(parts)}."
        )

    def summary(self) -> str:
        """The sizes, what is decided and generated, the verdict and its rules."""
        texts, options = self.extras["texts"], self.meta["options"]
        lines = [
            f"Is it the extra dimensions?  {self.meta['base']['name']} → "
            f"{self.meta['tuned']['name']}",
            f"directions fitted on {texts['fitted']} texts, decisions read on {texts['read']} "
            f"others; controls: the mean of {options['n_random']} random draws",
            "",
        ]
        for method in NAMES:
            lines += self._block(method)
        lines += ["* the number that just undoes the expansion; the verdict looks at it", ""]
        lines += [line for text in self.conclusions() for line in _wrapped(text)]
        lines += ["", *_wrapped(f"Rules, smallest effect {options['smallest_effect']:g}: {RULES}")]
        lines += _wrapped(SCOPE)
        lines += [line for note in self.meta["notes"] for line in _wrapped(f"note: {note}")]
        return "\n".join(lines)

    def _block(self, method: str) -> list[str]:
        side = side_of(method)
        control = VARIANCE_CONTROL[method]
        lines = [
            f"the {side} model {NAMES[method]}",
            f"{COUNTED.get(method, ''):>8}{'dimension':>11}"
            f"{'tuned model’s [95%]':>24}{'control':>9}"
            f"{'base model’s [95%]':>24}{'control':>9}{'TTR':>8}{'control':>9}",
        ]
        for size in self.sizes(method):
            mark = "*" if method in COUNTED and size == self.judged(method) else " "
            cells = f"{size if method in COUNTED else '':>7}{mark}"
            cells += f"{self.value_of(method, size, 'itself', 'dimension'):>11.1f}"
            for metric in ("to_tuned", "to_base"):
                (row,) = self.rows(
                    method=method, n_directions=size, condition="itself", metric=metric
                )
                cells += (
                    f"{share_of(row):>24}{percent(self.value_of(method, size, control, metric)):>9}"
                )
            ttr = [
                self.value_of(method, size, condition, "ttr") for condition in ("itself", control)
            ]
            if math.isfinite(ttr[0]):
                cells += f"{ttr[0]:>8.3f}{ttr[1]:>9.3f}"
            lines.append(cells)
        return [*lines, ""]

    def plot(self) -> matplotlib.figure.Figure:  # type: ignore[override]
        """Decisions over the dimension that is left or made, and generated text."""
        return draw(self)


def percent(value: float) -> str:
    """A share without an interval."""
    return f"{value:.1%}" if math.isfinite(value) else "n/a"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH)


# The figure


STYLES = {
    "base_directions": (BLUE, "o"),
    "new_directions": (VERMILION, "s"),
    "base_spectrum": (GREEN, "D"),
    "tuned_spectrum": (ORANGE, "^"),
    "tuned_covariance": ("#CC79A7", "v"),
}


def draw(result: Any) -> matplotlib.figure.Figure:
    """Changed decisions over the dimension that is left or made, and diversity of greedy text."""
    has_text = math.isfinite(result.value_of("none", 0, "base", "ttr"))
    panels = [("A  The tuned model, its expansion taken away", REMOVING, "to_tuned"),
              ("B  The base model, expanded", ADDING, "to_tuned")]  # fmt: skip
    panels += [("C  Diversity of greedy text", tuple(NAMES), "ttr")] if has_text else []
    figure = NotebookFigure(figsize=(4.6 * len(panels), 5.2), layout="constrained")
    figure.suptitle(
        f"{result.meta['base']['name']} → {result.meta['tuned']['name']}",
        fontsize=12,
        fontweight="bold",
        parse_math=False,
    )
    for axes, (title, methods, metric) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        axes.set_title(title, loc="left", fontsize=10)
        for method in methods:
            _draw_method(axes, result, method, metric)
        _draw_models(axes, result, metric)
        axes.set_xlabel("dimension of the last block's output\n(participation ratio, naive)")
        plain_frame(axes)
    figure.axes[0].set_ylabel("changed decisions that are the tuned model's (share)")
    if has_text:
        figure.axes[2].set_ylabel("type-token ratio")
    named: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(named.values()),
        list(named),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    return figure


def _draw_method(axes: Axes, result: Any, method: str, metric: str) -> None:
    """The method itself, filled, with intervals, and its control, hollow, at the same sizes."""
    colour, mark = STYLES[method]
    for condition, filled in (("itself", True), (VARIANCE_CONTROL[method], False)):
        rows = [
            (result.value_of(method, size, condition, "dimension"), row)
            for size in result.sizes(method)
            if (row := result.row(method, size, condition, metric)) is not None
        ]
        if not rows:
            continue
        x, y = [at for at, _ in rows], [row["value"] for _, row in rows]
        spread = [[max(0.0, row["value"] - row["low"]) for _, row in rows],
                  [max(0.0, row["high"] - row["value"]) for _, row in rows]]  # fmt: skip
        axes.errorbar(
            x, y, yerr=spread if filled else None, color=colour, marker=mark, ms=5, lw=1.2,
            ls="-" if filled else ":", mfc=colour if filled else "white", capsize=2,
            label=NAMES[method] if filled else None,
        )  # fmt: skip


def _draw_models(axes: Axes, result: Any, metric: str) -> None:
    for side, style in (("base", "--"), ("tuned", "-.")):
        at = result.value_of("none", 0, side, "dimension")
        value = result.value_of("none", 0, side, metric)
        axes.axvline(at, color=GREY, ls=style, lw=0.8)
        axes.plot([at], [value], marker="*", ms=12, color="black", ls=style,
                  label=f"the {side} model as it is")  # fmt: skip
    axes.plot([], [], color=GREY, marker="o", mfc="white", ls=":", label="hollow: the control")
