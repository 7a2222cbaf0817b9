"""What `compare --dry-run` foretells against what a run then takes, on three shapes.

    python benchmarks/plans.py [--shapes 12x256x8192x64x128,…]

A shape is blocks x d_model x vocabulary x texts x tokens of a text. CPU seconds of one thread, so
that what else the machine does counts little; memory is the peak resident size above what the
process held once both models were loaded, and what is foretold of it besides the weights. Opening
and hashing are left out of both. Each shape has its own process, which plans first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch
from compare_speed import llama_config, models, peak_bytes, processor

from hyperlens import compare_models, open_pair
from hyperlens.compare.plan import plan_comparison

SHAPES = "12x256x8192x64x128,4x256x65536x8x128,6x1024x8192x16x128"


def one_shape(args):
    """Plan and run one shape in this process, and print both as JSON."""
    torch.set_num_threads(1)
    config = llama_config(args)
    tokens = torch.randint(args.vocab, (args.texts, args.length)).tolist()
    started = time.process_time()
    planned = plan_comparison(config, config, tokens, device="cpu", clock=time.process_time)
    planning = time.process_time() - started
    base, tuned, _ = models(args)
    pair = open_pair(base, tuned)
    pair.describe()
    # What is done once in a process is not part of the work.
    compare_models(pair, [tokens[0][:8]] * 2, progress=False)
    before, started = peak_bytes(forget=True), time.process_time()
    compare_models(pair, tokens, progress=False)
    seconds = time.process_time() - started
    weights = 2 * 4 * sum(one.numel() for one in base.parameters())
    foretold = sum(part.seconds for part in planned.parts if "hashing" not in part.name)
    found = {
        "planning": planning,
        "foretold": foretold,
        "taken": seconds,
        "memory_foretold": (planned.memory - weights) / 2**20,
        "memory_taken": (peak_bytes() - before) / 2**20,
        "flops": planned.flops,
    }
    print(json.dumps(found))


def main():
    """Run every shape, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        names = ("layers", "d_model", "vocab", "texts", "length")
        sizes = dict(zip(names, map(int, args.one.split("x")), strict=True))
        one_shape(argparse.Namespace(**sizes, changed_blocks=0))
        return
    print(processor(), f"torch {torch.__version__}", sep=", ")
    print("| shape | planning | CPU s foretold | taken | ratio | MB foretold | taken | TFLOP |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in args.shapes.split(","):
        done = subprocess.run(
            [sys.executable, __file__, "--one", shape],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        one = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {shape} | {one['planning']:.1f} | {one['foretold']:.1f} | {one['taken']:.1f} "
            f"| {one['foretold'] / one['taken']:.2f} | {one['memory_foretold']:.0f} "
            f"| {one['memory_taken']:.0f} | {one['flops'] / 1e12:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
