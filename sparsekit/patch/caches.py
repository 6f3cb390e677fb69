"""The cache among a forward's arguments and outputs: `cache` since transformers 5.24, `past_key_values` before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

__all__ = ["cache_argument", "cache_in", "cache_of"]

NAMES = ("cache", "past_key_values")


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The cache as keyword argument of a call of `model`, by the name that its forward has for it."""
    return {_name(type(model).forward) or _name_of_transformers(): cache}


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a model's or a layer's call; None: there is none."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache that a call of a model returned; None: it returned none."""
    return next((found for name in NAMES if (found := getattr(output, name, None)) is not None), None)


@lru_cache(maxsize=64)
def _name(forward: Callable[..., Any]) -> str:
    parameters = inspect.signature(forward).parameters
    return next((name for name in NAMES if name in parameters), "")


@lru_cache(maxsize=1)
def _name_of_transformers() -> str:
    """Of a wrapper that hands on what it is given."""
    from transformers import LlamaForCausalLM

    return _name(LlamaForCausalLM.forward)
