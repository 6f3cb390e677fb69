"""A chunk over pages computes what its rows of the whole prompt do, under an explicit mask; keys that no row keeps are
not read."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsekit
from sparsekit import SparsekitError, load
from sparsekit.call import keys as keys_module
from sparsekit.call.geometry import Span
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.config import LayerPatterns
from sparsekit.kernels import attend
from sparsekit.kernels.select import plan_of_heads
from sparsekit.patterns import StaticPattern, base, parse_pattern
from sparsekit.patterns.shared import SharedPlans
from sparsekit.plan import TokenRule
from sparsekit.serve.prompts import Chunk, attend_part, dense_tail, part_of, read_e4m3, why_dense

CPU = torch.device("cpu")
HEADS, KEY_HEADS, DIM = 4, 2, 16
TRIANGLE = {"name": "triangle", "sink_tokens": 8, "window_tokens": 64, "last_tokens": 32}
A_SHAPE = {"name": "a_shape", "sink_tokens": 130, "window_tokens": 100}
UNION = {"name": "union", "of": [TRIANGLE, A_SHAPE]}
VERTICAL_SLASH = {"vertical_tokens": 12, "slash_tokens": 24}


def _layer(*patterns: object, of_head: tuple[int, ...] = ()) -> LayerPatterns:
    return LayerPatterns(3, tuple(parse_pattern(x) for x in patterns), of_head or (0,) * HEADS)  # type: ignore[arg-type]


def _inputs(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(tokens + seed)
    q = torch.randn(tokens, HEADS, DIM, generator=g)
    k, v = (torch.randn(tokens, KEY_HEADS, DIM, generator=g) for _ in range(2))
    return q, k, v


def _paged(k: Tensor, v: Tensor, size: int, *, joint: bool = True) -> Keys:
    """k and v scattered over pages in random order; everything else in them is NaN."""
    count = -(-k.shape[0] // size)
    row = torch.randperm(count + 5, generator=torch.Generator().manual_seed(1))[:count]
    pages = torch.full((count + 5, size, KEY_HEADS, 2 * DIM), torch.nan)
    position = torch.arange(k.shape[0])
    pages[row[position // size], position % size] = torch.cat([k, v], -1)
    both = pages.transpose(1, 2).split(DIM, -1)
    if not joint:  # keys with their tokens innermost, as vLLM has them on a CPU
        both = both[0].transpose(2, 3).contiguous().transpose(2, 3), both[1].contiguous()
    return Keys(*both, row.int()[None])


def _explicit(q: Tensor, k: Tensor, v: Tensor, layer: LayerPatterns, prompt: int, softmax: Softmax) -> Tensor:
    """The whole prompt's output (n, H, D), by each head's own `keep`."""
    from sparsekit.call.geometry import Span

    n = len(q)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    masks = [x.keep(i, j, Span(0, n, n, prompt)) for x in layer.patterns]  # type: ignore[attr-defined]
    keep = torch.stack([masks[p] for p in layer.pattern_of_head]) | ((i >= prompt) & (j <= i))
    z = softmax.logits(torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(HEADS // KEY_HEADS, 1)))
    z = z.masked_fill(~keep, -torch.inf)
    if softmax.sink_logits is not None:
        z = torch.cat([z, softmax.sink_logits.double()[:, None, None].expand(-1, n, 1)], -1)
    p = z.softmax(-1)[..., :n]
    return torch.einsum("hqk,khd->qhd", p, v.double().repeat_interleave(HEADS // KEY_HEADS, 1)).float()


LAYERS = {
    "triangle": _layer(TRIANGLE),
    "a_shape": _layer(A_SHAPE),
    "union": _layer(UNION),
    "two rules": _layer(TRIANGLE, A_SHAPE, of_head=(0, 1, 1, 0)),
    "dense heads": _layer(TRIANGLE, "dense", of_head=(0, 1, 0, 1)),
    "dense": _layer("dense"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("chunk_tokens", [2000, 300, 256, 1])
@pytest.mark.parametrize(("size", "joint"), [(16, True), (256, False)])
def test_chunks_over_pages_are_the_whole_prompt(name: str, chunk_tokens: int, size: int, joint: bool) -> None:
    layer, prompt, softmax = LAYERS[name], 1100, Softmax(0.4, 5.0, torch.tensor([0.0, 1.0, -torch.inf, 3.0]))
    total = prompt + 40  # an engine that resumes a request computes generated tokens again
    q, k, v = _inputs(total)
    whole = _explicit(q, k, v, layer, prompt, softmax)
    keys = _paged(k, v, size, joint=joint)
    first_rows = range(0, total, chunk_tokens) if chunk_tokens > 1 else (0, 700, prompt - 33, prompt - 1, prompt)
    ran = 0
    for first in first_rows:
        chunk = Chunk(first, min(first + chunk_tokens, total), prompt)
        part = part_of(layer, chunk, CPU, page=size, dense_here=True)
        if part is None:
            continue
        rows = slice(first, part.end)
        out = torch.full_like(q[rows], torch.nan)
        attend_part(part, layer, q[rows], keys.at(part.reads), softmax, out)
        torch.testing.assert_close(out, whole[rows], atol=2e-5, rtol=2e-5)
        ran += part.end - first
    if chunk_tokens > 1:  # nothing behind the prompt, and no dense last row where all heads have them
        assert ran == prompt - (32 if name in ("triangle", "union", "dense heads") else 0)


@pytest.mark.parametrize("name", ["block_topk", "vertical_slash"])
@pytest.mark.parametrize("chunk_tokens", [2000, 300])
def test_a_layer_reuses_the_plan_of_its_request_and_chunk(name: str, chunk_tokens: int) -> None:
    """Two requests in each step: every one's layers run the pairs that its own first layer chose for this chunk."""
    fields = {"block_topk": {"top_k": 2, "force_sink": False}, "vertical_slash": VERTICAL_SLASH}[name]
    config = {"layers": {"0": {"name": name, **fields}, "1": {"reuse": 0, "heads": [1, 1, 3, 0]}}}
    layers = load({"model": {"num_layers": 2, "num_heads": HEADS}, **config}).resolve().layers
    inputs = [[_inputs(1100, seed=seed + 10 * layer) for layer in range(2)] for seed in range(2)]
    for first in range(0, 1100, chunk_tokens):
        chunk, plans, made = Chunk(first, min(first + chunk_tokens, 1100), 1100), SharedPlans(), {}
        for (i, layer), request in product(enumerate(layers), range(2)):
            part = part_of(layer, chunk, CPU, page=16)
            assert part is not None
            q, k, v = inputs[request][i]
            rows = slice(first, part.end)
            out = torch.empty_like(q[rows])
            keys = _paged(k, v, 16).at(part.reads)
            plan = attend_part(part, layer, q[rows], keys, Softmax(0.3), out, plans, request)
            if i == 0:
                made[request] = plan
                continue
            expected = plan_of_heads(made[request], (1, 1, 3, 0))
            assert torch.equal(plan.to_mask(), expected.to_mask())
            dense = Keys(k[: part.end].transpose(0, 1)[None], v[: part.end].transpose(0, 1)[None])
            wanted = attend(q[rows].transpose(0, 1)[None], dense.k, dense.v, expected, scale=0.3)
            assert isinstance(wanted, Tensor)
            torch.testing.assert_close(out, wanted[0].transpose(0, 1), atol=2e-5, rtol=2e-5)


