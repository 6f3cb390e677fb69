"""Which layers of a loaded model get their patterns; modules of vLLM's kinds, without vLLM."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sparsekit import SparsekitError
from sparsekit.config import ModelFacts
from sparsekit.serve.vllm.layers import bind, rank_of
from sparsekit.serve.vllm.settings import settings_of


class Attention(nn.Module):
    """vLLM's layer, as far as `bind` looks at it."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_name, self.num_heads, self.head_size = f"layers.{index}", 4, 16
        self.kv_cache_dtype, self.dtype = "auto", "torch.float32"
        self.impl = type("Impl", (), {"sparsekit": None})()
        self.attn_backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")


class ChunkedLocalAttention(Attention):
    """Its builder hands the backend a row a chunk, which no pattern knows of."""


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The names of vLLM's that `bind` imports, and the options of a server."""
    for name, held in (
        ("layers.attention", {"Attention": Attention}),
        ("models.utils", {"extract_layer_index": lambda name: int(name.split(".")[1])}),
    ):
        module = ModuleType(f"vllm.model_executor.{name}")
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=2), max_model_len=4096),
        cache_config=SimpleNamespace(block_size=16),
    )


def test_layers_of_another_kind_keep_their_own_attention(vllm: Any) -> None:
    model = nn.ModuleList([Attention(0), ChunkedLocalAttention(1)])
    facts = ModelFacts(num_layers=2, num_heads=4)
    settings = settings_of("version: 1\ndefault: a_shape\n", facts)
    (line,) = bind(model, vllm, settings, 0, 0)
    assert "layers 0: a_shape(" in line
    assert "layers 1: vLLM (ChunkedLocalAttention layer of the model)" in line
    plain, other = (layer.impl.sparsekit for layer in model)
    assert plain is not None
    assert other is None
    named = settings_of("version: 1\ndefault: dense\nlayers: {'1': a_shape}\n", facts)
    with pytest.raises(SparsekitError, match=r"layer 1: a_shape\(.* cannot replace a ChunkedLocalAttention layer of"):
        bind(model, vllm, named, 0, 0)


def test_a_plan_of_another_pipeline_stage_is_refused(vllm: Any) -> None:
    """And layers that run other plans are not one group."""
    vllm.model_config.hf_text_config.num_hidden_layers = 4
    facts = ModelFacts(num_layers=4, num_heads=4)
    rule = "{name: block_topk, top_k: 4}"
    text = f"version: 1\nlayers: {{0: {rule}, 1: {rule}, 2: {{reuse: 0}}, 3: {{reuse: 1}}}}\n"
    whole = nn.ModuleList([Attention(i) for i in range(4)])
    (line,) = bind(whole, vllm, settings_of(text, facts), 0, 0)
    assert "layers 2: the plan of layer 0: block_topk(" in line
    assert len({layer.impl.sparsekit.group for layer in whole}) == 4  # each keeps, or runs, a plan of its own
    text = f"version: 1\nlayers: {{0: {rule}, '1-3': {{reuse: 0}}}}\n"
    bind(whole, vllm, settings_of(text, facts), 0, 0)
    assert [layer.impl.sparsekit.group for layer in whole] == [0, 1, 1, 2]  # the last one drops the plan
    later = nn.ModuleList([Attention(2), Attention(3)])
    with pytest.raises(SparsekitError, match="layer 2 reuses the plan of layer 0, which is in another pipeline stage"):
        bind(later, vllm, settings_of(text, facts), 1, 0)


def test_layers_with_caches_of_other_numbers_are_not_one_group(vllm: Any) -> None:
    """As under --kv-cache-dtype-skip-layers: the profiling run, which looks at one layer of a group, meets both."""
    model = nn.ModuleList([Attention(0), Attention(1)])
    model[1].kv_cache_dtype = "fp8"
    for name in ("_q_scale", "_k_scale", "_v_scale"):
        setattr(model[1], name, torch.ones(()))
    bind(model, vllm, settings_of("version: 1\ndefault: a_shape\n", ModelFacts(num_layers=2, num_heads=4)), 0, 0)
    assert [layer.impl.sparsekit.group for layer in model] == [0, 1]


def test_workers_of_all_engines_have_ranks_of_their_own() -> None:
    """Metrics of two workers with one rank would be one series with two values."""
    workers = [
        SimpleNamespace(data_parallel_index=engine, data_parallel_rank=0, world_size=2, rank=rank)
        for engine in range(2)
        for rank in range(2)
    ]
    assert [rank_of(worker) for worker in workers] == [0, 1, 2, 3]
