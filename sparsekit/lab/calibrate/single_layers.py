"""What the gradient predicts: a pattern in one layer at a time, its divergence held against the probe's Grad(Middle).

TriangleMix (2507.21526) chooses layers by Grad(Middle). Here each layer runs the pattern alone, all others dense, and
the rank correlation of its divergence with its gradient says how far the choice can be trusted on a model.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from sparsekit.errors import SparsekitError
from sparsekit.lab.calibrate.effects import Judge
from sparsekit.lab.calibrate.probe import Probe, own_layers
from sparsekit.lab.calibrate.prompts import make_prompts
from sparsekit.lab.progress import progress
from sparsekit.lab.provenance import made_on
from sparsekit.lab.stats import mean_interval, quantile, rank_correlation, ranks, share_interval
from sparsekit.lab.tasks import Task
from sparsekit.models import facts
from sparsekit.patterns import Pattern, parse_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SingleLayers", "single_layers"]

RESAMPLES = 2000  # of the prompts, for the interval of the correlation


@dataclass(frozen=True)
class SingleLayers:
    """One row a layer: KL with its interval, scores, and Grad(Middle) as a share of the largest layer's.

    Attributes:
        correlation: Spearman's, of mean KL with Grad(Middle) over the layers; low and high are its 95% interval, by
            drawing prompts anew (the probe is as it is).
    """

    model: str
    pattern: str
    prompts: dict[str, Any]
    made: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    correlation: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "single layers", "model": self.model, "pattern": self.pattern, "prompts": self.prompts, **self.made,
            "correlation": list(self.correlation), "rows": list(self.rows),
        }  # fmt: skip

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows) in words."""
        head = ["layer", "Grad(Middle) / max", "KL", "95%", "score", "dense", "same"]
        cells = [
            [str(row["layer"]), f"{row['gradient']:.3f}", f"{row['kl']:.2e}", f"{row['kl_half_width']:.1e}"]
            + [f"{row[name][0]:.2f}" for name in ("score", "dense_score", "same")]
            for row in self.rows
        ]
        return head, cells

    def summary(self) -> str:
        """The correlation, and the layer that it misjudges most, in a sentence."""
        value, low, high = self.correlation
        by_gradient, by_kl = (ranks([row[name] for row in self.rows]) for name in ("gradient", "kl"))
        off = [b - a for a, b in zip(by_gradient, by_kl, strict=True)]
        worst = max(range(len(off)), key=lambda i: off[i])
        return (
            f"Rank correlation of KL with Grad(Middle) over {len(self.rows)} layers: {value:.2f} (95%: {low:.2f} to "
            f"{high:.2f}). Most harm beyond what the gradient says: layer {self.rows[worst]['layer']}, place "
            f"{len(off) - by_kl[worst]:.0f} by KL and {len(off) - by_gradient[worst]:.0f} by gradient."
        )


def single_layers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probe: Probe,
    pattern: Pattern | str | Mapping[str, Any] = "triangle",
    *,
    samples: int = 96,
    tokens: int = 2200,
    seed: int = 0,
    tasks: Sequence[str | Task] = ("needle4",),
    records: str | Path | None = None,
    quiet: bool = False,
) -> SingleLayers:
    """KL of the answer's tokens from dense with `pattern` in one layer at a time.

    Args:
        probe: of the same model.
        samples, tokens, seed, tasks: of the prompts.
        records: a JSONL file; an interrupted run goes on from it.

    Raises:
        SparsekitError: a probe of another model, or fewer than 3 layers that can be sparse.
    """
    arch, own = facts(model), own_layers(model, some=True)
    gradient = probe.relative()
    layers = [i for i in range(arch.num_layers) if i not in own]
    if len(gradient) != arch.num_layers or any(gradient[i] is None for i in layers):
        raise SparsekitError(f"probe of {probe.model}: {len(gradient)} layers; the model has {arch.num_layers}.")
    if len(layers) < 3:
        raise SparsekitError(f"{len(layers)} layers can be sparse: a rank correlation needs at least 3.")
    chosen = parse_pattern(pattern)
    prompts = make_prompts(model, tokenizer, tasks=tasks, tokens=[tokens], count=samples, seeds=[seed])
    judge = Judge(model, tokenizer, prompts, records)
    with progress("single layers", len(layers) * len(prompts), quiet=quiet) as step:
        effects = judge.effects([{layer: chosen} for layer in layers], step)
    rows: list[dict[str, Any]] = []
    for layer, effect in zip(layers, effects, strict=True):
        kl, width = mean_interval(effect.kl)
        scores = {name: share_interval(getattr(effect, name)) for name in ("score", "dense_score", "same")}
        rows.append({"layer": layer, "gradient": gradient[layer], "kl": kl, "kl_half_width": width, **scores,
                     "samples": len(effect.kl)})  # fmt: skip
    kls = [effect.kl for effect in effects]
    found = _correlation([gradient[i] or 0.0 for i in layers], kls, seed)
    described = {"tasks": sorted({p.task.name for p in prompts}), "tokens": tokens, "seed": seed}
    return SingleLayers(arch.name, str(chosen), described, made_on(model), tuple(rows), found)


def _correlation(gradient: Sequence[float], kls: Sequence[Sequence[float]], seed: int) -> tuple[float, float, float]:
    """Spearman's of the gradients with the mean KLs, and its 95% interval by resampling the prompts."""
    rng, count = random.Random(seed), len(kls[0])
    drawn = []
    for _ in range(RESAMPLES if count > 1 else 0):
        some = [rng.randrange(count) for _ in range(count)]
        drawn.append(rank_correlation(gradient, [mean(kl[i] for i in some) for kl in kls]))
    value = rank_correlation(gradient, [mean(kl) for kl in kls])
    return (value, quantile(drawn, 0.025), quantile(drawn, 0.975)) if drawn else (value, -1.0, 1.0)
