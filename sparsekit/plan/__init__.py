"""Which query-key pairs are computed: the plan, and how it is made."""

from __future__ import annotations

from sparsekit.plan.build import dense_plan, plan_from_block_mask, plan_from_rule
from sparsekit.plan.plan import (
    CAUSAL,
    FLAG_BITS,
    RULE,
    BlockPlan,
    PlanTotals,
    Ranked,
    TokenRule,
    heaviest_first,
    row_bounds,
    segment_bounds,
    upload,
)
from sparsekit.plan.stack import stack_heads

__all__ = [
    "CAUSAL",
    "FLAG_BITS",
    "RULE",
    "BlockPlan",
    "PlanTotals",
    "Ranked",
    "TokenRule",
    "dense_plan",
    "heaviest_first",
    "plan_from_block_mask",
    "plan_from_rule",
    "row_bounds",
    "segment_bounds",
    "stack_heads",
    "upload",
]
