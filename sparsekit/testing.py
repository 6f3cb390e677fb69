"""The conformance kit for patterns: what design and kernels rely on, checked on small inputs.

    from sparsekit.testing import check_pattern
    check_pattern(MyPattern(window_tokens=40))

Every check is a function of its own that raises AssertionError with the geometry that broke it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry, Span
from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError
from sparsekit.kernels import attend
from sparsekit.patterns import BlockPattern, Blocks, Pattern, StaticPattern, parse_pattern
from sparsekit.plan import BlockPlan, dense_plan

__all__ = ["GEOMETRIES", "Inputs", "check_pattern", "inputs_for"]

Inputs = tuple[Tensor, Tensor, Tensor]
HEADS, KEY_HEADS, DIM = 4, 2, 16
EVERY = 50  # rows from one to the next by which the others are corrected, for patterns that do not say

# Odd lengths, chunks (Q < K, off the tile grid), a StaticCache's spare keys, padding on both sides, a known prompt end.
GEOMETRIES: tuple[Geometry, ...] = (
    *(Geometry.of(n, block_q=64, block_kv=64) for n in (1, 63, 64, 65, 300)),
    Geometry.of(300, block_q=128, block_kv=64),
    Geometry.of(300, block_q=32, block_kv=128, batch=2),
    Geometry.of(100, 300, block_q=64, block_kv=32),
    Geometry.of(65, 400, q_offset=150, block_q=64, block_kv=64),
    Geometry.of(100, 300, prompt_len=1000, block_q=64, block_kv=64),
    Geometry.of(300, batch=3, kv_start=(0, 37, 250), block_q=64, block_kv=64),
    Geometry.of(300, batch=3, kv_end=(300, 37, 250), block_q=64, block_kv=64),
    Geometry.of(100, 300, batch=2, kv_start=(250, 0), block_q=64, block_kv=64),
)


def check_pattern(pattern: Pattern, geometries: Iterable[Geometry] = GEOMETRIES) -> None:
    """Check a pattern against the contract of plans.

    Every plan keeps a subset of the causal pairs, none twice; every query keeps itself; padding queries keep nothing;
    planning twice gives the same plan; a sample's plan does not depend on its place in the batch; counted pairs are the
    mask's; the batched execution equals the reference, and its correction by dense rows the formula; YAML brings the
    pattern back. A static pattern's plan is its `keep` exactly, a chunk of a known prompt is the whole prompt's rows,
    and no query sees what comes after it. A `BlockPattern`'s plans depend on its scores, unless all of them are dense.

    Raises:
        AssertionError: what failed, for which pattern and geometry.
    """
    assert parse_pattern(pattern.to_yaml()) == pattern, f"{pattern}: to_yaml does not read back as the same pattern"
    checks: list[Callable[[Pattern, BlockPlan, Geometry, Inputs], None]] = [
        _check_pairs,
        _check_ascending,
        _check_deterministic,
        _check_batch_order,
        _check_execution,
        _check_no_leak,
    ]
    geometries = tuple(geometries)
    if isinstance(pattern, BlockPattern):
        _check_scores_matter(pattern, geometries)
    for geometry in geometries:
        inputs = inputs_for(geometry)
        plan = _plan(pattern, geometry, inputs)
        assert plan.correct_every in (pattern.correct_every or 0, 0), f"{pattern}: its plan has another correction"
        for check in checks:
            check(pattern, plan.corrected(0), geometry, inputs)
        _check_correction(pattern, plan.corrected(pattern.correct_every or EVERY), geometry, inputs)
        if isinstance(pattern, StaticPattern):
            _check_keep(pattern, plan, geometry)
            _check_chunk(pattern, geometry)


def inputs_for(geometry: Geometry, seed: int = 0, dtype: torch.dtype = torch.float32) -> Inputs:
    """Random q (B, 4, Q, 16), k and v (B, 2, K, 16), laid out as transformers hands them over."""
    g = torch.Generator("cpu").manual_seed(seed)

    def tensor(tokens: int, heads: int) -> Tensor:
        shape = geometry.batch, tokens, heads, DIM
        return torch.randn(shape, generator=g, dtype=torch.float32, device="cpu").to(dtype).transpose(1, 2)

    return tensor(geometry.q_len, HEADS), tensor(geometry.kv_len, KEY_HEADS), tensor(geometry.kv_len, KEY_HEADS)


def _plan(pattern: Pattern, geometry: Geometry, inputs: Inputs) -> BlockPlan:
    try:
        return pattern.plan(inputs[0], inputs[1], geometry, Softmax(DIM**-0.5))
    except Exception as error:  # of the pattern's own code: name the call that broke it
        said = error if isinstance(error, SparsekitError) else f"{type(error).__name__}: {error},"
        raise AssertionError(f"{pattern}: {said} {geometry}") from error


def _valid(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """bool (B, Q, K) causal pairs of valid queries and keys, and bool (B, Q, K) each query's own key."""
    query = torch.arange(geometry.q_len, device="cpu")[None, :, None] + geometry.q_offset
    key = torch.arange(geometry.kv_len, device="cpu")[None, None]
    start = torch.tensor(geometry.kv_start, dtype=torch.int64, device="cpu")[:, None, None]
    end = torch.tensor(geometry.kv_end, dtype=torch.int64, device="cpu")[:, None, None]
    inside = (query >= start) & (query < end) & (key >= start) & (key < end)
    return inside & (key <= query), inside & (key == query)


