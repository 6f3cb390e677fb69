"""Plans and options that every kernel must run, and the one comparison by which it is judged; for CPU and GPU tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend
from sparsekit.plan import (
    CAUSAL,
    RULE,
    BlockPlan,
    TokenRule,
    dense_plan,
    pack,
    plan_from_block_mask,
    plan_from_rule,
    row_bounds,
    stack_heads,
)

TRIANGLE, A_SHAPE = "triangle", "a_shape"


def rule_plan(kind: str, geometry: Geometry, window: int = 40) -> BlockPlan:
    """dense, a_shape or triangle with 5 sinks, `window` keys and 20 last rows, as those patterns make it."""
    if kind == "dense":
        return dense_plan(geometry)
    last = 20 if kind == TRIANGLE else 0
    return plan_from_rule([TokenRule(5, window, max(s.prompt_tokens - last, 0)) for s in geometry.spans], geometry)


def unaligned_plan(geometry: Geometry, heads: int, step: int = 37) -> BlockPlan:
    """Tiles that start anywhere: the keys of a row from a random one on. One sample."""
    assert geometry.batch == 1
    g, span, rows = torch.Generator().manual_seed(step), geometry.spans[0], []
    for _ in range(heads):
        for r in range(geometry.rows):
            start = (span.q_first // geometry.block_q + r) * geometry.block_q
            low, high = max(start, span.q_first), min(start + geometry.block_q, span.q_end) - 1
            first = int(torch.randint(0, max(low - step, 0) + 1, (), generator=g))
            tiles = range(first, high + 1, geometry.block_kv)
            rows.append([pack(key, CAUSAL if key + geometry.block_kv - 1 > low else 0) for key in tiles])
    ptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
    entries = torch.tensor([entry for row in rows for entry in row], dtype=torch.int32)
    return BlockPlan(geometry, heads=heads, row_ptr=ptr, entries=entries)


def random_plan(geometry: Geometry, heads: int, density: float = 0.3) -> BlockPlan:
    """Whole tiles at random and the diagonal, other ones for every head and sample."""
    samples = 1 if geometry.uniform else geometry.batch
    columns = -(-max(span.q_end for span in geometry.spans) // geometry.block_kv)
    g = torch.Generator().manual_seed(heads)
    mask = torch.rand(samples, heads, geometry.rows, columns, generator=g) < density
    starts = BlockPlan(geometry, samples=samples).row_starts()
    key = torch.arange(columns) * geometry.block_kv
    own = (key + geometry.block_kv > starts[..., None]) & (key < starts[..., None] + geometry.block_q)
    return plan_from_block_mask(mask | own[:, None], geometry)


def loose_plan(mask: Tensor, geometry: Geometry) -> BlockPlan:
    """The tiles of a mask (S, P, R, C) as they are, unchecked: rows without tiles, and queries without keys."""
    samples, heads = mask.shape[:2]
    low, end, _, _ = (x[:, None, :, None] for x in row_bounds(geometry, samples, torch.device("cpu")))
    key = torch.arange(mask.shape[3]) * geometry.block_kv
    kept = mask & (key < end) & (low < end)
    entries = pack(key, (key + geometry.block_kv - 1 > low).long() * CAUSAL).expand_as(kept)[kept].int()
    ptr = torch.nn.functional.pad(kept.sum(-1).flatten().cumsum(0), (1, 0)).int()
    return BlockPlan(geometry, samples=samples, heads=heads, row_ptr=ptr, entries=entries)


def loose_plans(geometry: Geometry) -> dict[str, BlockPlan]:
    """Made by hand: rows without entries, queries whose tiles keep nothing, rows with columns alone."""
    rows = geometry.rows
    ptr = torch.tensor([0, *(1 if r in (0, 1, 3) else 0 for r in range(rows))]).cumsum(0).int()
    entries = torch.tensor([pack(0, CAUSAL), pack(0, RULE), pack(192, CAUSAL)], dtype=torch.int32)
    rule = torch.tensor([[[3, 70, 10**6]]], dtype=torch.int32)
    none = torch.tensor([[[0, 0, 10**6]]], dtype=torch.int32)
    dense = torch.zeros(rows, dtype=torch.bool)
    dense[4] = True
    words = torch.zeros(rows, 1, dtype=torch.int32)
    words[2] = 0b10
    tokens = torch.tensor([[[5, 140]]], dtype=torch.int32)
    return {
        "rows without entries": BlockPlan(geometry, row_ptr=ptr, entries=entries, rule=rule),
        "a rule that keeps nothing": BlockPlan(geometry, row_ptr=ptr, entries=entries, rule=none),
        "dense rows too": BlockPlan(geometry, row_ptr=ptr, entries=entries, rule=none, dense_rows=dense),
        "columns that come late": BlockPlan(
            geometry, row_ptr=ptr, entries=entries, rule=rule, tokens=tokens, token_bits=words
        ),
        "no entry at all": BlockPlan(geometry, row_ptr=torch.zeros_like(ptr), entries=entries[:0]),
        "each head": BlockPlan(
            geometry, heads=2, row_ptr=torch.cat([ptr, ptr[1:] * 0 + 3]), entries=entries, rule=rule
        ),
    }


def with_columns(plan: BlockPlan, count: int) -> BlockPlan:
    """The plan and `count` single key columns a head; bits off where a tile of the row holds the column."""
    span, g = plan.spans()[0], torch.Generator().manual_seed(count)
    assert plan.samples == 1
    tokens = torch.full((1, plan.heads, count), 2**31 - 1, dtype=torch.int32)
    for head in range(plan.heads):
        some = torch.randperm(span.q_end, generator=g)[: count - head].sort().values
        tokens[0, head, : len(some)] = some.int()
    taken = plan.multiplicity()[0] > 0  # (P, Q, K)
    needed = torch.zeros(plan.heads, plan.rows, -(-count // 32) * 32, dtype=torch.int64)
    for head in range(plan.heads):
        for r, start in enumerate(plan.row_starts()[0].tolist()):
            q0, q1 = max(start, span.q_first), min(start + plan.block_q, span.q_end)
            at = slice(plan.geometry.q_index(0, q0), plan.geometry.q_index(0, q1))
            for t, token in enumerate(tokens[0, head].tolist()):
                # A tile's keys beyond the diagonal count as held: the tile brings the column for the rows that see it.
                if token < q1 and not bool(taken[head, at, plan.geometry.kv_start[0] + token].any()):
                    needed[head, r, t] = 1
    words = (needed.unflatten(-1, (-1, 32)) << torch.arange(32)).sum(-1)
    return replace(plan, tokens=tokens, token_bits=words.to(torch.int32).flatten(0, 1))


def tensors(
    geometry: Geometry, dtype: torch.dtype, *, heads: int = 4, key_heads: int = 2, dim: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, heads, Q, dim), k and v (B, key_heads, K, dim), laid out (B, tokens, heads, dim)."""
    g = torch.Generator().manual_seed(seed)

    def one(tokens: int, count: int) -> Tensor:
        return torch.randn(geometry.batch, tokens, count, dim, generator=g).to(dtype).transpose(1, 2)

    return one(geometry.q_len, heads), one(geometry.kv_len, key_heads), one(geometry.kv_len, key_heads)


