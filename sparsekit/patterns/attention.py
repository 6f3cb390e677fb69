"""attention(q, k, v, pattern): plan, then attend. And the plan of a layer whose heads run different patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.call.tensors import check_fits, check_tensors
from sparsekit.kernels import attend, geometry_for, narrow_tile, preferred_tile, softmax_of
from sparsekit.patterns import Pattern, StaticPattern, parse_pattern, static_plan
from sparsekit.patterns.base import checked_plan
from sparsekit.patterns.crossover import Place
from sparsekit.patterns.fields import has_auto
from sparsekit.plan import BlockPlan, stack_heads

__all__ = ["attention", "plan_heads", "static_plan_heads", "tiled_for"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | str | Mapping[str, Any],
    *,
    geometry: Geometry | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    impl: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of q (B, H, Q, D) over k, v (B, G, K, D) under a pattern.

    `pattern` is a Pattern, a name, or a mapping as in YAML; its `dense_below_tokens: auto` is what a table says for q
    and k. Without `geometry` the queries are the last Q of the K keys, and the prompt ends with them. The rest is
    `sparsekit.kernels.attend`'s, results and errors too.

    >>> import torch, sparsekit
    >>> q, k, v = torch.randn(1, 4, 1000, 64), torch.randn(1, 2, 1000, 64), torch.randn(1, 2, 1000, 64)
    >>> sparsekit.attention(q, k, v, {"name": "triangle", "window_tokens": 128}).shape
    torch.Size([1, 4, 1000, 64])
    """
    pattern = parse_pattern(pattern)
    softmax = softmax_of(q, k, v, scale, softcap, sink_logits)
    check_tensors(q, k, v, sink_logits)
    if has_auto(pattern):
        pattern = pattern.settled(Place.of(q, k))
    if geometry is None:
        geometry = tiled_for(pattern, geometry_for(q, k), q)
    check_fits(q, k, geometry, "geometry")
    plan = checked_plan(pattern, pattern.plan(q, k, geometry, softmax), geometry)
    return attend(
        q, k, v, plan,
        scale=softmax.scale, softcap=softcap, sink_logits=sink_logits, impl=impl, return_lse=return_lse,
    )  # fmt: skip


def tiled_for(pattern: Pattern, geometry: Geometry, q: Tensor, impl: str | None = None) -> Geometry:
    """The geometry in the tile of a pattern that is alone in its layer: narrower rows than the device's, if it asks.

    impl: what will run the plan; default what the device prefers.
    """
    if pattern.narrow and (geometry.block_q, geometry.block_kv) == preferred_tile(q.device, impl):
        return geometry.with_tile(*narrow_tile(q, impl))
    return geometry


def plan_heads(
    patterns: Sequence[Pattern],
    pattern_of_head: Sequence[int],
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    softmax: Softmax,
    impl: str | None = None,
) -> BlockPlan:
    """The plan of a layer in which query head h runs `patterns[pattern_of_head[h]]`; cached where all are static.

    impl: what will run it, as for `tiled_for`.
    """
    if len(patterns) == 1:
        own = tiled_for(patterns[0], geometry, q, impl)
        return checked_plan(patterns[0], patterns[0].plan(q, k, own, softmax), own)
    static = tuple(pattern for pattern in patterns if isinstance(pattern, StaticPattern))
    if len(static) == len(patterns):
        return static_plan_heads(static, tuple(pattern_of_head), geometry, q.device)
    plans = [checked_plan(pattern, pattern.plan(q, k, geometry, softmax), geometry) for pattern in patterns]
    return stack_heads(plans, pattern_of_head)


@per_geometry
def static_plan_heads(
    patterns: tuple[StaticPattern, ...], pattern_of_head: tuple[int, ...], geometry: Geometry, device: torch.device
) -> BlockPlan:
    """`plan_heads` for static patterns, which need no q and k."""
    plans = [static_plan(pattern, geometry, device).corrected(pattern.correct_every) for pattern in patterns]
    return stack_heads(plans, pattern_of_head)
