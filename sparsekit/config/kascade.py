"""Kascade's head maps -> a sparsekit config: which layers choose, and whose choice the heads of the others reuse."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsekit.config.convert import finish, group_of
from sparsekit.config.facts import ModelFacts
from sparsekit.config.ranges import MOST, format_range
from sparsekit.config.schema import SparseConfig, load
from sparsekit.errors import SparsekitError, read_bytes, shown
from sparsekit.patterns import Pattern, parse_pattern

__all__ = ["convert_kascade"]


def convert_kascade(
    path: str | Path,
    output: str | Path | None = None,
    *,
    pattern: Pattern | str | Mapping[str, Any] = "xattention",
    anchors: Sequence[int] | None = None,
    group: int | None = None,
    model: ModelFacts | None = None,
) -> SparseConfig:
    """The config of one of Kascade's head maps (`results/head_mappings/NAME_layers_0_2_8.npy`), also written there.

    The file is an integer array, a row for each layer and a column for each key head: the key head of the nearest
    anchor layer before it whose choice this one reuses. The anchors stand in the file's name. Kascade attends to
    everything in layer 0, and still chooses there; here a dense layer makes no plan, so that layers which reuse layer 0
    choose for themselves. Which method chooses is not in the file: Kascade's own, the exact top k of a tile's softmax,
    is none of ours.

    Args:
        output: also write the config there.
        pattern: what the anchors run; a dynamic one.
        anchors: layers that choose; default by the file's name.
        group: query heads of a key head; default by `model`, without which it is needed.
        model: what the file must fit: so many layers and key heads.

    Raises:
        SparsekitError: the file, the layer, and what does not fit there.
    """
    where, runs, rows = str(path), parse_pattern(pattern), _rows(Path(path))
    count, key_heads = len(rows), len(rows[0])
    own = _anchors(Path(path), where, anchors, count)
    for name, said, number in (("num_layers", "layers", count), ("num_key_heads", "key heads a layer", key_heads)):
        if model is not None and getattr(model, name) not in (None, number):
            raise SparsekitError(f"{where}: {number} {said}, but the model has {getattr(model, name)}.")
    group = group_of(where, key_heads, group, model)
    first = [n for n in range(1, count) if n < min(own[1:], default=count)]  # they reuse layer 0
    rules: dict[str, Any] = {format_range(sorted({*own[1:], *first})): runs.to_yaml()} if count > 1 else {}
    for layer, row in enumerate(rows):
        wrong = next((head for head in row if not 0 <= head < key_heads), None)
        if wrong is not None:
            raise SparsekitError(
                f"{where}: layer {layer}: key head {wrong} of {key_heads}; allowed: 0-{key_heads - 1}."
            )
        if layer in own and list(row) != list(range(key_heads)):
            raise SparsekitError(f"{where}: layer {layer} is an anchor, and its heads map to {shown(list(row))}.")
        if layer not in own and layer not in first:
            anchor = max(n for n in own if n < layer)
            heads = [there * group + i for there in row for i in range(group)]
            rules[str(layer)] = {"reuse": anchor, "heads": heads}
    config = load(
        {
            "version": 1,
            "model": {"num_layers": count, "num_heads": group * key_heads, "num_key_heads": key_heads},
            "default": "dense",
            "layers": rules,
            "provenance": {
                "converted_from": Path(path).name,
                "format": "kascade",
                "anchors": own,
                "query_heads_of_each": group,
                **({"chosen_by_themselves": format_range(first)} if first else {}),
            },
        }
    )
    return finish(config, where, model, output)


def _anchors(path: Path, where: str, given: Sequence[int] | None, layers: int) -> list[int]:
    """Layer 0, which is always one, and the others, ascending."""
    if given is None:
        found = re.search(r"_layers_(\d{1,4}(?:_\d{1,4})*)$", path.stem)
        if found is None:
            raise SparsekitError(
                f"{where}: its name does not end in its anchors, as NAME_layers_0_2_8.npy does; say `anchors`."
            )
        given = [int(word) for word in found[1].split("_")]
    wrong = next((n for n in given if not 0 <= n < layers), None)
    if wrong is not None:
        raise SparsekitError(f"{where}: anchor {wrong} of a file with {layers} layers; allowed: 0-{layers - 1}.")
    return sorted({0, *given})


def _rows(path: Path) -> list[list[int]]:
    """The array, a list for each layer.

    Raises:
        SparsekitError: as `read_bytes`, or it is no two-dimensional integer array of numpy's format.
    """
    import numpy as np

    named, data = f"file {shown(str(path))}", read_bytes(path, "file")
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception:  # a header that is none raises whatever Python does
        raise SparsekitError(f"{named} is no array of numpy's .npy format.") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or not array.size or array.dtype.kind not in "iu":
        said = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise SparsekitError(
            f"{named} holds {said}; want whole numbers, a row for each layer, a column for each key head."
        )
    if max(array.shape) > MOST:
        raise SparsekitError(f"{named} holds {array.shape}: at most {MOST:,} layers and heads.")
    rows: list[list[int]] = array.tolist()
    return rows
