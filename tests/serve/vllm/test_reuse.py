"""A real engine whose layers reuse a plan computes what transformers computes under the same config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from test_engine import HEAD, ROUNDING, generate, report
from tiny_llama import prompt
from torch import Tensor

import sparsekit

CHOOSES = "{name: block_topk, top_k: 3, force_sink: false}"
SHARED = HEAD + f"layers: {{'0': {CHOOSES}, '1': {{reuse: 0, heads: [7, 1, 1, 0, 4, 4, 6, 2]}}}}\n"
ALONE = HEAD + f"layers: {{'0-1': {CHOOSES}}}\n"


@torch.inference_mode()
def _log_probabilities(model: Any, config: str, given: Sequence[int], answer: Sequence[int]) -> Tensor:
    """(n, vocabulary) of an answer's tokens behind a prompt, which is read in one piece."""
    with sparsekit.apply(model, config):
        out = model(torch.tensor([list(given)]), use_cache=True)
        rows = [out.logits[:, -1:]]
        if len(answer) > 1:
            more = model(torch.tensor([list(answer[:-1])]), past_key_values=out.past_key_values)
            rows.append(more.logits)
    return torch.cat(rows, 1)[0].log_softmax(-1)


def test_requests_of_one_step_reuse_their_own_plans(start: Callable[..., Any], llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    llm = start({"configs": {"shared": SHARED, "alone": ALONE}, "default": "shared"}, max_num_batched_tokens=4096)
    prompts = [prompt(n, seed=n) for n in (700, 1100, 900)]
    names = ["shared", "alone", "shared"]
    for ids, name, output in zip(prompts, names, generate(llm, prompts, names), strict=True):
        tokens = list(output.outputs[0].token_ids)
        want = {text: _log_probabilities(model, text, ids, tokens) for text in (SHARED, ALONE)}
        off = {
            text: max(
                abs(rows[step, int(token)].item() - one.logprob)
                for step, best in enumerate(output.outputs[0].logprobs)
                for token, one in best.items()
            )
            for text, rows in want.items()
        }
        mine, other = (SHARED, ALONE) if name == "shared" else (ALONE, SHARED)
        assert off[mine] < ROUNDING < off[other], off
    layers = report(llm)["configs"]["shared"]["layers"]
    assert layers["1"]["patterns"].startswith("the plan of layer 0: block_topk(")
    assert layers["0"]["chunks"] == layers["1"]["chunks"] == 2
