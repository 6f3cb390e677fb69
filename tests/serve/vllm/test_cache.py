"""The prefix cache, preemption and requests' names, in a real engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from test_engine import CONFIGS, ROUNDING, generate, report
from tiny_llama import Reference, largest_difference, prompt

from sparsekit import SparsekitError


def _ask(llm: Any, ids: list[int], name: str | None = None) -> Any:
    return generate(llm, [ids], [name], tokens=4)[0]


def test_configs_do_not_share_pages(start: Callable[..., Any], reference: Reference) -> None:
    llm = start({"configs": CONFIGS, "default": "triangle"}, enable_prefix_caching=True)
    ids = prompt(1200)
    for name in ("triangle", "a_shape", "off"):
        first = _ask(llm, ids, name)
        assert first.num_cached_tokens == 0, name
        assert largest_difference(reference, CONFIGS.get(name), ids, first.outputs[0]) < ROUNDING
    assert _ask(llm, ids).num_cached_tokens == _ask(llm, ids, "off").num_cached_tokens == 1152


def test_a_name_that_the_server_does_not_have_is_refused(start: Callable[..., Any]) -> None:
    from vllm.exceptions import VLLMValidationError

    llm = start({"configs": CONFIGS, "default": "triangle"}, enable_prefix_caching=True)
    with pytest.raises(
        VLLMValidationError, match="sparsekit='triangel': this server has off, dense, triangle"
    ) as error:
        _ask(llm, prompt(50), "triangel")
    assert "Did you mean 'triangle'?" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(_ask(llm, prompt(50), "triangle").outputs[0].token_ids) == 4  # the engine goes on


@pytest.mark.parametrize("exact", [False, True])
def test_a_warm_prefix_is_the_cold_prompt_where_asked_for(
    start: Callable[..., Any], reference: Reference, exact: bool
) -> None:
    """The first prompt's dense last rows lie in pages that the second takes over, unless `exact_prefix`."""
    config = CONFIGS["triangle"]
    llm = start({"config": config, "exact_prefix": exact}, enable_prefix_caching=True)
    first, rest = prompt(1290), prompt(410, seed=2)
    second = first + rest
    _ask(llm, first)
    warm = _ask(llm, second)
    assert warm.num_cached_tokens == (1152 if exact else 1280)
    difference = largest_difference(reference, config, second, warm.outputs[0])
    assert (difference < ROUNDING) is exact, difference
    again = _ask(llm, second)  # its own pages, but for those with its last rows
    assert again.num_cached_tokens == (1664 // 128 * 128 if not exact else (1700 - 32) // 128 * 128)
    assert again.outputs[0].token_ids[0] == warm.outputs[0].token_ids[0]


def test_a_preempted_prompt_goes_on_as_it_was(
    start: Callable[..., Any], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted: list[str] = []
    preempt = Scheduler._preempt_request

    def noted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    llm = start(CONFIGS["triangle"], num_gpu_blocks_override=18, max_model_len=1024)
    prompts = [prompt(500 + 37 * i, seed=i) for i in range(4)]
    outputs = generate(llm, prompts, [None] * 4, tokens=150)
    assert preempted
    for ids, output in zip(prompts, outputs, strict=True):
        assert largest_difference(reference, CONFIGS["triangle"], ids, output.outputs[0]) < ROUNDING


def test_without_a_config_nothing_runs_here(start: Callable[..., Any], reference: Reference) -> None:
    llm = start(None)
    ids = prompt(700)
    output = _ask(llm, ids)
    assert largest_difference(reference, None, ids, output.outputs[0]) < ROUNDING
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    layers = runner.vllm_config.compilation_config.static_forward_context.values()
    assert {type(layer.impl).__module__ for layer in layers} == {"vllm.v1.attention.backends.cpu_attn"}


def test_refused_at_start(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is loaded; and after it, where a layer that is to run sparse has another implementation."""
    with pytest.raises(ValueError, match="for a model with num_layers = 30") as error:
        start("version: 1\nmodel: {num_layers: 30}\ndefault: triangle\n")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"--kv-cache-dtype fp8_e5m2: such keys are not read"):
        start(CONFIGS["triangle"], kv_cache_dtype="fp8_e5m2")
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from sparsekit.serve.vllm import settings

    AttentionBackendEnum["CPU_ATTN"].clear_override()  # an engine before this one may have put sparsekit's there
    with monkeypatch.context() as patched:
        patched.setattr(settings, "WRAPPED", ("FLASH_ATTN",))
        with pytest.raises(Exception, match=r"layer 0 is to run triangle\(.*vLLM chose the backend CPU_ATTN"):
            start(CONFIGS["triangle"])
    with pytest.raises(SparsekitError, match="CPU_ATTN packs its pages for 'vec16' here"):
        start(CONFIGS["triangle"], hf_overrides={"head_dim": 80}, load_format="dummy")


def test_the_report_counts_what_ran(start: Callable[..., Any]) -> None:
    llm = start(CONFIGS["triangle"])
    _ask(llm, prompt(1000))
    said = report(llm)
    layer = said["configs"]["default"]["layers"]["0"]
    assert (layer["chunks"], layer["rows"]) == (2, 1000 - 32)
    i = range(1000 - 32)
    kept = sum(min(n + 1, 64) + min(max(n + 1 - 64, 0), 8) for n in i)
    assert layer["kept_pairs"] == 8 * kept
    assert layer["causal_pairs"] == 8 * sum(n + 1 for n in i)
    assert layer["seconds"] > 0
    assert said["runner"].endswith("CPUModelRunner")
    assert said["configs"]["default"]["fallbacks"] == {}
