"""How often is a change of dimension found where there is none? On many null pairs.

The pairs are the kind `two_draws` of `hyperlens validate`: random models and copies with their
tokens relabelled, read on random texts, so that no dimension differs but by the choice of texts.
Only what the verdicts on dimensions rest on is measured, a change's 95% interval at the last layer,
which takes a quarter of a second per pair: enough pairs for a rate of 5% to be told from one of 4%.

    python benchmarks/null_dimensions.py [--pairs 1000] [--seed 0]

Prints a table in Markdown: the share of pairs whose interval excludes 0, with its exact interval.
"""

from __future__ import annotations

import argparse

from hyperlens.pair import open_inputs
from hyperlens.passes.streaming import PassOptions, run_pass
from hyperlens.passes.streams import VIEWS
from hyperlens.probes import ParticipationRatio
from hyperlens.statistics.significance import clopper_pearson
from hyperlens.validation.planted import KINDS

# As the experiments have it.
MAX_LENGTH, BATCH_SIZE, SINK_THRESHOLD = 256, 48, 10.0


def excludes_zero(seed: int) -> dict[str, bool]:
    """Of one null pair, for each view: whether a change of dimension is found."""
    planted = KINDS["two_draws"].plant(seed)
    inputs = open_inputs(
        planted.base, planted.tuned, planted.texts, max_length=MAX_LENGTH, device=None, dtype=None
    )
    probe = ParticipationRatio(views=VIEWS, layers=(-1,))
    models = (inputs.pair.base.hooked, inputs.pair.tuned.hooked)
    options = PassOptions(BATCH_SIZE, SINK_THRESHOLD, seed, progress=False)
    run_pass(*models, inputs.corpus, [probe], options)
    changes = [row for row in probe.compute().rows if row.metric == "delta"]
    return {row.view: row.low > 0 or row.high < 0 for row in changes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first pair")
    args = parser.parse_args()
    alarms = dict.fromkeys(VIEWS, 0)
    for seed in range(args.seed, args.seed + args.pairs):
        for view, found in excludes_zero(seed).items():
            alarms[view] += found
    print("| change of dimension, last layer | false alarms |")
    print("|---|---|")
    for view, hits in alarms.items():
        low, high = clopper_pearson(hits, args.pairs)
        share = f"{hits / args.pairs:.1%} [{low:.1%}, {high:.1%}]"
        print(f"| {view} | {hits} of {args.pairs}: {share} |")


if __name__ == "__main__":
    main()
