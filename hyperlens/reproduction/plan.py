"""What a reproduction will take, before any of it is done: tokens, FLOPs, memory, disk and time.

Nothing but the base's configuration is needed. Times come from models of the same width and
vocabulary with one and with three blocks, random weights, timed on the device that is asked about;
everything grows in proportion to the number of blocks.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checks import check_types
from ..errors import LoadingError, first_line
from ..files import expand_user
from ..hooks.loading import parse_device
from ..models.kinds import plain_model, text_config
from ..render.blocks import Table, Text
from ..render.terminal import to_text
from .paper import STAGES, exhibits, stages_of
from .protocol import METHODS, Protocol, protocol_for

# Blocks of the two models that are timed.
FEW, MORE = 1, 3
TOKENS, GENERATED = 32, 8
REPEATS = 2
# Passes over all logits that the experiments make besides the models' own: rank correlations sort
# the whole vocabulary, entropy matching and fitted biases iterate. In forward passes of the head.
LOGIT_PASSES = {
    "temperature": 40, "static_bias": 60, "provenance": 6, "variants": 15, "geometry": 25,
    "null_test": 12, "cross_domain": 12,
}  # fmt: skip
# How often a stage has each model read all held-out texts, and continue all prompts.
READINGS = {
    "temperature": 2, "static_bias": 2, "provenance": 2, "geometry": 2, "variants": 6,
    "cross_domain": 2,
}  # fmt: skip
WRITINGS = {
    # What is written once is kept: the base and the tuned model's greedy text count once, here.
    "temperature": 8, "decoding": 4, "cross_domain": 0, "variants": 2, "judge": 2,
}  # fmt: skip


class Stage(NamedTuple):
    """What one stage will take.

    Attributes:
        name: of the stage.
        tokens: read or written, all passes counted.
        flops: of the matrix products.
        memory: of weights, optimiser and caches at its peak, in bytes.
        disk: of what it leaves behind, in bytes.
        seconds: estimated.
    """

    name: str
    tokens: float
    flops: float
    memory: float
    disk: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a reproduction will take.

    Attributes:
        model: the base, in words.
        device: what the times are for.
        stages: in order.
    """

    model: str
    device: str
    stages: tuple[Stage, ...]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        stages = [stage._asdict() for stage in self.stages]
        return {
            "model": self.model, "device": self.device, "seconds": self.seconds, "stages": stages
        }  # fmt: skip

    def __str__(self) -> str:
        head = ["stage", "tokens", "FLOPs", "memory", "disk", "time"]
        rows = [
            [
                one.name,
                f"{one.tokens:,.0f}",
                f"{one.flops:.1e}",
                _bytes(one.memory),
                _bytes(one.disk),
                _duration(one.seconds),
            ]
            for one in self.stages
        ]
        rows.append(
            [
                "all",
                f"{sum(one.tokens for one in self.stages):,.0f}",
                f"{sum(one.flops for one in self.stages):.1e}",
                _bytes(max(one.memory for one in self.stages)),
                _bytes(sum(one.disk for one in self.stages)),
                _duration(self.seconds),
            ]
        )
        caption = (
            "time: estimated from two small models of this width, timed here; a judge, MAUVE and "
            "decomposing weights are not counted"
        )
        return to_text(
            f"Plan for {self.model} on {self.device}", [Table(head, rows, caption), Text(WARNING)]
        )


WARNING = "Expect the times to be off by up to a factor of 2, and more where the machine is shared."


