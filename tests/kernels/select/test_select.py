"""Selection and compaction: the torch paths against loops, and the Triton paths in child processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from children import compiled, interpret
from torch import Tensor

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.kernels.choose import runs_triton
from sparsekit.kernels.select import topk as select
from sparsekit.kernels.select.bits import pack_bits, unpack_bits
from sparsekit.kernels.select.blocks import plan_from_block_bits
from sparsekit.kernels.select.grid import head_lengths, rows_that_fit
from sparsekit.kernels.select.topk import top_p_bits, topk_bits, topk_indices_mask
from sparsekit.plan import BlockPlan
from sparsekit.testing import GEOMETRIES


def rows_of(n: int, columns: int) -> Tensor:
    """Rows of scores of every kind: ties, both zeros, infinities, NaN, nothing at all, sizes far apart."""
    generator = torch.Generator().manual_seed(columns)
    scores = torch.randn(max(n, 8), columns, generator=generator)
    scores[0] = 0
    scores[1] = scores[1].round()
    scores[2, ::2] = -torch.inf
    scores[3] = -torch.inf
    scores[4, ::3] = torch.nan
    scores[5] = scores[5].sign() * 0.0
    scores[6, : columns // 2] = torch.inf
    scores[7] = torch.nan
    if n >= 10:
        scores[8] *= 10 ** (torch.rand(columns, generator=generator) * 70 - 35)  # of every size there is
        scores[9] = torch.where(torch.arange(columns) % 7 == 0, -3e38, 3e38)  # as far apart as no float is
    return scores


def _forced(length: int, first: bool, last: bool) -> set[int]:
    return {c for c, wanted in ((0, first), (length - 1, last)) if wanted and 0 <= c < length}


def _ranked(row: list[float], length: int) -> list[int]:
    some = [c for c in range(length) if row[c] > -math.inf]
    return sorted(some, key=lambda c: (-row[c], c))


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 70])
def test_bits_there_and_back(columns: int) -> None:
    mask = torch.rand(3, 5, columns) < 0.4
    bits = pack_bits(mask)
    assert bits.shape == (3, 5, -(-columns // 32))
    assert torch.equal(unpack_bits(bits, columns), mask)
    assert all(bool((bits[..., c // 32] >> c % 32 & 1).bool().eq(mask[..., c]).all()) for c in range(columns))


@pytest.mark.parametrize("force", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("columns", [1, 40, 100])
def test_topk_is_a_stable_sort(columns: int, force: tuple[bool, bool]) -> None:
    scores = rows_of(8, columns)
    lengths = torch.tensor([columns, columns // 2, columns, 0, columns, 1, columns, columns], dtype=torch.int32)
    for k in (0, 1, 2, 7, columns, columns + 9):
        options = {"lengths": lengths, "force_first": force[0], "force_last": force[1]}
        got = unpack_bits(topk_bits(scores, k, **options), columns)  # type: ignore[arg-type]
        for r, row in enumerate(scores.tolist()):
            forced = _forced(int(lengths[r]), *force)
            others = [c for c in _ranked(row, int(lengths[r])) if c not in forced]
            expected = forced | set(others[: max(k - len(forced), 0)])
            assert set(got[r].nonzero().flatten().tolist()) == expected, (k, r)


def test_topk_of_a_number_a_row() -> None:
    scores, k = torch.randn(4, 3, 50), torch.tensor([[0], [5], [50], [99]], dtype=torch.int32)
    got = unpack_bits(topk_bits(scores, k), 50).sum(-1)
    assert got.tolist() == [[0] * 3, [5] * 3, [50] * 3, [50] * 3]
    long = scores[:, 0].contiguous()
    assert torch.equal(topk_indices_mask(long, k[:, 0]), topk_bits(long, k[:, 0]))


@pytest.mark.parametrize("force", [(False, False), (True, True)])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_top_p_is_the_fewest_that_reach_it(share: float, force: tuple[bool, bool]) -> None:
    scores = torch.randn(20, 90, generator=torch.Generator().manual_seed(1)).mul(3).exp()
    scores[0] = 1
    scores[1] = scores[1].round()
    got = unpack_bits(top_p_bits(scores, share, force_first=force[0], force_last=force[1]), 90)
    for row, kept in zip(scores.double(), got, strict=True):
        slack = float(row.sum()) * 2**-22  # 90 masses, each counted to 2^-30 of the largest
        assert float(row[kept].sum()) >= share * float(row.sum()) - slack
        free = kept.clone()
        free[list(_forced(90, *force))] = False
        if free.any():
            smallest = row[free].min()
            assert float(row[kept].sum() - smallest) < share * float(row.sum()) + slack
            # All that is larger is kept, and of those that equal the smallest, the first.
            left = ~kept
            assert not (left & (row > smallest)).any()
            assert not (left & (row == smallest))[: int((free & (row == smallest)).nonzero().max())].any()


def test_top_p_sums_integers() -> None:
    """The definition itself: floor(score * 2^e), the row's largest in [2^30, 2^31), compared in float64."""
    scores = torch.rand(6, 33, generator=torch.Generator().manual_seed(2)) ** 4
    scores[1] *= 1e-30
    scores[2] *= 1e-35  # the smallest still normal
    scores[3] *= 1e37
    scores = scores.where(scores >= 2.0**-126, 0.0)
    for share in (0.1, 0.7, 0.95):
        got = unpack_bits(top_p_bits(scores, share), 33)
        for r, row in enumerate(scores.tolist()):
            shift = 31 - math.frexp(max(row))[1]
            units = [math.floor(math.ldexp(x, shift)) for x in row]
            assert 2**30 <= max(units) < 2**31
            required, taken, total = float(sum(units)) * share, set(), 0
            for c in _ranked(row, 33):
                if float(total) >= required:
                    break
                taken.add(c)
                total += units[c]
            assert set(got[r].nonzero().flatten().tolist()) == taken


