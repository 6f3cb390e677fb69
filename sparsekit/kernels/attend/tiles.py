"""The portable kernel's own tiles, by architecture, head size and element type."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparsekit.kernels.launch import _padded

__all__ = ["Tile", "tile_for"]


class Tile(NamedTuple):
    """The kernel's own tile, which divides the plan's; `warps` a program, `stages` of software pipelining."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# By padded head size and bytes of an element, for compute capability 9.0. H100, bfloat16, 32 heads over 8, best of the
# tiles that fit, ms: dense at 32K (256: 16K).
_HOPPER: dict[tuple[int, int], Tile] = {
    (64, 2): Tile(128, 64, 4, 3),  # 9.97; 2 stages 11.1, 128x128 10.1, 64x64 10.1, 8 warps 10.5; cuDNN 9.64
    (128, 2): Tile(128, 64, 4, 2),  # 16.1; 8 warps 18.3, 128x128 17.0, 64x64 17.5; cuDNN 14.3
    (256, 2): Tile(128, 64, 8, 2),  # 7.76; 128x32 9.37, 64x32 10.0; cuDNN 6.15
    (64, 4): Tile(64, 64, 4, 2),
    (128, 4): Tile(64, 32, 4, 2),
    (256, 4): Tile(64, 32, 8, 2),
    # In e4m3, where a tile's sum stands beside the sum of all: chosen by the registers that they take.
    (64, 1): Tile(128, 128, 8, 2),
    (128, 1): Tile(128, 128, 8, 2),  # dense at 32K on an H200: 14.8; in 16 bits 16.2
    (256, 1): Tile(64, 64, 8, 2),
}
# The same for listed rows of few tiles, where a program's start and end weigh: Triangle (8, 512, 128) at 32K.
_HOPPER_SHORT = _HOPPER | {
    (128, 2): Tile(64, 64, 4, 3),  # 1.02; 128x64 1.16
    (128, 1): Tile(64, 64, 4, 3),
}
SHORT_ROW_STEPS = 32
# What every architecture has room for: 64 KiB of shared memory for bfloat16 of head size 128.
_ANY: dict[tuple[int, int], Tile] = {
    (64, 2): Tile(128, 64, 4, 2),
    (128, 2): Tile(64, 64, 4, 2),
    (256, 2): Tile(64, 32, 8, 2),
    (64, 4): Tile(64, 32, 4, 2),
    (128, 4): Tile(32, 32, 4, 2),
    (256, 4): Tile(16, 16, 4, 2),
    (64, 1): Tile(64, 64, 4, 2),
    (128, 1): Tile(64, 64, 4, 2),
    (256, 1): Tile(64, 64, 8, 2),
}
# AMD's, whose capability is (0, 0), as the interpreter's. Compiled for gfx942 in 64 KiB of shared memory, the same with
# single columns: two stages of (256, 4) take 66 KiB, and eight warps of (256, 2), of 64 lanes, spill 123 registers.
_AMD = _ANY | {
    (256, 2): Tile(64, 32, 4, 2),
    (256, 4): Tile(16, 16, 4, 1),
}


def tile_for(capability: tuple[int, int], dim: int, dtype: torch.dtype, short_rows: bool = False) -> Tile:
    """The kernel's tile on an architecture, for a head size and the type of keys; `short_rows`: few tiles a row."""
    table = _ANY if capability[0] else _AMD
    if capability[0] == 9:
        table = _HOPPER_SHORT if short_rows else _HOPPER
    return table[max(_padded(dim), 64), dtype.itemsize]
