"""Measure a model in training against the base it started from, without leaving a trace."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import TrainingError
from ..hooks.surface import evaluating
from ..models.kinds import plain_model
from ..models.structure import find_structure
from ..statistics.distances import rank_of, winner
from .generation import bigram_repetition, greedy, last_position_only, type_token_ratio
from .history import Record
from .recipes import Recipe
from .weights import context_length, trainers_randomness

# Carlsson et al. 2025 (arXiv 2412.04318) count distinct tokens among the last 96.
WINDOW = 96
# Logits exist for this many bytes' worth of rows at a time, per model.
LOGIT_CHUNK_BYTES = 8 * 2**20


class Recorder:
    """Takes the loss-rank-quality record of a model while it is trained.

    Of the base it keeps what its logits are made of: the final-normed states of all held-out
    tokens, in main memory and the model's own dtype, and the unembedding if that is about to
    change. No second model, and never logits for all tokens at once.

    Args:
        model: a Hugging Face causal LM, or a PeftModel whose adapter does nothing yet. It must
            still be the base: what it does now is what later ranks refer to.
        held_out: token ids without padding, on any device.
        recipe: `n_prompts`, `prompt_tokens`, `new_tokens`, `batch_size`, `method` and `blocks`.

    Raises:
        TrainingError: if sequences, prompts and continuations do not fit.
        LoadingError: if the model's unembedding cannot be found.
    """

    def __init__(self, model: Any, held_out: Int[Tensor, "n pos"], recipe: Recipe) -> None:
        self._model = model
        self._plain = plain_model(model)
        self._recipe = recipe
        _check(held_out, recipe, context_length(self._plain))
        self._batches = torch.split(held_out, recipe.batch_size)
        self._forward: Callable[..., Any] | None = vars(self._plain).get("forward")
        with self._undisturbed():
            self._anatomy = find_structure(self._plain)
            self._base_head = self._anatomy.head
            if recipe.method == "full" and recipe.blocks is None:
                self._base_head = copy.deepcopy(self._anatomy.head).requires_grad_(False)
            self._base_states = [self._states(tokens).cpu() for tokens in self._batches]

    def measure(self, epoch: int, step: int, train_loss: float, seconds: float) -> Record:
        """The record of the model as it is now.

        The model's mode, gradients, configuration and all random generators are as before
        afterwards, so training goes on as if nothing had happened.

        Args:
            epoch: epochs trained so far.
            step: optimiser steps made so far.
            train_loss: mean over the last epoch in nats per token, NaN if there was none.
            seconds: training time so far.
        """
        with self._undisturbed():
            means = self._teacher_forced()
            continued = self._continuations()[:, -WINDOW:]
            ttr = type_token_ratio(continued)
            return Record(
                epoch=epoch,
                step=step,
                train_loss=train_loss,
                validation_loss=means["loss"],
                perplexity=_exp(means["loss"]),
                top1_error=means["error"],
                ttr=float(ttr.mean()),
                bigram_repetition=float(bigram_repetition(continued).mean()),
                rank_1=means["rank_1"],
                rank_2_10=means["rank_2_10"],
                rank_gt_10=means["rank_gt_10"],
                entropy=means["entropy"],
                seconds=seconds,
                ttr_per_prompt=tuple(ttr.tolist()),
            )

    def _teacher_forced(self) -> dict[str, float]:
        """Means over all next-token decisions."""
        sums: dict[str, float] = defaultdict(float)
        n = 0
        d_vocab = self._plain.get_output_embeddings().weight.shape[0]
        step = max(16, LOGIT_CHUNK_BYTES // (4 * d_vocab))
        for tokens, kept in zip(self._batches, self._base_states, strict=True):
            states = self._states(tokens)
            reference = tokens[:, 1:].flatten().to(states.device)
            for start in range(0, len(states), step):
                rows = slice(start, start + step)
                tuned = self._logits(self._anatomy.head, states[rows])
                base = self._logits(self._base_head, kept[rows].to(states.device))
                for name, values in decisions(base, tuned, reference[rows]).items():
                    sums[name] += float(values.cpu().double().sum())
            n += len(states)
        return {name: total / n for name, total in sums.items()}

    def _continuations(self) -> Int[Tensor, "n_prompts new"]:
        recipe = self._recipe
        held_out = torch.cat(self._batches)
        # As many at once as hold the tokens of a batch: decoding reads all weights at every step.
        room = recipe.batch_size * held_out.shape[1]
        at_once = max(1, room // (recipe.prompt_tokens + recipe.new_tokens))
        prompts = held_out[: recipe.n_prompts, : recipe.prompt_tokens]
        made = [
            greedy(self._plain, some.to(self._device), recipe.new_tokens)
            for some in torch.split(prompts, at_once)
        ]
        return torch.cat(made)

    def _states(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "decisions d_model"]:
        """What is unembedded to predict each next token."""
        with last_position_only(self._anatomy.head) as wanted:
            self._plain(input_ids=tokens.to(self._device), use_cache=False)
        return wanted[0][:, :-1].flatten(0, 1)

    def _logits(
        self, head: nn.Module, states: Float[Tensor, "rows d_model"]
    ) -> Float[Tensor, "rows d_vocab"]:
        """The model's own logits, scale and soft cap included, as float32."""
        return self._anatomy.logits(head(states)).float()

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._plain.get_input_embeddings().weight.device
        return device

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Evaluation mode, no gradients, the weights' own precision; all as before afterwards."""
        wrapped = vars(self._plain).get("forward")
        with trainers_randomness(self._recipe.seed, self._device), evaluating(self._model):
            # Mixed precision has wrapped the forward pass since the base was read.
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
    """What each row decides: loss and entropy in nats, the rest 0 or 1. `tuned` is overwritten.

    Args:
        base, tuned: logits of both models.
        reference: the token that came next in the text.
    """
    chosen = winner(tuned)
    rank = rank_of(base, chosen)
    tuned -= tuned.gather(-1, chosen[:, None])
    at_reference = tuned.gather(-1, reference[:, None])[:, 0]
    weights = tuned.exp()
    z = weights.sum(-1)
    return {
        "loss": z.log() - at_reference,
        "error": (chosen != reference).float(),
        "entropy": z.log() - weights.mul_(tuned).sum(-1) / z,
        "rank_1": (rank == 1).float(),
        "rank_2_10": ((rank >= 2) & (rank <= 10)).float(),
        "rank_gt_10": (rank > 10).float(),
    }


def _check(held_out: Int[Tensor, "n pos"], recipe: Recipe, context: int | None) -> None:
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
    whole = recipe.prompt_tokens + recipe.new_tokens
    if context is not None and whole > context:
        raise TrainingError(
            f"prompt_tokens + new_tokens is {whole} but the model has positions for {context} "
            f"tokens: lower new_tokens (now {recipe.new_tokens}) or prompt_tokens "
            f"(now {recipe.prompt_tokens})"
        )


def _set_forward(model: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        vars(model).pop("forward", None)
    else:
        vars(model)["forward"] = forward


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
