"""Models and options beyond a plain Llama, in a real engine: soft-cap, learned sinks, sliding layers, LoRA, drafts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import CONFIGS, HEAD, ROUNDING, A, T, generate, report
from tiny_llama import (
    Reference,
    largest_difference,
    merge_adapter,
    prompt,
    save_adapter,
    save_tiny_gemma2,
    save_tiny_gpt_oss,
)

ALL = HEAD + f"default: {T}\nlayers: {{'1': {A}}}\n"


def _uncap(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None


def _no_sinks(model: Any) -> None:
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-1e4)


@pytest.mark.parametrize(("save", "without"), [(save_tiny_gemma2, _uncap), (save_tiny_gpt_oss, _no_sinks)])
def test_soft_cap_sinks_and_sliding_layers(
    start: Callable[..., Any], tmp_path: Path, save: Callable[[Path], Path], without: Callable[[Any], None]
) -> None:
    """The sliding layers stay vLLM's and are said so; the others run their pattern, soft-cap and sinks with it."""
    folder = save(tmp_path)
    reference = Reference(folder, "eager")
    llm = start({"configs": {"all": ALL}, "default": "all"}, model=folder, max_model_len=2048)
    prompts = [prompt(n, seed=n) for n in (900, 300)]
    outputs = generate(llm, prompts, [None, None])
    for ids, output in zip(prompts, outputs, strict=True):
        assert largest_difference(reference, ALL, ids, output.outputs[0]) < ROUNDING
    assert largest_difference(reference, None, prompts[0], outputs[0].outputs[0]) > 10 * ROUNDING
    layers = report(llm)["configs"]["all"]["layers"]
    assert list(layers) == ["1"]
    assert layers["1"]["patterns"].startswith("a_shape(")
    assert layers["1"]["rows"] == sum(map(len, prompts))
    without(reference.model)
    assert largest_difference(reference, ALL, prompts[0], outputs[0].outputs[0]) > 10 * ROUNDING


def test_an_adapter_changes_what_the_patterns_read(
    start: Callable[..., Any], llama: Path, reference: Reference, tmp_path: Path
) -> None:
    """A server's requests with a LoRA adapter, and without one."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    folder = save_adapter(tmp_path)
    adapted = Reference(llama)
    merge_adapter(adapted.model, folder)
    llm = start(CONFIGS["triangle"], enable_lora=True, max_lora_rank=8)
    prompts = [prompt(n, seed=n) for n in (700, 900)]
    params = SamplingParams(max_tokens=6, temperature=0, detokenize=False, logprobs=20, ignore_eos=True)
    for request, of, other in ((LoRARequest("a", 1, str(folder)), adapted, reference), (None, reference, adapted)):
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False, lora_request=request
        )
        for ids, output in zip(prompts, outputs, strict=True):
            assert largest_difference(of, CONFIGS["triangle"], ids, output.outputs[0]) < ROUNDING
            assert largest_difference(other, CONFIGS["triangle"], ids, output.outputs[0]) > 10 * ROUNDING


def test_drafts_are_verified_by_vllm(
    start: Callable[..., Any], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speculative decoding: rows that verify a draft are no chunks of a prompt, and what is said is the same."""
    from vllm.v1.core.sched.scheduler import Scheduler

    drafted: list[int] = []
    schedule = Scheduler.schedule

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = schedule(self, *args, **kwargs)
        drafted.extend(len(tokens) for tokens in output.scheduled_spec_decode_tokens.values())
        return output

    monkeypatch.setattr(Scheduler, "schedule", noted)
    spoken = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    llm = start(CONFIGS["triangle"], speculative_config=spoken)
    prompts = [prompt(60, seed=7) * 10, prompt(800, seed=8)]
    outputs = generate(llm, prompts, [None, None], tokens=24)
    assert sum(drafted) > 20
    for ids, output in zip(prompts, outputs, strict=True):
        said = output.outputs[0]
        assert largest_difference(reference, CONFIGS["triangle"], ids, said) < ROUNDING
        want = reference.log_probabilities([*ids, *said.token_ids[:-1]], len(ids), CONFIGS["triangle"])
        assert want.argmax(-1).tolist() == list(said.token_ids)
    layer = report(llm)["configs"]["default"]["layers"]["0"]
    assert layer["rows"] == sum(len(ids) - 32 for ids in prompts)
