"""Sums over the last queries' softmax: the torch path against loops in float64; the Triton path in a child process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from children import compiled, interpret
from kernel_cases import GEOMETRIES, tensors

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.select.last_queries import last_query_sums

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    interpret("select/interpreted_last_queries.py")


@pytest.mark.slow
def test_it_compiles_for_hopper(tmp_path: Path) -> None:
    """Every kernel for sm_90: what it takes of a processor, and that logits run on matrix instructions."""
    made = compiled("select/compile_last_queries.py", tmp_path)
    names = {case["kernel"] for case in made}
    assert names >= {"_denominators", "_sums", "_tables", "_walk", "_column_bits", "_tokens", "_decide", "_count_map",
                     "_map_threshold", "_write_bits"}  # fmt: skip
    for case in made:
        assert case["shared"] <= 232_448, case
        assert case["serialised"] == 0, case
        assert case["spilled"] <= 512, case  # bytes a thread: the widest tiles of float32 and head size 256
        if case["kernel"] in ("_denominators", "_sums"):
            assert case["wgmma"] > 0, case


@pytest.mark.parametrize("queries", [1, 20, 64, 128])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_sums_by_loops(name: str, queries: int) -> None:
    geometry = GEOMETRIES[name]
    q, k, _ = tensors(geometry, torch.float32)
    for softmax in (Softmax(0.25), Softmax(0.7, softcap=2.0, sink_logits=SINKS)):
        got = last_query_sums(q, k, geometry, softmax, queries)
        expected = torch.zeros_like(got).double()
        for b, span in enumerate(geometry.spans):
            for i in range(max(span.q_end - queries, span.q_first), span.q_end):
                keys = k[b, :, geometry.kv_start[b] : geometry.kv_start[b] + i + 1].double()
                for h in range(4):
                    z = keys[h // 2] @ q[b, h, geometry.q_index(b, i)].double() * softmax.scale
                    if softmax.softcap is not None:
                        z = softmax.softcap * torch.tanh(z / softmax.softcap)
                    norm = z.exp().sum()
                    if softmax.sink_logits is not None:
                        norm = norm + softmax.sink_logits[h].double().exp()
                    expected[0, b, h, : i + 1] += z.exp() / norm
                    expected[1, b, h, : i + 1] += z.exp().flip(0) / norm
        assert float((got - expected).abs().max()) < 1e-5


def test_columns_and_distances_hold_all_mass() -> None:
    geometry = Geometry.of(500, 700, block_q=64)
    q, k, _ = tensors(geometry, torch.float32)
    sums = last_query_sums(q, k, geometry, Softmax(0.25), 64)
    assert torch.allclose(sums.sum(-1), torch.full((2, 1, 4), 64.0))
    sums = last_query_sums(q, k, geometry, Softmax(0.25, sink_logits=SINKS), 64)
    assert bool((sums.sum(-1) < 64).all())
    assert torch.allclose(sums[0].sum(-1), sums[1].sum(-1))


def test_forced_places() -> None:
    geometry = Geometry.of(150, batch=2, kv_start=(0, 145))
    q, k, _ = tensors(geometry, torch.float32)
    sums = last_query_sums(q, k, geometry, Softmax(0.25), 64, force_columns=30, force_distances=100)
    assert sums[0].isinf().sum(-1).tolist() == [[30] * 4, [5] * 4]
    assert sums[1].isinf().sum(-1).tolist() == [[100] * 4, [5] * 4]
    assert bool((sums[:, 1, :, 5:] == 0).all())


@pytest.mark.parametrize("queries", [0, 129])
def test_refusals(queries: int) -> None:
    geometry = Geometry.of(150)
    q, k, _ = tensors(geometry, torch.float32)
    with pytest.raises(SparsekitError, match=f"queries={queries}: 1 to 128"):
        last_query_sums(q, k, geometry, Softmax(0.25), queries)
