"""The one door to attention over a plan: `attend` checks, chooses an implementation, and never falls back silently."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError, nearest
from sparsekit.geometry import Geometry
from sparsekit.kernels.reference import attend_reference
from sparsekit.kernels.softmax import Softmax
from sparsekit.kernels.torch_blocks import attend_torch
from sparsekit.plan import FLAG_BITS, BlockPlan

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Softmax",
    "attend",
    "choose",
    "choose_call",
    "choose_device",
    "narrow_tile",
    "preferred_tile",
]

IMPLEMENTATIONS = ("triton", "hopper", "torch", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FARTHEST = 1 << (31 - FLAG_BITS)  # positions that an int32 entry can hold

_Run = Callable[[Tensor, Tensor, Tensor, BlockPlan, Softmax, bool], "tuple[Tensor, Tensor | None]"]


class Choice(NamedTuple):
    """An implementation, and in a clause why it and no other."""

    impl: str
    why: str


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
        from sparsekit.kernels.hopper import attend_hopper

        return attend_hopper
    from sparsekit.kernels.block_sparse import attend_triton

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
    from sparsekit.kernels.hopper import covers

    missing = covers(q, k, v, plan, softmax, return_lse)
    if not missing:
        return choice
    if impl == "hopper":
        raise SparsekitError(f"impl='hopper' does not cover this call: {missing}. impl='triton' or None runs it.")
    return Choice("triton", f"the Hopper form does not cover this call: {missing}")


def choose(device: torch.device | str, impl: str | None = None) -> str:
    """The implementation that runs on `device`: `impl` where it can, an error where it cannot; `None`: the best.

    A single call may still go from "hopper" to "triton": `choose_call`.
    """
    return choose_device(device, impl).impl


def choose_device(device: torch.device | str, impl: str | None = None) -> Choice:
    """`choose`, and why: by what the device and the installed Triton can do, never by a card's name."""
    device = torch.device(device)
    if impl is None:
        return _best(device.type, device.index)
    if impl not in IMPLEMENTATIONS:
        allowed = ", ".join(IMPLEMENTATIONS)
        raise SparsekitError(f"impl={impl!r}: one of {allowed}, or None.{nearest(impl, IMPLEMENTATIONS)}")
    missing = _missing(impl, device) if device.type == "cuda" else _why_not(impl, device)
    if missing:
        raise SparsekitError(f"impl={impl!r} cannot run on {device}: {missing}.")
    return Choice(impl, "asked for")


@lru_cache(maxsize=64)
def _best(kind: str, index: int | None) -> Choice:
    device = torch.device(kind if index is None else f"{kind}:{index}")
    if kind != "cuda":
        return Choice("torch", f"{kind} is not a CUDA device")
    no_triton = _triton_missing(device)
    if no_triton:
        return Choice("torch", no_triton)
    no_hopper = _hopper_missing(device)
    if no_hopper:
        return Choice("triton", f"the Hopper form cannot run: {no_hopper}")
    return Choice("hopper", "compute capability 9.0 and Gluon; calls it does not cover go to triton")


def _why_not(impl: str, device: torch.device) -> str:
    """Why `impl` cannot run on `device`, or ""."""
    if impl == "triton":
        return _triton_missing(device)
    return _hopper_missing(device) if impl == "hopper" else ""


_missing = lru_cache(maxsize=64)(_why_not)  # of a CUDA device: nothing there changes while a process runs


def _triton_missing(device: torch.device) -> str:
    """Why the portable kernel cannot run on `device`, or ""."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'triton>=3.6')"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return ""
        return "it is not a CUDA device (TRITON_INTERPRET=1 runs the kernel in Triton's interpreter, slowly)"
    if device.type != "cuda":
        return "it is not a CUDA device"
    return _triton_broken()


@lru_cache(maxsize=1)
def _triton_broken() -> str:
    try:
        importlib.import_module("sparsekit.kernels.block_sparse")
    except (ImportError, AttributeError) as error:
        return f"this triton does not fit ({type(error).__name__}: {str(error).splitlines()[0]}); install triton>=3.6"
    return ""


def _hopper_missing(device: torch.device) -> str:
    """Why the Hopper form cannot run on `device`, or ""."""
    if device.type != "cuda":
        return "it is not a CUDA device"
    if torch.version.cuda is None:
        return "it needs an NVIDIA device of compute capability 9.0"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"it needs compute capability 9.0, this device has {major}.{minor}"
    if find_spec("sparsekit.kernels.hopper") is None:
        return "this build of sparsekit has no Hopper form"
    from sparsekit.kernels.hopper import gluon_missing

    return gluon_missing()


def preferred_tile(device: torch.device | str) -> tuple[int, int]:
    """(block_q, block_kv) for plans that run on `device`. The Hopper form likes 128 keys, all others 64."""
    return (128, 128) if choose(device) == "hopper" else (128, 64)


def narrow_tile(q: Tensor) -> tuple[int, int]:
    """The same for a pattern that keeps less in narrow rows: 64 queries where the kernel of q (B, H, Q, D) gains.

    The Hopper form reads tiles for two such rows at once, and each half passes what it does not need.
    """
    halves = choose(q.device) == "hopper" and q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] in (64, 128)
    return (64, 64) if halves else preferred_tile(q.device)


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


def geometry_for(q: Tensor, k: Tensor) -> Geometry:
    """The geometry of a plain call: queries are the last keys, nothing padded, this device's preferred tile."""
    block_q, block_kv = preferred_tile(q.device)
    return Geometry.of(q.shape[2], k.shape[2], batch=q.shape[0], block_q=block_q, block_kv=block_kv)
