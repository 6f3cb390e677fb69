"""`precision`: layers whose products are in another precision than the model's, in words and by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sparsekit.config.layers import IMPLS, LayerPatterns
from sparsekit.config.ranges import by_number, numbers_within, ranged
from sparsekit.errors import SparsekitError, nearest, shown

__all__ = ["MODEL", "Precision", "asked_precision", "in_precision", "parse_precision"]

MODEL = "model"  # the dtype of q, k and v
Precision = str | dict[str, str]  # of all layers that sparsekit's kernel runs, or by ranges of layers

_WORDS = " or ".join(map(repr, IMPLS))


def parse_precision(value: Any) -> Precision:
    """The value of the field: a word, or ranges of layers with a word each.

    Raises:
        SparsekitError: neither, as pydantic wants it.
    """
    if isinstance(value, Mapping):
        words = ranged(value)
        for key, word in words.items():
            _check_word(word, f"{shown(key)} = {shown(word)}: it should be {_WORDS}")
        return words
    _check_word(value, f"it should be {_WORDS}, or ranges of layers with one of them each", ValueError)
    return str(value)


def _check_word(word: Any, wrong: str, error: type[ValueError] = SparsekitError) -> None:
    if not isinstance(word, str) or word not in IMPLS:
        hint = nearest(word, IMPLS) if isinstance(word, str) else ""
        raise error(f"{wrong}{hint and '.'}{hint}")


def asked_precision(precision: Precision) -> Any:
    """What it asks for as JSON, however it is spelled: a word, or [layer, word] pairs; None: nothing."""
    if isinstance(precision, str):
        return None if precision == MODEL else precision
    return sorted([layer, word] for layer, word in by_number(precision).items() if word != MODEL) or None


def in_precision(
    precision: Precision, layers: Sequence[LayerPatterns], own: Mapping[int, str], dense_impl: str
) -> tuple[LayerPatterns, ...]:
    """The layers of a model in their precision.

    Args:
        own: why layers keep their own attention.
        dense_impl: of the config.

    Raises:
        SparsekitError: a range that leaves the model, one that names a layer that the model's own attention runs, or
            layers of two precisions that share a plan.
    """
    if isinstance(precision, str):
        runs = [at.layer not in own and (not at.dense or dense_impl == "kernel") for at in layers]
        made = tuple(replace(at, precision=precision) if here else at for at, here in zip(layers, runs, strict=True))
    else:
        words: dict[int, str] = {}
        for key, word in precision.items():
            field = f"precision.{shown(key)}"
            for layer in numbers_within(field, key, len(layers), "layer"):
                if word != MODEL:
                    _check_runs(f"{field} = {word!r}: layer {layer}", layers[layer], own, dense_impl)
                words[layer] = word
        made = tuple(replace(at, precision=words.get(at.layer, MODEL)) for at in layers)
    for at in made:
        there = None if at.reused is None else made[at.reused.layer]
        if there is not None and there.precision != at.precision:
            raise SparsekitError(
                f"precision: layer {at.layer} is in {at.precision!r} and runs the plan of layer {there.layer}, "
                f"which is in {there.precision!r} and has other tiles; give both one precision."
            )
    return made


def _check_runs(where: str, layer: LayerPatterns, own: Mapping[int, str], dense_impl: str) -> None:
    """That sparsekit's kernel runs a layer."""
    if layer.layer in own:
        raise SparsekitError(f"{where} keeps its own attention ({own[layer.layer]}); leave it out.")
    if layer.dense and dense_impl == "model":
        raise SparsekitError(
            f"{where} is dense and runs the model's own attention; leave it out, give it a sparse pattern, or set "
            "dense_impl: kernel."
        )
