"""The one door to attention over a plan: `attend` checks, chooses an implementation, and never falls back silently."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError
from sparsekit.kernels.attend.reference import attend_reference
from sparsekit.kernels.attend.torch_blocks import attend_torch
from sparsekit.kernels.choose import Choice, choose_device
from sparsekit.plan import FLAG_BITS, BlockPlan

__all__ = ["attend", "choose_call"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FARTHEST = 1 << (31 - FLAG_BITS)  # positions that an int32 entry can hold
_Run = Callable[[Tensor, Tensor, Tensor, BlockPlan, Softmax, bool], "tuple[Tensor, Tensor | None]"]


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
        impl: `None` (the best for the device and call, see `choose_call`), "triton", "hopper", "torch" or "reference".
        return_lse: also return the logarithm of the softmax denominator.

    Returns:
        out (B, H, Q, D) in q's dtype, laid out as (B, Q, H, D); with `return_lse` also lse (B, H, Q) float32, natural
        logarithm, sink logit included. Padding queries give 0 and -inf.

    Raises:
        SparsekitError: shapes, dtypes, devices or a plan that do not fit together, gradients asked for, or an `impl`
            that cannot run this call.
    """
    softmax = Softmax(1 / math.sqrt(q.shape[-1]) if scale is None else scale, softcap, sink_logits)
    # A decoder's layers call alike, and each call counts in microseconds: the plan remembers what was checked.
    call = (
        "attend", q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.device,
        k.device, v.device, (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16, softmax.scale, softcap, impl, return_lse,
        None if sink_logits is None else (sink_logits.shape, sink_logits.dtype, sink_logits.device),
    )  # fmt: skip
    run = plan.memo.get(call)
    if run is None:
        _check(q, k, v, plan, sink_logits)
        ran = choose_call(q, k, v, plan, softmax, impl=impl, return_lse=return_lse).impl
        if ran != "reference":
            _check_plan_device(q, plan)
        run = plan.memo[call] = _function(ran)
    _check_gradients(q, k, v, sink_logits)
    out, lse = run(q, k, v, plan, softmax, return_lse)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _function(impl: str) -> _Run:
    if impl == "reference":
        return lambda q, k, v, plan, softmax, return_lse: attend_reference(q, k, v, plan, softmax)
    if impl == "torch":
        return attend_torch
    if impl == "hopper":
        from sparsekit.kernels.attend.hopper.host import attend_hopper

        return attend_hopper
    from sparsekit.kernels.attend.triton_blocks import attend_triton

    return attend_triton


def choose_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    softmax: Softmax,
    *,
    impl: str | None = None,
    return_lse: bool = False,
) -> Choice:
    """What `attend` runs: the device's choice, or portable Triton where the Hopper form does not cover the call.

    Raises:
        SparsekitError: `impl` cannot run on this device, or "hopper" does not cover this call.
    """
    choice = choose_device(q.device, impl)
    if choice.impl != "hopper":
        return choice
    from sparsekit.kernels.attend.hopper.host import covers

    missing = covers(q, k, v, plan, softmax, return_lse)
    if not missing:
        return choice
    if impl == "hopper":
        raise SparsekitError(f"impl='hopper' does not cover this call: {missing}. impl='triton' or None runs it.")
    return Choice("triton", f"the Hopper form does not cover this call: {missing}")


def _check_gradients(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    tracked = q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    if tracked and torch.is_grad_enabled():
        raise SparsekitError(
            "sparse attention is forward only: run it under torch.inference_mode() or torch.no_grad() (model.eval() "
            "alone keeps gradients on), or `with handle.pause():` to train with the model's own attention."
        )


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
    if kv_len > FARTHEST:
        raise SparsekitError(f"{kv_len} keys: a plan's entries hold positions below {FARTHEST}.")


def _check_plan_device(q: Tensor, plan: BlockPlan) -> None:
    for name, tensor in plan.tensors.items():
        if tensor.device != q.device:
            raise SparsekitError(f"plan.{name} is on {tensor.device}, q on {q.device}: move it with plan.to(q.device).")
