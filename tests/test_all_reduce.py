"""Shards on two ranks add up to what one process sees; one rank may see nothing."""

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from streams_for_tests import Streams

from hyperlens.probes import default_probes

RANK = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
import torch
from streams_for_tests import Streams
from hyperlens.probes import default_probes
rank, ways, out = int(sys.argv[2]), eval(sys.argv[3]), sys.argv[4]
store = f"file://{out}.store"
torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
streams = Streams()
results = []
for shares in ways:
    results.append([])
    for probe in default_probes():
        streams.run(probe, shares[rank])
        probe.all_reduce()
        results[-1].append(probe.compute())
with open(f"{out}.{rank}", "wb") as file:
    pickle.dump(results, file)
torch.distributed.destroy_process_group()
"""


# Shared between two ranks; and all of it in one of them.
WAYS = [([0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10]), ([], list(range(11)))]


def test_ranks_add_up(tmp_path):
    out = str(tmp_path / "out")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(Path(__file__).parent), str(rank),
             repr(WAYS), out],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [process.wait(120) for process in ranks] == [0, 0]
    streams = Streams()
    expected = [streams.run(probe).compute() for probe in default_probes()]
    for results in itertools.chain.from_iterable(
        pickle.loads(Path(f"{out}.{rank}").read_bytes()) for rank in range(2)
    ):
        for got, full in zip(results, expected, strict=True):
            assert got.extras == full.extras
            for a, b in zip(got.rows, full.rows, strict=True):
                assert a[:4] == b[:4]
                assert a.n == b.n
                assert a[4:7] == pytest.approx(b[4:7], rel=1e-6, abs=1e-6, nan_ok=True)
