"""Ranked plans, and the comparison by which every way of executing them is judged; for CPU and GPU tests."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from kernel_cases import plain, poisoned_memory, tensors, within_rows
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend
from sparsekit.patterns import S2O
from sparsekit.plan import BlockPlan, segment_bounds

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
GEOMETRIES = {
    "one key past a segment": Geometry.of(65, block_q=64),
    "two segments": Geometry.of(128, block_q=64),
    "300": Geometry.of(300, block_q=128),
    "tile of 32": Geometry.of(300, block_q=32),
    "chunk": Geometry.of(100, 300, block_q=64),
    "chunk of a static cache": Geometry.of(65, 400, q_offset=150, block_q=64),
    "left padding": Geometry.of(200, batch=3, kv_start=(0, 37, 170), block_q=64),
    "right padding": Geometry.of(200, batch=3, kv_end=(200, 37, 131), block_q=64),
    "all padding": Geometry.of(150, batch=2, kv_start=(0, 0), kv_end=(0, 150), block_q=64),
    "padded chunk": Geometry.of(100, 400, batch=2, kv_start=(350, 0), block_q=64),
}
PATTERNS = {
    "stops": S2O(segment_tokens=64, tau=0.1),
    "odd segments": S2O(segment_tokens=100, tau=0.15, max_tokens=700, guide="mean"),
    "patient": S2O(segment_tokens=80, tau=0.15, patience=2, guide="last"),
    "everything": S2O(segment_tokens=64, tau=0.0, max_tokens=None),
}

# name -> call, pattern, (heads, key heads). Segments of 96 or 128 tokens, and parts of them of 24 or 48, so that
# the means of `whole` queries are exact.
_CAPPED = S2O(segment_tokens=96, max_tokens=60)
SELECTIONS = {
    "whole": (Geometry.of(408, block_q=64), _CAPPED, (4, 2)),
    "three heads a key head": (Geometry.of(240, block_q=64), _CAPPED, (6, 2)),
    "a key head a head": (Geometry.of(240, block_q=64), _CAPPED, (3, 3)),
    "tile of 32": (Geometry.of(312, block_q=32), _CAPPED, (2, 1)),
    "all of it": (Geometry.of(240, block_q=64), S2O(segment_tokens=96, max_tokens=None), (2, 1)),
    "chunk": (Geometry.of(264, 600, block_q=64), _CAPPED, (2, 1)),
    "left padding": (Geometry.of(408, batch=2, kv_start=(0, 72), block_q=64), _CAPPED, (2, 1)),
    "right padding": (Geometry.of(336, batch=3, kv_end=(336, 48, 240), block_q=64), _CAPPED, (2, 1)),
    "all padding": (Geometry.of(240, batch=2, kv_end=(0, 240), block_q=64), _CAPPED, (2, 1)),
    "padded chunk": (Geometry.of(120, 480, batch=2, kv_start=(432, 0), block_q=64), _CAPPED, (2, 1)),
    "words of 32 scores": (Geometry.of(1152, block_q=64), S2O(segment_tokens=1024, max_tokens=500), (1, 1)),
    "rows of two chunks": (Geometry.of(2176, block_q=64), S2O(segment_tokens=2048, max_tokens=128), (1, 1)),
    "one more than a segment": (Geometry.of(129, block_q=64), S2O(segment_tokens=128, max_tokens=1), (2, 1)),
}
# What a sample of a row's scores says that is not so.
MISLED = ("more are large", "fewer are large", "one value", "two values")


def whole(
    geometry: Geometry, dtype: torch.dtype = torch.float32, *, dim: int = 16, heads: int = 4, key_heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Small whole numbers, the queries' multiples of 3: sums are exact in any order, and scores have many equals."""
    g = torch.Generator().manual_seed(dim + heads)
    q = 3 * torch.randint(-3, 4, (geometry.batch, heads, geometry.q_len, dim), generator=g)
    k, v = torch.randint(-3, 4, (2, geometry.batch, key_heads, geometry.kv_len, dim), generator=g)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def misled(case: str, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """One head of `whole` numbers, two segments; the second's sampled scores, a few of `BLOCK` = 128, are far off."""
    q, k, v = whole(geometry, heads=1, key_heads=1)
    q[..., 0], k[..., 0] = 3, 0
    history = geometry.kv_len // 2 - 64
    lane = torch.arange(128)
    step = -(-history // 128)
    at = lane * step + ((lane * 40503) >> 4 & 4095) % step
    at = 64 + at[at < history]
    if case == "more are large":
        k[:, :, :, 0] = 100
        k[:, :, at, 0] = 0
    elif case == "fewer are large":
        k[:, :, at, 0] = 100
    elif case == "one value":
        k[:] = 1
    else:
        k[:] = 1
        k[:, :, 70::40] = 2
    return q, k, v


def peaked(
    geometry: Geometry, dtype: torch.dtype = torch.float32, *, dim: int = 16, heads: int = 4, key_heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v and one feature that all queries ask for and keys have more or less of: logits of deviation 2 that
    a mean query foretells, and of 1 that it does not. The best tiles of keys add much, most of them little."""
    q, k, v = tensors(geometry, dtype, heads=heads, key_heads=key_heads, dim=dim)
    q[..., 0] = dim**0.5
    k[..., 0] *= 2
    return q, k, v


def plan_of(pattern: S2O, inputs: tuple[Tensor, Tensor, Tensor], geometry: Geometry) -> BlockPlan:
    return pattern.select(inputs[0], inputs[1], geometry, Softmax(inputs[0].shape[-1] ** -0.5))


def unvisited(plan: BlockPlan, **changes: object) -> BlockPlan:
    """The plan before an execution; `changes` to what is ranked."""
    assert plan.ranked is not None
    return replace(plan, ranked=replace(plan.ranked, **changes))  # type: ignore[arg-type]


def shuffled(plan: BlockPlan, seed: int = 0) -> BlockPlan:
    """The plan with each segment's ranked keys in a random order."""
    assert plan.ranked is not None
    g, keys = torch.Generator().manual_seed(seed), plan.ranked.keys.clone()
    for b, ptr in enumerate(plan.ranked.key_ptr.tolist()):
        for first, last in pairwise(ptr):
            keys[b, :, first:last] = keys[b, :, first + torch.randperm(last - first, generator=g)]
    return unvisited(plan, keys=keys)


def check_ranked(
    plan: BlockPlan,
    inputs: tuple[Tensor, Tensor, Tensor],
    impl: str,
    *,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """`impl` visits what the definition visits in float64, and is as close to it as twice plain attention is.

    That no gain lies within rounding of tau is checked, not hoped for: the definition visits the same with tau a little
    larger and a little smaller.
    """
    if plan.ranked is None:
        assert plan.all_dense
        return
    q, k, v = inputs
    wide = [x.cpu().double() for x in inputs]
    exact = unvisited(plan.to("cpu"))
    assert exact.ranked is not None
    options = {"softcap": softcap, "scale": scale}
    sinks = None if sink_logits is None else sink_logits.cpu().double()
    for off in (-2e-5, 2e-5, 0.0):
        near = unvisited(exact, stop_tau=exact.ranked.stop_tau * (1 + off))
        out_expected, lse_expected = attend(
            *wide, near, impl="reference", return_lse=True, sink_logits=sinks, **options
        )
        assert near.visited is not None
        if off < 0:
            first = near.visited
        assert torch.equal(first, near.visited), "a gain lies at tau: take other inputs"
    softmax = Softmax(q.shape[-1] ** -0.5 if scale is None else scale, softcap, sink_logits)
    budget = 2 * float((plain(q, k, v, near, softmax).cpu().double() - out_expected).abs().max()) + 2e-6
    there = unvisited(plan.to(q.device))
    with poisoned_memory():
        run = attend if softcap is None else within_rows
        out, lse = run(q, k, v, there, impl=impl, return_lse=True, sink_logits=sink_logits, **options)
    assert there.visited is not None
    assert torch.equal(there.visited.cpu().clamp(min=0), first.clamp(min=0))
    assert there.kept_pairs() == near.kept_pairs() == int(near.multiplicity().sum())
    error = float((out.cpu().double() - out_expected).abs().max())
    assert error <= budget, f"error {error:.1e}, plain attention in {q.dtype} allows {budget:.1e}"
    assert out.dtype == q.dtype
    lse, seen = lse.cpu(), lse_expected.isfinite()
    assert torch.equal(seen, lse.isfinite())
    assert bool((lse[~seen] == float("-inf")).all())
    assert bool((out.cpu()[~seen] == 0).all())
    close = 1e-5 * (1 + lse_expected[seen].abs().max())
    assert float((lse[seen].double() - lse_expected[seen]).abs().max()) < close


def history_of(plan: BlockPlan, sample: int, head: int, segment: int) -> tuple[int, list[int]]:
    """A segment's first position, and its ranked keys."""
    assert plan.ranked is not None
    ptr = plan.ranked.key_ptr[sample].tolist()
    first = segment_bounds(plan.geometry, plan.samples, plan.ranked.segment_tokens, torch.device("cpu"))[0]
    return int(first[sample, segment]), plan.ranked.keys[sample, head, ptr[segment] : ptr[segment + 1]].tolist()
