"""Which weights are trained: whole blocks, or LoRA on explicit blocks and projections."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError, first_line
from ..models.structure import find_structure
from . import pissa
from .recipes import Recipe


@dataclass(frozen=True)
class Stack:
    """The blocks of a model, by name.

    Attributes:
        blocks: the blocks in order.
        container: name of the list that holds them ("layers", "h"), as PEFT wants to know it.
    """

    blocks: tuple[nn.Module, ...]
    container: str


def find_stack(model: nn.Module) -> Stack:
    """Find the blocks by watching the model run.

    Raises:
        LoadingError: if there is no stack of blocks.
    """
    blocks = find_structure(model).blocks
    path = next(name for name, module in model.named_modules() if module is blocks[0])
    return Stack(blocks, path.split(".")[-2])


def trained_blocks(n_blocks: int, recipe: Recipe) -> tuple[int, ...]:
    """0-based indices of the blocks that the method trains.

    Raises:
        TrainingError: if blocks are asked for that the model does not have.
    """
    if recipe.blocks is not None:
        if max(recipe.blocks) >= n_blocks:
            raise TrainingError(
                f"blocks has {max(recipe.blocks)} but the model has {n_blocks} blocks: indices go "
                f"from 0 to {n_blocks - 1}"
            )
        return tuple(sorted(recipe.blocks))
    if recipe.method != "late_lora":
        return tuple(range(n_blocks))
    if recipe.last_k > n_blocks:
        raise TrainingError(
            f"last_k is {recipe.last_k} but the model has {n_blocks} blocks: choose 1 to {n_blocks}"
        )
    return tuple(range(n_blocks - recipe.last_k, n_blocks))


def train_only(model: nn.Module, stack: Stack, blocks: tuple[int, ...]) -> None:
    """Let gradients reach the weights inside some blocks, and no others.

    Embeddings, final norm and unembedding are frozen with the other blocks.

    Args:
        model: a plain model, changed in place.
        stack: the model's blocks.
        blocks: 0-based indices of those to train.

    Raises:
        TrainingError: if a weight inside them is also used elsewhere, which could then not stay
            as it is.
    """
    chosen = [stack.blocks[i] for i in blocks]
    trained = {id(p) for block in chosen for p in block.parameters()}
    inside = {id(module) for block in chosen for module in block.modules()}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in trained and id(module) not in inside:
                raise TrainingError(
                    f"{path}.{name} shares its weights with a block to train: train both, leave "
                    "out blocks to train everything, or use method='lora'"
                )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def projections(stack: Stack, recipe: Recipe) -> tuple[str, ...]:
    """Names of the modules inside the blocks that get an adapter.

    Raises:
        TrainingError: if a name asked for is not there or a router's, or there are no linear
            projections.
    """
    paths = {name: m for block in stack.blocks for name, m in block.named_modules() if name}
    linear = tuple(dict.fromkeys(p.rsplit(".", 1)[-1] for p, m in paths.items() if _is_linear(m)))
    if recipe.target_modules is None:
        if not linear:
            raise TrainingError("the blocks have no linear projections to adapt: use method='full'")
        return linear
    for wanted in recipe.target_modules:
        named = [m for path, m in paths.items() if is_named(path, wanted)]
        if any(isinstance(m, nn.Linear) and not _is_linear(m) for m in named):
            raise TrainingError(
                f"{wanted} returns something else than a projection does, so it takes no adapter: "
                f"the projections are {', '.join(linear)}"
            )
        if not named:
            near = difflib.get_close_matches(wanted, [*linear, *paths], 3, 0.5)
            hint = f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
            raise TrainingError(
                f"no module {wanted!r} inside the blocks: {hint}the projections are "
                f"{', '.join(linear)}"
            )
    return recipe.target_modules


def with_adapter(
    model: Any,
    name: str | None,
    stack: Stack,
    blocks: tuple[int, ...],
    targets: tuple[str, ...],
    recipe: Recipe,
) -> Any:
    """The model with a fresh LoRA adapter on the given blocks; everything else is frozen.

    The adapter's initial values come from the current random state. Blocks are named one by one
    (`layers_to_transform`), so that a projection of the same name elsewhere is left alone. In some
    mixtures of experts PEFT takes gate_proj, up_proj and down_proj for the experts' weights, and
    adapts those in every block unless told their whole names. DoRA
    (Liu et al. 2024, arXiv 2402.09353) and rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) are
    peft's own; for PiSSA see `pissa`.

    Args:
        model: a plain model, changed in place.
        name: of the base model, written into the adapter's configuration; None if it has none.
        stack: the model's blocks.
        blocks: 0-based indices.
        targets: names of the modules to adapt, from `projections`.
        recipe: rank, scale, dropout, initial values and kind of LoRA.

    Raises:
        TrainingError: if PEFT cannot adapt these modules.
    """
    from peft import LoraConfig, TaskType

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type] # fractions work
        lora_dropout=recipe.lora_dropout,
        target_modules=list(targets),
        layers_to_transform=list(blocks),
        layers_pattern=stack.container,
        fan_in_fan_out=_transposed(stack, targets),
        init_lora_weights="gaussian" if recipe.lora_init == "gaussian" else True,
        use_dora=recipe.lora_dora,
        use_rslora=recipe.lora_rslora,
    )
    chosen = [stack.blocks[i] for i in blocks]
    adapted = _adapted(model, config, targets)
    if _trains_elsewhere(adapted, chosen):
        config = adapted.peft_config["default"]
        model = adapted.unload()
        names = config.target_parameters or ()
        config.target_parameters = _names_in_full(model, chosen, names)
        adapted = _adapted(model, config, targets)
        if _trains_elsewhere(adapted, chosen):
            raise TrainingError(
                f"PEFT adapts {', '.join(targets)} outside the chosen blocks, too: name other "
                "target_modules, or use method='full' with blocks"
            )
    adapted.peft_config["default"].base_model_name_or_path = name
    if recipe.lora_init == "pissa":
        pissa.start(adapted)
    return adapted


def is_named(path: str, target: str) -> bool:
    """Whether a target means this module or parameter, by PEFT's rule."""
    return f".{path}".endswith(f".{target}")


