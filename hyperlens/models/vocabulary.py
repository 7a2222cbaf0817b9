"""Two models whose vocabularies differ, read on the tokens that both have.

Rows of padding up to a multiple of 64, or tokens that were added for fine-tuning, make two models
differ in nothing that can be compared: what is compared is the rows that both have.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import LoadingError, PairError, first_line
from ..offloading import device_of
from .kinds import plain_model, text_config
from .weight_sharing import token_tables, weight_sharing_copy

# Tokens of the text on which a narrowed model is held against the whole one.
CHECKED_TOKENS = 16
# How far its logits may be from the whole model's, in units of the type's rounding error of the
# largest of them: a matrix product of other width may be summed in another order.
ROUNDING = 64


def n_rows(model: Any) -> int:
    """Rows of the unembedding, which is the number of logits."""
    rows: int = token_tables(plain_model(model))[-1].weight.shape[0]
    return rows


def n_shared(rows: tuple[int, int], tokenizers: tuple[Any, Any]) -> int:
    """How many rows from 0 up stand for the same token in both models, or for none.

    Args:
        rows: of the two models.
        tokenizers: of the two; None where one is unknown.

    Raises:
        PairError: if tokens that both have stand in other rows.
    """
    least = min(rows)
    if any(tokenizer is None for tokenizer in tokenizers):
        return least
    first, second = (tokenizer.get_vocab() for tokenizer in tokenizers)
    moved = sorted(
        (t for t in first.keys() & second.keys() if first[t] != second[t]), key=first.get
    )
    if moved:
        raise PairError(
            f"the models have {rows[0]} and {rows[1]} tokens, and {len(moved)} that both have "
            f"stand in other rows ({moved[0]!r} is {first[moved[0]]} and {second[moved[0]]}): "
            "compare models that share a tokenizer"
        )
    # A token of one model alone: the same row is padding of the other, or another token.
    alone = [
        *(first[t] for t in first.keys() - second),
        *(second[t] for t in second.keys() - first),
    ]
    shared: int = min([least, *alone])
    return shared


def resize_tables(model: Any, n: int) -> None:
    """Give embedding and unembedding of a weight-sharing copy n rows; new ones are zeros.

    Tied weights stay tied. The rest of the model keeps sharing its weights.
    """
    done: dict[int, nn.Parameter] = {}
    for table in token_tables(model):
        for name, parameter in list(table.named_parameters(recurse=False)):
            if id(parameter) not in done:
                kept = min(n, parameter.shape[0])
                resized = parameter.new_zeros(n, *parameter.shape[1:])
                resized[:kept] = parameter.detach()[:kept]
                done[id(parameter)] = nn.Parameter(resized, requires_grad=parameter.requires_grad)
            table._parameters[name] = done[id(parameter)]
        _say_rows(table, n)
    text_config(model).vocab_size = n


def narrowed(model: Any, n: int) -> Any:
    """The model with the first n rows of its vocabulary; shares all weights with it.

    Args:
        model: plain Hugging Face model or PeftModel; it is not changed.
        n: rows to keep.

    Raises:
        PairError: if the model cannot be read on a part of its vocabulary.
    """
    rows = n_rows(model)
    copied = weight_sharing_copy(model)
    try:
        done: dict[int, nn.Parameter] = {}
        for table in token_tables(plain_model(copied)):
            for module in table.modules():
                _narrow(module, rows, n, done)
        text_config(copied).vocab_size = n
        close = _reads_as_before(model, copied, n)
    except (IndexError, LoadingError, RuntimeError, TypeError, ValueError) as error:
        raise PairError(_cannot(rows, n, first_line(error))) from error
    if not close:
        raise PairError(
            _cannot(
                rows, n, "it reads differently then, as where DoRA takes a norm over all of them"
            )
        )
    return copied


def _cannot(rows: int, n: int, why: str) -> str:
    return (
        f"a model of {rows} tokens cannot be read on the {n} that both models have ({why}): "
        f"give both models one vocabulary, with resize_token_embeddings({rows}) on the smaller one"
    )


def _narrow(module: nn.Module, rows: int, n: int, done: dict[int, nn.Parameter]) -> None:
    """Cut what an embedding, an unembedding, or an adapter on one of them has for each token."""
    for name, parameter in module.named_parameters(recurse=False):
        axis = 1 if parameter.shape[0] != rows and parameter.shape[-1] == rows else 0
        if parameter.shape[axis] != rows:
            continue
        if type(parameter) is not nn.Parameter:
            raise TypeError(f"{name} is a {type(parameter).__name__}")
        if id(parameter) not in done:  # tied weights stay tied
            view = parameter.detach().narrow(axis, 0, n)
            done[id(parameter)] = nn.Parameter(view, requires_grad=parameter.requires_grad)
        module._parameters[name] = done[id(parameter)]
    if getattr(module, "num_embeddings", getattr(module, "out_features", None)) == rows:
        _say_rows(module, n)


def _say_rows(module: nn.Module, n: int) -> None:
    """What a module says of its own size."""
    if isinstance(module, nn.Embedding):
        module.num_embeddings = n
        if module.padding_idx is not None and module.padding_idx >= n:
            module.padding_idx = None
    elif isinstance(module, nn.Linear):
        module.out_features = n


def _reads_as_before(model: Any, copied: Any, n: int) -> bool:
    device = device_of(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(n, (1, CHECKED_TOKENS), generator=generator).to(device)
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole, part = (one(input_ids=ids, use_cache=False).logits for one in (model, copied))
    finally:
        model.train(was)
    tolerance = ROUNDING * torch.finfo(whole.dtype).eps * float(whole.abs().max())
    return part.shape[-1] == n and bool(((whole[..., :n] - part).abs() <= tolerance).all())


def mass_outside(model: Any, ids: Tensor, n: int) -> Float[Tensor, " pos"]:
    """Probability that a whole model gives the tokens from row n on, in each place of a text."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits.double().softmax(-1)[:, n:].sum(-1)
