"""Which query-key pairs are computed: the plan, and how it is made."""

from __future__ import annotations

from sparsekit.plan.bounds import (
    anchor_positions,
    causal_tiles,
    key_bounds,
    row_bounds,
    segment_bounds,
    span_numbers,
    upload,
)
from sparsekit.plan.build import dense_plan, plan_from_block_mask, plan_from_rule
from sparsekit.plan.entries import CAUSAL, FLAG_BITS, FLAGS, RULE, pack, unpack
from sparsekit.plan.mask import out_of_range
from sparsekit.plan.plan import BlockPlan, heaviest_first
from sparsekit.plan.rows import Ranked
from sparsekit.plan.rule import TokenRule
from sparsekit.plan.stack import stack_heads
from sparsekit.plan.totals import PlanTotals

__all__ = [
    "CAUSAL",
    "FLAGS",
    "FLAG_BITS",
    "RULE",
    "BlockPlan",
    "PlanTotals",
    "Ranked",
    "TokenRule",
    "anchor_positions",
    "causal_tiles",
    "dense_plan",
    "heaviest_first",
    "key_bounds",
    "out_of_range",
    "pack",
    "plan_from_block_mask",
    "plan_from_rule",
    "row_bounds",
    "segment_bounds",
    "span_numbers",
    "stack_heads",
    "unpack",
    "upload",
]
