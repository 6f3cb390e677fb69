"""e4m3 for the FP8 forms: keys and values, rounded before a call's products; queries and weights, rounded in them.

What a number is rounded with, and why, is in docs/kernels.md.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.kernels.attend.fp8 import BLOCK_KEYS, key_blocks
from sparsekit.kernels.launch import interpreted, launch, steps_of
from sparsekit.kernels.primitives import _in_pages
from sparsekit.plan import key_bounds

__all__ = ["in_common", "quantise", "quantised"]

SAMPLED = 4096  # keys of a head at most, whose mean is taken off all of them, as their values' is off all values
COLUMNS = 16  # dimensions of a program that finds the mean: 32 bytes of a row
BLOCK = tl.constexpr(BLOCK_KEYS)
LARGEST = tl.constexpr(448.0)  # of e4m3
HEADROOM = tl.constexpr(8.0)  # P is at most 2^HEADROOM, which e4m3 holds
# What a scale is made of where everything is zero. Logits are multiplied by a row's scale times a block's, masked ones,
# of -inf, too: they would be NaN were that 0, as 1e-20 twice makes it.
SMALLEST = tl.constexpr(1.0e-12)
INTERPRETED = tl.constexpr(interpreted())


def quantised(keys: Keys, g: Geometry, shifted: bool, in_order: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K (B, G, N, D) and V (B, G, D, N) in e4m3, scales (B, G, N / 128, 2), N up to 127 more than keys, and what was
    taken off the heads of both, (B, G, 2, D) bfloat16: off K's where `shifted`, which a soft-cap would see. V's keys
    are `in_order`, or as the form for Hopper wants them.
    """
    k, v, table = keys
    blocks, dim, pairs = key_blocks(g), k.shape[3], g.batch * k.shape[1]
    k8, v8 = (
        k.new_empty((g.batch, k.shape[1], *shape), dtype=torch.float8_e4m3fn)
        for shape in ((blocks * BLOCK_KEYS, dim), (dim, blocks * BLOCK_KEYS))
    )
    scales = k.new_empty((g.batch, k.shape[1], blocks, 2), dtype=torch.float32)
    common = k.new_empty((g.batch, k.shape[1], 2, dim), dtype=torch.bfloat16)
    given = (k, v, table, key_bounds(g, k.device), common)
    steps = (*(step // 8 for step in steps_of(k, v)), None if table is None else table.stride(0))
    options = {"D": dim, "PAGE": keys.page, "num_warps": max(dim // 16, 8)}
    few = min(1 << (blocks * BLOCK_KEYS - 1).bit_length(), SAMPLED)
    sampled = {"SAMPLED": few, "STEP": min(few, 256), "COLUMNS": COLUMNS, "OF_KEYS": shifted}
    launch(in_common, 2 * pairs * (dim // COLUMNS), (*given, k.shape[1], *steps), options | sampled)
    written = (k8, v8, scales, k.shape[1], blocks)
    launch(quantise, blocks * pairs, (*given, *written, *steps), options | {"BN": BLOCK_KEYS, "IN_ORDER": in_order})
    return k8, v8, scales, common


QUANTISE_NUMBERS = ["heads", "blocks", "k_batch", "k_head", "k_token", "v_batch", "v_head", "v_token", "table_sample"]


@triton.jit(do_not_specialize=QUANTISE_NUMBERS)
@no_type_check
def in_common(
    p_k, p_v, p_table, p_bounds, p_common, heads,
    k_batch, k_head, k_token, v_batch, v_head, v_token, table_sample,
    D: tl.constexpr, PAGE: tl.constexpr, SAMPLED: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
    OF_KEYS: tl.constexpr,
):  # fmt: skip
    """What SAMPLED keys of a head, spread evenly, have in common, and what their values have -> (B, G, 2, D) bfloat16.

    That is their mean, of what is finite, rounded, as any vector would do; without OF_KEYS it is 0 for keys. Program:
    COLUMNS dimensions of the keys or values of one head. Arguments are those of `quantise`.
    """
    first = tl.program_id(0) % (D // COLUMNS) * COLUMNS
    i_common = tl.program_id(0) // (D // COLUMNS)
    of_values = i_common % 2
    i_sample = i_common // 2 // heads
    i_head = (i_common // 2 % heads).to(tl.int64)
    kv_start = tl.load(p_bounds + i_sample * 2)
    last = tl.load(p_bounds + i_sample * 2 + 1)
    total = tl.zeros((STEP, COLUMNS), tl.float32)
    for i in tl.range(0, SAMPLED, STEP, loop_unroll_factor=4):
        some = ((i + tl.arange(0, STEP)).to(tl.int64) * (last + 1) // SAMPLED).to(tl.int32)
        batch, key = _places(p_table, some, i_sample, kv_start, last, table_sample, PAGE)
        if of_values:
            x = _rows(p_v + i_head * v_head * 8 + first, batch, key, some <= last, v_batch, v_token, COLUMNS)
        else:
            inside = (some <= last) & OF_KEYS
            x = _rows(p_k + i_head * k_head * 8 + first, batch, key, inside, k_batch, k_token, COLUMNS)
        # Shared out before they are added: the sum of large ones is not finite.
        total += tl.where(tl.abs(x) < float("inf"), x * (1.0 / SAMPLED), 0.0)
    mean = tl.sum(total, 0).to(tl.bfloat16)
    tl.store(p_common + i_common * D + first + tl.arange(0, COLUMNS), mean)


@triton.jit(do_not_specialize=QUANTISE_NUMBERS)
@no_type_check
def quantise(
    p_k, p_v, p_table, p_bounds, p_common, p_k8, p_v8, p_scales, heads, blocks,
    k_batch, k_head, k_token, v_batch, v_head, v_token, table_sample,
    D: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """K and V (B, G, K, D), or pages of them, less p_common (B, G, 2, D) -> e4m3 K (B, G, blocks * BN, D) and V
    (B, G, D, blocks * BN), and scales. V's keys are IN_ORDER, or as fp8_device.py wants them.

    Program: BN keys of one head. Key 0 is a sample's first valid one; behind its last come zeros, whatever lies there.
    What is not finite becomes NaN where it is, and scales know nothing of it.
    p_bounds: int32 (B, 2), kv_start and the last valid position. p_scales: (B, G, blocks, 2), the factor that K is to
    be multiplied by and log2 of V's. Strides are in units of 8 elements.
    """
    i_block = tl.program_id(0) % blocks
    i_pair = tl.program_id(0) // blocks
    i_sample = i_pair // heads
    i_head = (i_pair % heads).to(tl.int64)
    kv_start = tl.load(p_bounds + i_sample * 2)
    last = tl.load(p_bounds + i_sample * 2 + 1)
    t = i_block * BN + tl.arange(0, BN)
    d = tl.arange(0, D)
    batch, key = _places(p_table, t, i_sample, kv_start, last, table_sample, PAGE)
    k = _rows(p_k + i_head * k_head * 8, batch, key, t <= last, k_batch, k_token, D)
    k = tl.where((t <= last)[:, None], k - tl.load(p_common + i_pair * 2 * D + d).to(tl.float32)[None], 0.0)
    k, k_scale = _scaled(k)
    o_pair = i_pair.to(tl.int64) * blocks * BN
    tl.store(p_k8 + (o_pair + t[:, None]) * D + d[None], _to_e4m3(k))
    v = _rows(p_v + i_head * v_head * 8, batch, key, t <= last, v_batch, v_token, D)
    v = tl.where((t <= last)[:, None], v - tl.load(p_common + (i_pair * 2 + 1) * D + d).to(tl.float32)[None], 0.0)
    v, v_scale = _scaled(v)
    v8 = _to_e4m3(v)
    if not IN_ORDER:  # key 8 h + 2 c + b of each 16 goes to 4 c + 2 h + b
        v8 = tl.reshape(tl.permute(tl.reshape(v8, (BN // 16, 2, 4, 2, D)), (0, 2, 1, 3, 4)), (BN, D))
    v8 = tl.trans(v8)
    tl.store(p_v8 + (o_pair * D + d.to(tl.int64)[:, None] * (blocks * BN)) + t[None], v8)
    at = p_scales + (i_pair * blocks + i_block) * 2
    tl.store(at, k_scale)
    tl.store(at + 1, tl.log2(v_scale))


@triton.jit
@no_type_check
def _places(p_table, t, i_sample, kv_start, last, table_sample, PAGE: tl.constexpr):
    """Where a sample's valid keys `t` lie, int64: the sample and their position in it, or page and place."""
    key = (kv_start + t).to(tl.int64)
    batch = i_sample.to(tl.int64)
    if PAGE > 0:
        batch, key = _in_pages(p_table + batch * table_sample, key, t <= last, 0, PAGE)
        batch = batch.to(tl.int64)
    return batch, key


@triton.jit
@no_type_check
def _rows(p_head, batch, key, inside, of_batch, of_token, D: tl.constexpr):
    """Keys or values of a head at `_places`, fp32 (n, D); zeros where not `inside`."""
    at = p_head + (batch * of_batch + key * of_token) * 8
    return tl.load(at[:, None] + tl.arange(0, D)[None], mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _scaled(x):
    """x over its scale, which brings the largest finite number to LARGEST, and the scale."""
    size = tl.abs(x)
    finite = size < float("inf")
    scale = tl.maximum(tl.max(tl.max(tl.where(finite, size, 0.0), 1), 0), SMALLEST) / LARGEST
    return tl.where(finite, x * (1.0 / scale), float("nan")), scale


@triton.jit
@no_type_check
def _to_e4m3(x):
    """float32 of up to LARGEST in e4m3, to the nearest."""
    if INTERPRETED:
        # Triton's interpreter loses a carry into the exponent (3.9: 1.95 becomes 1) and cuts the smallest numbers off.
        # So x is rounded first, to what is then converted exactly: its sum with `magic` keeps three bits of it.
        exponent = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
        magic = ((exponent + (20 << 23)) | 0x400000).to(tl.float32, bitcast=True)
        x = (x + magic) - magic
    return x.to(tl.float8e4nv)


@triton.jit
@no_type_check
def _rounded_rows(x):
    """x (rows, D) over its rows' scales in e4m3, and the scales, which bring a row's largest number to LARGEST."""
    x = x.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), 1), SMALLEST)
    return _to_e4m3(x * (1.0 / largest * LARGEST)[:, None]), largest / LARGEST


@triton.jit
@no_type_check
def _scales_of(p_scales, pos):
    """(factor of K, log2 of V's) of the keys from `pos` on."""
    at = p_scales + pos // BLOCK * 2
    return tl.load(at), tl.load(at + 1)


@triton.jit
@no_type_check
def _softmax_step_e4m3(b_s, b_v, m, norm, acc, factor, v_log, SUMMED: tl.constexpr):
    """`_softmax_step` with weights in e4m3: `factor` (BM,) makes b_s powers of 2, b_v (DP, BN) is V in order, of scale
    2^v_log. norm and acc are 2^HEADROOM times as large.

    A tile's sum is added to `acc` in float32: tensor cores keep 13 bits behind the point (sm_90: measured; sm_89:
    SageAttention2, arXiv 2411.10958). SUMMED says so to Triton, which would sum in them where it is 0.
    """
    m_new = tl.maximum(m, tl.max(b_s, 1) * factor + v_log)
    b_p = tl.math.exp2(b_s * factor[:, None] + (v_log + HEADROOM - m_new)[:, None])
    alpha = tl.math.exp2(m - m_new)
    norm = norm * alpha + tl.sum(b_p, 1) * tl.math.exp2(-v_log)
    acc = acc * alpha[:, None] + tl.dot(_to_e4m3(b_p), b_v.T, max_num_imprecise_acc=SUMMED)
    return m_new, norm, acc
