"""The definition: plan -> token mask -> softmax. Quadratic, readable, on any device; every kernel is judged by it."""

from __future__ import annotations

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from sparsekit.kernels.softmax import Softmax
from sparsekit.plan import BlockPlan

__all__ = ["attend_reference"]


def attend_reference(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Attention over exactly the pairs of `plan`, computed in float32 (float64 inputs: float64).

    Args:
        q: (B, H, Q, D). k, v: (B, G, K, D).

    Returns:
        out (B, H, Q, D) in q's dtype, and lse (B, H, Q), natural logarithm, sink logit included. A query without any
        key (padding) gives 0 and -inf.
    """
    heads, key_heads = q.shape[1], k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    mask = plan.to_mask().to(q.device)
    mask = repeat(mask, "b p q k -> b (p r) q k", r=heads // mask.shape[1])

    grouped = rearrange(q.to(wide), "b (g r) q d -> b g r q d", g=key_heads)
    scores = einsum(grouped, k.to(wide), "b g r q d, b g k d -> b g r q k") * softmax.scale
    scores = rearrange(scores, "b g r q k -> b (g r) q k")
    if softmax.softcap is not None:
        scores = softmax.softcap * torch.tanh(scores / softmax.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))

    seen = mask.any(-1)
    lse = scores.logsumexp(-1)
    if softmax.sink_logits is not None:
        lse = torch.logaddexp(lse, softmax.sink_logits.to(wide)[None, :, None])
    weights = torch.exp(scores - lse.masked_fill(~seen, 0)[..., None])
    weights = rearrange(weights, "b (g r) q k -> b g r q k", g=key_heads)
    out = einsum(weights, v.to(wide), "b g r q k, b g k d -> b g r q d")
    out = rearrange(out, "b g r q d -> b (g r) q d")
    return out.to(q.dtype), lse.masked_fill(~seen, float("-inf"))
