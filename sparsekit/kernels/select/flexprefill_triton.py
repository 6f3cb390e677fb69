"""The Triton side of `flexprefill.py`."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.launch import _padded, launch, load_step, on_device, steps_of
from sparsekit.kernels.primitives import LOG2E, _whole
from sparsekit.kernels.select.grid import BLOCK, CODES, LOWEST, BlockGrid, Budgets

__all__ = ["choose_triton", "count_map_triton", "map_threshold_triton", "write_bits_triton"]

CHUNK = 2048  # tokens looked at in one go
DECIDE = 128  # blocks whose mean keys are looked at in one go

_CODES = tl.constexpr(CODES)
_LOWEST = tl.constexpr(LOWEST)


@triton.jit
@no_type_check
def _codes(b_mass):
    """`flexprefill.mass_codes`."""
    bits = tl.where(b_mass > 0.0, b_mass, 0.0).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum((bits >> 16) - _LOWEST, 0), _CODES - 1)


@triton.jit
@no_type_check
def _threshold(counts, gamma):
    """`flexprefill.mass_threshold` of counts (4096,), gamma a float64."""
    code = tl.arange(0, _CODES)
    value = tl.where(code > 0, ((128 + (code & 127)).to(tl.int64)) << (code >> 7).to(tl.int64), 0)
    mass = counts.to(tl.int64) * value
    total = tl.sum(mass)
    reach = total - tl.cumsum(mass, 0) + mass
    required = total.to(tl.float64) * gamma
    found = tl.max(tl.where(reach.to(tl.float64) >= required, code, 0))
    above = tl.sum(tl.where(code > found, mass, 0))
    more = tl.sum(tl.where(code > found, counts, 0))
    one = tl.maximum(tl.max(tl.where(code == found, value, 0)), 1)
    equal = tl.math.ceil((required - above.to(tl.float64)) / one.to(tl.float64)).to(tl.int32)
    some = required > 0.0
    return tl.where(some, found, _CODES), tl.where(some, more + equal, 0)


@triton.jit
@no_type_check
def _capped(b_s, scale, cap, SOFTCAP: tl.constexpr):
    b_s = b_s * scale
    if SOFTCAP:  # tanh by its exponential
        b_s = cap - 2.0 * cap / (1.0 + tl.math.exp2(b_s * (2.0 * LOG2E / cap)))
    return b_s


@triton.jit
@no_type_check
def _count(p_count, codes):
    """Integer atomics: their order changes nothing. `tl.histogram` costs a hundred times as much at 4096 bins."""
    tl.atomic_add(p_count + codes, tl.full(codes.shape, 1, tl.int32), mask=codes > 0, sem="relaxed")


@triton.jit(do_not_specialize=["tokens", "columns", "chunks"])
@no_type_check
def _tokens(p_sums, p_mass, p_count, tokens, columns, chunks, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Some tokens of a head and kind: the mass of each block, and how many tokens have which code."""
    i_row = tl.program_id(0) // chunks
    first = tl.program_id(0) % chunks * CHUNK
    at = first + tl.arange(0, CHUNK)
    b_mass = tl.load(p_sums + i_row.to(tl.int64) * tokens + at, mask=at < tokens, other=0.0)
    _count(p_count + i_row * _CODES, _codes(b_mass))
    block = first // BLOCK + tl.arange(0, CHUNK // BLOCK)
    total = tl.sum(tl.reshape(b_mass, (CHUNK // BLOCK, BLOCK)), 1)
    tl.store(p_mass + i_row.to(tl.int64) * columns + block, total, mask=block < columns)


@triton.jit
@no_type_check
def _block_logits(p_mean, b_q, at, blocks, scale, cap, D: tl.constexpr, DP: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits of a mean query over mean keys."""
    column = tl.arange(0, DP)
    p_tile = p_mean + at[:, None] * D + column[None, :]
    b_k = tl.load(p_tile, mask=(at < blocks)[:, None] & (column < D)[None, :], other=0.0)
    b_s = _capped(tl.sum(b_k * b_q[None, :], 1), scale, cap, SOFTCAP)
    return tl.where(at < blocks, b_s, float("-inf"))


_DECIDE = ["q_offset", "queries", "columns", "pairs", "scale", "cap", "tau", "min_blocks", "max_blocks"]


@triton.jit(do_not_specialize=_DECIDE)
@no_type_check
def _decide(
    p_q, p_mean, p_mass, p_count, p_gamma, p_span, p_wanted, p_aware, q_batch, q_head, q_token, q_offset, queries,
    columns, pairs, scale, cap, tau, min_blocks, max_blocks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A program a head: whether the estimate from means is near what its last queries saw, and its block budgets."""
    i_pair = tl.program_id(0)
    i_sample = i_pair // HEADS
    i_head = i_pair % HEADS
    q_first = tl.load(p_span + i_sample * 4)
    q_end = tl.load(p_span + i_sample * 4 + 1)
    start = tl.load(p_span + i_sample * 4 + 3)
    n = tl.minimum(queries, q_end - q_first)
    blocks = (q_end + BLOCK - 1) // BLOCK
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, DP)
    row = (q_end - n + start - q_offset + lane).to(tl.int64) * q_token
    p_q += i_sample.to(tl.int64) * q_batch + i_head.to(tl.int64) * q_head
    b_q = tl.load(p_q + row[:, None] + column[None, :], mask=(lane < n)[:, None] & (column < D)[None, :], other=0.0)
    b_mean = tl.sum(b_q.to(tl.float32), 0) / tl.maximum(n, 1).to(tl.float32)
    p_mean += (i_sample * (HEADS // GROUP) + i_head // GROUP).to(tl.int64) * columns * D
    p_mass += i_pair.to(tl.int64) * columns

    m = tl.full([STEP], -1.0e30, tl.float32)
    norm = tl.zeros([STEP], tl.float32)
    total = tl.zeros([STEP], tl.float32)
    for first in range(0, blocks, STEP):
        at = first + tl.arange(0, STEP)
        b_s = _block_logits(p_mean, b_mean, at, blocks, scale, cap, D, DP, SOFTCAP)
        m_new = tl.maximum(m, b_s)
        norm = norm * tl.math.exp2((m - m_new) * LOG2E) + tl.math.exp2((b_s - m_new) * LOG2E)
        m = m_new
        total += tl.load(p_mass + at, mask=at < blocks, other=0.0)
    top = tl.max(m)
    denominator = tl.sum(norm * tl.math.exp2((m - top) * LOG2E))
    seen = tl.sum(total)
    divergence = tl.zeros([STEP], tl.float32)
    for first in range(0, blocks, STEP):
        at = first + tl.arange(0, STEP)
        b_s = _block_logits(p_mean, b_mean, at, blocks, scale, cap, D, DP, SOFTCAP)
        b_p = tl.math.exp2((b_s - top) * LOG2E) / denominator
        b_a = tl.load(p_mass + at, mask=at < blocks, other=0.0) / seen
        middle = (b_p + b_a) / 2
        divergence += tl.where(b_p > 0, b_p * tl.math.log(tl.where(b_p > 0, b_p / middle, 1.0)), b_p * 0.0)
        divergence += tl.where(b_a > 0, b_a * tl.math.log(tl.where(b_a > 0, b_a / middle, 1.0)), b_a * 0.0)
    squared = tl.sum(divergence) / 2
    # Of a NaN, which is below nothing, too: a maximum would hide it.
    aware = tl.math.sqrt(tl.where(squared < 0, 0.0, squared)) < tau
    tl.store(p_aware + i_pair, aware.to(tl.int32))
    for kind in tl.static_range(2):
        counts = tl.load(p_count + (kind * pairs + i_pair) * _CODES + tl.arange(0, _CODES))
        _, fewest = _threshold(counts, tl.load(p_gamma))
        wanted = tl.minimum(tl.maximum(fewest // BLOCK + 1, min_blocks), max_blocks)
        tl.store(p_wanted + kind * pairs + i_pair, tl.where(aware, min_blocks, wanted))


@triton.jit
@no_type_check
def _map_row(p_score, column, length, scale, cap, STEP: tl.constexpr, SOFTCAP: tl.constexpr):
    """Codes of the softmax of one row of the block map; 0 ahead of it."""
    b_s = tl.load(p_score + column, mask=column < _whole(length, STEP), other=float("-inf"))
    b_s = tl.where(column < length, _capped(b_s, scale, cap, SOFTCAP), float("-inf"))
    b_p = tl.math.exp2((b_s - tl.max(b_s)) * LOG2E)
    return _codes(tl.math.div_rn(b_p, tl.zeros_like(b_p) + tl.sum(b_p)))  # 1 / 2^n must not fall below its code


@triton.jit(do_not_specialize=["heads", "rows", "first", "all_rows", "scale", "cap"])
@no_type_check
def _count_map(
    p_score, p_aware, p_length, p_count, heads, rows, first, all_rows, columns, scale, cap,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A program a row of the block map of a query-aware head."""
    i_row = tl.program_id(0)
    i_pair = i_row // rows
    if tl.load(p_aware + i_pair) != 0:
        length = tl.load(p_length + i_pair // heads * all_rows + first + i_row % rows)
        if length > 0:
            p_score += i_row.to(tl.int64) * columns
            codes = _map_row(p_score, tl.arange(0, COLUMNS), length, scale, cap, STEP, SOFTCAP)
            _count(p_count + i_pair * _CODES, codes)


@triton.jit
@no_type_check
def _map_threshold(p_count, p_gamma, p_threshold):
    i_pair = tl.program_id(0)
    counts = tl.load(p_count + i_pair * _CODES + tl.arange(0, _CODES))
    code, _ = _threshold(counts, tl.load(p_gamma))
    tl.store(p_threshold + i_pair, code)


@triton.jit(do_not_specialize=["heads", "rows", "first", "all_rows", "words", "pairs", "scale", "cap"])
@no_type_check
def _write_bits(
    p_score, p_threshold, p_line, p_length, p_bits, heads, rows, first, all_rows, columns, words, pairs, scale, cap,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A program a row of blocks: block columns, block diagonals, and the map from its threshold on."""
    i_row = tl.program_id(0)
    i_pair = i_row // rows
    length = tl.load(p_length + i_pair // heads * all_rows + first + i_row % rows)
    column = tl.arange(0, COLUMNS)
    inside = column < length
    back = length - 1 - column
    p_vertical = p_line + i_pair.to(tl.int64) * words
    p_slash = p_vertical + pairs.to(tl.int64) * words
    vertical = tl.load(p_vertical + column // 32, mask=inside, other=0) >> (column % 32)
    back = tl.where(inside, back, 0)
    slash = tl.load(p_slash + back // 32, mask=inside, other=0) >> (back % 32)
    keep = ((vertical | slash) & 1).to(tl.int32)
    if p_score is not None:
        threshold = tl.load(p_threshold + i_pair)
        if (threshold < _CODES) & (length > 0):
            codes = _map_row(p_score + i_row.to(tl.int64) * columns, column, length, scale, cap, STEP, SOFTCAP)
            keep = keep | (codes >= threshold).to(tl.int32)
    keep = tl.where(inside, keep, 0)
    word = tl.arange(0, COLUMNS // 32)
    packed = tl.sum(tl.reshape(keep, (COLUMNS // 32, 32)) << tl.arange(0, 32)[None, :], 1)
    tl.store(p_bits + i_row.to(tl.int64) * words + word, packed, mask=word < words)


# ---- launchers


@per_geometry
def _share(gamma: float, device: torch.device) -> Tensor:
    """A kernel's scalar would be rounded to float32."""
    return torch.full((1,), gamma, dtype=torch.float64, device=device)


def _softmax_options(softmax: Softmax) -> tuple[float, float, dict[str, Any]]:
    capped = softmax.softcap is not None
    return float(softmax.scale), float(softmax.softcap or 1.0), {"SOFTCAP": capped}


def choose_triton(
    q: Tensor,
    sums: Tensor,
    k_means: Tensor,
    geometry: Geometry,
    grid: BlockGrid,
    softmax: Softmax,
    queries: int,
    budgets: Budgets,
    counts: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`flexprefill._choose`; query-aware is int32. `counts`: zeros, int32 (2, B, H, 4096)."""
    samples, heads, dim = q.shape[0], q.shape[1], q.shape[3]
    pairs, columns, device = samples * heads, grid.columns, q.device
    mass = torch.empty(2, samples, heads, columns, dtype=torch.float32, device=device)
    small = torch.empty(3, samples, heads, dtype=torch.int32, device=device)
    wanted, aware = small[:2], small[2]
    scale, cap, softmax_options = _softmax_options(softmax)
    steps = steps_of(q)
    with on_device(device):
        chunks = -(-columns * BLOCK // CHUNK)
        tokens = (sums, mass, counts, sums.shape[-1], columns, chunks)
        launch(_tokens, 2 * pairs * chunks, tokens, {"BLOCK": BLOCK, "CHUNK": CHUNK, "num_warps": 4})
        numbers = (geometry.q_offset, queries, columns, pairs, scale, cap)
        limits = (float(budgets.tau), budgets.min_blocks, budgets.max_blocks)
        options = {
            "HEADS": heads, "GROUP": heads // k_means.shape[1], "D": dim, "DP": _padded(dim),
            "ROWS": _padded(queries), "BLOCK": BLOCK, "STEP": DECIDE, **softmax_options, "num_warps": 8,
        }  # fmt: skip
        share = _share(budgets.gamma, device)
        args = (q, k_means, mass, counts, share, grid.spans, wanted, aware, *steps, *numbers, *limits)
        launch(_decide, pairs, args, options, steps)
    return mass, wanted, aware


def _row_options(columns: int) -> dict[str, int]:
    block = max(_padded(columns), 32)
    return {"COLUMNS": block, "STEP": load_step(columns), "num_warps": min(max(block // 512, 1), 8)}


def count_map_triton(
    scores: Tensor, aware: Tensor, grid: BlockGrid, softmax: Softmax, first: int, counts: Tensor
) -> None:
    """`flexprefill._count_map`."""
    samples, heads, rows, columns = scores.shape
    scale, cap, options = _softmax_options(softmax)
    args = (scores, aware, grid.lengths, counts, heads, rows, first, grid.rows, columns, scale, cap)
    with on_device(scores.device):
        options |= _row_options(columns)
        launch(_count_map, samples * heads * rows, args, options, (options["STEP"], columns == 1))


def map_threshold_triton(counts: Tensor, gamma: float) -> Tensor:
    """`flexprefill._map_threshold`."""
    threshold = torch.empty(counts.shape[:2], dtype=torch.int32, device=counts.device)
    with on_device(counts.device):
        launch(_map_threshold, threshold.numel(), (counts, _share(gamma, counts.device), threshold), {"num_warps": 4})
    return threshold


def write_bits_triton(
    scores: Tensor | None,
    threshold: Tensor | None,
    lines: Tensor,
    grid: BlockGrid,
    softmax: Softmax,
    first: int,
    rows: int,
) -> Tensor:
    """`flexprefill._write_bits`."""
    _, samples, heads, words = lines.shape
    bits = torch.empty(samples, heads, rows, words, dtype=torch.int32, device=lines.device)
    scale, cap, options = _softmax_options(softmax)
    numbers = (heads, rows, first, grid.rows, grid.columns, words, samples * heads, scale, cap)
    args = (scores, threshold, lines, grid.lengths, bits, *numbers)
    with on_device(lines.device):
        options |= _row_options(grid.columns)
        launch(_write_bits, samples * heads * rows, args, options, (options["STEP"], grid.columns == 1))
    return bits
