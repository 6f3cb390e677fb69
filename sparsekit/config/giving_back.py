"""The config in which layers, or heads, that a measurement found to harm run dense."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sparsekit.config.facts import ModelFacts
from sparsekit.config.precision import MODEL
from sparsekit.config.ranges import by_number, format_range, parse_range
from sparsekit.config.reuse import Reuse, pattern_reused
from sparsekit.config.schema import SparseConfig, load
from sparsekit.patterns import Pattern

__all__ = ["give_back"]


def give_back(
    config: SparseConfig,
    layers: Sequence[int],
    heads: Mapping[int, Sequence[int]] = MappingProxyType({}),
    *,
    facts: ModelFacts | None = None,
) -> SparseConfig:
    """The config with these layers dense, in the model's precision, and these heads of other layers dense; its
    provenance says so.

    A layer that reused the plan of one of them then runs the pattern itself by which that plan was made. Its budget
    says no more what was found on prompts: that was another config.

    Args:
        facts: of the model, by which a `precision` of all layers is spelled out; default what the config says.
    """
    if not (layers or heads):
        return config
    config = _unshared(config, layers, heads)
    whole = _give_back_layers(config, [layer for layer in layers if layer not in heads], facts)
    data = whole.to_dict()
    for layer, some in heads.items():
        before = by_number(data.get("heads", {})).get(layer, {})
        kept = {format_range(left): p for k, p in before.items() if (left := _without(parse_range(k), some))}
        mine = _left(data.get("heads", {}), [layer])
        data["heads"] = {**mine, str(layer): {**kept, format_range(sorted(some)): "dense"}}
    if heads:
        made = data.get("provenance", {})
        said = dict(made.get("heads_given_back_to_dense", {}))
        said.update({str(layer): _and_earlier(some, said.get(str(layer))) for layer, some in heads.items()})
        data["provenance"] = {**made, "heads_given_back_to_dense": said}
    if config.budget is not None:
        data["budget"] = {"kl": config.budget.kl}
    return load(data)


def _unshared(config: SparseConfig, layers: Sequence[int], heads: Mapping[int, Sequence[int]]) -> SparseConfig:
    """The config in which layers that reuse the plan of one of these, or of these heads, choose for themselves.

    So does a layer of which no head is left that would reuse what an estimate chose.
    """
    rules = by_number(config.layers)
    own = {layer: by_number(some) for layer, some in by_number(config.heads).items()}
    whole: dict[Pattern, list[int]] = {}
    single: dict[int, dict[int, Pattern]] = {}
    for layer, rule in rules.items():
        if not isinstance(rule, Reuse) or layer in layers:
            continue
        some = heads.get(rule.reuse, ())
        base, there = pattern_reused(rule, rules, config.default), own.get(rule.reuse, {})
        kept = rule.reuse not in layers and not (some if rule.heads is None else set(some) & set(rule.heads))
        if kept and layer in heads:
            count = config.model.heads(layer) if config.model and config.model.num_heads else 0
            taken = rule.heads if rule.heads is not None else range(count)
            left = [n for h, n in enumerate(taken) if h not in own.get(layer, {}) and h not in heads[layer]]
            kept = any(there.get(n, base).estimates for n in left)
        if kept:
            continue
        if rule.heads is not None:
            base = base.of_heads(rule.heads)
            there = {h: there[n].of_heads(rule.heads) for h, n in enumerate(rule.heads) if n in there}
        whole.setdefault(base, []).append(layer)
        single[layer] = {**there, **own.get(layer, {})}
    if not whole:
        return config
    data = config.to_dict()
    changed = {format_range(sorted(some)): pattern.to_yaml() for pattern, some in whole.items()}
    data["layers"] = {**_left(data["layers"], [*single]), **changed}
    of_heads = {str(layer): _by_head(some) for layer, some in single.items() if some}
    data["heads"] = {**_left(data.get("heads", {}), [*single]), **of_heads}
    if not data["heads"]:
        del data["heads"]
    return load(data)


def _by_head(patterns: Mapping[int, Pattern]) -> dict[str, Any]:
    heads: dict[Pattern, list[int]] = {}
    for head, pattern in sorted(patterns.items()):
        heads.setdefault(pattern, []).append(head)
    return {format_range(some): pattern.to_yaml() for pattern, some in heads.items()}


def _left(rules: Mapping[str, Any], numbers: Collection[int]) -> dict[str, Any]:
    """The rules without these layers."""
    return {format_range(left): rule for key, rule in rules.items() if (left := _without(parse_range(key), numbers))}


def _without(numbers: Sequence[int], others: Collection[int]) -> list[int]:
    return [n for n in numbers if n not in others]


def _give_back_layers(config: SparseConfig, layers: Sequence[int], facts: ModelFacts | None) -> SparseConfig:
    if not layers:
        return config
    given, data = set(layers), config.to_dict()
    data["layers"] = {**_left(data.get("layers", {}), given), format_range(sorted(given)): "dense"}
    data["heads"] = _left(data.get("heads", {}), given)
    if not data["heads"]:
        del data["heads"]
    words = config.precision
    if isinstance(words, str) and words != MODEL and config.dense_impl == "kernel":
        words = {format_range([at.layer for at in config.resolve(facts).layers if at.precision != MODEL]): words}
    if not isinstance(words, str):  # a word is of layers that sparsekit's kernel runs, and a dense one is none
        data["precision"] = _left(words, given)
    made = data.get("provenance", {})
    said = _and_earlier(given, made.get("given_back_to_dense"))
    data["provenance"] = {**made, "given_back_to_dense": said}
    return load(data)


def _and_earlier(numbers: Iterable[int], earlier: Any) -> str:
    """These and the ones that a config's provenance says already: they are dense still."""
    return format_range(sorted({*numbers, *(parse_range(str(earlier)) if earlier is not None else ())}))
