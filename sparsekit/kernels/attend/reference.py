"""The definition: plan -> token mask -> softmax. Quadratic, readable, on any device; every kernel is judged by it."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from sparsekit.call.softmax import Softmax
from sparsekit.plan import BlockPlan, Ranked, segment_bounds
from sparsekit.plan.memo import VISITED
from sparsekit.plan.rows import nothing_visited

__all__ = ["attend_reference"]


def attend_reference(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Attention over exactly the pairs of `plan`, computed in float32 (float64 inputs: float64).

    A ranked plan is walked first, tile by tile, to find what its stopping rule lets it visit.

    Args:
        q: (B, H, Q, D). k, v: (B, G, K, D).

    Returns:
        out (B, H, Q, D) in q's dtype, and lse (B, H, Q), natural logarithm, sink logit included. A query without any
        key (padding) gives 0 and -inf.
    """
    heads, key_heads = q.shape[1], k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if plan.ranked is not None:
        plan.memo[VISITED] = _walk(q, k, plan, plan.ranked, softmax)
    mask = plan.to_mask().to(q.device)
    mask = mask.repeat_interleave(heads // mask.shape[1], 1)

    grouped = q.to(wide).unflatten(1, (key_heads, -1))  # (B, G, H/G, Q, D)
    dots = grouped @ k.to(wide)[:, :, None].mT
    scores = softmax.logits(dots.flatten(1, 2)).masked_fill(~mask, float("-inf"))

    seen = mask.any(-1)
    lse = softmax.join(scores.logsumexp(-1))
    weights = torch.exp(scores - lse.masked_fill(~seen, 0)[..., None])
    out = (weights.unflatten(1, (key_heads, -1)) @ v.to(wide)[:, :, None]).flatten(1, 2)
    return out.to(q.dtype), lse.masked_fill(~seen, float("-inf"))


def _walk(q: Tensor, k: Tensor, plan: BlockPlan, ranked: Ranked, softmax: Softmax) -> Tensor:
    """What is visited, int32 (S, P, n, T).

    The gain of a tile to a query is its share of the softmax denominator so far, itself and the sink logit included;
    the walk of a query tile ends after `patience` tiles with no gain of `stop_tau`.
    """
    wide, g = torch.float64 if q.dtype == torch.float64 else torch.float32, plan.geometry
    firsts = segment_bounds(g, plan.samples, ranked.segment_tokens, torch.device("cpu"))[0].tolist()
    group, block = q.shape[1] // k.shape[1], plan.block_kv
    visited = nothing_visited(plan, ranked)
    for b, head, at, t in product(*map(range, visited.shape)):
        q_pos = ranked.q_index[b, head, at].long()[t * plan.block_q : (t + 1) * plan.block_q]
        q_pos, first = q_pos[q_pos >= 0], firsts[b][at]
        keys = k[b, head // group, g.kv_start[b] : g.kv_start[b] + first + ranked.segment_tokens].to(wide)
        scores = softmax.logits(q[b, head, q_pos + g.q_index(b, 0)].to(wide) @ keys.T)
        k_pos = torch.arange(len(keys), device=q.device)
        own = (k_pos >= first) & (k_pos <= q_pos[:, None])
        start = scores.masked_fill(~(own | (k_pos < min(block, first))), float("-inf")).logsumexp(1)
        if softmax.sink_logits is not None:
            start = torch.logaddexp(start, softmax.sink_logits[head].to(wide))
        listed = ranked.keys[b, head, int(ranked.key_ptr[b, at]) : int(ranked.key_ptr[b, at + 1])].long()
        total, seen, quiet = start, 0, 0
        while seen * block < len(listed) and quiet < ranked.patience and len(q_pos):
            tile = scores[:, listed[seen * block : (seen + 1) * block]].logsumexp(1)
            total, seen = torch.logaddexp(total, tile), seen + 1
            quiet = quiet + 1 if bool(((tile - total).exp() < ranked.stop_tau).all()) else 0
        visited[b, head, at, t] = seen
    return visited
