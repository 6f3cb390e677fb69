"""The Hopper form: its work list says what the plan says, its device code compiles, and on a card it computes it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from children import compiled, interpret
from gluon_in_python import device_code, hosted
from kernel_cases import loose_plan
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend
from sparsekit.kernels.attend.hopper import host, worklist
from sparsekit.kernels.attend.hopper import items as item
from sparsekit.kernels.attend.reference import attend_reference
from sparsekit.kernels.select.bits import pack_bits
from sparsekit.kernels.select.slash import plan_from_vertical_slash
from sparsekit.plan import CAUSAL, RULE, BlockPlan, TokenRule, dense_plan, pack, plan_from_rule, stack_heads, unpack
from sparsekit.plan.bounds import row_starts
from sparsekit.plan.memo import HOPPER_WORK

HEADS, KEY_HEADS = 4, 2
NEVER = 2**31 - 1
SHARED_MEMORY = 232448  # bytes a block may have on sm_90


def _tiled(*args: Any, block_kv: int = 128, **kwargs: Any) -> Geometry:
    return Geometry.of(*args, block_q=128, block_kv=block_kv, **kwargs)


# Whole prompts, odd lengths, chunks off the grid, spare keys, padding on either side, samples of their own.
GEOMETRIES = [
    _tiled(1),
    _tiled(77),
    _tiled(128),
    _tiled(700),
    _tiled(100, 700),
    _tiled(300, 1000, q_offset=450),
    _tiled(700, batch=2),
    _tiled(700, batch=3, kv_start=(0, 37, 600)),
    _tiled(700, batch=3, kv_end=(700, 37, 250)),
    _tiled(200, 700, batch=2, kv_start=(600, 0)),
]


def _named(plan: Callable[..., BlockPlan], **options: Any) -> Any:
    """`plan(geometry, **options)` as a parameter with a readable id."""
    name = "-".join([plan.__name__.strip("_"), *(f"{key}={value}" for key, value in options.items())])
    return pytest.param(lambda geometry: plan(geometry, **options), id=name)


def _dense(geometry: Geometry) -> BlockPlan:
    return dense_plan(geometry)


def _triangle(geometry: Geometry, last: int = 100) -> BlockPlan:
    rules = [TokenRule(8, 150, max(span.prompt_tokens - last, 0)) for span in geometry.spans]
    return plan_from_rule(rules, geometry)


def _random_tiles(geometry: Geometry, heads: int = HEADS, keep: float = 0.4) -> BlockPlan:
    """Per-head tiles, diagonal not forced: rows without any tile, and queries without any key, are among them."""
    samples = 1 if geometry.uniform else geometry.batch
    columns = -(-geometry.kv_len // geometry.block_kv)
    g = torch.Generator().manual_seed(0)
    return loose_plan(torch.rand(samples, heads, geometry.rows, columns, generator=g) < keep, geometry)


def _mixed_heads(geometry: Geometry) -> BlockPlan:
    """Dense, window, Triangle and random tiles, one head each: listed and dense rows in one launch, a rule a head."""
    plans = [
        dense_plan(geometry),
        plan_from_rule([TokenRule(0, 60, NEVER)] * geometry.batch, geometry),
        _triangle(geometry),
        _random_tiles(geometry, heads=1),
    ]
    return stack_heads(plans, [0, 1, 2, 3])


def _any_key(geometry: Geometry) -> BlockPlan:
    """Tiles off the grid, one at key 5 and the diagonal's from odd keys on; two heads, one with an empty row."""
    width, rows = geometry.block_kv, geometry.rows
    lists: list[list[int]] = []
    samples = 1 if geometry.uniform else geometry.batch
    for s in range(samples):
        start = row_starts(geometry, samples)[s].tolist()
        for head in range(2):
            for r in range(rows):
                first = max(start[r] - 3 * head - 1, 0)
                tiles = [] if head and r == 1 else list(range(first, start[r] + 128, width))
                entries = [pack(key, CAUSAL) for key in tiles]
                lists.append([pack(5, CAUSAL), *entries] if first > 5 + width and entries else entries)
    ptr = torch.tensor([0, *(len(row) for row in lists)]).cumsum(0).int()
    flat = torch.tensor([entry for row in lists for entry in row], dtype=torch.int32)
    return BlockPlan(geometry, samples=samples, heads=2, row_ptr=ptr, entries=flat)


def _with_columns(geometry: Geometry, heads: int = 1, tokens: int = 150) -> BlockPlan:
    """A window, and single columns outside it: bits are off where the window's tiles hold the column."""
    window = plan_from_rule([TokenRule(0, 60, NEVER)] * geometry.batch, geometry)
    if window.all_dense:  # too short for a window to leave anything out
        window = _random_tiles(geometry, heads=1)
    plan = stack_heads([window], [0] * heads) if heads > 1 and window.heads == 1 else window
    if plan.heads != heads:
        plan = replace(_repeat_heads(window, heads))
    keys = max(span.keys for span in geometry.spans)
    g = torch.Generator().manual_seed(1)
    chosen = torch.stack(
        [torch.randperm(keys, generator=g)[: min(tokens, keys)].sort().values for _ in range(plan.samples * heads)]
    ).view(plan.samples, heads, -1)
    words = -(-(chosen.shape[2] + 3) // 32)
    listed = torch.full((plan.samples, heads, chosen.shape[2] + 3), NEVER)  # three places are never used
    listed[..., : chosen.shape[2]] = chosen
    bits = torch.zeros(plan.samples * heads * plan.rows, words * 32, dtype=torch.int64)
    held = _tiles_hold(plan, listed)
    bits[:, : listed.shape[2]] = ~held & (listed != NEVER).repeat_interleave(plan.rows, 1).flatten(0, 1)
    packed = (bits.view(-1, words, 32) << torch.arange(32)).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    return replace(plan, tokens=listed.int(), token_bits=packed)


def _repeat_heads(plan: BlockPlan, heads: int) -> BlockPlan:
    """The same lists for each of `heads` plan heads."""
    assert plan.row_ptr is not None and plan.entries is not None
    counts = plan.row_ptr.diff().view(plan.samples, 1, plan.rows).expand(-1, heads, -1)
    pieces = [
        plan.entries[plan.row_ptr[s * plan.rows] : plan.row_ptr[(s + 1) * plan.rows]]
        for s in range(plan.samples)
        for _ in range(heads)
    ]
    ptr = torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0)).int()
    dense = None
    if plan.dense_rows is not None:
        dense = plan.dense_rows.view(plan.samples, 1, -1).expand(-1, heads, -1).flatten()
    return replace(plan, heads=heads, row_ptr=ptr, entries=torch.cat(pieces), dense_rows=dense)


