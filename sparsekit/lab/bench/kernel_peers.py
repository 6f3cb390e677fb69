"""What others run on the shapes and masks of `sparsekit bench kernel`: PyTorch's SDPA, and FlexAttention."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LAST", "SINK", "WINDOW", "Shape", "peer_call"]

SINK, WINDOW, LAST = 8, 512, 128  # Triangle as TriangleMix publishes it
# FlexAttention's mask is evaluated pair by pair, and its dense form runs at half the rate: longer ones are left out.
FLEX_DENSE_TOKENS = 32768


@dataclass(frozen=True)
class Shape:
    """One attention call. `heads` over `key_heads` of size `dim`."""

    tokens: int
    heads: int
    key_heads: int
    dim: int
    dtype: torch.dtype


def peer_call(
    peer: str, case: str, shape: Shape, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Callable[[], Any] | None, dict[str, Any]]:
    """What to time, and its mask-building time apart. None where the peer has no such case."""
    if peer == "flex":
        return _flex(case, shape, q, k, v)
    if case != "dense":
        return None, {}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = SDPBackend.CUDNN_ATTENTION if peer == "cudnn" else SDPBackend.FLASH_ATTENTION

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    try:
        run()
    except RuntimeError as error:
        return None, {"missing": str(error).splitlines()[0]}
    return run, {}


def _flex(case: str, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable[[], Any] | None, dict[str, Any]]:
    if case not in ("dense", "triangle") or (case == "dense" and shape.tokens > FLEX_DENSE_TOKENS):
        return None, {}
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    last = shape.tokens - LAST

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def triangle(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((j < SINK) | (i - j < WINDOW) | (i >= last))

    def build() -> BlockMask:
        return create_block_mask(rule, None, None, shape.tokens, shape.tokens, device="cuda", _compile=True)

    torch._dynamo.reset()
    rule = causal if case == "dense" else triangle
    build()  # compiles
    torch.cuda.synchronize()
    start = time.perf_counter()
    mask = build()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True), {"plan_ms": round(seconds * 1e3, 3)}
