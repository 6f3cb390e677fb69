"""SparseConfig: which layer, and which head, attends how. Read from YAML, checked whole, frozen.

Explicit head > layer rule > default. Nothing is guessed: what does not fit is an error that names the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sparsekit.config.budget import Budget
from sparsekit.config.facts import NEEDED, ModelFacts
from sparsekit.config.hub import HUB, downloaded
from sparsekit.config.layers import LayerPatterns
from sparsekit.config.precision import MODEL, Precision, in_precision, parse_precision
from sparsekit.config.ranges import MOST, by_number, format_range, numbers_within, parse_range, ranged
from sparsekit.config.reuse import AnyPattern, LayerRule, Reuse, resolve_reuse
from sparsekit.config.strict_yaml import MOST_DEPTH, MOST_VALUES, dump_yaml, parse_yaml
from sparsekit.errors import SparsekitError, one_line, read_text, shown, writing
from sparsekit.patterns import Pattern, bounded, parse_pattern, shared_correction
from sparsekit.patterns.fields import tokens_or_auto

__all__ = ["ResolvedConfig", "SparseConfig", "load"]

MOST_IN_A_FIELD = 4096  # values of a list; a model has at most 1,024 layers, and heads of a layer


@dataclass(frozen=True)
class ResolvedConfig:
    """A config spelled out for one model: the patterns of every layer and head, nothing left to a rule.

    Attributes:
        settled: of each `dense_below_tokens: auto`, what it is here and where that comes from; empty until
            `sparsekit.config.settle.settle` made numbers of them.
    """

    config: SparseConfig
    layers: tuple[LayerPatterns, ...]
    settled: tuple[str, ...] = ()

    def own_layers(self, model: ModelFacts | None = None) -> dict[int, str]:
        """Layers that keep their own attention because they are not full causal attention, each with the reason.

        A sliding layer that a rule names as `a_shape` without sinks, with the model's window or a narrower one, is not
        among them: that is what such a layer computes, and sparsekit needs no N x N mask for it.

        Args:
            model: the real model's facts; default what the file says.

        Raises:
            SparsekitError: a rule names such a layer and gives it another sparse pattern, a layer is to run here whose
                attention no kernel computes, or one reuses the plan of a layer that keeps its own attention.
        """
        facts, own = model or self.config.model, {}
        for i, patterns in enumerate(self.layers):
            kind, window = facts.kind(i), facts.window(i)
            reason = f"{kind} layer of the model"
            if kind != "full_attention" and (patterns.dense or not self._named(i)):
                own[i] = reason
            elif kind not in ("full_attention", "sliding_attention") or (kind == "sliding_attention" and not window):
                raise SparsekitError(
                    f"layer {i}: {patterns} cannot replace a {reason}; only full causal attention can be run sparse: "
                    "leave the layer out of `layers` and `heads`, and it keeps its own attention."
                )
            elif kind == "sliding_attention" and not patterns.within(window):
                raise SparsekitError(
                    f"layer {i}: {patterns} cannot replace a {reason}, whose window is {window} tokens; it can be "
                    f"{{name: a_shape, sink_tokens: 0, window_tokens: {window}}} or narrower: or leave the layer out "
                    "of `layers` and `heads`, and it keeps its own attention."
                )
            elif facts.not_computed and facts.not_computed[i] and self._runs_here(patterns):
                raise SparsekitError(
                    f"layer {i} runs {patterns}, but {facts.not_computed[i]}, which no kernel here computes; leave the "
                    f"layer dense{', with dense_impl: model' if patterns.dense else ''}."
                )
        for i, patterns in enumerate(self.layers):
            if patterns.reused is not None and patterns.reused.layer in own:
                there = patterns.reused.layer
                raise SparsekitError(
                    f"layer {i}: reuse = {there}: that layer keeps its own attention ({own[there]}) and makes no plan; "
                    "reuse one that is full causal attention."
                )
        return own

    def window_layers(self, model: ModelFacts | None = None) -> frozenset[int]:
        """Layers with a window in the model that sparsekit's kernel runs. Arguments and errors: `own_layers`."""
        facts, own = model or self.config.model, self.own_layers(model)
        return frozenset(i for i in range(len(self.layers)) if i not in own and facts.window(i) is not None)

    def _runs_here(self, patterns: LayerPatterns) -> bool:
        """Whether sparsekit's kernel runs a layer."""
        return not patterns.dense or self.config.dense_impl == "kernel"

    def _named(self, layer: int) -> bool:
        """Whether a rule names the layer, rather than `default` alone."""
        return layer in self._named_layers

    @cached_property
    def _named_layers(self) -> frozenset[int]:
        return frozenset(layer for key in (*self.config.layers, *self.config.heads) for layer in parse_range(key))

    def to_dict(self) -> list[dict[str, Any]]:
        """One object a layer, for result files: layer, whose plan it reuses, its precision if that is not the model's,
        its patterns with parameters and heads."""
        return [
            {
                "layer": layer.layer,
                **({} if layer.reused is None else {"reuse": layer.reused.layer, "of_head": list(layer.reused.heads)}),
                **({} if layer.precision == MODEL else {"precision": layer.precision}),
                "patterns": [
                    {**pattern.model_dump(mode="json"), "heads": format_range(heads)}
                    for pattern, heads in layer.groups()
                ],
            }
            for layer in self.layers
        ]