@check_types
def plan(
    base: Any,
    texts: Any,
    *,
    protocol: Protocol | None = None,
    only: Sequence[str] | None = None,
    trained: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
) -> Plan:
    """Say what `reproduce` would take, without doing it.

    Args:
        base: the model before: a folder (its config.json suffices), hub id, model or
            configuration.
        texts: what `reproduce` takes; only the number of domains matters.
        protocol: as in `reproduce`; None for the paper's.
        only: as in `reproduce`.
        trained: as in `reproduce`.
        device: what the times are for; None for the best device here.

    Raises:
        LoadingError: if there is no configuration of a causal language model.
    """
    settings = protocol or protocol_for("paper")
    config = config_of(base)
    where = parse_device(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = _size(config)
    speed = measure_speed(config, where)
    n_domains = len(texts) if isinstance(texts, Mapping) else 1
    needed = {stage for one in (only or exhibits()) for stage in stages_of(one)}
    wanted = [stage for stage in STAGES if only is None or stage in needed]
    make = _Estimates(size, speed, settings, n_domains)
    methods = METHODS if {"training", "variants", "judge"} & set(wanted) else ("full",)
    stages = [make.training(method) for method in methods if method not in (trained or {})]
    stages += [make.stage(name) for name in wanted if name not in ("training", "judge", "weights")]
    words = f"{size.parameters / 1e6:,.1f}M parameters, {size.n_layers} blocks"
    name = Path(str(base)).name if isinstance(base, str | Path) else type(base).__name__
    return Plan(f"{name} ({words})", str(where), tuple(stages))


@dataclass(frozen=True)
class _Size:
    """Of the whole model."""

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


def _build(config: Any, n_blocks: int | None, device: torch.device) -> Any:
    """A model with random weights; with so many blocks where a number is given."""
    from transformers import AutoModelForCausalLM

    changed = copy.deepcopy(config)
    inner = changed.get_text_config()
    if n_blocks is not None:
        inner.num_hidden_layers = n_blocks
        if getattr(inner, "layer_types", None):
            inner.layer_types = inner.layer_types[:n_blocks]
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(changed)
    except (ValueError, TypeError, AttributeError) as error:
        raise LoadingError(
            f"no causal language model can be built from this configuration: {first_line(error)}"
        ) from None


def _size(config: Any) -> _Size:
    whole = _build(config, None, torch.device("meta"))
    few, more = (_count(_build(config, n, torch.device("meta"))) for n in (FEW, MORE))
    block = (more - few) / (MORE - FEW)
    inner = text_config(whole)
    n_layers = int(inner.num_hidden_layers)
    head = float(inner.vocab_size * inner.hidden_size)
    return _Size(
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
    few, more = (_times(_build(config, n, device).eval(), device) for n in (FEW, MORE))
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
        _fastest(read, device) / per_token,
        _fastest(train, device) / per_token,
        _fastest(write, device) / GENERATED / batch,
    )


def _fastest(function: Callable[[], None], device: torch.device) -> float:
    """The least of several times, the first call left out."""
    times = []
    for _ in range(REPEATS + 1):
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _Estimates:
    """Stages of one protocol on one model."""

    size: _Size
    speed: Speed
    protocol: Protocol
    n_domains: int

    def training(self, method: str) -> Stage:
        """One training run, with its records; full fine-tuning once for each domain."""
        p, size = self.protocol, self.size
        runs = self.n_domains if method == "full" else 1
        epochs = p.epochs if method == "full" else p.lora_epochs
        tokens = float(epochs * p.n_train * p.sequence_length)
        late = min(p.last_k, size.n_layers) / size.n_layers if method == "late_lora" else 1.0
        trained = size.parameters if method == "full" else 0.01 * size.in_blocks * late
        # Backward takes twice a forward pass; frozen weights need only half of that.
        factor = 6 if method == "full" else 4
        flops = tokens * factor * (size.in_blocks * late + size.in_head)
        rest, block = self.speed.train
        if method != "full":
            rest, block = (max(r, t * factor / 6) for r, t in
                           ((self.speed.read[0], rest), (self.speed.read[1], block)))  # fmt: skip
        seconds = tokens * (rest + block * size.n_layers * late)
        cache = 4.0 * p.n_train * p.sequence_length * size.d_model if late < 1 else 0.0
        records = math.ceil(epochs / p.record_every) + 1 if p.record_every else 0
        seconds += records * self._writing(1) + records * self._reading(2)
        memory = 4 * size.parameters + 12 * trained + cache
        saved = (4 * size.parameters if method == "full" else 4 * trained) + 12 * trained
        return Stage(f"training {method}", runs * tokens, runs * flops, memory,
                     runs * saved, runs * seconds)  # fmt: skip

    def stage(self, name: str) -> Stage:
        """One experiment on models that are trained already."""
        p, size = self.protocol, self.size
        reads, writes = READINGS.get(name, 0), WRITINGS.get(name, 0)
        if name == "null_test":
            reads = writes = p.n_controls
        if name == "static_bias":
            writes = 5 * len(p.alphas)
        if name == "cross_domain":
            reads, writes = reads * self.n_domains, 2 * (self.n_domains - 1)
        held_out = p.n_held_out * p.max_length
        passes = LOGIT_PASSES.get(name, 0) * (p.n_controls if name == "null_test" else 1)
        written = writes * p.n_prompts * (p.prompt_tokens + p.max_new_tokens)
        tokens = float(reads * held_out + written)
        flops = 2 * tokens * (size.in_blocks + size.in_head)
        flops += 2 * passes * held_out * size.in_head
        seconds = self._reading(reads) + self._writing(writes)
        seconds += passes * held_out * self.speed.read[0]
        memory = 2 * 4 * size.parameters + 2 * 4.0 * held_out * size.d_model
        return Stage(name.replace("_", " "), tokens, flops, memory, 2e6, seconds)

    def _reading(self, times: int) -> float:
        rest, block = self.speed.read
        tokens = self.protocol.n_held_out * self.protocol.max_length
        return times * tokens * (rest + block * self.size.n_layers)

    def _writing(self, times: int) -> float:
        rest, block = self.speed.write
        tokens = self.protocol.n_prompts * self.protocol.max_new_tokens
        return times * tokens * (rest + block * self.size.n_layers)


def _bytes(n: float) -> str:
    """`1.5 GB`, `300 MB`.

    >>> _bytes(1.5e9), _bytes(3e6)
    ('1.5 GB', '3 MB')
    """
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:,.0f} MB"


def _duration(seconds: float) -> str:
    """`3.2 h`, `14 min`, `20 s`.

    >>> _duration(11520.0), _duration(840.0), _duration(20.0)
    ('3.2 h', '14 min', '20 s')
    """
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
