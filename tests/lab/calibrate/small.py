"""A tiny model of a family, in float64: for gradients that are held against what is written out."""

from __future__ import annotations

from typing import Any

import torch

from sparsekit import models


def three_layers(model_type: str = "llama", **fields: Any) -> Any:
    model: Any = models.tiny(model_type, num_hidden_layers=3, **fields).double()
    if model_type == "gpt_oss":
        model.set_experts_implementation("eager")  # the grouped one knows no float64
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return model
