"""FlexPrefill's choice of key blocks: how many blocks of columns and of diagonals a head needs, and its block map.

Masses are compared by codes, their floats cut to 8 significant bits. A histogram of 4096 codes then says exactly, in
integers, which ones make up a share of the mass: no sort, no order of addition, the same answer on every path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.choose import runs_triton
from sparsekit.kernels.select.bits import pack_bits, unpack_bits
from sparsekit.kernels.select.block_scores import pooled_means, pooled_scores, row_groups
from sparsekit.kernels.select.grid import BLOCK, CODES, LOWEST, BlockGrid, Budgets, block_grid
from sparsekit.kernels.select.topk import topk_bits
from sparsekit.plan import upload

__all__ = ["fewest_tokens", "flex_bits", "js_distance", "mass_codes", "mass_threshold"]


def mass_codes(mass: Tensor) -> Tensor:
    """int32 in 0..4095, in the order of the masses: float32 cut to 8 significant bits. Code 0: below 2^-24, and NaN."""
    bits = torch.where(mass > 0, mass, 0.0).view(torch.int32)
    return ((bits >> 16) - LOWEST).clamp(0, CODES - 1)


@per_geometry
def _values(device: torch.device) -> Tensor:
    """int64 (4096,): the mass that each code stands for, in units of 2^-31."""
    code = torch.arange(CODES, device=device)
    return ((128 + (code & 127)) << (code >> 7)) * (code > 0)


def mass_threshold(counts: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """The largest code such that the masses with it or a larger one reach `gamma` of all, and how many that takes.

    Args:
        counts: integers (..., 4096): masses of each code.

    Returns:
        int64 (...,) code, 4096 where there is no mass; int64 (...,) the fewest masses that reach it, of equals as many
        as are needed.
    """
    counts, value = counts.long(), _values(counts.device)
    mass = counts * value
    reach = mass.flip(-1).cumsum(-1).flip(-1)
    required = reach[..., :1].double() * gamma
    code = (
        ((reach.double() >= required) & (required > 0)).long().mul(torch.arange(CODES, device=counts.device)).amax(-1)
    )
    code = torch.where(required[..., 0] > 0, code, CODES)
    at = code.clamp(max=CODES - 1)[..., None]
    above = reach.gather(-1, at) - mass.gather(-1, at)
    more = counts.flip(-1).cumsum(-1).flip(-1).gather(-1, at) - counts.gather(-1, at)
    equal = torch.ceil((required - above) / value[at].clamp(min=1)).long()
    return code, torch.where(required > 0, more + equal, 0)[..., 0]


def fewest_tokens(mass: Tensor, gamma: float) -> Tensor:
    """int32 (...,): the fewest of the masses (..., N), largest first, that reach `gamma` of their sum."""
    codes = mass_codes(mass).long().flatten(0, -2)
    counts = torch.zeros(codes.shape[0], CODES, dtype=torch.int64, device=mass.device)
    counts.scatter_add_(1, codes, torch.ones_like(codes))
    return mass_threshold(counts, gamma)[1].to(torch.int32).view(mass.shape[:-1])


def js_distance(p: Tensor, q: Tensor) -> Tensor:
    """float (...,): root of the Jensen-Shannon divergence, natural logarithm, of distributions (..., C). 0 log 0 is 0.

    0 for equal ones, sqrt(log 2) for disjoint ones.
    """
    mean = (p + q) / 2
    both = [torch.where(x > 0, x * torch.log(x / mean), x * 0) for x in (p, q)]
    return ((both[0] + both[1]).sum(-1) / 2).clamp(min=0).sqrt()


def flex_bits(
    q: Tensor,
    k: Tensor,
    sums: Tensor,
    geometry: Geometry,
    softmax: Softmax,
    queries: int,
    budgets: Budgets,
    *,
    impl: str | None = None,
) -> Tensor:
    """Which key blocks of 128 tokens each block of queries keeps, for `blocks.plan_from_block_bits`.

    Args:
        q: (B, H, Q, D). k: (B, G, K, D).
        sums: float32 (2, B, H, N): `last_query_sums` of the last `queries` queries.

    Returns:
        int32 (B, H, Rb, W).
    """
    triton = runs_triton(q.device, impl)
    grid = block_grid(geometry, BLOCK, geometry.batch, q.device)
    means = pooled_means(q, k, geometry, grid, BLOCK, impl=impl)
    counts = torch.zeros(3, *q.shape[:2], CODES, dtype=torch.int32, device=q.device)  # of columns, distances, the map
    if triton:
        from sparsekit.kernels.select.flexprefill_triton import choose_triton

        mass, wanted, aware = choose_triton(q, sums, means[1], geometry, grid, softmax, queries, budgets, counts)
    else:
        mass, wanted, aware = _choose(q, sums, means[1], geometry, grid, softmax, queries, budgets)
    blocks = _sample_blocks(geometry, q.shape[1], q.device)
    lines = topk_bits(mass, wanted, lengths=blocks, force_first=True, impl=impl)
    groups = list(row_groups(grid.rows, mass[0].numel() * 4))
    scores: list[Tensor] = []  # of the only group; several are scored twice, for all of them at once fit no memory

    def scored(first: int, rows: int) -> Tensor:
        if scores:
            return scores[0]
        return pooled_scores(*means, grid, BLOCK, first, rows, exact=q.dtype == torch.float32, impl=impl)

    threshold = None
    if budgets.tau > 0:
        for first, rows in groups:
            part = scored(first, rows)
            if len(groups) == 1:
                scores.append(part)
            _count_map(part, aware, grid, softmax, first, counts[2], triton)
        threshold = _map_threshold(counts[2], aware, budgets.gamma, triton)
    parts = []
    for first, rows in groups:
        found = None if threshold is None else scored(first, rows)
        parts.append(_write_bits(found, threshold, lines, grid, softmax, first, rows, triton))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


@per_geometry
def _sample_blocks(geometry: Geometry, heads: int, device: torch.device) -> Tensor:
    """int32 (2, B, heads): key blocks of each sample."""
    each = torch.tensor([-(-span.q_end // BLOCK) for span in geometry.spans], dtype=torch.int32, device="cpu")
    each = each[:, None].expand(2, -1, heads).contiguous()
    return upload(each, device)


def _choose(
    q: Tensor,
    sums: Tensor,
    k_means: Tensor,
    geometry: Geometry,
    grid: BlockGrid,
    softmax: Softmax,
    queries: int,
    budgets: Budgets,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mass of each block of columns and of distances (2, B, H, C), how many blocks to keep (2, B, H), query-aware?"""
    spare = grid.columns * BLOCK - sums.shape[-1]
    mass = torch.nn.functional.pad(sums, (0, spare)).unflatten(-1, (grid.columns, BLOCK)).sum(-1)
    wanted = fewest_tokens(sums, budgets.gamma) // BLOCK + 1
    wanted = wanted.clamp(min=budgets.min_blocks).clamp(max=budgets.max_blocks)
    group = q.shape[1] // k_means.shape[1]
    distances = []
    for b, span in enumerate(geometry.spans):
        n, blocks = min(queries, span.q_end - span.q_first), -(-span.q_end // BLOCK)
        at = geometry.q_index(b, span.q_end - n)
        mean = q[b, :, at : at + n].float().sum(1) / max(n, 1)
        logits = softmax.logits((mean.unflatten(0, (-1, group)) @ k_means[b, :, :blocks].mT).flatten(0, 1))
        seen = mass[0, b, :, :blocks]
        distances.append(js_distance(logits.softmax(-1), seen / seen.sum(-1, keepdim=True)))
    aware = torch.stack(distances) < budgets.tau
    return mass, torch.where(aware, budgets.min_blocks, wanted), aware


def _map_codes(scores: Tensor, lengths: Tensor, softmax: Softmax) -> Tensor:
    """Codes of the softmax of each row of the block map; 0 ahead of the row."""
    ahead = torch.arange(scores.shape[-1], device=scores.device) >= lengths[..., None]
    return mass_codes(softmax.logits(scores).masked_fill(ahead, -torch.inf).softmax(-1))


def _count_map(
    scores: Tensor, aware: Tensor, grid: BlockGrid, softmax: Softmax, first: int, counts: Tensor, triton: bool
) -> None:
    """Adds the codes of some rows of the block map, of query-aware heads, to counts (B, H, 4096)."""
    if triton:
        from sparsekit.kernels.select.flexprefill_triton import count_map_triton

        return count_map_triton(scores, aware, grid, softmax, first, counts)
    codes = _map_codes(scores, grid.lengths[:, :, first : first + scores.shape[2]], softmax).long().flatten(2)
    counts.scatter_add_(2, codes, aware[..., None].expand_as(codes).to(torch.int32).contiguous())
    return None


def _map_threshold(counts: Tensor, aware: Tensor, gamma: float, triton: bool) -> Tensor:
    """int32 (B, H): the code from which on a head's map is kept; 4096 where it has none."""
    if triton:
        from sparsekit.kernels.select.flexprefill_triton import map_threshold_triton

        return map_threshold_triton(counts, gamma)
    return torch.where(aware, mass_threshold(counts, gamma)[0], CODES).to(torch.int32)


def _write_bits(
    scores: Tensor | None,
    threshold: Tensor | None,
    lines: Tensor,
    grid: BlockGrid,
    softmax: Softmax,
    first: int,
    rows: int,
    triton: bool,
) -> Tensor:
    """int32 (B, H, rows, W): block columns, block diagonals and the map's blocks from the threshold on."""
    if triton:
        from sparsekit.kernels.select.flexprefill_triton import write_bits_triton

        return write_bits_triton(scores, threshold, lines, grid, softmax, first, rows)
    lengths = grid.lengths[:, :, first : first + rows]
    vertical, slash = unpack_bits(lines, grid.columns)[:, :, :, None]
    column = torch.arange(grid.columns, device=lines.device)
    back = (lengths[..., None] - 1 - column).long()  # (B, 1, rows, C): block of distances
    at = back.clamp(min=0).expand(-1, lines.shape[2], -1, -1)
    keep = vertical | slash.expand(-1, -1, rows, -1).gather(-1, at)
    if scores is not None and threshold is not None:
        keep = keep | (_map_codes(scores, lengths, softmax) >= threshold[..., None, None])
    return pack_bits(keep & (back >= 0))
