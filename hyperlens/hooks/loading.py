"""Any model source as a hooked model, checked against its source; the caller's stays unchanged."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from ..checks import check_choice, check_types
from ..errors import HyperlensError, LoadingError, ParityError, first_line
from ..models.kinds import Backend, backend_of, quantisation_of
from ..models.sources import OpenedModel, identity, open_source
from ..models.weight_sharing import merged
from ..results.fingerprint import Known, weights_sha256
from .parity import check_parity
from .surface import HookedModel, import_transformer_lens

BACKENDS: tuple[Backend, ...] = get_args(Backend)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Beside the names that torch itself has, such as "half".
DTYPE_ALIASES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


@dataclass(frozen=True, kw_only=True, repr=False)
class LoadedModel(OpenedModel):
    """An opened model with hooks on it.

    Attributes:
        hooked: the hooked model, parity-checked.
        backend: which kind of hooked model it is.
        unpadded: whether its texts are to be read without pads; a note says why.
    """

    hooked: HookedModel
    backend: Backend
    unpadded: bool = False

    def __repr__(self) -> str:
        dtype = str(self.hooked.cfg.dtype).removeprefix("torch.")
        return (
            f"LoadedModel({self.name}, {self.hooked.cfg.n_layers} blocks, {dtype}, {self.backend})"
        )

    def describe(self, known: Known | None = None) -> dict[str, Any]:
        """Name, source and hash of the weights, as JSON values.

        Args:
            known: see `weights_sha256`.
        """
        return identity(self.name, self.kind) | {"sha256": weights_sha256(self.model, known)}


@check_types
def load_hooked(
    source: Any,
    *,
    backend: Backend = "bridge",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Any:
    """Load a base or fine-tuned causal LM as a hooked model.

    Args:
        source: hub id, local folder, adapter folder (its base is read from its config),
            `PreTrainedModel`, `PeftModel` (merged or not), a pair (model, tokenizer), or an
            already hooked model, which is checked and returned as it is.
        backend: "bridge" for TransformerLens's full hook set; "residual" for residual-stream
            hooks over native attention, bit-exact and several times faster;
            "hooked_transformer" where TransformerLens still has it (3.9).
        device: None leaves objects where they are and puts folders on the best device.
        dtype: None keeps the checkpoint's own.

    Returns:
        A hooked model whose logits were checked against the plain model's. It shares weights
        with a model object passed in, but never changes it.

    Raises:
        LoadingError: if the source cannot be opened, or the backend is not available.
        ParityError: if the hooked model does not reproduce its source.
    """
    check_backend(backend)
    opened = open_source(source, device=parse_device(device), dtype=parse_dtype(dtype))
    return hook(opened, backend).hooked


def hook(opened: OpenedModel, backend: Backend) -> LoadedModel:
    """Put hooks on an opened model and check them.

    Raises:
        LoadingError: if the backend is not available, or the model cannot be run.
        ParityError: if the hooked model does not reproduce its source.
    """
    own_backend = backend_of(opened.model)
    if own_backend is not None:
        note = check_parity(opened.model, None)
        return _loaded(opened, opened.model, own_backend, note)
    make = {
        "residual": _residual,
        "bridge": _bridge,
        "hooked_transformer": _hooked_transformer,
    }[backend]
    try:
        model = make(opened)
        note = check_parity(model, opened.model)
    except (LoadingError, ParityError) as error:
        method = quantisation_of(opened.model)
        if method is None:
            raise
        raise type(error)(
            f"{opened.name} is quantised ({method}), and hooked it does not reproduce its own "
            "logits: load it unquantised, for example in bfloat16"
        ) from error
    except (HyperlensError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise LoadingError(
            f"{opened.name} fails when a few tokens are run to check its hooks "
            f"({type(error).__name__}: {first_line(error)}): its architecture is not supported"
        ) from error
    return _loaded(opened, model, backend, note)


def _loaded(
    opened: OpenedModel, hooked: HookedModel, backend: Backend, note: str | None
) -> LoadedModel:
    return LoadedModel(
        model=opened.model,
        tokenizer=opened.tokenizer,
        name=opened.name,
        kind=opened.kind,
        notes=opened.notes if note is None else (*opened.notes, f"{opened.name}: {note}"),
        hooked=hooked,
        backend=backend,
        unpadded=note is not None,
    )


def check_backend(backend: str) -> None:
    """Raise for an unknown backend, or one that the installed TransformerLens lacks.

    Raises:
        LoadingError: naming the choices, or the version to install.
    """
    check_choice("backend", backend, BACKENDS, LoadingError)
    if backend == "hooked_transformer":
        _hooked_transformer_class()


def parse_device(device: str | torch.device | None) -> torch.device | None:
    """A torch device that exists here, or None.

    Raises:
        LoadingError: if there is no such device.
    """
    if device is None:
        return None
    try:
        parsed = torch.device(device)
        torch.zeros(1, device=parsed).item()
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise LoadingError(f"device {device!r} cannot be used here: {reason}") from None
    return parsed


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point dtype from its name, or None.

    >>> parse_dtype("bf16")
    torch.bfloat16

    Raises:
        LoadingError: if it is no floating-point dtype.
    """
    parsed: Any = dtype
    if isinstance(dtype, str):
        parsed = DTYPE_ALIASES.get(dtype) or getattr(torch, dtype, None)
    if parsed is None and dtype is None:
        return None
    for known in DTYPES:
        if parsed == known:
            return known
    raise LoadingError(f"dtype must be float32, bfloat16, float16 or float64; got {dtype!r}")


