"""The table of implementations, and which of them runs on a device and a call.

A new form of the kernel is a file in `attend` and a row here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError, nearest, shown
from sparsekit.kernels.attend import fp8
from sparsekit.kernels.attend.hopper import fp8 as hopper_fp8
from sparsekit.kernels.attend.hopper import host as hopper
from sparsekit.kernels.attend.reference import attend_reference
from sparsekit.kernels.attend.torch_blocks import attend_torch
from sparsekit.plan import BlockPlan

__all__ = [
    "FAMILIES",
    "IMPLEMENTATIONS",
    "TABLE",
    "CannotRun",
    "Choice",
    "Implementation",
    "choose",
    "choose_device",
    "choose_row",
    "geometry_for",
    "narrow_tile",
    "preferred_tile",
    "runs_triton",
]

Attend = Callable[[Tensor, Keys, BlockPlan, Softmax, bool, "Tensor | None"], "tuple[Tensor, Tensor | None]"]


Corrected = Callable[[Tensor, Keys, BlockPlan, Softmax, Tensor, "Tensor | None"], "Tensor | None"]


class Implementation(NamedTuple):
    """One way to execute plans.

    Attributes:
        missing: (device, asked for by name?) -> why it cannot run there, in a clause, or "".
        covers: what `attend` takes -> why it cannot run such a call, each reason a clause.
        tile: (q or None, for rows that keep less when they are narrow?) -> (block_q, block_kv) of its plans.
        run: q, keys, plan, softmax, with lse?, where to or None -> out, lse.
        selects_in_triton: whether patterns estimate in Triton where it runs.
        corrected: q, keys, plan, softmax, dense rows, where to or None -> out of a plan that is corrected, in one pass;
            None where it cannot, and the correction comes after `run`. Not there: it always does.
    """

    name: str
    missing: Callable[[torch.device, bool], str]
    covers: Callable[[Tensor, Keys, BlockPlan, Softmax, bool, Tensor | None], list[str]]
    tile: Callable[[Tensor | None, bool], tuple[int, int]]
    run: Attend
    selects_in_triton: bool = False
    corrected: Corrected | None = None


class CannotRun(SparsekitError):
    """An implementation that was asked for cannot run on a device, or does not cover a call: `why`, in clauses."""

    why: str = ""

    @classmethod
    def because(cls, why: str, message: str) -> CannotRun:
        error = cls(message)
        error.why = why
        return error


class Choice(NamedTuple):
    """An implementation, and in a clause why it and no other."""

    impl: str
    why: str


def _triton_missing(device: torch.device, asked: bool) -> str:
    """Why the portable kernel cannot run on `device`, or ""."""
    if device.type != "cuda" and (device.type != "cpu" or not asked):
        return "it is not a CUDA device"
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'triton>=3.6')"
    if device.type == "cuda":
        return _triton_broken()
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return "it is not a CUDA device (TRITON_INTERPRET=1 runs the kernel in Triton's interpreter, slowly)"


@lru_cache(maxsize=1)
def _triton_broken() -> str:
    try:
        from sparsekit.kernels.attend import triton_blocks  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"this triton does not fit ({type(error).__name__}: {str(error).splitlines()[0]}); install triton>=3.6"
    return ""


def _triton_fp8_missing(device: torch.device, asked: bool) -> str:
    """Why the portable kernel cannot run in FP8 on `device`, or ""."""
    return _triton_missing(device, asked) or fp8.missing(device, asked)


def _triton(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    from sparsekit.kernels.attend.triton_blocks import attend_triton

    return attend_triton(q, keys, plan, softmax, return_lse, out)


def _triton_fp8(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    from sparsekit.kernels.attend.triton_blocks import attend_triton_fp8

    return attend_triton_fp8(q, keys, plan, softmax, return_lse, out)


def _reference(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    made, lse = attend_reference(q, *keys.gathered(plan.geometry)[:2], plan, softmax)
    return (made if out is None else out.copy_(made)), lse


def _anywhere(device: torch.device, asked: bool) -> str:
    return ""


def _everything(*call: object) -> list[str]:
    return []


def _64_keys(q: Tensor | None, narrow: bool) -> tuple[int, int]:
    return 128, 64


# In order of preference.
TABLE: tuple[Implementation, ...] = (
    Implementation(
        "hopper",
        lambda device, _: hopper.missing(device),
        hopper.covers,
        hopper.tile,
        hopper.attend_hopper,
        True,
        hopper.attend_corrected,
    ),
    Implementation("triton", _triton_missing, _everything, _64_keys, _triton, True),
    Implementation("torch", _anywhere, _everything, _64_keys, attend_torch),
    Implementation("reference", _anywhere, _everything, _64_keys, _reference),
    # Behind what runs anything: for who names them.
    Implementation("hopper_fp8", hopper_fp8.missing, hopper_fp8.covers, hopper_fp8.tile, hopper_fp8.attend_fp8, True),
    Implementation("triton_fp8", _triton_fp8_missing, fp8.covers, fp8.tile, _triton_fp8, True),
)
IMPLEMENTATIONS = tuple(row.name for row in TABLE)
FAMILIES = {"fp8": ("hopper_fp8", "triton_fp8")}  # what `impl` may name besides: the first of them that can


def choose(device: torch.device | str, impl: str | None = None) -> str:
    """The implementation that runs on `device`: `impl` where it can, an error where it cannot; `None`: the best.

    A single call may still go to the next in the table: `choose_call`.
    """
    return choose_device(device, impl).impl


def choose_device(device: torch.device | str, impl: str | None = None) -> Choice:
    """`choose`, and why: by what the device and the installed Triton can do, never by a GPU's name."""
    return choose_row(torch.device(device), impl)[1]