def test_a_layer_reuses_what_the_engine_ran_dense() -> None:
    """Of a prompt too short for the first layer's pattern, which is the engine's there: heads of its own still run."""
    rule = {"name": "block_topk", "top_k": 1, "dense_below_tokens": 600}
    config = {"layers": {"0": rule, "1": {"reuse": 0}}, "heads": {"1": {"0": A_SHAPE}}}
    first, second = load({"model": {"num_layers": 2, "num_heads": HEADS}, **config}).resolve().layers
    chunk = Chunk(0, 500, 500)
    assert part_of(first, chunk, CPU) is None
    part = part_of(second, chunk, CPU)
    assert part is not None
    q, k, v = _inputs(500)
    plan = attend_part(
        part, second, q, _paged(k, v, 16).at(part.reads), Softmax(0.3), torch.empty_like(q), SharedPlans()
    )
    kept = plan.to_mask()[0]
    assert int(kept[1:].sum()) == 3 * 500 * 501 // 2
    assert int(kept[0].sum()) < 500 * 501 // 2
    long = part_of(second, Chunk(0, 700, 700), CPU)
    assert long is not None
    q, k, v = _inputs(700)
    with pytest.raises(SparsekitError, match="layer 1 reuses the plan of layer 0, which made none in this forward"):
        attend_part(long, second, q, _paged(k, v, 16).at(long.reads), Softmax(0.3), torch.empty_like(q), SharedPlans())


