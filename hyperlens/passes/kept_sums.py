"""Sums of a long pass on disk, so that a comparison that was killed goes on where it stopped.

Sums are all that a pass knows, and batches come in a fixed order: sums and the number of batches
in them are enough to go on from, and to end with the same numbers, bit for bit on a CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ResultsError
from ..files import write_tensors
from ..results.resume import Identity, digest_of, make_folder

# So often are sums written, in seconds, and seldom enough to take at most this share of the time.
EVERY, LARGEST_SHARE = 60.0, 0.05


@dataclass(frozen=True)
class KeptSums:
    """Where the sums of one pass are kept while it runs.

    Attributes:
        folder: made when sums are first written.
        identity: everything that decides the sums, as JSON values.
    """

    folder: Path
    identity: Identity

    def of_part(self, *part: int) -> KeptSums:
        """For a part of the work: one of several passes, or of several processes."""
        return replace(self, identity={"part": part, "of": self.identity})

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"sums-{digest_of(self.identity)}.safetensors"

    def read(self, probes: Sequence[Any], sinks: Tensor) -> int:
        """Put what was kept into the sums of the probes; how many batches are in them, 0 for none.

        Args:
            probes: opened ones.
            sinks: counts of sinks, which are filled too.
        """
        places = _places(probes, sinks)
        try:
            with safe_open(self.path, "pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                if shapes != {name: tuple(place.shape) for name, place in places.items()}:
                    return 0
                for name, place in places.items():
                    place.copy_(file.get_tensor(name))
                return int(file.metadata()["batches"])
        except (OSError, SafetensorError):
            return 0

    def write(self, probes: Sequence[Any], sinks: Tensor, batches: int) -> None:
        """Replace what is kept, in one step.

        Raises:
            ResultsError: if it cannot be written.
        """
        make_folder(self.folder)
        write_tensors(self.path, _places(probes, sinks), {"batches": str(batches)})

    def forget(self) -> None:
        """Remove the files of all parts, and the folder if nothing else is in it."""
        with suppress(OSError):
            for path in self.folder.glob("sums-*.safetensors"):
                path.unlink(missing_ok=True)
            self.folder.rmdir()


def _places(probes: Sequence[Any], sinks: Tensor) -> dict[str, Tensor]:
    sums = {f"{probe.name}.{name}": x for probe in probes for name, x in probe.sums.items()}
    return {"sinks": sinks, **sums}


class SumsKeeper:
    """Writes the sums of a running pass now and then.

    Args:
        kept: where; None keeps nothing.
        probes: whose sums.
        sinks: counts of sinks.
    """

    def __init__(self, kept: KeptSums | None, probes: Sequence[Any], sinks: Tensor) -> None:
        self._kept = kept
        self._probes, self._sinks = probes, sinks
        self._written, self._wait = time.monotonic(), EVERY
        self.batches = kept.read(probes, sinks) if kept is not None else 0

    def batch_done(self) -> None:
        """Count a batch, and write if it is time to."""
        self.batches += 1
        if self._kept is not None and time.monotonic() - self._written >= self._wait:
            self._write(self._kept)

    def _write(self, kept: KeptSums) -> None:
        started = time.monotonic()
        try:
            kept.write(self._probes, self._sinks, self.batches)
        except ResultsError as error:
            tqdm.write(f"going on without keeping what is done: {error}", file=sys.stderr)
            self._kept = None
        self._written = time.monotonic()
        self._wait = max(EVERY, (self._written - started) / LARGEST_SHARE)
