"""ResidualModel: hook points on the residual stream only, native Hugging Face code underneath."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .discovery import Anatomy, dissect, first_tensor
from .errors import LoadingError
from .hooked import RESID_POST, RESID_PRE, import_transformer_lens

import_transformer_lens()
from transformer_lens.hook_points import HookPoint  # noqa: E402
from transformer_lens.HookedRootModule import HookedRootModule  # noqa: E402


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
    """The two hook points of one block."""

    def __init__(self) -> None:
        super().__init__()
        setattr(self, RESID_PRE, HookPoint())
        setattr(self, RESID_POST, HookPoint())


class ScaledUnembed(nn.Module):
    """The unembedding, times the constant that some architectures put on their logits."""

    def __init__(self, head: nn.Module, scale: float) -> None:
        super().__init__()
        self.head = head
        self.scale = scale

    def forward(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        logits: Tensor = self.head(x)
        return logits if self.scale == 1.0 else logits * self.scale


class ResidualModel(HookedRootModule):
    """A Hugging Face causal LM (or PeftModel) with hooks on its residual stream.

    Blocks run as they are, so attention is whatever the model uses (SDPA, flash, eager) and
    outputs are bit-identical to the plain model's. Hook points: `hook_resid_pre` and
    `hook_resid_post` of every block; a hook that returns a tensor replaces the activation.

    Args:
        model: the model to hook. It is kept, not copied; its modules are only hooked while
            `forward` runs.
        tokenizer: used when strings are passed instead of token ids.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        super().__init__()
        self.anatomy: Anatomy = dissect(model)
        self.blocks = nn.ModuleList(ResidualBlock() for _ in self.anatomy.blocks)
        self.setup()
        # After setup, which would otherwise write a `name` into every module of the model.
        self.model: Any = model
        self.ln_final = self.anatomy.final_norm
        self.unembed = ScaledUnembed(self.anatomy.head, self.anatomy.logit_scale)
        self.tokenizer = tokenizer
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._accepts = frozenset(inspect.signature(plain.forward).parameters)
        self._config: Any = plain.config

    @property
    def cfg(self) -> ResidualConfig:
        """Sizes, dtype and device of the model as it is now."""
        text = self._config.get_text_config()
        head: Any = self.anatomy.head
        weight = next(p for p in self.model.parameters() if p.is_floating_point())
        return ResidualConfig(
            n_layers=len(self.blocks),
            d_model=text.hidden_size,
            d_vocab=head.weight.shape[0],
            n_ctx=getattr(text, "max_position_embeddings", 0) or 0,
            dtype=weight.dtype,
            device=weight.device,
            output_logits_soft_cap=self.anatomy.soft_cap,
            model_name=getattr(self._config, "_name_or_path", "") or type(self.model).__name__,
        )

    def forward(
        self,
        input: Int[Tensor, "batch pos"] | str | list[str],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        return_type: Literal["logits"] | None = "logits",
        **kwargs: Any,
    ) -> Float[Tensor, "batch pos d_vocab"] | None:
        """Logits of the plain model, with every residual hook point called on the way.

        Args:
            input: token ids, or text if the model has a tokenizer.
            attention_mask: 1 for real tokens; needed whenever there is padding.
            position_ids: derived from the mask if not given, so that padding on either side is
                right.
            return_type: "logits", or None to skip the unembedding.
        """
        if not isinstance(input, Tensor):
            input, attention_mask = self._tokenize(input)
        if attention_mask is not None and position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        given: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
        given |= {"use_cache": False}
        if return_type is None:
            given["logits_to_keep"] = 1
        passed = {k: v for k, v in given.items() if k in self._accepts and v is not None}
        with self._hook_points_in_place():
            output = self.model(input_ids=input, **passed, **kwargs)
        return output.logits if return_type == "logits" else None

    def _tokenize(self, text: str | list[str]) -> tuple[Tensor, Tensor]:
        if self.tokenizer is None:
            raise LoadingError("this model has no tokenizer: pass token ids instead of text")
        texts = [text] if isinstance(text, str) else text
        encoded = self.tokenizer(texts, return_tensors="pt", padding=len(texts) > 1)
        device = self.cfg.device
        return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)

    @contextmanager
    def _hook_points_in_place(self) -> Iterator[None]:
        handles = []
        try:
            for block, points in zip(self.anatomy.blocks, self.blocks, strict=True):
                before, after = getattr(points, RESID_PRE), getattr(points, RESID_POST)
                handles.append(block.register_forward_pre_hook(_entering(before), with_kwargs=True))
                handles.append(block.register_forward_hook(_leaving(after)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _entering(point: nn.Module) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (point(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": point(kwargs["hidden_states"])}

    return hook


def _leaving(point: nn.Module) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        residual = point(first_tensor(output))
        return residual if isinstance(output, Tensor) else (residual, *output[1:])

    return hook
