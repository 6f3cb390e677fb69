"""The Triton paths of selection and block scores in Triton's interpreter, against the torch paths. `test_select.py`
runs this file in a process of its own, because TRITON_INTERPRET must be set before triton is imported."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product
from typing import Any

import pytest
import torch
from kernel_cases import tensors
from test_select import random_bits, rows_of

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import launch
from sparsekit.kernels.select import block_scores_triton
from sparsekit.kernels.select import topk as select
from sparsekit.kernels.select.block_scores import antidiagonal_mass, pooled_means, pooled_scores
from sparsekit.kernels.select.blocks import plan_from_block_bits
from sparsekit.kernels.select.grid import block_grid, head_lengths
from sparsekit.kernels.select.mean_keys import near_top_bits, query_block_lse
from sparsekit.kernels.select.topk import top_p_bits, topk_bits, topk_indices_mask
from sparsekit.patterns import Blocks, BlockTopK, FlashPrefill, Pattern, Prism, XAttention
from sparsekit.testing import GEOMETRIES, inputs_for

CPU = torch.device("cpu")
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
# One of each kind: a single token, odd lengths, a tile of two blocks, chunks, a StaticCache, padding.
SHORT = [g for g in GEOMETRIES if g.block_q != 32 and g.q_len not in (63, 64) and g.prompt_tokens[0] != 1000]
WHOLE_STRIDES = [
    Geometry.of(304, batch=2, kv_start=(0, 16), block_q=64),
    Geometry.of(160, 480, block_kv=128),
    Geometry.of(64, 400, q_offset=144, block_q=64),
]


def name_of(g: Geometry) -> str:
    return f"{g.q_len}-{g.kv_len}-{g.batch}-{g.block_q}x{g.block_kv}"


def test_it_is_interpreted() -> None:
    assert launch.interpreted()
    assert select.runs_triton(CPU, "triton")
    assert not select.runs_triton(CPU)


LAST, BOTH = {"force_last": True}, {"force_first": True, "force_last": True}


@pytest.mark.parametrize(
    ("columns", "force"),
    [(1, {}), (1, BOTH), (33, {}), (33, LAST), (100, {}), (100, BOTH), (300, {}), (320, LAST), (320, BOTH)],
    ids=str,
)
def test_rows(columns: int, force: dict[str, bool]) -> None:
    scores = rows_of(12, columns)
    lengths = torch.randint(0, columns + 1, (12,), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    several = lengths.flip(0).contiguous()
    masses = scores.exp()
    masses[8:10] = torch.rand(2, columns, generator=torch.Generator().manual_seed(4))
    masses[8] *= 1e-38
    masses[9] *= 1e30
    masses[10] = 1e-42
    masses[11] = -1.0
    each = torch.linspace(0.01, 1, 12, dtype=torch.float64)
    for given, counts, shares in (
        (None, (several,), (each,)),
        (lengths, (1, 2, 1000, several), (0.5, 1 - 1e-12, each)),
    ):
        for k in counts:
            one, two = (topk_bits(scores, k, lengths=given, impl=impl, **force) for impl in ("torch", "triton"))
            assert torch.equal(one, two), k
        for p in shares:
            one, two = (top_p_bits(masses, p, lengths=given, impl=impl, **force) for impl in ("torch", "triton"))
            assert torch.equal(one, two), p


@pytest.mark.parametrize("columns", [1, 33, 100, 300])
def test_rows_near_their_largest(columns: int) -> None:
    scores = rows_of(12, columns)
    lengths = torch.randint(0, columns + 1, (12,), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    for given in (None, lengths):
        for margin in (0.0, 0.5, 3.0):
            for first, last in ((0, 0), (2, 4), (0, 1), (1000, 0)):
                call = {"lengths": given, "first": first, "last": last}
                one, two = (near_top_bits(scores, margin, **call, impl=impl) for impl in ("torch", "triton"))  # type: ignore[arg-type]
                assert torch.equal(one, two), (margin, first, last)


@pytest.mark.parametrize("columns", [1, 33, 100, 300])
def test_top_p_of_logits(columns: int) -> None:
    """Where no sum comes near the share, the two paths agree; a tie decided by an exponential's last bit may not."""
    scores = torch.randn(12, columns, generator=torch.Generator().manual_seed(columns)) * 3
    scores[0, ::3], scores[1, 0] = -torch.inf, torch.nan
    scores[2] = -torch.inf
    lengths = torch.randint(1, columns + 1, (12,), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    for given in (None, lengths):
        for p in (0.5, 0.9, 1.0):
            call = {"lengths": given, "force_last": True, "logits": True}
            one, two = (top_p_bits(scores, p, **call, impl=impl) for impl in ("torch", "triton"))  # type: ignore[arg-type]
            assert torch.equal(one, two), p
            if given is None:
                masses = (scores - scores.nan_to_num(nan=-torch.inf).amax(1, keepdim=True)).exp()
                same = top_p_bits(masses, p, force_last=True)
                assert torch.equal(one[3:], same[3:])


@pytest.mark.parametrize("softmax", [Softmax(0.25), Softmax(0.25, 3.0)], ids=str)
@pytest.mark.parametrize("geometry", SHORT, ids=name_of)
def test_query_block_lse(geometry: Geometry, softmax: Softmax) -> None:
    q, k, _ = inputs_for(geometry)
    grid = block_grid(geometry, 128, geometry.batch, CPU)
    seen = torch.arange(grid.columns) < head_lengths(geometry, 128, geometry.batch, 4, CPU)[..., None]
    means, again = (pooled_means(q[:, :0], k, geometry, grid, 128, impl=impl)[1] for impl in ("torch", "triton"))
    assert torch.equal(means, pooled_means(q, k, geometry, grid, 128, impl="torch")[1])
    assert torch.allclose(again, means, atol=1e-6)
    call = (q, means, geometry, grid, 128, softmax)
    expected, got = (query_block_lse(*call, impl=impl) for impl in ("torch", "triton"))
    assert torch.allclose(got[seen], expected[seen], atol=1e-5)
    if grid.rows > 1:
        got = query_block_lse(*call, 1, grid.rows - 1, impl="triton")
        assert torch.allclose(got[seen[:, :, 1:]], expected[:, :, 1:][seen[:, :, 1:]], atol=1e-5)


@pytest.mark.parametrize("dim", launch.HEAD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_query_block_lse_of_head_sizes(dim: int, dtype: torch.dtype) -> None:
    geometry = Geometry.of(160, 230)
    q, k, _ = tensors(geometry, dtype, dim=dim, heads=2, key_heads=1)
    softmax = Softmax(dim**-0.5)
    blocks = Blocks(q, k, geometry, softmax, 128)
    call = (q, blocks.key_means.to(dtype), geometry, blocks.grid, 128, softmax)
    expected, got = (query_block_lse(*call, impl=impl) for impl in ("torch", "triton"))
    seen = expected > -torch.inf
    assert torch.allclose(got[seen], expected[seen], atol=1e-3)
    prism = Prism().score(blocks, 0, blocks.grid.rows)
    assert prism.shape[1] == 4


def test_columns_past_the_length_are_not_read() -> None:
    scores = torch.rand(3, 70)
    lengths = torch.tensor([5, 70, 33], dtype=torch.int32)
    poisoned = scores.masked_fill(torch.arange(70) >= lengths[:, None], torch.inf)
    for impl in ("torch", "triton"):
        for pick, amount in ((topk_bits, 4), (top_p_bits, 0.7)):
            assert torch.equal(
                pick(poisoned, amount, lengths=lengths, impl=impl), pick(scores, amount, lengths=lengths, impl=impl)
            )


@pytest.mark.parametrize("columns", [100, 20000])
def test_long_rows(columns: int) -> None:
    scores = rows_of(9, columns)
    scores[8] = scores[8].round(decimals=1)
    each = torch.arange(9, dtype=torch.int32) * columns // 8
    for k in (100, columns + 9, each) if columns == 100 else (each,):
        one, two = (topk_indices_mask(scores, k, impl=impl) for impl in ("torch", "triton"))
        assert torch.equal(one, two), k


@pytest.mark.parametrize(
    ("geometry", "block_tokens"),
    [
        *((g, 64) for g in SHORT),
        *((g, 128) for g in SHORT if g.batch < 3),
        *((g, 16) for g in SHORT if g.batch == 2 or g.q_len < g.kv_len),
        (Geometry.of(70, 16500), 16),  # 33 words of bits, of which 32 are read at once
    ],
    ids=lambda x: name_of(x) if isinstance(x, Geometry) else str(x),
)
def test_plans(geometry: Geometry, block_tokens: int) -> None:
    bits = random_bits(geometry, block_tokens)
    bits[:, 1] = -1
    for capacity in (None, 10):
        one, two = (
            plan_from_block_bits(bits, geometry, block_tokens, capacity=capacity, impl=impl)
            for impl in ("torch", "triton")
        )
        assert one.geometry == two.geometry
        assert torch.equal(one.row_ptr, two.row_ptr)  # type: ignore[arg-type]
        assert torch.equal(one.dense_rows, two.dense_rows)  # type: ignore[arg-type]
        listed = one.entries.numel()  # type: ignore[union-attr]
        assert torch.equal(one.entries, two.entries[:listed])  # type: ignore[index, arg-type]
        assert not two.entries[listed:].any()  # type: ignore[index]


@pytest.mark.parametrize("block_tokens", [64, 128])
@pytest.mark.parametrize("geometry", SHORT, ids=name_of)
def test_pooled(geometry: Geometry, block_tokens: int) -> None:
    q, k, _ = inputs_for(geometry)
    grid = block_grid(geometry, block_tokens, geometry.batch, CPU)
    seen = torch.arange(grid.columns) < head_lengths(geometry, block_tokens, geometry.batch, 4, CPU)[..., None]
    means, again = (pooled_means(q, k, geometry, grid, block_tokens, impl=impl) for impl in ("torch", "triton"))
    for one, two in zip(means, again, strict=True):
        assert torch.allclose(one, two, atol=1e-6)
    expected = pooled_scores(*means, grid, block_tokens, impl="torch")
    got = pooled_scores(*means, grid, block_tokens, impl="triton")
    assert torch.allclose(got[seen], expected[seen], atol=1e-5)
    if grid.rows > 1:
        got = pooled_scores(*means, grid, block_tokens, 1, grid.rows - 1, impl="triton")
        assert torch.allclose(got[seen[:, :, 1:]], expected[:, :, 1:][seen[:, :, 1:]], atol=1e-5)


def test_half_means() -> None:
    """float16 keeps 11 bits; what lies beyond its range is its largest, and inf and NaN stay what they are."""
    geometry = Geometry.of(300)
    q, k, _ = inputs_for(geometry)
    grid = block_grid(geometry, 64, 1, CPU)
    k[:, 0, :64], k[:, 0, 64:128], k[:, 1, :64] = 1e6, torch.inf, torch.nan
    (_, exact), (halves_q, halves_k) = (
        pooled_means(q, k, geometry, grid, 64, half=half, impl="triton") for half in (False, True)
    )
    assert halves_q.dtype == halves_k.dtype == torch.float16
    assert torch.allclose(
        halves_k.float(),
        exact.clamp(-65504, 65504).where(exact.isfinite(), exact),
        rtol=2**-11,
        atol=1e-6,
        equal_nan=True,
    )
    k = k.nan_to_num(posinf=1.0, nan=1.0).clamp(max=3.0)
    means = pooled_means(q, k, geometry, grid, 64, half=True, impl="triton")
    expected, got = (pooled_scores(*means, grid, 64, impl=impl) for impl in ("torch", "triton"))
    seen = expected > -torch.inf
    assert torch.allclose(got[seen], expected[seen], atol=1e-5)


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def walk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Through pointers, and through the copy engine's descriptors where a call has whole strides; which it was."""
    used: list[bool] = []
    real = block_scores_triton.launch

    def launch(kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any], *rest: Any) -> None:
        if "TMA" in options:
            used.append(options["TMA"])
        real(kernel, programs, args, options, *rest)

    monkeypatch.setattr(block_scores_triton, "_has_tma", lambda device: request.param)
    monkeypatch.setattr(block_scores_triton, "launch", launch)
    yield used
    assert used
    assert request.param or not any(used)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous()


def _fused(x: torch.Tensor) -> torch.Tensor:
    """As a projection to q, k and v at once lays it out: other columns between one token and the next."""
    wide = torch.full((x.shape[0], x.shape[2], 3, *x.shape[1::2]), torch.nan, dtype=x.dtype)
    wide[:, :, 1] = x.transpose(1, 2)
    return wide[:, :, 1].transpose(1, 2)


def _in_a_cache(x: torch.Tensor) -> torch.Tensor:
    """Heads first, with room for more tokens behind each head, filled with what must not be read."""
    room = torch.full((*x.shape[:2], x.shape[2] + 64, x.shape[3]), torch.nan, dtype=x.dtype)
    room[:, :, : x.shape[2]] = x
    return room[:, :, : x.shape[2]]


@pytest.mark.parametrize("layout", [_heads_first, _fused, _in_a_cache])
@pytest.mark.parametrize("geometry", WHOLE_STRIDES, ids=name_of)
def test_antidiagonals_of_any_layout(geometry: Geometry, layout: Any, walk: list[bool]) -> None:
    q, k, _ = inputs_for(geometry)
    grid = block_grid(geometry, 128, geometry.batch, CPU)
    seen = torch.arange(grid.columns) < head_lengths(geometry, 128, geometry.batch, 4, CPU)[..., None]
    expected = antidiagonal_mass(q, k, geometry, grid, 128, 16, Softmax(0.25), impl="torch")
    got = antidiagonal_mass(layout(q), layout(k), geometry, grid, 128, 16, Softmax(0.25), impl="triton")
    assert torch.allclose(got[seen], expected[seen], atol=1e-4, rtol=1e-4)
    assert all(walk) or not any(walk)


@pytest.mark.parametrize(
    ("geometry", "stride"),
    [*zip(SHORT[1:], cycle((4, 8, 16)), strict=False), *product(WHOLE_STRIDES, (4, 8, 16))],
    ids=lambda x: name_of(x) if isinstance(x, Geometry) else str(x),
)
def test_antidiagonals(geometry: Geometry, stride: int, walk: list[bool]) -> None:
    q, k, _ = inputs_for(geometry)
    options = {4: Softmax(0.25, sink_logits=SINKS), 8: Softmax(0.25, 3.0), 16: Softmax(0.25)}
    grid = block_grid(geometry, 128, geometry.batch, CPU)
    seen = torch.arange(grid.columns) < head_lengths(geometry, 128, geometry.batch, 4, CPU)[..., None]
    call = (q, k, geometry, grid, 128, stride, options[stride])
    expected, got = (antidiagonal_mass(*call, impl=impl) for impl in ("torch", "triton"))
    assert torch.allclose(got[seen], expected[seen], atol=1e-4, rtol=1e-4)
    if grid.rows > 1:
        got = antidiagonal_mass(*call, 1, grid.rows - 1, impl="triton")
        assert torch.allclose(got[seen[:, :, 1:]], expected[:, :, 1:][seen[:, :, 1:]], atol=1e-4, rtol=1e-4)
    if any(walk) and geometry in WHOLE_STRIDES:
        assert all(walk), "no descriptor was made, so this tests nothing"


@pytest.mark.parametrize("dim", launch.HEAD_SIZES)
def test_head_sizes(dim: int, walk: list[bool]) -> None:
    geometry = Geometry.of(160, block_q=64)
    q, k, _ = tensors(geometry, torch.float16, dim=dim, heads=2, key_heads=1)
    grid = block_grid(geometry, 128, 1, CPU)
    call = (q, k, geometry, grid, 128, 16, Softmax(dim**-0.5))
    expected, got = (antidiagonal_mass(*call, impl=impl) for impl in ("torch", "triton"))
    assert torch.allclose(got.tril(), expected, atol=1e-3, rtol=1e-3)
    for one, two in zip(*(pooled_means(*call[:5], impl=impl) for impl in ("torch", "triton")), strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_what_is_refused() -> None:
    geometry = Geometry.of(64)
    grid = block_grid(geometry, 64, 1, CPU)
    q, k, _ = tensors(geometry, torch.float32, dim=20)
    with pytest.raises(SparsekitError, match="head size 20"):
        pooled_means(q, k, geometry, grid, 64, impl="triton")
    q, k, _ = tensors(geometry, torch.bfloat16)
    with pytest.raises(SparsekitError, match="interpreter computes it wrongly"):
        pooled_means(q, k, geometry, grid, 64, impl="triton")
    q, k, _ = tensors(geometry, torch.float32)
    with pytest.raises(SparsekitError, match="q has strides"):
        pooled_means(q.transpose(-1, -2).contiguous().transpose(-1, -2), k, geometry, grid, 64, impl="triton")


PATTERNS = [
    BlockTopK(top_k=2),
    XAttention(threshold=0.6),
    XAttention(threshold=(0.3, 0.5, 0.9, 1.0), stride=8),
    XAttention(threshold=0.6, proxy="mean"),
    Prism(top_p=0.4),
    FlashPrefill(alpha=0.9, sink_blocks=1, window_blocks=1, last_blocks=0),
]


@pytest.fixture
def choices_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """From q and k to the bits that are chosen."""
    for module in ("topk", "block_scores", "mean_keys"):
        monkeypatch.setattr(f"sparsekit.kernels.select.{module}.runs_triton", lambda device, impl=None: impl != "torch")


@pytest.fixture
def everything_on_triton(choices_on_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekit.kernels.select.blocks.runs_triton", lambda device, impl=None: impl != "torch")


@pytest.mark.usefixtures("choices_on_triton")
@pytest.mark.parametrize(
    ("pattern", "fill"),
    [*product(PATTERNS, (torch.nan, torch.inf)), *product(PATTERNS[:2], (-torch.inf, 0.0))],
    ids=str,
)
def test_plans_stay_valid_whatever_comes(pattern: Pattern, fill: float) -> None:
    """NaN and inf in a query and a key, and in all of them: causal, every query keeps itself. Torch makes the plan of
    the bits: these hold no NaN, and `test_plans` has the kernel that makes it."""
    geometry = Geometry.of(260, block_q=64)
    own = torch.eye(260, dtype=torch.bool)
    for spoil in (slice(70, 71), slice(None)):
        q, k, _ = inputs_for(geometry)
        q[:, 0, spoil] = fill
        k[:, 1, spoil] = fill
        plan = pattern.select(q, k, geometry, Softmax(0.25))  # type: ignore[attr-defined]
        often = plan.multiplicity()
        assert int(often.max()) == 1
        assert not (often.bool() & ~torch.ones(260, 260, dtype=torch.bool).tril()).any()
        assert (often.bool() | ~own).all()


@pytest.mark.usefixtures("everything_on_triton")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_groups_of_rows_are_the_whole(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that do not fit the scratch memory at once give the same plan."""
    geometry = Geometry.of(450, block_q=128)
    q, k, _ = inputs_for(geometry)
    whole = pattern.select(q, k, geometry, Softmax(0.25))  # type: ignore[attr-defined]
    monkeypatch.setattr("sparsekit.kernels.select.block_scores.SCRATCH_BYTES", 1)
    parts = pattern.select(q, k, geometry, Softmax(0.25))  # type: ignore[attr-defined]
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, parts.tensors[name])
