"""What a reproduction will take, before any of it is done: tokens, FLOPs, memory, disk and time.

Nothing but the base's configuration is needed (see `hyperlens.costs`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checks import check_types
from ..costs import ModelSize, Speed, config_of, in_bytes, in_time, measure_speed, size_of
from ..hooks.loading import parse_device
from ..render.blocks import Table, Text
from ..render.terminal import to_text
from .paper import STAGES, exhibits, stages_of
from .protocol import METHODS, Protocol, protocol_for

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
                in_bytes(one.memory),
                in_bytes(one.disk),
                in_time(one.seconds),
            ]
            for one in self.stages
        ]
        rows.append(
            [
                "all",
                f"{sum(one.tokens for one in self.stages):,.0f}",
                f"{sum(one.flops for one in self.stages):.1e}",
                in_bytes(max(one.memory for one in self.stages)),
                in_bytes(sum(one.disk for one in self.stages)),
                in_time(self.seconds),
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
    size = size_of(config)
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
class _Estimates:
    """Stages of one protocol on one model."""

    size: ModelSize
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
