"""A small base model and short tales that ship with the package: for demos, tutorials and tests.

The model is a demonstration, no evidence about large models: see the card in `base/README.md`.
"""

from __future__ import annotations

from pathlib import Path

from ..data.texts import read_texts

HERE = Path(__file__).resolve().parent


def embedded_base() -> Path:
    """The folder of the embedded base model, a Llama of 10 blocks with its own tokenizer."""
    return HERE / "base"


def embedded_tales() -> list[str]:
    """Sixty-six tales of 100 to 200 words (CC0)."""
    return read_texts(HERE / "tales.jsonl")
