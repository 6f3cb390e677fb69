"""What is checked of a request before vLLM has it; without vLLM."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sparsekit.config import ModelFacts
from sparsekit.serve.vllm.requests import _check_choice
from sparsekit.serve.vllm.settings import settings_of
from sparsekit.serve.vllm.steps import hook


class Refused(ValueError):
    """What vLLM's HTTP server answers with a 400."""


def test_a_choice_is_refused_before_its_answer_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """When `generate` is called, not when its answer is read: a stream's status has been sent by then."""

    class Client:
        def __init__(self, sparsekit: Any) -> None:
            self.input_processor = SimpleNamespace(sparsekit=sparsekit)

        async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[str]:
            yield f"{prompt} {request_id}"

    exceptions: Any = ModuleType("vllm.exceptions")
    exceptions.VLLMValidationError = Refused
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", exceptions)
    hook(Client, "generate", _check_choice)
    settings = settings_of("version: 1\ndefault: triangle\n", ModelFacts(num_layers=2, num_heads=2))
    wrong, right = (SimpleNamespace(extra_args={"sparsekit": name}) for name in ("fast", "off"))
    with pytest.raises(Refused, match=r"sparsekit='fast': this server has off, default\."):
        Client(settings).generate("a", wrong, "r")
    with pytest.raises(Refused, match=r"extra arguments: unknown field 'sparskit'\. Did you mean 'sparsekit'\?"):
        Client(settings).generate("a", SimpleNamespace(extra_args={"sparskit": "off"}), "r")
    for client, params in ((Client(settings), right), (Client(settings), None), (Client(None), wrong)):
        begun = client.generate("a", sampling_params=params, request_id="r")
        with pytest.raises(StopIteration) as said:
            begun.__anext__().send(None)
        assert said.value.value == "a r"
