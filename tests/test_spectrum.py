"""Changes of a spectrum against numpy: exact covariances, exact variances, exact identities."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperlens.patching.expansion.changes import (
    ITSELF,
    METHODS,
    VARIANCE_CONTROL,
    Cell,
    Joint,
    generated_cells,
    plan,
    set_back,
)
from hyperlens.statistics import spectrum
from hyperlens.statistics.spectrum import Cloud

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(2, 12)


def covariance(d, seed, steep=1.0):
    """A random covariance with eigenvalues over `steep` orders of magnitude."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(d, d)))
    return torch.from_numpy((q * 10 ** rng.uniform(-steep, steep, d)) @ q.T)


def cloud(d, seed, steep=1.0):
    mean = torch.from_numpy(np.random.default_rng(seed + 1).normal(size=d))
    return Cloud(1000, mean, covariance(d, seed, steep))


def after(c, basis, gain):
    """The covariance after a change, spelled out."""
    a = (basis * gain).numpy() @ basis.numpy().T
    return a @ c.numpy() @ a.T


def ratio(c):
    return np.trace(c) ** 2 / (c**2).sum()


@given(sizes, seeds)
def test_principal_axes_are_numpys(d, seed):
    c = covariance(d, seed)
    found = spectrum.principal(c)
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(c)[::-1], rtol=1e-9)
    np.testing.assert_allclose(
        (found.basis * found.values) @ found.basis.mT, c, atol=1e-10 * float(c.abs().max())
    )


@given(sizes, seeds, st.data())
def test_dimension_and_variance_after_a_change(d, seed, data):
    c, basis = covariance(d, seed), spectrum.random_basis(d, seed % 1000)
    gain = torch.from_numpy(np.random.default_rng(seed).uniform(0.1, 2, d))
    seen = spectrum.in_basis(c, basis)
    assert spectrum.participation(seen) == pytest.approx(ratio(c.numpy()))
    brute = after(c, basis, gain)
    assert spectrum.participation(seen, gain) == pytest.approx(ratio(brute))
    assert float(gain.square() @ seen.diagonal()) == pytest.approx(np.trace(brute))
    k = data.draw(st.integers(1, d))
    for gain in (spectrum.keeping(k, d), spectrum.removing(k, d)):
        projected = basis.numpy() * gain.numpy() @ basis.numpy().T
        np.testing.assert_allclose(projected @ projected, projected, atol=1e-12)
        assert round(np.trace(projected)) == int(gain.sum())


@given(sizes, seeds, st.floats(0, 1))
def test_random_directions_remove_exactly_that_variance(d, seed, share):
    c, basis = covariance(d, seed), spectrum.random_basis(d, 3)
    variance = spectrum.in_basis(c, basis).diagonal()
    total = share * float(variance.sum())
    gain = spectrum.removing_variance(variance, total)
    removed = np.trace(c.numpy()) - np.trace(after(c, basis, gain))
    assert removed == pytest.approx(total, abs=1e-9 * float(variance.sum()))
    # Whole directions first, one partly at most, the others not at all.
    assert int(((gain > 1e-6) & (gain < 1 - 1e-12)).sum()) <= 1
    assert bool((gain.diff() >= -1e-12).all())


def test_removing_nothing_is_the_identity():
    variance = covariance(6, 0).diagonal()
    assert torch.equal(spectrum.removing_variance(variance, 0.0), torch.ones(6).double())
    assert torch.equal(spectrum.keeping(6, 6), torch.ones(6).double())
    own = spectrum.principal(covariance(6, 1)).values
    assert torch.equal(spectrum.respaced(own, own), torch.ones(6).double())
    assert torch.equal(
        spectrum.shuffled_gains(torch.ones(6).double(), own, 2), torch.ones(6).double()
    )


@given(sizes, seeds)
def test_a_swapped_spectrum_is_exactly_the_wanted_one(d, seed):
    own, other = (spectrum.principal(covariance(d, seed + i)) for i in range(2))
    c = covariance(d, seed)
    gain = spectrum.respaced(own.values, other.values)
    found = np.linalg.eigvalsh(after(c, own.basis, gain))[::-1]
    np.testing.assert_allclose(found, other.values, rtol=1e-8)


@given(sizes, seeds)
def test_transport_gives_exactly_the_wanted_covariance(d, seed):
    own, wanted = covariance(d, seed), covariance(d, seed + 1)
    gain, basis = spectrum.transport(own, wanted)
    np.testing.assert_allclose(
        after(own, basis, gain), wanted, atol=1e-7 * float(wanted.abs().max())
    )
    # Of all such maps the smallest: symmetric, and no direction is turned round.
    assert float(gain.min()) > 0
    identity, _ = spectrum.transport(own, own)
    np.testing.assert_allclose(identity, 1, atol=1e-7)


