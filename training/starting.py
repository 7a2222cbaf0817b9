"""Go on from an adapter: its weights take the place of LoRA's initial values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError
from ..models.kinds import text_config
from ..models.sources import OpenedModel
from .pissa import SUBTRACTED, TRAINED

# What of PEFT's configuration decides what an adapter does, besides shapes and names of weights.
DECISIVE = ("lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Start:
    """The adapter that a run goes on from.

    Attributes:
        name: how to call it.
        config: what is decisive in PEFT's configuration.
        weights: by PEFT's names in an adapter's file.
        logits: what the model with the adapter returns for the tokens of `_logits`.
    """

    name: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    logits: Tensor

    def to_json(self) -> dict[str, Any]:
        """Name and hash."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.weights.items()):
            values = weight.cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + values.tobytes())
        return {"adapter": self.name, "sha256": digest.hexdigest()}

    def check(self, model: Any) -> None:
        """Raise unless the adapter's weights on `model` make it the model they come from.

        Raises:
            TrainingError: naming the first difference.
        """
        fresh, config = _weights(model, TRAINED), _decisive(model.peft_config[TRAINED])
        for name in sorted({*fresh, *self.weights}):
            there, here = (_shape(weights.get(name)) for weights in (self.weights, fresh))
            if there != here:
                raise self._misfit(
                    f"of {name} it has {there}, and this run {here}" + _pissa_hint(model)
                )
        for name, value in config.items():
            if self.config[name] != value:
                raise self._misfit(f"its {name} is {self.config[name]}, and this run's {value}")
        kept = {name: weight.clone() for name, weight in fresh.items()}
        try:
            self.put_into(model)
            logits = _logits(model)
        finally:
            with torch.no_grad():
                for name, weight in fresh.items():
                    weight.copy_(kept[name])
        gap = float((logits - self.logits).abs().max())
        # Both add the same products, perhaps in another order and precision.
        dtype = model.get_input_embeddings().weight.dtype
        eps = torch.finfo(dtype).eps if dtype.is_floating_point else 2**-7
        if not gap <= eps**0.5 * max(1.0, float(self.logits.abs().max())):
            raise self._misfit(
                f"with its weights the logits differ by {gap:.2g}: something else of it, such as "
                "its scale or what it does to the base, is not the run's" + _pissa_hint(model)
            )

    def put_into(self, model: Any) -> None:
        """Replace the values of the adapter on `model`."""
        with torch.no_grad():
            for name, weight in _weights(model, TRAINED).items():
                weight.copy_(self.weights[name])

    def _misfit(self, why: str) -> TrainingError:
        return TrainingError(
            f"{self.name} is an adapter, and the run cannot go on from it ({why}): give its own "
            "recipe (its folder as recipe, --recipe), or merge it first for a new adapter on top"
        )


def without_start(opened: OpenedModel) -> tuple[OpenedModel, Start]:
    """The base under an opened adapter, and the adapter.

    Raises:
        TrainingError: if it is not a single LoRA adapter that is not merged.
    """
    model = opened.model
    configs = list(model.peft_config.values())
    if len(configs) != 1 or configs[0].peft_type != "LORA":
        kinds = ", ".join(str(getattr(one.peft_type, "value", one.peft_type)) for one in configs)
        raise TrainingError(
            f"{opened.name} has adapters of the kinds {kinds}, and a run goes on from one of LoRA "
            "only: merge it (hyperlens merge) and give the result"
        )
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise TrainingError(f"the adapter of {opened.name} is merged: unmerge it (unmerge_adapter)")
    if getattr(configs[0], "alora_invocation_tokens", None):
        raise TrainingError(
            f"{opened.name} has alora_invocation_tokens, and a run would go on from it as a plain "
            "LoRA adapter, which acts on every token: train on from its base instead"
        )
    (adapter,) = model.peft_config
    weights = {name: weight.clone() for name, weight in _weights(model, adapter).items()}
    start = Start(opened.name, _decisive(configs[0]), weights, _logits(model))
    named = configs[0].base_model_name_or_path
    kind = opened.kind
    if kind != "object":
        kind = "folder" if Path(named or "").is_dir() else "hub"
    return replace(opened, model=model.unload(), name=named or opened.name, kind=kind), start


def _weights(model: Any, adapter: str) -> dict[str, Tensor]:
    """An adapter's weights by the names in its file; they are those of the model, not copies."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {key: weight.detach() for key, weight in found.items()}


def _logits(model: Any) -> Tensor:
    """What a model in evaluation mode returns for a few tokens, in float32 on the CPU."""
    weight = model.get_input_embeddings().weight
    ids = torch.arange(8, device=weight.device)[None] % text_config(model).vocab_size
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits.float().cpu()
    finally:
        for module, mode in modes:
            module.training = mode
    return logits


def _pissa_hint(model: Any) -> str:
    """What to do where the run would decompose the weights anew."""
    if SUBTRACTED not in model.peft_config:
        return ""
    return (
        "; a run with lora_init pissa saves a plain adapter of twice its rank: to go on, set "
        "lora_init='zero', and lora_r and lora_alpha to those in adapter_config.json"
    )


def _decisive(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in DECISIVE}


def _shape(weight: Tensor | None) -> str:
    return "nothing" if weight is None else " x ".join(map(str, weight.shape))
