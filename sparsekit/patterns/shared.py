"""Plans that later layers of the same forward run too, in place of choosing for themselves."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError
from sparsekit.kernels.select import plan_of_heads
from sparsekit.patterns.base import Pattern, checked_plan
from sparsekit.plan import BlockPlan, stack_heads

__all__ = ["SharedPlans", "reused_plan"]

Heads = tuple[int, ...]


class SharedPlans:
    """The shared plans of one forward: whoever has the forward's own state holds this there, and it goes with that.

    A plan's key says what made it. Made again, it takes the place of the old one. What it became on another device, or
    for other heads, is made once for all layers that want the same.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, BlockPlan] = {}
        self._moved: dict[Hashable, dict[tuple[Heads | None, torch.device], BlockPlan]] = {}

    def __len__(self) -> int:
        return len(self._made)

    def keep(self, key: Hashable, plan: BlockPlan) -> None:
        self._made[key], self._moved[key] = plan, {}

    def has(self, key: Hashable) -> bool:
        return key in self._made

    def find(self, key: Hashable, heads: Heads, device: torch.device) -> BlockPlan | None:
        """The plan in which head h does what head `heads[h]` did, on that device; None: none was made."""
        made = self._made.get(key)
        if made is None:
            return None
        moved = self._moved[key]
        if (heads, device) not in moved:
            if (None, device) not in moved:
                here = all(tensor.device == device for tensor in made.tensors.values())
                moved[None, device] = made if here else made.to(device)
            moved[heads, device] = plan_of_heads(moved[None, device], heads)
        return moved[heads, device]

    def drop(self, key: Hashable) -> None:
        self._made.pop(key, None)
        self._moved.pop(key, None)

    def clear(self) -> None:
        self._made.clear()
        self._moved.clear()


def reused_plan(
    plan: BlockPlan,
    of_head: Sequence[int | None],
    patterns: Sequence[Pattern],
    pattern_of_head: Sequence[int],
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    softmax: Softmax,
) -> BlockPlan:
    """The plan of a layer whose heads run those of `plan`, but where `of_head` is None: there their own patterns.

    Args:
        plan: what `SharedPlans.find` gave: head h already does what it is to do.
        patterns, pattern_of_head, q, k, geometry, softmax: as for `plan_heads`.

    Raises:
        SparsekitError: the plan is of another call.
    """
    if plan.geometry.with_tile(geometry.block_q, geometry.block_kv) != geometry:
        raise SparsekitError(
            f"a plan of {plan.geometry.q_len} queries over {plan.geometry.kv_len} keys cannot be reused for "
            f"{geometry.q_len} over {geometry.kv_len}, or with other padding or another end of the prompt."
        )
    own = sorted({i for i, there in zip(pattern_of_head, of_head, strict=True) if there is None})
    if not own:
        return plan if plan.ranked is None else replace(plan)  # a ranked one notes what its own execution visits
    tiled = geometry.with_tile(plan.block_q, plan.block_kv)
    plans = [checked_plan(patterns[i], patterns[i].plan(q, k, tiled, softmax), tiled) for i in own]
    numbers = [0 if there is not None else 1 + own.index(i) for i, there in zip(pattern_of_head, of_head, strict=True)]
    return stack_heads([plan, *plans], numbers)
