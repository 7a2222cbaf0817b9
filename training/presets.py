"""What the papers report of their training, and what they do not: plain values, one preset each.

A value listed here for a paper is the paper's own. Every other value of its recipe is the default
of `Recipe`, chosen by us, and marked as ours wherever it is shown or saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# arXiv 2605.22579, sections 2.1 and 5: 2,000 samples, 260 epochs, no weight decay; "last 5 layers"
# in the text, though some captions leave 4 blocks unfrozen. Nothing else of the training, and
# nothing of the evaluation during training, is reported.
_LI2026 = {
    "n_sequences": 2000,
    "epochs": 260,
    "weight_decay": 0.0,
    "last_k": 5,
}

# Carlsson et al. 2025 (arXiv 2412.04318) and their public code: AdamW at 5e-6 with PyTorch's
# default decay, batches of 8, float32, no schedule, no clipping; the first 2,000 texts of at least
# 256 tokens, cut there. Evaluated every 250 steps, which is every epoch: on the 128 sequences that
# follow, and on greedy continuations of 32 of them from 32 tokens to 256 in all.
_CARLSSON2025 = {
    "n_sequences": 2000,
    "sequence_length": 256,
    "packed": False,
    "selection": "first",
    "epochs": 30,
    "batch_size": 8,
    "drop_last": True,
    "learning_rate": 5e-6,
    "schedule": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.01,
    "max_grad_norm": 0.0,
    "bf16": False,
    "record_every": 1,
    "n_validation": 128,
    "n_prompts": 32,
    "prompt_tokens": 32,
    "new_tokens": 224,
}

# Shows the phenomenon on a small model and two cores within a minute or two. All ours.
_DEMO = {
    "n_sequences": 32,
    "sequence_length": 192,
    "packed": True,
    "epochs": 60,
    "learning_rate": 2e-3,
    "record_every": 5,
    "n_validation": 32,
    "new_tokens": 96,
}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "li2026": MappingProxyType(_LI2026),
        "carlsson2025": MappingProxyType(_CARLSSON2025),
        "demo": MappingProxyType(_DEMO),
    }
)

# An adapter starts from zero and needs larger steps than weights that are already trained. Ours.
LORA_LEARNING_RATE = MappingProxyType({"li2026": 2e-4, "carlsson2025": 2e-4, "demo": 4e-3})


def reported(name: str, method: str) -> frozenset[str]:
    """The fields of a preset whose values a paper reports, for one training method.

    Args:
        name: of the preset.
        method: "full", "lora" or "late_lora".
    """
    if name == "demo":
        return frozenset()
    fields = {"preset", *PRESETS[name]}
    if name == "li2026" or method == "full":  # the original paper trains all weights only
        fields.add("method")
    if method != "full":
        fields.discard("learning_rate")
    return frozenset(fields)
