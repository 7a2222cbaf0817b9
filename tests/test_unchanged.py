"""No public function changes a model of the caller, or the state of the process."""

import contextlib
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pytest
import torch
import transformers
from conftest import lora, make_tiny, perturbed, short
from surface_for_tests import call, good, parameters, public, shared

from hyperlens.errors import HyperlensError

MODELS = {"base", "tuned", "model", "source", "target", "features", "pairs", "p_texts", "run"}
TAKING_MODELS = [name for name, one in public() if MODELS & {*parameters(name, one)}]
SURFACE = dict(public())
# Those of the others do what these do: open a pair, read texts, patch, generate, train, judge.
SHORT = ("compare_models", "load_hooked", "patch_positions", "donating", "transplanted")
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Interrupted(Exception):
    """Raised in the middle of a model's forward pass."""


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """All that a caller could notice."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(name.encode() + tensor.numpy().tobytes())
    modules = dict(model.named_modules())
    return {
        "weights": sha.hexdigest(),
        "keys": list(model.state_dict()),
        "tensors": [(name, p.data_ptr(), id(p)) for name, p in model.named_parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "modules": {name: (type(one), one.training) for name, one in modules.items()},
        "attributes": {name: sorted(vars(one)) for name, one in modules.items()},
        "hooks": {
            name: [len(getattr(one, kind)) for kind in HOOKS] for name, one in modules.items()
        },
        "config": model.config.to_json_string(),
        "attention": model.config._attn_implementation,
        "generation": model.generation_config.to_json_string(),
    }


def state_of_the_process() -> dict[str, Any]:
    return {
        "torch's random state": torch.random.get_rng_state().tolist(),
        "numpy's random state": str(np.random.get_state()),  # noqa: NPY002
        "Python's random state": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "verbosity": transformers.logging.get_verbosity(),
        "working folder": os.getcwd(),
    }


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """beartype draws numbers of Python's to choose which items of a list it checks."""
    with conftest.unchecked():
        yield


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name in before if before[name] != after[name]]


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Iterator[dict[str, torch.nn.Module]]:
    """A base, a tuned model and an adapter on a base, in states that nobody would leave them in."""
    base = make_tiny("llama", num_hidden_layers=2)
    tuned, adapted = perturbed(base), lora(make_tiny("llama", num_hidden_layers=2), "llama")
    for model in (base, tuned, adapted):
        model.train()
        list(model.modules())[5].eval()
        next(model.parameters()).requires_grad_(not next(model.parameters()).requires_grad)
        model.generation_config.do_sample = True
        model.generation_config.temperature = 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("unchanged"))
        shared()
        yield {"base": base, "tuned": tuned, "adapted": adapted}


def with_watched(value: Any, models: dict[str, torch.nn.Module]) -> Any:
    """Good arguments with the watched models in place of the good ones."""
    if isinstance(value, torch.nn.Module):
        ours = {id(shared()["model"]): "base", id(shared()["source"]): "tuned"}
        return models[ours[id(value)]] if id(value) in ours else value
    if isinstance(value, tuple):
        return tuple(with_watched(one, models) for one in value)
    if isinstance(value, dict):
        return {key: with_watched(one, models) for key, one in value.items()}
    return value


@contextlib.contextmanager
def interrupted(at: float) -> Iterator[list[int]]:
    """Inside, the call number `at` of an activation function raises; the list counts them."""
    real, calls = torch.nn.functional.silu, [0]

    def silu(*args: Any, **options: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == at:
            raise Interrupted
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "silu", silu)
        yield calls


def changes(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    models: dict[str, torch.nn.Module],
    at: float,
) -> tuple[int, list[str]]:
    """How often an activation function was called, and what is not as it was before."""
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 - the state that people may rely on
    torch.manual_seed(3)
    before = {name: state_of(model) for name, model in models.items()}
    process = state_of_the_process()
    with interrupted(at) as calls, contextlib.suppress(HyperlensError, Interrupted):
        call(function, arguments)
    found = differing(process, state_of_the_process())
    for name, model in models.items():
        found += [f"{name}: {what}" for what in differing(before[name], state_of(model))]
    if Path("out").exists():
        os.rename("out", f"out{len(os.listdir())}")
    return calls[0], found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", short(TAKING_MODELS, *SHORT))
def test_models_and_process_are_as_before(name: str, watched) -> None:
    arguments = {
        key: with_watched(value, watched) for key, value in good(name, SURFACE[name]).items()
    }
    n, found = changes(SURFACE[name], arguments, watched, at=float("inf"))
    assert not found
    # In the middle, at the end, and in the very first pass.
    for at in {n // 2, n - 1, 1} if n > 2 else ():
        _, found = changes(SURFACE[name], arguments, watched, at)
        assert not found, f"after an error in call {at} of {n}: {found}"
    if "tuned" in arguments:
        adapted = (watched["adapted"], arguments["tuned"][1])
        _, found = changes(SURFACE[name], arguments | {"tuned": adapted}, watched, float("inf"))
        assert not found
