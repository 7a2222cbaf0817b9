"""Check on every load that a hooked model reproduces the logits of its source."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import HyperlensError, LoadingError, ParityError
from ..models.kinds import backend_of, quantisation_of
from ..models.structure import find_structure
from ..models.weight_sharing import compute_in_float32, weight_sharing_copy
from . import surface
from .surface import HookedModel

# Largest allowed difference of logits, relative to the largest logit. Half precision differs
# between attention kernels by a few percent; float32 by rounding only.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
HALF_TOLERANCE = 5e-2
LENGTHS = (9, 5)
# Mean change of logits by pads that is no more than rounding, relative to the largest logit. Tiny
# models of 130 kinds in bfloat16 change by up to 0.0015.
MOST_ROUNDING = 1e-3


def check_parity(model: HookedModel, plain: Any | None) -> str | None:
    """Compare a hooked model with the plain Hugging Face model it was made from.

    Two sequences of different lengths are run, padded on the right and on the left. Without a
    plain model (the caller brought a hooked one) padded runs are compared with unpadded ones.

    Half precision can hide what pads do, and can choose other experts when it rounds otherwise.
    Where it may have done so, the source is held against itself in float32, which decides.

    Returns:
        A note where the model is sound, and the shape of a batch changes what it puts out in half
        precision by more than rounding alone: its texts should be read without pads. Else None.

    Raises:
        LoadingError: if the model is not causal.
        ParityError: if logits differ, or if the logit lens at the last layer is not the logits.
    """
    failure: HyperlensError | None = None
    try:
        if not _check_all(model, plain):
            return None
    except (LoadingError, ParityError) as error:
        failure = error
    source = model.model if plain is None and backend_of(model) == "residual" else plain
    is_half = model.cfg.dtype in (torch.float16, torch.bfloat16)
    if not is_half or source is None or quantisation_of(source) is not None:
        return _raised_or_none(failure)
    from .residual import ResidualModel  # late, as it imports TransformerLens

    try:
        wide = weight_sharing_copy(source)
        compute_in_float32(wide, find_structure(wide).blocks)
        _check_all(ResidualModel(wide), wide)
    except HyperlensError:
        raise
    except Exception:  # it does not run in float32: half precision has to decide
        return _raised_or_none(failure)
    return None if failure is None else _close_margins(model, source)


def _raised_or_none(failure: HyperlensError | None) -> str | None:
    if failure is not None:
        raise failure
    return None


def _check_all(model: HookedModel, plain: Any | None) -> bool:
    """The checks of `check_parity` in one dtype.

    Returns:
        Whether pads change logits within the tolerance of half precision, but by more than it
        rounds.
    """
    device = surface.input_device(model)
    tolerance = TOLERANCE.get(model.cfg.dtype, HALF_TOLERANCE)
    reference = partial(surface.run_logits, model) if plain is None else partial(_plain, plain)
    residual = backend_of(model) == "residual"
    advice = "its architecture is not supported" if residual else "use backend='residual'"
    changes = []
    with surface.evaluating(model):
        for side in ("right", "left"):
            tokens, mask = _padded_batch(model.cfg.d_vocab, side, device)
            logits = surface.run_logits(model, tokens, mask)
            expected = _alone(reference, tokens, mask)
            what = f"logits on a {side}-padded batch"
            if plain is not None and _differ(logits[mask.bool()], expected, tolerance):
                _check_padding(plain, side, tokens, mask, expected, tolerance)
            _difference(what, logits[mask.bool()], expected, tolerance, advice)
            padded = slice(LENGTHS[0], None)  # the first text has no pads
            # 0 where no logit is finite, which `_check_output` or the caller says.
            span = float(expected.float().abs().nan_to_num(0, 0, 0).max())
            gap = _mean_gap(logits[mask.bool()][padded], expected[padded])
            changes.append(gap / span if span else 0.0)
        _check_lens(model, tokens, mask, logits, tolerance, advice)
        _check_causal(model, tokens, mask, logits, tolerance)
    return _is_more_than_rounding(*changes)


def _is_more_than_rounding(right: float, left: float) -> bool:
    """Whether pads in front of a text, not those behind it, change more than is ever rounded.

    Both change the shapes that are multiplied, and with them the rounding; but only pads in front
    move a text to other positions, or come before it in a recurrence.
    """
    return left > max(MOST_ROUNDING, 2 * right)


def _close_margins(model: HookedModel, plain: Any) -> str:
    """The note on a model that is sound in float32; raise unless it is hooked rightly.

    Raises:
        ParityError: if it differs from its source in batches of the same shape, too.
    """
    dtype = str(model.cfg.dtype).removeprefix("torch.")
    with surface.evaluating(model):
        tokens, mask = _padded_batch(model.cfg.d_vocab, "right", surface.input_device(model))
        padded = surface.run_logits(model, tokens, mask)
        alone = _alone(partial(surface.run_logits, model), tokens, mask)
        advice = "load it in float32"
        if backend_of(model) != "residual":
            advice += ", or use backend='residual', which rounds as the source does"
        for what, got, expected in (
            ("logits on a right-padded batch", padded[mask.bool()], _plain(plain, tokens, mask)),
            ("logits of a text alone", alone, _alone(partial(_plain, plain), tokens, mask)),
        ):
            expected = expected[mask.bool()] if expected.ndim == 3 else expected
            _difference(f"{what} in {dtype}", got, expected, HALF_TOLERANCE, advice)
        _check_lens(model, tokens, mask, padded, HALF_TOLERANCE, advice)
    return (
        f"in {dtype} {type(plain).__name__} puts out other logits for a text in a batch of another "
        "shape, as where experts are chosen by margins as small as rounding (in float32 it does "
        "not): texts are read in batches of one length, without pads; dtype='float32' avoids it"
    )


def _check_lens(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    logits: Float[Tensor, "batch pos d_vocab"],
    tolerance: float,
    advice: str,
) -> None:
    """Raise unless the logit lens at the last layer gives the logits, and those are sound."""
    residuals = surface.run_residuals(model, tokens, mask)
    last = residuals[-1][mask.bool()]
    lens = surface.unembed(model, surface.final_norm(model, last))
    what = "the logit lens at the last layer"
    _difference(what, lens, logits[mask.bool()], tolerance, advice)
    _check_output(residuals, logits, mask)


def _check_padding(
    plain: Any,
    side: str,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    alone: Float[Tensor, "n d_vocab"],
    tolerance: float,
) -> None:
    """Raise where it is the source itself that reads a padded text as another one."""
    padded = _plain(plain, tokens, mask)[mask.bool()]
    if _differ(padded, alone, tolerance):
        gap, span = gap_and_span(padded, alone)
        raise ParityError(
            f"{type(plain).__name__} itself gives other logits for a text that is padded on the "
            f"{side} than for the text alone (by {gap:.2g}, largest logit {span:.2g}): it takes "
            "pads for text; its architecture is not supported"
        )


def _check_output(
    residuals: list[Float[Tensor, "batch pos d_model"]],
    logits: Float[Tensor, "batch pos d_vocab"],
    mask: Int[Tensor, "batch pos"],
) -> None:
    """Raise for broken logits after sound blocks; the pass over the texts names a broken block."""
    real = mask.bool()
    if surface.first_bad_layer(residuals, real) is None and not torch.isfinite(logits[real]).all():
        raise LoadingError(
            "the model's logits become NaN or infinite after its last block: check the weights "
            "of its final norm and unembedding, or load it in float32"
        )


def _padded_batch(
    d_vocab: int, side: str, device: torch.device
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    longest = max(LENGTHS)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(d_vocab, (len(LENGTHS), longest), generator=generator)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(LENGTHS):
        real = slice(0, length) if side == "right" else slice(longest - length, longest)
        mask[row, real] = 1
    return (tokens * mask).to(device), mask.to(device)


def _plain(
    plain: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_vocab"]:
    logits: Tensor = plain(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return logits


def _alone(
    run: Callable[[Tensor, Tensor], Tensor],
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
) -> Float[Tensor, "n d_vocab"]:
    """Logits of the real tokens, each sequence run alone and unpadded."""
    alone = (t[m.bool()][None] for t, m in zip(tokens, mask, strict=True))
    return torch.cat([run(real, torch.ones_like(real))[0] for real in alone])


def _difference(
    what: str,
    got: Float[Tensor, "n d_vocab"],
    expected: Float[Tensor, "n d_vocab"],
    tolerance: float,
    advice: str,
) -> None:
    if _differ(got, expected, tolerance):
        gap, span = gap_and_span(got, expected)
        raise ParityError(
            f"the hooked model does not reproduce its source: {what} differ by {gap:.2g} "
            f"(largest logit {span:.2g}, allowed {tolerance:g} of it); {advice}"
        )


def _differ(
    got: Float[Tensor, "*rows d_vocab"], expected: Float[Tensor, "*rows d_vocab"], tolerance: float
) -> bool:
    gap, span = gap_and_span(got, expected)
    return not gap <= tolerance * max(span, 1e-6)


def gap_and_span(
    got: Float[Tensor, "*rows d_vocab"], expected: Float[Tensor, "*rows d_vocab"]
) -> tuple[float, float]:
    """Largest difference and largest value; NaN counts as equal to NaN."""
    got, expected = got.float(), expected.float()
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(got)):
        return math.nan, float(expected[finite].abs().max()) if bool(finite.any()) else math.nan
    if not bool(finite.any()):
        return 0.0, 0.0
    return (
        float((got - expected)[finite].abs().max()),
        float(expected[finite].abs().max()),
    )


def _check_causal(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    logits: Float[Tensor, "batch pos d_vocab"],
    tolerance: float,
) -> None:
    """Raise if a later token changes earlier outputs, as in an encoder.

    What one token changes can be less than half precision may differ: an encoder is also one in
    which a later token changes earlier outputs as much as an earlier one changes later outputs. In
    a causal model that is rounding at most (mixtures of experts multiply in other shapes).
    """
    first, last = (_with_other_token(tokens, at, model.cfg.d_vocab) for at in (0, -1))
    before, after = logits[:1, :-1], surface.run_logits(model, last, mask)[:1, :-1]
    ahead = _mean_gap(after, before)
    behind = _mean_gap(surface.run_logits(model, first, mask)[:1, 1:], logits[:1, 1:])
    if _differ(after, before, tolerance) or ahead > 0.5 * behind > 0:
        raise LoadingError(
            "the model looks ahead (a later token changes earlier outputs): expected a causal "
            "language model, not an encoder"
        )


def _with_other_token(
    tokens: Int[Tensor, "batch pos"], at: int, d_vocab: int
) -> Int[Tensor, "batch pos"]:
    changed = tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % d_vocab
    return changed


def _mean_gap(a: Float[Tensor, "*rows d_vocab"], b: Float[Tensor, "*rows d_vocab"]) -> float:
    return float((a.float() - b.float()).abs().mean())
