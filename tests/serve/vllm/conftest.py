"""Real vLLM engines on a CPU, in this process. Run by `make test-vllm`, in an environment of its own."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: `make test-vllm` runs these in an environment of its own")

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", TOKENIZERS_PARALLELISM="false",
)  # fmt: skip

from tiny_llama import Reference, save_tiny_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def reference(llama: Path) -> Reference:
    return Reference(llama)


@pytest.fixture(scope="module")
def start(llama: Path) -> Iterator[Callable[..., Any]]:
    """start(sparsekit=..., model=folder, **options) -> an LLM; the one before it is gone then."""
    held: list[Any] = []

    def stop() -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        while held:
            held.pop().llm_engine.engine_core.shutdown()
        gc.collect()
        # vLLM 0.32 looks into every module when an engine starts, and fails at llvmlite, which n-gram drafts import.
        for name in [name for name in sys.modules if name.startswith("llvmlite")]:
            del sys.modules[name]
        cleanup_dist_env_and_memory()

    def begin(sparsekit: Any = None, model: Path = llama, **options: Any) -> Any:
        from vllm import LLM

        stop()
        if sparsekit is not None:
            options["additional_config"] = {"sparsekit": sparsekit}
        defaults = {
            "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "seed": 0, "max_model_len": 4096,
            "max_num_batched_tokens": 512, "enable_prefix_caching": False,
        }  # fmt: skip
        held.append(LLM(str(model), **{**defaults, **options}))
        return held[-1]

    yield begin
    stop()
