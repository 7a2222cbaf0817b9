"""The unembedding of a hooked model: the dearest matrix product of every lens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Columns of one product per thread. A vocabulary is so much wider than a chunk of tokens is long
# that the processor's libraries pack the whole weight before they multiply; a piece of it that
# stays in the cache is multiplied up to three times as fast.
COLUMNS_PER_THREAD = 256
# Fewer rows gain nothing, and a single one is another routine altogether.
FEWEST_ROWS = 16


class ScaledUnembed(nn.Module):
    """The unembedding, times the constant that some architectures put on their logits."""

    def __init__(self, head: nn.Module, scale: float) -> None:
        super().__init__()
        self.head = head
        self.scale = scale

    def forward(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        head, rows = self.head, x.flatten(0, -2)
        if isinstance(head, nn.Linear) and _gains_from_pieces(head, rows):
            logits = linear_in_pieces(rows, head.weight, head.bias).view(*x.shape[:-1], -1)
        else:
            logits = head(x)
        return logits if self.scale == 1.0 else logits * self.scale


def linear_in_pieces(
    x: Float[Tensor, "n d_model"],
    weight: Float[Tensor, "d_vocab d_model"],
    bias: Float[Tensor, " d_vocab"] | None = None,
) -> Float[Tensor, "n d_vocab"]:
    """The same as torch's `linear`, a few hundred columns at a time; without gradients."""
    columns = COLUMNS_PER_THREAD * torch.get_num_threads()
    logits = torch.empty(len(x), len(weight), dtype=x.dtype)
    for start in range(0, len(weight), columns):
        piece = slice(start, start + columns)
        torch.mm(x, weight[piece].T, out=logits[:, piece])
    return logits if bias is None else logits.add_(bias)


def _gains_from_pieces(head: nn.Linear, x: Tensor) -> bool:
    """Whether this is a plain product on the CPU that nobody listens to or differentiates.

    Half precision has routines of its own there, which gain nothing.
    """
    return (
        type(head) is nn.Linear  # and no adapter that is one, too
        and "forward" not in vars(head)  # as accelerate replaces it
        and x.device.type == "cpu"
        and x.dtype == head.weight.dtype == torch.float32
        and len(x) >= FEWEST_ROWS
        and not torch.is_grad_enabled()
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and not torch.is_autocast_enabled("cpu")
    )
