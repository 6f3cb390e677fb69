"""A small random model of any type in transformers' causal-LM mapping, built from its config class.

Config classes name their sizes in ways of their own; `SIZES` knows the ways, and `SPECIAL` what is left. A class
derives the rest (lists of one value a layer, for one) from those sizes. Of several kinds of layers, all are there.
"""

from __future__ import annotations

import re
from itertools import cycle, islice
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

LAYERS, HEADS, KEY_HEADS, HEAD_DIM, HIDDEN = 4, 4, 2, 16, 64
VOCABULARY, POSITIONS, WINDOW = 256, 512, 32

# Names of a size, as one expression -> the size.
SIZES: dict[str, Any] = {
    "encoder_layers|num_encoder_layers": 2,
    "num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers|depth|num_blocks": LAYERS,
    "(swa_)?num_key_value_heads|num_kv_heads|num_query_groups": KEY_HEADS,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "(num|n)_(attention_)?heads?|decoder_attention_heads|swa_num_attention_heads": HEADS,
    "head_dim|attention_head_dim|kv_channels|d_kv|dim_head|d_head|swa_head_dim": HEAD_DIM,
    "hidden_size|d_model|n_embd|emb(ed)?_dim|embedding_dim|word_embed_proj_dim|embedding_size|lru_width": HIDDEN,
    "out_hidden_size|backbone_hidden_size|vision_output_dim|input_size": HIDDEN,
    "intermediate_size|ffn_dim|d_ff|dff|dim_ff|ffn_hidden_size|decoder_ffn_dim|d_inner": 2 * HIDDEN,
    "intermediate_size_mlp|dense_intermediate_size|shared_intermediate_size": 2 * HIDDEN,
    "(moe_|expert_|shared_expert_)(intermediate|ffn_hidden)_size|moe_shared_expert_intermediate_size": 32,
    "num_(local_)?experts|n_routed_experts|moe_num_experts": 4,
    "num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts": 2,
    "n_group|topk_group": 1,
    "qk_nope_head_dim|qk_rope_head_dim|v_head_dim|kv_lora_rank|q_lora_rank|rotary_dim": HEAD_DIM,
    "index_topk|keep_window_size": 16,
    "linear_(key|value)_head_dim|linear_head_dim|mamba_d_state|ssm_state_size|state_size": HEAD_DIM,
    "linear_num_(key|value)_heads|linear_num_heads": HEADS,
    "(decoder_)?vocab_size(_per_layer_input)?": VOCABULARY,
    "max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target_positions": POSITIONS,
    "sliding_window(_size)?|attention_window_size|local_attention|attention_chunk_size|window_size": WINDOW,
    "initializer_range|init_std": 0.1,
    "hidden_size_per_layer_input|mamba_dt_rank": 8,
    "is_decoder": True,  # of encoders: their causal form
    "pad_token_id": 0,
    "bos_token_id|decoder_start_token_id": 1,
    "eos_token_id|sep_token_id": 2,
}

# Where the kinds of layers are told in another way than `layer_types`, and sizes that must go together.
_MIXERS = {"layers_block_type": ["linear_attention", "hybrid"] * 2}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2}
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_d_head": 32},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 256, "encoder_hash_byte_group_size": [3, 4]},
    "blt_global_transformer": {"hidden_size": 2 * HIDDEN, "num_attention_heads": 2 * HEADS},
    "blt_local_decoder": {"hidden_size_global": 2 * HIDDEN},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": KEY_HEADS, "clip_qkv": 8, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": HIDDEN, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _EXPERTS,
    "dots1": _EXPERTS | {"n_shared_experts": 1, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 2 * HEAD_DIM, "index_n_heads": 2, "index_head_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 2 * HIDDEN, "mamba_n_heads": 4, "mamba_d_head": HIDDEN // 2},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mamba_n_heads": 4,
        "mamba_d_head": HIDDEN // 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "hash_seed": 0, "num_hidden_layers": LAYERS},
    "rwkv": {"attention_hidden_size": HIDDEN},
    "xmod": {"default_language": "en_XX"},
    "zamba": _MIXERS | {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_DIM},
    "zamba2": _MIXERS | {"n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}

# Not built here, and why.
NOT_BUILT = {
    "gemma3n": "its vision part is timm's, a package that the tests do not have; gemma3n_text is built",
    "gemma4_assistant": "drafts for another model, whose keys and hidden states its forward needs",
    "gemma4_unified_assistant": "drafts for another model, whose keys and hidden states its forward needs",
}

# Types whose causal LM is one part of a config.
PARTS = {"dots3_note": "text_config", "musicgen": "decoder", "musicgen_melody": "decoder"}


def small(model_type: str, **fields: Any) -> PreTrainedModel:
    """Always the same weights, in eval mode, large enough that attention is far from uniform."""
    config = small_config(model_type, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if model_type in PARTS:
            cls = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
            return cls._from_config(config).eval()
        return AutoModelForCausalLM.from_config(config).eval()


def small_config(model_type: str, **fields: Any) -> PretrainedConfig:
    """With those fields of its class, and small sizes in the others."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    cls = CONFIG_MAPPING[model_type]
    cls = _part(cls, PARTS[model_type]) if model_type in PARTS else cls
    return shrunk(cls, SPECIAL.get(cls.model_type, {}) | fields)


def _part(cls: type[PretrainedConfig], name: str) -> type[PretrainedConfig]:
    """The class of that part of a config."""
    part = cls.sub_configs[name]
    return CONFIG_MAPPING[getattr(cls(), name).model_type] if part is AutoConfig else part


def shrunk(cls: type[PretrainedConfig], fields: dict[str, Any]) -> PretrainedConfig:
    """A config of that class with small sizes, unless `fields` say otherwise; its parts too."""
    default = cls().to_dict()
    parts = [name for name in cls.sub_configs if isinstance(default.get(name), dict)]
    chosen: dict[str, Any] = {}
    for name, value in default.items():
        known = value is not None or name in ("head_dim", "num_key_value_heads")
        if name not in parts and known and (name == "is_decoder" or not isinstance(value, bool)):
            sizes = [size for names, size in SIZES.items() if re.fullmatch(names, name)]
            chosen |= dict.fromkeys([name] if sizes else [], next(iter(sizes), None))
    if "kv_lora_rank" in default and "num_key_value_heads" in chosen:  # latent attention has keys for every head
        chosen["num_key_value_heads"] = HEADS
    kinds = list(dict.fromkeys(default.get("layer_types") or ()))
    if len(kinds) > 1 and "layer_types" not in cls.attribute_map:
        chosen["num_hidden_layers"] = max(LAYERS, len(kinds))
        chosen["layer_types"] = list(islice(cycle(kinds), chosen["num_hidden_layers"]))
    for name in parts:
        part = _part(cls, name)
        chosen[name] = shrunk(part, SPECIAL.get(part.model_type, {}))
    return cls(**chosen | fields)
