"""What a check of a config on one's own prompts found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparsekit.config import SparseConfig, format_range
from sparsekit.patch.divergence import mean_interval

__all__ = ["CheckReport", "Divergence"]


@dataclass(frozen=True)
class Divergence:
    """KL from dense of the tokens that follow each prompt, nats a token."""

    kl: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean_interval(self.kl)[0]

    @property
    def half_width(self) -> float | None:
        """Of the mean's 95% interval by the normal distribution; one prompt has none."""
        width = mean_interval(self.kl)[1]
        return width if math.isfinite(width) else None

    def __str__(self) -> str:
        if self.half_width is None:
            return f"{self.mean:.3g} (one prompt: no interval)"
        return f"{self.mean:.3g} ± {self.half_width:.2g}"


@dataclass(frozen=True)
class CheckReport:
    """What `sparsekit.check` found.

    Attributes:
        config: the config that holds the budget: as given, with the layers of `given_back` dense, and in `budget` the
            prompts it was measured on.
        prompts: their names.
        tokens: their lengths.
        next_tokens: tokens after each prompt that were compared, at most.
        before: of the config as given.
        after: with the layers given back; `before` where none was.
        alone: of each sparse layer, mean KL with that layer alone sparse, over the prompts that diverge most; empty
            where the budget holds, or there is none.
        given_back: layers that exceed the budget, and run dense.
        settled: of each `dense_below_tokens: auto` of the config as given, what it is and where that comes from; that
            of the config is a number in `config`.
    """

    config: SparseConfig
    prompts: tuple[str, ...]
    tokens: tuple[int, ...]
    next_tokens: int
    before: Divergence
    after: Divergence
    alone: Mapping[int, float]
    given_back: tuple[int, ...] = ()
    settled: tuple[str, ...] = ()

    @property
    def budget(self) -> float | None:
        """Of the config, nats a token."""
        return None if self.config.budget is None else self.config.budget.kl

    @property
    def held(self) -> bool | None:
        """Whether the config as given holds its budget, by the mean; None where it has none."""
        return None if self.budget is None else self.before.mean <= self.budget

    @property
    def kept(self) -> bool:
        """Whether the budget holds at last, by the mean; so it is without one."""
        return self.budget is None or self.after.mean <= self.budget

    @property
    def nothing_left(self) -> bool:
        """Whether every sparse layer had to be given back."""
        return bool(self.given_back) and len(self.given_back) == len(self.alone)

    def why(self, layer: int) -> str:
        """Why a layer that was given back runs dense."""
        return f"given back by the check: KL {self.alone[layer]:.3g} alone, budget {self.budget}"

    def verdict(self) -> str:
        """Whether the budget holds, and what runs dense for it, in a sentence; nothing without a budget."""
        if self.budget is None:
            return ""
        if self.held:
            return f"the budget of {self.budget} is held{self._doubt(self.before)}."
        said = f"KL from dense {self.before} nats a token exceeds the budget of {self.budget}"
        if not self.kept:
            by = ", by dense_impl: kernel" if self.config.dense_impl == "kernel" else ""
            return f"{said}, and still does with every sparse layer dense ({self.after}): that is rounding{by}."
        if self.nothing_left:
            return f"{said}, and holds only with every sparse layer dense: {format_range(self.given_back)}."
        many = len(self.given_back) > 1
        first = f"layer{'s' if many else ''} {format_range(self.given_back)} diverge{'' if many else 's'} most"
        then = f"with {'them' if many else 'it'} dense it is {self.after}"
        return f"{said}: {first}; {then}, and the budget is held{self._doubt(self.after)}."

    def _doubt(self, found: Divergence) -> str:
        if found.half_width is None:
            return ", on one prompt, which does not show how prompts differ"
        high, budget = found.mean + found.half_width, self.budget or 0.0
        return "" if high <= budget else f" by the mean; its 95% interval reaches {high:.2g}, more prompts narrow it"

    def lines(self) -> tuple[str, ...]:
        """What it found, for a reader."""
        lengths = f"{min(self.tokens):,}" + (f" to {max(self.tokens):,}" if len(set(self.tokens)) > 1 else "")
        worst = max(range(len(self.prompts)), key=lambda i: self.before.kl[i])
        count = f"{len(self.prompts)} prompt{'s' if len(self.prompts) > 1 else ''}"
        first = (
            f"check: KL from dense of the next {self.next_tokens} tokens, {count} of {lengths} tokens: {self.before} "
            f"nats a token; worst {self.before.kl[worst]:.3g}, {self.prompts[worst]}"
        )
        verdict = self.verdict() or "no budget in the config: nothing is run dense."
        return first, f"check: {verdict}", *self.settled

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(heading, rows): a row a prompt."""
        head = ["prompt", "tokens", "KL", *(["KL with layers dense"] if self.given_back else [])]
        rows = []
        for i, name in enumerate(self.prompts):
            after = [f"{self.after.kl[i]:.5f}"] if self.given_back else []
            rows.append([name, str(self.tokens[i]), f"{self.before.kl[i]:.5f}", *after])
        return head, rows

    def layers_table(self) -> tuple[list[str], list[list[str]]]:
        """(heading, rows): a row a sparse layer, the greatest share first; no rows where no layer was looked at."""
        ranked = sorted(self.alone, key=lambda layer: -self.alone[layer])
        shown = [["dense" if layer in self.given_back else "sparse", f"{self.alone[layer]:.5f}"] for layer in ranked]
        return ["layer", "runs", "KL alone"], [[str(n), *row] for n, row in zip(ranked, shown, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        def of(found: Divergence) -> dict[str, Any]:
            return {"mean": found.mean, "half_width": found.half_width, **asdict(found)}

        return {
            "kind": "check",
            "budget": self.budget,
            "held": self.held,
            "verdict": self.verdict(),
            "prompts": list(self.prompts),
            "tokens": list(self.tokens),
            "next_tokens": self.next_tokens,
            "before": of(self.before),
            "after": of(self.after),
            "alone": {str(layer): kl for layer, kl in self.alone.items()},
            "given_back": list(self.given_back),
            "config": self.config.to_dict(),
        }
