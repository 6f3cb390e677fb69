"""Static and dynamic patterns in one model, one layer, and head by head: read, written, and run through apply.

What a model must compute is known from the plans: each layer's own, made from the q and k that the layer was given, is
executed by the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from tiny import TRIANGLE, by_reference
from tiny import logits as _logits
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import sparsekit
from sparsekit import SparsekitError, explain, load
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.models import tiny
from sparsekit.patterns import BlockTopK, DynamicPattern, Triangle, base, pattern_class, pattern_names
from sparsekit.plan import BlockPlan, plan_from_block_mask

# One of every dynamic pattern; those that need a layer of their own apart.
POINTS = [
    ({"name": name, **pattern_class(name).test_points[0]}, pattern_class(name).whole_layer)
    for name in pattern_names(DynamicPattern)
]
X, ALONE = [x for x, alone in POINTS if not alone], [x for x, alone in POINTS if alone]
NAMES = [pattern["name"] for pattern in X]
TOKENS = 400


def _ids(batch: int = 1, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(3, 250, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def short_prompts_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """`explain` shows what a GPU does, where prompts as short as these run dense."""
    for name in pattern_names(DynamicPattern):
        monkeypatch.setattr(pattern_class(name), "pays_from_tokens", {})


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama")


def configs() -> dict[str, dict[str, Any]]:
    """Layers 0-1 and 2-3 of four: TriangleMix + X, unions, and heads that differ."""
    made = {f"trianglemix-{x['name']}": {"layers": {"0-1": x, "2-3": TRIANGLE}} for x in [*X, *ALONE]}
    made |= {f"union-{x['name']}": {"default": {"name": "union", "of": [x, TRIANGLE]}} for x in X}
    made["union-of-dynamic"] = {"default": {"name": "union", "of": X[-2:]}}
    made["heads"] = {
        "layers": {"2-3": TRIANGLE},
        "heads": {"0-1": {"0": X[0], "1": TRIANGLE, "2": X[-1]}, "3": {"3": {"name": "union", "of": [X[0], X[-1]]}}},
    }
    return made


CONFIGS = configs()


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_resolves_and_comes_back(name: str, model: PreTrainedModel) -> None:
    config = load({"version": 1, "model": {"num_layers": 4, "num_heads": 4}, **CONFIGS[name]})
    assert load(config.dump()) == config
    assert load(config.to_dict()).to_dict() == config.to_dict()
    resolved = config.resolve()
    assert [layer.layer for layer in resolved.layers] == [0, 1, 2, 3]
    assert len(resolved.to_dict()) == 4
    row = explain(config, 4096).layers[0]
    assert (row.runs, row.density) == ("sparse", None)
    assert row.why.endswith("depends on the prompt")


@pytest.mark.parametrize("name", CONFIGS)
def test_runs_what_its_plans_say(name: str, model: PreTrainedModel) -> None:
    """The whole model on sparsekit's fast path, against each layer's plan executed by the definition."""
    ids = _ids()
    dense = _logits(model, ids)
    with sparsekit.apply(model, CONFIGS[name]) as handle:
        got = _logits(model, ids)
        rows = handle.report().layers
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sparsekit.patch.attention, "prepare", by_reference)
            expected = _logits(model, ids)
    assert [row.ran for row in rows] == ["sparse"] * 4
    assert float((got - expected).abs().max()) < 1e-4
    for row in rows:
        assert 0 < row.density <= 1 and row.tile_density > 0  # which tiles off the grid can bring above 1
        assert row.plan_ms is not None and row.ms is not None and 0 < row.plan_ms < row.ms
    assert rows[0].density < 0.95, "the budgets of this test should leave something out"
    assert float((got - dense).abs().max()) > 1e-4


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_is_the_single_runs(name: str, side: str, model: PreTrainedModel) -> None:
    lengths = [TOKENS, 317, 150]
    ids, mask = torch.zeros(3, TOKENS, dtype=torch.long), torch.zeros(3, TOKENS, dtype=torch.long)
    for row, n in enumerate(lengths):
        at = slice(TOKENS - n, TOKENS) if side == "left" else slice(0, n)
        ids[row, at], mask[row, at] = _ids(tokens=n, seed=row)[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with sparsekit.apply(model, CONFIGS[name]):
        batch = _logits(model, ids, attention_mask=mask, position_ids=positions)
        for row, n in enumerate(lengths):
            alone = _logits(model, _ids(tokens=n, seed=row))[0]
            assert float((batch[row, mask[row].bool()] - alone).abs().max()) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_generates_in_one_piece_and_in_chunks(name: str, model: PreTrainedModel) -> None:
    """A chunk estimates from its own queries, so what it keeps differs; it runs, sparse, and decodes densely."""
    ids = _ids()
    with sparsekit.apply(model, CONFIGS[name]) as handle, handle.prompt(tokens=TOKENS):
        plain = model.generate(ids, max_new_tokens=4, do_sample=False)
        static = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static")
        assert torch.equal(plain, static)
        chunked = model.generate(ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=130)
        assert chunked.shape == plain.shape
        assert {row.ran for row in handle.report().layers} == {"sparse"}


@pytest.mark.parametrize("name", CONFIGS)
def test_second_turn(name: str, model: PreTrainedModel) -> None:
    """Its plans keep what any plan of those rows must: causal, itself, nothing twice; and the model stays finite."""
    ids, plans = _ids(), []
    with sparsekit.apply(model, CONFIGS[name]), pytest.MonkeyPatch.context() as patch:
        made = sparsekit.config.layers.plan_heads
        patch.setattr(sparsekit.config.layers, "plan_heads", lambda *a: plans.append(made(*a)) or plans[-1])
        cache = DynamicCache(config=model.config)
        _logits(model, ids[:, :250], past_key_values=cache)
        second = _logits(model, ids[:, 250:], past_key_values=cache)
    assert bool(second.isfinite().all())
    assert len(plans) == 8
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[250:]
    for plan in plans[4:]:
        often = plan.multiplicity()[0]
        assert int(often.max()) == 1
        assert bool((causal | (often == 0)).all())
        assert bool((often.diagonal(250, dim1=-2, dim2=-1) == 1).all())


# ---- dense below a length


def test_below_its_crossover_a_pattern_runs_dense(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the heads that run something else go on running it."""
    monkeypatch.setattr(BlockTopK, "pays_from_tokens", {"cpu": TOKENS + 1})
    config = {"layers": {"0": X[NAMES.index("block_topk")]}, "heads": {"1": {"0": X[NAMES.index("block_topk")]}}}
    with sparsekit.apply(model, {**config, "default": TRIANGLE}) as handle:
        _logits(model, _ids())
        rows = handle.report().layers
        assert rows[0].density == 1 and rows[0].plan_bytes == 0
        assert rows[2].density < rows[1].density < 1
        assert rows[1].density == pytest.approx((3 * rows[2].density + 1) / 4)


