"""Which implementation runs on a device, and the tile that its plans are cut into."""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.errors import SparsekitError, nearest

__all__ = [
    "HALF",
    "IMPLEMENTATIONS",
    "Choice",
    "choose",
    "choose_device",
    "list_room",
    "narrow_tile",
    "preferred_tile",
    "runs_triton",
]

IMPLEMENTATIONS = ("triton", "hopper", "torch", "reference")


class Choice(NamedTuple):
    """An implementation, and in a clause why it and no other."""

    impl: str
    why: str


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
        importlib.import_module("sparsekit.kernels.attend.triton_blocks")
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
    if find_spec("sparsekit.kernels.attend.hopper.host") is None:
        return "this build of sparsekit has no Hopper form"
    from sparsekit.kernels.attend.hopper.load import gluon_missing

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


def geometry_for(q: Tensor, k: Tensor) -> Geometry:
    """The geometry of a plain call: queries are the last keys, nothing padded, this device's preferred tile."""
    block_q, block_kv = preferred_tile(q.device)
    return Geometry.of(q.shape[2], k.shape[2], batch=q.shape[0], block_q=block_q, block_kv=block_kv)


def runs_triton(device: torch.device, impl: str | None = None) -> bool:
    """Whether an estimator runs its Triton path on `device`; `impl` "torch" or "triton" asks for one.

    Raises:
        SparsekitError: `impl` cannot run there.
    """
    return choose_device(device, impl).impl in ("triton", "hopper")


HALF = 64
SPARE = 4  # a pair's steps may end in as many entries that are nowhere


def list_room(entries: int, plan_heads: int, rows: int) -> int:
    """Entries that the list of `pair_rows` may take. plan_heads: of all plan samples. rows: those of each."""
    return entries + SPARE * plan_heads * (rows // 2 + 1)