class SparseConfig(BaseModel):
    """A validated sparsekit YAML file.

    Attributes:
        version: 1.
        model: facts that are checked against the model it is applied to.
        dense_below_tokens: prompts shorter than this run the model's own attention; "auto": than a table says of this
            config on the device (`sparsekit.patterns.crossover`).
        min_queries: a call with fewer queries is decoding, and runs the model's own attention.
        dense_impl: dense layers run the model's own attention function ("model"), or sparsekit's kernel ("kernel").
        precision: of the products in layers that sparsekit's kernel runs: the dtype of q, k and v ("model") or "fp8"
            (from compute capability 8.9 on), for all of them or as layers -> precision.
        default: the pattern of layers that no rule names.
        layers: "0-15" or "3" or "0,4,8-11" -> pattern, or `{reuse: LAYER}`.
        heads: layers -> query heads -> pattern; wins over `layers`.
        budget: what it promises; it changes nothing that runs, `sparsekit.check` holds the config to it.
        provenance: how calibration wrote this file; free-form.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    model: ModelFacts = ModelFacts()
    dense_below_tokens: int | Literal["auto"] = Field(0, ge=0)
    min_queries: int = Field(64, ge=2)
    dense_impl: Literal["model", "kernel"] = "model"
    precision: Precision = MODEL
    default: AnyPattern = Field(default_factory=lambda: parse_pattern("dense"))
    layers: dict[str, LayerRule] = {}
    heads: dict[str, dict[str, AnyPattern]] = {}
    budget: Budget | None = None
    provenance: dict[str, Any] = {}

    _bounded = field_validator("min_queries", mode="before")(bounded)
    _precision = field_validator("precision", mode="plain")(parse_precision)
    _tokens_or_auto = field_validator("dense_below_tokens", mode="plain")(tokens_or_auto)

    @field_validator("version", mode="before")
    @classmethod
    def _whole_version(cls, value: Any) -> Any:
        if isinstance(value, bool | float):  # which Python takes for equal to 1
            raise ValueError("it should be the whole number 1")
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _layer_ranges(cls, value: Any) -> Any:
        """Keys may be numbers in YAML; they are ranges here, none of which overlap."""
        return ranged(value) if isinstance(value, Mapping) else value

    @field_validator("heads", mode="before")
    @classmethod
    def _head_ranges(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        by_layer = ranged(value)
        for key, rules in by_layer.items():
            if isinstance(rules, Mapping):
                try:
                    by_layer[key] = ranged(rules)
                except SparsekitError as error:
                    raise SparsekitError(f"{shown(key)}: {error}") from None
        return by_layer

    # ---- reading and writing

    @classmethod
    def load(cls, source: SparseConfig | Mapping[str, Any] | str | Path) -> SparseConfig:
        """A config from whatever `load` takes."""
        return load(source)

    def to_dict(self) -> dict[str, Any]:
        """What was said, and no more: `load(x.to_dict()) == x`."""
        out: dict[str, Any] = {"version": self.version}
        for name in type(self).model_fields:
            if name == "version" or name not in self.model_fields_set:
                continue
            out[name] = _to_yaml(getattr(self, name))
        return out

    def dump(self, path: str | Path | None = None, *, folders: bool = False) -> str:
        """The YAML text, also written to `path` where one is given; `folders`: in folders that are made.

        Raises:
            SparsekitError: it cannot be written.
        """
        text = dump_yaml(self.to_dict(), "config")
        if path is not None:
            with writing(path, folders=folders) as part:
                part.write_text(text, encoding="utf-8")
        return text

    # ---- meaning

    @property
    def dense_below(self) -> int:
        """`dense_below_tokens`, of a config in which it is a number.

        Raises:
            SparsekitError: it is `auto`, and was not settled.
        """
        if self.dense_below_tokens == "auto":
            raise SparsekitError(
                "dense_below_tokens = 'auto' is no number yet; sparsekit.apply makes it one, and so does "
                "sparsekit.config.settle.settle for a device."
            )
        return self.dense_below_tokens

    def why_dense(self, queries: int, tokens: int) -> str:
        """Why a call of `queries` queries in a prompt of `tokens` tokens runs the model's own attention, or nothing."""
        if queries < self.min_queries:
            return f"{queries} queries, fewer than min_queries {self.min_queries}"
        if tokens < self.dense_below:
            return f"{tokens} tokens, fewer than dense_below_tokens {self.dense_below}"
        return ""

    def resolve(self, facts: ModelFacts | None = None) -> ResolvedConfig:
        """The patterns of every layer and head of a model.

        Args:
            facts: the real model's; default what the file says.

        Raises:
            SparsekitError: the file is for another model, a layer or head is out of range, or numbers are missing; a
                `precision` of layers that the model's own attention runs.
        """
        facts = facts or self.model
        self._check_model(facts)
        if facts.num_layers is None or facts.num_heads is None:
            raise SparsekitError(
                "model: num_layers and num_heads are needed to resolve this config; write them under `model:`."
            )
        for name, count in (("num_layers", facts.num_layers), ("num_heads", facts.num_heads)):
            if not 1 <= count <= MOST:
                raise SparsekitError(f"model.{name} = {shown(count)}: it should be from 1 to {MOST:,}.")
        base: list[Pattern | Reuse] = [self.default] * facts.num_layers
        where: dict[int, str] = {}  # the field that gives a layer its rule, where it is not `default`
        for key, pattern in self.layers.items():
            field = f"layers.{shown(key)}"
            for layer in numbers_within(field, key, facts.num_layers, "layer"):
                base[layer], where[layer] = pattern, field
        rules: dict[int, str] = {}  # the key in `heads` that names the layer, if one does
        for key, by_head in self.heads.items():
            named = numbers_within(f"heads.{shown(key)}", key, facts.num_layers, "layer")
            rules |= dict.fromkeys(named, key)
            for heads in by_head:
                numbers_within(f"heads.{shown(key)}.{shown(heads)}", heads, min(map(facts.heads, named)), "head")
        made: dict[tuple[Pattern, str | None, int], LayerPatterns] = {}
        layers: list[LayerPatterns] = []
        for i, rule in enumerate(base):
            key_of_heads, count = rules.get(i), facts.heads(i)
            if isinstance(rule, Reuse):
                own = self._own_heads(key_of_heads)
                chosen, reused = resolve_reuse(rule, where[i], i, count, layers, own)
                layers.append(replace(_layer(i, chosen), reused=reused))
                continue
            same = (rule, key_of_heads, count)
            if same not in made:
                own = self._own_heads(key_of_heads)
                made[same] = _layer(i, [own.get(head, rule) for head in range(count)])
            layers.append(replace(made[same], layer=i))
        for anchor, (last, reused) in {x.reused.layer: (x.layer, x.reused) for x in layers if x.reused}.items():
            layers[anchor] = replace(layers[anchor], shared=True)
            layers[last] = replace(layers[last], reused=replace(reused, last=True))
        resolved = ResolvedConfig(self, tuple(layers))
        if self.precision == MODEL:
            return resolved
        return replace(
            resolved, layers=in_precision(self.precision, layers, resolved.own_layers(facts), self.dense_impl)
        )

    def _own_heads(self, key: str | None) -> dict[int, Pattern]:
        """The patterns that a key of `heads` gives to single heads."""
        return by_number(self.heads[key]) if key is not None else {}

    def _check_model(self, facts: ModelFacts) -> None:
        if name := self.model.differs(facts):
            label = f" ({self.model.name})" if self.model.name else ""
            raise SparsekitError(
                f"model.{name}: this config is for a model with {name} = {getattr(self.model, name)}{label}, but the "
                f"model has {getattr(facts, name)}{f' ({facts.name})' if facts.name else ''}; use that model's config."
            )


