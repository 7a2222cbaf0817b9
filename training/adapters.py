"""Which weights are trained: whole blocks, or LoRA on explicit blocks and projections."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError, first_line
from ..models.structure import find_structure
from . import pissa
from .recipes import Recipe

# PEFT puts it between an adapted module and its weights.
WRAPPED = ".base_layer"


@dataclass(frozen=True)
class BlockList:
    """The blocks of a model, and the name of the list that holds them.

    Attributes:
        blocks: the blocks in order.
        container: name of the list that holds them ("layers", "h"), which PEFT needs.
    """

    blocks: tuple[nn.Module, ...]
    container: str


def find_block_list(model: nn.Module) -> BlockList:
    """Find the blocks by tracing a forward pass.

    Raises:
        LoadingError: if there is no list of blocks.
    """
    blocks = find_structure(model).blocks
    path = next(name for name, module in model.named_modules() if module is blocks[0])
    return BlockList(blocks, path.split(".")[-2])


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


def train_only(model: nn.Module, block_list: BlockList, blocks: tuple[int, ...]) -> None:
    """Let gradients reach the weights inside some blocks, and no others.

    Embeddings, final norm and unembedding are frozen with the other blocks.

    Args:
        model: a plain model, changed in place.
        block_list: the model's blocks.
        blocks: 0-based indices of those to train.

    Raises:
        TrainingError: if a weight inside them is also used elsewhere, which would then change,
            too.
    """
    to_train = [block_list.blocks[i] for i in blocks]
    trained = {id(p) for block in to_train for p in block.parameters()}
    inside = {id(module) for block in to_train for module in block.modules()}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in trained and id(module) not in inside:
                raise TrainingError(
                    f"{path}.{name} shares its weights with a block to train: train both, leave "
                    "blocks out to train everything, or use method='lora'"
                )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def projections(block_list: BlockList, recipe: Recipe) -> tuple[str, ...]:
    """Names of the modules inside the blocks that get an adapter.

    Raises:
        TrainingError: if there is no module of a requested name, it is a router, or there are no
            linear projections.
    """
    paths = {name: m for block in block_list.blocks for name, m in block.named_modules() if name}
    linear = tuple(dict.fromkeys(p.rsplit(".", 1)[-1] for p, m in paths.items() if _is_linear(m)))
    if recipe.target_modules is None:
        if not linear:
            raise TrainingError("the blocks have no linear projections to adapt: use method='full'")
        return linear
    for target in recipe.target_modules:
        modules = [m for path, m in paths.items() if is_named(path, target)]
        if any(isinstance(m, nn.Linear) and not _is_linear(m) for m in modules):
            raise TrainingError(
                f"{target} does not return what a linear projection does, so it cannot have an "
                f"adapter: the projections are {', '.join(linear)}"
            )
        if not modules:
            near = difflib.get_close_matches(target, [*linear, *paths], 3, 0.5)
            hint = f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
            raise TrainingError(
                f"no module {target!r} inside the blocks: {hint}the projections are "
                f"{', '.join(linear)}"
            )
    return recipe.target_modules


def with_adapter(
    model: Any,
    name: str | None,
    block_list: BlockList,
    blocks: tuple[int, ...],
    targets: tuple[str, ...],
    recipe: Recipe,
) -> Any:
    """The model with a fresh LoRA adapter on the given blocks; everything else is frozen.

    The adapter's initial values come from the current random state. Blocks are named one by one
    (`layers_to_transform`), so that a projection of the same name elsewhere gets no adapter. In
    some mixtures of experts PEFT takes gate_proj, up_proj and down_proj to mean the experts'
    weights, and adapts those in every block unless it gets their full names. DoRA (Liu et al.
    2024, arXiv 2402.09353) and rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) are PEFT's own; for
    PiSSA see `pissa`.

    Args:
        model: a plain model, changed in place.
        name: of the base model, written into the adapter's configuration; None if it has none.
        block_list: the model's blocks.
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
        layers_pattern=block_list.container,
        fan_in_fan_out=_is_transposed(block_list, targets),
        init_lora_weights="gaussian" if recipe.lora_init == "gaussian" else True,
        use_dora=recipe.lora_dora,
        use_rslora=recipe.lora_rslora,
    )
    trained = [block_list.blocks[i] for i in blocks]
    adapted = _adapted(model, config, targets)
    if _trains_elsewhere(adapted, trained):
        config = adapted.peft_config["default"]
        model = adapted.unload()
        names = config.target_parameters or ()
        config.target_parameters = _full_names(model, trained, names)
        adapted = _adapted(model, config, targets)
        if _trains_elsewhere(adapted, trained):
            raise TrainingError(
                f"PEFT adapts {', '.join(targets)} outside the trained blocks, too: name other "
                "target_modules, or use method='full' with blocks"
            )
    adapted.peft_config["default"].base_model_name_or_path = name
    if recipe.lora_init == "pissa":
        pissa.start(adapted)
    return adapted


