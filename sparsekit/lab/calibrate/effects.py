"""What a mixture does to the answers: the measurement that tuning and layer search share, kept in records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch

from sparsekit.config import LayerPatterns, SparseConfig, load
from sparsekit.config.settle import settle
from sparsekit.errors import SparsekitError
from sparsekit.lab.answers import Answer, answer, kl_divergence
from sparsekit.lab.calibrate.prompts import Prompt, make_prompts
from sparsekit.lab.calibrate.records import Records
from sparsekit.lab.calibrate.shared import SharedLayers
from sparsekit.lab.provenance import content_key, content_of_code, content_of_model, patterns_of
from sparsekit.lab.stats import standard_error
from sparsekit.lab.tasks import Task
from sparsekit.models import facts
from sparsekit.patch import Handle, apply
from sparsekit.patch.model import machine_of
from sparsekit.patterns import DynamicPattern, Pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Effect", "Judge", "judges"]


@dataclass(frozen=True)
class Effect:
    """A mixture against dense, one value a prompt in each list.

    Attributes:
        kl: KL of the true answer's tokens from dense, nats a token.
        score, dense_score: 1 where every token of the true answer is the likeliest one, as greedy decoding needs.
        same: 1 where the likeliest token is dense's at every place of the true answer.
        tile_density: of each sparse layer, mean over the longest prompts.
    """

    kl: tuple[float, ...]
    score: tuple[float, ...]
    dense_score: tuple[float, ...]
    same: tuple[float, ...]
    tile_density: dict[int, float]

    @property
    def mean_kl(self) -> float:
        return mean(self.kl)

    @property
    def kl_at_most(self) -> float:
        """The mean, plus its standard error; infinite of one prompt, which does not show how prompts differ."""
        return self.mean_kl + standard_error(self.kl)

    @property
    def lost(self) -> float:
        """Dense score - score, means."""
        return mean(self.dense_score) - mean(self.score)

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompts": len(self.kl),
            "kl": self.mean_kl,
            "kl_at_most": self.kl_at_most if len(self.kl) > 1 else None,
            "score": mean(self.score),
            "dense_score": mean(self.dense_score),
            "same": mean(self.same),
        }


class Judge:
    """Measures mixtures on fixed prompts.

    What is in the records is not measured again; dense layers below the first sparse one run once a prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        records: Records | str | Path | None = None,
    ) -> None:
        self.model, self.tokenizer, self.prompts = model, tokenizer, list(prompts)
        if not self.prompts:
            raise SparsekitError("there are no prompts to measure on.")
        self.records = records if isinstance(records, Records) else Records(records)
        self.measured = 0  # forwards that were really run, dense ones not counted
        self.facts = facts(model)
        self._content = content_of_model(model, tokenizer)
        self._dense: dict[str, Answer] = {}
        self._shared = SharedLayers(model)

    def effect(self, mixture: Mapping[int, Pattern] | SparseConfig) -> Effect:
        """Of a config, whose `dense_below_tokens` is not looked at, or of these layers with these patterns.

        Raises:
            SparsekitError: a layer that keeps its own attention, or a pattern that prompts of such a length run dense.
        """
        [effect] = self.effects([mixture])
        return effect

    def effects(
        self, mixtures: Sequence[Mapping[int, Pattern] | SparseConfig], told: Callable[[int], object] = lambda _: None
    ) -> list[Effect]:
        """`effect` of each, one prompt after another: so one prompt's dense run is kept at a time, for all of them.

        Args:
            told: called with 1 after each mixture on each prompt.
        """
        settled = [self._settled(mixture) for mixture in mixtures]
        rows: list[list[dict[str, Any]]] = [[] for _ in settled]
        for prompt in self.prompts:
            for (config, changed), of_mixture in zip(settled, rows, strict=True):
                of_mixture.append(self._row(config, changed, prompt))
                told(1)
            if len(settled) > 1:
                self._shared.drop(content_key(prompt.key))
        return [self._effect(changed, found) for (_, changed), found in zip(settled, rows, strict=True)]

    def _settled(self, mixture: Mapping[int, Pattern] | SparseConfig) -> tuple[SparseConfig, dict[int, LayerPatterns]]:
        """The config, and the layers that it makes sparse."""
        config = mixture if isinstance(mixture, SparseConfig) else _of_layers(mixture)
        config = config.model_copy(update={"dense_below_tokens": 0})
        resolved = settle(config.resolve(self.facts), self.facts, lambda: machine_of(self.model))
        own = resolved.own_layers(self.facts)
        changed = {p.layer: p for p in resolved.layers if p.layer not in own and not p.exact}
        for pattern in dict.fromkeys(pattern for layer in changed.values() for pattern in layer.patterns):
            self._check_length(pattern)
        return config, changed

    def _effect(self, changed: Mapping[int, LayerPatterns], rows: Sequence[dict[str, Any]]) -> Effect:
        longest = max(prompt.tokens for prompt in self.prompts)
        at_longest = [row for row, prompt in zip(rows, self.prompts, strict=True) if prompt.tokens == longest]
        tiles = {layer: mean(row["tile_density"][str(layer)] for row in at_longest) for layer in changed}
        return Effect(
            tuple(row["kl"] for row in rows),
            tuple(row["score"] for row in rows),
            tuple(row["dense_score"] for row in rows),
            tuple(row["same"] for row in rows),
            tiles,
        )

    def _check_length(self, pattern: Pattern) -> None:
        shortest = min(prompt.tokens for prompt in self.prompts)
        least = pattern.dense_below(self.model.device) if isinstance(pattern, DynamicPattern) else 0
        if shortest <= least:
            raise SparsekitError(
                f"{pattern} runs dense below {least} tokens on {self.model.device.type}, so prompts of {shortest} say "
                "nothing of it: take longer ones, or write `dense_below_tokens: 0` into the pattern."
            )

    def _row(self, config: SparseConfig, changed: Mapping[int, LayerPatterns], prompt: Prompt) -> dict[str, Any]:
        place = {"kind": "effect", "model": self._content, "device": self.model.device.type}
        code = content_of_code([prompt.task, *patterns_of(config)])
        layers = {str(number): layer.in_words for number, layer in changed.items()}
        key = {**place, "code": code, "prompt": prompt.key, "layers": layers}
        maps = {str(number): list(layer.reused.heads) for number, layer in changed.items() if layer.reused is not None}
        key |= {"of_head": maps} if maps else {}
        row: dict[str, Any] | None = self.records.get(key)
        return row if row is not None else self.records.add(key, self._measure(config, changed, prompt))

    def _measure(self, config: SparseConfig, changed: Mapping[int, LayerPatterns], prompt: Prompt) -> dict[str, Any]:
        dense = self._dense_answer(prompt)
        if not changed:
            score = self._exact(dense, prompt)
            return {"kl": 0.0, "score": score, "dense_score": score, "same": 1.0, "tile_density": {}}
        with apply(self.model, config) as handle, self._shared.from_layer(min(changed), content_key(prompt.key)):
            got = self._read(prompt, handle)
            rows = {row.layer: row for row in got.layers}
        idle = [layer for layer in changed if rows[layer].ran == "own"]
        if idle:
            raise SparsekitError(f"layer {idle[0]} keeps its own attention ({rows[idle[0]].why}): it cannot be sparse.")
        self.measured += 1
        return {
            "kl": max(kl_divergence(dense, got), 0.0),
            "score": self._exact(got, prompt),
            "dense_score": self._exact(dense, prompt),
            "same": float(torch.equal(got.logprobs.argmax(-1), dense.logprobs.argmax(-1))),
            "tile_density": {str(layer): rows[layer].tile_density for layer in changed},
            "ms": {str(layer): rows[layer].ms for layer in changed},
        }

    def _dense_answer(self, prompt: Prompt) -> Answer:
        key = content_key(prompt.key)
        if key not in self._dense:
            with self._shared.keep(key):
                self._dense[key] = self._read(prompt)
        return self._dense[key]

    def _read(self, prompt: Prompt, handle: Handle | None = None) -> Answer:
        """The answer's log-probabilities; nothing is decoded beyond the first token."""
        task = replace(prompt.task, max_new_tokens=1)
        return answer(self.model, self.tokenizer, task, prompt.sample, handle=handle)

    def _exact(self, got: Answer, prompt: Prompt) -> float:
        truth = self.tokenizer(f" {prompt.sample.answers[0]}", add_special_tokens=False)["input_ids"]
        return float(torch.equal(got.logprobs.argmax(-1).cpu(), torch.tensor(truth)))


def _of_layers(patterns: Mapping[int, Pattern]) -> SparseConfig:
    return load({"layers": {str(layer): patterns[layer].to_yaml() for layer in sorted(patterns)}})


def judges(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Task],
    *,
    tokens: Sequence[int],
    samples: int,
    seed: int = 0,
    records: Records | str | Path | None = None,
) -> dict[str, Judge]:
    """A judge for each task, by its name, over `samples` prompts of it dealt to the lengths."""
    kept = records if isinstance(records, Records) else Records(records)
    made = {}
    for kind in tasks:
        prompts = make_prompts(model, tokenizer, tasks=[kind], tokens=tokens, count=samples, seeds=[seed])
        made[prompts[0].task.name] = Judge(model, tokenizer, prompts, kept)
    return made
