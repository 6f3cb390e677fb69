"""Models that many tests share. The real one is loaded once a session, and de-quantised once a machine."""

from __future__ import annotations

import os

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

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekit import models


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer, in bfloat16, or in float32 where the CPU would emulate that."""
    return models.load("smollm2-135m", dtype=models.fast_dtype())


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """4 layers, 4 heads over 2 key heads, always the same weights; a new one for every test."""
    return models.tiny("llama")
