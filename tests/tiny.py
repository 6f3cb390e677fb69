"""What tests of tiny models share: a pattern of their size, random prompts, logits, and when two are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekit.kernels import prepare

TOKENS = 200
TRIANGLE = {"name": "triangle", "sink_tokens": 8, "window_tokens": 40, "last_tokens": 20}

traces_names = pytest.mark.skipif(
    torch.__version__ < "2.12",
    reason="before PyTorch 2.12 torch.compile cannot trace a model's forward under sparsekit.apply",
)


def ids(batch: int = 1, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    """int64 (batch, tokens), none of them a special token of `sparsekit.models.tiny`."""
    return torch.randint(3, 250, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits(model: Callable[..., Any], input_ids: Tensor, **kwargs: Any) -> Tensor:
    return model(input_ids, **kwargs).logits


def close(got: Tensor, expected: Tensor) -> None:
    """Within float32 rounding of a few layers."""
    error, scale = float((got - expected).abs().max()), max(float(expected.abs().max()), 1.0)
    assert error < 1e-5 * scale, error


def by_reference(*call: Any, impl: str | None = None, **options: Any) -> Any:
    """`prepare` of the reference, for layers of any implementation."""
    return prepare(*call, impl="reference", **options)
