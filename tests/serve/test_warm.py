"""vLLM's profiling run has every kernel compiled that traffic asks for: no request waits for the compiler."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from children import compiled

LAYERS = [
    ["triangle"], ["triangle", "dense"], ["block_topk"], ["vertical_slash"], ["flexprefill"], ["flashprefill"],
    ["prism"], ["s2o"], ["xattention"], ["triangle", "block_topk"],
    *(["e4m3", name] for name in ("triangle", "block_topk", "vertical_slash", "flexprefill", "s2o", "xattention")),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="vLLM for a CPU comes without Triton; `make test` runs this")
@pytest.mark.parametrize(
    ("capability", "processors", "layers"),
    [
        ((9, 0), 132, LAYERS),
        ((8, 0), 108, [["triangle"], ["block_topk"], ["triangle", "block_topk"], ["e4m3", "triangle"]]),
    ],
    ids=["hopper", "portable"],
)
def test_traffic_asks_for_no_kernel_that_the_profiling_run_did_not_compile(
    capability: tuple[int, int], processors: int, layers: list[list[str]], tmp_path: Path
) -> None:
    script = str(Path(__file__).with_name("asked_forms.py"))
    found = compiled(script, tmp_path, json.dumps([capability, processors, layers, 80]))
    late = {" and ".join(names): made["late"] for names, made in zip(layers, found, strict=True) if made["late"]}
    assert late == {}
    assert all(made["ran"] >= 10 for made in found)
    if capability == (9, 0):  # nor does Triton look at the arguments again
        assert [made["looked up late"] for made in found] == [0] * len(layers)
    assert sum(made["warm"] for made in found) >= 3 * len(layers)
