"""The portable kernels on devices that are not here, AMD's gfx942 and NVIDIA's sm_100: all of them compile, and each
program fits."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from children import compiled
from test_compile import LIMITS

import sparsekit

KERNELS = Path(sparsekit.__file__).parent / "kernels"
# Kernels that multiply matrices.
PRODUCTS = {
    "_attend",
    "_attend_ranked",
    "_antidiagonals",
    "_scores",
    "_query_lse",
    "_denominators",
    "_sums",
    "_segment_scores",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compiled("compile_targets.py", tmp_path_factory.mktemp("triton"))


@pytest.mark.slow
def test_they_fit(made: list[dict[str, Any]]) -> None:
    for one in made:
        assert one["shared"] <= LIMITS[one["target"]], one
        assert (one["matrix"] > 0) == (one["kernel"] in PRODUCTS), one
        assert one.get("spilled", 0) == one.get("scratch", 0) == 0, one  # AMD's: registers are in its assembly


@pytest.mark.slow
def test_none_is_forgotten(made: list[dict[str, Any]]) -> None:
    started = {
        name
        for file in KERNELS.rglob("*triton*.py")
        for name in re.findall(r"\b(?:launch|_start)\(\s*(_\w+),", file.read_text())
    }
    assert {one["kernel"] for one in made if one["target"] == "AMD gfx942"} == started
    assert {one["kernel"] for one in made if one["target"] == "NVIDIA sm_100"} >= PRODUCTS


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed; kernels are looked up in its files")
def test_on_amd_a_kernel_for_small_tensors_is_not_started_on_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton addresses storage below 2 GiB in 32 bits there, so what was compiled for it must not see more."""
    from triton.backends.amd.compiler import HIPBackend

    from sparsekit.kernels import launch

    small, large = (torch.empty(n, dtype=torch.uint8, device="meta") for n in ((1 << 31) - 1, 1 << 31))
    assert HIPBackend.get_tensor_specialization(small) != HIPBackend.get_tensor_specialization(large)
    assert launch._pointer_form(small) == launch._pointer_form(large)
    monkeypatch.setattr(launch, "AMD", True)
    assert launch._pointer_form(small) != launch._pointer_form(large)
    assert launch._pointer_form(small) == launch._pointer_form(torch.empty(16, dtype=torch.uint8, device="meta"))
