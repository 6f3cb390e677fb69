"""The Triton side of `ranking.py`: the list of the bits of long rows."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.kernels.launch import _pointer_form, _start, on_device

__all__ = ["bit_positions_triton"]

WORDS = 128  # words of bits that are listed at once


@triton.jit(do_not_specialize=["words", "room"])
@no_type_check
def _list_bits(p_bits, p_list, words, room, WORDS: tl.constexpr):
    """One row's set bits, as ascending positions, until its `room` is full."""
    i_row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WORDS)
    before = tl.program_id(0) * 0
    for i in range(0, words, WORDS):
        word = tl.load(p_bits + i_row * words + i + lane, mask=i + lane < words, other=0)
        b_bit = (word[:, None] >> tl.arange(0, 32)[None, :]) & 1  # (WORDS, 32)
        place = tl.reshape(b_bit, [WORDS * 32])
        upto = tl.cumsum(place, 0)
        at = before + upto - place
        tl.store(p_list + i_row * room + at, i * 32 + tl.arange(0, WORDS * 32), mask=(place != 0) & (at < room))
        before += tl.sum(place, 0)


def bit_positions_triton(bits: Tensor, count: int) -> Tensor:
    """int32 (rows, count): the positions of each row's set bits, ascending. Every row of `bits` has `count` set."""
    rows, words = bits.shape
    out = torch.empty(rows, count, dtype=torch.int32, device=bits.device)
    with on_device(bits.device):
        _start(
            _list_bits, ("list_bits", bits.device, _pointer_form(bits)), (rows,), (bits, out, words, count),
            {"WORDS": WORDS, "num_warps": 4}, {},
        )  # fmt: skip
    return out
