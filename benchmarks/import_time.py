"""`import hyperlens` against `import numpy`: seconds, each in a fresh process, taking turns.

python benchmarks/import_time.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time

MODULES = ("hyperlens", "numpy")
# Allowed: 1.2 times numpy's time and 0.3 s.
FACTOR, EXTRA_SECONDS = 1.2, 0.3


def seconds(module: str) -> float:
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    for module in MODULES:
        seconds(module)  # compiled and in the disk cache from here on
    taken = {module: [] for module in MODULES}
    for _ in range(repeats):
        for module in MODULES:
            taken[module].append(seconds(module))
    median = {module: statistics.median(values) for module, values in taken.items()}
    allowed = FACTOR * median["numpy"] + EXTRA_SECONDS
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, hyperlens; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    print(
        f"median of {repeats}, {platform.processor() or platform.machine()}, {time.strftime('%F')}"
    )
    for module in MODULES:
        print(f"import {module:<10}{median[module]:8.3f} s")
    print(f"allowed          {allowed:8.3f} s; torch loaded: {loaded}")


if __name__ == "__main__":
    main()
