"""What a model gives under a mask that is handed to its own attention, and which layers are full causal attention."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from tiny import TRIANGLE, logits
from torch import Tensor
from transformers import PreTrainedModel

from sparsekit.patch.capture import wrap_attention

SINK, NEAR, LAST = (TRIANGLE[name] for name in ("sink_tokens", "window_tokens", "last_tokens"))


def logits_of(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    """Without a cache, which transformers makes by the encoder's depth for some decoders."""
    return logits(model, ids, use_cache=False, **kwargs)


def with_triangle(model: PreTrainedModel, ids: Tensor, layers: Collection[int]) -> Tensor:
    """Logits of the model's own attention, under `TRIANGLE` as a 4-D float mask in those layers."""
    tokens = ids.shape[1]
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    kept = (j <= i) & ((j < SINK) | (i - j < NEAR) | (i >= tokens - LAST))
    triangle = torch.where(kept, 0.0, torch.finfo(torch.float32).min)[None, None]

    def masked(own: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        return own(module, q, k, v, triangle if module.layer_idx in layers else mask, **kwargs)

    with wrap_attention(model, masked):
        return logits_of(model, ids)


def causal_layers(model: PreTrainedModel, ids: Tensor) -> set[int]:
    """The layers that look at all earlier tokens and no others, by the masks that they are given."""
    tokens, found = ids.shape[1], set()
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()

    def look(own: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        if q.shape[2] == k.shape[2] == tokens and _is_causal(module, mask, kwargs.get("is_causal"), causal):
            found.add(module.layer_idx)
        return own(module, q, k, v, mask, **kwargs)

    with wrap_attention(model, look):
        logits_of(model, ids)
    return found


def _is_causal(module: Any, mask: Tensor | None, asked: bool | None, causal: Tensor) -> bool:
    if mask is None:
        return bool(module.is_causal if asked is None else asked)
    kept = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool((kept == causal).all())
