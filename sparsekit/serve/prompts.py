"""A prompt's chunk under a layer's patterns: what of it runs here, which keys that needs, and running it.

Engines hand a prompt over in chunks, whose keys so far lie in pages. Two things follow from a token rule (sinks, a
window, dense last rows) and make a chunk cheap:

- **Dense rows are the engine's.** From the first row that keeps every key on, nothing is sparse, and the engine's own
  kernel reads pages where they are. So are the rows behind the prompt, which an engine computes again after preemption.
- **Keys that no row keeps are not read.** The rows before keep sinks, and a window behind the chunk's first query. What
  lies between is left out, and the others move together: of a query and a key that is kept by its window, the distance
  stays; sinks stay below `sink`; and since the gap is only made smaller by whole tiles and pages, a plan for a chunk
  in the middle of a prompt serves all of its size.

Patterns without a rule, or whose rows are corrected, or whose heads differ in their dense rows, need all keys so far.
Keys in pages are read where they are, but for two copies: dynamic patterns estimate from keys in one piece; and where
their plan's tiles start anywhere, which no form of the kernel reads at full speed in pages, the values are copied
beside them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import Geometry, Span
from sparsekit.call.keys import Keys, Ranges
from sparsekit.call.softmax import Softmax
from sparsekit.config import LayerPatterns
from sparsekit.errors import SparsekitError
from sparsekit.kernels import attend, preferred_tile
from sparsekit.patterns import DynamicPattern, Pattern, StaticPattern
from sparsekit.patterns.base import rule_of
from sparsekit.patterns.shared import SharedPlans
from sparsekit.plan import BlockPlan, TokenRule, dense_plan, plan_from_rule, stack_heads

__all__ = ["Chunk", "Part", "attend_part", "dense_tail", "part_of", "read_e4m3", "why_dense"]

GRID = 128  # what is left out is whole tiles of the largest form, and whole pages
NEVER = 1 << 30  # a dense row that no prompt has


class Chunk(NamedTuple):
    """A prompt, or a chunk of one, in positions: queries `[first, end)`, whose keys so far are `[0, end)`.

    The prompt ends at `prompt`: behind `end` for a chunk that is not the last one.
    """

    first: int
    end: int
    prompt: int


@dataclass(frozen=True)
class Part:
    """What sparsekit runs of a chunk in one layer: the queries `[chunk.first, end)`.

    Attributes:
        end: one past the last query here; the others are the engine's.
        reads: the positions whose keys and values are needed: whole pages.
        geometry: of these queries over these keys.
        rules: one a pattern, in positions of what is read; None: the patterns plan by themselves.
        pairs: query-key pairs kept by all heads together, or None where that follows from q and k.
    """

    end: int
    reads: Ranges
    geometry: Geometry
    rules: tuple[TokenRule, ...] | None
    pairs: int | None


def why_dense(patterns: LayerPatterns, chunk: Chunk, device: torch.device) -> str:
    """Why all of a prompt is dense in a layer that is not, or nothing: no head's pattern pays at its length."""
    least = [x.dense_below(device) if isinstance(x, DynamicPattern) else -1 for x in patterns.patterns]
    below = [x.name == "dense" or chunk.prompt < n for x, n in zip(patterns.patterns, least, strict=True)]
    return f"{max(least)} tokens, from which it pays" if all(below) and max(least) > 0 else ""


