"""Which layers of a loaded model may run sparse, and which are refused: one line each, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsekit import SparsekitError, load
from sparsekit.config import LayerPatterns, ModelFacts
from sparsekit.serve.vllm.layers import _check, _of_rank, line

TEXT = "version: 1\ndense_below_tokens: 500\ndefault: dense\nheads: {'1': {'0-2': triangle}}\n"


class Impl:
    sparsekit = None


def _patterns() -> LayerPatterns:
    return load(TEXT).resolve(ModelFacts(num_layers=3, num_heads=8)).layers[1]


def _layer(**changes: Any) -> Any:
    implementation = changes.pop("impl", Impl())
    for name in [each for each in changes if each == "alibi_slopes"]:
        setattr(implementation, name, changes.pop(name))
    facts = {
        "impl": implementation, "attn_backend": SimpleNamespace(get_name=lambda: "FLASHINFER"), "head_size": 64,
        "kv_cache_dtype": "auto", "dtype": "torch.bfloat16", "num_heads": 8,
        **dict.fromkeys(("_q_scale", "_k_scale", "_v_scale"), torch.ones(())), **changes,
    }  # fmt: skip
    return SimpleNamespace(**facts)


def test_a_plain_layer_is_served() -> None:
    _check(_layer(), _patterns())
    _check(_layer(kv_cache_dtype="bfloat16", head_size_v=64, alibi_slopes=None), _patterns())
    _check(_layer(kv_cache_dtype="fp8_e4m3"), _patterns())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"impl": SimpleNamespace()}, "vLLM chose the backend FLASHINFER for it; sparsekit serves FLASH_ATTN, TRITON_"),
        ({"alibi_slopes": [0.5]}, "it adds ALiBi biases, which no kernel here computes"),
        (
            {"kv_cache_dtype": "fp8_e5m2"},
            "its KV cache is fp8_e5m2; such keys are not read: use --kv-cache-dtype auto, ",
        ),
        ({"kv_cache_dtype": "fp8", "_v_scale": torch.ones(2)}, "its KV cache has 2 numbers in _v_scale; one a layer"),
        ({"head_size": 192, "head_size_v": 128}, "its keys have size 192 and its values 128"),
    ],
)
def test_layers_that_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SparsekitError) as error:
        _check(_layer(**changes), _patterns())
    assert str(error.value).startswith("layer 1 is to run heads 0-2: triangle(")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_rank_has_its_heads() -> None:
    first, second = (_of_rank(_patterns(), _layer(num_heads=4), rank) for rank in range(2))
    assert str(first).startswith("heads 0-2: triangle(")
    assert str(first).endswith("; heads 3: dense")
    assert str(second) == "dense"
    with pytest.raises(SparsekitError, match="layer 1: the config has 8 query heads, and rank 0 has 3"):
        _of_rank(_patterns(), _layer(num_heads=3), 0)
    with pytest.raises(SparsekitError, match="rank 2 has 4, which is no equal part"):
        _of_rank(_patterns(), _layer(num_heads=4), 2)


def test_the_line_says_what_runs_where() -> None:
    config, patterns = load(TEXT), _patterns()
    impls = {i: SimpleNamespace(sparsekit=None) for i in range(3)}
    impls[1].sparsekit = SimpleNamespace(patterns={"a": patterns})
    said = line("a", "FLASH_ATTN", impls, {2: "sliding_attention layer of the model"}, config)
    assert "over FLASH_ATTN, config 'a': layers 0: vLLM (dense); layers 1: heads 0-2: triangle(" in said
    assert said.endswith(
        "; layers 2: vLLM (sliding_attention layer of the model); prompts below 500 tokens: vLLM; decoding: vLLM"
    )
