"""What a rule is: constants, what it chooses from, and its registry.

TriangleMix chose its layers by looking at the probe's plot; no threshold or rule was published. What is here is ours,
and the config says which rule and which constants chose. The gate judges by answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsekit.config import ModelFacts
from sparsekit.errors import SparsekitError, nearest, one_line, shown
from sparsekit.lab.calibrate.effects import Effect
from sparsekit.lab.calibrate.mixture import Chosen, whole_layers
from sparsekit.lab.calibrate.probe import Probe

__all__ = ["RULES", "Given", "LayerRule", "Measured", "Prompts", "Rule", "apply_rule", "bears", "most", "parse_rule"]

RULES: dict[str, type[Rule]] = {}
NOTE = "the rule and its constants are sparsekit's choice; no publication gives them"


@dataclass(frozen=True)
class Given:
    """What a rule chooses from.

    Attributes:
        arch: of the model.
        probe: of the same model, for rules that read one.
        measure: runs the model with these heads sparse, on the prompts that the rule's fields describe; task -> effect.
        scores: of (layer, query head), for rules that are given an order; the lowest run the pattern first.
    """

    arch: ModelFacts
    probe: Probe | None = None
    measure: Callable[[Chosen, Any], Mapping[str, Effect]] | None = None
    scores: Mapping[tuple[int, int], float] | None = None

    def layers(self) -> list[tuple[float, int]]:
        """(Grad(Middle) as a share of the largest, layer), the smallest first; ties go to the deeper layer."""
        assert self.probe is not None
        shares = [(share, -layer) for layer, share in enumerate(self.probe.relative()) if share is not None]
        return [(share, -layer) for share, layer in sorted(shares)]


class Rule(BaseModel, ABC):
    """A way to choose heads. Subclasses set `name: Literal["..."] = "..."` and are then known by it.

    The first line of the docstring, and the fields, are its row in docs/calibrate.md and its options of
    `sparsekit calibrate rule`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        field = cls.model_fields["name"]
        if not field.is_required():
            RULES[field.default] = cls

    @property
    def probed(self) -> bool:
        """Whether it reads a probe."""
        return True

    @property
    def measured(self) -> bool:
        """Whether it runs the model."""
        return False

    @abstractmethod
    def heads(self, given: Given) -> Chosen:
        """The query heads of each layer that run the pattern."""

    def said_of_probe(self, probe: Probe) -> dict[str, Any]:
        """What provenance says of the probe's numbers."""
        return {}


class LayerRule(Rule):
    """A way to choose layers: `choose`."""

    @abstractmethod
    def choose(self, given: Given) -> list[int]:
        """The layers, ascending."""

    def heads(self, given: Given) -> Chosen:
        return whole_layers(self.choose(given), given.arch)

    def said_of_probe(self, probe: Probe) -> dict[str, Any]:
        shares = [None if share is None else round(share, 4) for share in probe.relative()]
        return {"middle_gradient_of_max": shares}


class Prompts(BaseModel):
    """Constants of a rule that may run the model: on which prompts."""

    samples: int = Field(8, ge=2, description="prompts for each task")
    tokens: str = Field("2048", description="prompt lengths, comma-separated")
    tasks: str = Field("needle4", description="tasks, comma-separated")
    corpus: str | None = Field(None, description="text of tasks that read one: a folder, or `pydoc`")


class Measured(Prompts):
    """Constants of a rule that asks what becomes of the answers."""

    budget: float = Field(0.002, gt=0, description="KL from dense, in nats per token, for each task")
    lost: float = Field(0.1, ge=0, lt=1, description="share of a task's answers that may be lost")

    def holds(self, effects: Mapping[str, Effect]) -> bool:
        return all(one.kl_at_most <= self.budget and one.lost <= self.lost for one in effects.values())


def most(count: int, holds: Callable[[int], bool]) -> int:
    """The largest n of 1 to `count` that holds, or 0: by bisection, which takes it to fail for good once it fails."""
    low, high = 0, count + 1  # `low` holds; `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def bears(given: Given, rule: Measured) -> Callable[[Chosen], bool]:
    """Whether the model bears these heads sparse, within the rule's constants."""
    assert given.measure is not None
    measure = given.measure
    return lambda chosen: rule.holds(measure(chosen, rule))


def parse_rule(name: str, constants: Mapping[str, Any] | None = None) -> Rule:
    """The rule of a name, with its constants; an error names the constant, its value and what is allowed."""
    if name not in RULES:
        raise SparsekitError(f"rule {shown(name)}: one of {', '.join(RULES)}.{nearest(name, RULES)}")
    try:
        return RULES[name](**dict(constants or {}))
    except ValidationError as error:
        raise SparsekitError(f"rule {name!r}: {one_line(error, RULES[name])}") from None


def apply_rule(rule: Rule, given: Given) -> tuple[Chosen, dict[str, Any]]:
    """(layer -> heads, provenance) of a rule.

    Raises:
        SparsekitError: it reads a probe, or measures, and there is none; the probe is of another model.
    """
    unread = {"name"} if rule.measured else {"name", *Prompts.model_fields}
    said: dict[str, Any] = {"rule": rule.name, **rule.model_dump(exclude=unread, exclude_none=True)}
    if rule.probed:
        if given.probe is None:
            raise SparsekitError(f"rule {rule.name!r} needs a probe: `sparsekit calibrate probe MODEL -o probe.json`.")
        if len(given.probe.layers) != given.arch.num_layers:
            count = len(given.probe.layers)
            raise SparsekitError(f"the probe is of a model of {count} layers, this one has {given.arch.num_layers}.")
        probe = given.probe
        made = {"samples": probe.samples, **probe.prompts, **asdict(probe.sections), **probe.made}
        said |= {"note": NOTE, "probe": {**made, **rule.said_of_probe(probe)}}
    if not rule.measured:
        return rule.heads(given), said
    if given.measure is None:
        raise SparsekitError(f"rule {rule.name!r} needs a measurement, and so a model.")
    measure, seen = given.measure, list[tuple[Chosen, Mapping[str, Effect]]]()

    def counted(chosen: Chosen, rule: Rule) -> Mapping[str, Effect]:
        seen.append((chosen, measure(chosen, rule)))
        return seen[-1][1]

    chosen = rule.heads(replace(given, measure=counted))
    effects = next((found for asked, found in seen if asked == chosen), {})
    kl = {task: round(effect.mean_kl, 7) for task, effect in effects.items()}
    return chosen, {**said, "measurements": len(seen), **({"measured_kl": kl} if kl else {})}
