"""Selection for the dynamic patterns: top-k and top-p of rows of scores.

Each function has a torch path, which is the definition, and a Triton path for CUDA (`topk_triton.py`); on the same
scores both give the same bits. Neither waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError
from sparsekit.kernels.choose import runs_triton
from sparsekit.kernels.select.bits import pack_bits

__all__ = ["top_p_bits", "topk_bits", "topk_indices_mask"]

LONGEST_ROW = 1 << 15  # columns of a row that one program holds
# Quantised masses: the largest of a row lies in [2^30, 2^31), so that 2^22 of them add up exactly in a float64.
MASS_BITS = 30
SMALLEST = 2.0**-126  # normal float32: what lies below counts as 0


def topk_bits(
    scores: Tensor,
    k: int | Tensor,
    *,
    lengths: Tensor | None = None,
    force_first: bool = False,
    force_last: bool = False,
    impl: str | None = None,
) -> Tensor:
    """The `k` largest of each row; ties go to the lower index. `-inf` and NaN are never selected.

    Args:
        scores: float32 (..., C), contiguous; on CUDA at most 2^15 columns.
        k: how many, or int32 broadcastable to `scores.shape[:-1]`. A row with fewer finite scores selects them all.
        lengths: int32 broadcastable to `scores.shape[:-1]`: columns from there on do not exist, whatever they hold.
        force_first, force_last: column 0, and column `lengths - 1`, are selected whatever their score. They are among
            the k; where k has no room for them they are all that is selected.

    Returns:
        int32 (..., ceil(C / 32)), bit c % 32 of word c // 32.
    """
    _check_scores(scores)
    if runs_triton(scores.device, impl):
        _check_row(scores)
        from sparsekit.kernels.select.topk_triton import topk_bits_triton

        return topk_bits_triton(scores, k, lengths, force_first, force_last)
    exists, forced = _exists_and_forced(scores, lengths, force_first, force_last)
    # +0: the two zeros are one value.
    ranked = torch.where(exists & ~scores.isnan(), scores + 0.0, -torch.inf)
    selectable = (ranked > -torch.inf) | forced
    ranked = ranked.masked_fill(forced, torch.inf)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
    wanted = torch.as_tensor(k, device=scores.device).expand(scores.shape[:-1])[..., None]
    # A score of +inf before a forced column must not push it out.
    first = forced.gather(-1, order)
    order = order.gather(-1, torch.sort(first.int(), dim=-1, descending=True, stable=True).indices)
    place = torch.arange(scores.shape[-1], device=scores.device)
    taken = torch.zeros_like(exists).scatter_(-1, order, place < wanted)
    return pack_bits((taken & selectable) | forced)


def top_p_bits(
    scores: Tensor,
    p: float | Tensor,
    *,
    lengths: Tensor | None = None,
    force_first: bool = False,
    force_last: bool = False,
    logits: bool = False,
    impl: str | None = None,
) -> Tensor:
    """The fewest columns of each row, largest first, whose sum reaches `p` times the row's; ties to the lower index.

    The sum is one of integers, `floor(score * 2^e)` with the e that brings the row's largest score into [2^30, 2^31):
    exact in any order, so the two paths agree, and every score counts to 2^-30 of the largest. `p` is multiplied, and
    compared, in float64. Scores below 2^-126 and NaN count 0, `inf` as the largest float. A row of zeros selects the
    forced columns only.

    Args:
        scores: float32 (..., C), contiguous, at most 2^22 columns, on CUDA 2^15.
        p: a share, or float64 broadcastable to `scores.shape[:-1]`. From 1 on: every column but `-inf` and NaN.
        lengths, force_first, force_last: as in `topk_bits`. Forced columns are summed first.
        logits: what is summed is `exp(score - the row's largest)`: a softmax that is never written. The two paths may
            then differ by the last bit of an exponential.

    Returns:
        int32 (..., ceil(C / 32)), bit c % 32 of word c // 32.
    """
    _check_scores(scores)
    if runs_triton(scores.device, impl):
        _check_row(scores)
        from sparsekit.kernels.select.topk_triton import top_p_bits_triton

        return top_p_bits_triton(scores, p, lengths, force_first, force_last, logits)
    exists, forced = _exists_and_forced(scores, lengths, force_first, force_last)
    share = torch.as_tensor(p, dtype=torch.float64, device=scores.device).expand(scores.shape[:-1])[..., None]
    every = exists & (scores > -torch.inf)
    if logits:
        scores = scores.masked_fill(~every, -torch.inf)
        scores = (scores - scores.amax(-1, keepdim=True)).exp()
    mass = torch.where(exists & (scores >= SMALLEST), scores, 0.0).clamp(max=torch.finfo(torch.float32).max)
    units = _units(mass)
    required = units.sum(-1, keepdim=True).double() * share
    start = units.masked_fill(~forced, 0).sum(-1, keepdim=True)
    ranked, order = torch.sort(mass.masked_fill(forced, -1.0), dim=-1, descending=True, stable=True)
    sorted_units = units.gather(-1, order).masked_fill(ranked < 0, 0)
    before = start + sorted_units.cumsum(-1) - sorted_units
    taken = torch.zeros_like(exists).scatter_(-1, order, (before.double() < required) & (ranked > 0))
    return pack_bits(torch.where(share >= 1, every, taken) | forced)


def _units(mass: Tensor) -> Tensor:
    """int64: masses, 0 or normal floats, as integers; the row's largest in [2^30, 2^31). Their mantissas, shifted."""
    bits = mass.view(torch.int32).long()
    exponent = bits >> 23
    shift = MASS_BITS - 23 + exponent - exponent.amax(-1, keepdim=True)
    mantissa = bits & 0x7FFFFF | 0x800000
    moved = torch.where(shift >= 0, mantissa << shift.clamp(min=0), mantissa >> (-shift).clamp(0, 31))
    return moved.masked_fill(bits == 0, 0)