def test_a_share_of_one_is_all_of_it() -> None:
    scores = torch.tensor([[1.0, 1e-30, 0.0, -torch.inf, torch.nan, 3.0]])
    assert unpack_bits(top_p_bits(scores, 1.0), 6).tolist() == [[True, True, True, False, False, True]]
    nearly = torch.full((1, 1000), 1e-9)
    nearly[0, 7] = 1.0
    assert int(unpack_bits(top_p_bits(nearly, 1.0), 1000).sum()) == 1000
    mixed = unpack_bits(top_p_bits(nearly.expand(2, -1).contiguous(), torch.tensor([0.5, 1.0]).double()), 1000)
    assert mixed.sum(1).tolist() == [1, 1000]


def test_rows_without_mass_keep_what_is_forced() -> None:
    scores = torch.stack([torch.zeros(9), torch.full((9,), torch.nan), torch.full((9,), -torch.inf)])
    assert not top_p_bits(scores, 0.9).any()
    kept = unpack_bits(top_p_bits(scores, 0.9, force_first=True, force_last=True), 9)
    assert kept.sum(1).tolist() == [2, 2, 2]


def test_bad_scores_are_refused() -> None:
    for scores in (torch.zeros(3, 4).double(), torch.zeros(4, 3).t(), torch.zeros(3, 0)):
        for pick in (topk_bits, top_p_bits, topk_indices_mask):
            with pytest.raises(SparsekitError, match="want contiguous float32"):
                pick(scores, 1)
    with pytest.raises(SparsekitError, match=r"scores \(1, 2, 3\): want \(rows, N\)"):
        topk_indices_mask(torch.zeros(1, 2, 3), 1)


# ---- block bits -> plan


