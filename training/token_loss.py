"""The loss over every next token, without logits of a whole batch where the unembedding is frozen.

A vocabulary is wide: the logits of a batch, their softmax and its gradient are the largest tensors
of a training step, and on small models most of its time. Where nothing of the unembedding is
trained, only the gradient towards the residual stream is needed, and a few rows of logits at a
time are enough for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ..models.structure import find_structure
from ..statistics.distances import BITS_PER_NAT
from .generation import last_position_only

# Logits exist for this many bytes' worth of rows at a time, as float32.
CHUNK_BYTES = 4 * 2**20

Unembed = Callable[[Float[Tensor, "n d_model"]], Float[Tensor, "n d_vocab"]]


class TokenLoss:
    """Summed cross-entropy of every next token of a batch, in nats.

    Args:
        model: plain model or PeftModel, with `requires_grad` set as it will be trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._anatomy = find_structure(model)
        self._head = self._anatomy.head
        # A head that shares its weight with the embedding is trained when that is.
        self.head_is_frozen = not any(p.requires_grad for p in self._head.parameters())

    def __call__(self, model: nn.Module, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        """Run the model, as wrapped for training, and sum the loss of all but the first tokens."""
        targets = tokens[:, 1:].flatten()
        if not self.head_is_frozen:
            logits = model(input_ids=tokens, use_cache=False).logits
            return _cross_entropy(logits[:, :-1].flatten(0, 1), targets)
        with last_position_only(self._head) as wanted:
            model(input_ids=tokens, use_cache=False)
        states = wanted[0][:, :-1].flatten(0, 1)
        weight: Any = self._head.weight
        rows = max(16, CHUNK_BYTES // (4 * weight.shape[0]))
        summed: Tensor = _FrozenHeadLoss.apply(states, targets, self._unembed, rows)
        return summed

    def _unembed(self, states: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        return self._anatomy.logits(self._head(states))


def _cross_entropy(
    logits: Float[Tensor, "n d_vocab"], targets: Int[Tensor, " n"]
) -> Float[Tensor, ""]:
    # Float32: in bfloat16 the loss itself would stop moving long before zero.
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """The loss and, on the way, its gradient: nothing of a chunk is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Float[Tensor, "n d_model"],
        targets: Int[Tensor, " n"],
        unembed: Unembed,
        rows: int,
    ) -> Float[Tensor, ""]:
        gradients: list[Tensor] = []
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for start in range(0, len(states), rows):
            with torch.enable_grad():
                leaf = states[start : start + rows].detach().requires_grad_()
                logits = unembed(leaf)
            # No operation before it needs its values any more, so their memory is used again.
            loss, towards = loss_and_gradient_(
                logits.detach().float(), targets[start : start + rows]
            )
            gradients += torch.autograd.grad(logits, leaf, towards.to(logits.dtype))
            total += loss
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Float[Tensor, ""]) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None


def loss_and_gradient_(
    logits: Float[Tensor, "n d_vocab"], targets: Int[Tensor, " n"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "n d_vocab"]]:
    """Summed cross-entropy in nats, and its gradient in the place of the logits.

    Inside, all is in bits: exp2 is several times faster than exp on a CPU.
    """
    bits = logits.sub_(logits.amax(-1, keepdim=True)).mul_(BITS_PER_NAT)
    column = targets[:, None]
    own = bits.gather(-1, column)
    weights = bits.exp2_()
    total = weights.sum(-1, keepdim=True)
    loss = (total.log2() - own).sum() / BITS_PER_NAT
    towards = weights.div_(total)
    towards.scatter_add_(-1, column, torch.full_like(own, -1.0))
    return loss, towards
