"""ResidualModel: hook points on the residual stream only, native Hugging Face code underneath."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import LoadingError
from ..models.structure import ModelStructure, find_structure
from ..offloading import device_of
from .attach import attach, entering_at
from .surface import IN_A_BLOCK, NORM_OUT, import_transformer_lens

import_transformer_lens()
from transformer_lens.hook_points import HookPoint  # noqa: E402
from transformer_lens.HookedRootModule import HookedRootModule  # noqa: E402

# Columns of one product per thread. Where the vocabulary is much larger than the number of rows,
# BLAS libraries repack the whole weight before they multiply; a piece of it that stays in the
# cache is multiplied up to three times as fast.
COLUMNS_PER_THREAD = 256
# Fewer rows gain nothing; a single one is a matrix-vector product.
FEWEST_ROWS = 16


@dataclass(frozen=True)
class ResidualConfig:
    """The configuration surface that hooked models share."""

    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    dtype: torch.dtype
    device: torch.device
    output_logits_soft_cap: float
    model_name: str


class ResidualBlock(nn.Module):
    """The hook points of one block: its two ends, and what its two branches add, where known."""

    def __init__(self, has_branches: bool) -> None:
        super().__init__()
        for kind, name in IN_A_BLOCK.items():
            if has_branches or kind in ("resid_pre", "resid_post"):
                setattr(self, name, HookPoint())


class HookedNorm(nn.Module):
    """The final norm, with a hook point on what leaves it."""

    def __init__(self) -> None:
        super().__init__()
        setattr(self, NORM_OUT, HookPoint())
        self.norm: Any = None

    def forward(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The norm alone, for a lens: hooks belong to the model's own pass."""
        normed: Tensor = self.norm(x)
        return normed


class ResidualModel(HookedRootModule):
    """A Hugging Face causal LM (or PeftModel) with hooks on its residual stream.

    Blocks run as they are, so attention is whatever the model uses (SDPA, flash, eager) and
    outputs are bit-identical to the plain model's. Hook points: `hook_resid_pre`,
    `hook_attn_out`, `hook_mlp_out` and `hook_resid_post` of every block, and `ln_final.hook_out`;
    a hook that returns a tensor replaces the activation. The two in the middle are missing where
    a block adds something other than two branches to the stream.

    Args:
        model: the model to hook. It is kept, not copied; its modules are only hooked while
            `forward` runs.
        tokenizer: used when strings are passed instead of token ids.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        super().__init__()
        self.structure: ModelStructure = find_structure(model)
        has_branches = self.structure.branches is not None
        self.blocks = nn.ModuleList(ResidualBlock(has_branches) for _ in self.structure.blocks)
        self.ln_final = HookedNorm()
        self.setup()
        # After setup, which would otherwise write a `name` into every module of the model.
        self.model: Any = model
        self.ln_final.norm = self.structure.final_norm
        self.unembed = ScaledUnembed(self.structure.head, self.structure.logit_scale)
        self.tokenizer = tokenizer
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        taken = inspect.signature(plain.forward).parameters
        self._accepts = frozenset(taken)
        if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()):
            # Some models hand it on to the model inside without naming it.
            self._accepts |= {"use_cache"}
        self._config: Any = plain.config

    @property
    def cfg(self) -> ResidualConfig:
        """Sizes, dtype and device of the model as it is now."""
        text = self._config.get_text_config()
        head: Any = self.structure.head
        weight = next(p for p in self.model.parameters() if p.is_floating_point())
        return ResidualConfig(
            n_layers=len(self.blocks),
            d_model=text.hidden_size,
            d_vocab=head.weight.shape[0],
            n_ctx=max(0, getattr(text, "max_position_embeddings", 0) or 0),
            dtype=weight.dtype,
            device=device_of(self.model),
            output_logits_soft_cap=self.structure.soft_cap,
            model_name=getattr(self._config, "_name_or_path", "") or type(self.model).__name__,
        )

    def forward(
        self,
        input: Int[Tensor, "batch pos"] | str | list[str],
        attention_mask: Int[Tensor, "batch seen"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        return_type: Literal["logits"] | None = "logits",
        resume: tuple[int, Float[Tensor, "batch pos d_model"]] | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "batch pos d_vocab"] | None:
        """Logits of the plain model, with every hook point called on the way.

        Args:
            input: token ids, or text if the model has a tokenizer.
            attention_mask: 1 for real tokens; needed whenever there is padding. Tokens that a
                cache (`past_key_values`) holds come first.
            position_ids: derived from the mask if not given, so that padding on either side is
                right.
            return_type: "logits", or None to skip the unembedding.
            resume: (block, residual) skips the blocks before this one (0-based) and lets the
                residual enter it. Right for architectures in which blocks hand on nothing else.
        """
        if not isinstance(input, Tensor):
            input, attention_mask = self._tokenize(input)
        if attention_mask is not None and position_ids is None:
            places = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
            position_ids = places[:, -input.shape[1] :]
        given: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
        given |= {"use_cache": False}
        if return_type is None:
            # A position, not a number of them, for which some models cut the stream itself short.
            given["logits_to_keep"] = torch.tensor([-1])
        passed = {k: v for k, v in given.items() if k in self._accepts and v is not None}
        with ExitStack() as changes:
            if resume is not None:
                parts = self.structure.blocks, self.structure.extras
                changes.enter_context(entering_at(*parts, *resume))
            for handle in self._hook_points_in_place(resume[0] if resume else 0):
                changes.enter_context(handle)
            output = self.model(input_ids=input, **passed, **kwargs)
        return output.logits if return_type == "logits" else None

    def _tokenize(self, text: str | list[str]) -> tuple[Tensor, Tensor]:
        if self.tokenizer is None:
            raise LoadingError("this model has no tokenizer: pass token ids instead of text")
        texts = [text] if isinstance(text, str) else text
        encoded = self.tokenizer(texts, return_tensors="pt", padding=len(texts) > 1)
        device = self.cfg.device
        return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)

    def _hook_points_in_place(self, first: int) -> Iterator[Any]:
        """Hook points of the blocks that run, and of the final norm; each a context to close."""
        for block, points in enumerate(self.blocks):
            for kind, name in IN_A_BLOCK.items():
                if block >= first and hasattr(points, name):
                    yield attach(self.structure, kind, block, getattr(points, name))
        yield attach(self.structure, "final_norm", 0, getattr(self.ln_final, NORM_OUT))


class ScaledUnembed(nn.Module):
    """The unembedding, times the constant that some architectures put on their logits."""

    def __init__(self, head: nn.Module, scale: float) -> None:
        super().__init__()
        self.head = head
        self.scale = scale

    def forward(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        head = self.head
        weight: Any = head.weight
        if weight.is_floating_point():
            x = x.to(weight.dtype)
        rows = x.flatten(0, -2)
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
    """Whether this is a plain float32 product on the CPU without hooks or gradients.

    Half-precision products use other CPU routines, which gain nothing.
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
