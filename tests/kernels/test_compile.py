"""The portable kernel compiled for cards that are not here: shared memory, matrix instructions, copy engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from sparsekit.kernels.device import TARGETS

# Bytes of shared memory that a program may take.
LIMITS = {target.name: target.shared_bytes for target in TARGETS}
SHARED = {(major, minor): LIMITS[f"NVIDIA sm_{major}{minor}"] for major, minor in ((8, 0), (8, 9), (9, 0))}
CASES = [
    (capability, kind, dim, dtype)
    for capability, kind, dim, dtype in (
        *(((9, 0), kind, dim, "bfloat16") for kind in ("dense", "triangle", "columns") for dim in (64, 128, 256)),
        *(((9, 0), "triangle", dim, "float16") for dim in (16, 96)),
        *(((9, 0), kind, 128, "bfloat16") for kind in ("chunk", "cut")),
        *(((9, 0), "dense", dim, "float32") for dim in (64, 128, 256)),
        *(((8, 0), kind, 128, "bfloat16") for kind in ("dense", "triangle", "columns")),
        *((capability, "pages", 128, "bfloat16") for capability in ((9, 0), (8, 0))),
        *(((8, 9), "triangle", dim, dtype) for dim in (128, 256) for dtype in ("bfloat16", "float32")),
    )
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """All cases, compiled in one child process: its Triton must compile even where this one interprets."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    ran = subprocess.run(
        [sys.executable, __file__, json.dumps(CASES)], env=env, capture_output=True, text=True, timeout=900
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, dict[str, int]] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_compiles_and_fits(case: tuple[tuple[int, int], str, int, str], compiled: dict[str, dict[str, int]]) -> None:
    (major, minor), kind, dim, dtype = case
    made = compiled[json.dumps([[major, minor], kind, dim, dtype])]
    assert made["shared"] <= SHARED[major, minor]
    if (major, minor) == (9, 0):
        assert (made["tma"] > 0) == (kind != "pages")  # a tile of several pages is no box
    assert (made["wgmma"] if major == 9 else made["mma"]) > 0
    if dtype != "float32":
        # ptxas warns C75xx where it takes matrix instructions one by one; the speed rests on its silence.
        assert made["serialised"] == 0


def _compile(case: list[object]) -> dict[str, int]:
    """Runs in the child process, with a driver that only names the target."""
    import torch

    from sparsekit.call.geometry import Geometry
    from sparsekit.call.keys import Keys
    from sparsekit.call.softmax import Softmax
    from sparsekit.kernels.attend import triton_blocks as kernel
    from sparsekit.plan import TokenRule, dense_plan, plan_from_rule

    capability, kind, dim, dtype = tuple(case[0]), case[1], case[2], getattr(torch, case[3])  # type: ignore[arg-type, call-overload]
    Driver.capability = capability[0] * 10 + capability[1]
    kernel._has_tma = lambda device: capability[0] >= 9  # type: ignore[assignment]
    kernel.processors_of = lambda device: 10**6 if kind == "cut" else 1  # type: ignore[assignment]
    tokens = 32768 if kind == "cut" else 4096
    geometry = Geometry.of(300, tokens) if kind == "chunk" else Geometry.of(tokens)
    plan = dense_plan(geometry)
    if kind != "dense":
        plan = plan_from_rule(TokenRule(8, 512, tokens - 128), geometry)
    if kind == "columns":
        from dataclasses import replace

        words = torch.zeros(plan.rows, 32, dtype=torch.int32)
        plan = replace(plan, tokens=torch.arange(1024, dtype=torch.int32).view(1, 1, -1), token_bits=words)
    q = torch.empty(1, geometry.q_len, 32, dim, dtype=dtype).transpose(1, 2)
    k = torch.empty(1, tokens, 8, dim, dtype=dtype).transpose(1, 2)
    lse = torch.empty(1, 32, geometry.q_len)
    tile = kernel.tile_for(capability, dim, dtype, kernel._rows_are_short(plan))  # type: ignore[arg-type]
    keys = Keys(k, k)
    if kind == "pages":
        pages = torch.empty(300, 8, 16, 2 * dim, dtype=dtype)
        keys = Keys(*pages.split(dim, -1), torch.zeros(1, tokens // 16, dtype=torch.int32))
    launch = kernel._make_launch(q, keys, plan, tile, capability)  # type: ignore[arg-type]
    _, args, flags = launch.arguments(q, keys, torch.empty_like(q), lse, Softmax(dim**-0.5))  # type: ignore[operator]
    made = kernel._attend.warmup(*args, grid=(1,), **launch.options, **flags)
    if kind == "cut":
        assert launch.merge_grid[0] > 0
    return {"shared": made.metadata.shared, **_counts(made.asm["ptx"], Driver.capability)}


def _counts(ptx: str, capability: int) -> dict[str, int]:
    return {
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "serialised": ptxas(ptx, capability)[0].count("(C75"),
    }


@cache
def ptxas(ptx: str, capability: int) -> tuple[str, bytes]:
    """What it says of a kernel, and the cubin that it makes."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        target = f"--gpu-name=sm_{capability}" + ("a" if capability >= 90 else "")
        command = [get_ptxas(capability).path, "-v", target, str(source), "-o", str(cubin)]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        return said.stdout + said.stderr, cubin.read_bytes()


def offline() -> None:
    """Triton compiles for the card that `Driver` names, down to PTX. A cubin is made by `ptxas` alone, and once."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    CUDABackend.make_cubin = lambda self, ptx, *_: b""  # type: ignore[method-assign]
    driver.set_active(Driver())


class Driver:
    """What Triton asks a driver for when it compiles."""

    capability = 90
    amd = ""  # an architecture of AMD's, in place of a capability

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("hip", self.amd, 64) if self.amd else GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int | str:
        return self.amd or self.capability  # Triton keeps one target a device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> None:
        return None


if __name__ == "__main__":
    offline()
    print(json.dumps({json.dumps(case): _compile(case) for case in json.loads(sys.argv[1])}))
