"""PiSSA: an adapter that starts from the principal directions of the weights it adapts.

PiSSA (Meng et al. 2024, arXiv 2404.02948) moves the r largest singular directions of a weight W
into the adapter, W = (W - s B0 A0) + s B0 A0, and trains A and B from there; s is the adapter's
scale. Implemented literally, that changes the base, and the adapter is wrong on the original one.
Here W never changes. Instead a second, frozen adapter subtracts s B0 A0. The model is therefore an
ordinary LoRA on the original base at all times, and in the end the two adapters are joined into one
of rank 2r, whose update is s (B A - B0 A0).

PEFT's own conversion (`save_pretrained(path_initial_model_for_weight_conversion=…)`) joins the same
four factors, and is not used here, because it serves an adapter whose base has been replaced by
W - s B0 A0 in memory. That base, rounded anew in half precision, is not the one that the run names
and hashes; the start has to be written to a folder before training and read again at every save;
and whatever looks at the model in between (records against the base, checkpoints that are kept,
hooks on the finished run) would meet an adapter that is right on the changed base only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import TrainingError

# PEFT's name for the adapter that is trained, and ours for the frozen one.
TRAINED, SUBTRACTED = "default", "subtracted"


def start(model: Any) -> None:
    """Set a fresh LoRA adapter to the principal directions, and add the one that subtracts them.

    The singular value decompositions are exact, not randomised: the same weights give the same
    start.

    Args:
        model: a PeftModel, changed in place.

    Raises:
        TrainingError: if a weight has fewer directions than the rank, or a dtype that PEFT cannot
            decompose, or there is one weight for several experts.
    """
    config = copy.deepcopy(model.peft_config[TRAINED])
    config.lora_dropout = 0.0
    for path, layer in _layers(model):
        _check(path, layer)
    model.add_adapter(SUBTRACTED, config)
    model.base_model.set_adapter([TRAINED, SUBTRACTED])
    for _, layer in _layers(model):
        weight = layer.get_base_layer().weight
        # PEFT's initialisation also replaces W by W - s B0 A0: put the original back.
        original = weight.data
        layer.pissa_init(TRAINED, "pissa")
        weight.data = original
        # The frozen copy is (-B0) A0. Its dropout is 0: it subtracts all of s B0 A0 in every step.
        for trained, subtracted, sign in (
            (layer.lora_A[TRAINED], layer.lora_A[SUBTRACTED], 1.0),
            (layer.lora_B[TRAINED], layer.lora_B[SUBTRACTED], -1.0),
        ):
            subtracted.weight.requires_grad_(False)
            subtracted.weight.data = sign * trained.weight.data


def join(model: Any) -> None:
    """Join the trained adapter and the frozen one into a plain LoRA adapter of twice the rank.

    s B A - s B0 A0 = s [B, -B0] [A; A0], with alpha such that the scale s stays the same. Any other
    adapter is left unchanged.

    Args:
        model: a PeftModel, changed in place; its function stays the same up to rounding.
    """
    if SUBTRACTED not in model.peft_config:
        return
    config = model.peft_config[TRAINED]
    # s is alpha / r, or alpha / sqrt(r) for rsLoRA, and r doubles.
    alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)
    for _, layer in _layers(model):
        # A is [r, in] and B is [out, r]: they are joined along r.
        for factors, dim in ((layer.lora_A, 0), (layer.lora_B, 1)):
            joined = factors[TRAINED]
            both = [joined.weight.data, factors[SUBTRACTED].weight.data]
            joined.weight = torch.nn.Parameter(torch.cat(both, dim))
            joined.out_features, joined.in_features = joined.weight.shape
        layer.r[TRAINED] *= 2
        layer.lora_alpha[TRAINED] = alpha
    config.r *= 2
    config.lora_alpha = alpha
    model.base_model.set_adapter(TRAINED)
    model.delete_adapter(SUBTRACTED)


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path.removeprefix("base_model.model."), module


def _check(path: str, layer: Any) -> None:
    weight, r = getattr(layer.get_base_layer(), "weight", None), layer.r[TRAINED]
    if weight is None:
        raise TrainingError(
            f"lora_init pissa needs linear projections, and {path} holds several experts: choose "
            "another lora_init, or target_modules without its names"
        )
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TrainingError(
            f"lora_init pissa needs weights in float32, bfloat16 or float16, and {path} is "
            f"{str(weight.dtype).removeprefix('torch.')}: choose another dtype or lora_init"
        )
    if min(weight.shape) < r:
        raise TrainingError(
            f"lora_r is {r}, but {path} has only {min(weight.shape)} principal directions for "
            "lora_init pissa: lower lora_r, or leave that module out of target_modules"
        )
