"""Head search: a pattern for every head, scored on attention outputs, under a target of attention FLOPs.

MInference's idea (2407.02490, algorithm 1): of candidates that cost about the same, a head takes the one whose output
is nearest to dense attention's, so that what counts is what reaches the values, not recall alone. `per_head` does that:
every head under the same target. Without it the target holds for the whole model, and heads that need more take it
from heads that need less: the least sum of errors under the sum of costs, by a price on cost that is raised until it
fits.

Candidates of one pattern with rising thresholds make this XAttention's search for thresholds per layer and head
(2503.16428): its published procedure scores whole-model answers on data that is not named; ours scores outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.call.softmax import Softmax
from sparsekit.config import ArchFacts, SparseConfig, format_range, load
from sparsekit.config.costs import explain
from sparsekit.errors import SparsekitError
from sparsekit.kernels import attend, geometry_for
from sparsekit.lab.calibrate.probe import own_layers
from sparsekit.lab.calibrate.prompts import TASKS, Prompt, make_prompts
from sparsekit.lab.calibrate.records import Records
from sparsekit.lab.progress import progress
from sparsekit.lab.provenance import content_key, content_of_code, content_of_model, made_on
from sparsekit.lab.tasks import Task, prompt_ids
from sparsekit.models import facts
from sparsekit.patch.call import softmax_of
from sparsekit.patch.capture import wrap_attention
from sparsekit.patterns import Dense, DynamicPattern, Pattern, XAttention, parse_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MINFERENCE_SPACE", "HeadSearch", "assign", "search_heads", "threshold_ladder"]

# Table 7 of MInference: about the same FLOPs each at 30K tokens, those of its A-shape.
MINFERENCE_SPACE: tuple[dict[str, Any], ...] = (
    {"name": "a_shape", "sink_tokens": 1024, "window_tokens": 4096},
    {"name": "vertical_slash", "vertical_tokens": 30, "slash_tokens": 2048},
    {"name": "vertical_slash", "vertical_tokens": 100, "slash_tokens": 1800},
    {"name": "vertical_slash", "vertical_tokens": 500, "slash_tokens": 1500},
    {"name": "vertical_slash", "vertical_tokens": 3000, "slash_tokens": 200},
    {"name": "block_topk", "top_k": 100},
)


def threshold_ladder(steps: int = 10, stride: int = 16) -> list[Pattern]:
    """xattention with thresholds .9, .9 * .9, ...: the steps of XAttention's search."""
    shares = [round(0.9 ** (n + 1), 6) for n in range(steps)]
    return [parse_pattern({"name": "xattention", "threshold": share, "stride": stride}) for share in shares]


