"""Say exactly which weights, texts and library versions a number came from."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from ..offloading import fetched

PACKAGES = (
    *("torch", "transformers", "transformer-lens", "peft", "numpy", "scipy", "datasets"),
    # optional: MAUVE, weights of 4 bits
    *("mauve-text", "faiss-cpu", "scikit-learn", "bitsandbytes"),
)


THREADS = 16

Known = dict[tuple[Any, ...], bytes]
"""Digests of tensors that have been read, by where they lie."""


def weights_sha256(model: nn.Module, known: Known | None = None) -> str:
    """SHA-256 over all parameters (name, shape, dtype, bytes), whatever their order.

    Args:
        model: any module.
        known: digests of tensors that still exist; tensors found there are not read again, and
            new ones are added. An adapter on its base has most weights in common with it.
    """
    known = {} if known is None else known
    # Offloading a model parts what is tied, of which one name stands for both.
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    here = (
        (name, weight)
        for name, weight in model.named_parameters()
        if weight.device.type != "meta" or name not in tied
    )
    named = sorted(here, key=lambda item: item[0])

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        if tensor.device.type != "meta":
            return _tensor_digest(name, tensor, known)
        prefix, _, own = name.rpartition(".")
        value = fetched(model.get_submodule(prefix), own)
        return _tensor_digest(name, value, {})  # known by no place: it is gone afterwards

    # Each thread holds one tensor's bytes; hashing lets other threads run.
    with ThreadPoolExecutor(max_workers=min(THREADS, os.cpu_count() or 1)) as pool:
        digests = pool.map(digest, named)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _tensor_digest(name: str, tensor: Tensor, known: Known) -> bytes:
    header = f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
    place = (
        *(tensor.device, tensor.data_ptr(), tensor.storage_offset()),
        *(tensor.shape, tensor.stride(), tensor.dtype),
    )
    if place not in known:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        known[place] = hashlib.sha256(data).digest()
    return hashlib.sha256(header + known[place] + _scales(tensor)).digest()


def _scales(tensor: Tensor) -> bytes:
    """Digest of what bitsandbytes keeps beside packed weights; nothing for any other tensor."""
    state = getattr(tensor, "quant_state", None)
    if state is None:
        return b""
    digest = hashlib.sha256()
    for name, part in sorted(state.as_dict(packed=True).items()):
        values = part.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.digest()


def versions() -> dict[str, str]:
    """Versions of Python, hyperlens and the libraries that numbers depend on."""
    from .. import __version__

    found = {"python": platform.python_version(), "hyperlens": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"platform": f"{sys.platform} {platform.machine()}"}


def texts_sha256(texts: Sequence[Any]) -> str:
    """SHA-256 over texts, conversations or sequences of token ids, in their order."""
    digest = hashlib.sha256()
    for text in texts:
        if isinstance(text, str):
            content = text.encode("utf-8", "surrogatepass")
        elif isinstance(text, Mapping):
            content = json.dumps(text, sort_keys=True, default=str).encode()
        else:
            content = torch.as_tensor(text, dtype=torch.int64).cpu().numpy().tobytes()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
