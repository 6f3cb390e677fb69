"""One prompt, read and answered: text, score, time to first token, and the log-probabilities of the true answer.

The answer is decoded after the prefill, densely, as in use; so a sparse prefill is judged by the keys and values it
left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError
from sparsekit.lab.tasks import Sample, Task, prompt_ids
from sparsekit.models import can_shorten
from sparsekit.patch import Handle, LayerReport
from sparsekit.patch.caches import cache_argument
from sparsekit.patch.capture import wrap_attention
from sparsekit.patch.divergence import divergence, end_of_prompt, ends, greedy, logprobs, read_truth

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Answer", "Reading", "answer", "answer_together", "kl_divergence", "read_on"]

LAST_ROWS = 128  # of a prompt, judged apart from those before: what patterns with dense last rows keep
EARLIER_ROWS = 512
TOGETHER_BYTES = 16 << 30  # keys and values of prompts that are decoded together


@dataclass(frozen=True)
class Answer:
    """One prompt, answered.

    Attributes:
        text: what greedy decoding gives.
        score: the task's, of `text`, from 0 to 1; not a number of a task that scores no text.
        ttft_s: seconds from the prompt's ids to the first token's logits, planning included.
        tokens: length of the prompt.
        logprobs: float64 (A, vocabulary), log-probabilities at the A tokens of the true answer, teacher-forced.
        layers: what each layer did with the prompt; empty without a handle.
    """

    text: str
    score: float
    ttft_s: float
    tokens: int
    logprobs: Tensor
    layers: tuple[LayerReport, ...] = ()


@dataclass(frozen=True)
class Reading:
    """Negative log-likelihoods in nats a token: of a prompt's continuation, and of the prompt's own rows.

    Attributes:
        nll: of the continuation, decoded densely after the prefill.
        last_rows: of the prompt's last 128 rows.
        earlier_rows: of the 512 rows before those; None where there are none.
        tokens: length of the prompt.
        layers: what each layer did with the prompt; empty without a handle.
    """

    nll: float
    last_rows: float
    earlier_rows: float | None
    tokens: int
    layers: tuple[LayerReport, ...] = ()


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    sample: Sample,
    *,
    handle: Handle | None = None,
    stop_when_found: bool = False,
) -> Answer:
    """Prefill the prompt once; decode greedily from it; then, from the same prefill, read the true answer's tokens.

    Args:
        handle: of a patched model: it is paused once the prompt is read, however long the answer is.
        stop_when_found: stop decoding when every answer was found, where further text cannot change the score; and
            take the true answer's tokens as a draft, which is kept as far as each is the likeliest.
    """
    ids, truth, first, cache, seconds, layers = _prefilled(model, tokenizer, sample, handle)
    spare = None if can_shorten(cache) else deepcopy(cache)

    def text_of(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    def found(tokens: list[int]) -> bool:
        return stop_when_found and task.metric == "recall" and task.score(text_of(tokens), sample) == 1

    with nullcontext() if handle is None else handle.pause():
        if stop_when_found and spare is None:
            logits = read_truth(model, first, cache, truth)
            same = (logits[0].argmax(-1) == truth[0]).cumprod(0)
            kept = min(int(same.sum()), truth.shape[1] - 1, task.max_new_tokens - 1)
            _shorten(cache, ids.shape[1] + kept)
            draft = truth[0, :kept].tolist()
            text = text_of(greedy(model, logits[:, kept], cache, task.max_new_tokens, found, draft))
        else:
            text = text_of(greedy(model, first, cache, task.max_new_tokens, found))
            if spare is None:
                _shorten(cache, ids.shape[1])
            logits = read_truth(model, first, cache if spare is None else spare, truth)
    return Answer(text, _score(task, text, sample), seconds, ids.shape[1], logprobs(logits), layers)


@torch.inference_mode()
def answer_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    samples: Sequence[Sample],
    *,
    handle: Handle | None = None,
) -> list[Answer]:
    """`answer` of each sample, until its answers are found: prefills one after another, then one decoding of all.

    A step of decoding costs a GPU the same for 24 prompts as for one. Shorter prompts are padded on the left, so the
    logits differ by rounding from those of `answer`. Where a cache is not plain (windows, recurrent layers), each
    sample is decoded alone.
    """
    found: list[Answer] = []
    waiting: list[tuple[Sample, Answer, Tensor, Any]] = []

    def decode() -> None:
        with nullcontext() if handle is None else handle.pause():
            rows = _greedy_together(model, tokenizer, task, waiting)
        for (sample, one, _, _), tokens in zip(waiting, rows, strict=True):
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            found.append(replace(one, text=text, score=_score(task, text, sample)))
        waiting.clear()

    used = 0
    for sample in samples:
        ids, truth, first, cache, seconds, layers = _prefilled(model, tokenizer, sample, handle)
        if not can_shorten(cache):
            if waiting:  # answers are in the samples' order
                decode()
                used = 0
            found.append(answer(model, tokenizer, task, sample, handle=handle, stop_when_found=True))
            continue
        with nullcontext() if handle is None else handle.pause():
            logits = read_truth(model, first, cache, truth)
        _shorten(cache, ids.shape[1])
        bytes_each = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        if waiting and used + bytes_each > TOGETHER_BYTES:
            decode()
            used = 0
        used += bytes_each
        waiting.append((sample, Answer("", 0.0, seconds, ids.shape[1], logprobs(logits), layers), first, cache))
    if waiting:
        decode()
    return found


def _prefilled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, handle: Handle | None
) -> tuple[Tensor, Tensor, Tensor, Any, float, tuple[LayerReport, ...]]:
    """(prompt ids, tokens of the true answer, logits (1, vocabulary) of the next token, cache, seconds, layers)."""
    ids = prompt_ids(tokenizer, sample).to(model.device)
    truth: Tensor = tokenizer(f" {sample.answers[0]}", add_special_tokens=False, return_tensors="pt")["input_ids"]
    _synchronize(model.device)
    start = time.perf_counter()
    prefill: Any = model(ids, use_cache=True, logits_to_keep=1)
    _synchronize(model.device)
    seconds = time.perf_counter() - start
    layers = () if handle is None else handle.report().layers
    return ids, truth.to(model.device), *end_of_prompt(model, prefill), seconds, layers


def _score(task: Task, text: str, sample: Sample) -> float:
    """NaN of a text that is to be read on, not asked."""
    return math.nan if task.metric == "nll" else task.score(text, sample)


@torch.inference_mode()
def read_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    sample: Sample,
    *,
    handle: Handle | None = None,
) -> Reading:
    """Prefill the prompt as the model does now; then read its continuation with the model's own attention.

    Args:
        task: says how many tokens of the continuation are read.
        handle: of a patched model: it is paused for the continuation.
    """
    ids = prompt_ids(tokenizer, sample).to(model.device)
    n = ids.shape[1]
    if n < 2:
        raise SparsekitError(f"{task.name}: a prompt of {n} tokens has no row to judge; ask for more tokens.")
    kept = min(LAST_ROWS + EARLIER_ROWS, n)
    prefill: Any = model(ids, use_cache=True, logits_to_keep=kept)
    truth = tokenizer(f" {sample.answers[0]}", add_special_tokens=False, return_tensors="pt")["input_ids"]
    truth = truth[:, : task.max_new_tokens].to(model.device)
    layers = () if handle is None else handle.report().layers
    with nullcontext() if handle is None else handle.pause():
        logits = read_truth(model, *end_of_prompt(model, prefill), truth)[0]
    prompt = _nll(prefill.logits[0, :-1], ids[0, n - kept + 1 :])
    earlier = prompt[: -(LAST_ROWS - 1)]
    return Reading(
        nll=float(_nll(logits, truth[0]).mean()),
        last_rows=float(prompt[-(LAST_ROWS - 1) :].mean()),
        earlier_rows=float(earlier.mean()) if len(earlier) else None,
        tokens=n,
        layers=layers,
    )


def _nll(logits: Tensor, truth: Tensor) -> Tensor:
    """float32 (n,): -log p of each true token, of logits (n, vocabulary)."""
    return torch.nn.functional.cross_entropy(logits.float(), truth, reduction="none")


def _shorten(cache: Any, tokens: int) -> None:
    """Take off what a cache holds beyond its first `tokens`."""
    beyond = cache.get_seq_length() - tokens
    if beyond:
        cache.crop(-beyond)


def _greedy_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[tuple[Sample, Answer, Tensor, Any]],
) -> list[list[int]]:
    """Greedy tokens of prompts that were read one by one, each until it ends or its answers are found."""
    stop = ends(model)
    found: list[list[int]] = [[] for _ in rows]
    lengths = [one.tokens for _, one, _, _ in rows]
    cache, longest = _stacked([cache for *_, cache in rows]), max(lengths)
    logits = torch.cat([first for _, _, first, _ in rows])
    left = list(range(len(rows)))  # the rows of `cache` and `logits`

    def goes_on(i: int) -> bool:
        said = str(tokenizer.decode(found[i], skip_special_tokens=True))
        return found[i][-1] not in stop and not (task.metric == "recall" and task.score(said, rows[i][0]) == 1)

    for n in range(task.max_new_tokens):
        for i, token in zip(left, logits.argmax(-1).tolist(), strict=True):
            found[i].append(token)
        open_rows = [row for row, i in enumerate(left) if goes_on(i)]
        if not open_rows or n + 1 == task.max_new_tokens:
            break
        if len(open_rows) < len(left):
            cache.batch_select_indices(torch.tensor(open_rows, device=model.device))
            left = [left[row] for row in open_rows]
        padding = [longest - lengths[i] for i in left]  # on the left
        places = torch.arange(longest + n + 1, device=model.device)
        with wrap_attention(model, _EachRow(padding)):
            out: Any = model(
                torch.tensor([found[i][-1:] for i in left], device=model.device),
                attention_mask=(places >= torch.tensor(padding, device=model.device)[:, None]).long(),
                position_ids=torch.tensor([[lengths[i] + n] for i in left], device=model.device),
                use_cache=True,
                **cache_argument(model, cache),
            )
        logits = out.logits[:, -1]
    return found


class _EachRow:
    """Attention of one token a row, each row over its own keys: without padding, and without a mask that hides nothing.

    So a GPU reads a row's keys once. With a mask, PyTorch's attention copies grouped keys for every query head.
    """

    def __init__(self, padding: Sequence[int]) -> None:
        self.padding = padding
        self._seen: tuple[Tensor, list[Tensor | None]] | None = None  # a mask, and each row's where it hides a key

    def __call__(
        self, own: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        one_each = isinstance(mask, Tensor) and mask.dim() == 4 and len(mask) == len(q)  # FlexAttention's is no tensor
        if not one_each or kwargs.get("position_bias") is not None:
            out: tuple[Tensor, Tensor | None] = own(module, q, k, v, mask, **kwargs)
            return out
        if self._seen is None or self._seen[0] is not mask:  # layers share theirs
            masks = [mask[i : i + 1, ..., pad:] for i, pad in enumerate(self.padding)]
            hidden = torch.stack([(~one if one.dtype == torch.bool else one != 0).any() for one in masks]).tolist()
            self._seen = mask, [one if hides else None for one, hides in zip(masks, hidden, strict=True)]
        rows = [
            own(module, q[i : i + 1], k[i : i + 1, :, pad:], v[i : i + 1, :, pad:], one, **kwargs)[0]
            for i, (pad, one) in enumerate(zip(self.padding, self._seen[1], strict=True))
        ]
        return torch.cat(rows), None


def _stacked(caches: Sequence[Any]) -> Any:
    """One cache of prompts of different lengths, padded on the left; the single ones are emptied."""
    from transformers import DynamicCache

    longest, joined = max(cache.get_seq_length() for cache in caches), DynamicCache()

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, longest - x.shape[2], 0))

    for i in range(len(caches[0].layers)):
        layers = [cache.layers[i] for cache in caches]
        joined.update(torch.cat([padded(x.keys) for x in layers]), torch.cat([padded(x.values) for x in layers]), i)
        for layer in layers:
            layer.keys = layer.values = None
    return joined


def kl_divergence(dense: Answer, other: Answer) -> float:
    """KL(dense || other) in nats a token, over the tokens of the true answer."""
    return divergence(dense.logprobs, other.logprobs)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
