"""What q, k, v and sink logits must look like, whoever takes them: before planning, and before execution."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.call.geometry import MAX_TOKENS, Geometry
from sparsekit.errors import SparsekitError

__all__ = ["DTYPES", "check_fits", "check_tensors", "refuse_transforms"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensors(q: Tensor, k: Tensor, v: Tensor | None = None, sink_logits: Tensor | None = None) -> None:
    """q (B, H, Q, D), k and v (B, G, K, D), sink_logits (H,): of one device and dtype, and of sizes that fit.

    Raises:
        SparsekitError: what does not.
    """
    refuse_transforms()
    named = {"q": q, "k": k} if v is None else {"q": q, "k": k, "v": v}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise SparsekitError(f"{name} is a {type(tensor).__name__}, not a tensor.")
        if tensor.ndim != 4:
            raise SparsekitError(f"{name} needs 4 dimensions (B, heads, tokens, D), got {tuple(tensor.shape)}.")
        if not tensor.numel():
            raise SparsekitError(f"{name} {tuple(tensor.shape)} is empty: every dimension is at least 1.")
    if v is not None and k.shape != v.shape:
        raise SparsekitError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must have one shape (value size = key size).")
    batch, heads, _, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim or heads % k.shape[1]:
        raise SparsekitError(
            f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}: same batch and head size, H a multiple of G."
        )
    devices = [tensor.device for tensor in named.values()] + ([] if sink_logits is None else [sink_logits.device])
    if any(device != devices[0] for device in devices):
        names = ", ".join(named) + ("" if sink_logits is None else " and sink_logits")
        raise SparsekitError(f"{names} on one device, got {', '.join(map(str, devices))}.")
    dtypes = [tensor.dtype for tensor in named.values()]
    if any(dtype != dtypes[0] for dtype in dtypes) or q.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        got = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise SparsekitError(f"{', '.join(named)} of one dtype out of {allowed}, got {got}.")
    if sink_logits is not None and sink_logits.shape != (heads,):
        raise SparsekitError(f"sink_logits {tuple(sink_logits.shape)}: want one logit a query head, ({heads},).")
    if k.shape[2] > MAX_TOKENS:
        raise SparsekitError(f"{k.shape[2]} keys: a plan's entries hold positions below {MAX_TOKENS}.")


def refuse_transforms() -> None:
    """An error within torch.jit.trace, which would keep the plan of this one call for good, and under torch.func."""
    if torch._C._get_tracing_state() is not None:
        raise SparsekitError("torch.jit.trace would keep the plan of this one call for every other: use torch.compile.")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise SparsekitError("sparse attention is forward only: torch.func's vmap, grad and jvp do not go through it.")


def check_fits(q: Tensor, k: Tensor, geometry: Geometry, what: str) -> None:
    """An error unless q and k are of the geometry's lengths; `what` was made for them."""
    g = geometry
    if (g.batch, g.q_len, g.kv_len) != (q.shape[0], q.shape[2], k.shape[2]):
        raise SparsekitError(
            f"{what} for batch {g.batch}, {g.q_len} queries, {g.kv_len} keys; got {q.shape[0]}, {q.shape[2]}, "
            f"{k.shape[2]}."
        )
