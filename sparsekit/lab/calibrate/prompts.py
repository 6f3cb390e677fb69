"""The prompts that a model is calibrated on: tasks of known answer, at given lengths, from several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError
from sparsekit.lab.provenance import content_key
from sparsekit.lab.tasks import Sample, Task, prompt_ids, task
from sparsekit.patch.model import check_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TASKS", "Prompt", "ask", "make_prompts"]

TASKS = ("needle4", "passkey")  # one asks for a fact among like ones, the other for the only one


@dataclass(frozen=True)
class Prompt:
    """A sample, and all that says which one it is: task, budget in tokens, seed and index; and what it holds.

    Attributes:
        content: digest of the ids that the model reads, of the answers, and of how many tokens one may take.
    """

    task: Task
    sample: Sample
    tokens: int
    seed: int
    index: int
    content: str

    @property
    def key(self) -> dict[str, Any]:
        where = {"task": self.task.name, "tokens": self.tokens, "seed": self.seed, "index": self.index}
        return {**where, "content": self.content}


def make_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str | Task],
    tokens: Sequence[int],
    count: int,
    seeds: Sequence[int],
) -> list[Prompt]:
    """`count` prompts, dealt in turn to every combination of length, task and seed.

    Args:
        tasks: names, or tasks.
        tokens: budgets of prompt and answer together.

    Raises:
        SparsekitError: a length beyond the model's positions, an unknown task, or nothing to deal.
    """
    kinds = [task(kind) if isinstance(kind, str) else kind for kind in tasks]
    if count < 1 or not kinds or not tokens or not seeds:
        raise SparsekitError(f"samples = {count}, with {len(kinds)} tasks, {len(tokens)} lengths: want at least one.")
    for length in tokens:
        check_positions(model, length)
    places = [(seed, kind, length) for seed in seeds for kind in kinds for length in tokens]
    out = []
    for at, (seed, kind, length) in enumerate(places):
        share = len(range(at, count, len(places)))
        found = kind.samples(tokenizer, tokens=length, count=share, seed=seed)
        for index, sample in enumerate(found):
            read = [prompt_ids(tokenizer, sample)[0].tolist(), sample.answers, kind.max_new_tokens, kind.metric]
            out.append(Prompt(kind, sample, length, seed, index, content_key(read)))
    return sorted(out, key=lambda prompt: (prompt.index, prompt.tokens))


def ask(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> tuple[Tensor, int]:
    """(prompt ids (N,), the first token of the true answer that says something).

    Tokens of white space before it join the prompt: some tokenizers write " 348" as " ", "3", "4", "8", and the blank
    needs no retrieval.
    """
    ids: list[int] = tokenizer(f" {sample.answers[0]}", add_special_tokens=False)["input_ids"]
    blank = next((n for n, token in enumerate(ids) if str(tokenizer.decode([token])).strip()), len(ids) - 1)
    prompt = prompt_ids(tokenizer, sample)[0]
    return torch.cat([prompt, torch.tensor(ids[:blank], dtype=torch.int64)]), ids[blank]
