"""Rows of logits read side by side on the processor's cores.

Some of the work on a row of logits is done by numpy, which uses one core. Threads that each take
their share of the rows, with one torch thread apiece, keep all cores busy all the time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


class RowWorkers:
    """A pool of threads with one torch thread each; to be used in a `with` statement.

    Args:
        count: how many; 1 works in the caller's own thread.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = max(1, count)
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> RowWorkers:
        if self.count > 1:
            before = torch.get_num_threads()
            everybody = threading.Barrier(self.count)

            def start() -> None:
                torch.set_num_threads(1)
                everybody.wait()

            self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="hyperlens-rows")
            for started in [self._pool.submit(start) for _ in range(self.count)]:
                started.result()
            # The setting is each thread's own, but what threads to come start from is shared.
            torch.set_num_threads(before)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def map(self, function: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
        """The function of every part, in order; the first error is raised here."""
        if self._pool is None:
            return [function(part) for part in parts]

        def without_gradients(part: Part) -> Result:
            with torch.no_grad():  # each thread's own, too
                return function(part)

        # Nothing may still write to the caller's tensors when an error leaves.
        running = [self._pool.submit(without_gradients, part) for part in parts]
        errors = [future.exception() for future in running]
        for error in errors:
            if error is not None:
                raise error
        return [future.result() for future in running]


def workers_for(device: torch.device) -> RowWorkers:
    """As many as torch has threads here; an accelerator needs none."""
    return RowWorkers(torch.get_num_threads() if device.type == "cpu" else 1)
