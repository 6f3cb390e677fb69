"""Heads in the order in which they can be given up: by the probe's Grad(Middle) of each, or by what was measured.

TriangleMix (2507.21526) ranks layers. A head's gradient is that of a factor of its own, which the same backward pass
gives; nothing was published on heads, and all orders here are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit.config import ModelFacts
from sparsekit.config.convert import duo_attention_scores
from sparsekit.errors import SparsekitError, nearest, shown
from sparsekit.lab.calibrate.mixture import Chosen
from sparsekit.lab.calibrate.probe import LayerProbe, Probe, own_layers
from sparsekit.models import facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SCORES", "Head", "chosen_of", "head_scores", "in_order", "read_scores"]

Head = tuple[int, int]  # layer, query head


def _of(name: str) -> Callable[[LayerProbe, int], float]:
    return lambda layer, head: abs(getattr(layer, name)[head]["middle"])


def _gradient_mass(layer: LayerProbe, head: int) -> float:
    return _of("heads")(layer, head) * _of("head_mass")(layer, head)


# What a probe says of a head: the mean of |dy/dtheta| over the Middle section, the absolute value of the mean of
# dy/dtheta, and the first times the mean attention weight there.
SCORES: dict[str, Callable[[LayerProbe, int], float]] = {
    "gradient": _of("heads"),
    "signed": _of("head_signed"),
    "gradient_mass": _gradient_mass,
}


def head_scores(probe: Probe, by: str = "gradient") -> dict[Head, float]:
    """The score of each head of each layer that was probed; the larger, the more the answer needs its Middle section.

    Raises:
        SparsekitError: an unknown score, a probe without heads or with numbers that rank nothing.
    """
    if by not in SCORES:
        raise SparsekitError(f"rank {shown(by)}: of a probe {', '.join(SCORES)}.{nearest(by, SCORES)}")
    probed = [layer for layer in probe.layers if layer.gradient is not None]
    if not all(layer.heads and layer.head_signed and layer.head_mass for layer in probed):
        raise SparsekitError(f"probe of {probe.model}: it has no numbers of heads for {by!r}; probe once more.")
    found = {(layer.layer, head): SCORES[by](layer, head) for layer in probed for head in range(len(layer.heads))}
    if not found or not 0 < max(found.values()) < math.inf or any(map(math.isnan, found.values())):
        told = f"{by} of {min(found.values())} to {max(found.values())}" if found else "no layer was probed"
        raise SparsekitError(
            f"probe of {probe.model}: {told}, so no head can be told from another; probe in float32 (--dtype float32), "
            "longer prompts, or a model of full attention."
        )
    return found


def read_scores(path: str | Path, model: PreTrainedModel) -> dict[Head, float]:
    """A score of each query head of each layer of full attention: its key head's, of a table such as DuoAttention's.

    Raises:
        SparsekitError: the file, the line, and what does not fit there, or does not fit the model.
    """
    arch, own = facts(model), own_layers(model, some=True)
    rows = duo_attention_scores(path, arch)
    if len(rows) != arch.num_layers:
        raise SparsekitError(f"{path}: scores of {len(rows)} layers, but the model has {arch.num_layers}.")
    each = {layer: arch.heads(layer) // arch.num_key_heads for layer in range(arch.num_layers) if layer not in own}
    return {(layer, h): rows[layer][h // size] for layer, size in each.items() for h in range(arch.heads(layer))}


def in_order(scores: Mapping[Head, float], arch: ModelFacts, *, whole_groups: bool = False) -> list[tuple[Head, ...]]:
    """Heads, each alone or with those of its key head, by rising sum of scores; ties go to the deeper layer."""
    groups: dict[tuple[int, int], list[Head]] = {}
    for layer, head in sorted(scores):
        size = arch.heads(layer) // (arch.num_key_heads or 1) if whole_groups else 1
        groups.setdefault((layer, head // size), []).append((layer, head))
    units = [tuple(heads) for heads in groups.values()]
    return sorted(units, key=lambda heads: (sum(scores[head] for head in heads), -heads[0][0], heads[0][1]))


def chosen_of(units: Sequence[Sequence[Head]]) -> Chosen:
    """Heads as layer -> its heads."""
    found: dict[int, list[int]] = {}
    for layer, head in sorted(head for heads in units for head in heads):
        found.setdefault(layer, []).append(head)
    return {layer: tuple(heads) for layer, heads in found.items()}
