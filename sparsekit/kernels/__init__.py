"""The one door to attention over a plan: `attend` checks, chooses an implementation, and never falls back silently."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError, nearest
from sparsekit.geometry import Geometry
from sparsekit.kernels.reference import attend_reference
from sparsekit.kernels.softmax import Softmax
from sparsekit.kernels.torch_blocks import attend_torch
from sparsekit.plan import BlockPlan

__all__ = ["IMPLEMENTATIONS", "Softmax", "attend", "choose", "preferred_tile"]

IMPLEMENTATIONS = ("torch", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    impl: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the query-key pairs of `plan`. Forward only.

    Args:
        q: (B, H, Q, D) float32, float16, bfloat16 (float64 on `torch` and `reference`).
        k, v: (B, G, K, D), H a multiple of G; never repeated in memory.
        plan: made for these lengths; 1, G or H plan heads.
        scale: factor on q.k, default `1 / sqrt(D)`.
        softcap: `softcap * tanh(z / softcap)` on the scaled logits.
        sink_logits: (H,) a learned logit per head that joins the softmax with value 0.
        impl: `None` (the best for the device), "torch" or "reference".
        return_lse: also return the logarithm of the softmax denominator.

    Returns:
        out (B, H, Q, D) in q's dtype; with `return_lse` also lse (B, H, Q) float32, natural logarithm, sink logit included.
        Padding queries give 0 and -inf.

    Raises:
        SparsekitError: shapes, dtypes, devices or a plan that do not fit together, or gradients asked for.
    """
    _check(q, k, v, plan, sink_logits)
    softmax = Softmax(1 / math.sqrt(q.shape[-1]) if scale is None else scale, softcap, sink_logits)
    if choose(q.device, impl) == "reference":
        out, lse = attend_reference(q, k, v, plan, softmax)
        return (out, lse) if return_lse else out
    out, maybe = attend_torch(q, k, v, plan, softmax, return_lse)
    return out if maybe is None else (out, maybe)


def choose(device: torch.device | str, impl: str | None = None) -> str:
    """The implementation that runs on `device`: `impl` where it can, an error where it cannot; `None`: the best."""
    if impl is None:
        return "torch"
    if impl not in IMPLEMENTATIONS:
        raise SparsekitError(f"impl={impl!r}: one of {', '.join(IMPLEMENTATIONS)}, or None.{nearest(impl, IMPLEMENTATIONS)}")
    return impl


def preferred_tile(device: torch.device | str) -> tuple[int, int]:
    """(block_q, block_kv) for plans that run on `device`."""
    return 128, 64


def _check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, sink_logits: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise SparsekitError(f"q, k, v need 4 dimensions (B, heads, tokens, D), got {q.ndim}, {k.ndim}, {v.ndim}.")
    if k.shape != v.shape:
        raise SparsekitError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must have one shape (value size = key size).")
    batch, heads, q_len, dim = q.shape
    key_heads, kv_len = k.shape[1], k.shape[2]
    if k.shape[0] != batch or k.shape[3] != dim or heads % key_heads:
        raise SparsekitError(
            f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}: same batch and head size, H a multiple of G."
        )
    tensors = [q, k, v] if sink_logits is None else [q, k, v, sink_logits]
    if len({t.device for t in tensors}) > 1:
        raise SparsekitError(f"q, k, v (and sink_logits) on one device, got {[str(t.device) for t in tensors]}.")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or q.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise SparsekitError(f"q, k, v of one dtype out of {names}, got {q.dtype}, {k.dtype}, {v.dtype}.")
    if sink_logits is not None and sink_logits.shape != (heads,):
        raise SparsekitError(f"sink_logits {tuple(sink_logits.shape)}: want one logit a query head, ({heads},).")
    g = plan.geometry
    if (g.batch, g.q_len, g.kv_len) != (batch, q_len, kv_len):
        raise SparsekitError(
            f"plan for batch {g.batch}, {g.q_len} queries, {g.kv_len} keys; got {batch}, {q_len}, {kv_len}."
        )
    if plan.heads not in (1, key_heads, heads):
        raise SparsekitError(f"plan with {plan.heads} heads: want 1, {key_heads} (key heads) or {heads} (query heads).")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise SparsekitError(
            "sparse attention is forward only: run it under torch.inference_mode() or torch.no_grad() (model.eval() "
            "alone keeps gradients on), or `with handle.pause():` to train with the model's own attention."
        )


def geometry_for(q: Tensor, k: Tensor) -> Geometry:
    """The geometry of a plain call: queries are the last keys, nothing padded, this device's preferred tile."""
    block_q, block_kv = preferred_tile(q.device)
    return Geometry.of(q.shape[2], k.shape[2], batch=q.shape[0], block_q=block_q, block_kv=block_kv)
