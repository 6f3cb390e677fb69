"""Selections as bits: 32 columns to an int32 word."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["join_rows", "pack_bits", "unpack_bits"]

WORD = 32


def pack_bits(mask: Tensor) -> Tensor:
    """bool (..., C) -> int32 (..., ceil(C / 32)): bit c % 32 of word c // 32."""
    columns = mask.shape[-1]
    words = -(-columns // WORD)
    padded = torch.nn.functional.pad(mask, (0, words * WORD - columns)).unflatten(-1, (words, WORD))
    return (padded.long() << torch.arange(WORD, device=mask.device)).sum(-1).to(torch.int32)


def unpack_bits(bits: Tensor, columns: int) -> Tensor:
    """int32 (..., W) -> bool (..., columns)."""
    lanes = torch.arange(WORD, dtype=torch.int32, device=bits.device)
    return ((bits[..., None] >> lanes) & 1).bool().flatten(-2)[..., :columns]


def join_rows(parts: Iterable[Tensor], rows: int) -> Tensor:
    """Bits of groups of rows, (S, P, n, W) each and in order, as (S, P, rows, W). A lone group is not copied."""
    joined, first = None, 0
    for part in parts:
        if part.shape[2] == rows:
            return part
        if joined is None:
            joined = part.new_empty(*part.shape[:2], rows, part.shape[3])
        joined[:, :, first : first + part.shape[2]] = part
        first += part.shape[2]
    assert joined is not None and first == rows
    return joined
