"""Looking at a model's attention as it runs: its function wrapped, or its inputs kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError
from sparsekit.patch.model import eager_attention, num_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["capture_attention", "wrap_attention"]


class _AllCaptured(Exception):
    """Ends a forward whose remaining layers nobody asked for."""


@contextmanager
def wrap_attention(model: PreTrainedModel, run: Callable[..., tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """Within this block each attention layer of `model` calls `run(own, module, q, k, v, mask, **kwargs)`.

    `own(module, q, k, v, mask, **kwargs)` is what the layer would have called, masks are as ever, and the result is
    (out (B, N, H, D), anything). Other models are left alone.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = model.config.get_text_config(decoder=True)
    name = config._attn_implementation or "eager"
    if name != "eager" and name not in ALL_ATTENTION_FUNCTIONS:
        raise SparsekitError(f"attention implementation {name!r} does not go through transformers' interface.")
    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    before = local.get(name)
    shared = ALL_ATTENTION_FUNCTIONS.get(name)

    def wrapped(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        own = shared or eager_attention(module)
        if getattr(module, "config", None) is not config:
            return own(module, query, key, value, attention_mask, **kwargs)
        return run(own, module, query, key, value, attention_mask, **kwargs)

    local[name] = wrapped
    try:
        yield
    finally:
        if before is None:
            del local[name]
        else:
            local[name] = before


@torch.no_grad()
def capture_attention(
    model: PreTrainedModel, ids: Tensor, layers: Sequence[int] | None = None
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """q (1, H, N, D), k and v (1, G, N, D) as each attention layer gets them while the model reads `ids` (1, N).

    The model's own attention runs as ever, wrapped for the time of this call; the forward ends with the last of
    `layers` (default all).
    """
    count = num_layers(model.config.get_text_config(decoder=True))
    wanted = set(range(count) if layers is None else layers)
    if not wanted or not wanted <= set(range(count)):
        raise SparsekitError(f"layers={sorted(wanted)}: at least one, out of 0..{count - 1}.")
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def capture(own: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module.layer_idx in wanted:
            found[module.layer_idx] = (q.clone(), k.clone(), v.clone())
        if found.keys() == wanted:
            raise _AllCaptured
        return own(module, q, k, v, *args, **kwargs)

    with wrap_attention(model, capture), suppress(_AllCaptured):
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    if found.keys() != wanted:
        raise SparsekitError(f"layers {sorted(wanted - found.keys())} of {model.config.model_type} ran no attention.")
    return found
