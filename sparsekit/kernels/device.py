"""What a device is, without asking its name; nothing here needs Triton."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

__all__ = ["TARGETS", "Target", "capability_of", "processors_of"]


class Target(NamedTuple):
    """A kind of device, and how far the kernels were proved on it.

    Attributes:
        name: of an architecture, as its compiler names it.
        implementations: of `attend`, those that run there.
        proved: "run" by tests on such a device, or "compiled, not run" by tests without one.
        shared_bytes: shared memory that a program may take; 0: it has none.
    """

    name: str
    implementations: tuple[str, ...]
    proved: str
    shared_bytes: int = 0


COMPILED = "compiled, not run"
TARGETS = (
    Target("NVIDIA sm_90", ("hopper", "triton", "hopper_fp8", "triton_fp8"), "run", 232_448),
    Target("NVIDIA sm_80", ("triton",), COMPILED, 166_912),
    Target("NVIDIA sm_89", ("triton", "triton_fp8"), COMPILED, 101_376),  # sm_86 has as much
    Target("NVIDIA sm_100", ("triton", "triton_fp8"), COMPILED, 232_448),
    Target("NVIDIA sm_120", ("triton", "triton_fp8"), COMPILED, 101_376),
    Target("AMD gfx942", ("triton",), COMPILED, 65_536),
    Target("CPU", ("torch", "reference"), "run"),
    Target("CPU, TRITON_INTERPRET=1", ("triton", "triton_fp8"), "run"),
)


def capability_of(device: torch.device) -> tuple[int, int]:
    """(major, minor) of an NVIDIA device; (0, 0) for the interpreter and for AMD, whose numbers mean something else."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 0, 0
    return _capability(_numbered(device))


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device, 1 of others."""
    return _processors(_numbered(device)) if device.type == "cuda" else 1


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _numbered(device: torch.device) -> torch.device:
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
