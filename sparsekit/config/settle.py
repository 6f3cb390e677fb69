"""`dense_below_tokens: auto`, of a resolved config: numbers in its place, for one model on one device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from sparsekit.config.facts import ModelFacts
from sparsekit.config.layers import LayerPatterns
from sparsekit.config.precision import MODEL
from sparsekit.config.ranges import format_range
from sparsekit.config.schema import ResolvedConfig
from sparsekit.errors import SparsekitError
from sparsekit.patterns.crossover import Found, Place, device_name, find, rows_of_tables
from sparsekit.patterns.fields import AUTO, has_auto

__all__ = ["Machine", "fingerprint", "settle"]

MOST_NAMED = 6  # rows that an error names


class Machine(NamedTuple):
    """What a config runs on, as tables of crossovers know it.

    Attributes:
        device: its name; "" where none is known.
        dtype: of q, k and v.
        shards: processes that share the heads of a layer.
    """

    device: str
    dtype: str
    shards: int = 1

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        return cls(device_name(device), str(dtype).removeprefix("torch."))


def settle(
    resolved: ResolvedConfig, facts: ModelFacts, machine: Callable[[], Machine], *, strict: bool = True
) -> ResolvedConfig:
    """The same config with a number for each `auto`, and `settled`, which says of each where it comes from.

    A pattern's is what a table says of it for this device, head shape and dtype, and else the pattern's own default.
    The config's is what a table says of this very config, and nothing else.

    Args:
        facts: of the model, as for `resolve`.
        machine: asked where there is an `auto`.
        strict: without a row, the config's own `auto` is an error; False: it is 0, and `settled` says so.

    Raises:
        SparsekitError: a config that is not in the tables there, or a table that cannot be read.
    """
    whole = resolved.config.dense_below_tokens == AUTO
    if not whole and not any(has_auto(pattern) for layer in resolved.layers for pattern in layer.patterns):
        return resolved
    here, said = machine(), dict[str, list[int]]()
    layers = tuple(_layer(layer, facts, here, said) for layer in resolved.layers)
    lines = [f"layers {format_range(numbers)}: {text}" for text, numbers in said.items()]
    found = replace(resolved, layers=layers)
    if not whole:
        return replace(found, settled=tuple(lines))
    tokens, text = _whole(found, facts, here, strict)
    config = resolved.config.model_copy(update={"dense_below_tokens": tokens})
    return replace(found, config=config, settled=(*lines, f"dense_below_tokens auto is {text}"))


def fingerprint(resolved: ResolvedConfig, facts: ModelFacts) -> str:
    """By which tables know a config: what its layers run, its patterns' `dense_below_tokens` included, not its own; and
    which of them are left out, as the model has them with a window or of another kind."""
    left_out = sorted(resolved.own_layers(facts).keys() | resolved.window_layers(facts))
    said = [resolved.to_dict(), resolved.config.dense_impl, left_out]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _layer(layer: LayerPatterns, facts: ModelFacts, here: Machine, said: dict[str, list[int]]) -> LayerPatterns:
    if not any(map(has_auto, layer.patterns)):
        return layer
    place, told = _place(facts, here, len(layer.pattern_of_head)), list[str]()
    if layer.precision != MODEL:  # rows of patterns are measured in the model's
        place = place._replace(dtype=layer.precision)
    patterns = tuple(pattern.settled(place, told.append) for pattern in layer.patterns)
    for text in dict.fromkeys(told):
        said.setdefault(text, []).append(layer.layer)
    return replace(layer, patterns=patterns)


def _place(facts: ModelFacts, here: Machine, heads: int) -> Place:
    """With 0 for what is not known, which no row has."""
    key_heads = facts.num_key_heads or 0
    of_process = max(key_heads // here.shards, min(key_heads, 1))  # fewer key heads than processes: each has one
    return Place(here.device, heads // here.shards, of_process, facts.head_dim or 0, here.dtype)


def _whole(resolved: ResolvedConfig, facts: ModelFacts, here: Machine, strict: bool) -> Found:
    """What the config's own `auto` is."""
    place, key = _place(facts, here, facts.num_heads or 0), fingerprint(resolved, facts)
    if here.shards > 1:
        why = f"rows of configs are of whole layers, and {here.shards} processes share the heads of each"
    else:
        found = find(place, key)
        if found is not None:
            return found
        why = f"no table has this config on {place}"
    rows = [row for row, _ in rows_of_tables() if row.config is not None]
    mine = [row for row in rows if row.config == key]
    named = list(dict.fromkeys(f"{row.label} on {row.place}" for row in mine or rows))
    more = f", and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    there = f"of this config: {', '.join(str(row.place) for row in mine)}" if mine else "; ".join(named[:MOST_NAMED])
    known = f"rows there are: {there}{'' if mine else more}" if rows else "no table has a row of a config"
    if not strict:
        return Found(0, f"not known here, and counted as 0: {why}; {known}")
    raise SparsekitError(
        f"dense_below_tokens = {AUTO!r}: {why}; `sparsekit bench crossover CONFIG.yaml --model MODEL --dtype "
        f"{here.dtype}` measures it, or write a number ({known})."
    )