def topk_indices_mask(scores: Tensor, k: int | Tensor, *, impl: str | None = None) -> Tensor:
    """`topk_bits` for few long rows (64 rows of 128K, say): several programs a row, by radix select.

    Args:
        scores: float32 (rows, N), contiguous. `-inf` and NaN are never selected.
        k: how many, or int32 (rows,).

    Returns:
        int32 (rows, ceil(N / 32)): exactly k bits a row, as far as it holds as many finite scores; ties to the lower
        index.
    """
    _check_scores(scores)
    if scores.ndim != 2:
        raise SparsekitError(f"scores {tuple(scores.shape)}: want (rows, N).")
    if runs_triton(scores.device, impl):
        from sparsekit.kernels.select.topk_triton import topk_indices_mask_triton

        return topk_indices_mask_triton(scores, k)
    return topk_bits(scores, k, impl="torch")


def _check_scores(scores: Tensor) -> None:
    if scores.dtype != torch.float32 or not scores.is_contiguous() or scores.shape[-1] < 1:
        raise SparsekitError(f"scores {tuple(scores.shape)} {scores.dtype}: want contiguous float32, 1 column or more.")


def _check_row(scores: Tensor) -> None:
    if scores.shape[-1] > LONGEST_ROW:
        raise SparsekitError(
            f"scores {tuple(scores.shape)}: rows of up to {LONGEST_ROW} columns on {scores.device}; "
            f"topk_indices_mask takes longer ones."
        )


def _exists_and_forced(
    scores: Tensor, lengths: Tensor | None, force_first: bool, force_last: bool
) -> tuple[Tensor, Tensor]:
    """bool like scores: the columns that exist, and those that are selected whatever their score."""
    column = torch.arange(scores.shape[-1], device=scores.device)
    if lengths is None:
        lengths = torch.full((), scores.shape[-1], dtype=torch.int32, device=scores.device)
    length = lengths.expand(scores.shape[:-1])[..., None]
    exists = (column < length).expand(scores.shape)
    forced = ((column == 0) & force_first) | ((column == length - 1) & force_last)
    return exists, forced & exists
