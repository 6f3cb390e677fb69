"""The one door to attention over a plan: `attend` checks, chooses an implementation, and never falls back silently."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.call.tensors import check_apart, check_fits, check_out, check_tensors, refuse_transforms
from sparsekit.errors import SparsekitError
from sparsekit.kernels.attend.correct import anchor_queries, correct
from sparsekit.kernels.choose import Attend, Choice, Implementation, choose_row
from sparsekit.plan import BlockPlan, out_of_range
from sparsekit.plan.memo import RUN

__all__ = ["attend", "check_gradients", "choose_call", "prepare", "softmax_of"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    table: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    impl: str | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the query-key pairs of `plan`. Forward only.

    Args:
        q: (B, H, Q, D) float32, float16, bfloat16 (float64 on `torch` and `reference`).
        k, v: (B, G, K, D), H a multiple of G; never repeated in memory. With `table`: pages (pages, G, size, D).
        plan: made for these lengths; 1, G or H plan heads.
        table: int32 (B, n): the pages of each sample's keys (`Keys`), which are read where they are.
        scale: factor on q.k, above 0; default `1 / sqrt(D)`.
        softcap: `softcap * tanh(z / softcap)` on the scaled logits; None or 0: none.
        sink_logits: (H,) a learned logit per head that joins the softmax with value 0; -inf: none for that head.
        impl: `None` (the best for the device and call, see `choose_call`), "triton", "hopper", "torch" or "reference";
            "hopper_fp8" and "triton_fp8" round q, k, v and the softmax's weights to e4m3, "fp8" is the first of them
            that runs the call.
        return_lse: also return the logarithm of the softmax denominator.
        out: (B, H, Q, D), written and returned, of any layout with D innermost; not between elements of q, k or v.

    Returns:
        `out`, or a new (B, H, Q, D) in q's dtype, laid out as (B, Q, H, D); with `return_lse` also lse (B, H, Q)
        float32, natural logarithm, sink logit included. Padding queries, and any that a plan lets keep nothing, give 0
        and -inf.

    Raises:
        SparsekitError: shapes, dtypes, devices or a plan that do not fit together, gradients asked for, or an `impl`
            that cannot run this call.
    """
    softmax = softmax_of(q, k, v, scale, softcap, sink_logits)
    keys = Keys(k, v, table)
    run, _ = prepare(q, keys, plan, softmax, impl=impl, return_lse=return_lse, out=out)
    out, lse = run(q, keys, plan, softmax, return_lse, out)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def softmax_of(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None, sink_logits: Tensor | None
) -> Softmax:
    """The softmax of a call, with the scale of q's head size if none is given."""
    if scale is None:
        if not isinstance(q, Tensor) or q.ndim != 4 or not q.shape[3]:
            check_tensors(q, k, v)
        scale = 1 / math.sqrt(q.shape[3])
    return Softmax(scale, softcap, sink_logits)


def choose_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    softmax: Softmax,
    *,
    table: Tensor | None = None,
    impl: str | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Choice:
    """What `attend` runs: the first implementation of the table that the device has and that covers the call.

    Raises:
        SparsekitError: `impl` cannot run on this device, or does not cover this call; what does not fit together.
    """
    return prepare(q, Keys(k, v, table), plan, softmax, impl=impl, return_lse=return_lse, out=out)[1]


def prepare(
    q: Tensor,
    keys: Keys,
    plan: BlockPlan,
    softmax: Softmax,
    *,
    impl: str | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> tuple[Attend, Choice]:
    """What runs a checked call, and why: `run(q, keys, plan, softmax, return_lse, out)` gives (out, lse or None).

    `attend` in two steps, for who wants to know what ran. A decoder's layers call alike, and each call counts in
    microseconds: the plan remembers what was decided.

    Raises:
        SparsekitError: as `attend`.
    """
    k, v, table = keys
    check_gradients(q, k, v, softmax.sink_logits)
    refuse_transforms()
    sinks = softmax.sink_logits
    call = (
        RUN, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.device,
        k.device, v.device, (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16, impl, return_lse,
        None if sinks is None else (sinks.shape, sinks.dtype, sinks.device),
        None if table is None else (table.shape, table.stride(), table.dtype, table.device),
        None if out is None else (out.shape, out.stride(), out.dtype, out.device, out.data_ptr() % 16),
    )  # fmt: skip
    found: tuple[Attend, Choice] | None = plan.memo.get(call)
    if found is None:
        check_tensors(q, k, v, sinks, table)
        check_fits(q, k, plan.geometry, "plan", table)
        if out is not None:
            check_out(out, q)
        heads, key_heads = q.shape[1], k.shape[1]
        if plan.heads not in (1, key_heads, heads):
            raise SparsekitError(
                f"plan with {plan.heads} heads: want 1, {key_heads} (key heads) or {heads} (query heads)."
            )
        if plan.correct_every and return_lse:
            raise SparsekitError(
                f"return_lse: outputs that are corrected by every {plan.correct_every}th row are no longer a softmax."
            )
        row, choice = choose_row(q.device, impl, (q, keys, plan, softmax, return_lse, out))
        if row.name != "reference":
            _check_plan_device(q, plan)
        if wrong := out_of_range(plan):
            raise SparsekitError(f"plan: {wrong}.")
        run = row.run if plan.anchors is None else partial(_run_corrected, row, impl)
        found = plan.memo[call] = run, choice
    if out is not None:
        check_apart(out, q, k, v)
    plan.memo.touch()
    return found


def _run_corrected(
    row: Implementation, impl: str | None,
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, out: Tensor | None,
) -> tuple[Tensor, None]:  # fmt: skip
    """The anchors' rows, and the call's corrected by them."""
    anchors = plan.anchors
    assert anchors is not None
    some = anchor_queries(q, anchors.geometry)
    dense, _ = prepare(some, keys, anchors, softmax, impl=impl)[0](some, keys, anchors, softmax, False, None)
    made = None if row.corrected is None else row.corrected(q, keys, plan, softmax, dense, out)
    if made is None:
        made, _ = row.run(q, keys, plan, softmax, False, out)
        correct(made, dense, plan, impl)
    return made, None


def check_gradients(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    """Refuse a call whose gradients are asked for.

    Raises:
        SparsekitError: they are.
    """
    tracked = q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    if tracked and torch.is_grad_enabled():
        raise SparsekitError(
            "sparse attention is forward only: run it under torch.inference_mode() or torch.no_grad() (model.eval() "
            "alone keeps gradients on), or `with handle.pause():` to train with the model's own attention."
        )


def _check_plan_device(q: Tensor, plan: BlockPlan) -> None:
    for name, tensor in plan.tensors.items():
        if tensor.device != q.device:
            raise SparsekitError(f"plan.{name} is on {tensor.device}, q on {q.device}: move it with plan.to(q.device).")
