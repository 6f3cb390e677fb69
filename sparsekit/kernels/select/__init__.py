"""Selection, q and k -> plan. Each `x_triton.py` does what `x.py` says in torch. Here: what patterns are made of."""

from __future__ import annotations

from sparsekit.kernels.select.bits import join_rows
from sparsekit.kernels.select.block_scores import antidiagonal_mass, pooled_means, pooled_scores, row_groups
from sparsekit.kernels.select.blocks import plan_from_block_bits
from sparsekit.kernels.select.grid import BlockGrid, block_grid, head_lengths
from sparsekit.kernels.select.heads import plan_of_heads
from sparsekit.kernels.select.last_queries import MAX_QUERIES, last_query_sums
from sparsekit.kernels.select.mean_keys import near_top_bits, query_block_lse
from sparsekit.kernels.select.slash import plan_from_vertical_slash
from sparsekit.kernels.select.topk import top_p_bits, topk_bits, topk_indices_mask

__all__ = [
    "MAX_QUERIES",
    "BlockGrid",
    "antidiagonal_mass",
    "block_grid",
    "head_lengths",
    "join_rows",
    "last_query_sums",
    "near_top_bits",
    "plan_from_block_bits",
    "plan_from_vertical_slash",
    "plan_of_heads",
    "pooled_means",
    "pooled_scores",
    "query_block_lse",
    "row_groups",
    "top_p_bits",
    "topk_bits",
    "topk_indices_mask",
]
