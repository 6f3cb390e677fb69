"""Executing plans by batched torch ops, against the reference; and the door's checks."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import within_rows

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.kernels import attend
from sparsekit.patterns import AShape, Dense, Pattern, Triangle
from sparsekit.plan import CAUSAL, BlockPlan, plan_from_block_mask, stack_heads
from sparsekit.testing import inputs_for

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


def _plan(pattern: Pattern, geometry: Geometry) -> BlockPlan:
    q, k, _ = inputs_for(geometry)
    return pattern.plan(q, k, geometry, None)  # type: ignore[arg-type]


def _close(plan: BlockPlan, dtype: torch.dtype = torch.float32, **options: object) -> None:
    """Within three times the error that plain attention has in this dtype, with and without lse."""
    inputs = inputs_for(plan.geometry, dtype=dtype)
    wide = [x.double() for x in inputs]
    if "sink_logits" in options:
        options["sink_logits"] = SINKS.to(dtype)
    wide_options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected, expected_lse = attend(*wide, plan, impl="reference", return_lse=True, **wide_options)  # type: ignore[arg-type]
    plain = attend(*inputs, plan, impl="reference", **options)  # type: ignore[arg-type]
    budget = 3 * float((plain.double() - expected).abs().max()) + 1e-6
    out, lse = attend(*inputs, plan, impl="torch", return_lse=True, **options)  # type: ignore[arg-type]
    fast = attend(*inputs, plan, impl="torch", **options)  # type: ignore[arg-type]
    for got in (out, fast, within_rows(*inputs, plan, "torch", **options)):
        assert got.dtype == dtype
        assert float((got.double() - expected).abs().max()) < budget
    seen = expected_lse.isfinite()
    assert torch.equal(seen, lse.isfinite())
    assert torch.allclose(lse[seen].double(), expected_lse[seen], atol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"sink_logits": SINKS}, {"scale": 0.1}], ids=str)
@pytest.mark.parametrize("pattern", [Dense(), Triangle(sink_tokens=8, window_tokens=40, last_tokens=20)], ids=str)
def test_softmax_variants(pattern: Pattern, options: dict[str, object]) -> None:
    for geometry in (Geometry.of(300, block_q=64), Geometry.of(100, 300, batch=2, kv_start=(0, 250), block_q=64)):
        _close(_plan(pattern, geometry), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    _close(_plan(Triangle(sink_tokens=8, window_tokens=40, last_tokens=20), Geometry.of(300, block_q=64)), dtype)


def test_heads_with_patterns_of_their_own() -> None:
    for geometry in (Geometry.of(300, block_q=64), Geometry.of(300, batch=2, kv_start=(3, 100), block_q=64)):
        plans = [
            _plan(p, geometry) for p in (Dense(), AShape(sink_tokens=2, window_tokens=30), Triangle(window_tokens=9))
        ]
        plan = stack_heads(plans, [1, 0, 2, 1])
        assert plan.heads == 4
        for head, own in enumerate([1, 0, 2, 1]):
            assert torch.equal(plan.to_mask()[:, head], plans[own].to_mask()[:, 0])
        assert int(plan.multiplicity().max()) == 1
        _close(plan)


def _listed(rows: list[list[int]], geometry: Geometry, heads: int = 1, **more: torch.Tensor) -> BlockPlan:
    """A plan from entries written out, one list a row."""
    ptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
    entries = torch.tensor([entry for row in rows for entry in row], dtype=torch.int32)
    return BlockPlan(geometry, heads=heads, row_ptr=ptr, entries=entries, **more)


def test_tiles_that_start_anywhere() -> None:
    """Tiles off the grid, as diagonals want them: keys 5..20, 30..45, and the diagonal's 33..48 or 17..32."""
    geometry = Geometry.of(64, block_q=32, block_kv=16)
    rows = [[0 * 4 + CAUSAL, 16 * 4 + CAUSAL], [5 * 4, 21 * 4 + CAUSAL, 37 * 4 + CAUSAL, 53 * 4 + CAUSAL]]
    plan = _listed(rows, geometry)
    mask = plan.to_mask()[0, 0]
    assert mask[40, :5].sum() == 0
    assert mask[40, 5:41].all()
    assert plan.kept_pairs() == int(mask.sum())
    _close(plan)