def is_named(path: str, target: str) -> bool:
    """Whether a target names this module or parameter: PEFT compares the ends of paths."""
    return f".{path}".endswith(f".{target}")


def _adapted(model: Any, config: Any, targets: tuple[str, ...]) -> Any:
    from peft import get_peft_model

    try:
        with warnings.catch_warnings():
            # PEFT reads a property that transformers has renamed.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            # PEFT gives experts a rank pattern of its own, and then does not find it in use.
            warnings.filterwarnings("ignore", ".*_pattern keys did not match", RuntimeWarning)
            return get_peft_model(model, config)
    except ValueError as error:
        raise TrainingError(
            f"PEFT cannot adapt {', '.join(targets)}: {first_line(error)}"
        ) from error


def _trains_elsewhere(model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    inside = {id(p) for block in blocks for p in block.parameters()}
    return any(p.requires_grad and id(p) not in inside for p in model.parameters())


def _full_names(
    model: nn.Module, blocks: Sequence[nn.Module], names: Sequence[str] | set[str]
) -> list[str]:
    """The paths of the parameters inside some blocks that short names mean."""
    inside = {id(p) for block in blocks for p in block.parameters()}
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
    """Whether a subclass of Linear maps vectors as Linear does: some routers return a tuple."""
    # Packed weights of 4 bits are bytes, and read what the model's other weights are.
    dtype = module.weight.dtype if module.weight.is_floating_point() else torch.float32
    try:
        with torch.no_grad():
            output = module(module.weight.new_ones(2, module.in_features, dtype=dtype))
    except Exception:  # it expects input of another shape
        return False
    return isinstance(output, Tensor) and output.shape == (2, module.out_features)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _is_transposed(block_list: BlockList, targets: tuple[str, ...]) -> bool:
    adapted = [
        module
        for name, module in block_list.blocks[0].named_modules()
        if any(is_named(name, target) for target in targets)
    ]
    return any(map(_is_conv1d, adapted))


# What an adapter leaves out


def notes_on_unadapted(
    blocks: Sequence[nn.Module], targets: Sequence[str], all_linear: bool
) -> tuple[str, ...]:
    """Notes on weights without an adapter in blocks that are trained, so nobody misses them.

    Args:
        blocks: the blocks that are trained, with their adapter.
        targets: the projections that were to be adapted.
        all_linear: whether these are all linear ones, because the recipe names none.
    """
    notes = []
    linear = _joined(_linear_without_adapter(blocks, targets))
    if linear:
        notes.append(
            "PEFT takes some names to mean experts' weights in this architecture: no adapter on "
            f"the linear layers {linear}"
        )
    experts = _joined(_experts_without_adapter(blocks))
    if experts and all_linear:
        notes.append(f"experts' weights are no linear layers: no adapter on {experts}")
    return tuple(notes)


def _linear_without_adapter(blocks: Sequence[nn.Module], targets: Sequence[str]) -> Iterator[str]:
    """Linear layers of a target's name; one that is adapted has moved down, to base_layer."""
    for block in blocks:
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear) and any(is_named(path, name) for name in targets):
                yield path


def _experts_without_adapter(blocks: Sequence[nn.Module]) -> Iterator[str]:
    """Experts' weights, which are stacked matrices: [experts, rows, columns]."""
    for block in blocks:
        modules: Iterator[Any] = block.modules()
        wrappers = (m for m in modules if type(m).__name__ == "ParamWrapper")
        adapted = {id(wrapper.get_param()) for wrapper in wrappers}
        for path, p in block.named_parameters():
            # A convolution over each channel by itself also has three dimensions, one of size 1.
            if p.dim() == 3 and min(p.shape) > 1 and id(p) not in adapted:
                yield path.replace(WRAPPED, "")


def _joined(paths: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(paths))
