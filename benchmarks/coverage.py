"""How often do 95% intervals hold the truth? On draws from real texts, as many as people have.

A population of passages is read once by a base and a tuned model. Its own statistics are the truth;
then texts are drawn from it, with replacement, and every interval that the package prints of such
statistics is made from the draw alone, by the package's own functions.

    python benchmarks/coverage.py BASE TUNED TEXTS... [--sizes 5 10 20 40 100] [--trials 400]

Prints a table in Markdown: the share of trials whose interval holds the truth.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch

from hyperlens.hooks import surface
from hyperlens.pair import open_pair
from hyperlens.statistics import significance
from hyperlens.statistics.moments import moments_of
from hyperlens.statistics.ratios import (
    Ratio,
    SampledTokens,
    measured_ratio,
    ratio_ends,
    sum_ends,
    weighted_ratio,
)
from hyperlens.statistics.shares import ratio

SIDES = ("base", "tuned")
VIEWS = ("raw", "final norm")
# What patching prints: of the decisions that differ, the share that the tuned model's norm and head
# bring about, given the base's stream; its denominator is another one in each text.
PATCHED = "changed decisions that norm and head bring"
SHARES = ("top-1 agreement", "base rank ≥ 200", PATCHED)
# Measured of both models and compared: between what its change lies, if it is a share.
PAIRED = {"entropy": None, "next token is top-1": (-1.0, 1.0)}
# As a comparison has it: so many sampled tokens in all, see `stream_spec`.
SAMPLED = 3276
# What a continuation begins with, besides BOS: the default of `measure_behaviour`.
PROMPT_TOKENS = 16


class Population:
    """Passages as two models read them: last-layer vectors and per-text sums of token numbers."""

    def __init__(self, base, tuned, passages: list[str], length: int) -> None:
        pair = open_pair(base, tuned)
        self.d_model = pair.base.hooked.cfg.d_model
        self.vectors: dict[tuple[str, str], list[torch.Tensor]] = {}
        self.sums: dict[str, list[float]] = {}
        self.paired: dict[tuple[str, str], list[float]] = {}
        self.n: list[float] = []
        self.changed: list[float] = []
        self.prompts: list[list[int]] = []
        bos = pair.tokenizer.bos_token_id
        for passage in passages:
            ids = pair.tokenizer(passage, add_special_tokens=False)["input_ids"][:length]
            tokens = torch.tensor([[bos, *ids]])
            self.prompts.append([bos, *ids[:PROMPT_TOKENS]])
            mask = torch.ones_like(tokens)
            logits, streams = {}, {}
            for side in SIDES:
                model = getattr(pair, side).hooked
                with surface.evaluating(model):
                    raw = streams[side] = surface.run_residuals(model, tokens, mask)[-1][0]
                    normed = surface.final_norm(model, raw)
                    logits[side] = surface.unembed(model, normed).double()
                for view, x in (("raw", raw), ("final norm", normed)):
                    self.vectors.setdefault((side, view), []).append(x[1:].double())
            tuned = pair.tuned.hooked
            with surface.evaluating(tuned):
                moved = surface.unembed(tuned, surface.final_norm(tuned, streams["base"]))
            self._add(logits, moved, tokens[0])
        for name, texts in self.vectors.items():
            mean = torch.cat(texts).mean(0)
            self.vectors[name] = [x - mean for x in texts]

    def _add(
        self, logits: dict[str, torch.Tensor], moved: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        base, tuned = (logits[side].log_softmax(-1) for side in SIDES)
        a, b = (self.vectors[side, "raw"][-1] for side in SIDES)
        kl = (tuned.exp() * (tuned - base)).sum(-1)
        winner = tuned.argmax(-1, keepdim=True)
        rank = 1 + (base > base.gather(-1, winner)).sum(-1)
        changed = (base.argmax(-1) != tuned.argmax(-1))[1:]
        self.changed.append(float(changed.sum()))
        numbers = {
            "relative L2": ((b - a).norm(dim=-1) / a.norm(dim=-1)),
            "top-1 agreement": (base.argmax(-1) == tuned.argmax(-1)).double()[1:],
            "base rank ≥ 200": (rank >= 200).double()[1:],
            "KL": kl[1:],
            PATCHED: (changed & (moved.argmax(-1) == tuned.argmax(-1))[1:]).double(),
        }
        for name, values in numbers.items():
            self.sums.setdefault(name, []).append(float(values.sum()))
        self.n.append(float(len(a)))
        for side, log_p in zip(SIDES, (base, tuned), strict=True):
            entropy = -(log_p.exp() * log_p).sum(-1)[1:]
            is_next = log_p[:-1].argmax(-1) == tokens[1:]
            for name, values in zip(PAIRED, (entropy, is_next), strict=True):
                self.paired.setdefault((side, name), []).append(float(values.sum()))

    def counts(self, name: str) -> list[float]:
        """What a statistic is taken over, text by text."""
        return self.changed if name == PATCHED else self.n

    def truths(self) -> dict[str, float]:
        """Every statistic of the population."""
        found = {name: sum(y) / sum(self.counts(name)) for name, y in self.sums.items()}
        for name in PAIRED:
            base, tuned = (sum(self.paired[side, name]) for side in SIDES)
            found[f"change of {name}"] = (tuned - base) / sum(self.n)
        for view in VIEWS:
            for side in SIDES:
                x = torch.cat(self.vectors[side, view])
                c = x.T @ x / len(x)
                found[f"PR {side}, {view}"] = float(c.trace() ** 2 / c.square().sum())
            change = found[f"PR tuned, {view}"] - found[f"PR base, {view}"]
            found[f"ΔPR, {view}"] = change
        return found

    def intervals(self, chosen: np.ndarray, seed: int) -> dict[str, tuple[float, float]]:
        """Of every statistic, from these texts alone."""
        found = {}
        for name, sums in self.sums.items():
            counts = self.counts(name)
            n = torch.tensor([counts[i] for i in chosen], dtype=torch.float64)
            y = torch.tensor([sums[i] for i in chosen], dtype=torch.float64)
            estimate = ratio(y, n, within=(0.0, 1.0) if name in SHARES else None)
            found[name] = (estimate.low, estimate.high)
            if name == PATCHED:
                continue
            means = significance.estimate((y / n).tolist())
            found[f"{name}, mean over texts"] = (means.low, means.high)
        n = torch.tensor([self.n[i] for i in chosen], dtype=torch.float64)
        for name, within in PAIRED.items():
            base, tuned = ([self.paired[side, name][i] for i in chosen] for side in SIDES)
            gap = torch.tensor(tuned, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
            estimate = ratio(gap, n, within=within)
            found[f"change of {name}"] = (estimate.low, estimate.high)
        for view in VIEWS:
            both = [
                self.ratio_of([self.vectors[side, view][i] for i in chosen], seed) for side in SIDES
            ]
            for side, one in zip(SIDES, both, strict=True):
                found[f"PR {side}, {view}"] = ratio_ends(one, self.d_model)
            change = weighted_ratio([(1.0, both[1]), (-1.0, both[0])])
            found[f"ΔPR, {view}"] = sum_ends(change)
        return found

    def ratio_of(self, texts: list[torch.Tensor], seed: int) -> Ratio:
        """The participation ratio of these texts' vectors, as a comparison keeps and reads them."""
        longest = max(map(len, texts))
        kept = max(2, min(longest, SAMPLED // len(texts)))
        vectors = torch.zeros(len(texts), kept, self.d_model, dtype=torch.float64)
        valid = torch.zeros(len(texts), kept, dtype=torch.bool)
        generator = torch.Generator().manual_seed(seed)
        for i, x in enumerate(texts):
            drawn = torch.randperm(len(x), generator=generator)[:kept]
            vectors[i, : len(drawn)], valid[i, : len(drawn)] = x[drawn], True
        length = torch.tensor([float(len(x)) for x in texts], dtype=torch.float64)
        sample = SampledTokens(vectors, valid, length, float(length.square().sum()))
        moments = moments_of(torch.cat(texts), torch.zeros(self.d_model, dtype=torch.float64))
        return measured_ratio(moments, sample, all_sampled=True)


def passages(files: list[Path], most: int, seed: int) -> list[str]:
    """Paragraphs of some length from all files, in a random order."""
    found = []
    for file in files:
        paragraphs = re.split(r"\n\s*\n", file.read_text(encoding="utf-8"))
        found += [" ".join(p.split()) for p in paragraphs if len(p) > 150]
    order = np.random.default_rng(seed).permutation(len(found))[:most]
    return [found[i] for i in order]


def arguments(description: str) -> argparse.Namespace:
    """What to measure on, and how often."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("base")
    parser.add_argument("tuned")
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[5, 10, 20, 40, 100])
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--passages", type=int, default=1200)
    parser.add_argument("--length", type=int, default=96)
    return parser.parse_args()


def measure(
    population: Population, sizes: list[int], trials: int, seed: int = 1
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The truths, and the share of draws of each size whose interval holds them."""
    truths = population.truths()
    # A mean over texts estimates another quantity: that of a text, not of a token.
    for name, sums in population.sums.items():
        if name == PATCHED:
            continue
        truths[f"{name}, mean over texts"] = float(
            np.mean([y / n for y, n in zip(sums, population.n, strict=True)])
        )
    rng = np.random.default_rng(seed)
    held: dict[str, list[float]] = {name: [] for name in truths}
    for size in sizes:
        inside = dict.fromkeys(truths, 0)
        for trial in range(trials):
            found = population.intervals(rng.integers(0, len(population.n), size), trial)
            for name, (low, high) in found.items():
                inside[name] += low <= truths[name] <= high
        for name, count in inside.items():
            held[name].append(count / trials)
    return truths, held


def main() -> None:
    args = arguments(__doc__.split("\n", 1)[0])
    drawn = passages(args.texts, args.passages, seed=0)
    population = Population(args.base, args.tuned, drawn, args.length)
    truths, held = measure(population, args.sizes, args.trials)
    error = (0.95 * 0.05 / args.trials) ** 0.5
    print(f"{len(drawn)} passages, {int(sum(population.n)):,} tokens, {args.trials} trials each;")
    print(f"the standard error of a share of 95% is {error:.1%}.\n")
    print("| 95% interval of | truth |", " | ".join(f"{size} texts" for size in args.sizes), "|")
    print("|---" * (2 + len(args.sizes)) + "|")
    for name, shares in held.items():
        cells = " | ".join(f"{share:.1%}" for share in shares)
        print(f"| {name} | {truths[name]:.3g} | {cells} |")


if __name__ == "__main__":
    main()
