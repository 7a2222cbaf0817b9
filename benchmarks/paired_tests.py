"""How often do tests find a difference where there is none? On draws from real texts.

Both models read a population of passages, and continue the first tokens of each. Texts are drawn
from it, with replacement, and made null in one of two ways: the two models' labels are swapped in
a random half of the texts, so that neither is the base; or the population's own difference is taken
away from every text, which leaves real texts' skew. Then the package's own tests compare the two.

    python benchmarks/paired_tests.py BASE TUNED TEXTS... [--sizes 5 10 20 40 100] [--trials 400]

Prints a table in Markdown: the share of draws with p < 0.05.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from coverage import PAIRED, PROMPT_TOKENS, SIDES, VIEWS, Population, arguments, passages

from hyperlens.decoding.diversity import MEASURES
from hyperlens.decoding.generate import GenerationRunner
from hyperlens.pair import open_pair
from hyperlens.statistics import significance
from hyperlens.statistics.ratios import resampled_estimate, share_of_texts, weighted_ratio
from hyperlens.statistics.shares import p_value, ratio

NEW_TOKENS, BATCH_SIZE = 48, 100
WRITTEN = {"greedy": False, "sampled": True}
# Windows of 50 tokens are longer than the continuations.
MEASURED = ("ttr", "rep_2", "loop")
# What `measure_behaviour`, `match_temperature` and `first_divergence` print, in this order.
TESTS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "paired t": significance.paired_p,
    "Welch": significance.welch_p,
    "signs swapped": lambda tuned, base: significance.sign_flip_p(tuned - base),
}
SWAPPED, CENTRED = NULLS = ("labels swapped", "difference taken away")


class Written:
    """What both models write after the passages' first tokens: a number per passage and measure."""

    def __init__(self, base: str, tuned: str, prompts: list[list[int]]) -> None:
        pair = open_pair(base, tuned)
        self.values: dict[tuple[str, str], np.ndarray] = {}
        for how, do_sample in WRITTEN.items():
            for number, side in enumerate(SIDES):
                # Seeds differ: with the same one, equal logits would give equal texts.
                runner = GenerationRunner(prompts, NEW_TOKENS, BATCH_SIZE, number, progress=False)
                texts = runner.run(getattr(pair, side), do_sample=do_sample).tokens
                for measure in MEASURED:
                    self.values[side, f"{measure} of {how} text"] = np.array(
                        [float(MEASURES[measure](text)) for text in texts]
                    )

    @property
    def names(self) -> list[str]:
        """Of what was measured."""
        return [name for side, name in self.values if side == SIDES[0]]


def p_of_units(written: Written, chosen: np.ndarray, swap: np.ndarray, null: str) -> Iterator:
    """Tests of a number per text, by their names."""
    for name in written.names:
        base, tuned = (written.values[side, name] for side in SIDES)
        gap = 0.0 if null == SWAPPED else float((tuned - base).mean())
        base, tuned = base[chosen], tuned[chosen] - gap
        if null == SWAPPED:
            base, tuned = np.where(swap, tuned, base), np.where(swap, base, tuned)
        for test, p in TESTS.items():
            # Swapped, the two sides are no two independent samples: high where the other is low.
            if test == "Welch" and null == SWAPPED:
                continue
            if test == "paired t" or name.startswith("ttr"):
                yield f"{test}, {name}", p(tuned, base)


def p_of_sums(population: Population, chosen: np.ndarray, swap: np.ndarray, null: str) -> Iterator:
    """Tests of a change of a mean over tokens, which patching and trajectories print."""
    n = np.array(population.n)
    for name, within in PAIRED.items():
        base, tuned = (np.array(population.paired[side, name]) for side in SIDES)
        gap = tuned - base
        if null == CENTRED:
            gap = gap - gap.sum() / n.sum() * n
        y = gap[chosen] * np.where(swap & (null == SWAPPED), -1.0, 1.0)
        found = ratio(torch.from_numpy(y), torch.from_numpy(n[chosen]), within=within)
        yield f"mean over tokens, {name}", p_value(found)


def p_of_dimensions(
    population: Population, chosen: np.ndarray, swap: np.ndarray, seed: int
) -> Iterator:
    """The test of a change of a participation ratio, which trajectories print; labels swapped.

    With the difference taken away it finds one where the interval of ΔPR misses the truth:
    `coverage.py` counts that.
    """
    for view in VIEWS:
        base, tuned = (population.vectors[side, view] for side in SIDES)
        both = [
            population.ratio_of(
                [(other if away else one)[i] for i, away in zip(chosen, swap, strict=True)], seed
            )
            for one, other in ((base, tuned), (tuned, base))
        ]
        change = weighted_ratio([(1.0, both[1]), (-1.0, both[0])])
        found = resampled_estimate(change.value, change.draws, share_of_texts(change))
        yield f"ΔPR, {view}", p_value(found)


def main() -> None:
    args = arguments(__doc__.split("\n", 1)[0])
    drawn = passages(args.texts, args.passages, seed=0)
    population = Population(args.base, args.tuned, drawn, args.length)
    written = Written(args.base, args.tuned, population.prompts)
    rng = np.random.default_rng(2)
    shares: dict[tuple[str, str], list[float]] = {}
    for size in args.sizes:
        below: dict[tuple[str, str], list[bool]] = {}
        for trial in range(args.trials):
            chosen, swap = rng.integers(0, len(drawn), size), rng.random(size) < 0.5
            for null in NULLS:
                found = [
                    *p_of_units(written, chosen, swap, null),
                    *p_of_sums(population, chosen, swap, null),
                ]
                if null == SWAPPED:
                    found += p_of_dimensions(population, chosen, swap, trial)
                for name, p in found:
                    below.setdefault((name, null), []).append(p < 0.05)
        for key, hits in below.items():
            shares.setdefault(key, []).append(float(np.mean(hits)))
    error = (0.05 * 0.95 / args.trials) ** 0.5
    print(f"{len(drawn)} passages, continued by {NEW_TOKENS} tokens from {PROMPT_TOKENS} and BOS;")
    print(f"{args.trials} draws each, the standard error of a share of 5% is {error:.1%}.\n")
    print("| p < 0.05 in null draws | null |", " | ".join(f"{n} texts" for n in args.sizes), "|")
    print("|---" * (2 + len(args.sizes)) + "|")
    for (name, null), of_sizes in sorted(shares.items()):
        print(f"| {name} | {null} | {' | '.join(f'{share:.1%}' for share in of_sizes)} |")


if __name__ == "__main__":
    main()
