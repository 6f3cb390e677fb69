"""Tiny random models whose attention matters, and what transformers says of them under explicit masks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit import load
from sparsekit.call.geometry import Span
from sparsekit.config import ModelFacts

LAYERS, HEADS, KEY_HEADS = 2, 8, 2
VOCABULARY = 1000
SIZES = {
    "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS,
    "head_dim": 64, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def save_tiny_llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES, num_hidden_layers=LAYERS, max_position_embeddings=65536, tie_word_embeddings=False, dtype=torch.float32
    )
    model = LlamaForCausalLM(config).eval()
    sharpen(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.save_pretrained(folder)
    return folder


def save_tiny_gemma2(folder: Path) -> Path:
    """Soft-capped scores, most of them at the cap; every second layer slides."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        **SIZES, num_hidden_layers=LAYERS, max_position_embeddings=4096, sliding_window=128, query_pre_attn_scalar=64,
        attn_logit_softcapping=5.0, final_logit_softcapping=None, pad_token_id=0, dtype=torch.float32,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    sharpen(model)
    model.save_pretrained(folder)
    return folder


def save_tiny_gpt_oss(folder: Path) -> Path:
    """Learned sinks that take a share of every row; every second layer slides; experts."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    yarn = {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 4096,
    }  # fmt: skip
    config = GptOssConfig(
        **SIZES, num_hidden_layers=LAYERS, max_position_embeddings=65536, sliding_window=128, num_local_experts=4,
        num_experts_per_tok=2, pad_token_id=0, rope_parameters=yarn, dtype=torch.float32,
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    sharpen(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.linspace(0, 8, HEADS))
    model.save_pretrained(folder)
    return folder


def sharpen(model: Any) -> None:
    """Make a random model's attention choose, and its choice matter."""
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for weights, factor in (
                (attention.q_proj, 8),
                (attention.k_proj, 8),
                (attention.v_proj, 4),
                (attention.o_proj, 4),
            ):
                weights.weight.mul_(factor)


def save_adapter(folder: Path) -> Path:
    """A LoRA adapter for the tiny Llama's attention, rank 8, random."""
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(5)
    width = {"q_proj": HEADS * 64, "k_proj": KEY_HEADS * 64, "v_proj": KEY_HEADS * 64}
    tensors = {}
    for layer in range(LAYERS):
        for name, size in width.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(8, 256, generator=draw) / 16
            tensors[f"{at}.lora_B.weight"] = torch.randn(size, 8, generator=draw) / 16
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": list(width), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def merge_adapter(model: Any, folder: Path) -> None:
    """Add an adapter to the weights that it is for."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name in tensors:
            if name.endswith("lora_A.weight"):
                module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                module.weight.add_(tensors[name.replace("lora_A", "lora_B")] @ tensors[name])


def prompt(tokens: int, seed: int = 1) -> list[int]:
    return torch.randint(3, VOCABULARY - 10, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


class Reference:
    """A model in transformers, each prompt alone, every layer and head under its own explicit mask.

    Args:
        attention: "eager" for what SDPA does not compute.
    """

    def __init__(self, folder: Path, attention: str = "sdpa") -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=attention, dtype=torch.float32
        ).eval()
        self.masks: dict[int, Tensor] = {}
        for index, layer in enumerate(self.model.model.layers):
            layer.self_attn.register_forward_pre_hook(self._hook(index), with_kwargs=True)

    def to(self, device: str) -> None:
        self.model.to(device)

    def _hook(self, index: int) -> Any:
        def put(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attention_mask": self.masks[index]}

        return put

    def log_probabilities(
        self, ids: Sequence[int], prompt_tokens: int, config: str | Mapping[str, Any] | None
    ) -> Tensor:
        """(n - prompt_tokens + 1, vocabulary) of the tokens behind the prompt; `None` is causal attention."""
        n = len(ids)
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        causal = (j <= i).expand(HEADS, n, n)
        kinds = getattr(self.model.config, "layer_types", None) or ["full_attention"] * LAYERS
        slides = [kind == "sliding_attention" for kind in kinds]
        keeps = [causal & (i - j < self.model.config.sliding_window) if each else causal for each in slides]
        loaded = None if config is None else load(config)
        if loaded is not None and prompt_tokens >= loaded.dense_below_tokens:
            span = Span(0, n, n, prompt_tokens)
            resolved = loaded.resolve(ModelFacts(num_layers=LAYERS, num_heads=HEADS))
            for layer in resolved.layers:
                if slides[layer.layer]:
                    continue
                each = [x.keep(i, j, span) | ((i >= prompt_tokens) & (j <= i)) for x in layer.patterns]  # type: ignore[attr-defined]
                keeps[layer.layer] = torch.stack([each[p] for p in layer.pattern_of_head])
        low = torch.finfo(torch.float32).min
        device = self.model.device
        self.masks = {
            at: torch.zeros(keep.shape).masked_fill(~keep, low)[None].to(device) for at, keep in enumerate(keeps)
        }
        with torch.inference_mode():
            logits = self.model(torch.tensor([list(ids)], device=device)).logits[0, prompt_tokens - 1 :]
        return logits.log_softmax(-1).cpu()


def largest_difference(reference: Reference, config: Any, given: Sequence[int], output: Any) -> float:
    """Of log probabilities, over the best 20 tokens of every step."""
    tokens = list(output.token_ids)
    want = reference.log_probabilities([*given, *tokens[:-1]], len(given), config)
    assert len(output.logprobs) == len(want) == len(tokens)
    return max(
        abs(want[step, int(token)].item() - one.logprob)
        for step, best in enumerate(output.logprobs)
        for token, one in best.items()
    )
