"""Task, Sample, and the registry: a task makes prompts of a given length with known answers, and scores predictions.

>>> from sparsekit.lab.tasks import prompt_ids, task
>>> needle = task("needle4")
>>> [sample] = needle.samples(tokenizer, tokens=2048, count=1, seed=0)
>>> prompt_ids(tokenizer, sample).shape[1] + needle.max_new_tokens <= 2048
True
>>> needle.score(f" {sample.answers[0]}.", sample)
1.0
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Sample", "Task", "prompt_ids", "prompt_text", "recall", "register", "task", "task_names"]

_REGISTRY: dict[str, Task] = {}

SHORTFALL = 0.01  # of the budget: a prompt that stays further below it is filled up, where the task can be

THREADS_FROM_TOKENS = 4096  # of a prompt: shorter ones are made sooner than threads start

_PROBE_UNITS = 64  # filler units from which the tokens of one unit are estimated; any number gives the same samples


@dataclass(frozen=True)
class Sample:
    """One prompt with its answers.

    Attributes:
        prompt: what the user says, without chat template.
        answers: all of them are to be found in the prediction.
        answer_prefix: the answer's first words, given to the model; the prediction goes on from there.
        depth: where the fact asked for stands, from 0 (start) to 1 (end of the text).
        meta: what else a report may want to know.
        raw: the model reads the prompt as it is, without chat template and answer prefix.
    """

    prompt: str
    answers: tuple[str, ...]
    answer_prefix: str = ""
    depth: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False

    def __post_init__(self) -> None:
        if not self.answers or not all(self.answers):
            raise SparsekitError(f"answers = {self.answers!r}: at least one, and none empty (any text contains it).")


@dataclass(frozen=True)
class Task(ABC):
    """A kind of prompt. A subclass says how to `build` one of a given size; sizing, seeding and scoring are done here.

    Attributes:
        name: in the registry, in configs and in reports.
        max_new_tokens: tokens the answer may take; they count towards the budget.
        metric: what `score` is: "recall" (share of the answers found), "word" (the answer is a word of the prediction),
            or "nll" (nothing is decoded; the negative log-likelihood of the true continuation).
    """

    name: str
    max_new_tokens: int
    metric: ClassVar[str] = "recall"

    @abstractmethod
    def build(self, rng: Random, units: int) -> Sample:
        """A sample with `units` units of filler. What is drawn from `rng` must not depend on `units`."""

    def at(self, tokens: int) -> Task:
        """This task as it is at that length: some recipes depend on it. Default: the same at every length."""
        return self

    def over(self, corpus: str | None) -> Task:
        """This task over a corpus (see `sparsekit.lab.tasks.corpus`), where it reads one. Default: it reads none."""
        return self

    def filled(self, sentences: int) -> Task | None:
        """This task with so many short noise sentences beside its filler, or None where its units are short already."""
        return None

    def samples(self, tokenizer: PreTrainedTokenizerBase, *, tokens: int, count: int, seed: int) -> list[Sample]:
        """`count` samples, each the longest whose prompt and answer fit `tokens`, chat template and prefix included.

        Sample i depends on (name, seed, i) and the tokenizer alone, not on `count`.
        """
        if count < 0:
            raise SparsekitError(f"{self.name}: count = {count} must not be negative.")
        sized = self.at(tokens)

        def made(index: int) -> Sample:
            return sized._fitted(tokenizer, tokens, f"{self.name} {seed} {index}")

        if count < 2 or tokens < THREADS_FROM_TOKENS:
            return [made(index) for index in range(count)]
        with ThreadPoolExecutor(min(count, os.cpu_count() or 1)) as pool:  # the tokenizer, in Rust, takes the time
            return list(pool.map(made, range(count)))

    def score(self, prediction: str, sample: Sample) -> float:
        """From 0 to 1: the share of the answers found in the prediction."""
        return recall(prediction, sample.answers)

    def _fitted(self, tokenizer: PreTrainedTokenizerBase, tokens: int, key: str) -> Sample:
        def used(kind: Task, units: int) -> int:
            return prompt_ids(tokenizer, kind.build(Random(key), units)).shape[1] + self.max_new_tokens

        def largest(size: Callable[[int], int]) -> int:
            least = size(0)
            per_unit = max(1.0, (size(_PROBE_UNITS) - least) / _PROBE_UNITS)
            return _largest_fit(size, tokens, guess=int((tokens - least) / per_unit))

        least = used(self, 0)
        if least > tokens:
            raise SparsekitError(f"{self.name}: tokens = {tokens} is too small; the shortest prompt needs {least}.")
        units = largest(lambda n: used(self, n))
        if self.filled(0) is None or tokens - used(self, units) <= SHORTFALL * tokens:
            return self.build(Random(key), units)
        sentences = largest(lambda n: used(self.filled(n) or self, units))
        return (self.filled(sentences) or self).build(Random(key), units)


def prompt_text(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    """What the model reads: the prompt in the tokenizer's chat template, if it has one, and the answer prefix."""
    if sample.raw:
        return sample.prompt
    if not tokenizer.chat_template:
        return f"{sample.prompt} {sample.answer_prefix}".rstrip()
    turn = [{"role": "user", "content": sample.prompt}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return f"{text}{sample.answer_prefix}"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Tensor:
    """`prompt_text` as token ids, int64 (1, tokens). A chat template writes its special tokens itself."""
    text = prompt_text(tokenizer, sample)
    ids = tokenizer(text, add_special_tokens=sample.raw or not tokenizer.chat_template)["input_ids"]
    return torch.tensor([ids], dtype=torch.int64)


def recall(prediction: str, answers: tuple[str, ...]) -> float:
    """The share of `answers` that `prediction` contains, upper and lower case alike: RULER's `string_match_all`."""
    found = [answer.lower() in prediction.lower() for answer in answers]
    return sum(found) / len(found)


def register(new: Task) -> Task:
    """Make a task known by its name, and return it."""
    if new.name in _REGISTRY:
        raise SparsekitError(f"task name {new.name!r} is taken by {_REGISTRY[new.name]}.")
    _REGISTRY[new.name] = new
    return new


def task(name: str, corpus: str | None = None) -> Task:
    """The registered task of that name, over `corpus` where it reads one."""
    if name not in _REGISTRY:
        raise SparsekitError(f"unknown task {name!r}: one of {', '.join(_REGISTRY)}.{nearest(name, _REGISTRY)}")
    return _REGISTRY[name].over(corpus)


def task_names() -> tuple[str, ...]:
    """All registered names."""
    return tuple(_REGISTRY)


def _largest_fit(size: Callable[[int], int], budget: int, guess: int) -> int:
    """The largest n >= 0 with `size(n) <= budget`, for a growing `size` with `size(0) <= budget`.

    Two guesses by proportion, steps of doubling width away from there, then bisection: few calls where units are alike.
    """
    size = cache(size)
    for _ in range(2):
        guess = guess * budget // max(size(guess), 1)
    step = 1
    if size(guess) <= budget:
        low, high = guess, guess + step
        while size(high) <= budget:
            step *= 2
            low, high = high, high + step
    else:
        low, high = max(0, guess - step), guess
        while low > 0 and size(low) > budget:
            step *= 2
            low, high = max(0, low - step), low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle)
    return low
