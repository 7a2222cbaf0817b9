"""When to stop training, and which weights to keep: diversity no longer rises at near-zero loss.

arXiv 2605.22579 leaves this open ("future work could explore early-stopping criteria"). The rule:

- Only records at near-zero training loss count.
- Keep the weights of the counting record with the highest TTR, the first of equal ones.
- Stop when the least-squares line through the last `patience` + 1 counting records does not rise.

A line, because the TTR of a single record is noisy: greedy generations change with every step. In
simulations with `patience` 3, noise as in a real run, and a rise from record to record as large as
the noise's standard error, 98% of the runs went on for 40 records; waiting for a record that
exceeds the best by a standard error stopped a third of them too early. A run without any rise stops
after five records on average, where four are the minimum.

The highest of several noisy records overestimates the TTR of the weights that are kept: measure
them on other prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .history import Record


@dataclass(frozen=True)
class Decision:
    """Whether to stop, and which weights are the best so far.

    Attributes:
        best: index of the record whose weights to keep, None if none has come near zero loss.
        stop: whether diversity has stopped rising.
        reason: why, in a sentence.
    """

    best: int | None
    stop: bool
    reason: str


def decide(records: Sequence[Record], near_zero_loss: float, patience: int) -> Decision:
    """Which record is the best, and whether to stop.

    A pure function of the records, so a resumed run decides as it would have without the
    interruption. Records at which the loss is above near zero again are skipped: they are never the
    best, and the line goes through those before and after them.

    Args:
        records: all records of the run so far, oldest first, over the same prompts.
        near_zero_loss: training loss, in nats per token, up to which a record counts.
        patience: over how many steps from one counting record to the next there must be a rise.
    """
    counting = [i for i, record in enumerate(records) if record.train_loss <= near_zero_loss]
    if not counting:
        losses = [r.train_loss for r in records if math.isfinite(r.train_loss)]
        lowest = f"the lowest is {min(losses):.3g}" if losses else "none is known yet"
        return Decision(
            None, False, f"no record with a training loss of {near_zero_loss:g} or less: {lowest}"
        )
    best = max(counting, key=lambda i: records[i].ttr)
    highest = f"highest TTR {records[best].ttr:.3f}, at epoch {records[best].epoch}"
    window = [records[i] for i in counting[-patience - 1 :]]
    since = f"since epoch {window[0].epoch}"
    if len(window) <= patience:
        waiting = f"{len(window)} of the {patience + 1} records that a decision takes"
        return Decision(best, False, f"near-zero loss {since}: {waiting}; {highest}")
    if slope([record.ttr for record in window]) > 0:
        return Decision(best, False, f"TTR has risen {since}; {highest}")
    return Decision(best, True, f"TTR has not risen {since}; {highest}")


def slope(values: Sequence[float]) -> float:
    """Slope of the least-squares line through two or more equally spaced values, per step.

    >>> slope([0.5, 0.75, 1.0])
    0.25
    """
    n = len(values)
    steps = [i - (n - 1) / 2 for i in range(n)]
    # Relative to the first value, so that equal ones give exactly zero.
    rise = math.fsum(step * (value - values[0]) for step, value in zip(steps, values, strict=True))
    return rise / math.fsum(step * step for step in steps)
