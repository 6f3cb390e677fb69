"""What several forms of the kernel say of calls that they do not run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["DTYPES", "sixteen_bits"]

HEAD_SIZES = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)


def sixteen_bits(q: Tensor) -> Iterator[str]:
    """Why a form for 16 bits and heads of `HEAD_SIZES` cannot run q (B, H, Q, D), each reason in a clause."""
    if q.dtype not in DTYPES:
        yield f"dtype {str(q.dtype).removeprefix('torch.')}: float16 or bfloat16"
    if q.shape[3] not in HEAD_SIZES:
        yield f"head size {q.shape[3]}: one of {', '.join(map(str, HEAD_SIZES))}"
