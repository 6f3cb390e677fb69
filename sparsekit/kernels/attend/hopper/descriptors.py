"""TMA descriptors: what they hold of a tensor, and how a launch gets those of a call's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["box", "layout", "put_descriptors"]


@lru_cache(maxsize=64)
def layout(rows: int, dim: int, dtype: torch.dtype) -> tuple[type, list[int], Any]:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}[dtype]
    block = [1, 1, rows, dim]
    return TensorDescriptor, block, gl.NVMMASharedLayout.get_default_for(block, element)


def box(
    shape: Sequence[int], strides: Sequence[int], tokens: int, rows: int, dtype: torch.dtype, width: int | None = None
) -> dict[str, Any]:
    """What a TMA descriptor of a tensor (B, heads, N, D) holds: tokens end at `tokens`, boxes are `rows` x `width`."""
    batch, heads, _, dim = shape
    _, block, swizzled = layout(rows, width or dim, dtype)
    steps = [s if n > 1 else dim for s, n in zip(strides[:3], shape[:3], strict=True)]
    contents = {"shape": [batch, heads, tokens, dim], "strides": [*steps, 1], "block_shape": block, "layout": swizzled}
    return {**contents, "padding": "zero", "round_f32_to_tf32": False}


def put_descriptors(
    arguments: list[Any], descriptor: type, boxes: Sequence[dict[str, Any] | None], tensors: Sequence[Tensor | None]
) -> None:
    """A launch's first arguments: the descriptors of these tensors, one for each box."""
    for i, (box, x) in enumerate(zip(boxes, tensors, strict=True)):
        if box is not None:
            # Past the constructor, whose checks cost 5 us each and were made by `covers`.
            made: Any = object.__new__(descriptor)
            made.__dict__.update(box, base=x)
            arguments[i] = made
