"""`precision`: what it may say, which layers it means, and who else is told."""

from __future__ import annotations

from typing import Any

import pytest

import sparsekit
from sparsekit import SparsekitError, load
from sparsekit.cli.about import validate
from sparsekit.config import ModelFacts, SparseConfig, give_back
from sparsekit.config.card import card
from sparsekit.config.settle import Machine, fingerprint, settle
from sparsekit.lab.evaluate import spelled_out
from sparsekit.lab.sweep.runs import config_key

FACTS = ModelFacts(name="own/model", num_layers=8, num_heads=4, num_key_heads=2, head_dim=128)
KINDS = FACTS.model_copy(update={"layer_types": ("full_attention", "linear_attention") * 4})
TOPK = {"name": "block_topk", "top_k": 4}


def _config(precision: Any, **more: Any) -> dict[str, Any]:
    return {"layers": {"4-7": "triangle"}, "precision": precision, **more}


def _in_fp8(config: Any, facts: ModelFacts = FACTS) -> list[int]:
    return [layer.layer for layer in load(config).resolve(facts).layers if layer.impl == "fp8"]


def test_which_layers_it_means() -> None:
    assert _in_fp8({}) == _in_fp8(_config("model")) == _in_fp8(_config({})) == []
    assert _in_fp8(_config("fp8")) == [4, 5, 6, 7]
    assert _in_fp8(_config("fp8", dense_impl="kernel")) == list(range(8))
    assert _in_fp8(_config({"4,6": "fp8", 7: "fp8", "0-2": "model"})) == [4, 6, 7]
    assert _in_fp8(_config({"1": "fp8"}, dense_impl="kernel")) == [1]
    assert _in_fp8({"default": "dense", "precision": "fp8"}) == []
    assert _in_fp8({"default": "triangle", "precision": "fp8"}, KINDS) == [0, 2, 4, 6]
    assert [layer.impl for layer in load(_config("fp8")).resolve(FACTS).layers[:4]] == [None] * 4


def test_it_comes_back_as_it_was_said() -> None:
    for precision in ("model", "fp8", {"4-7": "fp8"}, {"4": "model", "5-6": "fp8"}):
        config = load(_config(precision))
        assert config.to_dict()["precision"] == precision
        assert load(config.dump()) == config
        assert load(config.dump()).resolve(FACTS) == config.resolve(FACTS)
    assert "precision" not in load({"layers": {"4": "triangle"}}).to_dict()
    rows = load(_config({"5": "fp8"})).resolve(FACTS).to_dict()
    assert [row.get("precision") for row in rows] == [None] * 5 + ["fp8"] + [None] * 2
    runs = spelled_out(load(_config({"5": "fp8"})).resolve(FACTS).layers)
    assert [(run["layers"], run.get("precision")) for run in runs] == [("0-3", None), ("4,6-7", None), ("5", "fp8")]
    part = load(_config("fp8")).resolve(FACTS).layers[4].of_heads(2, 2)
    assert part.precision == "fp8"


WRONG: list[tuple[dict[str, Any], str]] = [
    (_config("fp9"), r"precision = 'fp9': it should be 'model' or 'fp8', or ranges of layers .* Did you mean 'fp8'\?"),
    (_config(8), r"precision = 8: it should be 'model' or 'fp8', or ranges of layers with one of them each\."),
    (_config(None), r"precision = None: it should be 'model' or 'fp8'"),
    (_config(["fp8"]), r"precision = \['fp8'\]: it should be 'model' or 'fp8'"),
    (_config({"4": "modle"}), r"precision: '4' = 'modle': it should be 'model' or 'fp8'\. Did you mean 'model'\?"),
    (_config({"4": {}}), r"precision: '4' = \{\}: it should be 'model' or 'fp8'\."),
    (_config({"4-x": "fp8"}), r"precision: '4-x' is not a range"),
    (_config({"4-6": "fp8", "5": "model"}), r"precision: '5' and '4-6' overlap at 5"),
    (_config({"4-8": "fp8"}), r"precision\.'4-8': layer 8 of a model with 8 layers; allowed: 0-7\."),
    (
        _config({"3-7": "fp8"}),
        r"precision\.'3-7' = 'fp8': layer 3 is dense and runs the model's own attention; leave it out, .*dense_impl",
    ),
    (
        {"layers": {"4": TOPK, "5": {"reuse": 4}}, "precision": {"5": "fp8"}},
        r"layer 5 is in 'fp8' and runs the plan of layer 4, which is in 'model' and has other tiles; give both one",
    ),
    ({"precisoin": "fp8"}, r"unknown field 'precisoin' = 'fp8'; .* Did you mean 'precision'\?"),
]


