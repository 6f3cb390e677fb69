"""The contract of plans, over the whole registry."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry, Span
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend
from sparsekit.patterns import (
    S2O,
    AShape,
    BlockPattern,
    Blocks,
    BlockTopK,
    Dense,
    Pattern,
    StaticPattern,
    Triangle,
    Union,
    parse_pattern,
    pattern_class,
    pattern_names,
    static_plan,
)
from sparsekit.patterns import base as registry
from sparsekit.plan import BlockPlan, plan_from_rule
from sparsekit.testing import GEOMETRIES, check_pattern, inputs_for

CPU = torch.device("cpu")

POINTS = [
    parse_pattern({"name": name, **point}) for name in pattern_names() for point in pattern_class(name).test_points
]
ROWS: list[Pattern] = [
    *POINTS,
    Union(of=[AShape(sink_tokens=0, window_tokens=7), Triangle(sink_tokens=70, window_tokens=3, last_tokens=2)]),
    Union(of=[AShape(window_tokens=7), Dense()]),
]


@pytest.mark.parametrize("pattern", ROWS, ids=str)
def test_contract(pattern: Pattern) -> None:
    check_pattern(pattern)


def test_a_budget_that_scores_do_not_decide_is_refused() -> None:
    """The first block and the query's own are kept anyway."""
    with pytest.raises(AssertionError, match="no plan depends on `score`"):
        check_pattern(parse_pattern({"name": "block_topk", "top_k": 2}))
    check_pattern(parse_pattern({"name": "block_topk", "top_k": 100}), GEOMETRIES[4:5])  # dense: there are no scores


@pytest.mark.parametrize("pattern", [pattern for pattern in POINTS if pattern.name != "dense"], ids=str)
def test_points_drop_something(pattern: Pattern) -> None:
    geometry = Geometry.of(300, block_q=64, block_kv=64)
    q, k, v = inputs_for(geometry)
    plan = pattern.plan(q, k, geometry, Softmax(0.25))
    attend(q, k, v, plan)  # ranked keys: what is kept is known after execution
    assert plan.density() < 1