def _adapted(model: Any, config: Any, targets: tuple[str, ...]) -> Any:
    from peft import get_peft_model

    try:
        with warnings.catch_warnings():
            # peft reads a transformers property that has been renamed; the reading is theirs.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            # The ranks that peft itself gives to experts: it looks for them among modules only.
            warnings.filterwarnings("ignore", ".*_pattern keys did not match", RuntimeWarning)
            return get_peft_model(model, config)
    except ValueError as error:
        raise TrainingError(
            f"PEFT cannot adapt {', '.join(targets)}: {first_line(error)}"
        ) from error


def _trains_elsewhere(model: nn.Module, chosen: Sequence[nn.Module]) -> bool:
    inside = {id(p) for block in chosen for p in block.parameters()}
    return any(p.requires_grad and id(p) not in inside for p in model.parameters())


def _names_in_full(
    model: nn.Module, chosen: Sequence[nn.Module], names: Sequence[str] | set[str]
) -> list[str]:
    """Whole names of the parameters inside some blocks that short names mean."""
    inside = {id(p) for block in chosen for p in block.parameters()}
    return [
        path
        for path, p in model.named_parameters()
        if id(p) in inside and any(is_named(path, name) for name in names)
    ]


def _is_linear(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear):
        return _is_conv1d(module)
    return type(module).forward is nn.Linear.forward or _maps_vectors(module)


def _maps_vectors(module: nn.Linear) -> bool:
    """Whether a subclass of Linear still does what one does: some routers return a tuple."""
    try:
        with torch.no_grad():
            made = module(module.weight.new_ones(2, module.in_features))
    except Exception:  # made for input of another shape
        return False
    return isinstance(made, Tensor) and made.shape == (2, module.out_features)


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, which keeps its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _transposed(stack: Stack, targets: tuple[str, ...]) -> bool:
    adapted = [
        module
        for name, module in stack.blocks[0].named_modules()
        if any(is_named(name, target) for target in targets)
    ]
    return any(map(_is_conv1d, adapted))
