"""Plans, made from q and k (`select`) and executed (`attend`)."""

from __future__ import annotations

from sparsekit.kernels.attend.door import attend, check_gradients, choose_call, prepare, softmax_of
from sparsekit.kernels.choose import (
    IMPLEMENTATIONS,
    CannotRun,
    Choice,
    choose,
    choose_device,
    geometry_for,
    narrow_tile,
    preferred_tile,
)

__all__ = [
    "IMPLEMENTATIONS",
    "CannotRun",
    "Choice",
    "attend",
    "check_gradients",
    "choose",
    "choose_call",
    "choose_device",
    "geometry_for",
    "narrow_tile",
    "preferred_tile",
    "prepare",
    "softmax_of",
]
