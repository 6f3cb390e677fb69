"""torch's default dtype and default device change nothing: every tensor here says its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sparsekit
from sparsekit import Geometry, attention, clear_caches
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend
from sparsekit.patterns import pattern_class, pattern_names
from sparsekit.plan import BlockPlan, stack_heads
from sparsekit.testing import inputs_for

CONSTRUCTORS = {"zeros", "ones", "empty", "full", "arange", "tensor", "linspace", "rand", "randn", "randint", "eye"}
GEOMETRIES = (
    Geometry.of(700, block_q=64, block_kv=64),
    Geometry.of(300, batch=2, kv_start=(0, 37), block_q=128, block_kv=64),
    Geometry.of(150, 400, block_q=64, block_kv=32),
)


@pytest.fixture(params=["bfloat16", "float64", "meta"])
def defaults(request: pytest.FixtureRequest) -> Iterator[str]:
    clear_caches()
    if request.param == "meta":
        with torch.device("meta"):
            yield request.param
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, request.param))
        try:
            yield request.param
        finally:
            torch.set_default_dtype(before)
    clear_caches()


def _pattern(name: str) -> sparsekit.Pattern:
    return pattern_class(name).from_fields({"name": name, **pattern_class(name).test_points[0]})


def _results(name: str) -> list[Tensor]:
    pattern, out = _pattern(name), []
    for geometry, (q, k, v) in zip(GEOMETRIES, INPUTS, strict=True):
        plan = pattern.plan(q, k, geometry, Softmax(0.25, 5.0, SINKS))
        for impl in ("torch", "reference"):
            out += attend(q, k, v, plan, impl=impl, softcap=5.0, sink_logits=SINKS, return_lse=True)
            out += attend(q, k, v, plan, impl=impl, return_lse=True)
        out += [plan.to_mask(), torch.tensor([plan.density(), plan.tile_density()], dtype=torch.float64, device="cpu")]
        out.append(attention(q, k, v, pattern))  # type: ignore[arg-type]
    return out


INPUTS = [inputs_for(geometry) for geometry in GEOMETRIES]
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


@cache
def _expected(name: str) -> list[Tensor]:
    """With torch's own defaults."""
    before, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            return _results(name)
    finally:
        torch.set_default_dtype(before)
        assert torch.get_default_device() == device


@pytest.mark.parametrize("name", pattern_names())
def test_results_do_not_depend_on_defaults(name: str, defaults: str) -> None:
    got = _results(name)
    clear_caches()
    for a, b in zip(got, _expected(name), strict=True):
        assert a.device.type == "cpu" and a.dtype == b.dtype
        assert torch.equal(a, b)


def test_heads_of_several_patterns(defaults: str) -> None:
    q, k, v = INPUTS[0]
    plans = [_pattern(name).plan(q, k, GEOMETRIES[0], Softmax(0.25)) for name in ("triangle", "block_topk", "dense")]
    plan = stack_heads(plans, [0, 1, 2, 0])
    assert isinstance(plan, BlockPlan)
    error = (attend(q, k, v, plan, impl="torch") - attend(q, k, v, plan, impl="reference")).abs().max()  # type: ignore[operator]
    assert float(error) < 1e-5


@pytest.mark.parametrize(
    "path",
    [p for p in Path(sparsekit.__file__).parent.rglob("*.py") if p.parent.name != "cli" and "lab" not in p.parts],
    ids=lambda p: "/".join(p.parts[-2:]),
)
def test_every_tensor_says_its_device(path: Path) -> None:
    """And its dtype, unless integers say it; device code (Triton's `tl.zeros`) has neither."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value
        if node.func.attr in CONSTRUCTORS and isinstance(owner, ast.Name) and owner.id == "torch":
            said = {keyword.arg for keyword in node.keywords}
            assert "device" in said, f"{path}:{node.lineno}: torch.{node.func.attr} without a device"
            if node.func.attr != "arange":
                assert "dtype" in said, f"{path}:{node.lineno}: torch.{node.func.attr} without a dtype"
