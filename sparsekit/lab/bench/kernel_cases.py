"""What `sparsekit bench kernel` runs: shapes, inputs, plans of the cases, and what is right."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.plan import CAUSAL, BlockPlan, TokenRule, dense_plan, pack, plan_from_rule, stack_heads, unpack

__all__ = ["COLUMNS", "LAST", "PLANS", "SINK", "WINDOW", "Shape", "errors", "flops", "inputs", "plan_of"]

PLANS = ("dense", "window", "triangle", "mixed", "mixed-groups", "random", "columns")
SINK, WINDOW, LAST = 8, 512, 128  # Triangle as TriangleMix publishes it; the window alone is of as many tokens
RANDOM_DENSITY = 0.1
COLUMNS = 1024
DENSE_EVERY = 4  # of the mixed cases: one head, or all heads of one key head, of so many is dense, the others Triangle


@dataclass(frozen=True)
class Shape:
    """One attention call. `heads` over `key_heads` of size `dim`."""

    tokens: int
    heads: int
    key_heads: int
    dim: int
    dtype: torch.dtype
    device: str = "cuda"


def inputs(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q (1, H, N, D), k, v (1, G, N, D) as transformers hands them over: (1, N, heads, D) in memory."""
    g = torch.Generator(shape.device).manual_seed(seed)

    def one(count: int) -> Tensor:
        full = (1, shape.tokens, count, shape.dim)
        return torch.randn(full, device=shape.device, dtype=shape.dtype, generator=g).transpose(1, 2)

    return one(shape.heads), one(shape.key_heads), one(shape.key_heads)


def plan_of(case: str, shape: Shape, tile: tuple[int, int]) -> BlockPlan:
    """The plan of a case out of `PLANS`, in tiles of (queries, keys). Other tiles keep the same pairs."""
    geometry = Geometry.of(shape.tokens, block_q=tile[0], block_kv=tile[1])
    if case == "dense":
        return dense_plan(geometry)
    if case == "window":
        return plan_from_rule(TokenRule(0, WINDOW, shape.tokens), geometry, shape.device)
    if case == "random":
        return _random_plan(geometry, shape.heads, shape.device)
    triangle = plan_from_rule(TokenRule(SINK, WINDOW, shape.tokens - LAST), geometry, shape.device)
    if case in ("mixed", "mixed-groups"):
        return stack_heads([triangle, dense_plan(geometry).to(shape.device)], _dense_heads(case, shape))
    return triangle if case == "triangle" else _with_columns(triangle, shape.heads, shape.device)


def _dense_heads(case: str, shape: Shape) -> tuple[int, ...]:
    """1 of each dense head, 0 of the others: a quarter of the heads, scattered over key heads or in whole groups."""
    group = 1 if case == "mixed" else shape.heads // shape.key_heads
    return tuple(int(head // group % DENSE_EVERY == 0) for head in range(shape.heads))


def _random_plan(geometry: Geometry, heads: int, device: str) -> BlockPlan:
    """Other tiles for every head: a tenth of the causal tiles of 128 keys, the diagonal's included."""
    rows, parts = geometry.rows, 128 // min(geometry.block_kv, 128)
    g = torch.Generator(device).manual_seed(0)
    score = torch.rand(heads, rows, rows, device=device, generator=g)
    at = torch.arange(rows, device=device)
    score.masked_fill_(at > at[:, None], -1).diagonal(dim1=1, dim2=2).fill_(2)
    keep = ((at + 1) * RANDOM_DENSITY).long().clamp(min=1)
    rank = score.argsort(-1, descending=True).argsort(-1)
    mask = (rank < keep[None, :, None]).repeat_interleave(parts, -1)
    column = torch.arange(mask.shape[-1], device=device) * geometry.block_kv
    start = at[:, None] * geometry.block_q
    flags = (column + geometry.block_kv - 1 > start) * CAUSAL
    counts = mask.sum(-1).flatten()
    ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    entries = pack(column, flags).int().expand_as(mask)[mask]
    order = torch.argsort(counts.view(heads, rows).sum(0), descending=True, stable=True).int()
    return BlockPlan(geometry, heads=heads, row_ptr=ptr, entries=entries, order=order, on_grid=True)


def _with_columns(plan: BlockPlan, heads: int, device: str) -> BlockPlan:
    """A plan shared by all heads, and 1024 columns a head; bits off where a tile holds the column, or it is ahead.

    Triangle's listed rows hold the sink tile and the window's tiles.
    """
    g = plan.geometry
    assert plan.row_ptr is not None and plan.entries is not None and plan.dense_rows is not None
    assert plan.rule is not None and plan.order is not None
    tokens = torch.stack([torch.randperm(g.kv_len, device=device)[:COLUMNS].sort().values for _ in range(heads)])
    end = (torch.arange(plan.rows, device=device) + 1) * g.block_q
    low = plan.entries.new_full((plan.rows,), g.kv_len, dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(plan.rows, device=device), plan.row_ptr.diff().long())
    key = unpack(plan.entries)[0].long()
    low.scatter_reduce_(0, owner, torch.where(key >= SINK, key, g.kv_len), "amin")
    held = (tokens[:, None] < g.block_kv) | (tokens[:, None] >= low[:, None]) | plan.dense_rows[:, None]
    needed = ~held & (tokens[:, None] < end[:, None])
    bits = (needed.unflatten(-1, (-1, 32)).long() << torch.arange(32, device=device)).sum(-1).int()
    counts = plan.row_ptr.diff().repeat(heads)
    return replace(
        plan,
        heads=heads,
        row_ptr=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
        entries=plan.entries.repeat(heads),
        dense_rows=plan.dense_rows.repeat(heads),
        tokens=tokens.int()[None],
        token_bits=bits.flatten(0, 1),
    )


def flops(plan: BlockPlan, shape: Shape) -> float:
    """Multiplications and additions counted for a rate: `2 N^2 D H` for dense, `4 BM BN D` a visited tile."""
    if plan.all_dense:
        return 2.0 * shape.tokens**2 * shape.dim * shape.heads
    tile = plan.geometry.block_q * plan.geometry.block_kv * 4.0 * shape.dim
    return plan.visited_tiles() * shape.heads / plan.heads * tile


def errors(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, got: Tensor) -> tuple[float, float]:
    """Relative errors of `got`, and of SDPA in the same dtype under the same mask, against float32, on four heads."""
    group = q.shape[1] // k.shape[1]
    mask = plan.to_mask().to(q.device)
    found, plain, norm = 0.0, 0.0, 0.0
    for head in range(0, q.shape[1], max(q.shape[1] // 4, 1)):
        one = mask[0, head * plan.heads // q.shape[1]]
        qh, kh, vh = q[:, head, None], k[:, head // group, None], v[:, head // group, None]
        scores = (qh.float() @ kh.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
        exact = scores.masked_fill(~one, float("-inf")).softmax(-1) @ vh.float()
        low = torch.nn.functional.scaled_dot_product_attention(qh, kh, vh, attn_mask=one)
        found += float((got[:, head, None].float() - exact).square().sum())
        plain += float((low.float() - exact).square().sum())
        norm += float(exact.square().sum())
    return (found / norm) ** 0.5, (plain / norm) ** 0.5