@pytest.fixture
def scratch_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns defined in a test are forgotten after it."""
    pattern_names()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def test_kit_catches_a_broken_pattern(scratch_registry: None) -> None:
    class NoSelf(StaticPattern):
        """Drops the diagonal."""

        name: Literal["no_self"] = "no_self"

        def keep(self, q_pos: torch.Tensor, k_pos: torch.Tensor, span: Span) -> torch.Tensor:
            return k_pos < (q_pos // 64) * 64

    with pytest.raises(AssertionError, match="does not keep itself"):
        check_pattern(NoSelf(), [Geometry.of(300, block_q=64, block_kv=64)])


def test_kit_names_the_call_that_a_pattern_fails_on(scratch_registry: None) -> None:
    class Fragile(BlockPattern):
        name: Literal["fragile"] = "fragile"

        def score(self, blocks: Blocks, first: int, rows: int) -> torch.Tensor:
            return torch.zeros(blocks.lengths.shape).unflatten(-1, (-1, 2))

        def choose(self, scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    with pytest.raises(AssertionError, match=r"fragile: RuntimeError: unflatten.* Geometry\(.*q_len=1,"):
        check_pattern(Fragile())


# ---- exact numbers of the published definition


def test_pair_count_of_a_small_triangle() -> None:
    pattern = Triangle(sink_tokens=8, window_tokens=40, last_tokens=20)
    assert static_plan(pattern, Geometry.of(300), CPU).kept_pairs() == 18122


@pytest.mark.parametrize(
    ("tokens", "dense", "kept"),
    [
        (32768, 536_887_296, 21_024_036),
        (65536, 2_147_516_416, 42_257_700),
        (131072, 8_590_000_128, 84_725_028),
    ],
)
@pytest.mark.parametrize("tile", [(128, 64), (128, 128), (64, 64)])
def test_pair_counts_at_length(tokens: int, dense: int, kept: int, tile: tuple[int, int]) -> None:
    geometry = Geometry.of(tokens, block_q=tile[0], block_kv=tile[1])
    plan = static_plan(Triangle(), geometry, CPU)
    assert static_plan(Dense(), geometry, CPU).kept_pairs() == dense
    assert plan.kept_pairs() == kept
    assert plan.density() == kept / dense


@given(tokens=st.integers(1, 700), sink=st.integers(0, 90), window=st.integers(1, 200), last=st.integers(1, 200))
@settings(max_examples=80, deadline=None)
def test_triangle_closed_form(tokens: int, sink: int, window: int, last: int) -> None:
    """pairs = c(c+1)/2 + (M-c)c + L(2N-L+1)/2 with c = sink + window, M = N - L, where M >= c."""
    pattern = Triangle(sink_tokens=sink, window_tokens=window, last_tokens=last)
    plan = static_plan(pattern, Geometry.of(tokens, block_q=64, block_kv=32), CPU)
    width, before = sink + window, tokens - last
    if before >= width:
        rows = width * (width + 1) // 2 + (before - width) * width
        assert plan.kept_pairs() == rows + last * (2 * tokens - last + 1) // 2
    assert plan.kept_pairs() == int(plan.to_mask().sum())


@pytest.mark.parametrize("tokens", [1, 7, 48, 49, 300])
def test_sections_partition_the_causal_mask(tokens: int) -> None:
    """Streaming, last and middle are disjoint and make up the causal mask (TriangleMix, section 3.1)."""
    sink, window, last = 8, 40, 20
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    geometry = Geometry.of(tokens)
    streaming = static_plan(AShape(sink_tokens=sink, window_tokens=window), geometry, CPU).to_mask()[0, 0]
    triangle = static_plan(Triangle(sink_tokens=sink, window_tokens=window, last_tokens=last), geometry, CPU)
    far = (j <= i) & (j >= sink) & (i - j >= window)
    last_section, middle = far & (tokens - i <= last), far & (tokens - i > last)
    assert torch.equal(streaming.int() + last_section.int() + middle.int(), (j <= i).int())
    assert torch.equal(triangle.to_mask()[0, 0], streaming | last_section)


def test_window_counts_the_query_itself() -> None:
    mask = static_plan(AShape(sink_tokens=0, window_tokens=40), Geometry.of(300), CPU).to_mask()[0, 0]
    assert mask.sum(1).tolist() == [min(i + 1, 40) for i in range(300)]


def test_exactly_last_rows_are_dense() -> None:
    plan = static_plan(Triangle(sink_tokens=8, window_tokens=40, last_tokens=20), Geometry.of(300), CPU)
    widths = plan.to_mask()[0, 0].sum(1).tolist()
    assert widths[279] == 48
    assert widths[280:] == list(range(281, 301))


@pytest.mark.parametrize("chunk", [1, 100, 299])
def test_chunks_of_a_known_prompt_are_the_whole(chunk: int) -> None:
    pattern = Triangle(sink_tokens=8, window_tokens=40, last_tokens=20)
    whole = static_plan(pattern, Geometry.of(300), CPU).to_mask()[0, 0]
    for first in range(0, 300, chunk):
        last = min(first + chunk, 300)
        part = static_plan(pattern, Geometry.of(last - first, last, prompt_len=300), CPU).to_mask()[0, 0]
        assert torch.equal(part, whole[first:last, :last])


def test_chunk_of_unknown_prompt_is_a_superset() -> None:
    pattern = Triangle(sink_tokens=8, window_tokens=40, last_tokens=20)
    whole = static_plan(pattern, Geometry.of(300), CPU).to_mask()[0, 0, :200, :200]
    chunk = static_plan(pattern, Geometry.of(200), CPU).to_mask()[0, 0]
    assert bool((chunk | ~whole).all())
    assert int(chunk.sum()) > int(whole.sum())


@given(
    name=st.sampled_from(["a_shape", "triangle"]),
    q_len=st.integers(1, 200),
    earlier=st.integers(0, 200),
    spare=st.integers(0, 70),
    pads=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 150)), min_size=1, max_size=3),
    window=st.integers(1, 300),
    tile=st.sampled_from([(32, 32), (64, 128), (128, 64)]),
)
@settings(max_examples=60, deadline=None)
def test_any_padding_chunk_and_tile(
    name: str,
    q_len: int,
    earlier: int,
    spare: int,
    pads: list[tuple[int, int]],
    window: int,
    tile: tuple[int, int],
) -> None:
    last = earlier + q_len
    geometry = Geometry.of(
        q_len,
        last + spare,
        q_offset=earlier,
        batch=len(pads),
        kv_start=[min(left, last - 1) for left, _ in pads],
        kv_end=[max(last - right, min(left, last - 1)) for left, right in pads],
        block_q=tile[0],
        block_kv=tile[1],
    )
    pattern = parse_pattern({"name": name, "sink_tokens": 5, "window_tokens": window})
    plan = pattern.plan(*inputs_for(geometry)[:2], geometry, Softmax(0.25))
    mask = plan.to_mask()
    assert int(plan.multiplicity().max()) <= 1
    assert plan.kept_pairs() == int(mask.sum())
    for b, span in enumerate(geometry.spans):
        q_pos, k_pos = torch.arange(span.q_first, span.q_end)[:, None], torch.arange(span.keys)[None]
        at, key = geometry.q_index(b, span.q_first), geometry.kv_start[b]
        inner = mask[b, 0, at : at + len(q_pos), key : key + span.keys]
        assert isinstance(pattern, StaticPattern)
        assert torch.equal(inner, pattern.keep(q_pos, k_pos, span))
        assert int(mask[b].sum()) == int(inner.sum())


# ---- short prompts run dense


def test_a_chunk_of_a_long_prompt_is_not_short() -> None:
    """What counts is the prompt where its length is known, the keys so far where it is not; the longest of a batch."""
    pattern = BlockTopK(top_k=1, block_tokens=64, dense_below_tokens=400)

    def dense(*lengths: int, **options: Any) -> bool:
        geometry = Geometry.of(*lengths, block_q=64, block_kv=64, **options)
        return pattern.plan(*inputs_for(geometry)[:2], geometry, Softmax(0.25)).all_dense

    assert not dense(200, prompt_len=400)
    assert not dense(100, 300, prompt_len=1000)
    assert dense(200, prompt_len=399)
    assert dense(200)
    assert dense(100, 399)
    assert not dense(100, 400)
    assert not dense(400, batch=2, kv_start=(0, 300))
    assert dense(400, batch=2, kv_start=(1, 300))
    assert not dense(200, batch=2, prompt_len=(200, 500))


# ---- plans cost nothing


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Timings on one thread: with more, a busy machine makes threads wait for each other a hundred times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_planning_a_million_tokens(one_thread: None) -> None:
    """Under 50 ms and 1 MB (measured: 2 to 3 ms, 434 kB)."""
    geometry = Geometry.of(1 << 20)
    rule = Triangle().rule(geometry.spans[0])
    times = []
    for _ in range(9):
        start = time.perf_counter()
        plan = plan_from_rule(rule, geometry)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
    assert plan.nbytes < 1_000_000


@pytest.mark.parametrize("end", [1 << 19, 1 << 20], ids=["middle", "end"])
@pytest.mark.parametrize("prompt", [None, 1 << 20], ids=["unknown", "known"])
@pytest.mark.parametrize("pattern", [Dense(), AShape(), Triangle()], ids=str)
def test_a_chunk_of_a_million_tokens_has_a_small_plan(pattern: StaticPattern, prompt: int | None, end: int) -> None:
    """By rows of the chunk, whatever keys lie before it: under 64 bytes each (measured: 27 kB for 512 rows)."""
    geometry = Geometry.of(1 << 16, 1 << 20, q_offset=end - (1 << 16), prompt_len=prompt)
    plan = static_plan(pattern, geometry, CPU)
    assert plan.nbytes < 64 * plan.rows
    assert plan.all_dense == (pattern.name == "dense")


def test_window_as_wide_as_the_prompt_is_dense_and_free() -> None:
    plan = static_plan(AShape(window_tokens=1 << 20), Geometry.of(1 << 20), CPU)
    assert plan.all_dense
    assert plan.nbytes == 0


# ---- the move to a card does not make the host wait


def _moving(geometry: Geometry) -> list[BlockPlan]:
    """Plans on the CPU that hold every tensor a plan may: by rule, by tiles, ranked."""
    q, k, _ = inputs_for(geometry)
    patterns = (Triangle(sink_tokens=8, window_tokens=40), BlockTopK(top_k=2), S2O(segment_tokens=64, tau=0.4))
    return [pattern.plan(q, k, geometry, Softmax(0.25)) for pattern in patterns]


def test_plans_leave_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from pageable memory synchronises, and `non_blocking` does not change that."""
    pinned: list[torch.Tensor] = []
    waited: list[bool] = []

    def pin(self: torch.Tensor) -> torch.Tensor:
        pinned.append(self.clone())
        return pinned[-1]

    def to(self: torch.Tensor, device: Any, *, non_blocking: bool = False) -> torch.Tensor:
        assert torch.device(device).type == "cuda"
        waited.append(not (non_blocking and any(self is x for x in pinned)))
        return self

    plans = _moving(Geometry.of(300, block_q=64, block_kv=64))
    assert plans[2].ranked is not None
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "pin_memory", pin)
        patched.setattr(torch.Tensor, "to", to)
        moved = [plan.to("cuda") for plan in plans]
    assert waited == [False] * sum(len(plan.tensors) for plan in plans)
    for one, two in zip(plans, moved, strict=True):
        assert one.tensors.keys() == two.tensors.keys()
        assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


