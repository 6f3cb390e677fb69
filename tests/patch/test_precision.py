"""Layers in FP8: their plans are cut for its form and run by it and nothing else, or they are refused by name."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from fp8_row import change_row, half, runs_here
from tiny import TOKENS, TRIANGLE, close, ids, logits
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import sparsekit
from sparsekit import SparsekitError
from sparsekit.models import tiny
from sparsekit.plan import BlockPlan

SPARSE = {"layers": {"1-3": TRIANGLE}}
TOPK = {"name": "block_topk", "top_k": 2, "block_tokens": 128}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[BlockPlan]:
    return runs_here(monkeypatch)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama", initializer_range=0.1, head_dim=128)


def _impls(handle: sparsekit.Handle) -> list[str]:
    return [layer.impl for layer in handle.report().layers]


def _tiles(plans: list[BlockPlan]) -> set[tuple[int, int]]:
    return {(plan.block_q, plan.block_kv) for plan in plans}


# ---- which layers run in it


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({**SPARSE, "precision": {"2-3": "fp8"}}, (2, 3)),
        ({**SPARSE, "precision": {"1,3": "fp8", "2": "model", "0": "model"}}, (1, 3)),
        ({**SPARSE, "precision": "fp8"}, (1, 2, 3)),
        ({**SPARSE, "precision": "model"}, ()),
        ({**SPARSE, "precision": "fp8", "dense_impl": "kernel"}, (0, 1, 2, 3)),
        ({**SPARSE, "precision": {"0": "fp8"}, "dense_impl": "kernel"}, (0,)),
    ],
    ids=str,
)
def test_the_layers_that_say_so_and_no_others(
    model: PreTrainedModel, ran: list[BlockPlan], config: dict[str, Any], layers: tuple[int, ...]
) -> None:
    with sparsekit.apply(model, {**config, "precision": "model"}) as handle:
        expected, plain = logits(model, ids()), _impls(handle)
    assert not ran
    with sparsekit.apply(model, config) as handle:
        close(logits(model, ids()), expected)
        assert _impls(handle) == ["hopper_fp8" if i in layers else name for i, name in enumerate(plain)]
        kept = [layer.plan for layer in handle._applied.layers if layer.patterns.layer in layers]
        assert [plan is own for plan, own in zip(ran, kept, strict=True)] == [True] * len(layers)
    assert _tiles(ran) == ({(128, 128)} if layers else set())


MIXED = {"heads": {"0-3": {"0": "dense", "1": TRIANGLE, "2-3": TOPK}}}


@pytest.mark.parametrize("rules", [SPARSE, MIXED, {"layers": {"0-1": TOPK, "2-3": {"reuse": 1}}}], ids=str)
def test_batches_chunks_and_turns_are_as_before(
    model: PreTrainedModel, ran: list[BlockPlan], rules: dict[str, Any]
) -> None:
    sample = ids(2, 520)
    mask = torch.ones_like(sample)
    mask[0, :130] = 0

    def read() -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        whole = logits(model, sample, attention_mask=mask)[mask.bool()]
        parts = [logits(model, part, past_key_values=cache) for part in sample.split([200, 256, 64], 1)]
        return [whole, *parts, logits(model, sample[:, :1], past_key_values=cache)]

    with sparsekit.apply(model, rules):
        expected = read()
    assert not ran
    with sparsekit.apply(model, {**rules, "precision": "fp8"}) as handle:
        for got, own in zip(read(), expected, strict=True):
            close(got, own)
        sparse = sum(impl == "hopper_fp8" for impl in _impls(handle))
    assert sparse == (3 if rules is SPARSE else 4)
    assert len(ran) == 4 * sparse  # the whole and three chunks; one token is decoding
    assert _tiles(ran) == {(128, 128)}


def test_rows_are_as_wide_as_its_own(
    model: PreTrainedModel, ran: list[BlockPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card the preferred form has the same tile, and one of narrow rows for columns and diagonals beside it."""
    table: Any = sys.modules["sparsekit.kernels.choose"]
    tiles = {"tile": lambda q, narrow: (64, 64) if narrow else (128, 128)}
    rows = (row._replace(**tiles) if row.name == "torch" else row for row in table.TABLE)
    monkeypatch.setattr(table, "TABLE", tuple(rows))
    short = {"name": "vertical_slash", "dense_below_tokens": TOKENS + 1}  # dense there, which the FP8 form covers
    with sparsekit.apply(model, {"layers": {"1": short, "3": short}, "precision": {"3": "fp8"}}) as handle:
        logits(model, ids())
        assert _impls(handle)[1::2] == ["torch", "hopper_fp8"]
        assert handle._applied.layers[1].plan.block_q == 64
    assert _tiles(ran) == {(128, 128)}


