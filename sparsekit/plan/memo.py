"""The names under which executions keep what they derive from a plan (`BlockPlan.memo`), in one list.

A name is a key's first part; what it depends on follows: shapes, strides, dtype, device.
"""

from __future__ import annotations

__all__ = [
    "CORRECTED",
    "COVERED",
    "FINER",
    "FP8_LAUNCHES",
    "HOPPER_LAUNCHES",
    "HOPPER_WORK",
    "MASKS",
    "RUN",
    "SLOTS",
    "SUMS",
    "TRITON",
    "VISITED",
]

CORRECTED = "corrected"  # the same pairs with another correction
RUN = "run"  # attend: the implementation that runs such a call, once it was checked
COVERED = "covered"  # an implementation's reasons against such a call
MASKS = "masks"  # torch_blocks: rows, keys and masks of its calls
TRITON = "triton"  # triton_blocks: the launch
HOPPER_WORK = "hopper work"  # the work list
HOPPER_LAUNCHES = "hopper launches"
FP8_LAUNCHES = "fp8 launches"
SLOTS = "slots"  # the Hopper form: how many partial results it may write
SUMS = "sums"  # pairs, tiles and columns computed
FINER = "finer"  # the same pairs in tiles of fewer keys
VISITED = "visited"  # of a ranked plan: what its last execution visited
