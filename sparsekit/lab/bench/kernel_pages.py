"""A chunk of a prompt over keys in pages: read where they are, beside copied together first and read in one piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.config import LayerPatterns
from sparsekit.errors import SparsekitError
from sparsekit.kernels import attend, preferred_tile
from sparsekit.lab.bench.kernel_cases import SINK, WINDOW, Shape
from sparsekit.lab.bench.timing import rounds, spread
from sparsekit.patterns import Triangle
from sparsekit.plan import BlockPlan, dense_plan, plan_from_rule
from sparsekit.serve.prompts import Chunk, part_of

__all__ = ["pages_rows"]

CHUNK = 8192  # queries, the last of the keys, in the middle of a prompt
PAGES = (16, 256)
ALIKE = 2e-3  # of two ways to read the same keys: bfloat16 rounds at 2^-9


def pages_rows(shape: Shape, impls: Sequence[str], repeat_ms: int, device: str = "cuda") -> Iterator[dict[str, Any]]:
    """Rows of `case` pages: times of dense and Triangle, by implementation, tokens of a page, and how keys are read.

    `reads` is "pages"; "gathered": the keys that the chunk needs are copied together in each call; or "together": they
    lie in one piece already.

    Raises:
        SparsekitError: what is read in pages gives another result.
    """
    chunk = min(CHUNK, shape.tokens)
    g = torch.Generator(device).manual_seed(0)
    q = torch.randn(1, chunk, shape.heads, shape.dim, device=device, dtype=shape.dtype, generator=g).transpose(1, 2)
    for page in PAGES:
        everything = _cache(shape, page, g)
        for pattern in ("triangle", "dense"):
            for impl in impls:
                keys, plan = _call(pattern, shape, chunk, everything, impl)
                calls = _calls(q, keys, plan, impl)
                there, gathered = calls["pages"](), calls["gathered"]()
                error = float((there.float() - gathered.float()).norm() / gathered.float().norm())
                if not error <= ALIKE:
                    raise SparsekitError(f"impl={impl!r}, {pattern} over pages of {page}: {error:.1e} off.")
                for reads, all_ms in zip(calls, rounds(list(calls.values()), q.device, repeat_ms), strict=True):
                    yield {
                        "case": "pages", "impl": impl, "pattern": pattern, "page": page, "reads": reads,
                        "tokens": shape.tokens, "chunk": chunk, "heads": shape.heads, "key_heads": shape.key_heads,
                        "dim": shape.dim, "dtype": str(shape.dtype).removeprefix("torch."), **spread(all_ms),
                        "repeats": len(all_ms), "error": error,
                    }  # fmt: skip


def _cache(shape: Shape, page: int, g: torch.Generator) -> Keys:
    """Keys and values in shuffled pages, tokens before heads, a token's key beside its value."""
    count = -(-shape.tokens // page)
    cache = torch.randn(
        count, page, shape.key_heads, 2 * shape.dim, device=g.device, dtype=shape.dtype, generator=g
    ).transpose(1, 2)
    table = torch.randperm(count, device=g.device, generator=g).int()[None]
    k, v = cache.split(shape.dim, -1)
    return Keys(k, v, table)


def _call(pattern: str, shape: Shape, chunk: int, keys: Keys, impl: str) -> tuple[Keys, BlockPlan]:
    """What of the keys a chunk needs, and its plan, as a serving engine's chunk has them."""
    device = keys.k.device
    tile = preferred_tile(device, impl)
    if pattern == "dense":
        return keys, dense_plan(Geometry.of(chunk, shape.tokens).with_tile(*tile))
    triangle = LayerPatterns(0, (Triangle(sink_tokens=SINK, window_tokens=WINDOW),), (0,) * shape.heads)
    where = Chunk(shape.tokens - chunk, shape.tokens, 2 * shape.tokens)
    part = part_of(triangle, where, device, page=keys.page)
    assert part is not None and part.rules is not None
    return keys.at(part.reads), plan_from_rule(part.rules[0], part.geometry.with_tile(*tile), device)


def _calls(q: Tensor, keys: Keys, plan: BlockPlan, impl: str) -> dict[str, Callable[[], Tensor]]:
    together = keys.gathered(plan.geometry)

    def run(keys: Keys) -> Tensor:
        out = attend(q, keys.k, keys.v, plan, table=keys.table, impl=impl)
        assert isinstance(out, Tensor)
        return out

    def gather_and_run() -> Tensor:
        return run(keys.gathered(plan.geometry))

    return {"pages": partial(run, keys), "gathered": gather_and_run, "together": partial(run, together)}