@pytest.mark.gpu
def test_a_new_geometry_does_not_make_the_host_wait(scratch_registry: None) -> None:
    class Halves(StaticPattern):
        """Every second block of 64 keys, and the query's own; no rule."""

        name: Literal["halves"] = "halves"

        def keep(self, q_pos: torch.Tensor, k_pos: torch.Tensor, span: Span) -> torch.Tensor:
            return (k_pos <= q_pos) & ((k_pos // 64 % 2 == 0) | (k_pos // 64 == q_pos // 64))

    card, geometry = torch.device("cuda", torch.cuda.current_device()), Geometry.of(731, block_q=64, block_kv=64)
    plans = [*_moving(geometry), *(static_plan(p, geometry, CPU) for p in (Halves(), Triangle(window_tokens=77)))]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = [plan.to(card) for plan in plans]
        made = [static_plan(pattern, geometry, card) for pattern in (Halves(), Triangle(window_tokens=77))]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, two in zip([*plans, *plans[-2:]], [*moved, *made], strict=True):
        assert all(torch.equal(one.tensors[name], two.tensors[name].cpu()) for name in one.tensors)


# ---- the registry


def test_unknown_pattern_names_the_nearest() -> None:
    with pytest.raises(SparsekitError, match=r"unknown pattern 'trangle': one of .*Did you mean 'triangle'\?"):
        pattern_class("trangle")


def test_two_patterns_of_one_name() -> None:
    with pytest.raises(SparsekitError, match=r"'triangle'.*is taken"):
        type("Impostor", (StaticPattern,), {"__annotations__": {"name": Literal["triangle"]}, "name": "triangle"})


def test_third_party_pattern_in_one_class(scratch_registry: None) -> None:
    class Blocks(StaticPattern):
        """Every fourth block of 64 keys, and the query's own."""

        name: Literal["blocks"] = "blocks"
        every: int = Field(4, ge=1)

        def keep(self, q_pos: torch.Tensor, k_pos: torch.Tensor, span: Span) -> torch.Tensor:
            return (k_pos <= q_pos) & ((k_pos // 64 % self.every == 0) | (k_pos // 64 == q_pos // 64))

    on_grid = [g for g in GEOMETRIES if g.block_q in (32, 64) and g.block_kv in (32, 64)]
    check_pattern(parse_pattern({"name": "blocks", "every": 3}), on_grid)
    with pytest.raises(SparsekitError, match="keeps a part of the tile"):
        static_plan(Blocks(), Geometry.of(300, block_q=128, block_kv=128), CPU)


def test_frozen_and_closed() -> None:
    pattern = Triangle()
    with pytest.raises(ValueError, match="frozen"):
        pattern.sink_tokens = 3  # type: ignore[misc]
    with pytest.raises(SparsekitError, match=r"unknown field 'last_n' = 3.*Did you mean 'last_tokens'\?"):
        parse_pattern({"name": "triangle", "last_n": 3})
