"""When to stop: a pure rule over records, seldom delayed by noise, patient with growth."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_record import a_record

from hyperlens.training.history import Record
from hyperlens.training.stopping import decide, slope

NEAR, PATIENCE = 0.05, 3


def record(ttr: float, train_loss: float = 0.01, epoch: int = 0) -> Record:
    return a_record(epoch=epoch, train_loss=train_loss, ttr=ttr, ttr_per_prompt=(ttr,))


def course(*values: float) -> list[Record]:
    return [record(float(value), epoch=10 * i) for i, value in enumerate(values)]


# Sixty-fourths, whose sums and differences are exact.
values = st.integers(0, 64).map(lambda i: i / 64)
losses = st.sampled_from([0.01, NEAR, 0.06, 3.0, math.nan])
Rows = list[tuple[float, float]]
# Built into records inside the test: hypothesis forbids the dice that beartype throws.
rows = st.lists(st.tuples(values, losses), max_size=14)


def built(given_: Rows) -> list[Record]:
    return [record(ttr, loss, epoch=i) for i, (ttr, loss) in enumerate(given_)]


@given(rows, st.integers(1, 4))
def test_the_decision_keeps_its_promises(given_: Rows, patience: int) -> None:
    records = built(given_)
    decision = decide(records, NEAR, patience)
    counting = [i for i, (_, loss) in enumerate(given_) if loss <= NEAR]
    assert decision.reason
    assert "\n" not in decision.reason
    if not counting:
        assert (decision.best, decision.stop) == (None, False)
        return
    ttr = [given_[i][0] for i in counting]
    assert decision.best == counting[int(np.argmax(ttr))]
    last = ttr[-patience - 1 :]
    falls = len(last) == patience + 1 and np.polyfit(range(len(last)), last, 1)[0] <= 1e-12
    assert decision.stop == falls


@given(rows, st.integers(1, 4), values, st.integers(1, 8))
def test_only_differences_of_diversity_matter(
    given_: Rows, patience: int, shift: float, scale: int
) -> None:
    one = decide(built(given_), NEAR, patience)
    moved = [(shift + scale * ttr, loss) for ttr, loss in given_]
    other = decide(built(moved), NEAR, patience)
    assert (one.best, one.stop) == (other.best, other.stop)


@given(rows, st.data())
def test_records_away_from_near_zero_change_nothing(given_: Rows, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(given_)))
    between = (1.0, data.draw(st.sampled_from([0.06, math.nan])))
    records, longer = built(given_), built([*given_[:place], between, *given_[place:]])
    short, long = decide(records, NEAR, PATIENCE), decide(longer, NEAR, PATIENCE)
    assert short.stop == long.stop
    assert (short.best is None) == (long.best is None)
    if short.best is not None and long.best is not None:
        assert long.best == short.best + (place <= short.best)


@given(rows, st.integers(1, 4))
def test_the_best_moves_to_the_newest_or_not_at_all(given_: Rows, patience: int) -> None:
    """So weights need to be kept only at the moment they are the best."""
    best = None
    for n in range(1, len(given_) + 1):
        now = decide(built(given_[:n]), NEAR, patience).best
        assert now in (best, n - 1)
        best = now


def test_without_near_zero_loss_there_is_nothing_to_keep() -> None:
    for records, said in (
        ([], "none is known"),
        ([record(0.5, math.nan)], "none is known"),
        ([record(0.5, math.nan), record(0.5, 2.5), record(0.9, 0.31)], "lowest is 0.31"),
    ):
        decision = decide(records, NEAR, PATIENCE)
        assert (decision.best, decision.stop) == (None, False)
        assert said in decision.reason


def test_a_flat_course_stops_as_soon_as_it_can() -> None:
    for n in range(1, 8):
        decision = decide(course(*[0.1 + 0.2] * n), NEAR, PATIENCE)
        assert (decision.best, decision.stop) == (0, n > PATIENCE)
    assert "not risen since epoch 30" in decision.reason
    assert "TTR 0.300, at epoch 0" in decision.reason


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_steady_growth_never_stops(patience: int) -> None:
    for n in range(1, 31):
        decision = decide(course(*np.linspace(0.2, 0.8, n)), NEAR, patience)
        assert (decision.best, decision.stop) == (n - 1, False)


def test_growth_then_plateau_keeps_the_top() -> None:
    ttr = [0.3, 0.5, 0.61, 0.6, 0.55, 0.6, 0.6]
    stops = [decide(course(*ttr[: n + 1]), NEAR, PATIENCE).stop for n in range(len(ttr))]
    assert stops == [False, False, False, False, False, True, False]
    assert decide(course(*ttr[:6]), NEAR, PATIENCE).best == 2


def test_the_threshold_itself_is_near_zero() -> None:
    assert decide([record(0.5, NEAR)], NEAR, 1).best == 0


@given(st.lists(values, min_size=2, max_size=9))
def test_the_slope_is_the_least_squares_one(ttr: list[float]) -> None:
    assert slope(ttr) == pytest.approx(np.polyfit(range(len(ttr)), ttr, 1)[0], abs=1e-12)
    assert slope([0.1] * len(ttr)) == 0.0


def stops_at(ttr: np.ndarray) -> int:
    """Index of the record after which training stops, the last one if it does not."""
    for n in range(len(ttr)):
        if decide(course(*ttr[: n + 1]), NEAR, PATIENCE).stop:
            return n
    return len(ttr) - 1


def test_noise_seldom_looks_like_growth_and_seldom_hides_it() -> None:
    """Noise of one between any two records; what the module says of the rule."""
    noise = np.random.default_rng(0).normal(0, math.sqrt(0.5), (100, 40))
    flat = [stops_at(0.5 + 0.01 * course_) for course_ in noise]
    assert 3.5 < np.mean(flat) < 5
    rising = [stops_at(0.2 + 0.01 * (course_ + np.arange(40))) for course_ in noise]
    assert np.mean(np.equal(rising, 39)) > 0.9
