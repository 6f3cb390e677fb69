"""Starting a Triton kernel: what it was compiled for, on which device, through which descriptors.

Triton is imported with this file; nothing outside `kernels` imports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparsekit.errors import SparsekitError
from sparsekit.kernels.device import capability_of

__all__ = ["HEAD_SIZES", "interpreted", "on_device", "steps_of"]

HEAD_SIZES = (16, 32, 64, 80, 96, 128, 192, 256)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported)."""
    return not isinstance(_nothing, triton.JITFunction)


@triton.jit
def _nothing():  # type: ignore[no-untyped-def]
    """Never started: it tells what `triton.jit` makes of a function here."""


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.shape[-1] not in HEAD_SIZES:
        raise SparsekitError(
            f"head size {q.shape[-1]}: impl='triton' takes {', '.join(map(str, HEAD_SIZES))}; impl='torch' takes any."
        )
    if q.dtype == torch.float64:
        raise SparsekitError(
            "dtype float64: impl='triton' takes float32, float16, bfloat16; impl='torch' takes float64."
        )
    if interpreted() and q.dtype == torch.bfloat16:
        raise SparsekitError("dtype bfloat16: Triton's interpreter computes it wrongly; use float32 or float16 there.")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(-1) != 1:
            raise SparsekitError(
                f"{name} has strides {tensor.stride()}: impl='triton' needs the last one to be 1: {name}.contiguous()."
            )


def _padded(dim: int) -> int:
    return 1 << (dim - 1).bit_length()


def _has_tma(device: torch.device) -> bool:
    return capability_of(device)[0] >= 9


def _precision(capability: tuple[int, int], dtype: torch.dtype) -> str:
    """How float32 is multiplied. Plain tf32 keeps 3 digits; three passes of it give float32's own error."""
    return "tf32x3" if dtype == torch.float32 and capability[0] >= 8 else "ieee"


_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_FORMS: dict[tuple[Any, ...], int] = {}


def _intern(form: tuple[Any, ...]) -> int:
    """A number for a form: long tuples cost microseconds to hash at every call."""
    return _FORMS.setdefault(form, len(_FORMS))


def _start(
    kernel: Any,
    form: tuple[Any, ...],
    grid: tuple[int],
    args: tuple[Any, ...],
    options: dict[str, Any],
    flags: dict[str, Any],
) -> None:
    """Launch. Triton's own look at 60 arguments costs the host 200 us a call (H100), a look-up by `form` far less.

    The kernel is compiled for what it is handed first, so `form` holds all that Triton specialises on: types, what is
    None, strides, and of pointers what `_pointer_form` says.
    """
    if interpreted():
        kernel[grid](*args, **options, **flags)
        return
    found = _COMPILED.get(form)
    if found is None:
        options = {**options, **flags}
        compiled = kernel.warmup(*args, grid=grid, **options)
        found = _COMPILED[form] = compiled, tuple(options[name] for name in kernel.arg_names if name in options)
    found[0][(grid[0], 1, 1)](*args, *found[1])


AMD = torch.version.hip is not None


def _pointer_form(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """What Triton specialises on in a tensor: type, alignment, and for AMD whether 32 bits address its storage."""
    if tensor is None:
        return None
    aligned = tensor.data_ptr() % 16 == 0
    return (tensor.dtype, aligned, tensor.untyped_storage().size() < 1 << 31) if AMD else (tensor.dtype, aligned)


def _steps_fit_tma(tensor: Tensor) -> bool:
    """Whether the copy engine can walk it: steps of 16 bytes, no repeated dimension."""
    size, element = tensor.shape, tensor.element_size()
    return all(n == 1 or (s > 0 and s * element % 16 == 0) for n, s in zip(size[:3], tensor.stride()[:3], strict=True))


def _descriptor_fields(tensor: Tensor, rows: int, block: int, dim: int) -> dict[str, Any]:
    """A box of `block` rows of one head, cut to `rows`: neighbouring heads and dead cache rows are out of its reach."""
    batch, heads, _, size = tensor.shape
    # A dimension of one element may have any stride; the copy engine wants a multiple of 16 bytes even so.
    strides = [s if n > 1 else size for s, n in zip(tensor.stride(), tensor.shape, strict=True)]
    return {
        "shape": [batch, heads, rows, size],
        "strides": [*strides[:3], 1],
        "block_shape": [1, 1, block, dim],
        "padding": "zero",
        "round_f32_to_tf32": False,
    }


def _descriptor(tensor: Tensor, fields: dict[str, Any]) -> TensorDescriptor:
    """Filled in past the constructor, whose checks cost 5 us each; `_Layout` made them."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(fields, base=tensor)
    return made


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Launches go to the current device."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            yield
    else:
        yield


def launch(
    kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any], special: tuple[Any, ...] = ()
) -> None:
    """Start a kernel. It is compiled for the types in `args` and the forms of its pointers, for `options`, and for
    `special`: the values of the integers that it specialises on."""
    if programs == 0:
        return
    device = next(x.device for x in args if isinstance(x, Tensor))
    kinds = tuple(_pointer_form(x) if isinstance(x, Tensor) else type(x) for x in args)
    _start(kernel, (id(kernel), device, kinds, *options.values(), special), (programs,), args, options, {})


def steps_of(*tensors: Tensor) -> tuple[int, ...]:
    """The first three strides of each; 0 in a dimension of one element, where a stride means nothing.

    Kernels are looked up by these: the stride of a single sample would be another one for every number of keys.
    """
    return tuple(s if n > 1 else 0 for x in tensors for s, n in zip(x.stride()[:3], x.shape[:3], strict=True))


def load_step(columns: int) -> int:
    """Columns that `_whole` rounds to: as many as divide the distance of two rows, which the kernel specialises on."""
    return 1 if columns % 16 else 16
