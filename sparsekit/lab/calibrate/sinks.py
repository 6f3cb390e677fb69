"""Attention sinks of a model: where they are, how strong, what they look like, and what a config drops.

`inspect_model` reads prompts densely and looks at each layer's attention weights in blocks of rows. The measures are
those of the survey 2604.10098: sink score and rate (Gu et al., 2410.10781), first-token mass, the strongest columns
wherever they stand, norms of the sinks' values and keys, massive activations; and, for a config, the attention mass and
the gradient that it drops.

A sink score depends on the prompt's length (uniform attention over T tokens gives column 0 the harmonic number of T,
divided by T), so it is taken over the first `score_tokens` tokens, as published; scores of different lengths do not
compare.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.call.softmax import Softmax
from sparsekit.config import LayerPatterns, SparseConfig, format_range, load
from sparsekit.errors import SparsekitError
from sparsekit.kernels import attend, geometry_for
from sparsekit.lab.calibrate.blocks import row_blocks, scores, wide
from sparsekit.lab.calibrate.probe import activations_alone, own_layers
from sparsekit.lab.calibrate.prompts import TASKS, Prompt, ask, make_prompts
from sparsekit.lab.progress import progress
from sparsekit.lab.provenance import made_on
from sparsekit.lab.tasks import Task
from sparsekit.models import facts
from sparsekit.patch.call import softmax_of
from sparsekit.patch.capture import wrap_attention
from sparsekit.patterns.attention import plan_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Columns", "Inspection", "LayerSinks", "columns", "inspect_model", "sink_scores"]

EPSILON = 0.3  # of a sink score, as published for 64 tokens
SCORE_TOKENS = 64
COLUMN_ROWS = 64  # a column that fewer queries than this can see is no sink, whatever they give it
INITIAL = 64  # columns before this one can be kept as `sink_tokens`
TOP = 8


@dataclass(frozen=True)
class Columns:
    """What the columns of the attention weights of one layer get, (B, H, ...), float64.

    Attributes:
        early: sums over the first `score_tokens` queries, (B, H, T).
        whole: sums over all queries, (B, H, N).
        first: mean share of key 0, over the queries that come at least `score_tokens` after it, (B, H).
        learned: mean share of a learned sink logit, 1 - the row's sum, (B, H).
        lse: logarithm of the softmax denominator, (B, H, N).
    """

    early: Tensor
    whole: Tensor
    first: Tensor
    learned: Tensor
    lse: Tensor


def columns(q: Tensor, k: Tensor, softmax: Softmax, score_tokens: int = SCORE_TOKENS) -> Columns:
    """Column sums of dense causal attention of q (B, H, N, D) over k (B, G, N, D), never holding N x N weights."""
    tokens = q.shape[2]
    t = min(score_tokens, tokens)
    zeros = lambda *shape: torch.zeros(*q.shape[:2], *shape, dtype=torch.float64, device=q.device)  # noqa: E731
    early, whole, first, kept = zeros(t), zeros(tokens), zeros(), zeros()
    lse = torch.empty(q.shape[:3], dtype=wide(q), device=q.device)
    from_row = t if tokens > t else 0
    for a, b in row_blocks(q):
        logits = scores(q, k, softmax, a, b)[0]
        total = logits.logsumexp(-1)
        if softmax.sink_logits is not None:
            total = torch.logaddexp(total, softmax.sink_logits.to(total)[None, :, None])
        weights = torch.exp(logits - total[..., None])
        lse[:, :, a:b] = total
        whole[..., :b] += weights.sum(2)
        if a < t:
            early[..., : min(b, t)] += weights[:, :, : t - a, :t].sum(2)
        first += weights[:, :, max(from_row - a, 0) :, 0].sum(-1)
        kept += weights.sum((2, 3))
    return Columns(early, whole, first / (tokens - from_row), 1 - kept / tokens, lse)


def sink_scores(sums: Tensor) -> Tensor:
    """alpha_k = 1/(T - k + 1) sum over i >= k of A[i, k], k from 1, of column sums (..., T): Gu et al.'s sink score."""
    tokens = sums.shape[-1]
    return sums / torch.arange(tokens, 0, -1, dtype=sums.dtype, device=sums.device)


