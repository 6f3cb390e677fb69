"""What a model says when it calls its attention function: the softmax, the arguments, and the dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.call.softmax import Softmax
from sparsekit.config import LayerPatterns
from sparsekit.errors import SparsekitError

# Arguments that every implementation here computes or judges.
COMPUTED = {"scaling", "softcap", "s_aux", "sliding_window", "is_causal", "dropout", "output_attentions"}
# Arguments that pass by on their way through a model and change nothing in an attention function.
CARRIED = {
    "attention_mask", "cache_position", "logits_to_keep", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "position_ids", "return_dict", "use_cache",
}  # fmt: skip
# All others are refused where a layer runs sparse: ignoring one may be another result.
KNOWN_ARGUMENTS = COMPUTED | CARRIED


def softmax_of(module: nn.Module, q: Tensor, kwargs: Mapping[str, Any]) -> Softmax:
    """The softmax that a layer asks for. q: (B, H, Q, D). kwargs: of the call of its attention function."""
    scale = kwargs.get("scaling")
    if scale is None:
        scale = getattr(module, "scaling", None)
    return Softmax(q.shape[-1] ** -0.5 if scale is None else scale, kwargs.get("softcap"), kwargs.get("s_aux"))


def unknown_argument(kwargs: Mapping[str, Any]) -> str | None:
    """The name of an argument that no kernel here knows, or None."""
    return next((name for name, value in kwargs.items() if value is not None and name not in KNOWN_ARGUMENTS), None)


def check_arguments(patterns: LayerPatterns, kwargs: Mapping[str, Any]) -> None:
    """Refuse what the model asks of its attention function and no kernel here computes."""
    runs = f"layer {patterns.layer} runs {patterns}"
    if kwargs.get("output_attentions"):
        raise SparsekitError(f"output_attentions=True: {runs}, which has no attention matrix.")
    if kwargs.get("dropout"):
        raise SparsekitError(
            f"{runs}, which has no dropout, and the model asks for {kwargs['dropout']:g}: call model.eval(), or "
            "`with handle.pause():` to train with the model's own attention."
        )
    if kwargs.get("is_causal") is False:
        raise SparsekitError(f"{runs}, but the model asks for attention that is not causal.")
    name = unknown_argument(kwargs)
    if name is not None:
        raise SparsekitError(
            f"{runs}, but the model passes {name!r} to its attention function, which no kernel here computes; leave "
            "the layer dense."
        )


def in_common_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as PyTorch's own attention takes them: under autocast in its dtype, which float64 is exempt from."""
    kind = q.device.type
    if not torch.is_autocast_enabled(kind) or torch.float64 in (q.dtype, k.dtype, v.dtype):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@contextmanager
def outside_autocast(device: torch.device) -> Iterator[None]:
    """Planning and kernels choose their own dtypes."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield
