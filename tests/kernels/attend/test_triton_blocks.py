"""The portable Triton kernel, interpreted in a child process; and the door: which implementation runs, and why."""

from __future__ import annotations

import sys

import pytest
import torch
from children import interpret

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import IMPLEMENTATIONS, attend, choose, choose_call, choose_device, preferred_tile
from sparsekit.plan import TokenRule, dense_plan, plan_from_rule
from sparsekit.testing import inputs_for


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    interpret("attend/interpreted_triton_blocks.py")


def test_a_cpu_runs_torch_and_says_why() -> None:
    assert choose("cpu") == "torch"
    assert "not a CUDA device" in choose_device("cpu").why
    assert preferred_tile("cpu") == (128, 64)
    geometry = Geometry.of(65)
    choice = choose_call(*inputs_for(geometry), dense_plan(geometry), Softmax(0.25))
    assert choice.impl == "torch"


@pytest.mark.parametrize("impl", ["triton", "hopper"])
def test_a_kernel_that_cannot_run_here_is_an_error(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    geometry = Geometry.of(65)
    with pytest.raises(SparsekitError, match=rf"impl='{impl}' cannot run on cpu: it is not a CUDA device"):
        attend(*inputs_for(geometry), dense_plan(geometry), impl=impl)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["sparsekit.kernels.choose"], "find_spec", lambda name: None)
    with pytest.raises(SparsekitError, match="triton is not installed"):
        choose("cpu", "triton")


def test_unknown_implementation() -> None:
    with pytest.raises(SparsekitError, match=r"impl='trition': one of .*Did you mean 'triton'\?"):
        choose("cpu", "trition")
    assert set(IMPLEMENTATIONS) == {"triton", "hopper", "hopper_fp8", "triton_fp8", "torch", "reference"}


def test_sink_logits_reach_the_kernels_without_a_stride() -> None:
    """Every kernel reads the logit of head h at address h."""
    logits = torch.randn(8)
    for given in (logits[::2], logits[:1].expand(4), logits.view(2, 4)[1]):
        sinks = Softmax(0.25, None, given).sink_logits
        assert sinks is not None
        assert sinks.stride() == (1,)
        assert torch.equal(sinks, given)
    assert Softmax(0.25, None, logits).sink_logits is logits
    assert Softmax(0.25).sink_logits is None


def test_a_plan_on_another_device_is_refused() -> None:
    geometry = Geometry.of(65, block_q=64)
    plan = plan_from_rule(TokenRule(1, 5, 60), geometry).to("meta")
    with pytest.raises(SparsekitError, match=r"plan\.row_ptr is on meta, q on cpu"):
        attend(*inputs_for(geometry), plan, impl="torch")
