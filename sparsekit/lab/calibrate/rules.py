"""Layer rules: from a probe, or from you, to the layers that run a sparse pattern, and a config that says how.

TriangleMix chose its layers by looking at the probe's plot; no threshold or rule was published. What is here is ours,
and the config says which rule and which constant chose its layers. A rule judges by the probe alone: the gate judges by
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sparsekit.config import ModelFacts, SparseConfig, format_range, load, parse_range
from sparsekit.errors import SparsekitError, nearest
from sparsekit.lab.calibrate.probe import Probe
from sparsekit.patterns import Pattern, parse_pattern

__all__ = ["RULES", "apply_rule", "from_list", "lowest_k", "search", "suffix", "write_config"]

RULES = ("suffix", "lowest_k", "list", "search")
NOTE = "the rule and its constant are sparsekit's choice; no publication gives them"


def suffix(probe: Probe, epsilon: float = 0.2) -> list[int]:
    """The longest run of layers up to the last one in which Grad(Middle) is below `epsilon` of its maximum.

    Layers that keep their own attention neither join nor end the run.
    """
    if not 0 < epsilon <= 1:
        raise SparsekitError(f"epsilon = {epsilon}: a share of the largest gradient, above 0 and up to 1.")
    chosen: list[int] = []
    for layer, share in reversed(list(enumerate(probe.relative()))):
        if share is None:
            continue
        if share >= epsilon:
            break
        chosen.append(layer)
    return chosen[::-1]


def lowest_k(probe: Probe, k: int) -> list[int]:
    """The `k` layers of the smallest Grad(Middle), wherever they are; ties go to the deeper layer."""
    shares = [(share, -layer) for layer, share in enumerate(probe.relative()) if share is not None]
    if not 0 <= k <= len(shares):
        raise SparsekitError(f"k = {k}: from 0 to {len(shares)}, the layers that were probed.")
    return sorted(-layer for _, layer in sorted(shares)[:k])


def from_list(layers: str | Sequence[int], num_layers: int) -> list[int]:
    """Layers as you say: `"5,7,10,15-35"`, or numbers."""
    numbers = sorted(set(parse_range(layers) if isinstance(layers, str) else layers))
    if numbers and not 0 <= numbers[0] <= numbers[-1] < num_layers:
        raise SparsekitError(f"layers {format_range(numbers)}: the model has 0-{num_layers - 1}.")
    return numbers


def search(probe: Probe, bears: Callable[[Sequence[int]], bool]) -> tuple[list[int], int]:
    """(layers, how often `bears` was asked): the most layers, taken by rising Grad(Middle), that a measurement bears.

    `bears(layers)` runs a model with these layers sparse and says whether that is good enough. By bisection, so it
    takes the measurement to fail for good once it fails; what comes back was itself measured, or is empty.
    """
    order = _by_gradient(probe)
    low, high, asked = 0, len(order) + 1, 0  # `low` layers are borne; `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        asked += 1
        low, high = (middle, high) if bears(sorted(order[:middle])) else (low, middle)
    return sorted(order[:low]), asked


def _by_gradient(probe: Probe) -> list[int]:
    count = sum(share is not None for share in probe.relative())
    return sorted(lowest_k(probe, count), key=lambda layer: (probe.relative()[layer], -layer))


def apply_rule(
    rule: str,
    probe: Probe | None,
    *,
    num_layers: int,
    epsilon: float = 0.2,
    k: int | None = None,
    layers: str | Sequence[int] | None = None,
    bears: Callable[[Sequence[int]], bool] | None = None,
) -> tuple[list[int], dict[str, Any]]:
    """(layers, provenance) of a rule by name; see `suffix`, `lowest_k`, `from_list` and `search`."""
    if rule not in RULES:
        raise SparsekitError(f"rule {rule!r}: one of {', '.join(RULES)}.{nearest(rule, RULES)}")
    if rule == "list":
        if layers is None:
            raise SparsekitError("rule 'list' needs the layers.")
        return from_list(layers, num_layers), {"rule": "list", "note": "layers were given, not measured"}
    if probe is None:
        raise SparsekitError(f"rule {rule!r} needs a probe: `sparsekit calibrate probe MODEL -o probe.json`.")
    if len(probe.layers) != num_layers:
        raise SparsekitError(f"the probe is of a model of {len(probe.layers)} layers, this one has {num_layers}.")
    said: dict[str, Any] = {"rule": rule, "note": NOTE, "probe": _of_probe(probe)}
    if rule == "suffix":
        return suffix(probe, epsilon), {**said, "epsilon": epsilon}
    if rule == "lowest_k":
        if k is None:
            raise SparsekitError("rule 'lowest_k' needs k, the number of layers.")
        return lowest_k(probe, k), {**said, "k": k}
    if bears is None:
        raise SparsekitError("rule 'search' needs a measurement, and so a model.")
    found, asked = search(probe, bears)
    return found, {**said, "measurements": asked}


def _of_probe(probe: Probe) -> dict[str, Any]:
    shares = [None if share is None else round(share, 4) for share in probe.relative()]
    return {
        "samples": probe.samples,
        **probe.prompts,
        **asdict(probe.sections),
        **probe.made,
        "middle_gradient_of_max": shares,
    }


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
