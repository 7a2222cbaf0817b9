"""Continue many prompts at once with Hugging Face's `generate`, under one or several conditions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from tqdm.auto import tqdm

from .. import processes
from ..checks import check_positive, check_seed, check_types
from ..data.corpus import pad
from ..errors import DecodingError
from ..hooks.loading import LoadedModel
from ..hooks.surface import evaluating
from ..models.kinds import plain_model
from ..offloading import device_of
from ..passes.failures import explaining_out_of_memory
from ..randomness import own_randomness
from ..results.fingerprint import versions, weights_sha256
from ..results.resume import KeptRecords
from .diversity import repetition, type_token_ratio
from .prompts import batch_size_for, batches, check_prompts, eos_ids


@check_types
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
    logits_processors: Sequence[Callable[..., Any]] = (),
    progress: bool = True,
) -> list[list[int]]:
    """Continue each prompt with a model.

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
        stop_at_eos: end at EOS (which is left out), or generate past it.
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
    check_prompts(model, prompts, max_new_tokens, batch_size)
    check_seed(seed)
    check_sampling(temperature=temperature, top_p=top_p, min_p=min_p)
    eos = eos_ids(model, tokenizer) if stop_at_eos else []
    sampling = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    settings = _settings(max_new_tokens, eos, do_sample=do_sample, **sampling)
    kept = None if logits_processors else _kept.get()
    # A sampled batch draws on after the one before it.
    shares = processes.sharing() and kept is None and not do_sample
    if kept is not None:
        # Sampled tokens depend on how prompts share batches.
        drawn = {**sampling, "batch_size": batch_size, "seed": seed} if do_sample else None
        identity = kept.identity(model, prompts, max_new_tokens, eos, drawn)
        found = kept.records.find(identity)
        if found is not None:
            return list(found["tokens"])
    generated: list[list[int]] = [[] for _ in prompts]
    first, step = processes.share() if shares else (0, 1)
    hidden = not progress or not processes.is_heard()
    bar = tqdm(total=len(prompts), desc="generating", unit="text", disable=hidden)
    device = device_of(model)
    with (
        explaining_out_of_memory(batch_size, ", or max_new_tokens"),
        bar,
        own_randomness(seed, device),
        _own_settings(model, settings),
        evaluating(model),
    ):
        for batch in islice(batches(prompts, batch_size), first, None, step):
            for processor in logits_processors:
                if hasattr(processor, "reset"):
                    processor.reset()
            tokens, mask = pad(
                [prompts[i] for i in batch], side="left", pad_id=settings.pad_token_id
            )
            output = model.generate(
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                logits_processor=list(logits_processors),
            )
            for i, row in zip(batch, output[:, tokens.shape[1] :].tolist(), strict=True):
                ends = [place for place, token in enumerate(row) if token in eos]
                generated[i] = row[: ends[0]] if ends else row
            bar.update(min(len(batch) * step, len(prompts) - bar.n))
    if shares:
        # Each prompt has been continued by one process.
        of_all = zip(*processes.from_all(generated), strict=True)
        generated = [max(of_prompt, key=len) for of_prompt in of_all]
    if kept is not None:
        kept.records.keep(identity, {"tokens": generated})
    return generated


class _Kept:
    """What models wrote, on disk, found again by everything that decides it."""

    def __init__(self, folder: Path) -> None:
        self.records = KeptRecords(folder)
        # Hashing the weights of a large model takes seconds: once for each model.
        self.hashes: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()

    def identity(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos: Sequence[int],
        drawn: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """Everything that decides what is written; `drawn` is of sampling, None for greedy text."""
        if model not in self.hashes:
            self.hashes[model] = weights_sha256(model)
        return {
            "weights": self.hashes[model],
            "device": str(device_of(model)),
            "prompts": [list(prompt) for prompt in prompts],
            "max_new_tokens": max_new_tokens,
            "eos": list(eos),
            "sampling": drawn,
            "versions": versions(),
        }


_kept: ContextVar[_Kept | None] = ContextVar("kept continuations", default=None)


@contextmanager
def keeping_continuations(folder: Path | None) -> Iterator[None]:
    """Inside, what a model has written once is not generated again, by whichever experiment.

    Args:
        folder: where the tokens are kept; None generates everything anew, for measuring times.
    """
    token = _kept.set(None if folder is None else _Kept(folder))
    try:
        yield
    finally:
        _kept.reset(token)


def check_sampling(*, temperature: float, top_p: float, min_p: float | None) -> None:
    """Raise unless the sampling parameters are in range.

    Raises:
        DecodingError: naming the parameter and its range.
    """
    check_positive("temperature", temperature)
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if share is not None and not 0 < share <= 1:
            raise DecodingError(f"{name} must be above 0 and at most 1, got {share}")


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
    """Hide the model's own settings inside, from which `generate` fills what ours leave open."""
    plain = plain_model(model)
    before = plain.generation_config
    plain.generation_config = copy.deepcopy(settings)
    try:
        yield
    finally:
        plain.generation_config = before


@dataclass(frozen=True)
class Generations:
    """Generated tokens of every prompt, and how much each text repeats itself.

    Attributes:
        tokens: token ids, prompt by prompt.
        metrics: for each of `REPETITION_METRICS` a value per prompt: distinct tokens / all tokens,
            and the share of bigrams and of trigrams that came before.
    """

    tokens: list[list[int]]
    metrics: dict[str, list[float]]


@dataclass(frozen=True)
class GenerationRunner:
    """Continues the same prompts, to the same length and from the same seed, under any condition.

    An end-of-text token does not end a text, because repetition depends on length.

    Attributes:
        prompts: token ids.
        max_new_tokens: how many are added to each.
        batch_size: prompts per forward pass.
        seed: of sampled continuations.
        progress: show progress bars.
    """

    prompts: list[list[int]]
    max_new_tokens: int
    batch_size: int
    seed: int
    progress: bool

    def run(
        self, loaded: LoadedModel, processors: Sequence[Any] = (), *, do_sample: bool = False
    ) -> Generations:
        """Continue every prompt with one model, its logits changed by the processors."""
        tokens = continuations(
            loaded.model,
            loaded.tokenizer,
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            do_sample=do_sample,
            batch_size=batch_size_for(loaded, self.prompts, self.batch_size),
            stop_at_eos=False,
            seed=self.seed,
            logits_processors=tuple(processors),
            progress=self.progress,
        )
        return Generations(
            tokens,
            {
                "ttr": [type_token_ratio(text) for text in tokens],
                "rep_2": [repetition(text, 2) for text in tokens],
                "rep_3": [repetition(text, 3) for text in tokens],
            },
        )
