"""Tiny random models, for tests and docs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sparsekit.errors import SparsekitError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tiny(model_type: str = "llama", **overrides: Any) -> PreTrainedModel:
    """A tiny random model of that config class, always the same weights, in eval mode; for tests.

    4 layers, 4 heads over 2 key heads of size 16, 4 experts of which 2 run, 256 tokens, 4096 positions, windows of 1024
    or less, unless `overrides` (config fields) say otherwise.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    if model_type not in CONFIG_MAPPING:
        known = list(CONFIG_MAPPING)
        raise SparsekitError(f"model_type {model_type!r} is not known to transformers.{nearest(model_type, known)}")
    default = CONFIG_MAPPING[model_type]().to_dict()
    fields = default.keys() | CONFIG_MAPPING[model_type].attribute_map.keys()
    for name in overrides:
        if name not in fields:
            raise SparsekitError(f"{name!r} is not a config field of {model_type}.{nearest(name, sorted(fields))}")
    sizes = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # mixtures of experts
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        # linear layers of hybrids
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    if default.get("sliding_window"):  # shorter than the positions, or it would cut nothing off
        sizes["sliding_window"] = min(default["sliding_window"], 1024)
    chosen = {name: value for name, value in sizes.items() if name in fields} | overrides
    config = AutoConfig.for_model(model_type, **chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()
