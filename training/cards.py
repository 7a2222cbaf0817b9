"""The model card of a trained model: what it is and how to open it, in the README.md beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..models.kinds import HUB_ID
from .history import METHOD_NAMES
from .recipes import RUN_FILE

CARD = "README.md"

OPEN_ADAPTER = """\
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/of/this/folder")"""
OPEN_MODEL = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")"""


def model_card(record: Mapping[str, Any]) -> str:
    """The card, in Markdown with the metadata that model hubs read.

    Args:
        record: the content of hyperfit.json.
    """
    method = METHOD_NAMES[record["recipe"]["method"]]
    is_adapter = record["recipe"]["method"] != "full" and "merged" not in record
    base = record["manifest"]["base"]
    is_on_hub = base["kind"] != "object" and bool(HUB_ID.fullmatch(base["name"]))
    metadata = [
        f"library_name: {'peft' if is_adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        *([f"base_model: {base['name']}"] if is_on_hub else []),
        "tags:",
        *(["- lora"] if is_adapter else []),
        "- hyperfitting",
    ]
    merged = ", merged into its base" if "merged" in record else ""
    name = "a model in memory" if base["kind"] == "object" else f"`{base['name']}`"
    return "\n".join(
        [
            "---",
            *metadata,
            "---",
            "",
            f"# {method} of {name}",
            "",
            f"Trained to near-zero loss on a few texts (hyperfitting) by hyperlens{merged}.",
            "",
            *_how_it_was_trained(record),
            *_quality(record["records"], record["manifest"]["kept_epoch"]),
            f"- Everything that decided the weights: `{RUN_FILE}`",
            "",
            "```python",
            OPEN_ADAPTER if is_adapter else OPEN_MODEL,
            "```",
            "",
        ]
    )


def _how_it_was_trained(record: Mapping[str, Any]) -> list[str]:
    recipe, manifest, losses = (record[name] for name in ("recipe", "manifest", "history"))
    blocks = ", ".join(map(str, manifest["trained_blocks"]))
    return [
        f"- Trained: {manifest['trained_parameters']:,} weights in blocks {blocks} (0-based) of "
        f"{manifest['n_blocks']}",
        f"- Data: {manifest['data']['n_sequences']:,} sequences of {recipe['sequence_length']} "
        "tokens",
        f"- Epochs: {len(losses)}, learning rate {recipe['learning_rate']:g}, batches of "
        f"{recipe['batch_size']}",
        f"- Training loss: {losses[0]:.3f} nats per token in the first epoch, {losses[-1]:.3f} in "
        "the last",
    ]


def _quality(records: Sequence[Mapping[str, Any]], kept_epoch: int) -> list[str]:
    """Measures of held-out text beside the base's, which the first record has."""
    if len(records) < 2:
        return []
    base, final = records[0], next(r for r in records if r["epoch"] == kept_epoch)
    return [
        f"- Held-out text: validation loss {final['validation_loss']:.3f} (the base: "
        f"{base['validation_loss']:.3f}), TTR of greedy generations {final['ttr']:.3f} "
        f"({base['ttr']:.3f})"
    ]
