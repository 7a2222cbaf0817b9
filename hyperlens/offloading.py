"""Weights that lie elsewhere until their module runs, on the CPU or on disk: accelerate's.

`from_pretrained(..., device_map="auto")` leaves what does not fit on a GPU on the "meta" device and
hooks each such module: its weights are fetched when it is called, and dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoadingError


def has_offloaded(model: nn.Module) -> bool:
    """Whether some weights have no values here; those of an offloaded model can be fetched."""
    return any(weight.device.type == "meta" for weight in model.parameters())


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its input: where its first weight is, or is brought to."""
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is None:
                continue
            places = (getattr(hook, "execution_device", None) for hook in _hooks(module))
            place = next((one for one in places if one is not None), None)
            if weight.device.type != "meta" or place is None:
                return weight.device
            return torch.device(place)
    return torch.device("cpu")


def named_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by its name, as `named_parameters` gives them; what is offloaded is fetched.

    Raises:
        LoadingError: if a weight has no values anywhere.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is None or id(weight) in seen:
                continue
            seen.add(id(weight))
            value = fetched(module, name) if weight.device.type == "meta" else weight
            yield f"{prefix}.{name}" if prefix else name, value


def value_of(module: nn.Module, name: str) -> Tensor:
    """A module's weight, fetched if it is offloaded."""
    weight: Tensor = getattr(module, name)
    return fetched(module, name) if weight.device.type == "meta" else weight


def fetched(module: nn.Module, name: str) -> Tensor:
    """The values of a module's own offloaded weight.

    Raises:
        LoadingError: if it has none anywhere.
    """
    for hook in _hooks(module):
        weights = getattr(hook, "weights_map", None)
        if weights is not None and name in weights:
            value: Tensor = weights[name]
            return value
    raise LoadingError(f"a weight of {type(module).__name__} has no values: it was never loaded")


def check_can_be_fetched(model: nn.Module) -> None:
    """Raise if some weights have no values, here or where they were offloaded to.

    Raises:
        LoadingError: saying how many.
    """
    weights = list(model.parameters())
    lost = {
        id(weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight is not None and weight.device.type == "meta" and not _is_kept(module, name)
    }
    if lost:
        raise LoadingError(
            f"{len(lost)} of {len(weights)} weights of {type(model).__name__} have no values here "
            "(never loaded, or taken away): load it with from_pretrained; where the GPU is too "
            'small, with device_map="auto", in bfloat16 or on the CPU'
        )


def check_is_here(model: nn.Module, what: str) -> None:
    """Raise for an offloaded model where weights are read or changed themselves.

    Args:
        model: any.
        what: what it is wanted for.

    Raises:
        LoadingError: if some of its weights are offloaded.
    """
    if has_offloaded(model):
        raise LoadingError(
            f"{type(model).__name__} is offloaded, and {what} needs all of its weights: load it "
            "whole, in bfloat16 or on the CPU"
        )


def shared_by_copies(model: nn.Module) -> list[Any]:
    """What a copy of a model has to share with it: where offloaded weights are fetched from."""
    names = ("weights_map", "tied_params_map")
    parts = (getattr(hook, name, None) for hook in _all_hooks(model) for name in names)
    return [part for part in parts if part is not None]


def _is_kept(module: nn.Module, name: str) -> bool:
    maps = (getattr(hook, "weights_map", None) for hook in _hooks(module))
    return any(weights is not None and name in weights for weights in maps)


def _all_hooks(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield from _hooks(module)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """The hooks that accelerate put on a module, one or several."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return ()
    return tuple(getattr(hook, "hooks", (hook,)))