@dataclass(frozen=True)
class LayerSinks:
    """One layer, means over the samples. A layer that keeps its own attention has nothing but `own`.

    Attributes:
        score: of each head, the sink score of key 0 over the first `score_tokens` tokens.
        rate: share of (sample, head) whose score of key 0 is above epsilon.
        first: of each head, mean attention that key 0 gets from the queries `score_tokens` or more after it.
        learned: of each head, mean attention that a learned sink logit takes; empty where the model has none.
        top: the strongest columns over whole prompts: position, token (of the last sample), mean score over heads,
            the largest head's, and in how many samples the column was among the strongest.
        sinks: position -> share of the samples in which a head's score over the whole prompt was above epsilon.
        value_ratio, key_ratio: norm of the strongest column's value (key) / mean norm of the others.
        massive: hidden state after this layer: the largest magnitude / the median one, and its position and feature.
        dropped_mass: of each head, mean attention mass on pairs that the config drops.
        dropped_gradient: of each head, the gradient of the answer's logit on dropped pairs, row by row, as a share of
            that on all pairs.
    """

    layer: int
    own: str = ""
    score: tuple[float, ...] = ()
    rate: float | None = None
    first: tuple[float, ...] = ()
    learned: tuple[float, ...] = ()
    top: tuple[dict[str, Any], ...] = ()
    sinks: dict[int, float] = field(default_factory=dict)
    value_ratio: float | None = None
    key_ratio: float | None = None
    massive: dict[str, Any] | None = None
    dropped_mass: tuple[float, ...] = ()
    dropped_gradient: tuple[float, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found; `answer()` says how many sink tokens the model needs, and where they are."""

    model: str
    samples: int
    prompts: dict[str, Any]
    epsilon: float
    score_tokens: int
    config: str
    made: dict[str, Any]
    layers: tuple[LayerSinks, ...]

    @property
    def sink_tokens(self) -> int | None:
        """First keys that hold every sink column below position 64 that is one in at least half of the samples; None
        where no layer was measured.
        """
        if all(layer.own for layer in self.layers):
            return None
        found = [at for layer in self.layers for at, share in layer.sinks.items() if share >= 0.5 and at < INITIAL]
        return max(found, default=-1) + 1

    def answer(self) -> list[str]:
        """How many sink tokens this model needs, and where they are, in sentences."""
        probed = [layer for layer in self.layers if not layer.own]
        if not probed:
            return ["No layer was measured, so nothing can be said of sinks."]
        near: dict[int, list[int]] = {}
        elsewhere: dict[int, list[int]] = {}
        names = {column["position"]: column["token"] for layer in probed for column in layer.top}
        for layer in probed:
            for at, share in layer.sinks.items():
                if at >= INITIAL:
                    elsewhere.setdefault(layer.layer, []).append(at)
                elif share >= 0.5:
                    near.setdefault(at, []).append(layer.layer)
        places = "; ".join(
            f"position {at} ({names[at]!r}) in layers {format_range(layers)}"
            if at in names
            else f"position {at} in layers {format_range(layers)}"
            for at, layers in sorted(near.items())
        )
        lines = [
            f"Needs sink_tokens = {self.sink_tokens}: a column gets more than {self.epsilon} of a head's attention at "
            f"{places}."
            if near
            else f"Needs no sink tokens: no column gets more than {self.epsilon} of any head's attention."
        ]
        if elsewhere:
            some = "; ".join(
                f"layer {layer}: {', '.join(map(str, at[:4]))}" for layer, at in list(elsewhere.items())[:4]
            )
            lines.append(f"Sinks beyond the first {INITIAL} tokens, which sink_tokens does not keep: {some}.")
        learned = [(max(layer.learned), layer.layer) for layer in probed if layer.learned]
        if learned:
            most, at = max(learned)
            lines.append(
                f"Learned sink logits take up to {most:.2f} of a head's attention (layer {at}); every pattern keeps "
                "them, and they need no column."
            )
        dropped = [(sum(x.dropped_mass) / len(x.dropped_mass), x.layer) for x in probed if x.dropped_mass]
        if dropped:
            most, at = max(dropped)
            lines.append(f"{self.config} drops at most {most:.3f} of a layer's attention (layer {at}).")
        if unmeasured := [layer.layer for layer in self.layers if layer.own]:
            lines.append(f"Layers {format_range(unmeasured)} keep their own attention and were not measured.")
        return lines

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "inspection", "sink_tokens": self.sink_tokens, "answer": self.answer(), **asdict(self)}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows) in words, one row a layer; means over heads, and the largest head's."""
        head = ["layer", "score", "max", "rate", "first", "max", "top columns", "|v|", "|k|", "massive"]
        learned = any(layer.learned for layer in self.layers)
        dropped = any(layer.dropped_mass for layer in self.layers)
        gradient = any(layer.dropped_gradient for layer in self.layers)
        head += ["learned"] * learned + ["dropped"] * dropped + ["gradient"] * gradient
        rows = []
        for x in self.layers:
            if x.own or x.massive is None:
                rows.append([str(x.layer), x.own, *[""] * (len(head) - 2)])
                continue
            top = ", ".join(f"{c['position']}: {c['score']:.2f}" for c in x.top[:3])
            row = [str(x.layer), _mean(x.score), f"{max(x.score):.2f}", f"{x.rate:.2f}", _mean(x.first)]
            row += [f"{max(x.first):.2f}", top, f"{x.value_ratio:.2f}", f"{x.key_ratio:.2f}"]
            row.append(f"{x.massive['ratio']:,.0f} at {x.massive['position']}")
            row += [_mean(x.learned)] * learned + [_mean(x.dropped_mass)] * dropped
            rows.append(row + [_mean(x.dropped_gradient)] * gradient)
        return head, rows


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}" if values else "-"


