"""Measure a model in training against the base it started from, without disturbing the training."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .. import processes
from ..decoding.diversity import repetition, type_token_ratio
from ..errors import TrainingError
from ..hooks.surface import evaluating
from ..models.kinds import plain_model
from ..models.structure import find_structure
from ..passes.streams import logit_chunk_rows
from ..statistics.distances import rank_of, winner
from ..statistics.rank_buckets import RANK_BUCKETS
from .greedy import cache_bytes, greedy
from .history import Record
from .prefix import LastResiduals, Plan, PrefixCache
from .recipes import Recipe
from .token_loss import last_position_only
from .weights import context_length, trainers_randomness

# Diversity is measured on the last 96 generated tokens, as in Carlsson et al. 2025 (arXiv
# 2412.04318).
WINDOW = 96
# What `decisions` measures.
DECISIONS = ("loss", "error", "entropy", *(bucket.metric for bucket in RANK_BUCKETS))
# Keys and values of the prompts that are continued at once, bytes.
CACHE_BYTES = 512 * 2**20


class Recorder:
    """Measures loss, ranks and quality of a model while it is trained.

    Ranks need the base's logits. Rather than a second model, or logits of all tokens, it stores
    what the base's logits are computed from: the final-normed states of all held-out tokens, in
    main memory and the model's own dtype, and a copy of the unembedding if that is trained.

    Several processes share the held-out sequences and the prompts. Where the first blocks are
    frozen, what they return for the held-out sequences is stored, too.

    Args:
        model: a Hugging Face causal LM, or a PeftModel whose adapter has no effect yet. It must
            still be the base: later ranks refer to what it predicts now.
        held_out: token ids, padding at the ends, on any device.
        recipe: `n_prompts`, `prompt_tokens`, `new_tokens`, `batch_size`, `method` and `blocks`.
        frozen: how many of the first blocks are frozen and may be replaced by a prefix cache.
        last: what the frozen blocks returned in the last run on the same held-out sequences.
        counted: which tokens are measured; None for all.
        lengths: tokens of each sequence without padding; None without any. Prompts are made of
            sequences that are long enough.

    Raises:
        TrainingError: if sequences, prompts and generations do not fit the model.
        LoadingError: if the model's unembedding cannot be found.
    """

    def __init__(
        self,
        model: Any,
        held_out: Int[Tensor, "n pos"],
        recipe: Recipe,
        frozen: int = 0,
        last: LastResiduals | None = None,
        counted: Bool[Tensor, "n pos"] | None = None,
        lengths: Int[Tensor, " n"] | None = None,
    ) -> None:
        begun = time.perf_counter()
        self._model = model
        self._plain = plain_model(model)
        self._recipe = recipe
        self._counted = counted
        prompts = held_out if lengths is None else held_out[lengths >= recipe.prompt_tokens]
        self._prompts = prompts[: recipe.n_prompts, : recipe.prompt_tokens]
        _check(held_out, len(prompts), recipe, context_length(self._plain))
        self._held_out = held_out
        own = slice(processes.number(), None, processes.count())
        self._batches = torch.split(torch.arange(len(held_out)), recipe.batch_size)[own]
        self._forward: Callable[..., Any] | None = vars(self._plain).get("forward")
        with self._undisturbed():
            self._structure = find_structure(self._plain)
            self._base_head = self._structure.head
            if recipe.method == "full" and recipe.blocks is None:
                self._base_head = copy.deepcopy(self._structure.head).requires_grad_(False)
            self._prefix = self._prefix_cache(frozen, last) if frozen else None
            self._base_states = [self._states(rows).cpu() for rows in self._batches]
        # What was done once for all records.
        self.seconds = time.perf_counter() - begun

    def measure(self, epoch: int, step: int, train_loss: float, seconds: float) -> Record:
        """The record of the model as it is now.

        The model's mode, gradients, configuration and all random generators are restored
        afterwards, so the training's result does not depend on whether it is measured.

        Args:
            epoch: epochs trained so far.
            step: optimiser steps made so far.
            train_loss: mean over the last epoch in nats per token, NaN if there was none.
            seconds: training time so far.
        """
        with self._undisturbed():
            means = self._teacher_forced()
            generations = self._generations()
            ttr = [type_token_ratio(tokens) for tokens in generations]
            return Record(
                epoch=epoch,
                step=step,
                train_loss=train_loss,
                validation_loss=means["loss"],
                perplexity=_exp(means["loss"]),
                top1_error=means["error"],
                ttr=_mean(ttr),
                bigram_repetition=_mean([repetition(tokens, 2) for tokens in generations]),
                entropy=means["entropy"],
                seconds=seconds,
                ttr_per_prompt=tuple(ttr),
                **{bucket.metric: means[bucket.metric] for bucket in RANK_BUCKETS},
            )

    def _prefix_cache(self, frozen: int, last: LastResiduals | None) -> PrefixCache:
        """What the frozen blocks return for the held-out sequences, as large as their states."""
        cache = PrefixCache(self._plain, frozen, Plan(0, "memory", Path()), last)
        cache.fill(self._plain, self._held_out, self._recipe.batch_size)
        return cache

    def _teacher_forced(self) -> dict[str, float]:
        """Means over all next-token decisions."""
        sums: dict[str, float] = dict.fromkeys(DECISIONS, 0.0)
        n = 0
        d_vocab = self._plain.get_output_embeddings().weight.shape[0]
        for batch, base_states in zip(self._batches, self._base_states, strict=True):
            states = self._states(batch)
            step = logit_chunk_rows(d_vocab, states.device)
            reference = self._wanted(batch, self._held_out[batch, 1:]).to(states.device)
            for start in range(0, len(states), step):
                rows = slice(start, start + step)
                tuned = self._logits(self._structure.head, states[rows])
                base = self._logits(self._base_head, base_states[rows].to(states.device))
                for name, values in decisions(base, tuned, reference[rows]).items():
                    sums[name] += float(values.cpu().double().sum())
            n += len(states)
        *totals, of_all = processes.summed(*sums.values(), float(n))
        return {name: total / of_all for name, total in zip(sums, totals, strict=True)}

    def _generations(self) -> list[list[int]]:
        """The end of every prompt's generation."""
        recipe = self._recipe
        own = self._prompts.tensor_split(processes.count())[processes.number()]
        generations: list[list[int]] = []
        for batch in torch.split(own, self._prompts_at_once()) if len(own) else ():
            made = greedy(self._plain, batch.to(self._device), recipe.new_tokens)
            generations += made[:, -WINDOW:].tolist()
        return [tokens for made in processes.from_all(generations) for tokens in made]

    def _prompts_at_once(self) -> int:
        """How many prompts share a batch: many, as every step of decoding reads all weights.

        Either no more tokens than in a batch of training, which is known to fit in memory; or no
        more tokens of prompts than that, and keys and values within a limit.
        """
        recipe = self._recipe
        total = recipe.prompt_tokens + recipe.new_tokens
        room = recipe.batch_size * self._held_out.shape[1]
        cached = CACHE_BYTES // cache_bytes(self._plain, total)
        return max(1, room // total, min(room // recipe.prompt_tokens, cached))

    def _states(self, rows: Int[Tensor, " batch"]) -> Float[Tensor, "decisions d_model"]:
        """The final-normed states from which each next token of these sequences is predicted."""
        tokens = self._held_out[rows].to(self._device)
        serving = self._prefix.serving(rows) if self._prefix else nullcontext()
        with serving, last_position_only(self._structure.head) as unembedded:
            self._plain(input_ids=tokens, use_cache=False)
        return self._wanted(rows, unembedded[0][:, :-1])

    def _wanted(self, rows: Int[Tensor, " batch"], values: Tensor) -> Tensor:
        """The values of the decisions that are measured."""
        found = values.flatten(0, 1)
        if self._counted is None:
            return found
        return found[self._counted[rows, 1:].flatten().to(found.device)]

    def _logits(
        self, head: nn.Module, states: Float[Tensor, "rows d_model"]
    ) -> Float[Tensor, "rows d_vocab"]:
        """The model's own logits, scale and soft cap included, as float32."""
        return self._structure.logits(head(states)).float()

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._plain.get_input_embeddings().weight.device
        return device

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Evaluation mode, no gradients, the weights' own precision; all restored afterwards."""
        wrapped = vars(self._plain).get("forward")
        with trainers_randomness(self._recipe.seed, self._device), evaluating(self._model):
            # With mixed precision the Trainer wraps the forward pass; the base was measured
            # without.
            _set_forward(self._plain, self._forward)
            try:
                yield
            finally:
                _set_forward(self._plain, wrapped)


def decisions(
    base: Float[Tensor, "n d_vocab"],
    tuned: Float[Tensor, "n d_vocab"],
    reference: Int[Tensor, " n"],
) -> dict[str, Float[Tensor, " n"]]:
    """Measures of each next-token prediction: loss and entropy in nats, the rest 0 or 1.

    Args:
        base, tuned: logits of both models; `tuned` is overwritten.
        reference: the token that came next in the text.
    """
    top1 = winner(tuned)
    rank = rank_of(base, top1)
    # Less the largest logit, so that exp does not overflow: then with z = sum(exp(logits)) and
    # p = exp(logits) / z, the loss is log(z) - logits[reference], and the entropy
    # -sum(p log p) = log(z) - sum(exp(logits) * logits) / z.
    tuned -= tuned.gather(-1, top1[:, None])
    at_reference = tuned.gather(-1, reference[:, None])[:, 0]
    weights = tuned.exp()
    z = weights.sum(-1)
    return {
        "loss": z.log() - at_reference,
        "error": (top1 != reference).float(),
        "entropy": z.log() - weights.mul_(tuned).sum(-1) / z,
        **{bucket.metric: bucket.holds(rank).float() for bucket in RANK_BUCKETS},
    }


def _check(
    held_out: Int[Tensor, "n pos"], n_prompts: int, recipe: Recipe, context: int | None
) -> None:
    n, length = held_out.shape
    if not n:
        raise TrainingError(
            "there are no held-out sequences to record: give more texts, or set record_every to 0"
        )
    if length < recipe.prompt_tokens + 1:
        raise TrainingError(
            f"prompt_tokens is {recipe.prompt_tokens} but held-out sequences have {length} tokens: "
            f"lower prompt_tokens to {length - 1} or less"
        )
    if not n_prompts:
        raise TrainingError(
            f"no held-out sequence has {recipe.prompt_tokens} tokens to be a prompt: lower "
            "prompt_tokens"
        )
    total = recipe.prompt_tokens + recipe.new_tokens
    if context is not None and total > context:
        raise TrainingError(
            f"prompt_tokens + new_tokens is {total} but the model has positions for {context} "
            f"tokens: lower new_tokens (now {recipe.new_tokens}) or prompt_tokens "
            f"(now {recipe.prompt_tokens})"
        )


def _set_forward(model: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        vars(model).pop("forward", None)
    else:
        vars(model)["forward"] = forward


def _mean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
