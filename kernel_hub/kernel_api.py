"""Block-sparse attention for the prefill of language models: the query-key tiles of a plan, and nothing else.

A plan is made once for a call's lengths, on the host, and shared by all layers and heads; `attend` runs it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.call.caches import clear_caches, per_geometry
from sparsekit.call.geometry import Geometry, whole
from sparsekit.call.tensors import check_fits, check_tensors
from sparsekit.errors import SparsekitError, shown
from sparsekit.kernels import attend, geometry_for
from sparsekit.plan import BlockPlan, TokenRule, dense_plan, plan_from_block_mask, plan_from_rule

__all__ = [
    "BlockPlan",
    "Geometry",
    "SparsekitError",
    "TokenRule",
    "attend",
    "clear_caches",
    "dense_plan",
    "geometry_for",
    "plan_from_block_mask",
    "plan_from_rule",
    "triangle_plan",
]


def triangle_plan(
    q: Tensor,
    k: Tensor,
    *,
    sink_tokens: int = 8,
    window_tokens: int = 512,
    last_tokens: int = 128,
    geometry: Geometry | None = None,
) -> BlockPlan:
    """The plan of sinks, a window and dense last rows: of TriangleMix's deep layers (arXiv 2507.21526, 3.1).

    Query i keeps key j <= i iff `j < sink_tokens or i - j < window_tokens or i >= prompt - last_tokens`. With
    `last_tokens=0` it is StreamingLLM's (arXiv 2309.17453). Plans are kept: a second call costs microseconds.

    Args:
        q: (B, H, Q, D).
        k: (B, G, K, D).
        sink_tokens: first keys that every query keeps, 0 or more.
        window_tokens: nearest keys that a query keeps, itself included, 1 or more.
        last_tokens: last rows of the prompt that keep every key, 0 or more.
        geometry: where queries and keys sit, for padded batches and chunks; default `geometry_for(q, k)`.

    Raises:
        SparsekitError: no such tensors, a field outside its range, or a geometry of other lengths.
    """
    check_tensors(q, k)
    if geometry is None:
        geometry = geometry_for(q, k)
    check_fits(q, k, geometry, "geometry")
    fields = ("sink_tokens", sink_tokens, 0), ("window_tokens", window_tokens, 1), ("last_tokens", last_tokens, 0)
    for name, value, least in fields:
        try:
            fits = whole(value) >= least
        except TypeError:
            fits = False
        if not fits:
            raise SparsekitError(f"{name}={shown(value)}: a whole number of tokens, {least} or more.")
    return _triangle(whole(sink_tokens), whole(window_tokens), whole(last_tokens), geometry, q.device)


@per_geometry
def _triangle(sink: int, window: int, last: int, geometry: Geometry, device: torch.device) -> BlockPlan:
    rules = [TokenRule(sink, window, max(span.prompt_tokens - last, 0)) for span in geometry.spans]
    return plan_from_rule(rules, geometry, device)
