"""A plan's heads given to other heads: head h does what head `heads[h]` did.

A torch path for the CPU, which is the definition, and a Triton path for CUDA (`heads_triton.py`), which does not wait
for the device. Both give the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.errors import SparsekitError
from sparsekit.kernels.choose import runs_triton
from sparsekit.plan import BlockPlan, upload

__all__ = ["plan_of_heads"]


def plan_of_heads(plan: BlockPlan, heads: Sequence[int], *, impl: str | None = None) -> BlockPlan:
    """The plan in which query head h does what query head `heads[h]` does in `plan`.

    The plan itself where that is the same: its heads are all alike, or each keeps its own. The launch order is that of
    `plan`. Cost: a copy of the rows' lists.

    Args:
        plan: of as many query heads as `heads` has; 1 plan head, or a number that divides them.
        impl: "torch" or "triton"; None: what the device runs.

    Raises:
        SparsekitError: plan heads that do not divide the query heads.
    """
    count = len(heads)
    if count % plan.heads:
        raise SparsekitError(f"a plan of {plan.heads} heads: want 1, or a number that divides {count} query heads.")
    group = count // plan.heads
    if plan.heads == 1 or all(here // group == there // group for here, there in enumerate(heads)):
        return plan
    taken = tuple(head // group for head in heads)
    if plan.ranked is not None:
        number = _numbers(taken, plan.ranked.q_index.device)
        ranked = replace(
            plan.ranked,
            q_index=plan.ranked.q_index.index_select(1, number),
            keys=plan.ranked.keys.index_select(1, number),
        )
        return replace(plan, heads=count, ranked=ranked)
    if plan.row_ptr is None or plan.entries is None:
        return replace(plan, heads=count)
    number = _numbers(taken, plan.row_ptr.device)
    starts = plan.row_ptr[:-1].view(plan.samples, plan.heads, plan.rows)
    counts = plan.row_ptr.diff().view(starts.shape)[:, number]
    row_ptr = torch.nn.functional.pad(counts.flatten().cumsum(0, dtype=plan.row_ptr.dtype), (1, 0))
    if runs_triton(plan.row_ptr.device, impl) and plan.rows:
        from sparsekit.kernels.select.heads_triton import copy_lists_triton

        entries = copy_lists_triton(plan, number, row_ptr, _room(plan, taken))
    else:
        begins = starts[:, number].flatten().long()
        place = torch.repeat_interleave(begins - row_ptr[:-1].long(), counts.flatten().long())
        entries = plan.entries[place + torch.arange(len(place), device=place.device)]
    return replace(
        plan,
        heads=count,
        row_ptr=row_ptr,
        entries=entries,
        rule=_of_heads(plan.rule, number),
        dense_rows=_of_rows(plan, plan.dense_rows, number),
        tokens=_of_heads(plan.tokens, number),
        token_bits=_of_rows(plan, plan.token_bits, number),
    )


def _room(plan: BlockPlan, taken: Sequence[int]) -> int:
    """Entries that the lists of these heads have at most, as the host knows it."""
    assert plan.entries is not None
    most = max(map(taken.count, set(taken)))
    tiles = sum(-(-span.q_end // plan.block_kv) + 1 for span in plan.spans())  # disjoint tiles that start on a key
    return min(plan.entries.numel() * most, tiles * plan.rows * len(taken))


def _of_heads(values: Tensor | None, number: Tensor) -> Tensor | None:
    """values: (S, P, n); of one head for all, themselves."""
    return values if values is None or values.shape[1] == 1 else values.index_select(1, number)


def _of_rows(plan: BlockPlan, values: Tensor | None, number: Tensor) -> Tensor | None:
    """values: (S*P*R, ...)."""
    if values is None:
        return None
    rows = values.view(plan.samples, plan.heads, plan.rows, *values.shape[1:])
    return rows.index_select(1, number).flatten(0, 2)


@per_geometry
def _numbers(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 (H,) there; uploaded once, without a wait."""
    return upload(torch.tensor(heads, dtype=torch.int64, device="cpu"), device)
