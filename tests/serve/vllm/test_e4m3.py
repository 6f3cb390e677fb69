"""A cache of 8-bit numbers: patterns read what vLLM wrote, as its own attention does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_engine import CONFIGS, HEAD, generate, report
from tiny_llama import Reference, largest_difference, prompt
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsekit.call.keys import Keys
from sparsekit.config import LayerPatterns
from sparsekit.patterns import parse_pattern
from sparsekit.patterns.shared import SharedPlans
from sparsekit.serve.prompts import Chunk, part_of, read_e4m3
from sparsekit.serve.vllm import backend
from sparsekit.serve.vllm.layers import Bound

# Where float32's rounding puts a key on the other side of a step, it is an eighth apart: 0.006 was seen, of vLLM's own
# attention too. Another mask, or 16 bits, are apart by more than 1.
STEPS = 0.05
ALL_BLOCKS = HEAD + "default: {name: block_topk, top_k: 999, dense_below_tokens: 0}\n"


def _cut(x: Tensor, scale: float) -> Tensor:
    """vLLM's numbers on a CPU: the next e4m3 towards zero."""
    near = (x / scale).to(torch.float8_e4m3fn)
    beyond = near.float().abs() > (x / scale).abs()
    return (near.view(torch.uint8) - beyond.to(torch.uint8)).view(torch.float8_e4m3fn).to(x.dtype) * scale


@contextmanager
def _in_e4m3(scales: tuple[float, float]) -> Iterator[None]:
    """Within this block the reference's attention sees keys and values as such a cache has them."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def small(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        return sdpa(module, q, _cut(k, scales[0]), _cut(v, scales[1]), *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS._local_mapping["sdpa"] = small
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS._local_mapping["sdpa"]


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM has 8-bit caches on CPUs with AVX-512 alone")
def test_a_cache_in_8_bits_is_its_numbers_under_the_explicit_mask(
    start: Callable[..., Any], reference: Reference
) -> None:
    """Static and dynamic patterns and vLLM's own attention, over chunks; with scales as a checkpoint may have them."""
    configs = {**{name: CONFIGS[name] for name in ("dense", "triangle", "heads")}, "blocks": ALL_BLOCKS}
    llm = start({"configs": configs, "default": "triangle"}, kv_cache_dtype="fp8")
    layers = llm.llm_engine.model_executor.driver_worker.worker.model_runner.vllm_config.compilation_config
    ids = prompt(700)
    for scales, names in (((1.0, 1.0), (*configs, "off")), ((0.6, 0.3), ("triangle",))):
        for layer in layers.static_forward_context.values():
            layer._k_scale_float, layer._v_scale_float = scales
        for name, output in zip(names, generate(llm, [ids] * len(names), names), strict=True):
            mask = configs[name] if name in ("triangle", "heads") else None
            with _in_e4m3(scales):
                assert largest_difference(reference, mask, ids, output.outputs[0]) < STEPS, (scales, name)
        assert largest_difference(reference, mask, ids, output.outputs[0]) > 1  # 8 bits do differ
    ran = report(llm)["configs"]
    assert all(ran[name]["layers"]["1"]["chunks"] >= 2 for name in configs)


def test_queries_that_vllm_rounds_for_its_own_kernel_are_read_as_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FLASH_ATTN of version 3 and TRITON_ATTN have it on a GPU: e4m3, and a scale of the layer's.

    To read the cache is in the layer's seconds.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    _, _, impl = backend.over(CPUAttentionBackend, __name__)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(300, heads, 32, generator=draw).to(torch.float8_e4m3fn) for heads in (4, 2, 2))
    pages = [
        torch.nn.functional.pad(x.float(), (0, 0, 0, 0, 0, 20)).unflatten(0, (10, 32)).transpose(1, 2) for x in (k, v)
    ]
    patterns = LayerPatterns(
        0, (parse_pattern({"name": "triangle", "window_tokens": 64, "last_tokens": 32}),), (0,) * 4
    )
    part = part_of(patterns, Chunk(0, 300, 300), torch.device("cpu"), page=32)
    assert part is not None
    table = torch.arange(10, dtype=torch.int32)[None]
    run = backend.Run(SimpleNamespace(begin=0, row=0, served=SimpleNamespace(name="a")), part, patterns, table)  # type: ignore[arg-type]
    monkeypatch.setattr(backend, "read_e4m3", lambda *args: (sleep(0.5), read_e4m3(*args))[1])
    backend.METER.reset()
    outputs = []
    for cache, query, stored in (("auto", q.float() * 0.5, torch.float32), ("fp8", q, torch.float8_e4m3fn)):
        layer = SimpleNamespace(_q_scale_float=0.5, _k_scale_float=1.0, _v_scale_float=1.0)
        one = impl.__new__(impl)
        vars(one).update(num_heads=4, num_kv_heads=2, head_size=32, scale=0.2, kv_cache_dtype=cache, logits_soft_cap=0)
        outputs.append(torch.zeros(300, 4, 32))
        keys = Keys(*(x.to(stored) for x in pages), table)
        one._run(Bound(0, {"a": patterns}, 0), run, layer, query, keys, outputs[-1], SharedPlans())
    assert outputs[0].abs().sum() > 0
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-6)
    assert backend.METER.layers["a", 0].seconds >= 0.5
