"""FLEX_ATTENTION's metadata are masks over the whole cache: those of a step, and of what sparsekit leaves of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.config import ModelFacts
from sparsekit.serve.vllm import backend, steps
from sparsekit.serve.vllm.layers import Bound
from sparsekit.serve.vllm.settings import settings_of

CONFIG = "version: 1\ndefault: {name: triangle, sink_tokens: 8, window_tokens: 64, last_tokens: 32}\n"
PAGES, PAGE = 64, 16


def _builder() -> Any:
    from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    _, builder, _ = backend.over(FlexAttentionBackend, __name__)
    options = SimpleNamespace(
        model_config=SimpleNamespace(
            get_num_attention_heads=lambda _: 4, get_num_kv_heads=lambda _: 2, get_head_size=lambda: 16,
            max_model_len=1024, rswa_window=None,
        ),
        parallel_config=None, cache_config=SimpleNamespace(num_gpu_blocks=PAGES),
        attention_config=SimpleNamespace(
            flex_attn_q_block_size=None, flex_attn_kv_block_size=None, flex_attn_block_m=None, flex_attn_block_n=None
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=1024),
        compilation_config=SimpleNamespace(cudagraph_mode=None),
    )  # fmt: skip
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=2, head_size=16, dtype=torch.float32)
    return builder(spec, ["layer"], options, torch.device("cpu"))


def _common(rows: list[tuple[int, int, int]]) -> Any:
    """Of rows (queries, keys so far, prompt)."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *np.cumsum([queries for queries, _, _ in rows])], dtype=torch.int32)
    keys = torch.tensor([keys for _, keys, _ in rows], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts.clone(), seq_lens=keys, num_reqs=len(rows),
        num_actual_tokens=int(starts[-1]), max_query_len=max(queries for queries, _, _ in rows),
        max_seq_len=int(keys.max()),
        block_table_tensor=torch.arange(1, 1 + 16 * len(rows), dtype=torch.int32).view(-1, 16),
        slot_mapping=torch.arange(int(starts[-1])), seq_lens_cpu_upper_bound=keys.clone(),
        is_prefilling=torch.tensor([keys - queries < prompt for queries, keys, prompt in rows]),
    )  # fmt: skip


def _mask(metadata: Any) -> Tensor:
    """(queries, tokens of the cache)."""
    queries = torch.arange(metadata.num_actual_tokens)[:, None]
    return metadata.mask_mod(None, None, queries, torch.arange(PAGES * PAGE)[None]).clone()


def test_the_rest_of_a_step_leaves_the_steps_own_metadata() -> None:
    """Layers without a sparse pattern use these after layers with one."""
    rows = [(1, 50, 40), (200, 200, 200), (1, 101, 100)]
    settings = settings_of(CONFIG, ModelFacts(num_layers=2, num_heads=4))
    backend.use(settings)
    try:
        builder = _builder()
    finally:
        backend.use(None)  # as a second engine of the process does, which has no config
    steps._tell(steps.Told(np.array([prompt for *_, prompt in rows]), lambda _: None))
    try:
        whole = builder.build(0, _common(rows))
    finally:
        steps._tell(None)
    mask, (served,) = _mask(whole), settings.configs.values()
    step = whole.sparsekit
    others = step.others(step.runs(Bound(0, {served.name: served.resolved.layers[0]}, 0), PAGE))
    assert [(other.begin, other.end) for other in others] == [(0, 1), (169, 202)]
    assert torch.equal(_mask(whole), mask)
    for other in others:
        assert torch.equal(_mask(other.metadata), mask[other.begin : other.end])
