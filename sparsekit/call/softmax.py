"""The softmax that will be computed: what patterns need to select by it, and kernels to run it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Softmax"]


@dataclass(frozen=True, eq=False)
class Softmax:
    """`P_ij = exp(z_ij) / (sum_j exp(z_ij) + exp(sink_logits_h))`, `z = softcap * tanh(scale * q.k / softcap)`.

    Attributes:
        scale: factor on q.k; `1 / sqrt(head size)` unless the model has its own.
        softcap: logit soft-cap (Gemma 2), or None.
        sink_logits: (H,) learned sink logits (gpt-oss), a virtual key with value 0 seen by every query, or None.
            Contiguous here, whatever was given: kernels read the logit of head h at address h.
    """

    scale: float
    softcap: float | None = None
    sink_logits: Tensor | None = None

    def __post_init__(self) -> None:
        if self.sink_logits is not None:
            object.__setattr__(self, "sink_logits", self.sink_logits.contiguous())
