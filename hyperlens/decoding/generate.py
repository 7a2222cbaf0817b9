"""Continuations of many prompts at once, on Hugging Face's `generate`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm

from ..hooks.surface import evaluating
from ..models.kinds import plain_model
from ..passes.failures import naming_what_to_lower
from ..randomness import own_randomness
from .prompts import batches, check_prompts, eos_ids, left_padded
from .settings import check_sampling


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    min_p: float | None = None,
    batch_size: int = 16,
    stop_at_eos: bool = True,
    seed: int = 0,
    logits_processors: Sequence[Any] = (),
    progress: bool = True,
) -> list[list[int]]:
    """What a model writes after each prompt.

    Prompts of like length share a batch, padded on the left with a mask. Nothing of the
    checkpoint's own generation settings (temperature, penalties, lengths) is used: two models
    are compared under the same ones. Greedy tokens do not depend on `batch_size`, up to ties of
    the last float; sampled ones do, because a batch draws from one generator. The caller's random
    state stays as it was.

    Args:
        model: a `PreTrainedModel` or `PeftModel`.
        tokenizer: whose EOS ends a continuation, as the model's own do; None has none.
        prompts: token ids, BOS included where the model wants one; none may be empty.
        max_new_tokens: how many to add at most.
        do_sample: sample, or take the most likely token.
        temperature, top_p, min_p: of sampling.
        batch_size: prompts at once.
        stop_at_eos: end at EOS (which is left out), or write through it.
        seed: of sampling.
        logits_processors: `LogitsProcessor` objects of transformers, applied in order. Those that
            have a `reset()` start every batch with it, so that nothing leaks between calls.
        progress: show a progress bar.

    Returns:
        New token ids per prompt, without prompt, padding and EOS.

    Raises:
        CorpusError: if a prompt is empty, or longer than the model's context allows.
        DecodingError: if a setting of sampling is out of its range.
        LoadingError: if the model cannot generate.
        ResourceError: if the GPU runs out of memory.
    """
    check_prompts(model, prompts, max_new_tokens)
    check_sampling(temperature=temperature, top_p=top_p, min_p=min_p)
    eos = eos_ids(model, tokenizer) if stop_at_eos else []
    settings = _settings(
        max_new_tokens, eos, do_sample=do_sample, temperature=temperature, top_p=top_p, min_p=min_p
    )
    made: list[list[int]] = [[] for _ in prompts]
    bar = tqdm(total=len(prompts), desc="writing", unit="text", disable=not progress)
    device = next(model.parameters()).device
    with (
        naming_what_to_lower(batch_size, ", or max_new_tokens"),
        bar,
        own_randomness(seed, device),
        _own_settings(model, settings),
        torch.no_grad(),
    ):
        for batch in batches(prompts, batch_size):
            for processor in logits_processors:
                if hasattr(processor, "reset"):
                    processor.reset()
            tokens, mask = left_padded([prompts[i] for i in batch], settings.pad_token_id, device)
            written = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=list(logits_processors),
            )
            for i, row in zip(batch, written[:, tokens.shape[1] :].tolist(), strict=True):
                ends = [place for place, token in enumerate(row) if token in eos]
                made[i] = row[: ends[0]] if ends else row
            bar.update(len(batch))
    return made


def _settings(max_new_tokens: int, eos: list[int], **sampling: Any) -> Any:
    from transformers import GenerationConfig

    if not sampling["do_sample"]:
        sampling = {"do_sample": False}
    else:
        sampling["top_k"] = 0  # the library's own default would cut at 50
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=eos or None,
        # Pads are masked and cut off, so any id serves; a model need not have one.
        pad_token_id=eos[0] if eos else 0,
        use_cache=True,
        **sampling,
    )


@contextmanager
def _own_settings(model: Any, settings: Any) -> Iterator[None]:
    """`generate` fills what a configuration leaves open from the model's own: hide that.

    Dropout is off inside.
    """
    plain = plain_model(model)
    before = plain.generation_config
    plain.generation_config = copy.deepcopy(settings)
    try:
        with evaluating(model):
            yield
    finally:
        plain.generation_config = before
