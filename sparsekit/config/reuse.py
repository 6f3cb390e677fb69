"""`{reuse: 8}` in place of a layer's pattern: it runs the plan that layer 8 made in the same forward (Kascade)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from sparsekit.config.layers import LayerPatterns, Reused
from sparsekit.config.ranges import MOST, format_range
from sparsekit.errors import SparsekitError, nearest, one_line, shown
from sparsekit.patterns import Pattern, bounded, parse_pattern

__all__ = ["AnyPattern", "LayerRule", "Reuse", "pattern_reused", "resolve_reuse"]

Number = Annotated[int, Field(ge=0, lt=MOST, strict=True)]


class Reuse(BaseModel):
    """A layer's rule: its query head h runs the plan of head `heads[h]` of layer `reuse`, which it finds made.

    Attributes:
        reuse: an earlier layer that chooses for itself.
        heads: one head of that layer for each query head here; None: each that of its own number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    reuse: int = Field(ge=0, lt=MOST, description="an earlier layer, whose plan is run")
    heads: Annotated[tuple[Number, ...], Field(strict=False)] | None = Field(
        None, description="for each query head, the head of that layer; default its own number"
    )

    _bounded = field_validator("*", mode="before")(bounded)

    def to_yaml(self) -> dict[str, Any]:
        """What YAML says to get this rule."""
        return {"reuse": self.reuse, **({} if self.heads is None else {"heads": list(self.heads)})}


def _parse_rule(value: Any) -> Pattern | Reuse:
    if isinstance(value, Reuse):
        return value
    if isinstance(value, Mapping) and "name" not in value:
        if "reuse" in value:
            try:
                return Reuse.model_validate(dict(value))
            except ValidationError as error:
                raise SparsekitError(one_line(error, Reuse)) from None
        close = next((str(key) for key in value if "'reuse'" in nearest(key, ("name", "reuse"))), None)
        if close is not None:
            raise SparsekitError(
                f"unknown field {shown(close)} = {shown(value[close])}; allowed: a pattern's name and fields, or "
                "reuse, heads. Did you mean 'reuse'?"
            )
    return parse_pattern(value, where="")


def _parse_pattern(value: Any) -> Pattern:
    if isinstance(value, Reuse) or (isinstance(value, Mapping) and "reuse" in value and "name" not in value):
        raise SparsekitError(f"{shown(value)}: a plan is reused by whole layers; `reuse` is a rule under `layers`")
    return parse_pattern(value, where="")


AnyPattern = Annotated[Pattern, BeforeValidator(_parse_pattern)]
LayerRule = Annotated[Pattern | Reuse, BeforeValidator(_parse_rule)]


def pattern_reused(rule: Reuse, rules: Mapping[int, Pattern | Reuse], default: Pattern) -> Pattern:
    """By a config's rules of layers alone, the pattern that makes the plan that `rule` reuses; an error in a chain."""
    there = rules.get(rule.reuse, default)
    if isinstance(there, Reuse):
        raise SparsekitError(_in_a_chain(f"layers: reuse = {rule.reuse}:", there.reuse))
    return there


def _in_a_chain(begin: str, anchor: int) -> str:
    return f"{begin} that layer runs the plan of layer {anchor} itself; reuse that one directly."


def resolve_reuse(
    rule: Reuse, where: str, layer: int, heads: int, earlier: Sequence[LayerPatterns], own: Mapping[int, Pattern]
) -> tuple[list[Pattern], Reused]:
    """The pattern of each of a layer's `heads` query heads, and whose plan they run.

    Args:
        where: the rule's field.
        earlier: what the layers before this one run.
        own: patterns of heads that `heads` names: they win over the rule.

    Raises:
        SparsekitError: a layer, or heads, whose plan cannot be reused here.
    """
    sharing = [x.layer for x in earlier if x.reused is None and x.estimates]
    near = max((n for n in sharing if n <= rule.reuse), default=sharing[0] if sharing else 0)
    instead = (
        f"allowed: {format_range(sharing)}. Did you mean {near}?"
        if sharing
        else "no earlier layer chooses from the prompt for itself: give this layer a pattern"
    )
    begin = f"{where}: reuse = {rule.reuse}, in layer {layer}:"
    if rule.reuse >= layer:
        raise SparsekitError(f"{begin} a layer reuses the plan of an earlier one; {instead}")
    anchor = earlier[rule.reuse]
    if anchor.reused is not None:
        raise SparsekitError(_in_a_chain(begin, anchor.reused.layer))
    if anchor.dense:
        raise SparsekitError(f"{begin} that layer is dense and makes no plan; {instead}")
    count = len(anchor.pattern_of_head)
    if count != heads:
        raise SparsekitError(
            f"{begin} that layer has {count} query heads, and this one {heads}; layers share a plan head by head."
        )
    if rule.heads is not None and len(rule.heads) != heads:
        raise SparsekitError(
            f"{where}.heads has {len(rule.heads)} values; one is needed for each of the {heads} query heads of layer "
            f"{layer}."
        )
    there = tuple(range(heads)) if rule.heads is None else rule.heads
    if max(there) >= count:
        at = next(head for head, number in enumerate(there) if number >= count)
        raise SparsekitError(
            f"{where}.heads[{at}] = {there[at]}: layer {rule.reuse} has {count} query heads; allowed: 0-{count - 1}."
        )
    reused = [number for head, number in enumerate(there) if head not in own]
    if not reused:
        raise SparsekitError(f"{begin} `heads` gives every head of it a pattern, so that none reuses a plan.")
    if not anchor.chooses(reused):
        some = "" if len(anchor.patterns) == 1 else f" in heads {format_range(sorted(set(reused)))}"
        raise SparsekitError(
            f"{begin} that layer runs {anchor}, which{some} depends on positions alone and costs no index: give this "
            "layer the pattern itself."
        )
    patterns = anchor.patterns_at(there)
    return (
        [own.get(head, pattern) for head, pattern in enumerate(patterns)],
        Reused(rule.reuse, tuple(None if head in own else number for head, number in enumerate(there))),
    )