def _tiles_hold(plan: BlockPlan, tokens: Tensor) -> Tensor:
    """bool (rows, T): whether a tile of the row, or the row being dense, holds the column already."""
    assert plan.row_ptr is not None and plan.entries is not None
    held = []
    for row in range(len(plan.row_ptr) - 1):
        mine = tokens.view(-1, tokens.shape[2])[row // plan.rows]
        key = unpack(plan.entries[plan.row_ptr[row] : plan.row_ptr[row + 1]])[0].long()[:, None]
        inside = ((mine >= key) & (mine < key + plan.block_kv)).any(0)
        dense = plan.dense_rows is not None and bool(plan.dense_rows[row])
        held.append(inside | dense)
    return torch.stack(held)


PLANS = [
    _named(_dense),
    _named(_triangle),
    _named(_random_tiles),
    _named(_random_tiles, heads=KEY_HEADS),
    _named(_mixed_heads),
    _named(_any_key),
    _named(_with_columns),
    _named(_with_columns, heads=KEY_HEADS),
    _named(_with_columns, heads=HEADS, tokens=40),
]


# ---- the work list, on the CPU


def _pairs_of_work(plan: BlockPlan, dim: int) -> Tensor:
    """int32 (B, H, Q, K): how often the work list computes each pair, by the device code's rules, in plain Python."""
    g = plan.geometry
    q, k = torch.empty(g.batch, HEADS, g.q_len, dim), torch.empty(g.batch, KEY_HEADS, g.kv_len, dim)
    step = host._step_keys(dim)
    split_entry, parts = max(plan.block_kv // step, 1), host._parts(plan, step)
    width = step // parts
    halves = host._halves(plan)
    got = torch.zeros(g.batch, HEADS, g.q_len, g.kv_len, dtype=torch.int32)
    for work in host._works(plan, q, k):
        seen: dict[int, int] = {}
        assert work.items.dtype == torch.int32 and work.items.is_contiguous()
        for row, sample_head, begin, count, kv_start, kind, slot, plan_row in work.items.tolist():
            if count == 0:
                continue
            sample, head = divmod(sample_head, HEADS)
            low, high, bits_above = item.unpack_tile(kind)
            dense, empty = bool(bits_above & item.DENSE), bool(bits_above & item.EMPTY)
            diagonal = bits_above >> item.DIAGONAL_SHIFT
            narrow = not dense and bool(bits_above & item.NARROW)
            missing = 0 if dense else bits_above >> item.MISSING_SHIFT & item.MISSING
            lane = torch.arange(low, high)
            query = lane + row + g.q_offset - kv_start
            if empty:
                query = torch.full_like(query, -1)
            listed, columns = item.unpack_steps(count)
            if slot >= 0 and not halves:
                seen[slot] = row
            half = lane // 64
            i = torch.arange(listed * parts)
            if dense:
                entry = pack((begin - i // parts) * step + i % parts * width, (i // parts < diagonal) * CAUSAL)
            else:
                assert work.entries is not None
                i = i[: len(i) - missing]
                entry = work.entries[begin + i // split_entry] + pack(i % split_entry * step, 0)
            key, flags = unpack(entry)
            key = (key[:, None] + torch.arange(width)).flatten()
            flags = flags.repeat_interleave(width)
            ok = (flags == 0) | (key <= query[:, None])
            if plan.rule is not None and not dense:
                shape = plan.rule.shape
                of_head = head // (HEADS // plan.heads) if shape[1] > 1 else 0
                sink, window, dense_from = plan.rule[sample if shape[0] > 1 else 0, of_head].tolist()
                if narrow:
                    few = torch.arange(16)
                    kept = (few < sink)[None].expand(high - low, -1)
                    _count(got[sample, head, row + low : row + high], kept, few + kv_start)
                ruled = (key < sink) | (query[:, None] - key < window) | (query[:, None] >= dense_from)
                ok &= (flags & RULE == 0) | ruled
                if bits_above & item.SHORT:  # half of a row's queries skip half of an entry
                    edge, place = int(bool(bits_above & item.SECOND_EDGE)), torch.arange(listed * width)
                    first = (place // width == edge) & (place % width < item.HALF)
                    last = (place // width == listed - 1) & (place % width >= item.HALF)
                    ok &= ~(first & (half == 1)[:, None]) & ~(last & (half == 0)[:, None])
            if halves:
                (both, turns, second), order = item.Halves.of(slot), i // parts
                turn = torch.where(order < both + 2 * turns, (order - both) % 2, int(second))
                ok &= ((order < both) | (turn == half[:, None])).repeat_interleave(width, 1)
            _count(got[sample, head, row + low : row + high], ok, key + kv_start)
            if columns:
                assert plan.tokens is not None and plan.token_bits is not None
                mine = plan.tokens[sample if plan.samples > 1 else 0, head // (HEADS // plan.heads)]
                mine = mine.long()[: columns * step]
                own = (plan_row >> 1) + half * (plan_row & 1) if halves else torch.full_like(half, plan_row)
                bits = plan.token_bits[own][..., None] >> torch.arange(32) & 1
                ok = (mine <= query[:, None]) & bits.flatten(1)[:, : len(mine)].bool()
                _count(got[sample, head, row + low : row + high], ok, mine + kv_start)
        if work.merges is not None:
            firsts = {slot: count for slot, (_, _, _, count) in enumerate(work.merges.tolist()) if count}
            slots = [slot + i for slot, count in firsts.items() for i in range(count)]
            assert sorted(slots) == sorted(seen)
            assert all(seen[s] == work.merges[s, 0] for s in firsts)
    return got


def _pairs_of_anchors(plan: BlockPlan, dim: int, pack: int, q: Tensor, k: Tensor) -> Tensor:
    """The same for queries with a step, of which `pack` heads are rows of one: int32 (B, H, M, K)."""
    g, step, every = plan.geometry, host._step_keys(dim), plan.geometry.q_step
    heads = q.shape[1]
    got = torch.zeros(g.batch, heads, q.shape[2], g.kv_len, dtype=torch.int32)
    for work in host._works(plan, q, k, pack):
        seen: dict[int, int] = {}
        for row, sample_head, begin, count, kv_start, kind, slot, _ in work.items.tolist():
            sample, head = divmod(sample_head, heads)
            low, high, bits_above = item.unpack_tile(kind)
            if count == 0 or bits_above & item.EMPTY:
                continue
            assert bits_above & item.DENSE
            if slot >= 0:
                seen[slot] = row
            lane, first = row + torch.arange(low, high), max(g.q_offset - kv_start, 0)
            query = ((first // every + lane // pack) * every).clamp(min=first)
            i = torch.arange(count)
            key = ((begin + i) * step)[:, None] + torch.arange(step)
            flagged = (i >= count - (bits_above >> item.DIAGONAL_SHIFT))[:, None].expand_as(key).flatten()
            ok = ~flagged | (key.flatten() <= query[:, None])
            _count(got[sample, head, row + low : row + high], ok, key.flatten() + kv_start)
        assert (work.merges is None) == (not seen)
    return got


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("pack", [1, 2, 3])
@pytest.mark.parametrize("every", [2, 64, 300])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_work_list_of_anchors_computes_them(geometry: Geometry, every: int, pack: int, dim: int) -> None:
    plan = dense_plan(geometry.anchors(every))
    g = plan.geometry
    q, k = torch.empty(g.batch, 2, g.q_rows * pack, dim), torch.empty(g.batch, 2, g.kv_len, dim)
    got = _pairs_of_anchors(plan, dim, pack, q, k)
    expected = plan.multiplicity().repeat_interleave(pack, 2)
    assert torch.equal(got, expected.expand_as(got))


@pytest.mark.parametrize("pack", [1, 6])
def test_anchors_of_few_heads_are_cut_over_keys(pack: int) -> None:
    """Also where a piece lies wholly across the diagonal."""
    plan = dense_plan(_tiled(20000).anchors(64))
    q, k = torch.empty(1, 1, 313 * pack, 128), torch.empty(1, 1, 20000, 128)
    (work,) = host._works(plan, q, k, pack)
    assert work.merges is not None
    got = _pairs_of_anchors(plan, 128, pack, q, k)
    assert torch.equal(got, plan.multiplicity().repeat_interleave(pack, 2))


def test_heads_that_lie_beside_one_another_come_apart_again() -> None:
    q = torch.randn(2, 6, 10, 64)
    packed = host._pack(q, 3)
    assert packed.shape == (2, 2, 30, 64)
    assert packed.transpose(1, 2).is_contiguous()
    assert torch.equal(packed[1, 1, 4 * 3 + 2], q[1, 1 * 3 + 2, 4])
    assert torch.equal(host._unpack(packed, 3), q)


def _count(got: Tensor, ok: Tensor, key: Tensor) -> None:
    """Add `ok` (rows, n) to the columns `key` (n,) of `got` (rows, K)."""
    assert not ok[:, key >= got.shape[1]].any()
    got.index_add_(1, key.clamp(max=got.shape[1] - 1), ok.int())


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("make", PLANS)
def test_work_list_computes_the_plan(
    make: Callable[[Geometry], BlockPlan], geometry: Geometry, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if split:  # make every row look long, so that even these small plans are cut over keys
        monkeypatch.setattr(worklist, "SPLIT_FROM_STEPS", 1)
        monkeypatch.setattr(worklist, "SHORTEST_PIECE", 1)
        monkeypatch.setattr(worklist, "_processors", lambda device: 1000)
    block_kv, dim = (128, 128) if not split else (64, 64) if geometry.batch == 1 else (128, 256)
    if split and geometry.q_len == 200:
        block_kv, dim = 32, 128
    plan = make(geometry.with_tile(128, block_kv))
    expected = plan.multiplicity().repeat_interleave(HEADS // plan.heads, 1)
    assert torch.equal(_pairs_of_work(plan, dim), expected)
    if split and geometry.q_len >= 700:
        works = [work for key, made in plan.memo.items() if key[0] == HOPPER_WORK for work in made]
        assert all(work.merges is not None for work in works)


# Windows whose edge and diagonal are steps beside one another, or have up to four between them; sinks that are no step,
# a narrow one, and one of 128 keys.
WINDOWS = [(0, 130), (8, 150), (16, 256), (17, 300), (64, 512), (5, 700)]
WINDOWED = [_tiled(1500), _tiled(300, 1300, q_offset=950), _tiled(1100, batch=2, kv_start=(0, 130))]


def _windowed(geometry: Geometry, sinks: int, window: int) -> BlockPlan:
    rules = [TokenRule(sinks, window, max(span.prompt_tokens - 20, 0)) for span in geometry.spans]
    return plan_from_rule(rules, geometry)


@pytest.mark.parametrize("geometry", WINDOWED, ids=str)
@pytest.mark.parametrize(("sinks", "window"), WINDOWS)
def test_half_steps_compute_the_plan(sinks: int, window: int, geometry: Geometry) -> None:
    plan = _windowed(geometry, sinks, window)
    assert torch.equal(_pairs_of_work(plan, 128), plan.multiplicity().repeat_interleave(HEADS // plan.heads, 1))
    (work,) = next(made for key, made in plan.memo.items() if key[0] == HOPPER_WORK)
    short = work.items[(work.items[:, item.KIND] & item.SHORT != 0) & (work.items[:, item.KIND] & item.DENSE == 0)]
    assert len(short)
    assert bool((short[:, item.KIND] & item.SECOND_EDGE != 0).any()) == (sinks > item.NARROW_KEYS)
    assert int(short[:, item.COUNT].max()) == -(-window // 128) + 1 + (sinks > item.NARROW_KEYS)


def _slashes(geometry: Geometry, capacity: int | None = None, columns: int = 40, slashes: int = 9) -> BlockPlan:
    """Diagonals and columns of each head: with a capacity, rows that run dense beside rows that are listed."""
    tokens = max(max(span.q_end for span in geometry.spans), 1)
    g = torch.Generator().manual_seed(2)
    score = torch.rand(2, geometry.batch, HEADS, -(-tokens // 32) * 32, generator=g)
    score[1, ..., 0] = 2.0
    score[..., tokens:] = -1.0
    chosen = torch.stack(
        [score[i] >= score[i].topk(min(n, tokens)).values[..., -1:] for i, n in enumerate((columns, slashes))]
    )
    return plan_from_vertical_slash(pack_bits(chosen).contiguous(), geometry, columns, slashes, 64, capacity=capacity)


HALF_PLANS = [
    _named(_dense),
    _named(_random_tiles),
    _named(_random_tiles, heads=KEY_HEADS, keep=0.05),
    _named(_slashes),
    _named(_slashes, columns=200, slashes=40),
    _named(_slashes, capacity=60),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("make", HALF_PLANS)
def test_rows_of_64_queries_share_an_item(make: Callable[[Geometry], BlockPlan], geometry: Geometry) -> None:
    """Each of their pairs once, with steps of two entries or of one; by the device code's rules."""
    plan = make(geometry.with_tile(64, 64))
    expected = plan.multiplicity().repeat_interleave(HEADS // plan.heads, 1)
    for dim in (128, 256):
        assert torch.equal(_pairs_of_work(plan, dim), expected)


@pytest.mark.slow
def test_rows_are_paired_on_a_card_as_here() -> None:
    interpret("attend/interpreted_halves.py")


def test_nobody_passes_two_steps_in_a_row() -> None:
    """A consumer that passes a step holds a buffer until its next one; of three, two in a row would leave none."""
    plan = _slashes(_tiled(2000).with_tile(64, 64), slashes=60)
    q, k = torch.empty(1, HEADS, 2000, 128), torch.empty(1, KEY_HEADS, 2000, 128)
    (work,) = host._works(plan, q, k)
    passed = 0
    for _, _, _, count, _, _, word, _ in work.items.tolist():
        both, turns, _ = item.Halves.of(word)
        order = torch.arange(item.unpack_steps(count)[0])
        for who in range(2):
            passes = (order >= max(both, 1)) & (order < both + 2 * turns) & ((order - both) % 2 != who)
            passed += int(passes.sum())
            assert not (passes[1:] & passes[:-1]).any()
    assert passed > 100


def test_a_second_list_leaves_the_first_alone() -> None:
    """Each head size lists its own way, and both are kept with the plan, whose tensors nobody writes to."""
    plan, again = (
        _slashes(_tiled(2000).with_tile(64, 64), slashes=60),
        _slashes(_tiled(2000).with_tile(64, 64), slashes=60),
    )
    first, second = (
        host._works(plan, torch.empty(1, HEADS, 2000, dim), torch.empty(1, KEY_HEADS, 2000, dim))[0]
        for dim in (128, 256)
    )
    (expected,) = host._works(again, torch.empty(1, HEADS, 2000, 128), torch.empty(1, KEY_HEADS, 2000, 128))
    assert first.entries is not None and second.entries is not None and expected.entries is not None
    assert first.entries.numel() == item.list_room(plan.entries.numel(), plan.heads, plan.rows)  # type: ignore[union-attr]
    assert first.entries.data_ptr() != second.entries.data_ptr()
    assert torch.equal(first.items, expected.items)
    for start, count in first.items[:, [item.START, item.COUNT]].tolist():
        steps = slice(start, start + 2 * item.unpack_steps(count)[0])
        assert torch.equal(first.entries[steps], expected.entries[steps])
    for name, tensor in plan.tensors.items():
        assert torch.equal(tensor, again.tensors[name])


def test_words_of_an_item_are_unpacked_as_they_were_packed() -> None:
    for low, high in ((0, 128), (3, 64), (64, 65)):
        kind = item.pack_tile(low, high) | item.NARROW | 2 << item.MISSING_SHIFT
        assert item.unpack_tile(kind) == (low, high, item.NARROW | 2 << item.MISSING_SHIFT)
        assert kind < 2**31
    assert item.unpack_steps(item.pack_steps(1234, 99)) == (1234, 99)
    for halves in (item.Halves(1, 0, False), item.Halves(60000, 0x7FFF, True)):
        word = item.pack_halves(*halves)
        assert item.Halves.of(word) == halves
        assert -(2**31) <= word < 2**31
    assert len({item.DENSE, item.EMPTY, 1 << item.DIAGONAL_SHIFT}) == 3
    assert min(item.DENSE.bit_length() - 1, item.EMPTY.bit_length() - 1) >= item.TILE_BITS


def test_items_without_steps_come_last() -> None:
    """Of two rows of which one is dense by bounds each is an item, and else one of the two items has no steps."""
    plan = _slashes(_tiled(2000).with_tile(64, 64), capacity=300)
    (work,) = host._works(plan, torch.empty(1, HEADS, 2000, 128), torch.empty(1, KEY_HEADS, 2000, 128))
    there = work.items[:, 3] > 0
    assert 0 < int((~there).sum()) < len(there) // 2
    assert bool((there[1:] <= there[:-1]).all())


def test_the_grid_has_no_strides() -> None:
    """The device code reads it as it lies. With one row a head, an expanded dimension outlives `reshape`."""
    for geometry in (_tiled(1), _tiled(100, batch=3), _tiled(700)):
        samples = tuple(range(geometry.batch))
        grid = worklist._grid(geometry, samples, True, HEADS, HEADS, HEADS // KEY_HEADS, 128, 1, torch.device("cpu"))
        for name in ("items", "rows", "dense_steps", "section", "tile", "dead"):
            assert getattr(grid, name).is_contiguous(), (name, geometry)
            assert getattr(grid, name).stride(-1) == 1, (name, geometry)


def test_halves_read_no_more_than_rows_of_128_and_compute_less() -> None:
    """Of diagonals that lie apart, each half needs two of the three steps' tiles that both read."""
    geometry = _tiled(8192)
    distances = torch.zeros(1, 1, 8192, dtype=torch.bool)
    distances[..., ::512] = True
    bits = pack_bits(torch.stack([torch.zeros_like(distances), distances])).contiguous()
    wide, narrow = (plan_from_vertical_slash(bits, geometry.with_tile(rows, 64), 1, 16, 64) for rows in (128, 64))
    q = k = torch.empty(1, 1, 8192, 128)
    ((read,), (halves,)) = (host._works(plan, q, k) for plan in (wide, narrow))
    needed = [item.Halves.of(word) for word in halves.items[:, item.SLOT].tolist()]
    steps, wide_steps = (int(item.unpack_steps(work.items[:, item.COUNT])[0].sum()) for work in (halves, read))
    assert steps <= 1.1 * wide_steps
    assert sum(both + turns for both, turns, _ in needed) < 0.75 * wide_steps


def test_long_rows_are_split_and_no_others() -> None:
    """Triangle's last row on 8 heads is cut; on 32 heads it hides behind the rest and is not."""
    geometry = _tiled(131072)
    plan = plan_from_rule(TokenRule(8, 512, 131072 - 128), geometry)
    q, k = (torch.empty(1, 1, 131072, 128, dtype=torch.bfloat16).expand(-1, heads, -1, -1) for heads in (8, 2))
    (work,) = host._works(plan, q, k)
    share = int((work.items[:, 3]).sum()) / worklist.H100_SMS
    assert work.merges is not None
    assert int(work.items[:, 3].max()) < share
    assert int((work.merges[:, 3] > 0).sum()) == 8
    q, k = (x.expand(-1, heads, -1, -1) for x, heads in ((q[:, :1], 32), (k[:, :1], 8)))
    (work,) = host._works(plan, q, k)
    assert work.merges is None
    assert int(work.items[0, 3]) == 1024  # and comes first


# ---- what is covered


def test_covers_names_the_reason() -> None:
    q = torch.randn(1, 4, 256, 128, dtype=torch.bfloat16)
    plan, softmax = dense_plan(_tiled(256)), Softmax(0.1)
    assert host.missing(torch.device("cpu")) == "it is not a CUDA device"

    def form(q: Tensor, plan: BlockPlan = plan) -> str:
        return "; ".join(host.covers(q, Keys(q, q), plan, softmax, False))

    assert form(q) == ""
    assert form(q.transpose(1, 2).contiguous().transpose(1, 2)) == ""
    engine = torch.empty(300, 4, 128, dtype=q.dtype)
    assert host.covers(q, Keys(q, q), plan, softmax, False, engine[3:259].transpose(0, 1)[None]) == []
    assert "out with strides" in host.covers(q, Keys(q, q), plan, softmax, False, torch.empty_like(q))[0]
    assert "float32" in form(q.float())
    assert "head size 96" in form(q[..., :96])
    assert form(q, dense_plan(Geometry.of(256, block_q=64, block_kv=64))) == ""
    assert "tile 64 x 128" in form(q, dense_plan(Geometry.of(256, block_q=64, block_kv=128)))
    ruled = plan_from_rule(TokenRule(8, 64, 256), Geometry.of(256, block_q=64, block_kv=64))
    assert "tile 64 x 64" in form(q, ruled)
    both = form(q[..., :96].float())
    assert "float32" in both and "head size 96" in both  # all reasons
    assert "strides" in form(torch.empty(1, 4, 256, 129, dtype=torch.bfloat16)[..., :128])
    assert "16-byte" in form(torch.empty(4 * 256 * 128 + 8, dtype=torch.bfloat16)[1:-7].view(1, 4, 256, 128))
    assert "strides" in form(q[:, :1].expand(-1, 4, -1, -1))


def test_a_launch_is_kept_for_the_calls_it_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its work list, strides and tensors are of one device, one number of key heads, one softmax."""
    made: list[tuple[Any, ...]] = []

    def prepare(q: Tensor, keys: Keys, *_: Any) -> host._Launches:
        made.append((keys.k.shape[1], q.device.type))
        return host._Launches((), padded=False, columns=False)

    class Driver:
        def get_current_stream(self, index: int | None) -> int:
            return 0

    monkeypatch.setattr(host, "_prepare", prepare)
    monkeypatch.setattr(host, "_driver", Driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU tensor's device
    q, kv = torch.zeros(1, 4, 256, 64), torch.zeros(1, 4, 256, 64)
    plan = dense_plan(_tiled(256))  # without tensors, so of no device
    for key_heads in (4, 2, 2, 1):  # views of one cache: their strides are the same
        host.attend_hopper(q, Keys(kv[:, :key_heads], kv[:, :key_heads]), plan, Softmax(0.1), False)
    q, kv = q.to("meta"), kv.to("meta")
    host.attend_hopper(q, Keys(kv, kv), plan, Softmax(0.1), False)
    host.attend_hopper(q, Keys(kv, kv), plan, Softmax(0.1), False)
    assert made == [(4, "cpu"), (2, "cpu"), (1, "cpu"), (4, "meta")]


class _Recorded:
    """A kernel that notes its grids, and what is at one place of its arguments."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, stream: self.launches.append((grid, arguments[self.place], stream))


def test_two_launches_where_rows_keep_their_first_maximum() -> None:
    for fixed, modes in ((False, [item.RUNNING]), (True, [item.FIXED, item.AGAIN])):
        kernel = _Recorded(1)
        host.launch_by_mode(kernel, 7, ["q", None, "k"], 1, fixed, 5)
        assert kernel.launches == [((7, 1, 1), mode, 5) for mode in modes]


def test_long_launches_keep_the_first_maximum() -> None:
    least = host.FIXED_FROM
    assert host.keeps_maximum(least, 1)
    assert host.keeps_maximum(1, least * 128)
    assert host.keeps_maximum(least // 2, 129)
    assert not host.keeps_maximum(least // 2, 128)
    assert not host.keeps_maximum(least - 1, 128)


def test_marks_have_room_for_all_items_and_whether_there_are_any() -> None:
    for items in (0, 1, 2, 3, 4, 7, 8, 1000, 1 << 16):
        assert items < host.room(items) <= max(2 * items, 1)
        assert host.room(items).bit_count() == 1
    cpu = torch.device("cpu")
    marks = host._marks(cpu, 3, 8)
    assert marks.tolist() == [0] * 8
    assert marks.dtype == torch.int32
    assert host._marks(cpu, 3, 8) is marks
    assert host._marks(cpu, 4, 8) is not marks  # launches of two streams may overlap
    assert len(host._marks(cpu, 3, 16)) == 16


@pytest.mark.parametrize("least", [1, 1 << 60])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modes_of_a_call(dtype: torch.dtype, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 keeps the running maximum: weights above 2^16 are beyond it."""
    names = list(inspect.signature(device_code().attention).parameters)
    assert names[host.OUT_ARGUMENT : host.OUT_ARGUMENT + 6] == [
        "p_out", "p_lse", "p_sinks", "p_part", "p_part_lse", "p_table",
    ]  # fmt: skip
    assert names[host.ANCHORS_ARGUMENT : host.MODE_ARGUMENT + 1] == ["p_anchors", "p_marks", "mode"]
    monkeypatch.setattr(host, "FIXED_FROM", least)
    fixed = dtype == torch.bfloat16 and least == 1
    q, k = torch.empty(1, HEADS, 300, 64, dtype=dtype), torch.empty(1, KEY_HEADS, 300, 64, dtype=dtype)
    for make in (_dense, _triangle):
        with hosted(host, device_code()):
            (launch,) = host._prepare(q, Keys(k, k), make(_tiled(300)), Softmax(0.1), False).launches
            assert launch.fixed == fixed
            assert len(launch.arguments[names.index("p_marks")]) == host.room(len(launch.work.items))
            launch = replace(launch, kernel=_Recorded(names.index("mode")))
            launch.run(q, Keys(k, k), torch.empty_like(q), None, (None, None), None, 3, None)
        modes = [item.FIXED, item.AGAIN] if fixed else [item.RUNNING]
        assert launch.kernel.launches == [((launch.work.blocks, 1, 1), mode, 3) for mode in modes]


# ---- the device code compiles for sm_90, without a card

COMPILED = [
    (128, "bfloat16", "", "", 128, ""),
    (128, "bfloat16", "", "", 128, "dense"),
    (128, "bfloat16", "", "lse", 128, "lists"),
    (64, "float16", "", "", 128, ""),
    (256, "bfloat16", "", "", 128, ""),
    (128, "bfloat16", "sinks", "lse", 128, ""),
    (128, "bfloat16", "", "", 64, "columns"),
    (128, "float16", "", "", 32, ""),
    (128, "bfloat16", "", "", 64, "columns halves"),
    (64, "float16", "", "lse", 64, "halves"),
    (128, "bfloat16", "", "", 128, "page16"),
    (128, "bfloat16", "", "lse", 128, "page256"),
    (64, "float16", "", "", 128, "every64"),
    (256, "bfloat16", "", "lse", 128, "every7"),
    (128, "bfloat16", "sinks", "", 128, "every64 page16"),
    (128, "float16", "sinks", "", 128, "corrected"),
    (128, "bfloat16", "", "", 64, "columns corrected"),
    (128, "bfloat16", "", "", 128, "page16 corrected"),
]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of them takes; one child process compiles them all."""
    return compiled("attend/compile_hopper.py", tmp_path_factory.mktemp("triton"), json.dumps(COMPILED))


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiles_for_sm_90(case: tuple[int, str, str, str, int, str], offline: list[dict[str, Any]]) -> None:
    dim, kind, *_, more = case
    made = offline[COMPILED.index(case)]
    assert made["shared"] <= SHARED_MEMORY
    assert made["hgmma"] >= 48
    columns, halves = "columns" in more, "halves" in more
    # The step loops of two consumers: over entries and over columns, or with either maximum.
    alone = kind == "bfloat16" and any(plan in more for plan in ("dense", "lists", "every"))
    assert made["steps"] == (4 if columns or alone else 2)
    assert made["spilled"] <= (16 if columns else 0)  # 0 with Triton 3.6, 9 with 3.9, in the loop over columns
    paged = ("page16 corrected", "page256")  # with Triton 3.9 8 and 32 bytes, once a tile
    if dim < 256 and not columns and not halves and more not in paged:
        assert "0 bytes spill stores, 0 bytes spill loads" in made["said"]
    assert "C75" not in made["said"]  # ptxas: wgmma serialised, or register reallocation ignored


# ---- on a card


def _poisoned(self: Tensor, *size: Any, **options: Any) -> Tensor:
    """`new_empty`, full of NaN: what a kernel leaves unwritten shows."""
    flat = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    return self.new_full(tuple(flat), float("nan"), **options)


def _inputs(geometry: Geometry, dim: int, dtype: torch.dtype, gain: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v in (B, N, heads, D) memory, clean, and again with NaN wherever the geometry says padding or spare."""
    g = torch.Generator().manual_seed(0)
    shapes = ((geometry.q_len, HEADS), (geometry.kv_len, KEY_HEADS), (geometry.kv_len, KEY_HEADS))
    clean = [
        torch.randn(geometry.batch, tokens, heads, dim, generator=g).to("cuda", dtype).transpose(1, 2)
        for tokens, heads in shapes
    ]
    clean[0] *= gain
    dirty = [x.clone() for x in clean]
    for b, (start, end) in enumerate(zip(geometry.kv_start, geometry.kv_end, strict=True)):
        index = torch.arange(geometry.kv_len, device="cuda")
        for x in dirty[1:]:
            x[b, :, (index < start) | (index >= end)] = float("nan")
        index = torch.arange(geometry.q_len, device="cuda") + geometry.q_offset
        dirty[0][b, :, (index < start) | (index >= end)] = float("nan")
    return clean, dirty


# Relative error of the whole, and of the worst row: P is rounded to 16 bits before P V (bf16: 1.7e-3 to 2.4e-3 seen).
BUDGETS = {torch.bfloat16: (3e-3, 2e-2), torch.float16: (5e-4, 4e-3)}


def _agrees(
    plan: BlockPlan,
    softmax: Softmax,
    monkeypatch: pytest.MonkeyPatch,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    gain: float = 1.0,
) -> None:
    """The kernel against float64, with and without LSE, every output NaN before, and bit for bit the same again."""
    clean, dirty = _inputs(plan.geometry, dim, dtype, gain)
    expected, expected_lse = attend_reference(*(x.double() for x in clean), plan, softmax)
    for first in (0, 1 << 60):  # rows keep the maximum of their first step, and find the running one
        monkeypatch.setattr(host, "FIXED_FROM", first)
        on_card = plan.to("cuda")
        assert host.covers(dirty[0], Keys(*dirty[1:]), on_card, softmax, True) == []
        with monkeypatch.context() as patched:
            patched.setattr(Tensor, "new_empty", _poisoned)
            out, lse = host.attend_hopper(dirty[0], Keys(*dirty[1:]), on_card, softmax, True)
            again, _ = host.attend_hopper(dirty[0], Keys(*dirty[1:]), on_card, softmax, True)
            engine = torch.full_like(out, float("nan"))
            into, _ = host.attend_hopper(dirty[0], Keys(*dirty[1:]), on_card, softmax, True, engine)
        assert lse is not None
        assert torch.equal(out, again)
        assert into is engine
        assert torch.equal(out, into)
        assert out.transpose(1, 2).is_contiguous()
        whole, worst = BUDGETS[dtype]
        error = out.double() - expected
        assert float(error.norm()) <= whole * float(expected.norm())
        seen = expected_lse.isfinite()
        assert not out[~seen].any()
        # A row of outputs below float16's normal numbers (a sink logit that takes all but 1e-7) has no precision.
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        allowed = worst * expected.norm(dim=-1) + step * dim**0.5
        assert bool((error.norm(dim=-1) < allowed)[seen].all())
        assert torch.equal(lse == float("-inf"), ~seen)
        assert bool(((lse.double() - expected_lse)[seen].abs() < 1e-3).all())


@pytest.mark.gpu
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("make", PLANS)
def test_card(make: Callable[[Geometry], BlockPlan], geometry: Geometry, monkeypatch: pytest.MonkeyPatch) -> None:
    _agrees(make(geometry), Softmax(128**-0.5), monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("make", [*PLANS, *HALF_PLANS])
def test_card_outgrown(make: Callable[[Geometry], BlockPlan], dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of which later ones lie hundreds above a first step's: rows that a second launch does again."""
    for geometry in (_tiled(1500), GEOMETRIES[3]):
        if make in HALF_PLANS:
            geometry = geometry.with_tile(64, 64)
        _agrees(make(geometry), Softmax(dim**-0.5), monkeypatch, dim, gain=100.0)


@pytest.mark.gpu
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("make", HALF_PLANS)
def test_card_halves(
    make: Callable[[Geometry], BlockPlan], geometry: Geometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    _agrees(make(geometry.with_tile(64, 64)), Softmax(128**-0.5), monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "dtype", "softcap", "sinks"),
    [
        (64, torch.bfloat16, None, False),
        (64, torch.float16, 5.0, True),
        (128, torch.float16, 20.0, True),
        (256, torch.bfloat16, None, True),
    ],
)
def test_card_halves_forms(
    dim: int, dtype: torch.dtype, softcap: float | None, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.tensor([0.5, -1.0, 5.0, -60.0], device="cuda") if sinks else None
    for geometry in (GEOMETRIES[3], GEOMETRIES[8], GEOMETRIES[9], _tiled(3000)):
        for plan in (_slashes(geometry.with_tile(64, 64), slashes=30), _random_tiles(geometry.with_tile(64, 64))):
            _agrees(plan, Softmax(dim**-0.5, softcap, logits), monkeypatch, dim, dtype)
            _agrees(plan, Softmax(dim**-0.5, softcap, logits), monkeypatch, dim, dtype, gain=20.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("sinks", "window"), WINDOWS)
def test_card_half_steps(sinks: int, window: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for geometry in WINDOWED:
        for gain in (1.0, 20.0):
            _agrees(_windowed(geometry, sinks, window), Softmax(dim**-0.5), monkeypatch, dim, gain=gain)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [*PLANS[1:], *(_named(_windowed, sinks=s, window=w) for s, w in WINDOWS)])
def test_card_lists_the_same_work(make: Callable[[Geometry], BlockPlan]) -> None:
    """In one launch what torch ops list on the CPU, where it is checked against the plan pair by pair."""
    for geometry in (*GEOMETRIES, *WINDOWED):
        for block_kv, dim in ((128, 128), (128, 256), (64, 128), (32, 64)):
            plan = make(geometry.with_tile(128, block_kv))
            if plan.row_ptr is None:
                continue
            step, here, samples = host._step_keys(dim), torch.device("cpu"), tuple(range(geometry.batch))
            rest = (plan.samples == 1, plan.heads, HEADS, HEADS // KEY_HEADS, step, 1)
            expected = worklist._listed(plan, worklist._grid(plan.geometry, samples, *rest, here), step)
            card = torch.device("cuda", torch.cuda.current_device())
            got = worklist._listed(plan.to(card), worklist._grid(plan.geometry, samples, *rest, card), step)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True)), (geometry, block_kv, dim)
            keys = [worklist._sort_keys(work, torch.ones_like(work), 7).cpu() for work in (got[1], expected[1])]
            assert torch.equal(*keys)


@pytest.mark.gpu
@pytest.mark.parametrize("block_kv", [32, 64])
@pytest.mark.parametrize("geometry", [GEOMETRIES[1], GEOMETRIES[3], GEOMETRIES[5], GEOMETRIES[7]], ids=str)
@pytest.mark.parametrize("make", PLANS[1:])
def test_card_steps_of_several_entries(
    make: Callable[[Geometry], BlockPlan], geometry: Geometry, block_kv: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _agrees(make(geometry.with_tile(128, block_kv)), Softmax(128**-0.5), monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("sink", [1, 8, 16, 17])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_card_sinks_alone(sink: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose first tile is sinks and nothing else, with sinks that carry most of the mass, and next to none."""
    for geometry in (_tiled(900), _tiled(200, 900), _tiled(900, batch=2, kv_start=(0, 130))):
        rules = [TokenRule(sink, 200, span.prompt_tokens - 20) for span in geometry.spans]
        for gain in (1.0, 20.0):
            _agrees(plan_from_rule(rules, geometry), Softmax(dim**-0.5), monkeypatch, dim, gain=gain)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [PLANS[1], PLANS[4], PLANS[6]])
@pytest.mark.parametrize("geometry", [GEOMETRIES[3], GEOMETRIES[7], GEOMETRIES[9]], ids=str)
def test_card_split_rows(
    make: Callable[[Geometry], BlockPlan], geometry: Geometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worklist, "SPLIT_FROM_STEPS", 1)
    monkeypatch.setattr(worklist, "SHORTEST_PIECE", 1)
    plan = make(geometry)
    if plan.all_dense:
        plan = _random_tiles(geometry)
    sinks = torch.tensor([0.5, -1.0, 60.0, -60.0], device="cuda")
    _agrees(plan, Softmax(0.1, None, sinks), monkeypatch)


FORMS = [
    (128, torch.bfloat16, 64, None, False),
    (128, torch.float16, 128, None, True),
    (128, torch.bfloat16, 128, 20.0, True),
    (64, torch.bfloat16, 128, None, False),
    (64, torch.float16, 64, 5.0, True),
    (256, torch.bfloat16, 128, None, True),
    (256, torch.float16, 64, 20.0, False),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "dtype", "block_kv", "softcap", "sinks"), FORMS)
def test_card_forms(
    dim: int, dtype: torch.dtype, block_kv: int, softcap: float | None, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.tensor([0.5, -1.0, 5.0, -60.0], device="cuda") if sinks else None
    for geometry in (GEOMETRIES[3], GEOMETRIES[8], GEOMETRIES[9]):
        plan = _mixed_heads(geometry.with_tile(128, block_kv))
        _agrees(plan, Softmax(dim**-0.5, softcap, logits), monkeypatch, dim, dtype)
        _agrees(plan, Softmax(dim**-0.5, softcap, logits), monkeypatch, dim, dtype, gain=20.0)


@pytest.mark.gpu
def test_card_layouts_and_stability() -> None:
    """(B, H, N, D) and (B, N, H, D) memory give the same bits, as do 300 launches on two streams."""
    geometry = _tiled(1500, 3000)
    plan = _triangle(geometry).to("cuda")
    inputs, _ = _inputs(geometry, 128, torch.bfloat16)
    first = attend(*inputs, plan, impl="hopper")
    assert torch.equal(first, attend(*(x.contiguous() for x in inputs), plan, impl="hopper"))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for i in range(300):
        with torch.cuda.stream(streams[i % 2]):
            results.append((attend(*inputs, plan, impl="hopper") != first).sum())
    torch.cuda.synchronize()
    assert int(torch.stack(results).sum()) == 0


@pytest.mark.gpu
def test_card_never_synchronises() -> None:
    """Neither the first call of a plan, which makes the work list, nor later ones."""
    geometry = _tiled(700, batch=3, kv_start=(0, 37, 600))
    inputs, _ = _inputs(geometry, 128, torch.bfloat16)
    for make in (_mixed_heads, _with_columns):
        warm, plan = make(geometry).to("cuda"), make(geometry).to("cuda")
        attend(*inputs, warm, impl="hopper", return_lse=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            attend(*inputs, plan, impl="hopper", return_lse=True)
            attend(*inputs, plan, impl="hopper", return_lse=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