def dense_tail(patterns: Sequence[Pattern], tokens: int) -> int | None:
    """Last rows of a prompt of `tokens` that some pattern makes dense; None where that cannot be said of one.

    The rows before them compute the same whatever the prompt's length: of a pattern whose sinks, window or number of
    last rows is another one in a prompt of half as many, it cannot be said.
    """
    tails = []
    for pattern in patterns:
        if pattern.name != "dense":
            rules = [(n, _rules([pattern], Span(0, n, n, n))) for n in (tokens, tokens // 2)]
            said = {(r.sink, r.window, n - min(r.dense_from, n)) for n, found in rules for r in found or ()}
            tails.append(said.pop()[2] if len(said) == 1 else None)
    exact = [tail for tail in tails if tail is not None]
    return max(exact, default=0) if len(exact) == len(tails) else None


def part_of(
    patterns: LayerPatterns, chunk: Chunk, device: torch.device, *, page: int = 1, dense_here: bool = False
) -> Part | None:
    """What sparsekit runs of a chunk, or None: all of it is the engine's dense attention.

    Args:
        page: tokens of the pages that keys lie in.
        dense_here: a layer whose heads are all dense runs here too.
    """
    end = min(chunk.end, chunk.prompt)
    if end <= chunk.first or why_dense(patterns, chunk, device):
        return None
    tile, span = preferred_tile(device), Span(chunk.first, end, end, chunk.prompt)
    rules = _rules(patterns.patterns, span)
    if rules is None:
        geometry = Geometry.of(end - chunk.first, end, prompt_len=chunk.prompt).with_tile(*tile)
        return Part(end, ((0, end),), geometry, None, None)
    if not (patterns.dense and dense_here):
        end = min(end, max(rule.dense_from for rule in rules))
        if end <= chunk.first:
            return None
    span = span._replace(q_end=end, keys=end)
    pairs = sum(rules[i].pairs(span) for i in patterns.pattern_of_head)
    reads, left_out = _needed(rules, span, page)
    if min(rule.dense_from for rule in rules) >= end:
        rules = tuple(rule._replace(dense_from=NEVER) for rule in rules)
    geometry = Geometry.of(end - chunk.first, end - left_out).with_tile(*tile)
    return Part(end, reads, geometry, rules, pairs)


def _rules(patterns: Sequence[Pattern], span: Span) -> tuple[TokenRule, ...] | None:
    """Each pattern's token rule for the span, or None where one has none, or is corrected by dense rows."""
    if any(pattern.correct_every for pattern in patterns):
        return None
    rules = [rule_of(x, span) if isinstance(x, StaticPattern) else None for x in patterns]
    exact = [rule.checked(span) for rule in rules if rule is not None]
    return tuple(exact) if len(exact) == len(rules) else None


def _needed(rules: Sequence[TokenRule], span: Span, page: int) -> tuple[Ranges, int]:
    """The positions that the queries keep by the rules, in whole tiles and pages; how many before them are left out."""
    if min(rule.dense_from for rule in rules) < span.q_end:
        return ((0, span.q_end),), 0
    grid = lcm(GRID, page)
    head = -(-max(rule.sink for rule in rules) // grid) * grid
    tail = max(span.q_first - max(rule.window for rule in rules) + 1, 0) // grid * grid
    if tail <= head:
        return ((0, span.q_end),), 0
    return (((0, head), (tail, span.q_end)) if head else ((tail, span.q_end),)), tail - head


def read_e4m3(keys: Keys, geometry: Geometry, scales: tuple[float, float], dtype: torch.dtype) -> Keys:
    """A request's keys and values in `dtype`, of pages that hold e4m3 numbers: as `Keys.gathered` has them.

    Args:
        keys: of one request, in pages of float8_e4m3fn, or of bytes that are such numbers.
        scales: what a number of the keys, and one of the values, is a multiple of.
    """
    small = keys._replace(k=keys.k.view(torch.uint8), v=keys.v.view(torch.uint8))

    def wide(found: Tensor, scale: float) -> Tensor:
        return found.view(torch.float8_e4m3fn).to(dtype).mul_(scale)

    return Keys(wide(small.gathered_k(geometry), scales[0]), wide(small.gathered_v(geometry), scales[1]))


def attend_part(
    part: Part,
    patterns: LayerPatterns,
    q: Tensor,
    keys: Keys,
    softmax: Softmax,
    out: Tensor,
    plans: SharedPlans | None = None,
    request: Hashable = None,
) -> BlockPlan:
    """Run a part: the attention of q (n, H, D) into `out` (n, H, D). The host does not wait.

    Args:
        keys: of one request, those that the part reads: `keys.at(part.reads)`.
        plans: those that layers share in this step; None: none of this request's does.
        request: tells the request from others of the step.

    Returns:
        The plan that ran.

    Raises:
        SparsekitError: what does not fit together.
    """
    if q.shape[0] != part.geometry.q_len or out.shape != q.shape:
        raise SparsekitError(f"q {tuple(q.shape)}, out {tuple(out.shape)}: {part.geometry.q_len} queries are due.")
    q = q.transpose(0, 1)[None]
    if part.rules is not None:
        plan = _plan(part.rules, patterns.pattern_of_head, part.geometry, q.device)
    else:
        plans = SharedPlans() if plans is None else plans
        reused = patterns.reused
        estimates = patterns.estimates
        k = keys.gathered_k(part.geometry) if estimates else keys.k
        if reused is not None and not plans.has((request, reused.layer)) and _dense_there(patterns, part, q.device):
            plans.keep((request, reused.layer), dense_plan(part.geometry))
        plan = patterns.plan(q, k, part.geometry, softmax, plans, request)
        if plan.row_ptr is not None and not plan.on_grid:
            keys = Keys(k if estimates else keys.gathered_k(part.geometry), keys.gathered_v(part.geometry))
    attend(
        q, keys.k, keys.v, plan, table=keys.table, scale=softmax.scale, softcap=softmax.softcap,
        sink_logits=softmax.sink_logits, out=out.transpose(0, 1)[None],
    )  # fmt: skip
    return plan


def _dense_there(patterns: LayerPatterns, part: Part, device: torch.device) -> bool:
    """Whether the layer whose plan is reused is the engine's at this length: then it made none, and would be dense."""
    assert patterns.reused is not None
    taken = {i for i, there in zip(patterns.pattern_of_head, patterns.reused.heads, strict=True) if there is not None}
    least = [
        x.dense_below(device) if isinstance(x, DynamicPattern) else 0 for x in map(patterns.patterns.__getitem__, taken)
    ]
    return max(part.geometry.prompt_tokens) < max(least)


@per_geometry
def _plan(
    rules: tuple[TokenRule, ...], pattern_of_head: tuple[int, ...], geometry: Geometry, device: torch.device
) -> BlockPlan:
    plans = [plan_from_rule(rule, geometry, device) for rule in rules]
    return plans[0] if len(plans) == 1 else stack_heads(plans, pattern_of_head)
