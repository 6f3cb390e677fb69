"""`{reuse: LAYER}`: what it resolves to, what is refused, what it says, and layers that are given back."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from sparsekit import SparsekitError, load
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.config import ModelFacts, Reuse, Reused, SparseConfig, give_back
from sparsekit.config.costs import explain
from sparsekit.patterns import Pattern, XAttention
from sparsekit.patterns import base as registry
from sparsekit.patterns.shared import SharedPlans
from sparsekit.plan import BlockPlan, dense_plan
from sparsekit.testing import inputs_for

TOPK = {"name": "block_topk", "top_k": 4}
LAYERS, HEADS = 12, 4


def _config(layers: dict[str, Any], heads: dict[str, Any] | None = None, **model: Any) -> SparseConfig:
    facts = {"num_layers": LAYERS, "num_heads": HEADS, **model}
    return load({"model": facts, "layers": layers, **({} if heads is None else {"heads": heads})})


def test_each_head_runs_the_pattern_of_the_head_it_takes() -> None:
    shares = (0.2, 0.4, 0.6, 0.8)
    config = _config({"4": {"name": "xattention", "threshold": shares}, "5-7": {"reuse": 4, "heads": [3, 0, 0, 1]}})
    layers = config.resolve().layers
    assert [layer.reused and layer.reused.layer for layer in layers] == [None] * 5 + [4] * 3 + [None] * 4
    assert layers[6].reused == Reused(4, (3, 0, 0, 1))
    (pattern,) = layers[6].patterns
    assert isinstance(pattern, XAttention)
    assert pattern.threshold == (0.8, 0.2, 0.2, 0.4)
    assert [layer.shared for layer in layers] == [n == 4 for n in range(LAYERS)]
    assert [layer.reused.last for layer in layers if layer.reused] == [False, False, True]
    assert str(layers[5]).startswith("the plan of layer 4: xattention(")


def test_heads_may_run_patterns_of_their_own() -> None:
    config = _config({"4": TOPK, "5": {"reuse": 4}}, {"4": {"0": "dense"}, "5": {"2-3": "triangle"}})
    layer = config.resolve().layers[5]
    assert layer.reused == Reused(4, (0, 1, None, None))
    assert [layer.patterns[i].name for i in layer.pattern_of_head] == ["dense", "block_topk", "triangle", "triangle"]
    assert str(layer).startswith("the plan of layer 4 in heads 0-1: heads 0: dense; ")


def test_it_is_written_as_it_was_read() -> None:
    config = _config({"4": TOPK, "5-6": {"reuse": 4}, "7": {"reuse": 4, "heads": [0, 0, 1, 1]}})
    assert load(config.dump()) == config
    assert config.layers["5-6"] == Reuse(reuse=4)
    assert load(config.to_dict()) == config
    said = config.resolve().to_dict()
    assert (said[7]["reuse"], said[7]["of_head"]) == (4, [0, 0, 1, 1])
    assert "reuse" not in said[4]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a later layer": ({"4": TOPK, "5-6": {"reuse": 6}}, r"layers\.'5-6': reuse = 6, in layer 5: a layer reuses the "
                      r"plan of an earlier one; allowed: 4\. Did you mean 4\?"),
    "itself": ({"4": TOPK, "4-5": {"reuse": 4}}, "overlap at 4"),
    "its own number": ({"3": TOPK, "4-5": {"reuse": 4}}, r"reuse = 4, in layer 4: .* allowed: 3\. Did you mean 3\?"),
    "a dense layer": ({"2,4,7": TOPK, "8": {"reuse": 5}}, r"reuse = 5, in layer 8: that layer is dense and makes no "
                      r"plan; allowed: 2,4,7\. Did you mean 4\?"),
    "nothing to reuse": ({"8": {"reuse": 5}}, "no earlier layer chooses from the prompt for itself: give this layer a"),
    "a chain": ({"4": TOPK, "5": {"reuse": 4}, "6": {"reuse": 5}}, "in layer 6: that layer runs the plan of layer 4 "
                "itself; reuse that one directly"),
    "a static pattern": ({"4": "triangle", "5": {"reuse": 4}}, r"that layer runs triangle\(.*\), which depends on "
                         "positions alone and costs no index: give this layer the pattern itself"),
    "too few heads": ({"4": TOPK, "5-6": {"reuse": 4, "heads": [0, 1]}}, r"layers\.'5-6'\.heads has 2 values; one is "
                      "needed for each of the 4 query heads of layer 5"),
    "no heads": ({"4": TOPK, "5": {"reuse": 4, "heads": []}}, r"layers\.'5'\.heads has 0 values"),
    "a head too many": ({"4": TOPK, "5": {"reuse": 4, "heads": [0, 1, 4, 0]}}, r"layers\.'5'\.heads\[2\] = 4: layer 4 "
                        r"has 4 query heads; allowed: 0-3\."),
    "a negative head": ({"4": TOPK, "5": {"reuse": 4, "heads": [0, 1, -1, 0]}}, r"heads\.2 = -1: it should be greater"),
    "a head without a value": ({"4": {"name": "xattention", "threshold": [0.5, 0.6, 0.7]}, "5": {"reuse": 4}},
                               "xattention: threshold has 3 values, and none for query head 3: give one number, or"),
    "a huge layer": ({"4": TOPK, "5": {"reuse": 10**20}}, "too large; numbers go up to"),
    "a text": ({"4": TOPK, "5": {"reuse": "4"}}, "layers.'5': reuse = '4': it should be a valid integer"),
    "true": ({"4": TOPK, "5": {"reuse": True}}, "layers.'5': reuse = True: it should be a valid integer"),
    "a misspelt field": ({"4": TOPK, "5": {"reuse": 4, "head": [0]}}, r"unknown field 'head' = \[0\]; allowed: reuse, "
                         r"heads\. Did you mean 'heads'\?"),
    "a misspelt reuse": ({"4": TOPK, "5": {"reus": 4}}, r"unknown field 'reus' = 4; .* Did you mean 'reuse'\?"),
    "both": ({"4": TOPK, "5": {"name": "block_topk", "reuse": 4}}, "block_topk: unknown field 'reuse' = 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reused_is_refused(name: str) -> None:
    layers, said = REFUSED[name]
    with pytest.raises(SparsekitError, match=said) as caught:
        _config(layers).resolve()
    assert "\n" not in str(caught.value)


def test_a_rule_of_heads_and_the_default_reuse_nothing() -> None:
    for config in ({"default": {"reuse": 3}}, {"heads": {"5": {"0-1": {"reuse": 3}}}}):
        with pytest.raises(SparsekitError, match="a plan is reused by whole layers; `reuse` is a rule under `layers`"):
            load(config)


def test_heads_that_take_nothing_dynamic_are_refused() -> None:
    layers = {"4": TOPK, "5": {"reuse": 4, "heads": [0, 1, 0, 1]}}
    with pytest.raises(SparsekitError, match="which in heads 0-1 depends on positions alone"):
        _config(layers, {"4": {"0-1": "dense"}}).resolve()
    with pytest.raises(SparsekitError, match="`heads` gives every head of it a pattern, so that none reuses a plan"):
        _config(layers, {"5": {"0-3": "dense"}}).resolve()


def test_a_pattern_that_is_neither_static_nor_dynamic_may_be_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a `plan` alone, which may look at the prompt."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    class Plain(Pattern):
        name: Literal["plain"] = "plain"

        def plan(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
            return dense_plan(geometry)

    config = _config({"4": "plain", "5": {"reuse": 4}})
    assert config.resolve().layers[5].reused == Reused(4, (0, 1, 2, 3))
    anchor, reuses = explain(config, 300).layers[4:6]
    assert anchor.estimates and not reuses.estimates


def test_layers_of_other_heads_are_refused() -> None:
    with pytest.raises(SparsekitError, match="that layer has 4 query heads, and this one 2"):
        _config({"4": TOPK, "5": {"reuse": 4}}, layer_heads=[4] * 5 + [2] * 7).resolve()


def test_sliding_layers_are_refused() -> None:
    kinds = ["full_attention"] * 5 + ["sliding_attention"] + ["full_attention"] * 6
    model = {"layer_types": kinds, "sliding_window": 64}
    with pytest.raises(SparsekitError, match=r"layer 5: the plan of layer 4: .* cannot replace a sliding_attention"):
        _config({"4": TOPK, "5": {"reuse": 4}}, **model).resolve().own_layers()
    with pytest.raises(SparsekitError, match=r"layer 6: reuse = 5: that layer keeps its own attention \(sliding_att"):
        load({"default": TOPK, **_config({"6": {"reuse": 5}}, **model).to_dict()}).resolve().own_layers()


def test_a_process_has_a_part_of_the_heads() -> None:
    layer = _config({"4": TOPK, "5": {"reuse": 4, "heads": [1, 0, 3, 3]}}).resolve().layers[5]
    assert layer.of_heads(2, 2).reused == Reused(4, (1, 1))
    across = _config({"4": TOPK, "5": {"reuse": 4, "heads": [1, 2, 3, 3]}}).resolve().layers[5]
    assert not across.alike
    with pytest.raises(
        SparsekitError, match="heads 0-1 of a process run the plan of head 2, which another process has"
    ):
        across.of_heads(0, 2)
    assert _config({"4": TOPK, "5": {"reuse": 4}}).resolve().layers[5].alike


@pytest.mark.parametrize("dense", ["0", "2"])
def test_a_part_of_a_mixed_layer_has_the_values_of_its_heads(dense: str) -> None:
    """A list has a value for each query head of the layer, those that run another pattern too."""
    rule = {"name": "xattention", "threshold": (0.2, 0.4, 0.6, 0.8), "stride": 8}
    layer = _config({"4": rule}, {"4": {dense: "dense"}}).resolve().layers[4]
    geometry = Geometry.of(1500)
    q, k, _ = inputs_for(geometry)
    whole = layer.plan(q, k, geometry, Softmax(0.3), SharedPlans()).to_mask()
    for rank, first in enumerate((0, 2)):
        part = layer.of_heads(first, 2)
        plan = part.plan(q[:, first : first + 2], k[:, rank : rank + 1], geometry, Softmax(0.3), SharedPlans())
        assert torch.equal(plan.to_mask(), whole[:, first : first + 2])


@pytest.mark.parametrize("there", ["dense", "triangle"])
def test_a_part_in_which_nothing_is_estimated_there_reuses_nothing(there: str) -> None:
    """Beside a head of its own: the layer that it would reuse keeps no plan in that process."""
    rules = {"4": {"2-3": there}, "5": {"3": {**TOPK, "top_k": 3}}}
    part = _config({"4": TOPK, "5": {"reuse": 4}}, rules).resolve().layers[5].of_heads(2, 2)
    assert part.reused is None
    assert [pattern.name for pattern in part.patterns_at([0, 1])] == [there, "block_topk"]


# ---- what it costs


def test_explain_says_who_estimates() -> None:
    config = _config({"2": TOPK, "3-7": {"reuse": 2}, "8": TOPK, "9": {"reuse": 8}}, {"9": {"0": "triangle"}})
    found = explain(config, 32768)
    assert [row.plan_of for row in found.layers] == [None] * 3 + [2] * 5 + [None, 8, None, None]
    assert [row.layer for row in found.layers if row.estimates] == [2, 8]
    assert "Layers 3-7,9 reuse plans and have no index cost; layers 2,8 estimate." in str(found)
    assert found.layers[3].density_at_most == found.layers[2].density_at_most
    assert found.to_dict()["layers"][3]["plan_of"] == 2
    short = explain(config, 1000)
    assert {row.runs for row in short.layers[2:8]} == {"dense"}
    assert "at this length none estimates" in str(short)
    assert "reuse plans" not in str(explain(_config({"2": TOPK}), 32768))


# ---- giving back


def test_a_layer_whose_plan_is_gone_chooses_for_itself() -> None:
    xattention = {"name": "xattention", "threshold": (0.2, 0.4, 0.6, 0.8)}
    config = _config({"2": TOPK, "3-4": {"reuse": 2}, "5": xattention, "6": {"reuse": 5, "heads": [3, 3, 0, 1]}})
    back = give_back(config, [2, 5])
    layers = back.resolve().layers
    assert [layers[n].dense for n in (2, 5)] == [True, True]
    assert {layers[n].patterns[0].to_yaml()["top_k"] for n in (3, 4)} == {4}  # type: ignore[index]
    assert layers[6].patterns[0].to_yaml() == {"name": "xattention", "threshold": [0.8, 0.8, 0.2, 0.4]}
    assert not any(layer.reused for layer in layers)
    one = give_back(config, [3]).resolve().layers
    assert one[3].dense
    assert one[4].reused == Reused(2, (0, 1, 2, 3))


def test_heads_given_back_take_along_who_reused_them() -> None:
    rules = {"2": {"0": "triangle"}, "3": {"3": "dense"}}
    config = _config({"2": TOPK, "3": {"reuse": 2}, "4": {"reuse": 2, "heads": [1, 1, 2, 2]}}, rules)
    layers = give_back(config, [], {2: [3]}).resolve().layers
    names = [layers[3].patterns[i].name for i in layers[3].pattern_of_head]
    assert layers[3].reused is None
    assert names == ["triangle", "block_topk", "block_topk", "dense"]
    assert layers[4].reused == Reused(2, (1, 1, 2, 2))  # which took none of them
    mine = give_back(config, [], {4: [0]}).resolve().layers[4]
    assert mine.reused == Reused(2, (None, 1, 2, 2))
    mapped = give_back(config, [], {2: [2]}).resolve().layers[4]
    assert (mapped.reused, [p.name for p in mapped.patterns]) == (None, ["block_topk"])


@pytest.mark.parametrize("rules", [{"2": {"3": "triangle"}}, {"3": {"3": "triangle"}}])
def test_a_layer_that_is_left_nothing_to_reuse_reuses_nothing(rules: dict[str, Any]) -> None:
    config = _config({"2": TOPK, "3": {"reuse": 2}, "4": {"reuse": 2}}, rules)
    layers = give_back(config, [], {3: [0, 1, 2]}).resolve().layers
    assert layers[3].reused is None
    assert [layers[3].patterns[i].name for i in layers[3].pattern_of_head] == ["dense"] * 3 + ["triangle"]
    assert layers[4].reused is not None


def test_a_chain_is_told_without_a_model() -> None:
    config = load({"layers": {"2": TOPK, "3": {"reuse": 2}, "4": {"reuse": 3}}})
    with pytest.raises(SparsekitError, match=r"layers: reuse = 3: that layer runs the plan of layer 2 itself; reuse t"):
        give_back(config, [3])


def test_facts_of_the_model_are_not_needed_to_give_back() -> None:
    config = load({"layers": {"2": TOPK, "3": {"reuse": 2}}})
    assert give_back(config, [2]).resolve(ModelFacts(num_layers=4, num_heads=2)).layers[3].reused is None
