"""How a model answers a prompt of known answer: time to first token, greedy text, and what decoding sees.

The answer is decoded after the prefill, densely, as in use; so a sparse prefill is judged by the keys and values it
left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.tasks import Sample, Task, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Answer", "answer", "kl_divergence", "mean_interval", "share_interval"]

Z95 = 1.959964  # two-sided 95% quantile of the normal distribution


@dataclass(frozen=True)
class Answer:
    """One prompt, answered.

    Attributes:
        text: what greedy decoding gives.
        score: the task's, of `text`, from 0 to 1.
        ttft_s: seconds from the prompt's ids to the first token's logits, planning included.
        tokens: length of the prompt.
        logprobs: float64 (A, vocabulary), log-probabilities at the A tokens of the true answer, teacher-forced.
    """

    text: str
    score: float
    ttft_s: float
    tokens: int
    logprobs: Tensor


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, sample: Sample) -> Answer:
    """Prefill the prompt once; decode greedily from it; then, from the same prefill, read the true answer's tokens."""
    ids = prompt_ids(tokenizer, sample).to(model.device)
    _synchronize(model.device)
    start = time.perf_counter()
    prefill: Any = model(ids, use_cache=True, logits_to_keep=1)
    _synchronize(model.device)
    seconds = time.perf_counter() - start

    first, cache = prefill.logits[:, -1], prefill.past_key_values
    text = str(tokenizer.decode(_greedy(model, first, cache, task.max_new_tokens), skip_special_tokens=True))
    decoded = cache.get_seq_length() - ids.shape[1]
    if decoded:
        cache.crop(-decoded)
    truth = tokenizer(f" {sample.answers[0]}", add_special_tokens=False, return_tensors="pt")["input_ids"].to(
        model.device
    )
    logits = first[:, None]
    if truth.shape[1] > 1:
        rest: Any = model(truth[:, :-1], past_key_values=cache, use_cache=True)
        logits = torch.cat([logits, rest.logits], 1)
    # In float64: a divergence of 1e-7 nats, which a good mixture shows, is float32's rounding.
    logprobs = logits[0].double().log_softmax(-1)
    return Answer(text, task.score(text, sample), seconds, ids.shape[1], logprobs)


def _greedy(model: PreTrainedModel, logits: Tensor, cache: Any, count: int) -> list[int]:
    """Up to `count` greedy tokens that follow a prefill, whose cache grows by them."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    stop = set(ends) if isinstance(ends, list) else {ends}
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(logits.argmax(-1)))
        if tokens[-1] in stop or len(tokens) == count:
            break
        step: Any = model(torch.tensor([tokens[-1:]], device=model.device), past_key_values=cache, use_cache=True)
        logits = step.logits[:, -1]
    return tokens


def kl_divergence(dense: Answer, other: Answer) -> float:
    """KL(dense || other) in nats a token, over the tokens of the true answer."""
    p = dense.logprobs
    return float((p.exp() * (p - other.logprobs)).sum(-1).mean())


def share_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95% Wilson interval of a share, from scores of 0 to 1."""
    n, mean = len(scores), sum(scores) / len(scores)
    centre, spread = mean + Z95**2 / (2 * n), Z95 * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n * n))
    scale = 1 + Z95**2 / n
    return mean, max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95% interval by the normal distribution); the width of one value is infinite."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, math.inf
    return mean, Z95 * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