@pytest.mark.parametrize("name", ["triangle", "dense heads", "block_topk"])
def test_corrected_chunks_over_pages_are_the_chunks_in_one_piece(name: str) -> None:
    """They need all keys, and run to the prompt's end: dense rows that correct none are in no need of the engine."""
    pattern = {"name": "block_topk", "top_k": 2} if name == "block_topk" else TRIANGLE
    layer = _layer({**pattern, "correct_every": 64}, "dense", of_head=(0, 1, 0, 1) if name == "dense heads" else ())
    if name != "dense heads":
        layer = _layer({**pattern, "correct_every": 64})
    prompt, softmax = 1100, Softmax(0.4, None, torch.tensor([0.0, 1.0, -torch.inf, 3.0]))
    q, k, v = _inputs(prompt)
    keys = _paged(k, v, 16)
    for first, end in ((0, 500), (500, 1100)):
        part = part_of(layer, Chunk(first, end, prompt), CPU, page=16)
        assert part is not None
        assert (part.end, part.reads, part.rules) == (end, ((0, end),), None)
        out = torch.full_like(q[first:end], torch.nan)
        plan = attend_part(part, layer, q[first:end], keys.at(part.reads), softmax, out)
        assert plan.correct_every == 64
        some, geometry = [x[None].transpose(1, 2) for x in (q[first:end], k[:end], v[:end])], part.geometry
        for head, i in enumerate(layer.pattern_of_head):
            alone = sparsekit.attention(
                *some, layer.patterns[i], geometry=geometry, scale=0.4, sink_logits=softmax.sink_logits
            )
            assert isinstance(alone, Tensor)
            torch.testing.assert_close(out[:, head], alone[0, head], atol=2e-5, rtol=2e-5)
    assert dense_tail(layer.patterns, 1 << 16) is None


def test_the_middle_of_a_prompt_reads_sinks_a_window_and_itself() -> None:
    part = part_of(_layer(TRIANGLE), Chunk(8192, 16384, 131072), CPU)
    assert part is not None
    assert part.reads == ((0, 128), (8064, 16384))
    assert (part.end, part.geometry.kv_len) == (16384, 128 + 128 + 8192)
    later = part_of(_layer(TRIANGLE), Chunk(90112, 98304, 131072), CPU)
    assert later is not None
    assert (later.geometry, later.rules) == (part.geometry, part.rules)  # so they share their plan


def test_what_is_not_needed_is_not_read() -> None:
    """Poison between the sinks and the window, and a table that does not know those pages."""
    q, k, v = _inputs(1024)
    whole = _explicit(q, k, v, _layer(TRIANGLE), 5000, Softmax(0.25))
    keys = _paged(k, v, 64)
    assert keys.table is not None
    keys.table[0, 2:10] = 10**6  # an address outside: reading it raises
    part = part_of(_layer(TRIANGLE), Chunk(768, 1024, 5000), CPU)
    assert part is not None
    out = torch.empty_like(q[768:])
    attend_part(part, _layer(TRIANGLE), q[768:], keys.at(part.reads), Softmax(0.25), out)
    torch.testing.assert_close(out, whole[768:], atol=2e-5, rtol=2e-5)


