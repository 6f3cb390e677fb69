"""What one layer runs, spelled out: its patterns, those of each head, and whose plan it runs."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.config.ranges import format_range
from sparsekit.errors import SparsekitError
from sparsekit.patterns import AShape, Pattern
from sparsekit.patterns.attention import plan_heads
from sparsekit.patterns.shared import SharedPlans, reused_plan
from sparsekit.plan import BlockPlan

__all__ = ["IMPLS", "LayerPatterns", "Reused"]

IMPLS = {"model": None, "fp8": "fp8"}  # of each precision, what `attend` is asked for; None: what the device prefers


@dataclass(frozen=True)
class Reused:
    """Which plan a layer runs in place of one of its own.

    Attributes:
        layer: the earlier layer that makes it, in every forward anew.
        heads: of each query head here, the query head there; None: this one runs a pattern of its own.
        last: no later layer reuses it.
    """

    layer: int
    heads: tuple[int | None, ...]
    last: bool = field(default=False, compare=False)

    @property
    def taken(self) -> tuple[int, ...]:
        """The heads there, with a head's own number where it takes none."""
        return tuple(here if there is None else there for here, there in enumerate(self.heads))

    @property
    def straight(self) -> bool:
        """Whether each head that reuses takes the plan of the head of its own number."""
        return self.taken == tuple(range(len(self.heads)))

    def of_heads(self, first: int, count: int) -> Reused:
        """The same for `count` heads alone, from head `first` on, as those numbered from 0.

        Raises:
            SparsekitError: one of them reuses the plan of a head that is not among them.
        """
        part = self.heads[first : first + count]
        away = [there for there in part if there is not None and not first <= there < first + count]
        if away:
            raise SparsekitError(
                f"reuse: {self.layer}: heads {first}-{first + count - 1} of a process run the plan of head {away[0]}, "
                "which another process has; under tensor parallelism a head map keeps to the heads of a process."
            )
        return replace(self, heads=tuple(None if there is None else there - first for there in part))


@dataclass(frozen=True)
class LayerPatterns:
    """One layer: its different patterns, and for each query head which of them it runs.

    Of a layer that reuses a plan, the patterns are those by which the plan was made; they estimate nothing here.

    Attributes:
        precision: of its products: "model", the dtype of q, k and v; or "fp8".
    """

    layer: int
    patterns: tuple[Pattern, ...]
    pattern_of_head: tuple[int, ...]
    first_head: int = 0  # the model's number of head 0 here: a process may have a part of the heads
    reused: Reused | None = None
    shared: bool = field(default=False, compare=False)  # whether later layers reuse its plan
    precision: str = "model"

    @property
    def impl(self) -> str | None:
        """The implementation by which its plan is cut and run; None: what the device prefers."""
        return IMPLS[self.precision]

    @property
    def dense(self) -> bool:
        return all(pattern.name == "dense" for pattern in self.patterns)

    @property
    def exact(self) -> bool:
        """Whether its output is dense attention's, in the model's precision."""
        return self.dense and self.impl is None

    def within(self, window: int | None) -> bool:
        """Whether all heads keep a window of at most so many tokens and nothing else: what a sliding layer may run."""
        windows = [p.window_tokens for p in self.patterns if isinstance(p, AShape) and p.slides]
        return len(windows) == len(self.patterns) and max(windows) <= (window or 0)

    def groups(self) -> Iterator[tuple[Pattern, tuple[int, ...]]]:
        """Each pattern with its query heads, as the model numbers them."""
        for i, pattern in enumerate(self.patterns):
            yield pattern, tuple(h for h, own in enumerate(self.pattern_of_head, self.first_head) if own == i)

    def of_heads(self, first: int, count: int) -> LayerPatterns:
        """The same layer with `count` of its query heads alone, from head `first` on."""
        heads = range(first, first + count)
        chosen = [self.pattern_of_head[head] for head in heads]
        used = sorted(set(chosen))
        kept = [self.patterns[i].of_heads(heads) for i in used]
        reused = None if self.reused is None else self.reused.of_heads(first, count)
        of_head = tuple(used.index(i) for i in chosen)
        part = LayerPatterns(self.layer, tuple(kept), of_head, first, reused, self.shared, self.precision)
        if reused is not None and not part.chooses(head for head, n in enumerate(reused.heads) if n is not None):
            return replace(part, reused=None)  # of dense and static heads, these patterns are the same pairs
        return part

    def chooses(self, heads: Iterable[int]) -> bool:
        """Whether one of these heads, counted from 0 here, runs a pattern that looks at the prompt."""
        return any(self.patterns[self.pattern_of_head[head]].estimates for head in heads)

    @property
    def estimates(self) -> bool:
        """Whether some head looks at q and k here, and does not run what another layer chose."""
        heads = range(len(self.pattern_of_head))
        return self.chooses(head for head in heads if self.reused is None or self.reused.heads[head] is None)

    def patterns_at(self, heads: Sequence[int]) -> list[Pattern]:
        """What a layer runs whose head h does what head `heads[h]` does here."""
        moved = [pattern.of_heads(heads) for pattern in self.patterns]
        return [moved[self.pattern_of_head[head]] for head in heads]

    def plan(
        self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax, plans: SharedPlans,
        forward: Hashable = None, impl: str | None = None,
    ) -> BlockPlan:  # fmt: skip
        """The layer's own plan for q (B, H, Q, D) over k (B, G, K, D), or the one that it reuses.

        Args:
            plans: those of this forward, where an own plan is kept if later layers reuse it.
            forward: tells it from others that keep theirs in the same place.
            impl: what will run it, in whose tile `geometry` is; default what the device prefers.

        Raises:
            SparsekitError: the layer whose plan is reused made none in this forward.
        """
        own = self.patterns, self.pattern_of_head, q, k, geometry, softmax
        if self.reused is None:
            plan = plan_heads(*own, impl)
            if self.shared:
                plans.keep((forward, self.layer), plan)
            return plan
        key = (forward, self.reused.layer)
        made = plans.find(key, self.reused.taken, q.device)
        if made is None:
            raise SparsekitError(
                f"layer {self.layer} reuses the plan of layer {self.reused.layer}, which made none in this forward: it "
                "was left out, or had another mask; give this layer a pattern of its own."
            )
        if self.reused.last:
            plans.drop(key)
        return reused_plan(made, self.reused.heads, *own)

    @property
    def alike(self) -> bool:
        """Whether all heads run the same, none with a value or a head of another layer of its own."""
        straight = self.reused is None or self.reused.straight
        return straight and len(self.patterns) == 1 and self.patterns[0].of_heads([0]) is self.patterns[0]

    @property
    def in_words(self) -> str:
        """What it runs, and in which precision where that is not the model's."""
        return str(self) if self.impl is None else f"{self} in {self.precision}"

    def __str__(self) -> str:
        if len(self.patterns) == 1:
            runs = str(self.patterns[0])
        else:
            runs = "; ".join(f"heads {format_range(heads)}: {pattern}" for pattern, heads in self.groups())
        if self.reused is None:
            return runs
        some = [head for head, there in enumerate(self.reused.heads, self.first_head) if there is not None]
        which = "" if len(some) == len(self.reused.heads) else f" in heads {format_range(some)}"
        return f"the plan of layer {self.reused.layer}{which}: {runs}"