def load(source: SparseConfig | Mapping[str, Any] | str | Path) -> SparseConfig:
    """A SparseConfig from a path to a YAML file, `hub:owner/name`, YAML text, a mapping, or a config.

    A string with a line break or a colon and space in it, or one that starts with "{", is text (so is an empty one).
    One that starts with "hub:" is a file of a repository of the Hugging Face Hub, which is downloaded:
    `hub:owner/name`, `hub:owner/name@revision`, and either with `/file.yaml`. Any other is a path.

    Raises:
        SparsekitError: one line that names the file, the field, the value, and what is allowed.
    """
    if isinstance(source, SparseConfig):
        return source
    if isinstance(source, Mapping):
        return _validate(source, "config")
    if isinstance(source, str) and (
        not source.strip() or "\n" in source or ": " in source or source.lstrip().startswith("{")
    ):
        return _validate(parse_yaml(source, "config"), "config")
    if not isinstance(source, str | Path):
        raise SparsekitError(
            f"config {shown(source)}: want a path, hub:owner/name, YAML text, a mapping or a SparseConfig."
        )
    name = source.as_posix() if isinstance(source, Path) else source
    if name.startswith(HUB):
        return _for_a_named_model(_validate(parse_yaml(read_text(downloaded(name), "config"), name), name), name)
    return _validate(parse_yaml(read_text(source, "config"), str(source)), str(source))


