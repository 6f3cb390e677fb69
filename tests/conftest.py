"""Models that many tests share. The real one is loaded once a session, and de-quantised once a machine.

Imports that take seconds stand in the fixtures: child processes of the kernel tests use none of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests reach no network; read when huggingface_hub is imported
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# With `-n`, pytest-xdist's workers share the cores, and so do the processes that their tests start: 14 of them with 16
# threads each spend their time on switching.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    threads = max((os.cpu_count() or 1) // workers, 1)
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

if TYPE_CHECKING:
    from fake_hub import FakeHub
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: no worker waits for another that began a long one last."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """The tree of commands is made once, as in a process of `sparsekit`; `CliRunner` makes it anew in every call."""
    if testing := sys.modules.get("typer.testing"):
        testing._get_command = cache(testing._get_command)


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer, in bfloat16, or in float32 where the CPU would emulate that."""
    from sparsekit import models

    return models.load("smollm2-135m", dtype=models.fast_dtype())


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """4 layers, 4 heads over 2 key heads, always the same weights; a new one for every test."""
    from sparsekit import models

    return models.tiny("llama")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty hub that `huggingface_hub` asks in place of the real one, with an empty cache and a token for it."""
    from fake_hub import TOKEN, FakeHub
    from huggingface_hub import constants

    with FakeHub() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.endpoint)
        template = fake.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield fake
        assert fake.unknown == []
