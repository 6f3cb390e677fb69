"""Rules: from a probe, or from you, to the layers that run a sparse pattern, and a config that says how.

TriangleMix chose its layers by looking at the probe's plot; no threshold or rule was published. What is here is ours,
and the config says which rule and which constants chose its layers. The gate judges by answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsekit.config import ModelFacts, SparseConfig, format_range, load, parse_range
from sparsekit.errors import SparsekitError, nearest, one_line, shown
from sparsekit.lab.calibrate.effects import Effect
from sparsekit.lab.calibrate.probe import Probe
from sparsekit.patterns import Pattern, parse_pattern

__all__ = ["RULES", "Given", "Rule", "apply_rule", "parse_rule", "write_config"]

RULES: dict[str, type[Rule]] = {}
NOTE = "the rule and its constants are sparsekit's choice; no publication gives them"


@dataclass(frozen=True)
class Given:
    """What a rule chooses from.

    Attributes:
        num_layers: of the model.
        probe: of the same model, for rules that read one.
        measure: runs the model with these layers sparse, on the prompts that the rule's fields describe.
    """

    num_layers: int
    probe: Probe | None = None
    measure: Callable[[Sequence[int], Any], Effect] | None = None

    def ranked(self) -> list[tuple[float, int]]:
        """(Grad(Middle) as a share of the largest, layer), the smallest first; ties go to the deeper layer."""
        assert self.probe is not None
        shares = [(share, -layer) for layer, share in enumerate(self.probe.relative()) if share is not None]
        return [(share, -layer) for share, layer in sorted(shares)]


class Rule(BaseModel, ABC):
    """A way to choose layers. Subclasses set `name: Literal["..."] = "..."` and are then known by it.

    The first line of the docstring, and the fields, are its row in docs/calibrate.md and its options of
    `sparsekit calibrate rule`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    probed: ClassVar[bool] = True  # reads a probe
    measured: ClassVar[bool] = False  # runs the model

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        RULES[cls.model_fields["name"].default] = cls

    @abstractmethod
    def choose(self, given: Given) -> list[int]:
        """The layers, ascending."""


class Suffix(Rule):
    """The longest run up to the last layer with Grad(Middle) below a share of its maximum.

    Layers that keep their own attention neither join nor end the run.
    """

    name: Literal["suffix"] = "suffix"
    epsilon: float = Field(0.2, gt=0, le=1, description="share of the largest Grad(Middle)")

    def choose(self, given: Given) -> list[int]:
        too_large = max((layer for share, layer in given.ranked() if share >= self.epsilon), default=-1)
        return sorted(layer for _, layer in given.ranked() if layer > too_large)


class LowestK(Rule):
    """The layers of the smallest Grad(Middle), wherever they are; ties go to the deeper layer."""

    name: Literal["lowest_k"] = "lowest_k"
    k: int = Field(ge=0, description="number of layers")

    def choose(self, given: Given) -> list[int]:
        ranked = given.ranked()
        if self.k > len(ranked):
            raise SparsekitError(f"k = {self.k}: from 0 to {len(ranked)}, the layers that were probed.")
        return sorted(layer for _, layer in ranked[: self.k])


class Listed(Rule):
    """Yours."""

    name: Literal["list"] = "list"
    probed: ClassVar[bool] = False
    layers: str = Field(description="the layers, such as `5,7,10-20`")

    def choose(self, given: Given) -> list[int]:
        numbers = sorted(parse_range(self.layers))
        if numbers[-1] >= given.num_layers:
            raise SparsekitError(f"layers {format_range(numbers)}: the model has 0-{given.num_layers - 1}.")
        return numbers


