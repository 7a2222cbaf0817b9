"""A few threads that can be left at any moment: Ctrl-C waits for none of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Item, threading.Event], Result], items: Sequence[Item], workers: int
) -> Generator[tuple[int, Result], None, None]:
    """(index, result) of every item, as they come.

    Args:
        work: called with an item and an event that is set once nobody waits for its result.
        items: what there is to do; begun in this order.
        workers: how many at a time.

    Raises:
        BaseException: the first one that `work` raised; what is still running is left behind.
    """
    todo: SimpleQueue[tuple[int, Item]] = SimpleQueue()
    for numbered in enumerate(items):
        todo.put(numbered)
    done: SimpleQueue[tuple[int, Result] | BaseException] = SimpleQueue()
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            try:
                index, item = todo.get_nowait()
            except Empty:
                return
            try:
                done.put((index, work(item, stop)))
            except BaseException as error:
                done.put(error)
                return

    # Daemons, unlike those of concurrent.futures, do not hold up the end of the program.
    for _ in range(min(workers, len(items))):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in items:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stop.set()