def _check_pairs(pattern: Pattern, plan: BlockPlan, geometry: Geometry, inputs: Inputs) -> None:
    often = plan.multiplicity()
    causal, own = _valid(geometry)
    assert int(often.max()) <= 1, f"{pattern}: a pair is computed {int(often.max())} times, {geometry}"
    assert not (often.bool() & ~causal[:, None]).any(), f"{pattern}: a pair outside the causal ones, {geometry}"
    assert (often.bool() | ~own[:, None]).all(), f"{pattern}: a query does not keep itself, {geometry}"
    assert plan.kept_pairs() == int(often.sum()), f"{pattern}: kept_pairs() is not the mask's count, {geometry}"
    assert 0 < plan.density() <= 1, f"{pattern}: density {plan.density()}, {geometry}"


def _check_ascending(pattern: Pattern, plan: BlockPlan, geometry: Geometry, inputs: Inputs) -> None:
    """Kernels that join plans walk a row's tiles from left to right."""
    for s in range(plan.samples):
        before = (-1, -1)
        for row, head, _, key in plan.entry_blocks(s):
            owner = torch.cat([key.new_tensor([before[0]]), head * plan.rows + row])
            start = torch.cat([key.new_tensor([before[1]]), key])
            same = owner.diff() == 0
            assert (start.diff()[same] > 0).all(), f"{pattern}: a row's tiles do not ascend, {geometry}"
            off = plan.on_grid and bool((key % plan.block_kv).any())
            assert not off, f"{pattern}: a tile off the grid, of a plan that says on_grid, {geometry}"
            before = int(owner[-1]), int(start[-1])


def _check_deterministic(pattern: Pattern, plan: BlockPlan, geometry: Geometry, inputs: Inputs) -> None:
    again = _plan(pattern, geometry, tuple(x.clone() for x in inputs))  # type: ignore[arg-type]
    for name, tensor in plan.tensors.items():
        assert torch.equal(tensor, again.tensors[name]), f"{pattern}: {name} differs between two plans, {geometry}"


def _check_batch_order(pattern: Pattern, plan: BlockPlan, geometry: Geometry, inputs: Inputs) -> None:
    if geometry.batch == 1:
        return
    order = list(range(geometry.batch))[::-1]
    turned = Geometry.of(
        geometry.q_len,
        geometry.kv_len,
        batch=geometry.batch,
        q_offset=geometry.q_offset,
        kv_start=[geometry.kv_start[i] for i in order],
        kv_end=[geometry.kv_end[i] for i in order],
        prompt_len=[max(geometry.prompt_tokens[i], 1) for i in order],
        block_q=geometry.block_q,
        block_kv=geometry.block_kv,
    )
    again = _plan(pattern, turned, tuple(x[order] for x in inputs)).to_mask()  # type: ignore[arg-type]
    assert torch.equal(plan.to_mask()[order], again), (
        f"{pattern}: the plan depends on the order of the batch, {geometry}"
    )


def _check_execution(pattern: Pattern, plan: BlockPlan, geometry: Geometry, inputs: Inputs) -> None:
    q, k, v = (x.double() for x in inputs)
    expected, expected_lse = attend(q, k, v, plan, impl="reference", return_lse=True)
    out, lse = attend(*inputs, plan, impl="torch", return_lse=True)
    fast = attend(*inputs, plan, impl="torch")
    assert isinstance(fast, Tensor)
    for name, got in (("out", out), ("out without lse", fast)):
        error = (got.double() - expected).abs().max()
        assert error < 1e-5, f"{pattern}: {name} of impl='torch' is {error:.1e} off the reference, {geometry}"
    seen = expected_lse.isfinite()
    assert torch.equal(seen, lse.isfinite()), f"{pattern}: lse is not -inf exactly at padding, {geometry}"
    assert (lse[seen] - expected_lse[seen]).abs().max() < 1e-5, f"{pattern}: lse is off the reference, {geometry}"


