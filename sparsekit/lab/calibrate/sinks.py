"""Attention sinks of a model: where they are, how strong, what they look like, and what a config drops.

`inspect_model` reads prompts densely and looks at each layer's attention weights in blocks of rows. The measures are
those of the survey 2604.10098: sink score and rate (Gu et al., 2410.10781), first-token mass, the strongest columns
wherever they stand, norms of the sinks' values and keys, massive activations, what the model has against sinks, heads
that attend to sinks alone; for a config, the attention mass and the gradient that it drops; and the divergence of the
answers where fewer sinks are kept.

A sink score depends on the prompt's length (uniform attention over T tokens gives column 0 the harmonic number of T,
divided by T), so it is taken over the first `score_tokens` tokens, as published; scores of different lengths do not
compare.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.call.softmax import Softmax
from sparsekit.config import LayerPatterns, SparseConfig, format_range, load
from sparsekit.errors import SparsekitError
from sparsekit.kernels import attend, geometry_for
from sparsekit.lab.calibrate.columns import SCORE_TOKENS, Columns, columns, sink_scores
from sparsekit.lab.calibrate.effects import Judge
from sparsekit.lab.calibrate.inspection import Inspection, LayerSinks
from sparsekit.lab.calibrate.outputs import Outputs, sink_logits_are, watch_outputs
from sparsekit.lab.calibrate.probe import activations_alone, own_layers
from sparsekit.lab.calibrate.prompts import TASKS, Prompt, ask, make_prompts
from sparsekit.lab.progress import progress
from sparsekit.lab.provenance import made_on
from sparsekit.lab.stats import mean_interval
from sparsekit.lab.tasks import Task
from sparsekit.models import facts
from sparsekit.patch import remove
from sparsekit.patch.call import softmax_of
from sparsekit.patch.capture import wrap_attention
from sparsekit.patch.handle import left_alone
from sparsekit.patterns import parse_pattern
from sparsekit.patterns.shared import SharedPlans

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["inspect_model"]

EPSILON = 0.3  # of a sink score, as published for 64 tokens
COLUMN_ROWS = 64  # a column that fewer queries than this can see is no sink, whatever they give it
TOP = 8
KEPT_SINKS = (0, 1, 4, 8)


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
    kept_sinks: Sequence[int] = KEPT_SINKS,
    quiet: bool = False,
) -> Inspection:
    """Attention sinks of a model, and what a config drops of its attention.

    What is applied to the model is off meanwhile, and on again then.

    Args:
        config: whose patterns are measured; default none.
        samples, tokens, seeds, tasks: of the prompts, as for the probe.
        epsilon: a score above it is a sink.
        score_tokens: over how many first tokens the sink score is taken.
        gradient: also measure the gradient that the config drops; takes a backward pass a prompt.
        kept_sinks: numbers of sink tokens that streaming and triangle keep while their divergence is measured, to which
            that which the model needs is added; none: it is not measured. The window is a quarter of the prompt and
            512 tokens at most, the last rows an eighth and 128 at most.

    Raises:
        SparsekitError: prompts beyond the model's positions, a config for another model, or `gradient` without one; a
        model in training mode, or whose activations are not finite.
    """
    if not 0 < epsilon < 1 or score_tokens < 2:
        raise SparsekitError(f"epsilon = {epsilon}, score_tokens = {score_tokens}: between 0 and 1, and at least 2.")
    if gradient and config is None:
        raise SparsekitError("gradient: it is measured on what a config drops; give the config.")
    if model.training:
        raise SparsekitError("the model is in training mode, where dropout changes what it does: model.eval() first.")
    loaded = None if config is None else load(config)
    resolved = None if loaded is None else loaded.resolve(facts(model))
    own = own_layers(model, some=True)
    if resolved is not None:
        resolved.own_layers(facts(model))
    prompts = make_prompts(model, tokenizer, tasks=tasks, tokens=[tokens], count=samples, seeds=seeds)
    sparse = {} if resolved is None else {x.layer: x for x in resolved.layers if not x.dense and x.layer not in own}
    found: list[dict[int, dict[str, Any]]] = []
    with left_alone(model), progress("inspect", len(prompts), quiet=quiet) as step:
        remove(model)
        for prompt in prompts:
            found.append(_look(model, tokenizer, prompt, sparse, own, epsilon, score_tokens, gradient))
            step(1)
    count = facts(model).num_layers
    missing = [i for i in range(count) if i not in own and not all("score" in sample.get(i, ()) for sample in found)]
    if missing:
        raise SparsekitError(f"layers {format_range(missing)} ran no attention that could be looked at.")
    layers = [_joined(i, own.get(i, ""), [sample[i] for sample in found if i in sample]) for i in range(count)]
    described = {"tasks": sorted({p.task.name for p in prompts}), "tokens": tokens, "seeds": list(seeds)}
    label = "" if config is None else (str(config) if isinstance(config, str | Path) else "the config")
    said = Inspection(
        facts(model).name, len(prompts), described, epsilon, score_tokens, label, made_on(model), tuple(layers)
    )
    if not kept_sinks:
        return said
    counts = sorted({*kept_sinks, said.sink_tokens or 0})
    with left_alone(model):
        remove(model)
        judge = Judge(model, tokenizer, prompts)
        kept = _harm(judge, [i for i in range(count) if i not in own], counts, tokens, quiet)
    return replace(said, kept=tuple(kept))


def _harm(judge: Judge, layers: Sequence[int], counts: Sequence[int], tokens: int, quiet: bool) -> list[dict[str, Any]]:
    """KL from dense of streaming and of triangle in these layers, with each number of sinks."""
    near = {"window_tokens": min(512, tokens // 4)}
    last = {"last_tokens": min(128, tokens // 8)}
    rows = []
    with progress("kept sinks", 2 * len(counts), quiet=quiet) as step:
        for name, more in (("a_shape", {}), ("triangle", last)):
            for sinks in counts:
                pattern = parse_pattern({"name": name, "sink_tokens": sinks, **near, **more})
                kl, width = mean_interval(judge.effect(dict.fromkeys(layers, pattern)).kl)
                known = width if math.isfinite(width) else None
                rows.append({"name": name, "sink_tokens": sinks, **near, **last, "kl": kl, "kl_half_width": known})
                step(1)
    return rows


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
    plans = SharedPlans()
    has: dict[int, str] = {}  # what the softmax of each layer that called attention has besides its keys

    def attention(run: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        out, weights = run(module, q, k, v, mask, **kwargs)
        layer = module.layer_idx
        attended(module, out)
        softmax = softmax_of(module, q, kwargs)
        has[layer] = sink_logits_are(softmax)
        if layer in own:
            return out, weights
        if k.shape[2] != q.shape[2]:
            raise SparsekitError(f"layer {layer} has {k.shape[2]} keys for a prompt of {q.shape[2]} tokens.")
        with torch.no_grad():
            seen = columns(q, k, softmax, score_tokens)
            found[layer] = _measures(seen, k, v, names, prompt.tokens, epsilon, learned=softmax.sink_logits is not None)
            if layer in sparse:
                kept_out = _kept(sparse[layer], q, k, v, softmax, seen, found[layer], plans)
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
        return model(ids[None].to(model.device), use_cache=False, logits_to_keep=1)

    with watch_outputs(model, score_tokens) as (outputs, attended), wrap_attention(model, attention):
        if gradient:
            with activations_alone(model), torch.enable_grad():
                result = read()
                result.logits[0, -1, target].float().backward()
        else:
            with torch.no_grad():
                read()
    return {layer: {**found.get(layer, {}), **_put_out(outputs, layer, has, names)} for layer in outputs.hidden}


def _put_out(outputs: Outputs, layer: int, has: Mapping[int, str], names: Sequence[str]) -> dict[str, Any]:
    """Of a layer: what it has against sinks, what its heads add, and the largest channels after it."""
    gate = outputs.gates.get(layer)
    mitigation = None if layer not in has else ("output gate",) * (gate is not None) + (has[layer],) * bool(has[layer])
    return {
        "mitigation": mitigation,
        "gate": gate,
        "between": outputs.between.get(layer, ""),
        "output": outputs.heads.get(layer, []),
        "massive": tuple({**one, "token": names[one["position"]]} for one in outputs.hidden[layer]),
    }


def _measures(
    seen: Columns, k: Tensor, v: Tensor, names: Sequence[str], budget: int, epsilon: float, *, learned: bool
) -> dict[str, Any]:
    whole = sink_scores(seen.whole)[0][:, : max(seen.whole.shape[-1] - COLUMN_ROWS, 1)]  # (H, N')
    mean = whole.mean(0)
    best, at = mean.topk(min(TOP, len(mean)))
    above = (whole > epsilon).any(0).nonzero()[:, 0]
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
        "first": seen.share(above.new_zeros(1))[0].tolist(),
        "learned": seen.learned[0].tolist() if learned else [],
        "top": [
            {"position": p, "token": names[p], "score": s, "largest_head": float(whole[:, p].max())}
            for p, s in zip(at.tolist(), best.tolist(), strict=True)
        ],
        "sinks": above.tolist(),
        "sink_mass": seen.mass(above)[0].tolist(),
        "mass_by_length": {
            (end if end < len(names) else budget): seen.mass(above, i)[0].tolist()
            for i, end in enumerate(seen.ends)
            if i
        },
        **ratios,
    }


def _kept(
    patterns: LayerPatterns,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax: Softmax,
    seen: Columns,
    into: dict[str, Any],
    plans: SharedPlans,
) -> Tensor:
    """Note the mass that a layer's pattern drops; return the dense output's part that comes from the kept pairs.

    Kept pairs have the sum exp(lse) of exponentials, all pairs exp(dense lse): their ratio is the mass that is kept,
    and the sparse output times it is the kept pairs' sum of P V. No mask is made.
    """
    plan = patterns.plan(q, k, geometry_for(q, k), softmax, plans).corrected(0)
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


def _joined(layer: int, own: str, samples: Sequence[Mapping[str, Any]]) -> LayerSinks:
    """Means over the samples; columns by position."""
    if not samples:
        return LayerSinks(layer, own)

    def mean(name: str) -> tuple[float, ...]:
        return _means([sample[name] for sample in samples if sample.get(name)])

    gates = [sample["gate"] for sample in samples if sample["gate"] is not None]
    strongest = max(samples, key=lambda sample: sample["massive"][0]["ratio"])
    found = LayerSinks(
        layer,
        own,
        mitigation=samples[-1]["mitigation"],
        gate=sum(gates) / len(gates) if gates else None,
        between=samples[-1]["between"],
        massive=strongest["massive"],
    )
    if own:
        return found
    tops: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        for column in sample["top"]:
            tops.setdefault(column["position"], []).append(column)
    top = [
        {
            "position": at,
            "token": each[-1]["token"],
            "score": sum(c["score"] for c in each) / len(each),
            "largest_head": max(c["largest_head"] for c in each),
            "samples": len(each),
        }
        for at, each in tops.items()
    ]
    top.sort(key=lambda c: (-c["score"] * c["samples"], c["position"]))
    seen = Counter(at for sample in samples for at in sample["sinks"])
    by_length = [sample["mass_by_length"] for sample in samples]
    return replace(
        found,
        score=mean("score"),
        rate=sum(sample["above"] for sample in samples) / len(samples),
        first=mean("first"),
        learned=mean("learned"),
        top=tuple(top[:TOP]),
        sinks={at: n / len(samples) for at, n in sorted(seen.items())},
        sink_mass=mean("sink_mass"),
        mass_by_length={
            n: _means([of[n] for of in by_length]) for n in by_length[0] if all(n in of for of in by_length)
        },
        output=mean("output"),
        value_ratio=sum(sample["value_ratio"] for sample in samples) / len(samples),
        key_ratio=sum(sample["key_ratio"] for sample in samples) / len(samples),
        dropped_mass=mean("dropped_mass"),
        dropped_gradient=mean("dropped_gradient"),
    )


def _means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Of each head, over the samples."""
    return tuple(sum(values) / len(values) for values in zip(*rows, strict=True)) if rows else ()
