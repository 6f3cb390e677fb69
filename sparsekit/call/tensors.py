"""What q, k, v and sink logits must look like, whoever takes them: before planning, and before execution."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.call.geometry import MAX_TOKENS, Geometry
from sparsekit.errors import SparsekitError

__all__ = ["DTYPES", "check_apart", "check_fits", "check_out", "check_tensors", "output", "refuse_transforms"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    sink_logits: Tensor | None = None,
    table: Tensor | None = None,
) -> None:
    """q (B, H, Q, D), sink_logits (H,), k, v and table as `Keys` has them: of one device and dtype, and sizes that fit.

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
    if table is not None and (table.ndim != 2 or table.shape[0] != batch or table.dtype != torch.int32):
        raise SparsekitError(
            f"table {tuple(table.shape)} {str(table.dtype).removeprefix('torch.')}: want int32 ({batch}, pages), a row "
            "for each sample."
        )
    if table is not None and (table.device != q.device or table.stride(1) != 1):
        raise SparsekitError(
            f"table with strides {table.stride()} on {table.device}: want the last one 1, on {q.device} like q."
        )
    if (k.shape[0] != batch and table is None) or k.shape[3] != dim or heads % k.shape[1]:
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
    tokens = k.shape[2] * (1 if table is None else table.shape[1])
    if tokens > MAX_TOKENS:
        raise SparsekitError(f"{tokens} keys: a plan's entries hold positions below {MAX_TOKENS}.")


def check_out(out: Tensor, q: Tensor) -> None:
    """What a call is to write into: as q (B, H, Q, D), with any strides by which each element has its own place.

    Raises:
        SparsekitError: what does not fit.
    """
    if (out.shape, out.dtype, out.device) != (q.shape, q.dtype, q.device):
        dtypes = [str(x.dtype).removeprefix("torch.") for x in (out, q)]
        raise SparsekitError(
            f"out {tuple(out.shape)} {dtypes[0]} on {out.device}: want q's {tuple(q.shape)} {dtypes[1]} on {q.device}."
        )
    reach = 1
    for step, n in sorted((s, n) for s, n in zip(out.stride(), out.shape, strict=True) if n > 1):
        if step < reach:
            raise SparsekitError(f"out with strides {out.stride()}: each element needs a place of its own.")
        reach += step * (n - 1)
    if out.shape[3] > 1 and out.stride(3) != 1:
        raise SparsekitError(f"out with strides {out.stride()}: the last one is to be 1.")


def check_apart(out: Tensor, *read: Tensor) -> None:
    """An error where `out` lies between the first and the last element of what a call reads, in the same memory.

    It is written before all is read: zeros for padding first of all.
    """
    home = out.untyped_storage().data_ptr()
    for x in read:
        if x.untyped_storage().data_ptr() == home and _begin(x) <= _end(out) and _begin(out) <= _end(x):
            raise SparsekitError(f"out {tuple(out.shape)} lies in the memory of q, k or v: want memory of its own.")


def _begin(x: Tensor) -> int:
    return int(x.storage_offset()) * x.element_size()


def _end(x: Tensor) -> int:
    last = sum(step * (n - 1) for step, n in zip(x.stride(), x.shape, strict=True))
    return _begin(x) + last * x.element_size()


def output(q: Tensor, out: Tensor | None, padded: bool) -> Tensor:
    """Where the result of q (B, H, Q, D) goes: `out`, or a new tensor laid out (B, Q, H, D).

    padded: not every row is written, and those that are not are to be 0.
    """
    if out is None:
        batch, heads, tokens, dim = q.shape
        make = q.new_zeros if padded else q.new_empty
        return make((batch, tokens, heads, dim)).transpose(1, 2)
    return out.zero_() if padded else out


def refuse_transforms() -> None:
    """An error within torch.jit.trace, which would keep the plan of this one call for good, and under torch.func."""
    if torch._C._get_tracing_state() is not None:
        raise SparsekitError("torch.jit.trace would keep the plan of this one call for every other: use torch.compile.")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise SparsekitError("sparse attention is forward only: torch.func's vmap, grad and jvp do not go through it.")


def check_fits(q: Tensor, k: Tensor, geometry: Geometry, what: str, table: Tensor | None = None) -> None:
    """An error unless q and k are of the geometry's lengths; `what` was made for them."""
    g = geometry
    if table is not None:
        if (g.batch, g.q_rows) != (q.shape[0], q.shape[2]) or g.kv_len > table.shape[1] * k.shape[2]:
            raise SparsekitError(
                f"{what} for batch {g.batch}, {g.q_rows} queries, {g.kv_len} keys; got {q.shape[0]}, {q.shape[2]}, and "
                f"{table.shape[1]} pages of {k.shape[2]}."
            )
        if any(g.kv_start):
            raise SparsekitError(f"{what} with kv_start={g.kv_start}: in pages each sample's keys begin at 0.")
        return
    if (g.batch, g.q_rows, g.kv_len) != (q.shape[0], q.shape[2], k.shape[2]):
        raise SparsekitError(
            f"{what} for batch {g.batch}, {g.q_rows} queries, {g.kv_len} keys; got {q.shape[0]}, {q.shape[2]}, "
            f"{k.shape[2]}."
        )
