"""Whether and how the device code loads: it needs Gluon."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any


@lru_cache(maxsize=1)
def _load() -> tuple[ModuleType | None, str]:
    try:
        from sparsekit.kernels.attend.hopper import device
    except (ImportError, AttributeError) as error:
        return None, f"needs Gluon as in Triton >= 3.6 ({type(error).__name__}: {str(error).splitlines()[0]})"
    return device, ""


def gluon_missing() -> str:
    """Why the device code cannot be loaded here, or ""."""
    return _load()[1]


def _device_code() -> Any:
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module
