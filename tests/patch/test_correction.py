"""A model whose layers are corrected by dense rows: prompts, chunks, turns and padding; decoding is untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TOKENS, TRIANGLE, close, ids, logits
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import sparsekit
from sparsekit.models import tiny
from sparsekit.patch.state import LAYERS
from sparsekit.patterns import pattern_class, pattern_names

EVERY = 64
CORRECTED = {"default": {**TRIANGLE, "correct_every": EVERY}}


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama", initializer_range=0.1)


def _by_formula(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The corrected triangle of a whole prompt, from masks: q (H, n, D) over k, v (G, n, D)."""
    n = q.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    late = i >= n - TRIANGLE["last_tokens"]  # type: ignore[operator]
    near = (j < TRIANGLE["sink_tokens"]) | (i - j < TRIANGLE["window_tokens"]) | late  # type: ignore[operator]
    z = (q @ k.mT) * scale
    dense, sparse = (z.masked_fill(~keep, -torch.inf).softmax(-1) @ v for keep in (j <= i, (j <= i) & near))
    return sparse + (dense - sparse)[:, torch.arange(n) // EVERY * EVERY].masked_fill(late, 0)


def test_a_prompt_is_the_formula_in_every_layer(model: PreTrainedModel) -> None:
    """The model's own forward with the formula written out in its layers."""
    from transformers import AttentionInterface

    def formula(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **more: Any) -> Any:
        out = torch.stack([_by_formula(*one, scaling) for one in zip(q, k, v, strict=True)])
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("corrected_by_formula", formula)
    own = model.config._attn_implementation
    try:
        model.set_attn_implementation("corrected_by_formula")
        expected = logits(model, ids(2))
    finally:
        model.set_attn_implementation(own)
    with sparsekit.apply(model, CORRECTED):
        close(logits(model, ids(2)), expected)
    with sparsekit.apply(model, {"default": TRIANGLE}):
        assert float((logits(model, ids(2)) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("name", [name for name in pattern_names() if name != "dense"])
def test_every_pattern_runs_corrected(model: PreTrainedModel, name: str) -> None:
    fields = {"name": name, **pattern_class(name).test_points[0]}
    sample = ids(tokens=400)
    with sparsekit.apply(model, {"default": fields}):
        bare = logits(model, sample)
    with sparsekit.apply(model, {"default": {**fields, "correct_every": EVERY}}) as handle:
        assert float((logits(model, sample) - bare).abs().max()) > 1e-3
        assert [row.ran for row in handle.report().layers] == ["sparse"] * 4


def test_a_pattern_that_kept_every_pair_is_told_though_its_anchors_count(model: PreTrainedModel) -> None:
    every = {"name": "s2o", "segment_tokens": 64, "tau": 0.0, "max_tokens": None, "correct_every": EVERY}
    with sparsekit.apply(model, {"default": every}) as handle:
        logits(model, ids())
        assert {row.why for row in handle.report().layers} == {"the pattern kept every pair"}
        assert not any(row.sparse for row in handle.report().layers)


def test_the_report_counts_the_anchors(model: PreTrainedModel) -> None:
    with sparsekit.apply(model, {"default": TRIANGLE}) as handle:
        logits(model, ids())
        bare = handle.report().layers[0]
    with sparsekit.apply(model, CORRECTED) as handle:
        logits(model, ids())
        row = handle.report().layers[0]
    pairs = sum(p + 1 for p in range(0, TOKENS, EVERY)) / (TOKENS * (TOKENS + 1) / 2)
    assert row.density == pytest.approx(bare.density + pairs)  # type: ignore[operator]
    assert row.pattern.endswith("correct_every=64)")


def test_decoding_is_the_models_own(model: PreTrainedModel) -> None:
    """On one cache, bit for bit: single tokens, and a call of fewer than `min_queries`."""
    cache = DynamicCache(config=model.config)
    with sparsekit.apply(model, CORRECTED):
        logits(model, ids(), past_key_values=cache)
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    later = ids(tokens=41, seed=1).split([1, 40], 1)

    def decode() -> list[Tensor]:
        own = DynamicCache(config=model.config)
        for i, (k, v) in enumerate(kept):
            own.update(k.clone(), v.clone(), i)
        return [logits(model, part, past_key_values=own) for part in later]

    expected = decode()
    with sparsekit.apply(model, CORRECTED):
        got = decode()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("size", [64, 128])
def test_chunks_of_a_known_prompt_are_the_whole(model: PreTrainedModel, size: int) -> None:
    with sparsekit.apply(model, CORRECTED) as handle:
        whole = logits(model, ids())
        cache = DynamicCache(config=model.config)
        with handle.prompt(tokens=TOKENS):
            parts = [logits(model, part, past_key_values=cache) for part in ids().split(size, 1)]
        close(torch.cat(parts, 1), whole)


def test_a_second_turn_begins_with_an_anchor(model: PreTrainedModel) -> None:
    """Its first row is dense whatever its position, and later anchors are those of the whole conversation."""
    first, second = ids(tokens=100), ids(tokens=120, seed=1)
    with sparsekit.apply(model, CORRECTED):
        cache = DynamicCache(config=model.config)
        logits(model, first, past_key_values=cache)
        logits(model, second, past_key_values=cache)
        plan = next(x for x in LAYERS.values() if x.patterns.layer == 0).plan
        assert plan is not None
        anchors = plan.anchors  # type: ignore[union-attr]
    assert anchors is not None
    (span,) = anchors.geometry.spans
    assert [span.anchor(r, EVERY) for r in range(anchors.geometry.q_rows)] == [100, 128, 192]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_the_single_runs(model: PreTrainedModel, side: str) -> None:
    lengths = (TOKENS, 163, 90)
    batch, mask = ids(3), torch.zeros(3, TOKENS, dtype=torch.int64)
    rows = [slice(TOKENS - n, None) if side == "left" else slice(n) for n in lengths]
    for b, row in enumerate(rows):
        mask[b, row] = 1
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with sparsekit.apply(model, CORRECTED):
        got = logits(model, batch, attention_mask=mask, position_ids=position)
        for b, row in enumerate(rows):
            close(got[b : b + 1, row], logits(model, batch[b : b + 1, row]))
