"""Greedy generation from a plain model, with a key-value cache that does not copy itself."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..statistics.distances import winner
from .token_loss import last_position_only


def greedy(model: Any, prompts: Int[Tensor, "n prompt"], new_tokens: int) -> Int[Tensor, "n new"]:
    """The most likely next token, again and again, with a key-value cache where there is one.

    Always `new_tokens` of them: an end-of-text token does not end a generation. Both measures of
    repetition depend on length, so generations of different lengths could not be compared, neither
    with one another nor along the training.

    Args:
        model: a plain Hugging Face causal LM, in evaluation mode, without gradients.
        prompts: token ids of one length, without padding, on the model's device.
        new_tokens: how many to add.
    """
    generated: list[Tensor] = []
    inputs = prompts
    cached: dict[str, Any] = {}
    with last_position_only(model.get_output_embeddings()):
        for _ in range(new_tokens):
            output = model(input_ids=inputs, use_cache=True, **cached)
            generated.append(winner(output.logits[:, -1].float())[:, None])
            cache = getattr(output, "past_key_values", None)
            if cache is not None and not cached:
                _reserve(cache, new_tokens)
            cached = {} if cache is None else {"past_key_values": cache}
            # Recurrent models cache a state under another name: they get all tokens again.
            inputs = torch.cat([prompts, *generated], dim=1) if cache is None else generated[-1]
    return torch.cat(generated, dim=1)


def cache_bytes(model: Any, tokens: int) -> int:
    """What keys and values of one text of so many tokens take at most."""
    config = model.config.get_text_config()
    itemsize: int = model.get_input_embeddings().weight.dtype.itemsize
    # Fewer heads for keys than for queries take less.
    return 2 * int(config.num_hidden_layers) * int(config.hidden_size) * tokens * itemsize


def _reserve(cache: Any, n: int) -> None:
    """Give plain layers of a cache room for `n` more tokens; others stay as they are."""
    layers = getattr(cache, "layers", [])
    for i, layer in enumerate(layers):
        if type(layer) is not DynamicLayer:
            continue
        if layer.keys is not None and layer.values is not None:
            layers[i] = _RoomyLayer(layer.keys, layer.values, n)


class _RoomyLayer(DynamicLayer):
    """A layer that writes new keys and values into room reserved for them.

    transformers' own copies all of them at each token, which takes a third of the time of a small
    model. What attention sees is the same.
    """

    def __init__(
        self,
        keys: Float[Tensor, "batch heads pos d_key"],
        values: Float[Tensor, "batch heads pos d_value"],
        n: int,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self._length = keys.shape[-2]
        self._all_keys = _with_room(keys, n)
        self._all_values = _with_room(values, n)
        self._show()

    def update(
        self,
        key_states: Float[Tensor, "batch heads pos d_key"],
        value_states: Float[Tensor, "batch heads pos d_value"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values, and return all of them."""
        start, self._length = self._length, self._length + key_states.shape[-2]
        self._all_keys[..., start : self._length, :] = key_states
        self._all_values[..., start : self._length, :] = value_states
        return self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys = self._all_keys[..., : self._length, :]
        self.values = self._all_values[..., : self._length, :]
        return self.keys, self.values


def _with_room(
    states: Float[Tensor, "batch heads pos d"], n: int
) -> Float[Tensor, "batch heads longer d"]:
    batch, heads, length, d = states.shape
    longer = states.new_empty(batch, heads, length + n, d)
    longer[..., :length, :] = states
    return longer
