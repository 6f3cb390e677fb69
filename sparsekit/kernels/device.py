"""What a device is, without asking its name; nothing here needs Triton."""

from __future__ import annotations

from functools import lru_cache

import torch

__all__ = ["capability_of", "processors_of"]


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
