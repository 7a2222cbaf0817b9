"""A chat model on this machine as a judge: its own chat template, greedy decoding, in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..decoding.generate import continuations
from ..errors import CorpusError, JudgeError
from ..hooks.loading import parse_device, parse_dtype
from ..models.sources import open_source
from ..results.fingerprint import weights_sha256


class LocalJudge:
    """A local chat model.

    Args:
        source: folder, hub id, `PreTrainedModel`, `PeftModel`, or (model, tokenizer).
        max_new_tokens: how long an answer may be.
        batch_size: prompts per forward pass.
        device, dtype: as in `compare_models`.

    Raises:
        LoadingError: if it cannot be opened.
        JudgeError: if it has no tokenizer, or no chat template.
    """

    def __init__(
        self,
        source: Any,
        *,
        max_new_tokens: int = 800,
        batch_size: int = 4,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        opened = open_source(source, device=parse_device(device), dtype=parse_dtype(dtype))
        if getattr(opened.tokenizer, "chat_template", None) is None:
            lacks = "tokenizer" if opened.tokenizer is None else "chat template"
            raise JudgeError(
                f"the judge {opened.name} has no {lacks}: give a chat model with its tokenizer, as "
                "a folder or (model, tokenizer)"
            )
        self._model, self._tokenizer = opened.model, opened.tokenizer
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size
        template = str(opened.tokenizer.chat_template)
        # Where a folder lay is no part of what its model answers.
        name = Path(opened.name).name if Path(opened.name).is_dir() else opened.name
        self.identity = {
            "kind": "local",
            "name": name,
            "sha256": weights_sha256(opened.model),
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "dtype": str(next(opened.model.parameters()).dtype).removeprefix("torch."),
            "max_new_tokens": max_new_tokens,
        }

    def answers(self, prompts: Sequence[str]) -> Generator[tuple[int, str], None, None]:
        """(index, answer) of every prompt, batch by batch, the longest first.

        Raises:
            JudgeError: if a prompt does not fit the model.
        """
        chats = [self._tokens(prompt) for prompt in prompts]
        order = sorted(range(len(chats)), key=lambda i: len(chats[i]), reverse=True)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            try:
                written = continuations(
                    self._model,
                    self._tokenizer,
                    [chats[i] for i in batch],
                    max_new_tokens=self._max_new_tokens,
                    batch_size=self._batch_size,
                    progress=False,
                )
            except CorpusError as error:
                raise JudgeError(f"the judge {self.identity['name']}: {error}") from None
            for i, tokens in zip(batch, written, strict=True):
                yield i, str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _tokens(self, prompt: str) -> list[int]:
        chat = [{"role": "user", "content": prompt}]
        # The template writes the special tokens itself.
        text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
