"""sparsekit makes long prompts cheap: composable sparse attention for the prefill of Hugging Face language models.

Importing this package loads neither triton nor transformers, needs no GPU and changes nothing global.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekit.call.caches import clear_caches
    from sparsekit.call.geometry import Geometry
    from sparsekit.config import SparseConfig, load
    from sparsekit.config.costs import explain
    from sparsekit.errors import SparsekitError
    from sparsekit.patch import apply, check, remove
    from sparsekit.patterns import Pattern
    from sparsekit.patterns.attention import attention
    from sparsekit.plan import BlockPlan

__version__ = "0.1.0"

_HOMES = {
    "BlockPlan": "plan",
    "Geometry": "call.geometry",
    "Pattern": "patterns",
    "SparseConfig": "config",
    "SparsekitError": "errors",
    "apply": "patch",
    "attention": "patterns.attention",
    "check": "patch",
    "clear_caches": "call.caches",
    "explain": "config.costs",
    "load": "config",
    "remove": "patch",
}

__all__ = [
    "BlockPlan",
    "Geometry",
    "Pattern",
    "SparseConfig",
    "SparsekitError",
    "apply",
    "attention",
    "check",
    "clear_caches",
    "explain",
    "load",
    "remove",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"sparsekit.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sparsekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
