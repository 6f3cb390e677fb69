"""Models to time: a loaded one, or random weights of a real model's shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sparsekit.errors import SparsekitError, nearest
from sparsekit.models import load, tiny

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SHAPES", "model_or_shape"]

# Of random weights: arguments of `tiny`, as in the config.json of the model of that name, whose configs fit it then.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
    "smollm2-135m": {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    },
    "tiny": {},
}
# Its own code reads more than 262,144 tokens with dual chunk attention, which transformers does not have.
SHAPES["qwen2.5-7b-1m"] = SHAPES["qwen2.5-7b"] | {
    "max_position_embeddings": 1_010_000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0},
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def model_or_shape(
    model: PreTrainedModel | str | None, shape: str | None, dtype: str | None, device: torch.device
) -> tuple[str, PreTrainedModel]:
    """Its name, and the model on the device: the one given, or random weights of `shape`."""
    if isinstance(model, str):
        return model, load(model, dtype=dtype or DTYPES.get(device.type, torch.float32), device=device)[0]
    if model is not None:
        return type(model).__name__, model
    shape = shape or ("llama-3.2-1b" if device.type == "cuda" else "smollm2-135m")
    if shape not in SHAPES:
        raise SparsekitError(f"shape {shape!r} is not one of {', '.join(SHAPES)}.{nearest(shape, SHAPES)}")
    wanted = getattr(torch, dtype, None) if dtype else DTYPES.get(device.type, torch.float32)
    if not isinstance(wanted, torch.dtype):
        raise SparsekitError(f"dtype {dtype!r} is not one of float32, bfloat16, float16.")
    before = torch.get_default_dtype()
    torch.set_default_dtype(wanted)  # never more of the weights than the model has
    try:
        with torch.device(device):
            made: Any = tiny(**SHAPES[shape])
    finally:
        torch.set_default_dtype(before)
    return f"{shape}, random weights", made.to(wanted)
