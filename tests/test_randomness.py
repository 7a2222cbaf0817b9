"""The caller's random numbers go on as if nothing had been drawn in between, on every device."""

import pytest
import torch

from hyperlens.randomness import own_randomness

CPU = torch.device("cpu")


def test_the_seed_decides_what_is_drawn_inside() -> None:
    def drawn(seed: int) -> list[float]:
        with own_randomness(seed, CPU):
            found: list[float] = torch.rand(3).tolist()
        return found

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("fails", [False, True])
def test_the_caller_goes_on_as_before(fails: bool) -> None:
    torch.manual_seed(5)
    torch.rand(3)
    before = torch.get_rng_state()
    try:
        with own_randomness(7, CPU):
            torch.rand(100)
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generator_of_apples_gpus_goes_on_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    state = [torch.tensor([1])]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0].clone())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.__setitem__(0, new))
    with own_randomness(0, torch.device("mps")):
        torch.mps.set_rng_state(torch.tensor([2]))
    assert state[0].tolist() == [1]


def test_a_gpu_that_sleeps_keeps_the_callers_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch seeds it when it is first used, with the last seed that was given."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(42)
    torch.rand(3)
    with own_randomness(7, CPU):
        pass
    assert seeds == [42, 7, 42]


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_all_gpus_in_use_are_forked(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    forked: list[list[int]] = []
    fork = torch.random.fork_rng

    def recorded(devices):
        forked.append(list(devices))
        return fork([])

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: device == "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    monkeypatch.setattr(torch.random, "fork_rng", recorded)
    with own_randomness(7, torch.device(device)):
        pass
    assert forked == [[0, 1]]
