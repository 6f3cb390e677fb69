"""Masks in the language of FlashAttention-4. It compiles them from their source, so they stand in a file of their own.

Imported where `flash-attn-4` is installed, and nowhere else.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from flash_attn.cute.utils import scalar_to_ssa

from sparsekit.lab.bench.kernel_cases import LAST, SINK, WINDOW

__all__ = ["causal", "triangle"]


@cute.jit
def causal(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
    return kv_idx <= q_idx


def triangle(tokens: int) -> Any:
    """Triangle of a prompt of so many tokens."""
    first_dense = tokens - LAST

    @cute.jit
    def keep(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        sink = kv_idx < scalar_to_ssa(SINK, cutlass.Int32)
        near = q_idx - kv_idx < scalar_to_ssa(WINDOW, cutlass.Int32)
        last = q_idx >= scalar_to_ssa(first_dense, cutlass.Int32)
        return (kv_idx <= q_idx) & (sink | near | last)

    return keep