def test_dense_last_rows_are_the_engines() -> None:
    layer = _layer(TRIANGLE)
    part = part_of(layer, Chunk(512, 1000, 1000), CPU)
    assert part is not None
    assert part.end == 1000 - 32
    assert part_of(layer, Chunk(968, 1000, 1000), CPU) is None
    assert part_of(layer, Chunk(1000, 1040, 1000), CPU) is None  # generated, and computed again
    assert part_of(_layer("dense"), Chunk(0, 1000, 1000), CPU) is None


def test_pairs_are_counted_in_closed_form() -> None:
    layer, counted = _layer(TRIANGLE, A_SHAPE, of_head=(0, 1, 1, 0)), 0
    for first in range(0, 1000, 250):
        part = part_of(layer, Chunk(first, first + 250, 1000), CPU)
        assert part is not None
        assert part.pairs is not None
        counted += part.pairs
    i, j = torch.arange(1000)[:, None], torch.arange(1000)[None]
    from sparsekit.call.geometry import Span

    keeps = [x.keep(i, j, Span(0, 1000, 1000, 1000)).sum() for x in layer.patterns]  # type: ignore[attr-defined]
    assert counted == sum(int(keeps[p]) for p in layer.pattern_of_head)


@pytest.mark.parametrize("name", ["block_topk", "vertical_slash", "flexprefill", "xattention", "s2o"])
def test_dynamic_patterns_read_all_keys_so_far(name: str) -> None:
    """A chunk's result is `sparsekit.attention`'s over contiguous keys."""
    import sparsekit
    from sparsekit.kernels import preferred_tile

    layer = _layer({"name": name, "dense_below_tokens": 0})
    q, k, v = _inputs(900)
    chunk = Chunk(500, 900, 2000)
    part = part_of(layer, chunk, CPU)
    assert part is not None
    assert part.reads == ((0, 900),)
    assert part.pairs is None
    out = torch.empty_like(q[500:])
    attend_part(part, layer, q[500:], _paged(k, v, 16).at(part.reads), Softmax(0.25), out)
    contiguous = torch.empty_like(out)
    attend_part(part, layer, q[500:], Keys(k.transpose(0, 1)[None], v.transpose(0, 1)[None]), Softmax(0.25), contiguous)
    assert torch.equal(out, contiguous)
    geometry = sparsekit.Geometry.of(400, 900, prompt_len=2000).with_tile(*preferred_tile(CPU))
    alone = sparsekit.attention(
        *(x.transpose(0, 1)[None] for x in (q[500:], k, v)), layer.patterns[0], geometry=geometry, scale=0.25
    )
    assert isinstance(alone, Tensor)
    torch.testing.assert_close(out, alone[0].transpose(0, 1), atol=1e-6, rtol=1e-6)


def test_a_prompt_below_what_pays_is_the_engines() -> None:
    layer = _layer({"name": "block_topk", "dense_below_tokens": 4000})
    assert part_of(layer, Chunk(0, 500, 3999), CPU) is None
    assert why_dense(layer, Chunk(0, 500, 3999), CPU) == "4000 tokens, from which it pays"
    assert part_of(layer, Chunk(0, 500, 4000), CPU) is not None
    mixed = _layer({"name": "block_topk", "dense_below_tokens": 4000}, TRIANGLE, of_head=(0, 1, 0, 1))
    assert part_of(mixed, Chunk(0, 500, 3999), CPU) is not None


def test_the_tail_of_a_prompt_is_told_from_its_rules() -> None:
    assert dense_tail(_layer(TRIANGLE, A_SHAPE, "dense").patterns, 10**5) == 32
    assert dense_tail(_layer(A_SHAPE).patterns, 10**5) == 0
    assert dense_tail(_layer(TRIANGLE, "block_topk").patterns, 10**5) is None