def _residual(opened: OpenedModel) -> HookedModel:
    import_transformer_lens()
    from .residual import ResidualModel

    return ResidualModel(opened.model, tokenizer=opened.tokenizer)


def _bridge(opened: OpenedModel) -> HookedModel:
    import_transformer_lens()
    builder = import_transformer_lens("model_bridge.sources._bridge_builder")
    # Unmerged LoRA on fused projections would be read wrongly, and building changes the model.
    plain = merged(opened.model)
    config = copy.deepcopy(plain.config)
    architecture = type(plain).__name__
    try:
        bridge = builder.build_bridge_from_module(
            plain, architecture, hf_config=config, model_name=opened.name
        )
    except Exception as error:
        reason = first_line(error)
        raise LoadingError(
            f"TransformerLens cannot bridge {architecture} ({reason}); use backend='residual'"
        ) from error
    bridge.tokenizer = opened.tokenizer
    return bridge.eval()  # type: ignore[no-any-return]


def _hooked_transformer_class() -> Any:
    library = import_transformer_lens()
    try:
        return library.HookedTransformer
    except (ImportError, AttributeError):
        raise LoadingError(
            "the installed TransformerLens has no HookedTransformer (removed in 4.0): install "
            "'transformer-lens>=3.9,<4', or use backend='bridge' or 'residual'"
        ) from None


def _hooked_transformer(opened: OpenedModel) -> HookedModel:
    """A HookedTransformer without weight processing, so that its residual stream is the model's.

    TransformerLens knows this class by hub names; for a model of one's own its configuration is
    read from a folder, whose name must not look like a known model's.
    """
    kind = _hooked_transformer_class()
    registry = import_transformer_lens("loading_from_pretrained")
    plain = merged(opened.model)
    weight = next(plain.parameters())
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        config = copy.deepcopy(plain.config)
        config.architectures = [type(plain).__name__]
        try:
            # transformers 5 dropped GPT-2's n_ctx, which the conversion still reads.
            config.n_ctx = getattr(config, "n_ctx", None) or config.max_position_embeddings
            config.save_pretrained(folder)
            cfg = registry.get_pretrained_model_config(
                str(Path(folder)), device=str(weight.device), dtype=weight.dtype
            )
            cfg.tokenizer_name = None
            state = registry.get_pretrained_state_dict(
                str(Path(folder)), cfg, hf_model=plain, dtype=weight.dtype
            )
        except Exception as error:
            reason = first_line(error)
            raise LoadingError(
                f"TransformerLens has no HookedTransformer for {type(plain).__name__} "
                f"({reason}); use backend='residual' or 'bridge'"
            ) from error
    model = kind(cfg)
    model.load_and_process_state_dict(
        state,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    model = model.to(weight.device).eval()
    model.tokenizer = opened.tokenizer
    return model  # type: ignore[no-any-return]
