"""Products of float32 numbers in full, also where a GPU may round their factors to 11 bits.

TensorFloat-32 is the caller's choice for the models; in a statistic its error of one in a thousand
would be taken for a finding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_full_float32() -> Iterator[None]:
    """Turn TensorFloat-32 off inside, and leave the caller's setting as it was."""
    matmul = torch.backends.cuda.matmul
    # The older name cannot be read where the caller used the newer one, nor the other way round.
    name, full = (
        ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    )
    before = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        yield
    finally:
        setattr(matmul, name, before)
