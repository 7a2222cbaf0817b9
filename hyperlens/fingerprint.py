"""Say exactly which weights and which library versions a number came from."""

from __future__ import annotations

import hashlib
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

PACKAGES = (
    *("torch", "transformers", "transformer-lens", "peft", "numpy", "scipy", "datasets"),
    # optional: MAUVE
    *("mauve-text", "faiss-cpu", "scikit-learn"),
)


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over all parameters (name, shape, dtype, bytes), whatever their order."""
    named = sorted(model.named_parameters(), key=lambda item: item[0])
    with ThreadPoolExecutor(max_workers=2) as pool:
        digests = pool.map(lambda item: _tensor_digest(*item), named)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _tensor_digest(name: str, tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    header = f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
    return hashlib.sha256(header + hashlib.sha256(data).digest()).digest()


def versions() -> dict[str, str]:
    """Versions of Python, hyperlens and the libraries that numbers depend on."""
    from . import __version__

    found = {"python": platform.python_version(), "hyperlens": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"platform": f"{sys.platform} {platform.machine()}"}
