"""A plan's totals, to be read after the plan itself is gone."""

from __future__ import annotations

from sparsekit.kernels.choose import runs_triton
from sparsekit.plan import BlockPlan, PlanTotals
from sparsekit.plan.memo import SUMS

__all__ = ["plan_totals"]


def plan_totals(plan: BlockPlan, *, impl: str | None = None) -> PlanTotals:
    """`plan.totals()`; on CUDA by one kernel, where the plan's own torch ops would take a thousand launches at 128K.

    Args:
        impl: "torch" or "triton"; None: what the device runs.
    """
    if plan.row_ptr is not None and plan.rows and runs_triton(plan.row_ptr.device, impl):
        from sparsekit.kernels.select.totals_triton import sums_triton

        plan.memo[SUMS] = sums_triton(plan)
    return plan.totals()