def choose_row(
    device: torch.device,
    impl: str | None = None,
    call: tuple[Tensor, Keys, BlockPlan, Softmax, bool, Tensor | None] | None = None,
) -> tuple[Implementation, Choice]:
    """The first row of the table, or of those that `impl` names, that can run on the device, and the call if there is
    one.

    Raises:
        SparsekitError: no such row or family.
        CannotRun: `impl` cannot run on this device, or does not cover this call.
    """
    if impl is not None and impl not in (names := [*(row.name for row in TABLE), *FAMILIES]):
        raise SparsekitError(f"impl={shown(impl)}: one of {', '.join(names)}, or None.{nearest(impl, names)}")
    named = None if impl is None else FAMILIES.get(impl, (impl,))
    passed: list[str] = []
    for row in TABLE:
        if named is not None and row.name not in named:
            continue
        missing = (_on_gpu if device.type == "cuda" else _missing)(row, device, impl is not None)
        reasons = [] if missing or call is None else row.covers(*call)
        if impl == row.name and missing:
            raise CannotRun.because(missing, f"impl={impl!r} cannot run on {device}: {missing}.")
        if impl == row.name and reasons:
            clauses = "; ".join(reasons)
            raise CannotRun.because(
                clauses, f"impl={impl!r} does not cover this call: {clauses}. Another impl, or None, runs it."
            )
        if not missing and not reasons:
            because = ["asked for", *passed] if impl else passed or ["the first choice, and it can"]
            return row, Choice(row.name, "; ".join(because))
        passed.append(f"{row.name}: {missing}" if missing else f"{row.name} does not cover it: {', '.join(reasons)}")
    assert impl is not None, "the table has implementations that run anything"
    why = "; ".join(passed)
    raise CannotRun.because(why, f"impl={impl!r} cannot run on {device}: {why}.")


def _missing(row: Implementation, device: torch.device, asked: bool) -> str:
    return row.missing(device, asked)


_on_gpu = lru_cache(maxsize=64)(_missing)  # nothing there changes while a process runs


def preferred_tile(device: torch.device | str, impl: str | None = None) -> tuple[int, int]:
    """(block_q, block_kv) for plans that run on `device`."""
    return choose_row(torch.device(device), impl)[0].tile(None, False)


def narrow_tile(q: Tensor, impl: str | None = None) -> tuple[int, int]:
    """The same for a pattern that keeps less in narrow rows, where the kernel of q (B, H, Q, D) gains by them."""
    return choose_row(q.device, impl)[0].tile(q, True)


def geometry_for(q: Tensor, k: Tensor, impl: str | None = None) -> Geometry:
    """The geometry of a plain call: queries are the last keys, nothing padded, this device's preferred tile."""
    block_q, block_kv = preferred_tile(q.device, impl)
    return Geometry.of(q.shape[2], k.shape[2], batch=q.shape[0], block_q=block_q, block_kv=block_kv)


def runs_triton(device: torch.device, impl: str | None = None) -> bool:
    """Whether an estimator runs its Triton path on `device`; `impl` "torch" or "triton" asks for one.

    Raises:
        SparsekitError: `impl` cannot run there.
    """
    return choose_row(device, impl)[0].selects_in_triton
