"""The Triton side of `mean_keys.py`: one pass over the logits, of which each tile leaves a number a key block."""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.device import capability_of
from sparsekit.kernels.launch import _padded, _precision, launch, on_device, steps_of
from sparsekit.kernels.primitives import LN2, LOG2E, MASKED, _offset
from sparsekit.kernels.select.bits import WORD
from sparsekit.kernels.select.block_scores_triton import _check, _single
from sparsekit.kernels.select.grid import BlockGrid
from sparsekit.kernels.select.topk_triton import _a_row, _block, _row_warps, _store_words

__all__ = ["near_top_bits_triton", "query_block_lse_triton"]


@triton.jit(do_not_specialize=["q_offset", "scale", "cap", "samples", "heads", "group", "first_row", "n_rows"])
@no_type_check
def _query_lse(
    p_q, p_k, p_span, p_out, q_batch, q_head, q_token, q_offset, scale, cap, samples, heads, group, first_row, n_rows,
    columns, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head against the mean keys up to its own. The longest rows start first.

    Mean keys are the rows of a tile and queries its columns: the sum over queries then stays within a warp.
    """
    i_head = tl.program_id(0) % (samples * heads)  # sample * heads + head
    i_row = n_rows - 1 - tl.program_id(0) // (samples * heads)
    i_sample = i_head // heads
    i_key_head = i_sample * (heads // group) + i_head % heads // group
    q_first = tl.load(p_span + i_sample * 4)
    q_end = tl.load(p_span + i_sample * 4 + 1)
    start = tl.load(p_span + i_sample * 4 + 3)
    own = q_first // BLOCK + first_row + i_row
    if (own * BLOCK < q_end) & (q_end > q_first):
        dim = tl.arange(0, BK)
        pos = own * BLOCK + tl.arange(0, BLOCK)
        there = (pos >= q_first) & (pos < q_end)
        p_row = p_q + _offset(i_sample, i_head % heads, start - q_offset, q_batch, q_head, q_token)
        p_tile = p_row + pos.to(tl.int64)[:, None] * q_token + dim[None, :]
        b_q = tl.load(p_tile, mask=there[:, None] & (dim < D)[None, :], other=0.0)  # (BLOCK, BK)
        b_bias = tl.where(there, 0.0, MASKED)
        p_k += i_key_head.to(tl.int64) * columns * D
        p_out += (i_head.to(tl.int64) * n_rows + i_row) * columns
        for at in tl.range(0, own + 1, BN, num_stages=STAGES):
            column = at + tl.arange(0, BN)
            p_b = p_k + column[:, None] * D + dim[None, :]
            if BK == DP:
                b_k = tl.load(p_b, mask=(column < columns)[:, None] & (dim < D)[None, :], other=0.0)  # (BN, BK)
                b_z = tl.dot(b_k, b_q.T, input_precision=PRECISION)  # (BN, BLOCK)
            else:
                b_z = tl.zeros([BN, BLOCK], tl.float32)
                for d in tl.range(0, DP, BK, num_stages=1):
                    b_k = tl.load(p_b + d, mask=(column < columns)[:, None] & (d + dim < D)[None, :], other=0.0)
                    b_a = tl.load(p_tile + d, mask=there[:, None] & (d + dim < D)[None, :], other=0.0)
                    b_z = tl.dot(b_k, b_a.T, b_z, input_precision=PRECISION)
            if SOFTCAP:
                b_z = cap - 2.0 * cap / (1.0 + tl.math.exp2(b_z * (scale * 2.0 / cap * LOG2E)))
                b_z = b_z * LOG2E + b_bias[None, :]
            else:
                b_z = b_z * (scale * LOG2E) + b_bias[None, :]
            top = tl.max(b_z, 1)
            lse = top + tl.math.log2(tl.sum(tl.math.exp2(b_z - top[:, None]), 1))
            tl.store(p_out + column, lse * LN2, mask=column <= own)


@triton.jit
@no_type_check
def _near_top_row(p_score, p_bits, length, margin, first, last, words, BLOCK: tl.constexpr, ALL: tl.constexpr):
    """One row whose `length` is at most BLOCK."""
    column = tl.arange(0, BLOCK)
    score = tl.load(p_score + column, mask=column < length, other=float("-inf"))
    score = tl.where(score > float("-inf"), score, float("-inf"))  # NaN
    keep = (score > float("-inf")) & (score >= tl.max(score) - margin)
    keep = keep | (((column < first) | (column >= length - last)) & (column < length))
    _store_words(p_bits, keep, length, words, BLOCK, ALL, False, False)


@triton.jit(do_not_specialize=["margin", "first", "last", "columns", "words"])
@no_type_check
def _near_top(p_score, p_bits, p_length, margin, first, last, columns, words, BLOCK: tl.constexpr):
    """A program a row; short rows run on a half or a quarter of the block."""
    i_row = tl.program_id(0).to(tl.int64)
    length = columns
    if p_length is not None:
        length = tl.minimum(tl.load(p_length + i_row), columns)
    p_score += i_row * columns
    p_bits += i_row * words
    if BLOCK >= 256:
        if length * 4 <= BLOCK:
            _near_top_row(p_score, p_bits, length, margin, first, last, words, BLOCK // 4, BLOCK)
        elif length * 2 <= BLOCK:
            _near_top_row(p_score, p_bits, length, margin, first, last, words, BLOCK // 2, BLOCK)
        else:
            _near_top_row(p_score, p_bits, length, margin, first, last, words, BLOCK, BLOCK)
    else:
        _near_top_row(p_score, p_bits, length, margin, first, last, words, BLOCK, BLOCK)


class Tile(NamedTuple):
    """`n` mean keys a step, against a whole block of queries, `k` dimensions at once; fewer than all: queries are read
    again at each step."""

    n: int
    k: int
    warps: int
    stages: int


def tile_for(dtype: torch.dtype, dim: int) -> Tile:
    """What has room in 227 KB beside a block of 128 queries."""
    if dtype.itemsize == 4:  # three tf32 products hold each factor twice
        return Tile(64, _padded(dim), 4, 1) if dim <= 128 else Tile(64, 64, 8, 1)
    return Tile(64, _padded(dim), 4, 2)


def query_block_lse_triton(
    q: Tensor,
    k_means: Tensor,
    geometry: Geometry,
    grid: BlockGrid,
    block_tokens: int,
    softmax: Softmax,
    first_row: int,
    n_rows: int,
    tile: Tile | None = None,
) -> Tensor:
    """`mean_keys.query_block_lse`; `tile` for measurements."""
    _check(q, k_means)
    q, k_means = _single(q, k_means)
    samples, heads, _, dim = q.shape
    tile = tile_for(q.dtype, dim) if tile is None else tile
    means = k_means.to(q.dtype).contiguous()
    out = torch.empty(samples, heads, n_rows, grid.columns, dtype=torch.float32, device=q.device)
    steps = steps_of(q)
    numbers = (
        geometry.q_offset, float(softmax.scale), float(softmax.softcap or 1.0), samples, heads,
        heads // means.shape[1], first_row, n_rows, grid.columns,
    )  # fmt: skip
    options: dict[str, Any] = {
        "BLOCK": block_tokens, "D": dim, "DP": _padded(dim), "BN": tile.n, "BK": tile.k,
        "SOFTCAP": softmax.softcap is not None, "PRECISION": _precision(capability_of(q.device), q.dtype),
        "STAGES": tile.stages,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    with on_device(q.device):
        args = (q, means, grid.spans, out, *steps, *numbers)
        launch(_query_lse, samples * heads * n_rows, args, options, (*steps, grid.columns % 16 == 0, grid.columns == 1))
    return out


def near_top_bits_triton(
    scores: Tensor, margin: float, lengths: Tensor | None, first: int, last: int, warps: int | None = None
) -> Tensor:
    """`mean_keys.near_top_bits`; `warps` a row, default by its length."""
    shape, columns = scores.shape[:-1], scores.shape[-1]
    words, block = -(-columns // WORD), _block(columns)
    bits = torch.empty(*shape, words, dtype=torch.int32, device=scores.device)
    args = (scores, bits, _a_row(lengths, shape, torch.int32), float(margin), first, last, columns, words)
    with on_device(scores.device):
        launch(_near_top, shape.numel(), args, {"BLOCK": block, "num_warps": warps or _row_warps(block)})
    return bits