def inspect_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SparseConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    samples: int = 4,
    tokens: int = 1024,
    seeds: Sequence[int] = (0, 1),
    tasks: Sequence[str | Task] = TASKS,
    epsilon: float = EPSILON,
    score_tokens: int = SCORE_TOKENS,
    gradient: bool = False,
    quiet: bool = False,
) -> Inspection:
    """Attention sinks of a model, and what a config drops of its attention.

    Args:
        config: whose patterns are measured; default none.
        samples, tokens, seeds, tasks: of the prompts, as for the probe.
        epsilon: a score above it is a sink.
        score_tokens: over how many first tokens the sink score is taken.
        gradient: also measure the gradient that the config drops; takes a backward pass a prompt.

    Raises:
        SparsekitError: prompts beyond the model's positions, a config for another model, or `gradient` without one.
    """
    if not 0 < epsilon < 1 or score_tokens < 2:
        raise SparsekitError(f"epsilon = {epsilon}, score_tokens = {score_tokens}: between 0 and 1, and at least 2.")
    if gradient and config is None:
        raise SparsekitError("gradient: it is measured on what a config drops; give the config.")
    loaded = None if config is None else load(config)
    resolved = None if loaded is None else loaded.resolve(facts(model))
    own = own_layers(model, some=True)
    if resolved is not None:
        resolved.own_layers(facts(model))
    prompts = make_prompts(model, tokenizer, tasks=tasks, tokens=[tokens], count=samples, seeds=seeds)
    sparse = {} if resolved is None else {x.layer: x for x in resolved.layers if not x.dense and x.layer not in own}
    found: list[dict[int, dict[str, Any]]] = []
    with progress("inspect", len(prompts), quiet=quiet) as step:
        for prompt in prompts:
            found.append(_look(model, tokenizer, prompt, sparse, own, epsilon, score_tokens, gradient))
            step(1)
    count = facts(model).num_layers
    missing = [i for i in range(count) if i not in own and not all(i in sample for sample in found)]
    if missing:
        raise SparsekitError(f"layers {format_range(missing)} ran no attention that could be looked at.")
    layers = [LayerSinks(i, own[i]) if i in own else _joined(i, [sample[i] for sample in found]) for i in range(count)]
    described = {"tasks": sorted({p.task.name for p in prompts}), "tokens": tokens, "seeds": list(seeds)}
    label = "" if config is None else (str(config) if isinstance(config, str | Path) else "the config")
    return Inspection(
        facts(model).name, len(prompts), described, epsilon, score_tokens, label, made_on(model), tuple(layers)
    )