@given(sizes, seeds)
def test_shuffled_gains_are_the_same_gains_with_the_same_variance(d, seed):
    variance = spectrum.principal(covariance(d, seed)).values
    gain = torch.from_numpy(np.random.default_rng(seed).uniform(0.2, 3, d))
    new = spectrum.shuffled_gains(gain, variance, seed % 97)
    assert float((new.square() * variance).sum()) == pytest.approx(
        float((gain.square() * variance).sum())
    )
    ratios = new.sort().values / gain.sort().values
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)


@given(sizes, seeds, st.floats(1.05, 12.0))
def test_matched_sizes_are_those_of_a_search(d, seed, wanted):
    c, basis = covariance(d, seed), spectrum.random_basis(d, 5)
    seen = spectrum.in_basis(c, basis)
    kept = [m for m in range(1, d + 1) if ratio(after(c, basis, spectrum.keeping(m, d))) <= wanted]
    assert spectrum.most_kept(seen, wanted) == (max(kept) if kept else 1)
    for most in (d // 2, d - 1):
        gone = [
            k for k in range(most + 1) if ratio(after(c, basis, spectrum.removing(k, d))) <= wanted
        ]
        assert spectrum.fewest_removed(seen, wanted, most) == (min(gone) if gone else None)


def test_random_bases_are_orthonormal_and_seeded():
    basis = spectrum.random_basis(9, 4)
    np.testing.assert_allclose(basis.mT @ basis, np.eye(9), atol=1e-12)
    assert torch.equal(basis, spectrum.random_basis(9, 4))
    assert not torch.equal(basis, spectrum.random_basis(9, 5))
    # Drawn evenly: no axis is preferred.
    mean = torch.stack([spectrum.random_basis(3, i)[:, 0] for i in range(600)]).mean(0)
    assert float(mean.abs().max()) < 4 / np.sqrt(3 * 600)


def test_directions_without_variance_are_left_alone():
    flat = torch.diag(torch.tensor([4.0, 1.0, 0.0]).double())
    gain = spectrum.respaced(spectrum.principal(flat).values, torch.tensor([1.0, 1, 1]).double())
    assert gain.tolist() == [0.5, 1.0, 1.0]
    gains, basis = spectrum.transport(flat, torch.eye(3).double())
    assert torch.isfinite(gains).all()
    np.testing.assert_allclose(np.diag(after(flat, basis, gains)), [1.0, 1.0, 0.0], atol=1e-9)
    assert np.isnan(spectrum.participation(torch.zeros(3, 3).double()))


def joint(d, seed):
    """Outputs of two models at the same tokens, as vectors and as their moments."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40 * d, 2 * d)) @ rng.normal(size=(2 * d, 2 * d))
    x = torch.from_numpy(x * 10 ** rng.uniform(-1, 1, 2 * d))
    mean, c = x.mean(0), torch.from_numpy(np.cov(x.numpy().T, bias=True))
    base, tuned = slice(d), slice(d, None)
    clouds = (Cloud(len(x), mean[one], c[one, one]) for one in (base, tuned))
    return x[:, base], x[:, tuned], Joint(*clouds, c[base, tuned])


@settings(max_examples=25)
@given(st.integers(3, 10), seeds)
def test_every_way_of_a_plan_does_what_it_says(d, seed):
    base, tuned, outputs = joint(d, seed)
    planned = plan(outputs, None, n_random=2, seed=1)
    wide = {side: ratio(outputs.of(side).covariance.numpy()) for side in ("base", "tuned")}
    left = planned.spread(outputs)
    for cell, (basis, gain, into) in planned.changes.items():
        q, c = planned.bases[basis], outputs.of(cell.side).covariance
        np.testing.assert_allclose(q.mT @ q, np.eye(d), atol=1e-9)
        brute = after(c, q, gain)
        if into is not None:
            put = base + ((tuned - base) @ q * gain) @ planned.bases[into].mT
            brute = np.cov(put.numpy().T, bias=True)
        dimension, variance = left[cell]
        assert variance == pytest.approx(np.trace(brute) / np.trace(c.numpy()), abs=1e-9)
        if variance > 1e-9:
            assert dimension == pytest.approx(ratio(brute), rel=1e-5)
        itself = Cell(cell.method, cell.n_directions, ITSELF, -1)
        if cell.method != "tuned_coordinates" and cell.condition == VARIANCE_CONTROL.get(
            cell.method
        ):
            assert variance == pytest.approx(left[itself].variance, abs=1e-9)
    spectra = {"base_spectrum": "base", "tuned_spectrum": "tuned", "tuned_covariance": "tuned"}
    for method, model in spectra.items():
        assert left[Cell(method, 0, ITSELF, -1)].dimension == pytest.approx(wide[model], rel=1e-5)
    everything = Cell("base_directions", d, ITSELF, -1)
    assert torch.equal(planned.changes[everything].gain, torch.ones(d).double())
    # The affine map leaves nothing of the tuned model that the base's outputs could tell.
    rest = tuned - tuned.mean(0) - (base - base.mean(0)) @ planned.affine.mT
    together = rest.mT @ (base - base.mean(0)) / len(base)
    assert float(together.abs().max()) < 1e-6 * float(tuned.std(0).max() * base.std(0).max())


@settings(max_examples=25)
@given(st.integers(3, 10), seeds)
def test_coordinates_are_put_in_beside_as_much_of_the_change_elsewhere(d, seed):
    base, tuned, outputs = joint(d, seed)
    planned = plan(outputs, None, n_random=2, seed=1)
    size = planned.matched["tuned_coordinates"]
    assert size == planned.matched["expanding_directions"]
    if size is None:
        return
    difference = tuned - base - (tuned - base).mean(0)

    def moved(cell):
        basis, gain, into = planned.changes[cell]
        return (difference @ planned.bases[basis] * gain) @ planned.bases[into].mT

    itself = moved(Cell("tuned_coordinates", size, ITSELF, -1))
    outside = float(difference.square().sum() - itself.square().sum())
    for draw in range(2):
        rotated = moved(Cell("tuned_coordinates", size, "rotated", draw))
        assert float(rotated.square().sum()) == pytest.approx(float(itself.square().sum()))
        same = moved(Cell("tuned_coordinates", size, "same_variance", draw))
        # None of it along the directions themselves.
        assert float((same * itself).sum(1).abs().max()) < 1e-6 * float(difference.square().max())
        wanted = min(outside, float(itself.square().sum()))
        assert float(same.square().sum()) == pytest.approx(wanted, abs=1e-6 * outside)


@settings(max_examples=25)
@given(st.integers(3, 10), seeds)
def test_directions_that_expand_are_those_whose_undoing_lowers_the_dimension(d, seed):
    _, _, (base, tuned, _) = joint(d, seed)
    new = spectrum.new_axes(base.covariance, tuned.covariance)
    grown = int((new.values > 0).sum())
    gain, expanding = set_back(base.covariance, tuned.covariance, new, grown)
    assert torch.all(gain[grown:] == 1)
    assert torch.all((gain >= 0) & (gain <= 1))
    wide = ratio(tuned.covariance.numpy())
    for i in range(d):
        alone = torch.ones(d).double()
        alone[i] = gain[i]
        lowers = ratio(after(tuned.covariance, new.basis, alone)) < wide * (1 - 1e-9)
        assert bool(expanding[i]) == lowers
    # A model of twice the scale has grown as little.
    again, same = set_back(base.covariance, 4 * tuned.covariance, new, grown)
    np.testing.assert_allclose(again, gain, rtol=1e-6)
    assert torch.equal(same, expanding)


def test_a_plan_has_its_matched_sizes_and_generates_under_few():
    wide, narrow = torch.linspace(1, 2, 16).double(), torch.linspace(1, 2, 16).double() ** 8
    basis = spectrum.random_basis(16, 0)
    clouds = [Cloud(99, torch.zeros(16).double(), (basis * v) @ basis.mT) for v in (narrow, wide)]
    outputs = Joint(*clouds, clouds[0].covariance)
    planned = plan(outputs, n_directions=[2, 4, 99], n_random=3, seed=0)
    matched = planned.matched["base_directions"]
    assert planned.sizes("base_directions") == sorted({2, 4, 16, matched})
    left = planned.spread(outputs)
    wanted = ratio(clouds[0].covariance.numpy())
    assert left[Cell("base_directions", matched, ITSELF, -1)].dimension <= wanted * (1 + 1e-8)
    cells = generated_cells(plan(outputs, n_directions=None, n_random=3, seed=0))
    per_method = {
        method: len([c for c in cells if c.method == method and c.condition == ITSELF])
        for method in METHODS
    }
    assert per_method == {
        "base_directions": 3,
        "new_directions": 3,
        "base_spectrum": 1,
        "expanding_directions": 1,
        "tuned_spectrum": 1,
        "tuned_covariance": 1,
        "tuned_coordinates": 0,
    }
    assert matched in {c.n_directions for c in cells if c.method == "base_directions"}
    # Without an expansion there is nothing to be removed.
    turned = Joint(clouds[1], clouds[0], clouds[0].covariance)
    none = plan(turned, n_directions=None, n_random=1, seed=0).matched
    assert (none["base_directions"], none["new_directions"]) == (16, None)
