"""Which query heads of which layers run a pattern, as the config that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsekit.config import ModelFacts, SparseConfig, format_range, load
from sparsekit.patterns import Pattern, parse_pattern

__all__ = ["Chosen", "whole_layers", "write_config", "write_heads"]

Chosen = Mapping[int, Sequence[int]]  # layer -> query heads, ascending; a layer without any is left out


def whole_layers(layers: Sequence[int], arch: ModelFacts) -> Chosen:
    """All query heads of these layers."""
    return {layer: tuple(range(arch.heads(layer))) for layer in layers}


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


def write_heads(
    arch: ModelFacts,
    chosen: Chosen,
    runs: Pattern,
    provenance: Mapping[str, Any],
    *,
    rest: Pattern | None = None,
    dense_below_tokens: int = 1024,
) -> SparseConfig:
    """A config of that model in which the chosen heads run one pattern, and all others another.

    Layers of which all heads are chosen stand under `layers`; of the others, those with the same heads share a line.

    Args:
        chosen: layer -> its query heads.
        runs: their pattern.
        rest: that of all other heads of full-attention layers, default dense.
    """
    whole = [layer for layer, heads in sorted(chosen.items()) if len(heads) == arch.heads(layer)]
    mixed: dict[str, list[int]] = {}
    for layer, heads in sorted(chosen.items()):
        if heads and layer not in whole:
            mixed.setdefault(format_range(sorted(heads)), []).append(layer)
    config = write_config(arch, dict.fromkeys(whole, runs), provenance, dense_below_tokens=dense_below_tokens)
    data = config.to_dict()
    data["default"] = "dense" if rest is None else rest.to_yaml()
    by_layer = {format_range(layers): {heads: runs.to_yaml()} for heads, layers in mixed.items()}
    first = lambda item: int(item[0].replace(",", "-").split("-")[0])  # noqa: E731
    said = data.pop("provenance")
    return load({**data, **({"heads": dict(sorted(by_layer.items(), key=first))} if mixed else {}), "provenance": said})