def _for_a_named_model(config: SparseConfig, where: str) -> SparseConfig:
    """The config, if it says which model it fits."""
    if missing := config.model.missing():
        raise SparsekitError(
            f"{where}: model.{missing[0]} is missing; a config of the hub says for which model it is, by "
            f"{', '.join(NEEDED)}."
        )
    return config


def _validate(data: Any, where: str) -> SparseConfig:
    if data is None:
        raise SparsekitError(f"{where}: empty; the least config is `version: 1` with a `default` or `layers`.")
    if not isinstance(data, Mapping):
        kind = "list" if isinstance(data, list) else type(data).__name__
        raise SparsekitError(f"{where}: a mapping is needed (version, model, default, layers, ...), this is a {kind}.")
    _check_size(data, where)
    try:
        return SparseConfig.model_validate(dict(data))
    except ValidationError as error:
        raise SparsekitError(f"{where}: {one_line(error, SparseConfig)}") from None


def _check_size(data: Mapping[str, Any], where: str) -> None:
    """That a mapping is no larger than YAML may be, what it holds twice counted twice, before it is read."""
    count, todo = 0, [(name != "provenance", 0, value) for name, value in data.items()]
    while todo:
        is_field, depth, value = todo.pop()
        if not isinstance(value, Mapping | list | tuple) or depth > 3 * MOST_DEPTH:  # the fields say what is too deep
            continue
        if is_field and len(value) > MOST_IN_A_FIELD and not isinstance(value, Mapping):
            raise SparsekitError(f"{where}: a list of {len(value):,} values; at most {MOST_IN_A_FIELD:,}.")
        count += len(value)
        if count > MOST_VALUES:
            raise SparsekitError(f"{where}: more than {MOST_VALUES:,} values.")
        todo += [(is_field, depth + 1, one) for one in (value.values() if isinstance(value, Mapping) else value)]


def _layer(layer: int, of_head: Sequence[Pattern]) -> LayerPatterns:
    """A layer by the pattern of each of its heads."""
    number: dict[Pattern, int] = {}
    pattern_of_head = tuple(number.setdefault(pattern, len(number)) for pattern in of_head)
    shared_correction(number, f"layer {layer}: ")
    alone = next((pattern.name for pattern in number if pattern.whole_layer), "")
    if alone and len(number) > 1:
        others = ", ".join(sorted({pattern.name for pattern in number} - {alone})) or "another of its kind"
        raise SparsekitError(
            f"layer {layer}: {alone} needs a layer of its own, but other heads run {others}: give all heads of the "
            f"layer {alone}, or none."
        )
    return LayerPatterns(layer, tuple(number), pattern_of_head)


def _to_yaml(value: Any) -> Any:
    if isinstance(value, Pattern | Reuse):
        return value.to_yaml()
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {key: _to_yaml(item) for key, item in value.items()}
    return value
