"""The config in which layers, or heads, that a measurement found to harm run dense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sparsekit.config.ranges import format_range, parse_range
from sparsekit.config.schema import SparseConfig, load

__all__ = ["give_back"]


def give_back(
    config: SparseConfig, layers: Sequence[int], heads: Mapping[int, Sequence[int]] = MappingProxyType({})
) -> SparseConfig:
    """The config with these layers dense, and these heads of other layers; its provenance says so.

    Its budget says no more what was found on prompts: that was another config.
    """
    if not (layers or heads):
        return config
    whole = _give_back_layers(config, [layer for layer in layers if layer not in heads]) if layers else config
    data = whole.to_dict()
    for layer, some in heads.items():
        mine = {}
        for key, rule in data.pop("heads", {}).items():
            numbers = parse_range(key)
            rest = [n for n in numbers if n != layer]
            mine.update({format_range(rest): rule} if rest else {})
            if layer in numbers:
                kept = {format_range(left): p for k, p in rule.items() if (left := _without(parse_range(k), some))}
                mine[str(layer)] = kept
        mine[str(layer)] = {**mine.get(str(layer), {}), format_range(sorted(some)): "dense"}
        data["heads"] = mine
    if heads:
        made = data.get("provenance", {})
        said = dict(made.get("heads_given_back_to_dense", {}))
        said.update({str(layer): _and_earlier(some, said.get(str(layer))) for layer, some in heads.items()})
        data["provenance"] = {**made, "heads_given_back_to_dense": said}
    if config.budget is not None:
        data["budget"] = {"kl": config.budget.kl}
    return load(data)


def _without(numbers: Sequence[int], others: Sequence[int]) -> list[int]:
    return [n for n in numbers if n not in others]


def _give_back_layers(config: SparseConfig, layers: Sequence[int]) -> SparseConfig:
    if not layers:
        return config
    given, data = set(layers), config.to_dict()
    for name in ("layers", "heads"):
        kept = {}
        for key, value in data.get(name, {}).items():
            rest = [n for n in parse_range(key) if n not in given]
            if rest:
                kept[format_range(rest)] = value
        data[name] = kept
    data["layers"] = {**data["layers"], format_range(sorted(given)): "dense"}
    if not data["heads"]:
        del data["heads"]
    made = data.get("provenance", {})
    said = _and_earlier(given, made.get("given_back_to_dense"))
    data["provenance"] = {**made, "given_back_to_dense": said}
    return load(data)


def _and_earlier(numbers: Iterable[int], earlier: Any) -> str:
    """These and the ones that a config's provenance says already: they are dense still."""
    return format_range(sorted({*numbers, *(parse_range(str(earlier)) if earlier is not None else ())}))