@dataclass(frozen=True)
class HeadSearch:
    """What `search_heads` found.

    Attributes:
        config: a pattern for each head, with provenance.
        candidates: what there was to choose from; the last one is dense.
        error, cost: (L, H, C): relative L1 error of a head's output, and its share of dense tiles; NaN for layers that
            keep their own attention.
        chosen: (L, H), indices of candidates; -1 in layers that keep their own attention.
    """

    config: SparseConfig
    candidates: tuple[Pattern, ...]
    error: Tensor
    cost: Tensor
    chosen: Tensor
    target: float

    def _of_chosen(self, values: Tensor) -> float:
        open_ = self.chosen >= 0
        return float(values.gather(2, self.chosen.clamp(min=0)[..., None])[..., 0][open_].mean())

    @property
    def mean_error(self) -> float:
        return self._of_chosen(self.error)

    @property
    def mean_cost(self) -> float:
        return self._of_chosen(self.cost)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "heads",
            "target": self.target,
            "mean_cost": self.mean_cost,
            "mean_error": self.mean_error,
            "candidates": [pattern.to_yaml() for pattern in self.candidates],
            "chosen": self.chosen.tolist(),
            "config": self.config.to_dict(),
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows): how many heads took each candidate, their mean error and cost."""
        rows = []
        for at, pattern in enumerate(self.candidates):
            took = self.chosen == at
            if took.any():
                numbers = (float(values[..., at][took].mean()) for values in (self.error, self.cost))
                rows.append([str(pattern), str(int(took.sum())), *(f"{number:.4f}" for number in numbers)])
        return ["pattern", "heads", "error", "cost"], rows


def assign(error: Tensor, cost: Tensor, target: float, *, per_head: bool = False) -> Tensor:
    """int64 (R,): a candidate for each of R heads, from their errors and costs (R, C).

    `per_head`: the least error among a head's candidates that cost at most `target`, or its cheapest where none does.
    Otherwise the least sum of errors with a mean cost of at most `target`, by price: exact wherever the price's choices
    meet the target, below it elsewhere.

    Raises:
        SparsekitError: not even the cheapest candidates meet the target.
    """
    if per_head:
        fits = cost <= target
        best = error.masked_fill(~fits, float("inf")).argmin(1)
        return torch.where(fits.any(1), best, cost.argmin(1))
    cheapest = cost.gather(1, cost.argmin(1)[:, None]).mean()
    if cheapest > target:
        raise SparsekitError(
            f"flops = {target}: the cheapest candidates of all heads take {float(cheapest):.3f} of dense; give a "
            "higher target, or cheaper candidates."
        )

    def at(price: float) -> tuple[Tensor, float]:
        chosen = (error + price * cost).argmin(1)
        return chosen, float(cost.gather(1, chosen[:, None]).mean())

    low, high = 0.0, 1.0
    chosen, spent = at(low)
    if spent <= target:
        return chosen
    while at(high)[1] > target and high < 1e12:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] > target else (low, middle)
    chosen, spent = at(high)
    return chosen if spent <= target else cost.argmin(1)


def search_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    candidates: Sequence[Pattern | str | Mapping[str, Any]] = MINFERENCE_SPACE,
    *,
    flops: float | None = None,
    per_head: bool = False,
    samples: int = 1,
    tokens: int = 2048,
    seed: int = 0,
    tasks: Sequence[str | Task] = TASKS[:1],
    dense_below_tokens: int = 1024,
    records: str | Path | None = None,
    quiet: bool = False,
) -> HeadSearch:
    """A pattern for each head of each full-attention layer, by the error of its output, under a target of FLOPs.

    Args:
        candidates: patterns with their budgets; dense is always one more. A dynamic one is measured at every length,
            below the one too from which it runs on such a device.
        flops: target, attention FLOPs (visited tiles) as a share of dense; default MInference's, an A-shape of 1024
            sinks and a window of 4096.
        per_head: hold the target in each head rather than in the mean over all.
        samples, tokens, seed, tasks: of the prompts; one of 30K tokens is what MInference took.

    Raises:
        SparsekitError: a candidate that needs a layer of its own, or a target that no choice meets.
    """
    patterns = [p for p in dict.fromkeys(map(parse_pattern, candidates)) if p.name != "dense"]
    alone = [pattern.name for pattern in patterns if pattern.whole_layer]
    if not patterns or alone:
        named = f"{alone[0]} needs a layer of its own, and cannot be chosen by head" if alone else "no candidates"
        raise SparsekitError(f"candidates: {named}.")
    arch, own = facts(model), own_layers(model, some=True)
    target = _minference_target(arch, tokens) if flops is None else flops
    if not 0 < target <= 1:
        raise SparsekitError(f"flops = {target}: a share of dense attention's, above 0 and up to 1.")
    prompts = make_prompts(model, tokenizer, tasks=tasks, tokens=[tokens], count=samples, seeds=[seed])
    kept, weights = Records(records), content_of_model(model, tokenizer)
    with progress("heads", len(prompts) * (arch.num_layers - len(own)), quiet=quiet) as step:
        measure = lambda prompt: _measure(model, tokenizer, prompt, patterns, kept, weights, own, step)  # noqa: E731
        found = [measure(prompt) for prompt in prompts]
    patterns.append(Dense())
    error, cost = (torch.stack([one[i] for one in found]).mean(0) for i in (0, 1))
    open_ = torch.tensor([i not in own for i in range(arch.num_layers)])
    chosen = torch.full(error.shape[:2], -1)
    chosen[open_] = assign(error[open_].flatten(0, 1), cost[open_].flatten(0, 1), target, per_head=per_head).view(
        -1, error.shape[1]
    )
    provenance = {
        "by": "sparsekit calibrate heads",
        "scored_on": "relative L1 error of attention outputs",
        "flops_target_of_dense": target,
        "target_holds_for": "each head" if per_head else "the mean over heads",
        "candidates": [pattern.to_yaml() for pattern in patterns],
        "prompts": {
            "tasks": sorted({p.task.name for p in prompts}),
            "tokens": tokens,
            "seed": seed,
            "samples": samples,
        },
        **made_on(model),
    }
    config = _config(arch, patterns, chosen, provenance, dense_below_tokens)
    search = HeadSearch(config, tuple(patterns), error, cost, chosen, target)
    said = {"mean_cost": round(search.mean_cost, 4), "mean_error": round(search.mean_error, 5)}
    config = load({**config.to_dict(), "provenance": {**provenance, **said}})
    return HeadSearch(config, search.candidates, error, cost, chosen, target)


def _minference_target(arch: ArchFacts, tokens: int) -> float:
    config = {"model": arch.model_dump(exclude_none=True), "default": MINFERENCE_SPACE[0]}
    return explain(config, tokens, arch).layers[0].tile_density or 1.0


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    patterns: Sequence[Pattern],
    kept: Records,
    weights: str,
    own: Mapping[int, str],
    step: Any,
) -> tuple[Tensor, Tensor]:
    """(errors, costs), (L, H, C + 1) float64, of one prompt; the last candidate is dense: no error, all the cost."""
    arch = facts(model)
    shape = arch.num_layers, arch.num_heads, len(patterns) + 1
    error, cost = (torch.full(shape, float("nan"), dtype=torch.float64) for _ in range(2))
    code = content_of_code([prompt.task, *patterns])
    base = {"kind": "heads", "model": weights, "device": model.device.type, "code": code, "prompt": prompt.key}
    keys = {
        (layer, i): {**base, "layer": layer, "pattern": pattern.model_dump(mode="json")}
        for layer in range(arch.num_layers)
        if layer not in own
        for i, pattern in enumerate(patterns)
    }

    def attention(run: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        out, found = run(module, q, k, v, mask, **kwargs)
        layer = module.layer_idx
        if layer not in own:
            softmax = softmax_of(module, q, kwargs)
            for i, pattern in enumerate(patterns):
                if kept.get(keys[layer, i]) is None:
                    kept.add(keys[layer, i], _score(pattern, q, k, v, softmax, out.transpose(1, 2)))
            step(1)
        return out, found

    if all(kept.get(key) is not None for key in keys.values()):
        step(arch.num_layers - len(own))
    else:
        with wrap_attention(model, attention), torch.no_grad():
            model(prompt_ids(tokenizer, prompt.sample).to(model.device), use_cache=False, logits_to_keep=1)
    for (layer, i), key in keys.items():
        row: Any = kept.get(key)
        error[layer, :, i], cost[layer, :, i] = torch.tensor(row["error"]), torch.tensor(row["cost"])
        error[layer, :, -1], cost[layer, :, -1] = 0, 1
    return error, cost


def _score(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, dense: Tensor
) -> dict[str, list[float]]:
    """Each head by itself: a plan counts its tiles over all of its heads."""
    group = q.shape[1] // k.shape[1]
    errors, costs = [], []
    for head in range(q.shape[1]):
        at = slice(head // group, head // group + 1)
        own_q, own_k, own_v = q[:, head : head + 1], k[:, at], v[:, at]
        sinks = None if softmax.sink_logits is None else softmax.sink_logits[head : head + 1]
        of_head = Softmax(softmax.scale, softmax.softcap, sinks)
        select = pattern.select if isinstance(pattern, DynamicPattern) else pattern.plan
        plan = select(own_q, own_k, geometry_for(own_q, own_k), of_head)
        out: Any = attend(own_q, own_k, own_v, plan, scale=softmax.scale, softcap=softmax.softcap, sink_logits=sinks)
        exact = dense[:, head : head + 1].float()
        errors.append(float((out.float() - exact).abs().sum() / exact.abs().sum().clamp(min=1e-30)))
        costs.append(plan.tile_density())
    return {"error": errors, "cost": costs}


def _config(
    arch: ArchFacts,
    patterns: Sequence[Pattern],
    chosen: Tensor,
    provenance: Mapping[str, Any],
    dense_below_tokens: int,
) -> SparseConfig:
    """Layers whose heads agree are a layer rule; thresholds of one layer are one pattern; other layers have heads."""
    layers: dict[str, list[int]] = {}
    heads: dict[str, dict[str, Any]] = {}
    whole: dict[str, Any] = {}
    for layer, row in enumerate(chosen.tolist()):
        if row[0] < 0:
            continue
        of_heads = [patterns[i] for i in row]
        joined = _joined(of_heads)
        if joined is not None:
            if joined.name != "dense":
                key = content_key(joined.model_dump(mode="json"))
                layers.setdefault(key, []).append(layer)
                whole[key] = joined.to_yaml()
            continue
        by = {i: [h for h, own in enumerate(row) if own == i] for i in dict.fromkeys(row)}
        heads[str(layer)] = {format_range(numbers): patterns[i].to_yaml() for i, numbers in by.items()}
    data = {
        "version": 1,
        "model": arch.model_dump(exclude_none=True),
        "dense_below_tokens": dense_below_tokens,
        "default": "dense",
        "layers": {format_range(numbers): whole[key] for key, numbers in layers.items()},
        **({"heads": heads} if heads else {}),
        "provenance": dict(provenance),
    }
    return load(data)


def _joined(patterns: Sequence[Pattern]) -> Pattern | None:
    """A whole layer's pattern: its only one, or xattention with a threshold for each head (of dense: 1)."""
    if len(set(patterns)) == 1:
        return patterns[0]
    found = [pattern for pattern in patterns if isinstance(pattern, XAttention)]
    strides = {pattern.stride for pattern in found}
    if len(strides) != 1 or not all(isinstance(pattern, XAttention | Dense) for pattern in patterns):
        return None
    shares = [pattern.threshold if isinstance(pattern, XAttention) else 1.0 for pattern in patterns]
    return parse_pattern({"name": "xattention", "threshold": shares, "stride": strides.pop()})
