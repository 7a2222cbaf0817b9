"""What a probe is told, or what one of your own returns, is refused where it cannot be meant."""

import conftest
import numpy as np
import pytest
from conftest import make_tiny, perturbed, token_texts
from test_bad_inputs import comparing, refused

from hyperlens.errors import ProbeError
from hyperlens.probes import LogitLens, MeanProbe, ParticipationRatio, ResidualDrift


@pytest.fixture(autouse=True)
def unchecked():
    """Arguments of a wrong type reach our own checks, as they do outside the tests."""
    with conftest.unchecked():
        yield


@pytest.fixture(scope="module")
def pair():
    base = make_tiny("llama")
    return base, perturbed(base)


class Own(MeanProbe):
    name = "own"
    metrics = ("number",)

    def __init__(self, measure, views=("raw",)):
        super().__init__()
        self.views, self._measure = views, measure

    def measure(self, pair, layer, view):
        return {"number": self._measure(*pair.vectors(layer, view))}


@pytest.mark.parametrize("probe", [ResidualDrift, ParticipationRatio, LogitLens])
@pytest.mark.parametrize("token_set", ["decision", "geometric", 3])
def test_token_sets_that_do_not_exist(probe, token_set):
    refused(ProbeError, lambda: probe(token_set=token_set), "must be one of", "geometry")


def test_logits_are_read_of_decisions_only():
    refused(ProbeError, lambda: LogitLens(token_set="all"), "must be 'decisions', got 'all'")


@pytest.mark.parametrize("layers", [5, [], (), [0.5], "12", [None]])
@pytest.mark.parametrize("probe", [ResidualDrift, ParticipationRatio, LogitLens])
def test_layers_that_are_no_layers(probe, layers):
    refused(ProbeError, lambda: probe(layers=layers), "must be whole numbers", "or None")


def test_layers_of_every_kind_of_whole_number(pair):
    for layers in ([0, 2], range(0, 3, 2), np.array([0, 2])):
        for probe in (ResidualDrift, ParticipationRatio, LogitLens):
            assert probe(layers=layers).layers == (0, 2)


@pytest.mark.parametrize("views", ["raw", [], ["unit-rms"], None])
def test_views_that_do_not_exist(views):
    refused(ProbeError, lambda: ParticipationRatio(views=views), "views must be some of")


def test_a_view_of_ones_own_that_does_not_exist(pair):
    probe = Own(lambda base, tuned: base[:, 0], views=("unit-rms",))
    refused(ProbeError, comparing(*pair, probes=[probe]), "views must be some of", "unit-rms")


@pytest.mark.parametrize(
    "measure",
    [
        lambda base, tuned: base.mean(),
        lambda base, tuned: base.mean()[None],
        lambda base, tuned: base,
        lambda base, tuned: base[1:, 0],
    ],
    ids=["scalar", "single", "vectors", "too few"],
)
def test_numbers_that_are_not_one_per_token(pair, measure):
    refused(ProbeError, comparing(*pair, probes=[Own(measure)]), "expected one number for each")


def test_options_that_cannot_be_recorded_are_refused_before_the_run(pair):
    def never(base, tuned):
        raise AssertionError("the pass has begun")

    probe = Own(never)
    probe.thresholds = {(1, 2): 3}
    refused(
        ProbeError, comparing(*pair, probes=[probe]), "cannot be recorded", "begins with an under"
    )
    probe = Own(lambda base, tuned: base[:, 0])
    probe._thresholds = {(1, 2): 3}
    comparing(*pair, token_texts(4), probes=[probe])()
