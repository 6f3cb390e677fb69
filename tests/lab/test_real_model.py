"""SmolLM2-135M-Instruct, for real: it finds the fact after a sparse prefill, through generate and pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, pipeline

import sparsekit
from sparsekit.lab.evaluate import answer, kl_divergence
from sparsekit.lab.tasks import prompt_ids, task

Smol = tuple[PreTrainedModel, PreTrainedTokenizerBase]
ROOT = Path(__file__).parents[2]
CONFIG = {"layers": {"21-29": "triangle"}}


@torch.inference_mode()
def test_passkey_as_dense_and_divergence_small(smollm2: Smol) -> None:
    """1K tokens: the same answer as dense; triangle in the deep layers diverges less than streaming everywhere."""
    model, tokenizer = smollm2
    passkey = task("passkey")
    [sample] = passkey.samples(tokenizer, tokens=1000, count=1, seed=3)
    dense = answer(model, tokenizer, passkey, sample)
    with sparsekit.apply(model, CONFIG) as handle:
        mix = answer(model, tokenizer, passkey, sample)
        rows = handle.report().layers
    with sparsekit.apply(model, {"default": "a_shape"}):
        streaming = answer(model, tokenizer, passkey, sample)
    assert dense.score == mix.score == 1.0
    assert [row.ran for row in rows] == ["dense"] * 21 + ["sparse"] * 9
    assert kl_divergence(dense, dense) == 0
    assert kl_divergence(dense, mix) < 0.02
    assert kl_divergence(dense, mix) < kl_divergence(dense, streaming) / 3
    again = answer(model, tokenizer, passkey, sample)
    assert torch.equal(again.logprobs, dense.logprobs)


def test_generate_64_tokens_and_pipeline(smollm2: Smol) -> None:
    model, tokenizer = smollm2
    [sample] = task("passkey").samples(tokenizer, tokens=600, count=1, seed=1)
    ids = prompt_ids(tokenizer, sample)
    with sparsekit.apply(model, CONFIG) as handle, torch.inference_mode():
        tokens = model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)
        assert tokens.shape[1] == ids.shape[1] + 64
        assert sample.answers[0] in tokenizer.decode(tokens[0, ids.shape[1] :])
        assert handle.report().layers[29].ran == "sparse"
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        [said] = pipe(tokenizer.decode(ids[0]), max_new_tokens=16, do_sample=False, return_full_text=False)
    assert sample.answers[0] in said["generated_text"]


@torch.inference_mode()
def test_apply_then_remove_is_bitwise(smollm2: Smol) -> None:
    model, _ = smollm2
    ids = torch.arange(100, 400)[None]
    before = model(ids).logits
    handle = sparsekit.apply(model, {"default": {"name": "triangle", "window_tokens": 32, "last_tokens": 16}})
    assert not torch.equal(model(ids).logits, before)
    handle.remove()
    assert torch.equal(model(ids).logits, before)


def test_a_config_for_another_model(smollm2: Smol) -> None:
    with pytest.raises(sparsekit.SparsekitError, match=r"num_layers = 32 .*but the model has 30"):
        sparsekit.apply(smollm2[0], ROOT / "configs/llama-3.1-8b/trianglemix.yaml")
