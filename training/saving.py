"""Write a trained model as the folder that other libraries expect, with its history beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import new_folder
from ..models.kinds import is_peft
from . import pissa
from .history import FILE

RECORD = "hyperfit.json"


def save(
    folder: Path,
    model: Any,
    tokenizer: Any,
    record: dict[str, Any],
    history: Path | None = None,
    logs: Path | None = None,
) -> None:
    """Write a Hugging Face folder, or a PEFT adapter folder, and its history; all or nothing.

    Args:
        folder: a new folder.
        model: plain model or PeftModel; PiSSA's two adapters are joined in it.
        tokenizer: saved beside it, unless None.
        record: what goes into hyperfit.json.
        history: the table of records, copied as history.csv; None, or no file, if there is none.
        logs: a folder of loggers' files, copied under its own name; None, or no folder, if there
            is none.

    Raises:
        ResultsError: if the folder exists and is not empty, or cannot be written.
    """
    with new_folder(folder) as staging, _no_bars():
        if is_peft(model):
            pissa.join(model)
            # "auto" would ask the hub whether the vocabulary has grown; it has not.
            model.save_pretrained(str(staging), save_embedding_layers=False)
        else:
            model.save_pretrained(str(staging))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        record_file = staging / RECORD
        record_file.write_text(text, encoding="utf-8")
        if history is not None and history.exists():
            shutil.copyfile(history, staging / FILE)
        if logs is not None and logs.exists():
            shutil.copytree(logs, staging / logs.name)
        # safetensors writes files that only their owner may read.
        for weights in staging.glob("*.safetensors"):
            weights.chmod(record_file.stat().st_mode)


@contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
