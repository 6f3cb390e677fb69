"""Pattern, its two kinds, and the registry.

A pattern is a frozen pydantic model: a `name` and its parameters, each with unit and meaning. Defining the class
registers it. A static pattern says which pairs it keeps; a dynamic one looks at q and k and returns a plan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from inspect import ismodule
from threading import RLock
from typing import Any, ClassVar, Literal
from warnings import warn

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)
from torch import Tensor

from sparsekit.call.caches import per_geometry
from sparsekit.call.geometry import Geometry, Span
from sparsekit.call.softmax import Softmax
from sparsekit.call.tensors import check_fits, check_tensors
from sparsekit.errors import SparsekitError, nearest, one_line, shown
from sparsekit.patterns.crossover import Place, device_type, settled_tokens
from sparsekit.patterns.fields import AUTO, MOST_DEPTH, UNHASHABLE, bounded, holds, tokens_or_none, too_deep
from sparsekit.plan import BlockPlan, TokenRule, dense_plan, plan_from_block_mask, plan_from_rule
from sparsekit.plan.mask import first_without_itself

__all__ = [
    "DynamicPattern",
    "Pattern",
    "StaticPattern",
    "bounded",
    "parse_pattern",
    "pattern_class",
    "pattern_names",
    "shared_correction",
]

_REGISTRY: dict[str, type[Pattern]] = {}

ENTRY_POINTS = "sparsekit.patterns"


class Pattern(BaseModel, ABC):
    """What one layer, or one head, attends to. Subclasses set `name: Literal["..."] = "..."` and are then known by it.

    A pattern never sees a layer number, a model, or the attention kernel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    correct_every: int | None = Field(
        None,
        ge=2,
        le=4096,
        description="one row in so many also runs dense and corrects those after it; null: none",
    )
    source: ClassVar[str] = "-"  # where the method was published
    whole_layer: ClassVar[bool] = False  # its plan is a layer's only one: no union, no heads of another pattern
    estimates: ClassVar[bool] = True  # what it keeps depends on q and k; of a static one, on positions alone
    left_out: ClassVar[tuple[str, ...]] = ("correct_every",)  # what records name only where it is not null
    narrow: ClassVar[bool] = False  # keeps fewer pairs in rows of fewer queries, as diagonals do

    # Parameters, as in YAML. `sparsekit bench dynamic` measures a pattern at its bench points and, with --sweep, at its
    # sweep points: those of its main parameter, the sparsest first. Tests of all patterns run it at its test points,
    # which drop some pairs of 300 tokens.
    bench_points: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    sweep_points: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    test_points: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_input(cls, value: Any) -> Any:
        """YAML's lists as tuples, so that a pattern can be hashed; numbers that a plan can hold."""
        return bounded(tuple(value) if isinstance(value, list) else value)

    @model_serializer(mode="wrap")
    def _without_null(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return {name: value for name, value in data.items() if value is not None or name not in self.left_out}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        name = cls.model_fields["name"].default
        if not isinstance(name, str):
            return  # a base class
        for field, info in cls.model_fields.items():
            if holds(info.annotation, UNHASHABLE):
                raise SparsekitError(
                    f"pattern {name!r} of {cls.__module__}: the field {field!r} may be a list, a mapping or a set, "
                    "which cannot be hashed, as plans are cached by pattern: make it a tuple, such as tuple[int, ...]."
                )
        known = _REGISTRY.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise SparsekitError(f"pattern name {name!r} of {cls.__module__} is taken by {known.__module__}.")
        _REGISTRY[name] = cls

    @abstractmethod
    def plan(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
        """The plan for q (B, H, Q, D) over k (B, G, K, D), on their device."""

    def of_heads(self, heads: Sequence[int]) -> Pattern:
        """This pattern restricted to `heads`; itself unless a field has a value for each head."""
        return self

    def settled(self, place: Place, say: Callable[[str], None] = lambda said: None) -> Pattern:
        """This pattern with a number in place of `auto`: what a table says of it there, or else its own default.

        `say` is told the number, and where it comes from.
        """
        return self

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Pattern:
        """The pattern of this name with these fields, as YAML says them; a pydantic error where they do not fit."""
        return cls.model_validate(dict(fields))

    def to_yaml(self) -> str | dict[str, Any]:
        """What YAML says to get this pattern: its name, and the parameters that were set."""
        given = {key: _plain(getattr(self, key)) for key in self._parameters() if key in self.model_fields_set}
        return {"name": self.name, **given} if given else self.name

    def __str__(self) -> str:
        fields, given = type(self).model_fields, []
        for key in self._parameters():
            value = getattr(self, key)
            if value is not None or fields[key].default is not None:
                given.append(f"{key}={_brief(value)}")
        return f"{self.name}({', '.join(given)})" if given else self.name

    @classmethod
    def _parameters(cls) -> list[str]:
        """Its fields: first its own, then those that every pattern has."""
        return sorted((key for key in cls.model_fields if key != "name"), key=Pattern.model_fields.__contains__)


def _brief(value: Any) -> str:
    return " | ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Pattern):
        return value.to_yaml()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def checked_plan(pattern: Pattern, plan: Any, geometry: Geometry, method: str = "plan") -> BlockPlan:
    """What a pattern's method returned, if it is a plan of this call, whatever its tile; corrected as the pattern says.

    Raises:
        SparsekitError: it is none, or one for other lengths, padding or another end of the prompt.
    """
    if not isinstance(plan, BlockPlan):
        raise SparsekitError(f"pattern {pattern.name!r}: `{method}` returns a {type(plan).__name__}, not a BlockPlan.")
    there = plan.geometry
    if there is not geometry and there.with_tile(geometry.block_q, geometry.block_kv) != geometry:
        names = ("batch", "q_len", "kv_len", "q_offset", "kv_start", "kv_end", "prompt_tokens", "q_step")
        name = next(name for name in names if getattr(there, name) != getattr(geometry, name))
        raise SparsekitError(
            f"pattern {pattern.name!r}: `{method}` returns a plan of another call, with "
            f"{name}={shown(getattr(there, name))}, where this one has {shown(getattr(geometry, name))}."
        )
    return plan.corrected(pattern.correct_every)


def shared_correction(patterns: Iterable[Pattern], where: str = "") -> int:
    """`correct_every` of the sparse ones among a layer's patterns; 0: none. An error begins with `where`.

    Raises:
        SparsekitError: they differ in it.
    """
    found = {pattern.correct_every or 0: pattern for pattern in patterns if pattern.name != "dense"}
    if len(found) > 1:
        said = ", ".join(f"{pattern.name}: {every or 'null'}" for every, pattern in sorted(found.items()))
        raise SparsekitError(
            f"{where}correct_every differs between heads ({said}): a layer's rows are corrected together; give all its "
            "sparse patterns one value."
        )
    return next(iter(found), 0)


def rule_of(pattern: StaticPattern, span: Span) -> TokenRule | None:
    """A static pattern's rule for one sample.

    Raises:
        SparsekitError: it is neither a TokenRule nor None.
    """
    rule: Any = pattern.rule(span)
    if rule is not None and not isinstance(rule, TokenRule):
        raise SparsekitError(
            f"pattern {pattern.name!r}: `rule` returns {shown(rule)}, a {type(rule).__name__}, not a TokenRule or None."
        )
    return rule


class StaticPattern(Pattern):
    """A pattern that knows its pairs from their positions alone: no look-ahead, one plan for all heads, cached."""

    estimates = False

    @abstractmethod
    def keep(self, q_pos: Tensor, k_pos: Tensor, span: Span) -> Tensor:
        """Whether query position `q_pos` (int64, (..., 1)) keeps key position `k_pos` ((1, ...)): the definition."""

    def rule(self, span: Span) -> TokenRule | None:
        """`keep` as the kernel's token rule for one sample, where it is one; the plan is then exact and O(rows).

        Without it the plan is read off `keep` tile by tile, in O(N^2): fine for patterns made of whole tiles and for
        trying things out, and refused where a tile is cut in a way that no flag expresses.
        """
        return None

    def plan(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
        return static_plan(self, geometry, q.device).corrected(self.correct_every)


@per_geometry
def static_plan(pattern: StaticPattern, geometry: Geometry, device: torch.device) -> BlockPlan:
    """The plan of a static pattern, not corrected; needs no q and k, so `explain` uses it too.

    Raises:
        SparsekitError: a query that does not keep itself, the first of them; a tile that no flag expresses.
    """
    rules = [rule_of(pattern, span) for span in geometry.spans]
    exact = [rule for rule in rules if rule is not None]
    if len(exact) < len(rules):
        return plan_from_block_mask(_tiles_of(pattern, geometry), geometry).to(device)
    try:
        return plan_from_rule(exact, geometry, device)
    except SparsekitError as error:
        raise SparsekitError(f"pattern {pattern.name!r}: {error}") from None


def _tiles_of(pattern: StaticPattern, geometry: Geometry) -> Tensor:
    """bool (S, 1, R, C): the tiles that `keep` keeps, every one whole up to causality."""
    bq, bk = geometry.block_q, geometry.block_kv
    spans = geometry.spans[:1] if geometry.uniform else geometry.spans
    columns = -(-max(span.q_end for span in spans) // bk)
    out = torch.zeros(len(spans), 1, geometry.rows, columns, dtype=torch.bool, device="cpu")
    for s, span in enumerate(spans):
        k_pos = torch.arange(columns * bk, dtype=torch.int64, device="cpu")[None]
        for r in range(geometry.rows):
            start = (span.q_first // bq + r) * bq
            low, high = max(start, span.q_first), min(start + bq, span.q_end)
            if low >= high:
                break  # past the sample's last row
            q_pos = torch.arange(low, high, dtype=torch.int64, device="cpu")[:, None]
            causal = k_pos <= q_pos
            kept = pattern.keep(q_pos, k_pos, span)
            if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
                said = f"a tensor of {kept.dtype}" if isinstance(kept, Tensor) else f"a {type(kept).__name__}"
                raise SparsekitError(f"pattern {pattern.name!r}: `keep` returns {said}, not a boolean tensor.")
            try:
                kept = kept.expand_as(causal) & causal
            except RuntimeError:
                raise SparsekitError(
                    f"pattern {pattern.name!r}: `keep` returns a tensor of shape {tuple(kept.shape)}, which does not "
                    f"broadcast to the {causal.shape[0]} queries and {causal.shape[1]} keys that it was asked for."
                ) from None
            alone = ~kept.gather(1, q_pos)[:, 0]
            if bool(alone.any()):
                query = low + int(alone.nonzero()[0])
                raise SparsekitError(
                    f"pattern {pattern.name!r}: query {query} does not keep itself, and every query must: "
                    f"`keep` is to hold where k_pos == q_pos."
                )
            causal, kept = causal.unflatten(1, (-1, bk)), kept.unflatten(1, (-1, bk))
            visited, whole = kept.any(2).any(0), (kept == causal).all(2).all(0)
            if bool((visited & ~whole).any()):
                column = int((visited & ~whole).nonzero()[0])
                raise SparsekitError(
                    f"pattern {pattern.name!r} keeps a part of the tile of queries {start}.. and keys {column * bk}..: "
                    f"give it a `rule` (sink, window, dense_from), or make it keep whole tiles of {bq} x {bk} tokens."
                )
            out[s, 0, r] = visited
    return out


class DynamicPattern(Pattern):
    """A pattern that estimates from q and k what to keep. No host synchronisation, all heads in one launch."""

    # By device type: the shortest prompt of 2,048, 4,096, 8,192, ... tokens at which selecting and attention together
    # were measured to beat the best dense kernel (docs/results/dynamic-h100.jsonl).
    pays_from_tokens: ClassVar[Mapping[str, int]] = {}

    dense_below_tokens: int | Literal["auto"] | None = Field(
        None,
        ge=0,
        description="shorter prompts run dense, tokens; default: where it was measured to pay; 0: none do; "
        "auto: as a table says",
    )

    @field_validator("dense_below_tokens", mode="plain")
    @classmethod
    def _tokens_or_auto(cls, value: Any) -> Any:
        return tokens_or_none(value)

    def plan(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
        """The plan of `select`; of everything where a prompt is so short that estimating costs more than it saves.

        A chunk counts as its whole prompt where the geometry says how long that is, else as the keys so far. A batch
        runs dense, or is estimated, as one: its longest sample decides.
        """
        check_tensors(q, k, sink_logits=softmax.sink_logits)
        check_fits(q, k, geometry, "geometry")
        if max(max(span.keys, span.prompt_tokens) for span in geometry.spans) < self.dense_below(q.device):
            return dense_plan(geometry)
        plan = checked_plan(self, self.select(q, k, geometry, softmax), geometry, "select")
        if type(plan.row_ptr) is Tensor and plan.row_ptr.device.type == "cpu":  # elsewhere the host would wait
            lost = first_without_itself(plan)
            if lost is not None:
                sample, head, query = lost
                raise SparsekitError(
                    f"pattern {self.name!r}: query {query} of sample {sample}, head {head} does not keep itself, and "
                    "every query must: `select` is to list the tiles of each row's own queries, or make the row dense."
                )
        return plan

    def dense_below(self, device: torch.device) -> int:
        """Prompts shorter than this, tokens, run dense on such a device; 0: none do.

        Raises:
            SparsekitError: it is `auto`, and was not settled.
        """
        if self.dense_below_tokens == AUTO:
            raise SparsekitError(
                f"pattern {self.name!r}: dense_below_tokens = {AUTO!r} is no number yet; sparsekit.apply and "
                "sparsekit.attention make it one, and so does pattern.settled(place)."
            )
        return self.pays_below(device) if self.dense_below_tokens is None else int(self.dense_below_tokens)

    def pays_below(self, device: torch.device) -> int:
        """The same where the pattern does not say: its own default for such a device."""
        return self.pays_from_tokens.get(device.type, 0)

    def settled(self, place: Place, say: Callable[[str], None] = lambda said: None) -> Pattern:
        if self.dense_below_tokens != AUTO:
            return self
        default = self.pays_below(torch.device(device_type(place.device)))
        tokens, said = settled_tokens(self.model_dump(mode="json"), place, default)
        say(f"{self.name}: dense_below_tokens auto is {said}")
        return self.model_copy(update={"dense_below_tokens": tokens})

    def keys_at_most(self, geometry: Geometry) -> int | None:
        """Keys that a query tile of that geometry computes at most, by a budget; None where none bounds them."""
        return None

    @abstractmethod
    def select(self, q: Tensor, k: Tensor, geometry: Geometry, softmax: Softmax) -> BlockPlan:
        """What to keep of q (B, H, Q, D) over k (B, G, K, D): a plan with H heads, at any length."""


_loading = RLock()
_loaded = False


def _load_entry_points() -> None:
    """Register what other packages offer, once."""
    global _loaded
    with _loading:
        if not _loaded:
            _loaded = True  # before the loading: a package may ask for the patterns while it is imported
            for point in entry_points(group=ENTRY_POINTS):
                _register(point)


def _register(point: EntryPoint) -> None:
    """Load one; where that fails, a warning names its package, and its patterns are left out."""
    try:
        found = point.load()
        if isinstance(found, type) and issubclass(found, Pattern):
            if found not in _REGISTRY.values():
                raise TypeError("it is a pattern without a name of its own")
        elif not ismodule(found):  # whose import has registered what it defines
            raise TypeError(f"it is neither a Pattern nor a module: {shown(found)}")
    except (Exception, SystemExit) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        package = point.dist.name if point.dist is not None else point.module
        warn(
            f"patterns of the package {package!r} are left out: its entry point {point.name!r} = {point.value!r} "
            f"failed with {why if len(why) <= 300 else f'{why[:297]}...'}",
            RuntimeWarning,
            stacklevel=2,
        )


def pattern_names(kind: type = Pattern) -> tuple[str, ...]:
    """All registered names of that kind, third-party ones (entry-point group `sparsekit.patterns`) included."""
    _load_entry_points()
    return tuple(name for name, cls in _REGISTRY.items() if issubclass(cls, kind))


def pattern_class(name: str) -> type[Pattern]:
    """The pattern class of that name."""
    names = pattern_names()
    if name not in names:
        raise SparsekitError(f"unknown pattern {shown(name)}: one of {', '.join(names)}.{nearest(name, names)}")
    return _REGISTRY[name]


def parse_pattern(value: Pattern | str | Mapping[str, Any], where: str = "pattern") -> Pattern:
    """A pattern from what YAML says, a name or a mapping with `name` and parameters; errors begin with `where`."""
    if isinstance(value, Pattern):
        return value
    begin = f"{where}: " if where else ""
    fields = {"name": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping):
        raise SparsekitError(
            f"{begin}{shown(value)} is not a pattern; write a name, or a mapping with `name` and parameters."
        )
    if too_deep(fields):
        raise SparsekitError(f"{begin}patterns and lists in one another, more than {MOST_DEPTH} deep.")
    if not isinstance(fields.get("name"), str):
        raise SparsekitError(f"{begin}{shown(dict(fields))} needs a `name`: one of {', '.join(pattern_names())}.")
    try:
        return pattern_class(fields["name"]).from_fields(fields)
    except ValidationError as error:
        said = one_line(error, pattern_class(fields["name"]))
        raise SparsekitError(f"{begin}{fields['name']}: {said}") from None
    except SparsekitError as error:
        raise SparsekitError(f"{begin}{error}") from None