def test_single_columns_count_once() -> None:
    """Columns 3, 20 and 40; row 1's tiles hold 40 already, so its bit is off."""
    geometry = Geometry.of(64, block_q=32, block_kv=32)
    rows = [[0 * 4 + CAUSAL], [32 * 4 + CAUSAL]]
    tokens = torch.tensor([[[3, 20, 40]]], dtype=torch.int32)
    plan = _listed(rows, geometry, tokens=tokens, token_bits=torch.tensor([[0b000], [0b011]], dtype=torch.int32))
    mask = plan.to_mask()[0, 0]
    assert int(plan.multiplicity().max()) == 1
    assert mask[50].nonzero().flatten().tolist() == [3, 20, *range(32, 51)]
    assert plan.kept_pairs() == int(mask.sum())
    _close(plan)
    twice = _listed(rows, geometry, tokens=tokens, token_bits=torch.tensor([[0b000], [0b111]], dtype=torch.int32))
    assert int(twice.multiplicity().max()) == 2


def test_columns_survive_stacking() -> None:
    geometry = Geometry.of(64, block_q=32, block_kv=32)
    tokens = torch.tensor([[[3, 20]]], dtype=torch.int32)
    bits = torch.tensor([[0b00], [0b11]], dtype=torch.int32)
    columns = _listed([[CAUSAL], [32 * 4 + CAUSAL]], geometry, tokens=tokens, token_bits=bits)
    plan = stack_heads([columns, _plan(AShape(window_tokens=5), geometry)], [0, 1, 0, 1])
    assert torch.equal(plan.to_mask()[:, 2], columns.to_mask()[:, 0])
    _close(plan)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_block_masks(heads: int) -> None:
    geometry = Geometry.of(300, block_q=64, block_kv=32)
    generator = torch.Generator().manual_seed(heads)
    mask = torch.rand(1, heads, geometry.rows, 10, generator=generator) < 0.4
    own = torch.arange(300) // 32
    mask[:, :, torch.arange(300) // 64, own] = True
    plan = plan_from_block_mask(mask, geometry)
    i, j = torch.arange(300)[:, None], torch.arange(300)[None]
    assert torch.equal(plan.to_mask()[0], mask[0][:, i // 64, j // 32] & (j <= i))
    _close(plan)


def test_inputs_in_either_layout() -> None:
    plan = _plan(Triangle(window_tokens=40), Geometry.of(300))
    q, k, v = inputs_for(plan.geometry)
    assert not q.is_contiguous()
    one, other = attend(q, k, v, plan), attend(q.contiguous(), k.contiguous(), v.contiguous(), plan)
    assert torch.equal(one, other)
    assert one.transpose(1, 2).is_contiguous()


def test_triangle_runs_in_a_handful_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """No loop over rows: 8 calls at 4K tokens and at 16K."""
    from sparsekit.kernels.attend import torch_blocks

    for tokens in (4096, 16384):
        calls = []
        real = torch_blocks.scaled_dot_product_attention

        def counted(*args: object, calls: list[int] = calls, real: object = real, **kw: object) -> torch.Tensor:
            calls.append(1)
            return real(*args, **kw)  # type: ignore[operator,no-any-return]

        monkeypatch.setattr(torch_blocks, "scaled_dot_product_attention", counted)
        plan = _plan(Triangle(), Geometry.of(tokens))
        attend(*inputs_for(plan.geometry), plan)
        monkeypatch.undo()
        assert len(calls) <= 8


# ---- the door


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "4 dimensions"),
        (lambda q, k, v: (q, k, v[..., :8]), r"k .* and v .* one shape"),
        (lambda q, k, v: (q[:, :3], k, v), "H a multiple of G"),
        (lambda q, k, v: (q.half(), k, v), "one dtype"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "one dtype out of"),
        (lambda q, k, v: (q[:, :, :50], k, v), "plan for batch 1, 100 queries"),
        (lambda q, k, v: (q.requires_grad_(), k, v), "forward only.*inference_mode"),
        (lambda q, k, v: (q.to("meta"), k, v), "one device"),
    ],
)
def test_refused_inputs(change: object, message: str) -> None:
    plan = _plan(Dense(), Geometry.of(100))
    with pytest.raises(SparsekitError, match=message):
        attend(*change(*inputs_for(plan.geometry)), plan)  # type: ignore[operator]


def test_refused_options() -> None:
    geometry = Geometry.of(100)
    plan, inputs = _plan(Dense(), geometry), inputs_for(geometry)
    with pytest.raises(SparsekitError, match=r"impl='tritn': .*Did you mean 'triton'"):
        attend(*inputs, plan, impl="tritn")
    with pytest.raises(SparsekitError, match=r"sink_logits \(3,\): .*\(4,\)"):
        attend(*inputs, plan, sink_logits=torch.zeros(3))
    three = stack_heads([_plan(AShape(window_tokens=3), geometry), plan], [0, 1, 0])
    with pytest.raises(SparsekitError, match=r"plan with 3 heads: want 1, 2 .* or 4"):
        attend(*inputs, three)
