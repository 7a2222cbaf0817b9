"""What models cost before they are opened: their sizes, and how fast this machine runs such blocks.

Nothing but a configuration is needed. Times come from models of the same width and vocabulary with
few blocks and arbitrary weights, timed on the device that is asked about; everything grows in
proportion to the number of blocks.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import LoadingError, first_line
from .files import expand_user
from .models.kinds import plain_model, text_config

# Blocks of the two models that are timed.
FEW, MORE = 1, 3
TOKENS, GENERATED = 32, 8
REPEATS = 2
# Seconds beside which what a first call does once is nothing. What is short is repeated until it
# has taken a quarter of that, so that what else the machine does counts little.
LONG_ENOUGH = 0.4
# Weights of a model that is only timed repeat so many numbers: to draw each would take longer than
# the timing. A prime, so that no two rows are the same.
PATTERN = 4099


@dataclass(frozen=True)
class ModelSize:
    """How large a model is.

    Attributes:
        parameters: of the whole model.
        in_blocks: parameters of all blocks.
        in_head: numbers of the unembedding, whether they are the embedding's or its own.
        n_layers: blocks.
        d_model: width.
        d_vocab: number of logits.
    """

    parameters: float
    in_blocks: float
    in_head: float
    n_layers: int
    d_model: int
    d_vocab: int


@dataclass(frozen=True)
class Speed:
    """Seconds per token: of everything but the blocks, and of one block.

    Attributes:
        read: of a forward pass.
        train: of forward, backward and optimiser.
        write: of a step of generation, per sequence.
    """

    read: tuple[float, float]
    train: tuple[float, float]
    write: tuple[float, float]


def config_of(base: Any) -> Any:
    """The configuration of a model, its folder or hub id.

    Raises:
        LoadingError: if there is none.
    """
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(base, PretrainedConfig):
        return base
    if isinstance(base, tuple) and base:
        return config_of(base[0])
    if isinstance(base, nn.Module):
        return plain_model(base).config
    try:
        return AutoConfig.from_pretrained(str(expand_user(base)))
    except (OSError, ValueError) as error:
        raise LoadingError(
            f"cannot read a configuration from {base} ({first_line(error)}): give a folder with a "
            "config.json, or a hub id"
        ) from None


def build(config: Any, n_blocks: int | None, device: torch.device) -> Any:
    """A model whose weights mean nothing.

    Args:
        config: of a causal language model.
        n_blocks: how many blocks it has; None for as many as its configuration says.
        device: where it is; "meta" for a model without any numbers.

    Raises:
        LoadingError: if there is no such causal language model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    changed = copy.deepcopy(config)
    inner = changed.get_text_config()
    if n_blocks is not None:
        inner.num_hidden_layers = n_blocks
        if getattr(inner, "layer_types", None):
            inner.layer_types = inner.layer_types[:n_blocks]
    try:
        if device.type == "meta":
            with device:
                return AutoModelForCausalLM.from_config(changed)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(changed)
    except (ValueError, TypeError, AttributeError) as error:
        raise LoadingError(
            f"no causal language model can be built from this configuration: {first_line(error)}"
        ) from None
    _fill(model)
    model.tie_weights()
    return model.to(device)


def _fill(model: nn.Module) -> None:
    """Give a model without numbers some."""
    pattern = 0.02 * torch.randn(PATTERN, generator=torch.Generator().manual_seed(0))
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, empty in module._parameters.items():
            if empty is None:
                continue
            if id(empty) not in made:
                times = -(-empty.numel() // PATTERN)
                numbers = pattern.repeat(times)[: empty.numel()].view(empty.shape)
                made[id(empty)] = nn.Parameter(numbers.to(empty.dtype))
            module._parameters[name] = made[id(empty)]


def size_of(config: Any) -> ModelSize:
    """The size of the model that a configuration describes.

    Raises:
        LoadingError: if it describes no causal language model.
    """
    whole = build(config, None, torch.device("meta"))
    few, more = (_count(build(config, n, torch.device("meta"))) for n in (FEW, MORE))
    block = (more - few) / (MORE - FEW)
    inner = text_config(whole)
    n_layers = int(inner.num_hidden_layers)
    head = float(inner.vocab_size * inner.hidden_size)
    return ModelSize(
        _count(whole), block * n_layers, head, n_layers, inner.hidden_size, inner.vocab_size
    )


def _count(model: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in model.parameters()))


def measure_speed(config: Any, device: torch.device) -> Speed:
    """Time models with one and with three blocks, and take the difference as two blocks.

    Args:
        config: of the whole model.
        device: to time on.
    """
    few, more = (_times(build(config, n, device).eval(), device) for n in (FEW, MORE))
    found = []
    for less, longer in zip(few, more, strict=True):
        block = max(0.0, (longer - less) / (MORE - FEW))
        found.append((max(0.0, less - FEW * block), block))
    return Speed(*found)


def _times(model: Any, device: torch.device) -> tuple[float, float, float]:
    """Seconds per token of reading, training and writing with a small model."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    batch = 4
    ids = torch.randint(vocabulary, (batch, TOKENS), device=device)
    mask = torch.ones_like(ids)

    def read() -> None:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)

    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0)

    def train() -> None:
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    def write() -> None:
        model.generate(
            input_ids=ids[:, :1], attention_mask=mask[:, :1], max_new_tokens=GENERATED,
            min_new_tokens=GENERATED, do_sample=False, pad_token_id=0,
        )  # fmt: skip

    per_token = batch * TOKENS
    return (
        fastest(read, device) / per_token,
        fastest(train, device) / per_token,
        fastest(write, device) / GENERATED / batch,
    )


def fastest(
    function: Callable[[], Any],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The least of several times, the first call left out; what takes long is timed once.

    Args:
        function: what is timed.
        device: where it runs.
        clock: in seconds.
    """
    times: list[float] = []
    while sum(times) < LONG_ENOUGH and (len(times) <= REPEATS or sum(times) < LONG_ENOUGH / 4):
        wait(device)
        start = clock()
        function()
        wait(device)
        times.append(clock() - start)
    return min(times[1:] or times)


def wait(device: torch.device) -> None:
    """Let an accelerator finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_bytes(n: float) -> str:
    """`1.5 GB`, `300 MB`.

    >>> in_bytes(1.5e9), in_bytes(3e6)
    ('1.5 GB', '3 MB')
    """
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:,.0f} MB"


def in_time(seconds: float) -> str:
    """`3.2 h`, `14 min`, `20 s`.

    >>> in_time(11520.0), in_time(840.0), in_time(20.0)
    ('3.2 h', '14 min', '20 s')
    """
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
