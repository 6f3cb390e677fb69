"""Engines of two worker processes, which find sparsekit through its entry point: each rank runs its heads or layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from test_engine import CONFIGS, HEAD, ROUNDING, A, T, generate
from tiny_llama import Reference, largest_difference, prompt


def test_two_ranks_have_their_heads(
    start: Callable[..., Any], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules by head under tensor parallelism: each rank runs those of its heads, found through the entry point."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    crossing = HEAD + f"default: dense\nheads: {{'0': {{'0-4': {T}, '5-7': {A}}}, '1': {{'3-7': {T}}}}}\n"
    llm = start(
        {"configs": {"heads": crossing, "triangle": CONFIGS["triangle"]}, "default": "heads"},
        tensor_parallel_size=2, distributed_executor_backend="mp",
    )  # fmt: skip
    prompts = [prompt(n, seed=n) for n in (700, 1100)]
    for name, config in (("heads", crossing), ("triangle", CONFIGS["triangle"])):
        for ids, output in zip(prompts, generate(llm, prompts, [name] * 2), strict=True):
            assert largest_difference(reference, config, ids, output.outputs[0]) < ROUNDING
    ranks = llm.collective_rpc("sparsekit_report")
    assert [said["rank"] for said in ranks] == [0, 1]
    assert all(said["configs"]["heads"]["layers"]["0"]["chunks"] > 0 for said in ranks)
    assert "heads 4: triangle" in ranks[1]["configs"]["heads"]["layers"]["0"]["patterns"]


def test_two_stages_have_their_layers(
    start: Callable[..., Any], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers keep their numbers under pipeline parallelism: each stage runs the patterns of its own."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    by_layer = HEAD + f"default: {T}\nlayers: {{'1': {A}}}\n"
    llm = start(by_layer, pipeline_parallel_size=2, distributed_executor_backend="mp")
    llm.collective_rpc(
        "execute_dummy_batch"
    )  # without compilation vLLM's CPU worker takes no buffers for a second stage
    prompts = [prompt(n, seed=n) for n in (700, 1100)]
    for ids, output in zip(prompts, generate(llm, prompts, [None] * 2), strict=True):
        assert largest_difference(reference, by_layer, ids, output.outputs[0]) < ROUNDING
    stages = [said["configs"]["default"]["layers"] for said in llm.collective_rpc("sparsekit_report")]
    assert [list(layers) for layers in stages] == [["0"], ["1"]]
    assert stages[0]["0"]["patterns"].startswith("triangle(")
    assert stages[1]["1"]["patterns"].startswith("a_shape(")
