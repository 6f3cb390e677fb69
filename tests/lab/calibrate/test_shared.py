"""Layers below the first sparse one run once: the same bits as running them each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fp8_row import half, runs_here

from sparsekit import load
from sparsekit.lab.calibrate.effects import Judge
from sparsekit.lab.calibrate.probe import own_layers
from sparsekit.lab.calibrate.prompts import make_prompts
from sparsekit.lab.tasks import Sample, Task
from sparsekit.models import tiny
from sparsekit.patterns import parse_pattern

TRIANGLE = parse_pattern({"name": "triangle", "sink_tokens": 4, "window_tokens": 64, "last_tokens": 16})


class Numbers:
    """A tokenizer of numbers, parted by blanks."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None) -> dict[str, Any]:
        ids = [int(word) for word in text.split()]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(str(int(i)) for i in ids)


@dataclass(frozen=True)
class Noise(Task):
    """Random tokens, and an answer of three."""

    def build(self, rng: Any, units: int) -> Sample:
        words = [str(rng.randrange(10, 250)) for _ in range(units)]
        return Sample(" ".join(words), ("7 8 9",))


def _judge(model: Any, tokens: tuple[int, ...] = (300, 420)) -> Judge:
    task = Noise("noise", max_new_tokens=1)
    return Judge(model, Numbers(), make_prompts(model, Numbers(), tasks=[task], tokens=tokens, count=3, seeds=[5]))


def _runs_of(layer: torch.nn.Module) -> list[int]:
    """Lengths of what its attention is given from now on."""
    seen: list[int] = []
    layer.self_attn.register_forward_pre_hook(  # type: ignore[union-attr, operator]
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "mixtral", "gpt_oss"])
def test_same_bits(model_type: str) -> None:
    windows = {"sliding_window": 64} if model_type == "gemma3_text" else {}
    model = tiny(model_type, initializer_range=0.1, **windows)
    shared, alone = _judge(model), _judge(model)
    alone._shared.layers = []
    for first in set(range(4)) - own_layers(model).keys():
        expected = alone.effect({first: TRIANGLE})
        got = shared.effect({first: TRIANGLE})
        assert (got.kl, got.score, got.same, got.tile_density) == (
            expected.kl, expected.score, expected.same, expected.tile_density
        )  # fmt: skip
        assert max(got.kl) > 0 or first == 3
    assert bool(shared._shared.layers) == (model_type in ("llama", "qwen3", "mixtral"))


def test_lower_layers_do_not_run() -> None:
    model = tiny("llama")
    judge = _judge(model)
    lowest, third = (_runs_of(model.model.layers[i]) for i in (0, 2))
    judge.effect({2: TRIANGLE, 3: TRIANGLE})
    dense = len(judge.prompts)
    # A prefill of each prompt when all is dense, none of layer 0 with the mixture; the answer's tokens both times.
    assert sum(n > 2 for n in lowest) == dense
    assert sum(n > 2 for n in third) == 2 * dense
    assert sum(n == 2 for n in lowest) == sum(n == 2 for n in third) == 2 * dense
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)
    judge.effect({0: TRIANGLE})
    assert sum(n > 2 for n in lowest) == 2 * dense


def test_another_precision_is_another_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its records are its own; here its output is half of what it should be."""
    runs_here(monkeypatch, half)
    judge = _judge(tiny("llama", initializer_range=0.1, head_dim=128))
    rules = {"layers": {"2-3": TRIANGLE.to_yaml()}}
    found = [judge.effect(load({**rules, "precision": word})).kl for word in ("model", "fp8", {"2": "fp8"}, {})]
    assert len(set(found)) == 3 and found[3] == found[0]
    found = [
        judge.effect(load({**rules, "dense_impl": "kernel", "precision": {"0": word}})).kl for word in ("model", "fp8")
    ]
    assert found[0] != found[1]


def test_no_more_than_there_is_room_for() -> None:
    model = tiny("llama")
    judge, free = _judge(model), _judge(model)
    free.effect({3: TRIANGLE})
    each = [kept.bytes for kept in free._shared._kept.values()]
    assert len(each) == len(judge.prompts) and min(each) > 0
    judge._shared.room = each[0] + each[1]
    assert judge.effect({3: TRIANGLE}).kl == free.effect({3: TRIANGLE}).kl
    assert 1 <= len(judge._shared._kept) < len(each)


def test_many_mixtures_need_room_for_one_prompt() -> None:
    """All of them run on a prompt before the next one."""
    model = tiny("llama", initializer_range=0.1)
    judge, apart, told = _judge(model), _judge(model), []
    apart.effect({3: TRIANGLE})
    judge._shared.room = max(kept.bytes for kept in apart._shared._kept.values())
    mixtures = [{3: TRIANGLE}, {2: TRIANGLE}, {1: TRIANGLE, 2: TRIANGLE}]
    lowest = _runs_of(model.model.layers[0])
    effects = judge.effects(mixtures, told.append)
    assert sum(n > 2 for n in lowest) == len(judge.prompts)
    assert told == [1] * len(judge.prompts) * len(mixtures)
    assert [effect.kl for effect in effects] == [apart.effect(mixture).kl for mixture in mixtures]
    assert len({effect.kl for effect in effects}) == len(mixtures)
