"""explain(config, tokens): what a config costs, layer by layer, without weights and without a GPU.

The cost model counts floating-point operations and takes them all at one rate. Attention: 4 * head_dim for each
query-key pair of every tile that the kernel visits (2 for q.k, 2 for the weighted sum of v), whole tiles, masked pairs
included, for each query head. Linear layers: 2 for each weight and token (q, k, v and o projections, a gated MLP), and
the language head for the last token alone. Norms, rotary embedding, softmax and planning are not counted.

Held against Llama-3.1-8B's shape on one H100 at 131072 tokens: attention takes two thirds of the dense prefill,
predicted 0.71; triangle from layer 16 on takes 0.71 of the dense prefill's time, predicted 0.65; triangle in every
layer 0.34, predicted 0.30. What is not counted is not attention, so a prediction is a little too good.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsekit.call.geometry import MAX_TOKENS, Geometry
from sparsekit.config.drawing import draw_heads
from sparsekit.config.explanation import Explanation, LayerExplanation, ratio, total
from sparsekit.config.facts import ModelFacts
from sparsekit.config.layers import LayerPatterns
from sparsekit.config.precision import MODEL
from sparsekit.config.schema import ResolvedConfig, SparseConfig, load
from sparsekit.config.settle import Machine, settle
from sparsekit.errors import SparsekitError
from sparsekit.patterns import AShape, Dense, DynamicPattern, Pattern, StaticPattern, shared_correction, static_plan
from sparsekit.patterns.attention import static_plan_heads
from sparsekit.patterns.base import rule_of
from sparsekit.patterns.crossover import device_name
from sparsekit.plan import TokenRule
from sparsekit.plan.totals import causal_totals

__all__ = ["Explanation", "LayerExplanation", "explain", "facts_for"]


_CPU = torch.device("cpu")
_CUDA = torch.device("cuda")  # whose crossover lengths are shown; it need not be here
_SIZES = ("num_key_heads", "head_dim", "hidden_size", "intermediate_size", "vocab_size")


def explain(
    config: SparseConfig | Mapping[str, Any] | str | Path, tokens: int, model: ModelFacts | None = None
) -> Explanation:
    """What each layer does in the prefill of a prompt of `tokens` tokens, and what it costs.

    Args:
        config: a path, YAML text, a mapping or a SparseConfig.
        tokens: length of the prompt, 1 to 2^29.
        model: the model's facts (`sparsekit.models.facts(...)`); default what the config says under `model:`.

    Raises:
        SparsekitError: a config that is wrong or for another model, or a number of tokens out of range.
    """
    config = load(config)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= MAX_TOKENS:
        raise SparsekitError(f"tokens = {tokens!r}: a whole number from 1 to {MAX_TOKENS} is needed.")
    facts = facts_for(config, model)
    resolved = settle(config.resolve(facts), facts, _machine, strict=False)
    config = resolved.config
    own = resolved.own_layers(facts)
    geometry = Geometry.of(tokens)
    because = config.why_dense(tokens, tokens)
    counted: dict[Any, LayerExplanation] = {}
    rows, unknown = [], []
    for layer in resolved.layers:
        kind = facts.kind(layer.layer), facts.window(layer.layer)
        key = (layer.patterns, layer.pattern_of_head, layer.reused, layer.precision, own.get(layer.layer), kind)
        if key not in counted:
            counted[key] = _count(layer, own.get(layer.layer), facts, geometry, because)
            unknown += [counted[key].why] if counted[key].pairs is None else []
        rows.append(replace(counted[key], layer=layer.layer))
    missing = tuple(name for name in _SIZES if getattr(facts, name) is None)
    return _predict(
        Explanation(
            model=facts.name or "",
            tokens=tokens,
            block_q=geometry.block_q,
            block_kv=geometry.block_kv,
            layers=tuple(rows),
            linear_flops=None if missing else _linear_flops(facts, tokens),
            plan_bytes=total(row.plan_bytes for row in counted.values()),
            missing=(*missing, *dict.fromkeys(unknown)),
            drawing=tuple(_drawn(resolved, facts)),
            settled=resolved.settled,
        ),
        facts,
    )


def _machine() -> Machine:
    """The GPU that is here, at the dtype that models are served in; nothing of a CPU, on which no config is meant to
    run."""
    return Machine(device_name(_CUDA) if torch.cuda.is_available() else "", "bfloat16")


def _drawn(resolved: ResolvedConfig, facts: ModelFacts) -> list[str]:
    # Layers share patterns, of which one may hold thousands of numbers.
    distinct = {id(pattern): pattern for at in resolved.layers for pattern in at.patterns}
    said = {number: str(pattern) for number, pattern in distinct.items()}
    layers = [(str(at.layer), [(said[id(one)], heads) for one, heads in at.groups()]) for at in resolved.layers]
    return draw_heads(layers, (facts.num_heads or 0) // (facts.num_key_heads or facts.num_heads or 1))


# ---- facts


def facts_for(config: SparseConfig, model: ModelFacts | None) -> ModelFacts:
    """What is known of the model: its own facts first, then what the config says."""
    if model is None:
        return config.model
    if not isinstance(model, ModelFacts):
        raise SparsekitError(
            f"model = {model!r}: the facts of a model are needed, not a {type(model).__name__}; "
            "use sparsekit.models.facts(path or name)."
        )
    missing = {name: getattr(config.model, name) for name in ("name", *_SIZES) if getattr(model, name) is None}
    return model.model_copy(update=missing)


# ---- counting


def _count(
    layer: LayerPatterns, own: str | None, facts: ModelFacts, geometry: Geometry, because: str
) -> LayerExplanation:
    """Pairs, tiles and bytes of a layer."""
    heads = len(layer.pattern_of_head)
    dense_pairs, dense_tiles = causal_totals(geometry, heads)
    runs, why, counts, at_most = "sparse", "", None, None
    windowed = _own_counts(layer, facts, geometry)
    dynamic = [pattern for pattern in layer.patterns if isinstance(pattern, DynamicPattern)]
    below = {pattern.name: pattern.dense_below(_CUDA) for pattern in dynamic}
    short = {name: n for name, n in below.items() if geometry.q_len < n}
    executed = _executed(layer, geometry)
    if own:
        runs, why = "own", own
        counts = windowed
    elif windowed and because:
        runs, why, counts = "own", because, windowed
    elif because or executed.dense:
        runs, why = "dense", because if not layer.dense else ""
        if not because and short:
            why = f"{geometry.q_len} tokens, fewer than the {max(short.values())} from which {', '.join(short)} pays"
        counts = dense_pairs, dense_tiles, 0
    elif not any(pattern.estimates for pattern in executed.patterns):
        pairs, tiles, plan_bytes = _static_counts(executed, geometry)
        more_pairs, more_tiles = _anchor_counts(executed, geometry) if pairs < dense_pairs else (0, 0)
        counts = pairs + more_pairs, tiles + more_tiles, plan_bytes
    else:
        names = ", ".join(dict.fromkeys(p.name for p in executed.patterns if p.estimates))
        why = f"what {names} keeps depends on the prompt"
        most = total([_most_pairs(executed, geometry), _anchor_counts(executed, geometry)[0]])
        at_most = ratio(most, dense_pairs)
    kept = counts or (None, None, None)
    return LayerExplanation(
        layer=layer.layer,
        runs=runs,
        why=why,
        pattern=str(layer),
        density=ratio(kept[0], dense_pairs),
        tile_density=ratio(kept[1], dense_tiles),
        tiles=kept[1],
        dense_tiles=dense_tiles,
        pairs=kept[0],
        dense_pairs=dense_pairs,
        plan_bytes=kept[2],
        density_at_most=at_most,
        dense_below=0 if own or because else max(below.values(), default=0),
        model_tiles=windowed[1] if windowed else None,
        estimates=counts is None and not own and executed.estimates,
        plan_of=None if layer.reused is None else layer.reused.layer,
        precision=MODEL if because else layer.precision,
    )


def _executed(layer: LayerPatterns, geometry: Geometry) -> LayerPatterns:
    """The layer with `dense` in place of each dynamic pattern that runs dense at this length on a GPU."""

    def runs(pattern: Pattern) -> Pattern:
        short = isinstance(pattern, DynamicPattern) and geometry.q_len < pattern.dense_below(_CUDA)
        return Dense() if short else pattern

    return replace(layer, patterns=tuple(map(runs, layer.patterns)))


def _most_pairs(layer: LayerPatterns, geometry: Geometry) -> int | None:
    """Pairs that a layer keeps at most; None where a pattern has no budget that bounds them."""
    total, tokens = 0, geometry.q_len
    for pattern, heads in layer.groups():
        if isinstance(pattern, StaticPattern):
            total += len(heads) * _kept_pairs(pattern, geometry)
            continue
        keys = pattern.keys_at_most(geometry) if isinstance(pattern, DynamicPattern) else None
        if keys is None:
            return None
        total += len(heads) * TokenRule(0, keys, tokens).pairs(geometry.spans[0])
    return total


def _own_counts(layer: LayerPatterns, facts: ModelFacts, geometry: Geometry) -> tuple[int, int, int] | None:
    """A sliding layer is counted as its window, at the best that a kernel can do; other kinds are not known."""
    window = facts.window(layer.layer)
    if facts.kind(layer.layer) != "sliding_attention" or window is None:
        return None
    sliding = AShape(sink_tokens=0, window_tokens=window)
    pairs, tiles, _ = _static_counts(
        replace(layer, patterns=(sliding,), pattern_of_head=(0,) * len(layer.pattern_of_head)), geometry
    )
    return pairs, tiles, 0


def _static_counts(layer: LayerPatterns, geometry: Geometry) -> tuple[int, int, int]:
    """(pairs, tiles, plan bytes) of a layer whose patterns are all static: each pattern once, times its heads."""
    pairs = tiles = 0
    static = tuple(pattern for pattern in layer.patterns if isinstance(pattern, StaticPattern))
    for pattern, heads in zip(static, (heads for _, heads in layer.groups()), strict=True):
        pairs += len(heads) * _kept_pairs(pattern, geometry)
        tiles += len(heads) * int(static_plan(pattern, geometry, _CPU).visited_tiles())
    return pairs, tiles, static_plan_heads(static, layer.pattern_of_head, geometry, _CPU).nbytes


def _anchor_counts(layer: LayerPatterns, geometry: Geometry) -> tuple[int, int]:
    """(pairs, tiles) of the dense rows by which a layer is corrected, those of all its heads."""
    every, heads = shared_correction(layer.patterns), len(layer.pattern_of_head)
    return causal_totals(replace(geometry, q_step=every), heads) if every else (0, 0)


def _kept_pairs(pattern: StaticPattern, geometry: Geometry) -> int:
    """Pairs that one head keeps. A token rule is summed in closed form: counting a plan at 1M tokens takes seconds."""
    span = geometry.spans[0]
    rule = rule_of(pattern, span)
    if rule is None:
        return static_plan(pattern, geometry, _CPU).kept_pairs()
    return rule.pairs(span)


# ---- predicting


def _linear_flops(facts: ModelFacts, tokens: int) -> int:
    """2 for each weight and token: projections and gated MLPs of all layers, the language head for the last token."""
    sizes: dict[str, Any] = {name: getattr(facts, name) for name in (*_SIZES, "num_layers", "num_heads")}
    hidden, layers, mlp = sizes["hidden_size"], sizes["num_layers"], sizes["intermediate_size"]
    heads = sum(facts.layer_heads or [layers * sizes["num_heads"]])
    projections = 2 * hidden * (heads + layers * sizes["num_key_heads"]) * sizes["head_dim"]
    mlps = 3 * hidden * (sum(mlp) if isinstance(mlp, tuple) else layers * mlp)
    return 2 * (tokens * (projections + mlps) + hidden * sizes["vocab_size"])


def _predict(found: Explanation, facts: ModelFacts) -> Explanation:
    """The same with FLOPs and shares, where the facts allow."""
    if facts.head_dim is None:
        return found
    of_pair = 4 * facts.head_dim
    of_tile = of_pair * found.block_q * found.block_kv
    counted = replace(
        found,
        layers=tuple(
            replace(
                row,
                attention_flops=None if row.tiles is None else row.tiles * of_tile,
                dense_attention_flops=_dense_flops(row, of_tile),
                pair_flops=None if row.pairs is None else row.pairs * of_pair,
            )
            for row in found.layers
        ),
    )
    whole, dense = counted.prefill_flops, counted.dense_prefill_flops
    return replace(
        counted,
        layers=tuple(
            replace(row, share=ratio(row.attention_flops, whole), dense_share=ratio(row.dense_attention_flops, dense))
            for row in counted.layers
        ),
    )


def _dense_flops(row: LayerExplanation, of_tile: int) -> int | None:
    """What the layer costs in the unpatched model: its own attention where it keeps that."""
    tiles = row.tiles if row.runs == "own" else row.model_tiles or row.dense_tiles
    return None if tiles is None else tiles * of_tile
