"""Every n-th query, and the correction, by the Triton forms in Triton's interpreter; `test_correct.py` runs this
file in a process of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsekit.call.geometry import Geometry
from sparsekit.kernels import attend
from sparsekit.kernels.attend import triton_blocks
from sparsekit.kernels.attend.correct import anchor_queries
from sparsekit.plan import TokenRule, dense_plan, plan_from_rule, stack_heads
from sparsekit.testing import GEOMETRIES, inputs_for

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
geometries = pytest.mark.parametrize("geometry", GEOMETRIES[3:], ids=str)


@pytest.mark.parametrize(("every", "cut"), [(7, False), (7, True), (64, False)])
@geometries
def test_anchors(geometry: Geometry, every: int, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, and cut over keys and merged."""
    if cut:
        monkeypatch.setattr(triton_blocks, "_cut", lambda q, key_heads, plan, tile: (plan.samples * plan.rows, 3))
    q, k, v = inputs_for(geometry)
    some, plan = anchor_queries(q, geometry.anchors(every)), dense_plan(geometry.anchors(every))
    options: dict[str, Any] = {"sink_logits": SINKS, "softcap": 5.0} if every == 7 else {}
    wide = (x.double() for x in (some, k, v))
    expected, expected_lse = attend(*wide, plan, impl="reference", return_lse=True, **options)
    out, lse = attend(some, k, v, plan, impl="triton", return_lse=True, **options)
    assert (out - expected).abs().max() < 1e-5
    seen = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert (lse[seen] - expected_lse[seen]).abs().max() < 1e-5


@pytest.mark.parametrize("every", [7, 64])
@geometries
def test_correction(geometry: Geometry, every: int) -> None:
    """Rows of one pattern, and of heads that differ, among them dense ones."""
    q, k, v = inputs_for(geometry)
    rules = [TokenRule(5, 40, max(s.prompt_tokens - 20, 0)) for s in geometry.spans]
    plan = plan_from_rule(rules, geometry).corrected(every)
    if every == 7:
        wider = plan_from_rule([rule._replace(window=60) for rule in rules], geometry).corrected(every)
        plan = stack_heads([plan, dense_plan(geometry), wider], (0, 1, 2, 0))
    expected = attend(q.double(), k.double(), v.double(), plan, impl="torch")
    assert (attend(q, k, v, plan, impl="triton") - expected).abs().max() < 1e-5


def test_a_head_size_that_is_padded() -> None:
    geometry = Geometry.of(200, block_q=64, block_kv=64)
    q, k, v = (torch.randn(1, heads, 200, 80) for heads in (4, 2, 2))
    plan = plan_from_rule(TokenRule(5, 40, 180), geometry).corrected(16)
    plan = replace(plan, order=None)
    expected = attend(q.double(), k.double(), v.double(), plan, impl="torch")
    assert (attend(q, k, v, plan, impl="triton") - expected).abs().max() < 1e-5
