"""Harm against start layer: what a pattern from some layer on does to the answers, to hold a probe against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparsekit.errors import SparsekitError
from sparsekit.lab.calibrate.effects import Judge
from sparsekit.lab.calibrate.probe import own_layers
from sparsekit.lab.calibrate.prompts import make_prompts
from sparsekit.lab.progress import progress
from sparsekit.lab.provenance import made_on
from sparsekit.lab.stats import mean_interval, share_interval
from sparsekit.lab.tasks import Task
from sparsekit.models import facts
from sparsekit.patterns import Pattern, parse_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Curve", "start_layer_curve"]


@dataclass(frozen=True)
class Curve:
    """One row a pattern and start layer: mean KL, half the width of its 95% interval, scores, share of same answers.

    Scores and `same` come with their 95% intervals, (mean, low, high).
    """

    model: str
    prompts: dict[str, Any]
    made: dict[str, Any]
    rows: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "curve", "model": self.model, "prompts": self.prompts, **self.made, "rows": list(self.rows)}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows) in words."""
        head = ["pattern", "from layer", "tiles", "KL", "95%", "score", "95%", "dense", "same"]
        rows = []
        for row in self.rows:
            score, low, high = row["score"]
            rows.append(
                [
                    row["pattern"],
                    str(row["start"]),
                    f"{row['tile_density']:.3f}",
                    f"{row['kl']:.5f}",
                    f"{row['kl_half_width']:.5f}",
                    f"{score:.2f}",
                    f"{low:.2f}-{high:.2f}",
                    f"{row['dense_score'][0]:.2f}",
                    f"{row['same'][0]:.2f}",
                ]
            )
        return head, rows


def start_layer_curve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    patterns: Sequence[Pattern | str | Mapping[str, Any]],
    starts: Sequence[int],
    *,
    samples: int = 96,
    tokens: int = 2200,
    seed: int = 0,
    tasks: Sequence[str | Task] = ("needle4",),
    records: str | Path | None = None,
    quiet: bool = False,
) -> Curve:
    """KL of the answer's tokens from dense, and scores, with each pattern in all layers from each start on.

    Layers that are not full causal attention stay as they are. `records` makes an interrupted run go on.
    """
    arch, own = facts(model), own_layers(model, some=True)
    last = max(layer for layer in range(arch.num_layers) if layer not in own)
    if not starts or not all(0 <= start <= last for start in starts):
        raise SparsekitError(f"starts {list(starts)}: at least one layer, out of 0-{last}, the last sparse one.")
    if not patterns:
        raise SparsekitError("patterns: at least one.")
    candidates = [parse_pattern(pattern) for pattern in patterns]
    prompts = make_prompts(model, tokenizer, tasks=tasks, tokens=[tokens], count=samples, seeds=[seed])
    judge = Judge(model, tokenizer, prompts, records)
    deepest_first = sorted(starts, reverse=True)
    points = [(pattern, start) for pattern in candidates for start in deepest_first]
    mixtures = [{i: p for i in range(start, arch.num_layers) if i not in own} for p, start in points]
    with progress("start layers", len(points) * len(prompts), quiet=quiet) as step:
        effects = judge.effects(mixtures, step)
    rows = []
    for (pattern, start), effect in zip(points, effects, strict=True):
        kl, width = mean_interval(effect.kl)
        rows.append(
            {
                "pattern": str(pattern),
                "start": start,
                "kl": kl,
                "kl_half_width": width,
                "score": share_interval(effect.score),
                "dense_score": share_interval(effect.dense_score),
                "same": share_interval(effect.same),
                "tile_density": mean(effect.tile_density.values()) if effect.tile_density else 1.0,
                "samples": len(effect.kl),
            }
        )
    described = {"tasks": sorted({p.task.name for p in prompts}), "tokens": tokens, "seed": seed}
    return Curve(arch.name, described, made_on(model), tuple(rows))