def in_pages(k: Tensor, v: Tensor, geometry: Geometry, page: int, *, heads_first: bool = False, spare: int = 3) -> Keys:
    """The valid keys of k, v (B, G, K, D) in shuffled pages of one cache, a token's key beside its value.

    All else in the pages is NaN, and table entries behind a sample's last page are addresses of nothing. heads_first:
    of a page the heads lie behind each other in memory, else the tokens.
    """
    batch, heads, tokens, dim = k.shape
    used = [-(-end // page) for end in geometry.kv_end]
    count = sum(used) + spare
    free = torch.randperm(count, generator=torch.Generator().manual_seed(page)).to(k.device)
    table = torch.full((batch, -(-tokens // page) + 1), 2**30, dtype=torch.int32, device=k.device)
    shape = (count, heads, page, 2 * dim) if heads_first else (count, page, heads, 2 * dim)
    cache = k.new_full(shape, float("nan"))
    pages = cache if heads_first else cache.transpose(1, 2)
    both = torch.cat([k, v], -1)
    for b, (end, n) in enumerate(zip(geometry.kv_end, used, strict=True)):
        table[b, :n], free = free[:n].int(), free[n:]
        for i in range(n):
            some = both[b, :, i * page : min((i + 1) * page, end)]
            pages[table[b, i], :, : some.shape[1]] = some
    return Keys(*pages.split(dim, -1), table)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN inside, so that an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert bool(torch.empty(1).isnan())
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def plain(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax) -> Tensor:
    """Attention as a low-precision kernel has it: float32 logits, weights rounded to the dtype before they meet v."""
    mask = plan.to_mask().to(q.device)
    mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
    group = q.shape[1] // k.shape[1]
    scores = q.float() @ k.float().repeat_interleave(group, 1).transpose(-1, -2) * softmax.scale
    if softmax.softcap is not None:
        scores = softmax.softcap * torch.tanh(scores / softmax.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    top = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if softmax.sink_logits is not None:
        total = total + torch.exp(softmax.sink_logits.float()[None, :, None, None] - top)
    out = weights.to(q.dtype).float() @ v.float().repeat_interleave(group, 1) / total.clamp(min=1e-30)
    return out.to(q.dtype)


def check(
    plan: BlockPlan,
    inputs: tuple[Tensor, Tensor, Tensor],
    impl: str,
    *,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    scale: float | None = None,
    twice: bool = False,
    page: int = 0,
) -> None:
    """`impl` is as close to float64 as twice plain low-precision attention is; `twice`: also without lse, into rows of
    a larger tensor; `page`: over keys in pages."""
    q, k, v = inputs
    device, dtype = q.device, q.dtype
    wide = [x.cpu().double() for x in inputs]
    plan_there = plan if device.type == "cpu" else plan.to(device)
    softmax = Softmax(q.shape[-1] ** -0.5 if scale is None else scale, softcap, sink_logits)
    sinks = None if sink_logits is None else sink_logits.cpu().double()
    expected = attend(*wide, plan, impl="reference", return_lse=True, softcap=softcap, sink_logits=sinks, scale=scale)
    out_expected, lse_expected = expected
    budget = 2 * float((plain(q, k, v, plan, softmax).cpu().double() - out_expected).abs().max()) + 2e-6
    options = {"softcap": softcap, "sink_logits": sink_logits, "scale": scale}
    if page:
        k, v, options["table"] = in_pages(k, v, plan.geometry, page, heads_first=page % 32 == 0)
    with poisoned_memory():
        out, lse = attend(q, k, v, plan_there, impl=impl, return_lse=True, **options)
        alone = within_rows(q, k, v, plan_there, impl, **options) if twice else out
    for name, got in (("out", out), ("out without lse", alone)):
        assert got.dtype == dtype
        assert got.shape == q.shape
        error = float((got.cpu().double() - out_expected).abs().max())
        assert error <= budget, f"{name}: error {error:.1e}, plain attention in {dtype} allows {budget:.1e}"
    lse, seen = lse.cpu(), lse_expected.isfinite()
    assert torch.equal(seen, lse.isfinite())
    assert bool((lse[~seen] == float("-inf")).all())
    assert bool((out.cpu()[~seen] == 0).all())
    # Logits are float32 sums of D exact products: a few units in the last place of the largest.
    close = 1e-5 * (1 + lse_expected[seen].abs().max()) if seen.any() else 1
    assert seen.sum() == 0 or float((lse[seen].double() - lse_expected[seen]).abs().max()) < close


def within_rows(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, impl: str, **options: Any) -> Any:
    """`attend(out=)` into some rows of a tensor (B, tokens, H, D), as an engine's output is; the others keep what they
    hold. Of a batch the samples lie behind each other."""
    batch, heads, tokens, dim = q.shape
    memory = q.new_full((batch * tokens + 5, heads, dim), 7)
    place = memory[2:-3].unflatten(0, (batch, tokens)).transpose(1, 2)
    place.fill_(float("nan"))
    got: Any = attend(q, k, v, plan, impl=impl, out=place, **options)
    assert (got[0] if isinstance(got, tuple) else got) is place
    assert bool((memory[:2] == 7).all() and (memory[-3:] == 7).all())
    return got


GEOMETRIES = {
    "one": Geometry.of(1, block_q=64, block_kv=64),
    "63": Geometry.of(63, block_q=64, block_kv=64),
    "65": Geometry.of(65, block_q=64, block_kv=64),
    "300": Geometry.of(300, block_q=128, block_kv=64),
    "300 of 64 by 32": Geometry.of(300, block_q=64, block_kv=32),
    "tile of 256 by 128": Geometry.of(300, block_q=256, block_kv=128),
    "tile of 16": Geometry.of(40, block_q=16, block_kv=16),
    "chunk": Geometry.of(100, 300, block_q=64, block_kv=64),
    "chunk of a static cache": Geometry.of(65, 400, q_offset=150, block_q=64, block_kv=64),
    "left padding": Geometry.of(150, batch=3, kv_start=(0, 37, 120), block_q=64, block_kv=64),
    "right padding": Geometry.of(150, batch=3, kv_end=(150, 37, 120), block_q=64, block_kv=64),
    "all padding": Geometry.of(100, batch=2, kv_start=(0, 0), kv_end=(0, 100), block_q=64, block_kv=64),
    "padded chunk": Geometry.of(100, 300, batch=2, kv_start=(250, 0), block_q=64, block_kv=64),
    "batch": Geometry.of(130, batch=2, block_q=64, block_kv=64),
}


def mixed_plan(geometry: Geometry) -> BlockPlan:
    """Four query heads with plans of their own: dense, a window, a triangle, random tiles."""
    parts = [rule_plan("dense", geometry), rule_plan(A_SHAPE, geometry, 9), rule_plan(TRIANGLE, geometry)]
    return stack_heads([*parts, random_plan(geometry, 1)], [1, 0, 2, 3])