def test_decoding_and_short_prompts_are_the_models_own(model: PreTrainedModel, ran: list[BlockPlan]) -> None:
    own = logits(model, ids(tokens=63))
    with sparsekit.apply(model, {**SPARSE, "dense_below_tokens": TOKENS + 1, "precision": "fp8"}):
        assert torch.equal(logits(model, ids(tokens=63)), own)
        logits(model, ids())
    assert not ran


def test_the_report_has_a_column_for_its_name(model: PreTrainedModel, ran: list[BlockPlan]) -> None:
    with sparsekit.apply(model, {**SPARSE, "precision": {"3": "fp8"}}) as handle:
        logits(model, ids())
        lines = str(handle.report()).splitlines()
    [row] = [line for line in lines if line.split()[:1] == ["3"]]
    assert " hopper_fp8 " in row and row.index("triangle(") == lines[0].index("pattern")
    assert "hopper_fp8: asked for" in lines


def test_a_layer_given_back_leaves_it(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check blames the layers whose rounding it is; here their output is half of what it should be."""
    runs_here(monkeypatch, half)
    wide = {**TRIANGLE, "last_tokens": 150}
    config = {"layers": {"0-3": wide}, "dense_impl": "kernel", "budget": {"kl": 1e-3}}
    prompts = [ids()[0].tolist()]
    budget = 2 * sparsekit.check(model, config, prompts).before.mean + 1e-9
    config["budget"] = {"kl": budget}
    found = sparsekit.check(model, {**config, "precision": {"2": "fp8"}}, prompts)
    assert found.held is False and found.given_back == (2,) and found.config.precision == {}
    found = sparsekit.check(model, {**config, "precision": "fp8"}, prompts)
    rounded = {layer.layer for layer in found.config.resolve(sparsekit.models.facts(model)).layers if layer.impl}
    assert found.held is False and found.given_back and rounded == {0, 1, 2, 3} - set(found.given_back)
    dense = {"layers": {"3": wide}, "dense_impl": "kernel", "precision": "fp8", "budget": {"kl": budget}}
    for layers in ({"3": wide}, {}):
        found = sparsekit.check(model, {**dense, "layers": layers}, prompts)
        assert found.held is False and found.kept and set(found.alone) == {0, 1, 2, 3}
    with pytest.raises(SparsekitError, match=r"too short to run sparse.*at least 300 tokens \(dense_below_tokens\)"):
        sparsekit.check(model, {**dense, "dense_below_tokens": 300}, prompts)


# ---- where it cannot run


def test_a_device_that_has_no_fp8_form_is_refused_by_apply(model: PreTrainedModel) -> None:
    own = logits(model, ids())
    says = (
        r"^precision: fp8 in layer 2, which runs triangle\(.*\): no fp8 form can run it: hopper_fp8: it is not a "
        r"CUDA device; triton_fp8: it is not a CUDA device \(TRITON_INTERPRET=1 .*\); "
        "leave the layer out of `precision`, and it runs in the model's.$"
    )
    with pytest.raises(SparsekitError, match=says):
        sparsekit.apply(model, {**SPARSE, "precision": {"2": "fp8"}})
    assert torch.equal(logits(model, ids()), own)
    with sparsekit.apply(model, {"default": "dense", "precision": "fp8"}):  # it runs nothing here
        assert torch.equal(logits(model, ids()), own)


@pytest.mark.usefixtures("ran")
def test_what_apply_knows_of_a_layer() -> None:
    small, corrected = tiny("llama"), {**TRIANGLE, "correct_every": 64}
    with pytest.raises(SparsekitError, match=r"fp8 in layer 1, .*: head size 16: 128; triton_fp8: .*; leave"):
        sparsekit.apply(small, {**SPARSE, "precision": "fp8"})
    config = {"layers": {"2": TRIANGLE, "3": corrected}, "precision": "fp8"}
    with pytest.raises(SparsekitError, match=r"fp8 in layer 3, .*: outputs corrected by every 64th row; triton"):
        sparsekit.apply(tiny("llama", head_dim=128), config)
    with pytest.raises(SparsekitError, match=r"head size 16: 128, outputs corrected by every 64th row; triton"):
        sparsekit.apply(small, {"default": corrected, "precision": "fp8"})


@pytest.mark.usefixtures("ran")
def test_what_a_call_shows(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"name": "vertical_slash", "vertical_tokens": 20, "slash_tokens": 20, "dense_below_tokens": 0}
    with (
        sparsekit.apply(model, {"layers": {"1": TRIANGLE, "3": columns}, "precision": "fp8"}),
        pytest.raises(SparsekitError, match=r"fp8 in layer 3, which runs vertical_slash.*: .*single key columns"),
    ):
        logits(model, ids())
    with sparsekit.apply(model, {**SPARSE, "precision": {"3": "fp8"}}):
        change_row(monkeypatch, missing="this device lacks it")  # as a model that moved
        with pytest.raises(SparsekitError, match=r"fp8 in layer 3, .* can run it: hopper_fp8: this device lacks it;"):
            logits(model, ids())
        change_row(monkeypatch)
        with pytest.raises(SparsekitError, match=r"fp8 in layer 3, .*: dtype float32: float16 or bfloat16; triton"):
            logits(model, ids())


# ---- on a card


@pytest.mark.gpu
def test_card() -> None:
    """As far from bfloat16 as e4m3 is: torch, rounding q, k and v as it does, is 0.0003 nats from it."""
    model = tiny("llama", initializer_range=0.1, head_dim=128).to("cuda", torch.bfloat16)
    sample = ids(2, 1000).cuda()
    mask = torch.ones_like(sample)
    mask[1, :300] = 0
    kernel = {"default": "dense", "layers": {"2-3": {**TRIANGLE, "window_tokens": 200}}, "dense_impl": "kernel"}

    def read(config: dict[str, Any]) -> tuple[Tensor, list[str]]:
        with sparsekit.apply(model, config) as handle:
            said = logits(model, sample, attention_mask=mask)[mask.bool()].float().log_softmax(-1)
            return said, _impls(handle)

    wide, by = read(kernel)
    assert by == ["hopper"] * 4
    rounded, by = read({**kernel, "precision": "fp8"})
    assert by == ["hopper_fp8"] * 4
    some, by = read({**kernel, "precision": {"3": "fp8"}})
    assert by == ["hopper"] * 3 + ["hopper_fp8"]
    assert not torch.equal(some, wide)
    far = float((wide.exp() * (wide - rounded)).sum(-1).mean())
    assert 1e-5 < far < 2e-3
    columns = {"name": "vertical_slash", "vertical_tokens": 20, "slash_tokens": 20, "dense_below_tokens": 0}
    with (
        sparsekit.apply(model, {"default": columns, "precision": "fp8"}),
        pytest.raises(SparsekitError, match="precision: fp8 in layer 0, which runs vertical_slash"),
    ):
        logits(model, sample)
