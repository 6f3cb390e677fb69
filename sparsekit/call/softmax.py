"""The softmax that will be computed: what patterns need to select by it, and kernels to run it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError, shown

__all__ = ["Softmax"]


@dataclass(frozen=True, eq=False)
class Softmax:
    """`P_ij = exp(z_ij) / (sum_j exp(z_ij) + exp(sink_logits_h))`, `z = softcap * tanh(scale * q.k / softcap)`.

    Attributes:
        scale: factor on q.k, above 0; `1 / sqrt(head size)` unless the model has its own.
        softcap: logit soft-cap (Gemma 2), above 0; None, or 0 in a model's config: none. It is None then.
        sink_logits: (H,) learned sink logits (gpt-oss), a virtual key with value 0 seen by every query, or None.
            Contiguous here, whatever was given: kernels read the logit of head h at address h. -inf: no sink for that
            head. NaN and inf are refused on a CPU; a GPU's values are not read, and make that head's results NaN.

    Raises:
        SparsekitError: a field outside these bounds, or no number.
    """

    scale: float
    softcap: float | None = None
    sink_logits: Tensor | None = None

    def __post_init__(self) -> None:
        scale: Any = self.scale
        softcap: Any = self.softcap
        sinks: Any = self.sink_logits
        if type(scale) is not float or not 0 < scale < math.inf:
            object.__setattr__(self, "scale", _positive("scale", scale, "by default 1 / sqrt(head size)"))
        if softcap is not None and (type(softcap) is not float or not 0 < softcap < math.inf):
            off = _is_number(softcap) and softcap == 0
            object.__setattr__(self, "softcap", None if off else _positive("softcap", softcap, "None or 0 is none"))
        if sinks is not None:
            if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
                said = f"a tensor of {sinks.dtype}" if isinstance(sinks, Tensor) else shown(sinks)
                raise SparsekitError(f"sink_logits={said}: a floating-point tensor (H,), or None.")
            if sinks.device.type == "cpu" and not bool((sinks < math.inf).all()):
                raise SparsekitError("sink_logits hold NaN or inf: finite numbers, or -inf for a head without a sink.")
            object.__setattr__(self, "sink_logits", sinks.contiguous())

    def logits(self, dots: Tensor) -> Tensor:
        """z of products q.k, any shape."""
        return self.capped(dots * self.scale)

    def capped(self, z: Tensor) -> Tensor:
        """z of scaled products, any shape."""
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def join(self, lse: Tensor) -> Tensor:
        """lse (..., H, n) with each head's sink logit in the sum. Sink logits (..., H) may carry dimensions of lse."""
        if self.sink_logits is None:
            return lse
        return torch.logaddexp(lse, self.sink_logits.to(lse.dtype)[..., None])


def _positive(name: str, value: Any, default: str) -> float:
    try:
        number = float(value) if _is_number(value) else math.nan
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        said = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise SparsekitError(f"{name}={said}: a finite number above 0; {default}.")
    return number


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and value is not True and value is not False
