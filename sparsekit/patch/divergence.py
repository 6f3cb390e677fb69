"""How far the tokens that follow a prompt are from dense attention's: read, compared, and averaged over prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError
from sparsekit.patch.caches import cache_argument, cache_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Z95",
    "divergence",
    "end_of_prompt",
    "ends",
    "greedy",
    "logprobs",
    "mean_interval",
    "read_truth",
    "some",
    "standard_error",
]

Z95 = 1.959964  # two-sided 95% quantile of the normal distribution


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats a token, of float64 log-probabilities (A, vocabulary) at the same A tokens."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def logprobs(logits: Tensor) -> Tensor:
    """float64 (A, vocabulary), of logits (1, A, vocabulary).

    In float64: a divergence of 1e-7 nats, which a good mixture shows, is float32's rounding.
    """
    return logits[0].double().log_softmax(-1)


def end_of_prompt(model: PreTrainedModel, output: Any) -> tuple[Tensor, Any]:
    """Logits (1, vocabulary) of the token after a prompt, and its cache, of what `model` returned for it.

    Raises:
        SparsekitError: one of them is missing; recurrent models may keep their state elsewhere.
    """
    cache = cache_of(output)
    for found, what in (
        (getattr(output, "logits", None), "no logits: give the model with its language head"),
        (cache, "no cache"),
    ):
        if found is None:
            raise SparsekitError(
                f"{type(model).__name__} returns {what}; the tokens that follow a prompt cannot be compared."
            )
    return output.logits[:, -1], cache


def read_truth(model: PreTrainedModel, first: Tensor, cache: Any, truth: Tensor) -> Tensor:
    """Logits (1, A, vocabulary) at the A tokens of `truth` after a prefill, whose cache grows by A - 1."""
    logits, tokens = [first[:, None]], truth[:, :-1]
    if tokens.shape[1]:
        for part in tokens.split(tokens.shape[1] if _reads_on(cache) else 1, 1):
            rest: Any = model(part, **cache_argument(model, cache), use_cache=True)
            logits.append(rest.logits)
    return torch.cat(logits, 1)


def _reads_on(cache: Any) -> bool:
    """Whether a model reads several tokens at once from a cache: recurrent layers may start anew there, as Jamba's."""
    from transformers.cache_utils import DynamicLayer

    return all(isinstance(layer, DynamicLayer) for layer in getattr(cache, "layers", [None]))


def greedy(
    model: PreTrainedModel,
    logits: Tensor,
    cache: Any,
    count: int,
    done: Callable[[list[int]], bool],
    draft: Sequence[int] = (),
) -> list[int]:
    """Up to `count` greedy tokens that follow a prefill, whose cache grows by them; fewer where `done(tokens)`.

    The first are `draft`, which the cache has already; `logits` (1, vocabulary) are of the next.
    """
    stop = ends(model)
    tokens = list(draft)
    while len(tokens) < count:
        tokens.append(int(logits.argmax(-1)))
        if tokens[-1] in stop or len(tokens) == count or done(tokens):
            break
        step: Any = model(
            torch.tensor([tokens[-1:]], dtype=torch.int64, device=model.device),
            **cache_argument(model, cache),
            use_cache=True,
        )
        logits = step.logits[:, -1]
    return tokens


def ends(model: PreTrainedModel) -> set[Any]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set(ends) if isinstance(ends, list) else {ends}


# ---- over prompts


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95% interval by the normal distribution); the width of one value is infinite."""
    return mean(some(values)), Z95 * standard_error(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; infinite of one value."""
    n, centre = len(some(values)), sum(values) / len(values)
    return math.inf if n < 2 else math.sqrt(sum((value - centre) ** 2 for value in values) / (n - 1) / n)


def some(values: Sequence[float]) -> Sequence[float]:
    if not values:
        raise SparsekitError("there are no measurements to take a mean of.")
    return values