# ---- a pattern that needs its layer for itself


class Lonely(DynamicPattern):
    """Every block on the diagonal."""

    name: str = "lonely"
    whole_layer: ClassVar[bool] = True

    def select(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
        rows = geometry.rows
        eye = torch.ones(1, q.shape[1], rows, rows * 2, dtype=torch.bool)
        return plan_from_block_mask(eye, geometry)


del base._REGISTRY["lonely"]  # other files look at the whole registry


@pytest.fixture
def lonely() -> Iterator[None]:
    base._REGISTRY["lonely"] = Lonely
    yield
    del base._REGISTRY["lonely"]


def test_s2o_is_refused_beside_others_and_in_a_union() -> None:
    config = {"model": {"num_layers": 4, "num_heads": 4}, "default": "triangle", "heads": {"1": {"0-2": "s2o"}}}
    with pytest.raises(
        SparsekitError, match="layer 1: s2o needs a layer of its own, but other heads run triangle: give"
    ):
        load(config).resolve()
    with pytest.raises(SparsekitError, match=r"of\[1\]: 's2o' needs a layer of its own; a union cannot hold it"):
        load({"default": {"name": "union", "of": ["triangle", "s2o"]}})


@pytest.mark.usefixtures("lonely")
def test_a_pattern_that_needs_its_layer_is_refused_beside_others(model: PreTrainedModel) -> None:
    before = _logits(model, _ids())
    for heads, others in (({"0-2": "lonely"}, "dense"), ({"0": "triangle", "1-3": "lonely"}, "triangle")):
        with pytest.raises(SparsekitError) as error:
            sparsekit.apply(model, {"heads": {"2": heads}})
        assert str(error.value) == (
            f"layer 2: lonely needs a layer of its own, but other heads run {others}: give all heads of the layer "
            "lonely, or none."
        )
    assert torch.equal(_logits(model, _ids()), before)
    with sparsekit.apply(model, {"heads": {"2": {"0-3": "lonely"}}}):
        _logits(model, _ids())


def test_a_large_plan_is_not_kept_for_the_report(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"layers": {"0-1": X[0], "2-3": TRIANGLE}}
    with sparsekit.apply(model, config) as handle:
        _logits(model, _ids())
        rows = handle.report().to_dicts()
        monkeypatch.setattr(sparsekit.patch.attention, "KEPT_PLAN_BYTES", 0)
        _logits(model, _ids())
        again = handle.report().to_dicts()
        assert not any(isinstance(layer.plan, BlockPlan) for layer in sparsekit.patch.state.LAYERS.values())
    for row, other in zip(rows, again, strict=True):
        for name in ("density", "tile_density", "plan_bytes", "ran", "impl"):
            assert row[name] == other[name]


def test_a_thresholds_table_that_does_not_fit_the_heads_is_refused(model: PreTrainedModel) -> None:
    config = {"default": {"name": "xattention", "threshold": [0.5, 0.5, 0.5]}}
    with sparsekit.apply(model, config), pytest.raises(SparsekitError, match="3 values for 4 query heads"):
        _logits(model, _ids())


def test_published_defaults_are_what_a_name_gives() -> None:
    assert load({"default": "block_topk"}).default == BlockTopK(top_k=100)
    assert load({"default": "triangle"}).default == Triangle(sink_tokens=8, window_tokens=512, last_tokens=128)
