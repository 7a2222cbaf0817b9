"""Open what was written anew, and hold it against the model it was written from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import LoadingError, TrainingError, first_line
from ..hooks.parity import gap_and_span
from ..models.kinds import is_peft
from ..models.sources import OpenedModel, open_source
from ..models.weight_sharing import weight_sharing_copy
from ..passes.memory import free_bytes

# How far logits may be from those of the model that was written, as a share of the largest; what
# is rounded once more, as merged weights are, is rounded to 8 bits in bfloat16.
EXACT_LOGITS, HALF_LOGITS = 1e-3, 0.1
# How far an adapter's change of the logits may be from what it was, as a share of it, along it.
EXACT_EFFECT, HALF_EFFECT = 0.02, 0.25
# Below this share of the largest logit a change is rounding itself.
NO_EFFECT = 1e-5
# So many times its size has to be free in main memory to open a whole model a second time.
SPARE = 1.5


def check_written(model: Any) -> Callable[[Path], None]:
    """What is to be called with the folder in which this model has been written.

    An adapter is put on the base that it was trained on, and the logits of a few tokens are
    compared; they are those of before, since joining PiSSA's two adapters changes the model. Of a
    whole model every weight is compared; it is held twice meanwhile, and where main memory has no
    room for that nothing is compared: a run must not fail at its end for want of memory.

    Args:
        model: a plain model or PeftModel that is about to be written.

    Returns:
        A function of the folder that raises TrainingError if what it holds is another model.
    """
    if not is_peft(model):
        return lambda folder: _check_weights(model, folder)
    tokens = few_tokens(model)
    wanted, without = logits_of(model, tokens), logits_without(model, tokens)

    def check(folder: Path) -> None:
        base = OpenedModel(weight_sharing_copy(model).unload(), None, "its base", "object")
        got = logits_of(open_source(folder, base=base).model, tokens)
        why = difference(got, wanted, without, is_exact(model))
        if why is not None:
            raise _another(why)

    return check


def _check_weights(model: Any, folder: Path) -> None:
    n_bytes = sum(weight.nbytes for weight in model.state_dict().values())
    if free_bytes(torch.device("cpu")) < SPARE * n_bytes:
        return
    written = open_source(folder, device=torch.device("cpu")).model.state_dict()
    for name, weight in model.state_dict().items():
        if name not in written or not _same(weight.cpu(), written[name]):
            raise _another(f"{name} is another")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b.to(a.dtype), 0, 0, equal_nan=True)


def _another(why: str) -> TrainingError:
    return TrainingError(
        f"written and opened anew, the trained model is another one ({why}): leave out=… out, and "
        "save run.model yourself"
    )


def few_tokens(model: Any) -> Int[Tensor, "text pos"]:
    """Two random texts of 16 tokens."""
    d_vocab = model.get_input_embeddings().weight.shape[0]
    return torch.randint(d_vocab, (2, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: Any, tokens: Int[Tensor, "text pos"]) -> Float[Tensor, "text pos d_vocab"]:
    """Float32 logits of a model in evaluation mode, on the CPU.

    Raises:
        LoadingError: if the model does not run.
    """
    shell = weight_sharing_copy(model)
    device = next(shell.parameters()).device
    try:
        logits: Tensor = shell(input_ids=tokens.to(device), use_cache=False).logits
    except Exception as error:
        raise LoadingError(
            f"{type(model).__name__} fails when a few tokens are run to check what is written "
            f"({type(error).__name__}: {first_line(error)}): try another dtype"
        ) from error
    return logits.float().cpu()


def logits_without(
    model: Any, tokens: Int[Tensor, "text pos"]
) -> Float[Tensor, "text pos d_vocab"]:
    """The same of a PeftModel's base."""
    shell = weight_sharing_copy(model)
    with shell.disable_adapter():
        return logits_of(shell, tokens)


def is_exact(*models: Any) -> bool:
    """Whether all weights are float32 or wider."""
    dtypes = {weight.dtype for model in models for weight in model.parameters()}
    return dtypes <= {torch.float32, torch.float64}


def difference(
    got: Float[Tensor, "text pos d_vocab"],
    wanted: Float[Tensor, "text pos d_vocab"],
    without: Float[Tensor, "text pos d_vocab"],
    exact: bool,
) -> str | None:
    """In which way logits are not an adapter's, or None.

    Two things are asked: that the logits are the adapter's but for rounding, and that they lie as
    far from the base's, in the adapter's own direction. The second sees what the first cannot, an
    adapter whose whole effect is smaller than the rounding of half precision.

    Args:
        got: of what was written.
        wanted: of the adapter.
        without: of its base.
        exact: whether all weights are float32 or wider.
    """
    gap, span = gap_and_span(got, wanted)
    error = gap / max(span, 1e-9)
    if not error <= (EXACT_LOGITS if exact else HALF_LOGITS):
        return f"logits differ by {error:.2g} of the largest"
    effect = (wanted - without).double()
    if float(effect.abs().max()) <= NO_EFFECT * span:
        return None
    share = float(((got - without) * effect).sum() / effect.square().sum())
    if not abs(share - 1) <= (EXACT_EFFECT if exact else HALF_EFFECT):
        return f"it does {share:.0%} of what the adapter does to the base's logits"
    return None
