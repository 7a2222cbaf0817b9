"""compare_models in several processes that share the texts, against one: seconds, differences.

    python benchmarks/several_processes.py [--processes 1,2,4 --rounds 3 --texts 128 …]

Each process has one thread. Two random Llamas; the time is that of reading and of intervals, not of
starting Python, loading and hashing, which every process does for itself. The CPU seconds are those
of the process that takes most: on a machine that others use too they tell more than the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from compare_speed import models

from hyperlens import Comparison, compare_models, open_pair, processes, share_work


def share_of_one(args):
    """What each process does; the first saves the comparison and prints both seconds."""
    torch.set_num_threads(1)
    base, tuned, tokens = models(args)
    with share_work():
        pair = open_pair(base, tuned)
        pair.describe()
        processes.wait()
        started, busy = time.perf_counter(), time.process_time()
        comparison = compare_models(pair, tokens.tolist(), progress=False)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
        busiest = max(processes.from_all(busy))
    if processes.is_first():
        comparison.save(args.out)
        print(json.dumps([seconds, busiest]))


def run(n, out, arguments):
    """Seconds that n processes take, and CPU seconds of the busiest."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    done = subprocess.run(
        [sys.executable, *launcher, __file__, *arguments, "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def largest_difference(one, other):
    """Of all numbers of both tables, relative to their size where that is above 1.

    Returns:
        That of all numbers but those with sinks or BOS counted in, and that of these.
    """
    worst = {True: 0.0, False: 0.0}
    for a, b in zip(one.table, other.table, strict=True):
        for key in ("value", "low", "high"):
            if math.isfinite(a[key]):
                gap = abs(a[key] - b[key]) / max(1.0, abs(a[key]))
                kind = "with_sinks" in a["metric"]
                worst[kind] = max(worst[kind], gap)
    return worst[False], worst[True]


def main():
    """Interleaved rounds, then a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--changed-blocks", type=int, default=0)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        share_of_one(args)
        return
    counts = [int(n) for n in args.processes.split(",")]
    seconds = {n: [] for n in counts}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for n in counts:
                seconds[n].append(run(n, Path(folder, f"{n}-{number}"), sys.argv[1:]))
        results = {n: Comparison.load(Path(folder, f"{n}-0")) for n in counts}
    print(platform.platform(), f"{os.cpu_count()} cores", f"torch {torch.__version__}", sep=", ")
    print(
        "| processes | seconds | times as fast | CPU seconds of the busiest | times fewer "
        "| largest difference | with sinks or BOS |"
    )
    print("|---|---|---|---|---|---|---|")
    medians = {
        n: [statistics.median(times) for times in zip(*taken, strict=True)]
        for n, taken in seconds.items()
    }
    first, first_busy = medians[counts[0]]
    for n, (median, busy) in medians.items():
        gaps = largest_difference(results[counts[0]], results[n])
        print(
            f"| {n} | {median:.1f} | {first / median:.2f} | {busy:.1f} | {first_busy / busy:.2f} "
            f"| {gaps[0]:.1g} | {gaps[1]:.1g} |"
        )


if __name__ == "__main__":
    main()