def _check_correction(pattern: Pattern, plan: BlockPlan, geometry: Geometry, inputs: Inputs) -> None:
    """`out[i] = sparse[i] + dense[a] - sparse[a]`, a the first query of i's block; rows dense by the plan stay."""
    q, k, v = (x.double() for x in inputs)
    own, every = plan.corrected(0), plan.correct_every
    sparse = attend(q, k, v, own, impl="reference")
    assert isinstance(sparse, Tensor)
    expected = sparse
    if not plan.all_dense:
        expected, dense = sparse.clone(), attend(q, k, v, dense_plan(geometry), impl="reference")
        assert isinstance(dense, Tensor)
        for b, span in enumerate(geometry.spans):
            position = torch.arange(span.q_first, span.q_end, device="cpu")
            shift = geometry.kv_start[b] - geometry.q_offset
            row, anchor = position + shift, (position // every * every).clamp(min=span.q_first) + shift
            change = dense[b][:, anchor] - sparse[b][:, anchor]
            same = plan.dense_queries(b if plan.samples > 1 else 0)
            if same is not None:
                change[same.repeat_interleave(HEADS // len(same), 0)] = 0
            expected[b][:, row] += change
    got = attend(*inputs, plan, impl="torch")
    assert isinstance(got, Tensor)
    error = (got.double() - expected).abs().max()
    assert error < 1e-5, f"{pattern}: corrected by every {every}th row, the output is {error:.1e} off, {geometry}"
    if not plan.all_dense and plan.ranked is None:
        anchors = sum(p + 1 for span in geometry.spans for p in _anchors(span, every)) * plan.heads
        assert plan.kept_pairs() == own.kept_pairs() + anchors, f"{pattern}: anchors are counted wrongly, {geometry}"


def _anchors(span: Span, every: int) -> set[int]:
    return {max(p // every * every, span.q_first) for p in range(span.q_first, span.q_end)}


def _check_no_leak(pattern: Pattern, plan: BlockPlan, geometry: Geometry, inputs: Inputs) -> None:
    """With the plan held fixed, values after a query do not reach it."""
    if geometry.q_len < 3:
        return
    q, k, v = inputs
    cut = geometry.q_len // 2
    changed = v.clone()
    changed[:, :, geometry.q_offset + cut :] += 1
    before = attend(q, k, v, plan)
    after = attend(q, k, changed, plan)
    assert isinstance(before, Tensor)
    assert isinstance(after, Tensor)
    assert torch.equal(before[:, :, :cut], after[:, :, :cut]), f"{pattern}: a future value reached a query, {geometry}"


def _check_keep(pattern: StaticPattern, plan: BlockPlan, geometry: Geometry) -> None:
    mask = plan.to_mask()
    for b, span in enumerate(geometry.spans):
        expected = torch.zeros(geometry.q_len, geometry.kv_len, dtype=torch.bool, device="cpu")
        q_pos = torch.arange(span.q_first, span.q_end, device="cpu")[:, None]
        k_pos = torch.arange(span.keys, device="cpu")[None]
        at, key = geometry.q_index(b, span.q_first), geometry.kv_start[b]
        kept = pattern.keep(q_pos, k_pos, span) & (k_pos <= q_pos)
        expected[at : at + len(q_pos), key : key + span.keys] = kept
        assert torch.equal(mask[b], expected.expand_as(mask[b])), f"{pattern}: the plan is not `keep`, {geometry}"


def _check_scores_matter(pattern: BlockPattern, geometries: Iterable[Geometry]) -> None:
    """Of a plan that would be the same with any scores nothing here says whether they are right."""
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(blocks: Blocks, first: int, rows: int) -> Tensor:
        scores = pattern.score(blocks, first, rows)
        some = torch.rand(scores.shape, generator=generator, dtype=torch.float32, device="cpu")
        return some.to(scores.device)

    other = pattern.model_copy()
    other.__dict__["score"] = drawn
    sparse = 0
    for geometry in geometries:
        inputs = inputs_for(geometry)
        plan = _plan(pattern, geometry, inputs)
        if not plan.all_dense:
            sparse += 1
            if not torch.equal(plan.to_mask(), _plan(other, geometry, inputs).to_mask()):
                return
    assert not sparse, f"{pattern}: no plan depends on `score`; take parameters with which more is kept than always is"


def _check_chunk(pattern: StaticPattern, geometry: Geometry) -> None:
    """The rows of a chunk, its prompt's length known, are the rows of the whole prompt."""
    tokens = 300
    block_q, block_kv = geometry.block_q, geometry.block_kv
    whole = Geometry.of(tokens, block_q=block_q, block_kv=block_kv)
    expected = _plan(pattern, whole, inputs_for(whole)).to_mask()[0, 0]
    for first, last in ((0, 100), (100, 165), (165, 300)):
        chunk = Geometry.of(last - first, last, prompt_len=tokens, block_q=block_q, block_kv=block_kv)
        got = _plan(pattern, chunk, inputs_for(chunk)).to_mask()[0, 0]
        assert torch.equal(got, expected[first:last, :last]), f"{pattern}: chunk {first}-{last} is not the whole's rows"
