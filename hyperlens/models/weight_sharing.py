"""Copies of a model that share its weights, so that the caller's model is never changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import LoadingError, first_line
from ..offloading import check_is_here, has_offloaded, shared_by_copies
from .kinds import is_peft, quantisation_of


def weight_sharing_copy(model: nn.Module) -> Any:
    """A copy of all modules around the same tensors, in evaluation mode.

    Parameters are new objects over the same storage, so that merging an adapter, casting, or
    moving the copy leaves the caller's weights, keys, training mode and configuration alone,
    and ties between weights survive. Costs no memory for weights. The autocast that accelerate
    wraps around `forward` while it trains in bfloat16 is left out.
    """
    kept = (*model.buffers(), *shared_by_copies(model))
    memo: dict[int, Any] = {id(one): one for one in kept}
    for parameter in model.parameters():
        # Quantised parameters carry state of their own in a subclass: share those as they are.
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = (
            nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            if plain
            else parameter
        )
    try:
        copied = copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise LoadingError(
            f"cannot copy the modules of {type(model).__name__} ({error}): save it with "
            "save_pretrained and pass the folder"
        ) from error
    for module in copied.modules():
        if "_original_forward" in vars(module):
            del module.forward, module._original_forward
    keep_packing(copied)
    return copied


# What modules of bitsandbytes keep: whether this CPU multiplies bfloat16 by 512 bits at a time, and
# of weights of 4 bits whether they have been repacked for it.
REPACKS, REPACKED = "support_avx512bf16_for_cpu", "packing_format_for_cpu"


def keep_packing(model: nn.Module) -> None:
    """Let bitsandbytes leave weights of 4 bits as they are when they are run.

    On some CPUs it repacks them in place in the first forward pass without gradients. Their scales
    are then rounded to bfloat16, the caller's model has another hash, and no gradient passes.
    """
    for module in model.modules():
        if REPACKS in vars(module):
            setattr(module, REPACKS, False)


def is_repacked(model: nn.Module) -> bool:
    """Whether that has happened already."""
    states = (getattr(weight, "quant_state", None) for weight in model.parameters())
    return any(getattr(state, REPACKED, False) for state in states)


def converted(model: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """Move and cast a weight-sharing copy; tensors are copied only where something changes.

    As in `from_pretrained`, only what a checkpoint stores is cast: buffers that the model computes
    itself, such as rotary frequencies, keep their precision.

    Raises:
        LoadingError: if the model is spread over several devices, or quantised.
    """
    if device is not None:
        model = _moved(model, device)
    if dtype is not None:
        _cast(model, dtype)
    return model


def _moved(model: Any, device: torch.device) -> Any:
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    wanted = torch.empty(0, device=device).device  # "cuda" is a name for one of several
    if places <= {wanted}:
        return model
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise LoadingError(
            f"{type(model).__name__} is spread over several devices, so it cannot be moved to "
            f"{device}: leave device out, and give both models spread in the same way"
        )
    try:
        # The class's own method: accelerate puts one on the model that moves the original.
        return type(model).to(model, device)
    except (ValueError, RuntimeError) as error:
        raise LoadingError(
            f"cannot move {type(model).__name__} to {device} ({first_line(error)}): load it there"
        ) from error


def _cast(model: Any, dtype: torch.dtype) -> None:
    if has_offloaded(model):
        raise LoadingError(
            f"{type(model).__name__} is offloaded and cannot be cast to {dtype}: load it in that "
            "dtype, or leave dtype out"
        )
    if quantisation_of(model) is not None:
        raise LoadingError(
            f"{type(model).__name__} is quantised and cannot be cast to {dtype}: leave dtype out"
        )
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    cast: dict[int, torch.Tensor] = {}  # a buffer that two modules share stays shared
    for module in model.modules():
        for name, buffer in module._buffers.items():
            computed = buffer is None or name in module._non_persistent_buffers_set
            if not computed and buffer.is_floating_point():
                module._buffers[name] = cast.setdefault(id(buffer), buffer.to(dtype))


def compute_in_float32(model: Any, blocks: Iterable[nn.Module] = ()) -> None:
    """Let a weight-sharing copy compute in float32, at least.

    Args:
        model: cast in place, buffers too.
        blocks: modules of it whose parameters are cast only while they run, to save memory.
    """
    blocks = list(blocks)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = _at_least_float32(parameter.data)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _at_least_float32(buffer)
    for block in blocks:
        half: dict[nn.Parameter, torch.Tensor] = {}

        def widen(module: nn.Module, args: Any, half: Any = half) -> None:
            for parameter in module.parameters():
                half[parameter] = parameter.data
                parameter.data = _at_least_float32(parameter.data)

        def narrow(module: nn.Module, args: Any, output: Any, half: Any = half) -> None:
            for parameter, data in half.items():
                parameter.data = data
            half.clear()

        block.register_forward_pre_hook(widen)
        block.register_forward_hook(narrow)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def merged(model: Any) -> Any:
    """The plain model with any unmerged adapter folded into (copied) weights.

    Where an adapter changes one of two tied weights, as LoRA on the unembedding alone does, the
    tie goes, and the configuration says so.

    Raises:
        LoadingError: if this kind of adapter cannot be merged.
    """
    check_is_here(model, "changing or converting it")
    model = weight_sharing_copy(model)
    if not is_peft(model):
        return model
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            _unshare_adapted(model)
            plain = model.merge_and_unload(safe_merge=True).eval()
            _unwrap_saved(plain)
    except Exception as error:
        raise LoadingError(
            f"this adapter cannot be merged into its base ({error}); use backend='residual', "
            "which runs it unmerged"
        ) from error
    if not is_tied(plain):
        plain.config.tie_word_embeddings = False
    _unshare_replicated(plain)
    return plain


def _unwrap_saved(plain: Any) -> None:
    """Put trained copies (`modules_to_save`) in place where peft leaves its wrapper around them.

    LN tuning does, and the model would be saved under names that nobody reads.
    """
    from peft.utils.other import ModulesToSaveWrapper

    for name, module in list(plain.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            (active,) = module.active_adapters
            plain.set_submodule(name, module.modules_to_save[active])


def _unshare_replicated(plain: Any) -> None:
    """Give each block's weights storage of their own where an adapter used a block several times.

    Such blocks (`layer_replication`) share what the adapter does not change; a saved model cannot
    say so, other than of its own tied weights.
    """
    tied = set(getattr(plain, "all_tied_weights_keys", None) or {})
    seen: set[int] = set()
    for name, weight in plain.named_parameters(remove_duplicate=False):
        place = weight.data_ptr()
        if place in seen and name not in tied and type(weight) is nn.Parameter:
            module, _, key = name.rpartition(".")
            own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            setattr(plain.get_submodule(module), key, own)
        seen.add(place)


def _unshare_adapted(model: Any) -> None:
    """Give the weights under each adapter, which merging writes, storage of their own.

    Else merging would also write those of a module that is tied to them; and some kinds (HiRA)
    merge in place, into the tensors that the caller's model has too. Costs no more than what is
    merged needs anyway.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            base_layer = layer.get_base_layer()
            for name, weight in base_layer.named_parameters(recurse=False):
                if type(weight) is nn.Parameter:
                    own = nn.Parameter(weight.detach().clone(), requires_grad=False)
                    setattr(base_layer, name, own)


def token_tables(model: Any) -> list[Any]:
    """Embedding and unembedding, which have a row per token; what a model lacks is left out."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return [table for table in tables if table is not None]


def is_tied(model: Any) -> bool:
    """Whether embedding and unembedding are one tensor."""
    return len({table.weight.data_ptr() for table in token_tables(model)}) == 1


def untie(model: Any) -> None:
    """Make the unembedding of a weight-sharing copy a parameter of its own."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach(), requires_grad=False)
    model.config.tie_word_embeddings = False
