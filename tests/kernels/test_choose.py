"""The table of implementations: a new one is a row."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekit import Geometry, SparsekitError, attention
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend, choose, choose_call, choose_device, geometry_for
from sparsekit.kernels.choose import Implementation, narrow_tile
from sparsekit.patterns import VerticalSlash
from sparsekit.patterns.attention import tiled_for
from sparsekit.plan import BlockPlan, dense_plan

table: Any = sys.modules["sparsekit.kernels.choose"]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> list[BlockPlan]:
    """A form for this machine that covers float32 without soft-cap, and answers ones."""
    ran: list[BlockPlan] = []

    def covers(
        q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, out: Tensor | None
    ) -> list[str]:
        reasons = [] if q.dtype == torch.float32 else [f"dtype {q.dtype}: float32"]
        return reasons + (["a soft-cap"] if softmax.softcap is not None else [])

    def run(
        q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ran.append(plan)
        return torch.ones_like(q), q.new_zeros(q.shape[:3]) if return_lse else None

    row = Implementation(
        "blackwell",
        lambda device, asked: "" if device.type == "cpu" else "it is not this machine",
        covers,
        lambda q, narrow: (64, 32) if narrow else (256, 128),
        run,
    )
    monkeypatch.setattr(table, "TABLE", (row, *table.TABLE))
    return ran


def test_a_row_is_all_that_a_form_needs(stub: list[BlockPlan]) -> None:
    q = torch.randn(1, 4, 300, 16)
    assert choose("cpu") == "blackwell"
    assert choose_device("cpu").why == "the first choice, and it can"
    geometry = geometry_for(q, q)
    assert (geometry.block_q, geometry.block_kv) == (256, 128)
    assert narrow_tile(q) == (64, 32)
    assert tiled_for(VerticalSlash(), geometry, q).block_q == 64
    out = attention(q, q, q, "triangle")
    assert bool((out == 1).all()) and len(stub) == 1  # type: ignore[union-attr]
    assert stub[0].block_q == 256
    assert bool((attend(q, q, q, dense_plan(geometry), impl="blackwell") == 1).all())  # type: ignore[union-attr]


def test_what_it_does_not_cover_goes_to_the_next(stub: list[BlockPlan]) -> None:
    q = torch.randn(1, 4, 300, 16, dtype=torch.float64)
    plan = dense_plan(Geometry.of(300))
    choice = choose_call(q, q, q, plan, Softmax(0.25, 30.0))
    assert choice.impl == "torch"
    assert "blackwell does not cover it: dtype torch.float64: float32, a soft-cap" in choice.why
    assert attend(q, q, q, plan, softcap=30.0).dtype == torch.float64  # type: ignore[union-attr]
    assert not stub
    with pytest.raises(
        SparsekitError, match=r"impl='blackwell' does not cover this call: dtype torch.float64: float32; a soft-cap\."
    ):
        attend(q, q, q, plan, softcap=30.0, impl="blackwell")
    with pytest.raises(SparsekitError, match="impl='blackwell' cannot run on meta: it is not this machine"):
        choose("meta", "blackwell")


def test_the_choice_is_made_once_a_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    row = table.TABLE[2]
    counted = row._replace(covers=lambda *call: made.append(call) or [])
    monkeypatch.setattr(table, "TABLE", (*table.TABLE[:2], counted))
    q, plan = torch.randn(1, 2, 100, 16), dense_plan(Geometry.of(100))
    for _ in range(3):
        choose_call(q, q, q, plan, Softmax(0.25))
        attend(q, q, q, plan)
    assert len(made) == 1
    attend(q, q, q, plan, return_lse=True)
    assert len(made) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 0, 16)}, r"q \(1, 4, 0, 16\) is empty"),
        ({"q": torch.zeros(0, 4, 100, 16)}, r"q \(0, 4, 100, 16\) is empty"),
        ({"q": torch.zeros(1, 4, 100, 0)}, r"q \(1, 4, 100, 0\) is empty"),
        ({"k": torch.zeros(1, 0, 100, 16), "v": torch.zeros(1, 0, 100, 16)}, "k .* is empty"),
        ({"q": torch.zeros(1, 3, 100, 16)}, "same batch and head size, H a multiple of G"),
        ({"q": torch.zeros(2, 4, 100, 16)}, "same batch and head size"),
        ({"q": torch.zeros(1, 4, 100, 32)}, "same batch and head size"),
        ({"q": torch.zeros(4, 100, 16)}, r"q needs 4 dimensions .* got \(4, 100, 16\)"),
        ({"q": torch.zeros(1, 4, 101, 16)}, "q_offset=-1"),
        ({"v": torch.zeros(1, 2, 100, 8)}, "must have one shape"),
        (
            {"v": torch.zeros(1, 2, 100, 16, dtype=torch.bfloat16)},
            "of one dtype out of .* got float32, float32, bfloat16",
        ),
        ({"q": torch.zeros(1, 4, 100, 16, dtype=torch.int64)}, "of one dtype out of"),
        ({"k": torch.zeros(1, 2, 100, 16, device="meta")}, "on one device, got cpu, meta, cpu"),
        ({"sink_logits": torch.zeros(3)}, r"sink_logits \(3,\): want one logit a query head, \(4,\)"),
        ({"sink_logits": torch.zeros(1, 4)}, r"sink_logits \(1, 4\): want"),
        ({"geometry": Geometry.of(90)}, "geometry for batch 1, 90 queries, 90 keys; got 1, 100, 100"),
        ({"geometry": Geometry.of(100, batch=2)}, "geometry for batch 2"),
        ({"q": [[1.0]]}, "q is a list, not a tensor"),
        ({"scale": 0.0}, "scale=0.0: a finite number"),
    ],
)
@pytest.mark.parametrize(
    "pattern",
    ["triangle", {"name": "block_topk", "top_k": 1}, "xattention", "flexprefill", "vertical_slash", "s2o"],
    ids=str,
)
def test_tensors_that_do_not_fit_are_one_line(pattern: Any, change: dict[str, Any], message: str) -> None:
    """Before anything is planned, so the same for patterns that look at q and k and for those that do not."""
    call: dict[str, Any] = {
        "q": torch.zeros(1, 4, 100, 16),
        "k": torch.zeros(1, 2, 100, 16),
        "v": torch.zeros(1, 2, 100, 16),
    }
    with pytest.raises(SparsekitError, match=message):
        attention(pattern=pattern, **{**call, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((1, 4, 99, 16), r"out \(1, 4, 99, 16\) float32 on cpu: want q's \(1, 4, 100, 16\) float32 on cpu"),
        (torch.float16, r"out .* float16 on cpu: want q's"),
        ("meta", r"on meta: want q's"),
        ("expanded", r"out with strides \(.*\): each element needs a place of its own"),
        ("transposed", r"out with strides \(.*\): the last one is to be 1"),
    ],
)
def test_an_out_that_does_not_fit_is_one_line(change: Any, message: str) -> None:
    q, out = torch.zeros(1, 4, 100, 16), torch.zeros(1, 4, 100, 16)
    if isinstance(change, tuple):
        out = torch.zeros(change)
    elif change == "expanded":
        out = out[:, :1].expand(-1, 4, -1, -1)
    elif change == "transposed":
        out = out.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        out = out.to(change)
    with pytest.raises(SparsekitError, match=message):
        attend(q, q, q, dense_plan(Geometry.of(100)), out=out)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_an_out_in_the_memory_of_what_is_read_is_one_line(name: str) -> None:
    """Zeros for padding are written before anything is read; a plan that knows the call says so too."""
    plan = dense_plan(Geometry.of(100, batch=2, kv_end=(100, 40)))
    memory = torch.zeros(2, 102, 8, 16).transpose(1, 2)
    apart, call = torch.empty(2, 4, 100, 16), dict.fromkeys("qkv", memory[:, :4, :100])
    attend(**call, plan=plan, out=apart)
    call[name] = apart
    for out in (apart, memory[:, :4, 2:], memory[:, 4:, :100]):
        with pytest.raises(SparsekitError, match=r"out \(2, 4, 100, 16\) lies in the memory of q, k or v"):
            attend(**call, plan=plan, out=out)


@pytest.mark.parametrize("name", ["xattention", "flexprefill", "vertical_slash", "s2o"])
def test_a_dynamic_pattern_checks_what_it_plans_for(name: str) -> None:
    from sparsekit.patterns import parse_pattern

    pattern, q, k = parse_pattern(name), torch.zeros(1, 4, 100, 16), torch.zeros(1, 2, 100, 16)
    with pytest.raises(SparsekitError, match="geometry for batch 1, 90 queries"):
        pattern.plan(q, k, Geometry.of(90), Softmax(0.25))
    with pytest.raises(SparsekitError, match="same batch and head size"):
        pattern.plan(q[..., :8], k, Geometry.of(100), Softmax(0.25))
    with pytest.raises(SparsekitError, match="want one logit a query head"):
        pattern.plan(q, k, Geometry.of(100), Softmax(0.25, None, torch.zeros(5)))