@pytest.mark.parametrize(("config", "says"), WRONG, ids=[says[:30] for _, says in WRONG])
def test_what_is_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(SparsekitError, match=says):
        load(config).resolve(FACTS)


def test_a_layer_that_keeps_its_own_attention_is_refused() -> None:
    config = load({"default": "triangle", "precision": {"2-3": "fp8"}})
    says = (
        r"^precision\.'2-3' = 'fp8': layer 3 keeps its own attention \(linear_attention layer of the model\); leave it"
    )
    with pytest.raises(SparsekitError, match=says):
        config.resolve(KINDS)


def test_explain_says_it() -> None:
    found = sparsekit.explain(_config({"5-6": "fp8"}), 8192, FACTS)
    assert [row.precision for row in found.layers] == ["model"] * 5 + ["fp8"] * 2 + ["model"]
    assert found.to_dict()["layers"][5]["precision"] == "fp8"
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines if "triangle(" in line] == ["4", "5-6", "7"]
    assert [line.split()[0] for line in lines if " [fp8] " in line] == ["5-6"]
    assert "Layers 5-6 run in fp8, and are counted at the rate of the others." in lines
    assert validate(load(_config({"5-6": "fp8"})), FACTS)[2].endswith(") in fp8")
    short = sparsekit.explain(_config("fp8", dense_below_tokens=9000), 8192, FACTS)
    assert {row.precision for row in short.layers} == {"model"} and "fp8" not in str(short)


def test_layers_that_are_given_back_leave_it() -> None:
    def left(config: SparseConfig, facts: ModelFacts | None = None) -> Any:
        return give_back(config, [4, 6], facts=facts).to_dict()["precision"]

    assert left(load(_config("fp8"))) == "fp8"  # of layers that run here, which dense ones do not
    assert left(load(_config({"4-5": "fp8", "6": "fp8"}))) == {"5": "fp8"}
    kernel = load(_config("fp8", dense_impl="kernel"))
    assert left(kernel, FACTS) == {"0-3,5,7": "fp8"}
    assert left(load({"layers": {"4,6": "triangle"}, "precision": "fp8", "dense_impl": "kernel"}), KINDS) == {
        "0,2": "fp8"
    }
    assert left(load({**_config("fp8", dense_impl="kernel"), "model": {"num_layers": 8, "num_heads": 4}})) == left(
        kernel, FACTS
    )
    for config in (load(_config("fp8")), load(_config({"4-6": "fp8"})), kernel):
        assert not set(_in_fp8(give_back(config, [4, 6], facts=FACTS))) & {4, 6}
    with pytest.raises(SparsekitError, match="num_layers and num_heads are needed"):
        left(kernel)


def test_results_of_another_precision_are_others() -> None:
    words = ("model", "fp8", {"4-5": "fp8"}, {"4": "fp8"})
    assert len({config_key(load(_config(word))) for word in words}) == 4
    assert len({fingerprint(load(_config(word)).resolve(FACTS), FACTS) for word in words}) == 4
    for same in ({"4": "fp8", "5": "fp8"}, {"4-5": "fp8", "6": "model"}):
        assert config_key(load(_config(same))) == config_key(load(_config({"4-5": "fp8"})))
    assert config_key(load(_config({}))) == config_key(load({"layers": {"4-7": "triangle"}}))


def test_auto_of_a_pattern_takes_no_row_of_another_precision() -> None:
    auto = {**TOPK, "dense_below_tokens": "auto"}
    config = load({"layers": {"4-5": auto}, "precision": {"5": "fp8"}})
    found = settle(config.resolve(FACTS), FACTS, lambda: Machine("a card", "bfloat16"))
    assert [line.partition(":")[0] for line in found.settled] == ["layers 4", "layers 5"]
    assert "size 128, bfloat16" in found.settled[0] and "size 128, fp8" in found.settled[1]


def test_a_page_of_the_hub_says_no_command_that_refuses_it() -> None:
    model = {"name": "own/model", "num_layers": 8, "num_heads": 4}
    pages = [card("me/it", {"a.yaml": load(_config(word, model=model))}) for word in ("model", "fp8")]
    assert "vllm serve" in pages[0] and "vllm serve" not in pages[1]
    assert " [fp8] " in pages[1]
