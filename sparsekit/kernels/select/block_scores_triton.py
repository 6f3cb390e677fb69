"""The Triton side of `block_scores.py`: block means and their products; antidiagonal logits, never written out.

The products are nearly all of an antidiagonal estimate's time, so they are made once: a tile of stride logits leaves
one log-sum-exp a row and key block, and a second kernel, which reads only those, normalises.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError
from sparsekit.kernels.device import capability_of
from sparsekit.kernels.launch import (
    HEAD_SIZES,
    _descriptor,
    _has_tma,
    _padded,
    _precision,
    interpreted,
    launch,
    load_step,
    on_device,
    steps_of,
)
from sparsekit.kernels.primitives import LOG2E, MASKED, _offset
from sparsekit.kernels.select.grid import BlockGrid

__all__ = ["Tile", "antidiagonal_mass_triton", "pooled_means_triton", "pooled_scores_triton", "tile_for"]

# ---- block means and their products

HALF_MAX = tl.constexpr(65504.0)


@triton.jit
@no_type_check
def _store_mean(p_row, step, p_out, pos, low, end, D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr):
    """The mean of the rows at `pos` within [low, end). Called from either branch, since Triton 3.6 compiles no choice
    between pointers for AMD."""
    column = tl.arange(0, DP)
    exists = (pos >= low) & (pos < end)
    p_tile = p_row + pos.to(tl.int64)[:, None] * step + column[None, :]
    b_x = tl.load(p_tile, mask=exists[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
    count = tl.maximum(tl.sum(exists.to(tl.float32)), 1.0)
    mean = tl.sum(b_x, 0) / count
    if HALF:
        size = tl.abs(mean)
        largest = tl.where(mean > 0, HALF_MAX, -HALF_MAX)
        mean = tl.where((size > HALF_MAX) & (size < float("inf")), largest, mean)
    tl.store(p_out + column, mean, mask=column < D)


@triton.jit(do_not_specialize=["q_offset", "q_heads", "k_heads", "rows", "columns"])
@no_type_check
def _means(
    p_q, p_k, p_out_q, p_out_k, p_span, q_batch, q_head, q_token, k_batch, k_head, k_token,
    q_offset, q_heads, k_heads, rows, columns, BLOCK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """The mean of one block of one head, of q or of k, over the positions that exist: float32, or HALF float16.

    Neighbours take the heads of one block: where tokens lie outermost, their rows are neighbours too.
    """
    per_sample = q_heads * rows + k_heads * columns
    i_sample = tl.program_id(0) // per_sample
    i_item = tl.program_id(0) % per_sample
    q_first = tl.load(p_span + i_sample * 4)
    q_end = tl.load(p_span + i_sample * 4 + 1)
    start = tl.load(p_span + i_sample * 4 + 3)
    lane = tl.arange(0, BLOCK)
    if i_item < q_heads * rows:
        i_head = i_item % q_heads
        i_block = i_item // q_heads
        pos = (q_first // BLOCK + i_block) * BLOCK + lane
        p_row = p_q + _offset(i_sample, i_head, start - q_offset, q_batch, q_head, q_token)
        p_out = p_out_q + ((i_sample * q_heads + i_head) * rows + i_block).to(tl.int64) * D
        _store_mean(p_row, q_token, p_out, pos, q_first, q_end, D, DP, HALF)
    else:
        i_item -= q_heads * rows
        i_head = i_item % k_heads
        i_block = i_item // k_heads
        p_row = p_k + _offset(i_sample, i_head, start, k_batch, k_head, k_token)
        p_out = p_out_k + ((i_sample * k_heads + i_head) * columns + i_block).to(tl.int64) * D
        _store_mean(p_row, k_token, p_out, i_block * BLOCK + lane, 0, q_end, D, DP, HALF)


@triton.jit(do_not_specialize=["heads", "group", "first_row", "n_rows", "rows"])
@no_type_check
def _scores(
    p_q, p_k, p_span, p_score, heads, group, first_row, n_rows, rows, columns,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BM x BN products of block means, but for tiles that are all ahead of their rows."""
    tiles_n = tl.cdiv(columns, BN)
    tiles = tl.cdiv(n_rows, BM) * tiles_n
    i_head = tl.program_id(0) // tiles  # sample * heads + head
    i_tile = tl.program_id(0) % tiles
    i_sample = i_head // heads
    i_key_head = i_sample * (heads // group) + i_head % heads // group
    row = i_tile // tiles_n * BM + tl.arange(0, BM)
    column = i_tile % tiles_n * BN + tl.arange(0, BN)
    q_first = tl.load(p_span + i_sample * 4)
    q_end = tl.load(p_span + i_sample * 4 + 1)
    own = q_first // BLOCK + first_row + row
    own = tl.where((row < n_rows) & (own * BLOCK < q_end) & (q_end > q_first), own, -1)
    if tl.max(own) >= i_tile % tiles_n * BN:
        dim = tl.arange(0, BK)
        p_a = p_q + ((i_head * rows + first_row + row).to(tl.int64) * D)[:, None] + dim[None, :]
        p_b = p_k + ((i_key_head * columns + column).to(tl.int64) * D)[:, None] + dim[None, :]
        b_s = tl.zeros([BM, BN], tl.float32)
        for at in tl.range(0, D, BK, num_stages=STAGES):
            b_a = tl.load(p_a + at, mask=(row < n_rows)[:, None], other=0.0)
            b_b = tl.load(p_b + at, mask=(column < columns)[:, None], other=0.0)
            b_s = tl.dot(b_a, b_b.T, b_s, input_precision=PRECISION)
        # No causal mask: it would make 4-byte stores of what goes out in 16.
        p_out = p_score + ((i_head * n_rows + row).to(tl.int64) * columns)[:, None] + column[None, :]
        tl.store(p_out, b_s, mask=(row < n_rows)[:, None] & (column < columns)[None, :])


# ---- antidiagonals


_UNSPECIALIZED = ["shift", "scale", "cap", "heads", "group", "first_row", "n_rows", "columns", "span_rows"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
@no_type_check
def _antidiagonals(
    d_q, d_k, p_q, p_k, p_span, p_lse, q_batch, q_head, q_token, k_batch, k_head, k_token, q_column, k_column,
    shift, scale, cap, heads, group, first_row, n_rows, columns, span_rows,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP_M: tl.constexpr, TMA: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BM stride rows against BN stride columns: logits, and of each row and key block their log-sum-exp, base 2.

    Stride row i holds the queries STRIDE * i + STRIDE - 1 - s, stride column j the keys STRIDE * j + s; their logit is
    the sum of the products at equal s over the count of queries there are. Row numbers in memory are positions + shift
    (q) and + the sample's start (k).

    TMA: d_q and d_k are matrices whose row is STRIDE tokens, and steps count rows a batch and rows a head of them, and
    `q_column` columns a head. A tile may reach into another head's rows: they only make logits that are never stored,
    or that `_mass` leaves out. (Boxes of five dimensions, reshaped, left the first factor to registers and gave other
    logits each time in Triton 3.6, H100.)
    """
    PER: tl.constexpr = BLOCK // STRIDE  # stride rows, and columns, a block
    tiles_m = tl.cdiv(n_rows * PER, BM)
    tiles_n = tl.cdiv(columns * PER, BN)
    i_head = tl.program_id(0) // (tiles_m * tiles_n)  # sample * heads + head
    i_tile = tl.program_id(0) % (tiles_m * tiles_n)
    # GROUP_M row tiles walk the keys together: what they load stays in L2.
    i_group = i_tile // (GROUP_M * tiles_n)
    in_group = tl.minimum(tiles_m - i_group * GROUP_M, GROUP_M)
    i_m = i_group * GROUP_M + i_tile % (GROUP_M * tiles_n) % in_group
    i_n = i_tile % (GROUP_M * tiles_n) // in_group
    i_sample = i_head // heads
    i_key_head = i_head % heads // group
    q_first = tl.load(p_span + i_sample * 4)
    q_end = tl.load(p_span + i_sample * 4 + 1)
    start = tl.load(p_span + i_sample * 4 + 3)
    low_row = (q_first // BLOCK + first_row) * PER  # stride row 0 of the group
    first = low_row + i_m * BM
    last = tl.minimum(tl.minimum(first + BM, low_row + n_rows * PER), (q_end + STRIDE - 1) // STRIDE) - 1
    if (i_n * BN <= last) & (q_end > q_first):
        lane_m = i_m * BM + tl.arange(0, BM)
        row = low_row + lane_m
        column = i_n * BN + tl.arange(0, BN)
        # Queries of a row: s from `fewest` to before `most`.
        fewest = tl.maximum((row + 1) * STRIDE - q_end, 0)
        most = tl.where(lane_m < n_rows * PER, tl.minimum((row + 1) * STRIDE - q_first, STRIDE), 0)
        keys = tl.minimum(q_end - column * STRIDE, STRIDE)
        acc = tl.zeros([BM, BN], tl.float32)
        if TMA:
            at_q = i_sample * q_batch + i_head % heads * q_head + first + (start + shift) // STRIDE
            at_k = i_sample * k_batch + i_key_head * k_head + i_n * BN + start // STRIDE
            column_q = i_head % heads * q_column
            column_k = i_key_head * k_column
        else:
            dim = tl.arange(0, BK)
            q_row = row.to(tl.int64) * STRIDE + (STRIDE - 1 + start + shift)
            k_row = column.to(tl.int64) * STRIDE + start
            p_a = p_q + _offset(i_sample, i_head % heads, 0, q_batch, q_head, q_token)
            p_a = p_a + q_row[:, None] * q_token + dim[None, :]
            p_b = p_k + _offset(i_sample, i_key_head, 0, k_batch, k_head, k_token)
            p_b = p_b + k_row[:, None] * k_token + dim[None, :]
        for i in tl.range(0, STRIDE * (D // BK), num_stages=STAGES):
            s = i // (D // BK)
            at = i % (D // BK) * BK
            if TMA:
                b_a = d_q.load([at_q, column_q + (STRIDE - 1 - s) * q_token + at])
                b_b = d_k.load([at_k, column_k + s * k_token + at])
            else:
                there = ((s >= fewest) & (s < most))[:, None]
                b_a = tl.load(p_a + (at - s * q_token), mask=there, other=0.0)
                b_b = tl.load(p_b + (at + s * k_token), mask=(s < keys)[:, None], other=0.0)
            acc = tl.dot(b_a, b_b.T, acc, input_precision=PRECISION)
        factor = scale / tl.maximum(most - fewest, 1).to(tl.float32)
        if SOFTCAP:
            factor *= 2.0 / cap * LOG2E
            acc = (cap - 2.0 * cap / (1.0 + tl.math.exp2(acc * factor[:, None]))) * LOG2E
        else:
            acc = acc * (factor * LOG2E)[:, None]
        if i_n * BN + BN - 1 > first:
            acc = tl.where(column[None, :] <= row[:, None], acc, MASKED)
        acc = tl.reshape(acc, (BM, BN // PER, PER))
        top = tl.max(acc, 2)
        lse = top + tl.math.log2(tl.sum(tl.math.exp2(acc - top[:, :, None]), 2))
        block = i_n * (BN // PER) + tl.arange(0, BN // PER)
        p_out = p_lse + ((i_head.to(tl.int64) * span_rows + lane_m) * columns)[:, None] + block[None, :]
        tl.store(p_out, lse, mask=(lane_m < n_rows * PER)[:, None] & (block < columns)[None, :])


@triton.jit(do_not_specialize=["heads", "first_row", "n_rows", "columns"])
@no_type_check
def _mass(
    p_lse, p_span, p_sink, p_mass, heads, first_row, n_rows, columns,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Softmax mass of one pattern row on each key block: the row's stride rows are normalised and summed."""
    PER: tl.constexpr = BLOCK // STRIDE
    i_row = tl.program_id(0)
    i_head = i_row // n_rows
    i_sample = i_head // heads
    q_first = tl.load(p_span + i_sample * 4)
    q_end = tl.load(p_span + i_sample * 4 + 1)
    own = q_first // BLOCK + first_row + i_row % n_rows
    length = tl.where((own * BLOCK < q_end) & (q_end > q_first), own + 1, 0)
    lane = tl.arange(0, PER)
    row = own * PER + lane
    exists = (row * STRIDE < q_end) & ((row + 1) * STRIDE > q_first)
    p_lse += i_row.to(tl.int64) * PER * columns
    p_lse = p_lse + lane[:, None] * columns
    m = tl.full([PER], MASKED, tl.float32)
    norm = tl.zeros([PER], tl.float32)
    if p_sink is not None:  # a logit stands for STRIDE keys
        m = m * 0.0 + tl.load(p_sink + i_head % heads).to(tl.float32) * LOG2E - tl.math.log2(STRIDE * 1.0)
        norm = norm + 1.0
    for i in range(0, length, CHUNK):
        column = i + tl.arange(0, CHUNK)
        there = exists[:, None] & (column < length)[None, :]
        b_l = tl.load(p_lse + column[None, :], mask=there, other=MASKED)
        m_new = tl.maximum(m, tl.max(b_l, 1))
        norm = norm * tl.math.exp2(m - m_new) + tl.sum(tl.math.exp2(b_l - m_new[:, None]), 1)
        m = m_new
    share = tl.where(exists, 1.0 / tl.where(exists, norm, 1.0), 0.0)
    for i in range(0, length, CHUNK):
        column = i + tl.arange(0, CHUNK)
        there = exists[:, None] & (column < length)[None, :]
        b_l = tl.load(p_lse + column[None, :], mask=there, other=MASKED)
        b_mass = tl.sum(tl.math.exp2(b_l - m[:, None]) * share[:, None], 0)
        tl.store(p_mass + i_row.to(tl.int64) * columns + column, b_mass, mask=column < length)


# ---- launchers


class Tile(NamedTuple):
    """A matrix product's tile: `m` rows, `n` columns, `k` of the head size a step. For the antidiagonal kernel alone:
    row tiles that share keys in L2, and whether the copy engine is asked."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group_m: int = 16
    tma: bool = True


def tile_for(capability: tuple[int, int], dtype: torch.dtype) -> Tile:
    """What an architecture has room for."""
    if dtype.itemsize == 4:
        return Tile(64, 64, 32, 4, 2)
    return Tile(128, 256, 64, 8, 4) if capability[0] >= 9 else Tile(128, 128, 32, 4, 3)


SCORES = Tile(128, 128, 32, 8, 3)
HALF_SCORES = Tile(64, 128, 128, 4, 1)  # of float16 means; eleven others were slower at 128K on an H100
EXACT_SCORES = Tile(64, 64, 32, 4, 2)  # three tf32 products a logit, of factors split in two


def _check(q: Tensor, k: Tensor) -> None:
    if q.shape[-1] not in HEAD_SIZES:
        sizes = ", ".join(map(str, HEAD_SIZES))
        raise SparsekitError(f"head size {q.shape[-1]}: block scores by Triton take {sizes}; on the CPU any.")
    for name, x in (("q", q), ("k", k)):
        if x.stride(-1) != 1:
            raise SparsekitError(f"{name} has strides {x.stride()}: the last must be 1: {name}.contiguous().")
    if interpreted() and q.dtype == torch.bfloat16:
        raise SparsekitError("dtype bfloat16: Triton's interpreter computes it wrongly; use float32 or float16 there.")


def _single(*tensors: Tensor) -> tuple[Tensor, ...]:
    """float64 ones in float32, as scores are; the others themselves."""
    return tuple(x.float() if x.dtype == torch.float64 else x for x in tensors)


def pooled_means_triton(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    grid: BlockGrid,
    block_tokens: int,
    half: bool,
    warps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`block_scores.pooled_means`, q and k in one launch; `warps` a block, default one for 64 tokens."""
    _check(q, k)
    samples, heads, _, dim = q.shape
    key_heads = k.shape[1]
    dtype = torch.float16 if half else torch.float32
    out_q = torch.empty(samples, heads, grid.rows, dim, dtype=dtype, device=q.device)
    out_k = torch.empty(samples, key_heads, grid.columns, dim, dtype=dtype, device=q.device)
    steps = steps_of(q, k)
    numbers = (geometry.q_offset, heads, key_heads, grid.rows, grid.columns)
    warps = warps or max(block_tokens // 64, 1)
    options = {"BLOCK": block_tokens, "D": dim, "DP": _padded(dim), "HALF": half, "num_warps": warps}
    programs = samples * (heads * grid.rows + key_heads * grid.columns)
    with on_device(q.device):
        launch(_means, programs, (q, k, out_q, out_k, grid.spans, *steps, *numbers), options, steps)
    return out_q, out_k


def pooled_scores_triton(
    q_means: Tensor,
    k_means: Tensor,
    grid: BlockGrid,
    block_tokens: int,
    first_row: int,
    n_rows: int,
    exact: bool,
    tile: Tile | None = None,
) -> Tensor:
    """`block_scores.pooled_scores`; `exact`: float32 means with float32's own error, else in tf32."""
    samples, heads, rows, dim = q_means.shape
    columns, device = k_means.shape[2], q_means.device
    out = torch.empty(samples, heads, n_rows, columns, dtype=torch.float32, device=device)
    capability = capability_of(device)
    half = q_means.dtype == torch.float16
    exact = exact and not half
    if tile is None:
        tile = HALF_SCORES if half else EXACT_SCORES if exact else SCORES
    fast = "tf32" if capability[0] >= 8 else "ieee"
    options = {
        "BLOCK": block_tokens, "BM": tile.m, "BN": tile.n, "BK": min(tile.k, dim & -dim), "D": dim,
        "PRECISION": _precision(capability, torch.float32) if exact else fast, "STAGES": tile.stages,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    numbers = (heads, heads // k_means.shape[1], first_row, n_rows, rows, columns)
    tiles = triton.cdiv(n_rows, tile.m) * triton.cdiv(columns, tile.n)
    with on_device(device):
        args = (q_means, k_means, grid.spans, out, *numbers)
        launch(_scores, samples * heads * tiles, args, options, (load_step(columns), columns == 1))
    return out


def antidiagonal_mass_triton(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    grid: BlockGrid,
    block_tokens: int,
    stride: int,
    softmax: Softmax,
    first_row: int,
    n_rows: int,
    tile: Tile | None = None,
) -> Tensor:
    """`block_scores.antidiagonal_mass`; `tile` for measurements."""
    lse = antidiagonal_lse(q, k, geometry, grid, block_tokens, stride, softmax, first_row, n_rows, tile)
    samples, heads = q.shape[:2]
    mass = torch.empty(samples, heads, n_rows, grid.columns, dtype=torch.float32, device=q.device)
    options = {"BLOCK": block_tokens, "STRIDE": stride, "CHUNK": 256, "num_warps": 4}
    args = (lse, grid.spans, softmax.sink_logits, mass, heads, first_row, n_rows, grid.columns)
    with on_device(q.device):
        launch(_mass, samples * heads * n_rows, args, options)
    return mass


def antidiagonal_lse(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    grid: BlockGrid,
    block_tokens: int,
    stride: int,
    softmax: Softmax,
    first_row: int,
    n_rows: int,
    tile: Tile | None = None,
) -> Tensor:
    """float32 (S, H, stride rows, C): base-2 log-sum-exp of a stride row's logits in each key block up to its own."""
    _check(q, k)
    q, k = _single(q, k)
    samples, heads, _, dim = q.shape
    capability = capability_of(q.device)
    tile = tile_for(capability, q.dtype) if tile is None else tile
    step = min(tile.k, dim & -dim)
    per = block_tokens // stride
    span_rows = n_rows * per
    out = torch.empty(samples, heads, span_rows, grid.columns, dtype=torch.float32, device=q.device)
    seen = [_by_strides(x, n, stride, step) for x, n in ((q, tile.m), (k, max(tile.n, per)))]
    tma = tile.tma and _has_tma(q.device) and _starts_whole(geometry, stride) and None not in seen
    d_q, d_k = [None if x is None or not tma else x[0] for x in seen]
    steps = (*steps_of(q, k), 0, 0)
    if tma:
        (q_rows, q_columns), (k_rows, k_columns) = [x[1:] for x in seen if x is not None]
        steps = (*q_rows, q.stride(2), *k_rows, k.stride(2), q_columns, k_columns)
    numbers = (
        -geometry.q_offset, float(softmax.scale), float(softmax.softcap or 1.0), heads, heads // k.shape[1],
        first_row, n_rows, grid.columns, span_rows,
    )  # fmt: skip
    options: dict[str, Any] = {
        "BLOCK": block_tokens, "STRIDE": stride, "D": dim, "BM": tile.m, "BN": max(tile.n, per), "BK": step,
        "GROUP_M": tile.group_m, "TMA": tma, "SOFTCAP": softmax.softcap is not None,
        "PRECISION": _precision(capability, q.dtype), "STAGES": tile.stages,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    tiles = triton.cdiv(span_rows, tile.m) * triton.cdiv(grid.columns * per, tile.n)
    pointers = (None, None) if tma else (q, k)
    args = (d_q, d_k, *pointers, grid.spans, out, *steps, *numbers)
    with on_device(q.device):
        launch(_antidiagonals, samples * heads * tiles, args, options, (*steps, q.dtype))
    return out


def _starts_whole(geometry: Geometry, stride: int) -> bool:
    """Whether no stride is cut: the copy engine knows whole ones only."""
    ends = (span.q_end for span in geometry.spans)
    return all(n % stride == 0 for n in (geometry.q_offset, geometry.q_len, *geometry.kv_start, *ends))


def _by_strides(x: Tensor, rows: int, stride: int, step: int) -> tuple[Any, tuple[int, int], int] | None:
    """x (B, heads, tokens, D) as a matrix of `stride` tokens a row: (descriptor of boxes rows x step, (rows a batch,
    rows a head), columns a head). None where x is no such matrix, or its steps or address are none for TMA."""
    batch, heads, tokens, dim = x.shape
    own, head, token, _ = x.stride()
    wide = token * stride
    if tokens < stride or token <= 0 or token * x.element_size() % 16 or x.data_ptr() % 16:
        return None
    per_batch = 0 if batch == 1 else own // wide
    if batch > 1 and (own <= 0 or own % wide):
        return None
    if heads == 1:
        per_head, columns = 0, 0
    elif head > 0 and head % wide == 0:
        per_head, columns = head // wide, 0
    elif head * x.element_size() % 16 == 0 and head > 0 and (heads - 1) * head + dim <= token:
        per_head, columns = 0, head
    else:
        return None
    last = (batch - 1) * per_batch + (heads - 1) * per_head + tokens // stride
    fields = {
        "shape": [last, (stride - 1) * token + (heads - 1) * columns + dim],
        "strides": [wide, 1],
        "block_shape": [rows, step],
        "padding": "zero",
        "round_f32_to_tf32": False,
    }
    return _descriptor(x, fields), (per_batch, per_head), columns