def shape_of(geometry: Geometry, block_tokens: int) -> tuple[int, int]:
    """(pattern rows, key blocks) of a geometry."""
    spans = geometry.spans
    rows = max(-(-s.q_end // block_tokens) - s.q_first // block_tokens for s in spans)
    return max(rows, 1), max(-(-max(s.q_end for s in spans) // block_tokens), 1)


def random_bits(geometry: Geometry, block_tokens: int, heads: int = 3, density: float = 0.3) -> Tensor:
    rows, columns = shape_of(geometry, block_tokens)
    g = torch.Generator().manual_seed(block_tokens)
    return pack_bits(torch.rand(geometry.batch, heads, rows, columns, generator=g) < density)


def expected_mask(bits: Tensor, geometry: Geometry, block_tokens: int) -> Tensor:
    """bool (B, P, Q, K), query by query: what its plan row's pattern rows keep."""
    keep = unpack_bits(bits, bits.shape[-1] * 32)
    out = torch.zeros(geometry.batch, bits.shape[1], geometry.q_len, geometry.kv_len, dtype=torch.bool)
    for b, span in enumerate(geometry.spans):
        first = span.q_first // block_tokens
        for q in range(span.q_first, span.q_end):
            start = q // geometry.block_q * geometry.block_q
            low, high = max(start, span.q_first), min(start + geometry.block_q, span.q_end)
            blocks = torch.zeros(bits.shape[1], keep.shape[-1], dtype=torch.bool)
            for row in range(low // block_tokens, (high - 1) // block_tokens + 1):
                blocks[:, :row] |= keep[b, :, row - first, :row]
                blocks[:, row] = True
            at, key = geometry.q_index(b, q), geometry.kv_start[b]
            out[b, :, at, key : key + q + 1] = blocks[:, torch.arange(q + 1) // block_tokens]
    return out


@pytest.mark.parametrize("block_tokens", [16, 64, 128])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_plan_of_bits_is_the_bits(geometry: Geometry, block_tokens: int) -> None:
    bits = random_bits(geometry, block_tokens)
    expected = expected_mask(bits, geometry, block_tokens)
    plan = plan_from_block_bits(bits, geometry, block_tokens)
    often = plan.multiplicity()
    assert int(often.max()) <= 1
    assert torch.equal(often.bool(), expected)
    assert plan.block_q == geometry.block_q
    assert plan.block_kv == min(block_tokens, geometry.block_kv)
    tight = plan_from_block_bits(bits, geometry, block_tokens, capacity=5)
    assert tight.entries is not None and tight.entries.numel() <= 5
    assert not (expected & ~tight.to_mask()).any()


def test_full_rows_are_dense_and_flags_are_few() -> None:
    geometry = Geometry.of(1000)
    plan = plan_from_block_bits(torch.full((1, 2, 16, 1), -1, dtype=torch.int32), geometry, 64)
    assert plan.dense_rows is not None and bool(plan.dense_rows.all())
    assert plan.entries is not None and plan.entries.numel() == 0
    assert plan.kept_pairs() == 2 * geometry.spans[0].causal_pairs
    plan = plan_from_block_bits(torch.zeros(1, 1, 16, 1, dtype=torch.int32), geometry, 64)
    assert plan.entries is not None
    # A row of 128 queries: both diagonal tiles reach past its first query. Row 0 is whole, and therefore dense.
    assert [e & 3 for e in plan.entries.tolist()] == [1] * 14
    plan = plan_from_block_bits(torch.ones(1, 1, 16, 1, dtype=torch.int32), geometry, 64)
    assert plan.row_ptr is not None and plan.entries is not None
    assert plan.entries[int(plan.row_ptr[1]) : int(plan.row_ptr[2])].tolist() == [0, 128 << 2 | 1, 192 << 2 | 1]


def test_the_densest_rows_overflow_first() -> None:
    counts, causal = torch.tensor([[4, 4, 0, 9]]), torch.tensor([[4, 8, 8, 9]])
    assert rows_that_fit(counts, causal, 17).tolist() == [[True, True, True, True]]
    assert rows_that_fit(counts, causal, 8).tolist() == [[True, True, True, False]]
    assert rows_that_fit(counts, causal, 4).tolist() == [[False, True, True, False]]
    assert rows_that_fit(counts, causal, 0).tolist() == [[False, False, True, False]]


def test_alike_samples_may_share_a_plan_or_not() -> None:
    geometry = Geometry.of(300, batch=2, block_q=64)
    bits = random_bits(geometry, 64)
    one, both = (plan_from_block_bits(x, geometry, 64) for x in (bits[:1].contiguous(), bits))
    assert (one.samples, both.samples) == (1, 2)
    assert torch.equal(one.to_mask()[0], both.to_mask()[0])


@pytest.mark.parametrize(
    ("bits", "block", "options", "said"),
    [
        (torch.zeros(1, 2, 5, 1), 64, {}, "want contiguous int32"),
        (torch.zeros(2, 5, 1, dtype=torch.int32), 64, {}, "want contiguous int32"),
        (torch.zeros(1, 2, 4, 1, dtype=torch.int32), 64, {}, "5 rows and 1 words at least"),
        (torch.zeros(1, 2, 19, 1, dtype=torch.int32), 16, {}, None),
        (torch.zeros(3, 2, 5, 1, dtype=torch.int32), 64, {}, "3 plan samples: 1 or 1 for this batch"),
        (torch.zeros(1, 2, 5, 1, dtype=torch.int32), 60, {}, "block_tokens=60: one of 16"),
        (torch.zeros(1, 2, 5, 1, dtype=torch.int32), 64, {"capacity": -1}, "capacity=-1"),
    ],
)
def test_bad_bits_are_refused(bits: Tensor, block: int, options: dict[str, int], said: str | None) -> None:
    geometry = Geometry.of(300, block_q=64)
    if said is None:
        assert isinstance(plan_from_block_bits(bits, geometry, block, **options), BlockPlan)  # type: ignore[arg-type]
        return
    with pytest.raises(SparsekitError, match=said):
        plan_from_block_bits(bits, geometry, block, **options)  # type: ignore[arg-type]


def test_lengths_count_a_rows_own_block() -> None:
    geometry = Geometry.of(300, batch=3, kv_end=(300, 37, 0), block_q=64)
    lengths = head_lengths(geometry, 64, 3, 2, torch.device("cpu"))
    assert lengths[:, 1].tolist() == [[1, 2, 3, 4, 5], [1, 0, 0, 0, 0], [0] * 5]


# ---- the Triton paths


def test_a_cpu_runs_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not runs_triton(torch.device("cpu"))
    with pytest.raises(SparsekitError, match="impl='triton' cannot run on cpu"):
        topk_bits(torch.zeros(1, 2), 1, impl="triton")


def test_rows_too_long_for_a_program_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "runs_triton", lambda device, impl=None: True)
    for pick in (topk_bits, top_p_bits):
        with pytest.raises(SparsekitError, match="topk_indices_mask takes longer ones"):
            pick(torch.zeros(1, select.LONGEST_ROW + 1), 1)


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    interpret("select/interpreted_select.py")


@pytest.mark.slow
def test_it_compiles_for_hopper(tmp_path: Path) -> None:
    """Every kernel for sm_90: what it takes of a processor, and that logits run on matrix instructions."""
    made = compiled("select/compile_select.py", tmp_path)
    assert {case["kernel"] for case in made} == {
        "_antidiagonals", "_count_entries", "_count_ties", "_histogram", "_mass", "_means", "_near_top", "_query_lse",
        "_scores", "_segment_scores", "_select", "_sort", "_top_p", "_topk", "_write_entries", "_write_mask",
    }  # fmt: skip
    for case in made:
        assert case["shared"] <= 232_448, case
        assert case["serialised"] == 0, case
        assert case["spilled"] <= 128, case  # bytes a thread: top-p of 16K columns and the widest tiles spill a little
        if case["kernel"] in ("_antidiagonals", "_query_lse", "_scores", "_segment_scores"):
            assert case["wgmma"] > 0, case
        if case["kernel"] == "_sort":  # of 4,096 keys: 3,584 where neighbours are of several threads
            assert 0 < case["shuffles"] <= 1792 and case["spilled"] == 0, case
    assert any(case["tma"] > 0 for case in made if case["kernel"] == "_antidiagonals")