def _look(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    sparse: Mapping[int, LayerPatterns],
    own: Mapping[int, str],
    epsilon: float,
    score_tokens: int,
    gradient: bool,
) -> dict[int, dict[str, Any]]:
    """Every measure of one prompt, by layer."""
    ids, target = ask(tokenizer, prompt.sample)
    names = [str(tokenizer.decode([token])) for token in ids.tolist()]
    found: dict[int, dict[str, Any]] = {}

    def attention(run: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        out, weights = run(module, q, k, v, mask, **kwargs)
        layer = module.layer_idx
        if layer in own:
            return out, weights
        softmax = softmax_of(module, q, kwargs)
        with torch.no_grad():
            seen = columns(q, k, softmax, score_tokens)
            found[layer] = _measures(seen, k, v, names, epsilon, learned=softmax.sink_logits is not None)
            if layer in sparse:
                kept_out = _kept(sparse[layer], q, k, v, softmax, seen, found[layer])
        if layer in sparse and gradient:
            full = out.detach()

            def gather(grad: Tensor) -> None:
                """Row by row: dO . (sum of the dropped P V), which is the sum of dy/dtheta over the dropped pairs."""
                exact = grad.transpose(1, 2).float()
                whole = full.transpose(1, 2).float()
                dropped = (exact * (whole - kept_out)).sum(-1).abs().sum(-1)
                among = (exact * whole).sum(-1).abs().sum(-1).clamp(min=1e-30)
                found[layer]["dropped_gradient"] = (dropped / among)[0].tolist()

            out.register_hook(gather)
        return out, weights

    def read() -> Any:
        return model(ids[None].to(model.device), use_cache=False, output_hidden_states=True, logits_to_keep=1)

    with wrap_attention(model, attention):
        if gradient:
            with activations_alone(model), torch.enable_grad():
                result = read()
                result.logits[0, -1, target].float().backward()
        else:
            with torch.no_grad():
                result = read()
    for layer, row in found.items():
        row["massive"] = _massive(result.hidden_states[layer + 1][0].detach(), names)
    return found


def _measures(
    seen: Columns, k: Tensor, v: Tensor, names: Sequence[str], epsilon: float, *, learned: bool
) -> dict[str, Any]:
    whole = sink_scores(seen.whole)[0][:, : max(seen.whole.shape[-1] - COLUMN_ROWS, 1)]  # (H, N')
    mean = whole.mean(0)
    best, at = mean.topk(min(TOP, len(mean)))
    above = (whole > epsilon).any(0).nonzero()[:, 0].tolist()
    early = sink_scores(seen.early)[0][:, 0]
    ratios = {}
    for name, x in (("value_ratio", v), ("key_ratio", k)):
        norms = x[0].float().norm(dim=-1).mean(0)  # (N,)
        place = int(at[0])
        others = (norms.sum() - norms[place]) / max(len(norms) - 1, 1)
        ratios[name] = float(norms[place] / others)
    return {
        "score": early.tolist(),
        "above": (early > epsilon).float().mean().item(),
        "first": seen.first[0].tolist(),
        "learned": seen.learned[0].tolist() if learned else [],
        "top": [
            {"position": p, "token": names[p], "score": s, "largest_head": float(whole[:, p].max())}
            for p, s in zip(at.tolist(), best.tolist(), strict=True)
        ],
        "sinks": above,
        **ratios,
    }


def _kept(
    patterns: LayerPatterns, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, seen: Columns, into: dict[str, Any]
) -> Tensor:
    """Note the mass that a layer's pattern drops; return the dense output's part that comes from the kept pairs.

    Kept pairs have the sum exp(lse) of exponentials, all pairs exp(dense lse): their ratio is the mass that is kept,
    and the sparse output times it is the kept pairs' sum of P V. No mask is made.
    """
    plan = plan_heads(patterns.patterns, patterns.pattern_of_head, q, k, geometry_for(q, k), softmax)
    out, lse = attend(
        q.detach(),
        k.detach(),
        v.detach(),
        plan,
        scale=softmax.scale,
        softcap=softmax.softcap,
        sink_logits=softmax.sink_logits,
        return_lse=True,
    )
    recall = torch.exp(lse.float() - seen.lse.float()).clamp(max=1.0)
    if softmax.sink_logits is None:
        kept = recall
    else:  # of what goes to keys: both sums hold the sink's part, which no pattern drops
        sink = torch.exp(softmax.sink_logits.float()[None, :, None] - seen.lse.float())
        kept = ((recall - sink) / (1 - sink).clamp(min=1e-9)).clamp(0, 1)
    into["dropped_mass"] = (1 - kept).mean(-1)[0].tolist()
    return out.float() * recall[..., None]


def _massive(hidden: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """The largest magnitude of a hidden state (N, features) against the median one."""
    size = hidden.float().abs()
    at = int(size.argmax())
    place, feature = divmod(at, size.shape[1])
    middle = float(size.median())
    ratio = float(size.max()) / middle if middle else math.inf
    return {"ratio": ratio, "position": place, "token": names[place], "feature": feature, "value": float(size.max())}


def _joined(layer: int, samples: Sequence[Mapping[str, Any]]) -> LayerSinks:
    """Means over the samples; columns by position."""

    def mean(name: str) -> tuple[float, ...]:
        rows = [sample[name] for sample in samples if sample.get(name)]
        return tuple(sum(values) / len(values) for values in zip(*rows, strict=True)) if rows else ()

    tops: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        for column in sample["top"]:
            tops.setdefault(column["position"], []).append(column)
    top = [
        {
            "position": at,
            "token": found[-1]["token"],
            "score": sum(c["score"] for c in found) / len(found),
            "largest_head": max(c["largest_head"] for c in found),
            "samples": len(found),
        }
        for at, found in tops.items()
    ]
    top.sort(key=lambda c: (-c["score"] * c["samples"], c["position"]))
    seen = Counter(at for sample in samples for at in sample["sinks"])
    strongest = max(samples, key=lambda sample: sample["massive"]["ratio"])
    return LayerSinks(
        layer,
        score=mean("score"),
        rate=sum(sample["above"] for sample in samples) / len(samples),
        first=mean("first"),
        learned=mean("learned"),
        top=tuple(top[:TOP]),
        sinks={at: n / len(samples) for at, n in sorted(seen.items())},
        value_ratio=sum(sample["value_ratio"] for sample in samples) / len(samples),
        key_ratio=sum(sample["key_ratio"] for sample in samples) / len(samples),
        massive=strongest["massive"],
        dropped_mass=mean("dropped_mass"),
        dropped_gradient=mean("dropped_gradient"),
    )