@pytest.mark.parametrize("rule", [(0, 0.1, 0), (0.01, 64, 0), (8, 64, 0.1)])
def test_the_tail_cannot_be_told_where_the_rule_depends_on_the_prompt(
    rule: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages would be a shorter prompt's, in which the rows kept fewer keys."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))  # other files look at the whole registry

    class Relative(StaticPattern):
        name: str = "relative"

        def keep(self, q_pos: Tensor, k_pos: Tensor, span: Span) -> Tensor:
            raise NotImplementedError

        def rule(self, span: Span) -> TokenRule:
            sink, window, last = (int(x * span.prompt_tokens) if x < 1 else int(x) for x in rule)
            return TokenRule(sink, window, span.prompt_tokens - last)

    assert dense_tail((Relative(), parse_pattern(TRIANGLE)), 10**5) is None


def test_pages_are_read_whole() -> None:
    """What is left out is whole pages too, so that the rest is a shorter table."""
    part = part_of(_layer(TRIANGLE), Chunk(8192, 16384, 131072), CPU, page=256)
    assert part is not None
    assert part.reads == ((0, 256), (7936, 16384))
    assert part.geometry.kv_len == 256 + 256 + 8192
    odd = part_of(_layer(TRIANGLE), Chunk(8192, 16384, 131072), CPU, page=48)
    assert odd is not None
    assert odd.reads == ((0, 384), (8064, 16384))


def test_values_are_copied_only_where_tiles_start_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _inputs(900)
    slashes = {"name": "vertical_slash", "vertical_tokens": 8, "slash_tokens": 4, "dense_below_tokens": 0}
    blocks = {"name": "block_topk", "top_k": 2, "dense_below_tokens": 0}
    tables: list[Tensor | None] = []
    copies: list[int] = []
    gather = keys_module._gathered

    def counted(pages: Tensor, *more: Any) -> Tensor:
        copies.append(len(tables))
        return gather(pages, *more)

    monkeypatch.setattr(keys_module, "_gathered", counted)
    monkeypatch.setattr("sparsekit.serve.prompts.attend", lambda *_, table, **__: tables.append(table))
    for pattern in (TRIANGLE, blocks, slashes):
        layer = _layer(pattern)
        part = part_of(layer, Chunk(500, 900, 2000), CPU, page=16)
        assert part is not None
        keys = _paged(k, v, 16).at(part.reads)
        attend_part(part, layer, q[500:], keys, Softmax(0.25), torch.empty_like(q[500:]))
    assert [table is not None for table in tables] == [True, True, False]
    assert copies == [1, 2, 2]  # none; keys; keys and values, each once


def test_queries_are_checked() -> None:
    part = part_of(_layer(A_SHAPE), Chunk(0, 10, 10), CPU)
    assert part is not None
    keys = Keys(*(torch.zeros(1, 2, 10, 16),) * 2)
    with pytest.raises(SparsekitError, match="10 queries are due"):
        attend_part(part, _layer(A_SHAPE), torch.zeros(9, 4, 16), keys, Softmax(1.0), torch.zeros(9, 4, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joint", [True, False])
def test_pages_of_e4m3_are_read_as_their_numbers(joint: bool, dtype: torch.dtype) -> None:
    """Times their scales, in one piece, and nothing of what stands behind the last key."""
    small = [x.to(torch.float8_e4m3fn) for x in _inputs(100)[1:]]
    wide = _paged(*(x.float() for x in small), 16, joint=joint)
    pages = [x.to(torch.float8_e4m3fn) for x in (wide.k, wide.v)]
    for stored in (torch.uint8, torch.float8_e4m3fn):
        keys = Keys(*(x.view(stored) for x in pages), wide.table)
        read = read_e4m3(keys, sparsekit.Geometry.of(90), (0.3, 2.0), dtype)
        assert read.table is None
        for got, x, scale in zip((read.k, read.v), small, (0.3, 2.0), strict=True):
            assert got.shape == (1, KEY_HEADS, 90, DIM)
            torch.testing.assert_close(got[0], (x[:90].float() * scale).to(dtype).transpose(0, 1), rtol=0, atol=0)
