"""What goes wrong in a server's life: a full cache, cancelled prompts, many requests; and pages that leave a server."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_engine import CONFIGS, ROUNDING, generate, report
from tiny_llama import Reference, largest_difference, prompt

from sparsekit.serve.vllm import settings
from sparsekit.serve.vllm.backend import Step
from sparsekit.serve.vllm.steps import current


def _held(llm: Any) -> dict[str, int]:
    """What vLLM and sparsekit keep between requests."""
    core = llm.llm_engine.engine_core.engine_core
    gc.collect()
    return {
        "pages": core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        "scheduled": len(core.scheduler.requests),
        "told": 0 if current() is None else 1,
        "steps": sum(isinstance(each, Step) for each in gc.get_objects()),
    }


def _short(llm: Any, count: int) -> None:
    from vllm import SamplingParams

    params = [
        SamplingParams(max_tokens=2, temperature=0, detokenize=False, extra_args={"sparsekit": name})
        for name in islice(cycle(("off", "triangle")), count)
    ]
    llm.generate([{"prompt_token_ids": prompt(20 + i % 30, seed=i)} for i in range(count)], params, use_tqdm=False)


def test_a_full_cache_cancelled_prompts_and_a_thousand_requests(
    start: Callable[..., Any], reference: Reference
) -> None:
    """Six prompts in a cache for two; prompts that are cancelled between chunks; then 1,000 more. Nothing is left."""
    from vllm import SamplingParams

    config = CONFIGS["triangle"]
    llm = start(
        {"configs": {"triangle": config}, "default": "triangle"}, num_gpu_blocks_override=20, max_model_len=2048
    )
    engine, empty = llm.llm_engine, _held(llm)
    params = SamplingParams(max_tokens=4, temperature=0, detokenize=False)
    for i in range(3):
        engine.add_request(f"cancelled {i}", {"prompt_token_ids": prompt(1500, seed=i)}, params)
    for _ in range(2):
        engine.step()
    rows = report(llm)["configs"]["triangle"]["layers"]["0"]["rows"]
    assert 0 < rows < 1500 - 32  # in the middle of a prompt
    engine.abort_request([f"cancelled {i}" for i in range(3)])
    prompts = [prompt(900 + 10 * i, seed=i) for i in range(6)]
    for ids, output in zip(prompts, generate(llm, prompts, [None] * 6), strict=True):
        assert largest_difference(reference, config, ids, output.outputs[0]) < ROUNDING
    _short(llm, 1000)  # after as many, memory stays where it is
    begun = psutil.Process().memory_info().rss
    _short(llm, 1000)
    assert psutil.Process().memory_info().rss - begun < 16 << 20
    held = _held(llm)
    assert held.pop("steps") <= 1  # the last batch's
    empty.pop("steps")
    assert held == empty
    assert list(report(llm)["configs"]["triangle"]["layers"]) == ["0", "1"]
    [after] = generate(llm, prompts[:1], [None])
    assert largest_difference(reference, config, prompts[0], after.outputs[0]) < ROUNDING


def test_a_stock_decoder_takes_over_pages_that_were_filled_here(
    start: Callable[..., Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill here and decode elsewhere. vLLM's example connector knows pages by tokens alone, so it is refused; it
    stands in for one that hands over by request, since here one config fills all pages."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    def options() -> dict[str, Any]:
        transfer = KVTransferConfig(
            kv_connector="ExampleConnector", kv_role="kv_both",
            kv_connector_extra_config={"shared_storage_path": str(tmp_path)},
        )  # fmt: skip
        return {"kv_transfer_config": transfer, "max_num_batched_tokens": 2048, "max_model_len": 2048}

    config, ids = CONFIGS["triangle"], prompt(1300)
    with pytest.raises(
        ValueError, match="--kv-transfer-config ExampleConnector: it is not known to tell pages"
    ) as error:
        start(config, **options())
    assert "\n" not in str(error.value)
    monkeypatch.setattr(settings, "SALTED", ("ExampleConnector",))
    generate(start(config, **options()), [ids], [None], tokens=1)
    assert list(tmp_path.glob("*/*.safetensors"))
    ensure_kv_transfer_shutdown()
    decoder = start(None, **options())
    [output] = generate(decoder, [ids], [None])
    assert output.num_cached_tokens == 1280
    assert largest_difference(reference, config, ids, output.outputs[0]) < ROUNDING
    assert largest_difference(reference, None, ids, output.outputs[0]) > 1
    ensure_kv_transfer_shutdown()