class Search(Rule):
    """The most layers, by rising Grad(Middle), that a measurement bears.

    By bisection, so it takes the measurement to fail for good once it fails; what comes back was itself measured, or is
    empty.
    """

    name: Literal["search"] = "search"
    measured: ClassVar[bool] = True
    budget: float = Field(0.002, gt=0, description="KL from dense, in nats per token")
    lost: float = Field(0.1, ge=0, lt=1, description="share of the answers that may be lost")
    samples: int = Field(8, ge=2, description="number of prompts")
    tokens: str = Field("2048", description="prompt lengths, comma-separated")

    def choose(self, given: Given) -> list[int]:
        assert given.measure is not None
        order = [layer for _, layer in given.ranked()]
        low, high = 0, len(order) + 1  # `low` layers are borne; `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            effect = given.measure(sorted(order[:middle]), self)
            holds = effect.kl_at_most <= self.budget and effect.lost <= self.lost
            low, high = (middle, high) if holds else (low, middle)
        return sorted(order[:low])


def parse_rule(name: str, constants: Mapping[str, Any] | None = None) -> Rule:
    """The rule of a name, with its constants; an error names the constant, its value and what is allowed."""
    if name not in RULES:
        raise SparsekitError(f"rule {shown(name)}: one of {', '.join(RULES)}.{nearest(name, RULES)}")
    try:
        return RULES[name](**dict(constants or {}))
    except ValidationError as error:
        raise SparsekitError(f"rule {name!r}: {one_line(error, RULES[name])}") from None


def apply_rule(rule: Rule, given: Given) -> tuple[list[int], dict[str, Any]]:
    """(layers, provenance) of a rule.

    Raises:
        SparsekitError: it reads a probe, or measures, and there is none; the probe is of another model.
    """
    said: dict[str, Any] = {"rule": rule.name, **rule.model_dump(exclude={"name"})}
    if rule.probed:
        if given.probe is None:
            raise SparsekitError(f"rule {rule.name!r} needs a probe: `sparsekit calibrate probe MODEL -o probe.json`.")
        if len(given.probe.layers) != given.num_layers:
            count = len(given.probe.layers)
            raise SparsekitError(f"the probe is of a model of {count} layers, this one has {given.num_layers}.")
        said |= {"note": NOTE, "probe": _of_probe(given.probe)}
    if not rule.measured:
        return rule.choose(given), said
    if given.measure is None:
        raise SparsekitError(f"rule {rule.name!r} needs a measurement, and so a model.")
    measure, effects = given.measure, list[Effect]()

    def counted(layers: Sequence[int], rule: Rule) -> Effect:
        effects.append(measure(layers, rule))
        return effects[-1]

    chosen = rule.choose(replace(given, measure=counted))
    return chosen, {**said, "measurements": len(effects)}


def _of_probe(probe: Probe) -> dict[str, Any]:
    shares = [None if share is None else round(share, 4) for share in probe.relative()]
    return {
        "samples": probe.samples,
        **probe.prompts,
        **asdict(probe.sections),
        **probe.made,
        "middle_gradient_of_max": shares,
    }


def write_config(
    arch: ModelFacts,
    patterns: Mapping[int, Pattern | str | Mapping[str, Any]],
    provenance: Mapping[str, Any],
    *,
    dense_below_tokens: int = 1024,
) -> SparseConfig:
    """A config of that model in which each layer of `patterns` runs its pattern, and all others are dense.

    Args:
        patterns: layer -> pattern.
        provenance: how the layers were chosen; plain numbers, text, lists and mappings.
    """
    groups: dict[Pattern, list[int]] = {}
    for layer in sorted(patterns):
        groups.setdefault(parse_pattern(patterns[layer]), []).append(layer)
    layers = {format_range(numbers): pattern for pattern, numbers in groups.items() if pattern.name != "dense"}
    return load(
        {
            "version": 1,
            "model": arch.model_dump(exclude_none=True),
            "dense_below_tokens": dense_below_tokens,
            "default": "dense",
            "layers": {key: pattern.to_yaml() for key, pattern in layers.items()},
            "provenance": dict(provenance),
        }
    )
