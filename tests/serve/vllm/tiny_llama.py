"""A tiny random Llama whose attention matters, and what transformers says of it under explicit masks."""

from __future__ import annotations

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


def save_tiny_llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS, head_dim=64, vocab_size=VOCABULARY, max_position_embeddings=65536,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, dtype=torch.float32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
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
        model.lm_head.weight.mul_(8)
    model.save_pretrained(folder)
    return folder


def prompt(tokens: int, seed: int = 1) -> list[int]:
    return torch.randint(3, VOCABULARY - 10, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


class Reference:
    """The model in transformers, each prompt alone, every layer and head under its own explicit mask."""

    def __init__(self, folder: Path) -> None:
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
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
        keeps = [causal] * LAYERS
        loaded = None if config is None else load(config)
        if loaded is not None and prompt_tokens >= loaded.dense_below_tokens:
            span = Span(0, n, n, prompt_tokens)
            resolved = loaded.resolve(ModelFacts(num_layers=LAYERS, num_heads=HEADS))
            for layer in resolved.layers:
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
