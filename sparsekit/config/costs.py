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

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsekit.call.geometry import Geometry
from sparsekit.config.ranges import format_range
from sparsekit.config.schema import LayerPatterns, ModelFacts, SparseConfig, load
from sparsekit.errors import SparsekitError
from sparsekit.patterns import (
    AShape,
    Dense,
    DynamicPattern,
    Pattern,
    StaticPattern,
    static_plan,
)
from sparsekit.patterns.attention import static_plan_heads

__all__ = ["Explanation", "LayerExplanation", "explain", "facts_for"]

# A plan's entry is `position * 4 + flags` in 32 bits.
MAX_TOKENS = 1 << 29

PREFIXES = ("", "k", "M", "G", "T", "P", "E")

_CPU = torch.device("cpu")
_CUDA = torch.device("cuda")  # whose crossover lengths are shown; it need not be here
_SIZES = ("num_key_heads", "head_dim", "hidden_size", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class LayerExplanation:
    """One layer. Counts are of one sample and all query heads; what cannot be known is None, and `why` says so.

    Attributes:
        layer: its number, from 0.
        runs: "sparse", "dense", or "own" (attention that is not full causal, which the model keeps).
        why: why it does not run `pattern` as written, or nothing.
        pattern: what the config says.
        density: pairs kept / causal pairs, unrounded; None for a dynamic pattern, which chooses from the prompt.
        density_at_most: what `density` cannot exceed, where budgets bound it.
        dense_below: prompts shorter than this, tokens, run dense on a GPU in place of a dynamic pattern; 0: none do.
        tile_density: tiles visited / tiles of dense causal attention.
        tiles, dense_tiles: tiles of `block_q` x `block_kv` tokens that are visited, and that dense attention visits.
        model_tiles: what the unpatched model visits where its layer has a window; None: `dense_tiles`, or not known.
        pairs, dense_pairs: query-key pairs.
        plan_bytes: of the plan's tensors, which layers of one pattern share.
        attention_flops, dense_attention_flops: 4 * head_dim for each pair of the visited tiles.
        pair_flops: 4 * head_dim for each kept pair: the least that any kernel could do.
        share, dense_share: of this layer's attention in the predicted prefill with this config, and in the dense one.
    """

    layer: int
    runs: str
    why: str
    pattern: str
    density: float | None
    tile_density: float | None
    tiles: int | None
    dense_tiles: int
    pairs: int | None
    dense_pairs: int
    plan_bytes: int | None
    density_at_most: float | None = None
    dense_below: int = 0
    model_tiles: int | None = None
    attention_flops: int | None = None
    dense_attention_flops: int | None = None
    pair_flops: int | None = None
    share: float | None = None
    dense_share: float | None = None


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. Printing it gives a table.

    Attributes:
        model: a label, or nothing.
        tokens: length of the prompt.
        block_q, block_kv: the tile that was counted, tokens.
        layers: one for each layer.
        linear_flops: of all projections and MLPs, and the language head for one token.
        plan_bytes: of all different plans together, as they are kept.
        missing: facts without which some numbers are None.
    """

    model: str
    tokens: int
    block_q: int
    block_kv: int
    layers: tuple[LayerExplanation, ...]
    linear_flops: int | None
    plan_bytes: int | None
    missing: tuple[str, ...]

    @property
    def density(self) -> float | None:
        """Pairs kept / causal pairs, over all layers."""
        return _ratio(_total(row.pairs for row in self.layers), sum(row.dense_pairs for row in self.layers))

    @property
    def attention_flops(self) -> int | None:
        return _total(row.attention_flops for row in self.layers)

    @property
    def dense_attention_flops(self) -> int | None:
        return _total(row.dense_attention_flops for row in self.layers)

    @property
    def prefill_flops(self) -> int | None:
        """Predicted cost of the whole prefill with this config."""
        return _total([self.linear_flops, self.attention_flops])

    @property
    def dense_prefill_flops(self) -> int | None:
        return _total([self.linear_flops, self.dense_attention_flops])

    @property
    def prefill_ratio(self) -> float | None:
        """Predicted time of the whole prefill / that of the dense prefill."""
        return _ratio(self.prefill_flops, self.dense_prefill_flops)

    @property
    def attention_share(self) -> float | None:
        """Share of attention in the predicted prefill with this config."""
        return _ratio(self.attention_flops, self.prefill_flops)

    @property
    def dense_attention_share(self) -> float | None:
        """Share of attention in the dense prefill: what there is to win."""
        return _ratio(self.dense_attention_flops, self.dense_prefill_flops)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers and text, one object a layer under `layers`."""
        totals = (
            "density",
            "attention_flops",
            "dense_attention_flops",
            "prefill_flops",
            "dense_prefill_flops",
            "prefill_ratio",
            "attention_share",
            "dense_attention_share",
        )
        found = asdict(self)
        layers = found.pop("layers")
        found["missing"] = list(self.missing)
        return {**found, **{name: getattr(self, name) for name in totals}, "layers": list(layers)}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows) in words, neighbouring layers that are alike in one row."""
        head = ["layers", "pattern", "density", "tile density", "tiles", "plan", "FLOPs", "of dense", "share"]
        rows = []
        for layers, row in _alike(self.layers):
            flops = _ratio(row.attention_flops, row.dense_attention_flops)
            why = [f"{row.runs}: {row.why}"] if row.why else []
            why += [f"dense below {row.dense_below:,} tokens on a GPU"] if row.dense_below else []
            name = row.pattern + (f" [{'; '.join(why)}]" if why else "")
            rows.append(
                [
                    format_range(layers),
                    name,
                    _percent(row.density)
                    if row.density_at_most in (None, 1)
                    else f"<= {_percent(row.density_at_most)}",
                    _percent(row.tile_density),
                    "?" if row.tiles is None else f"{row.tiles:,}",
                    _amount(row.plan_bytes, "B"),
                    _amount(row.attention_flops, ""),
                    _percent(flops),
                    _percent(row.share) + (" each" if row.share is not None and len(layers) > 1 else ""),
                ]
            )
        return head, rows

    def summary(self) -> list[str]:
        """What the table adds up to, and what was counted, in sentences."""
        lines = [
            f"FLOPs: attention of one layer, 4 x head_dim for each pair of a visited {self.block_q} x {self.block_kv} "
            "tile and query head; share: its part of the whole prefill, linear layers included, all at one rate."
        ]
        if self.prefill_ratio is not None and self.dense_attention_share is not None:
            lines.append(
                f"Predicted prefill of {self.tokens:,} tokens: {self.prefill_ratio:.3f} of the dense one's time, in "
                f"which attention takes {_percent(self.dense_attention_share)}."
            )
        if self.missing:
            lines.append(f"Not predicted, because these are not known: {', '.join(self.missing)}.")
        return lines

    def __str__(self) -> str:
        head, rows = self.table()
        width = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
        body = [
            "  ".join(
                f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, width, strict=True))
            )
            for line in [head, *rows]
        ]
        return "\n".join([f"{self.model or 'model'}, {self.tokens:,} tokens", *body, *self.summary()])


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
    resolved = config.resolve(facts)
    own = resolved.own_layers(facts)
    geometry = Geometry.of(tokens)
    because = _dense_because(config, tokens)
    counted: dict[Any, LayerExplanation] = {}
    rows, unknown = [], []
    for layer in resolved.layers:
        kind = facts.kind(layer.layer), facts.window(layer.layer)
        key = (layer.patterns, layer.pattern_of_head, own.get(layer.layer), kind)
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
            plan_bytes=_total(row.plan_bytes for row in counted.values()),
            missing=(*missing, *dict.fromkeys(unknown)),
        ),
        facts,
    )


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


def _dense_because(config: SparseConfig, tokens: int) -> str:
    """Why a prompt of that length runs the model's own attention everywhere, or nothing."""
    if tokens < config.min_queries:
        return f"{tokens} queries, fewer than min_queries {config.min_queries}"
    if tokens < config.dense_below_tokens:
        return f"{tokens} tokens, fewer than dense_below_tokens {config.dense_below_tokens}"
    return ""


# ---- counting


def _count(
    layer: LayerPatterns, own: str | None, facts: ModelFacts, geometry: Geometry, because: str
) -> LayerExplanation:
    """Pairs, tiles and bytes of a layer."""
    heads = len(layer.pattern_of_head)
    dense_pairs, dense_tiles = heads * geometry.spans[0].causal_pairs, heads * _dense_tiles(geometry)
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
    elif all(isinstance(pattern, StaticPattern) for pattern in executed.patterns):
        counts = _static_counts(executed, geometry)
    else:
        names = ", ".join(dict.fromkeys(p.name for p in executed.patterns if not isinstance(p, StaticPattern)))
        why = f"what {names} keeps depends on the prompt"
        at_most = _ratio(_most_pairs(executed, geometry), dense_pairs)
    pairs, tiles, plan_bytes = counts or (None, None, None)
    return LayerExplanation(
        layer=layer.layer,
        runs=runs,
        why=why,
        pattern=str(layer),
        density=_ratio(pairs, dense_pairs),
        tile_density=_ratio(tiles, dense_tiles),
        tiles=tiles,
        dense_tiles=dense_tiles,
        pairs=pairs,
        dense_pairs=dense_pairs,
        plan_bytes=plan_bytes,
        density_at_most=at_most,
        dense_below=0 if own or because else max(below.values(), default=0),
        model_tiles=windowed[1] if windowed else None,
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
        full = min(tokens, keys)
        total += len(heads) * (_triangle(full) + (tokens - full) * full)
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


def _kept_pairs(pattern: StaticPattern, geometry: Geometry) -> int:
    """Pairs that one head keeps. A token rule is summed in closed form: counting a plan at 1M tokens takes seconds."""
    span = geometry.spans[0]
    rule = pattern.rule(span)
    if rule is None:
        return static_plan(pattern, geometry, _CPU).kept_pairs()
    listed, width = min(max(rule.dense_from, 0), span.q_end), rule.sink + rule.window
    full = min(listed, width)  # query i keeps min(i + 1, sink + window) keys, and i + 1 from dense_from on
    return _triangle(full) + (listed - full) * width + _triangle(span.q_end) - _triangle(listed)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def _dense_tiles(geometry: Geometry) -> int:
    """Tiles of one head that dense causal attention visits."""
    ends = range(geometry.block_q, geometry.rows * geometry.block_q + 1, geometry.block_q)
    return sum(-(-min(end, geometry.q_len) // geometry.block_kv) for end in ends)


# ---- predicting


def _linear_flops(facts: ModelFacts, tokens: int) -> int:
    """2 for each weight and token: projections and gated MLPs of all layers, the language head for the last token."""
    sizes: dict[str, Any] = {name: getattr(facts, name) for name in (*_SIZES, "num_layers", "num_heads")}
    hidden, layers, mlp = sizes["hidden_size"], sizes["num_layers"], sizes["intermediate_size"]
    projections = 2 * hidden * (sizes["num_heads"] + sizes["num_key_heads"]) * sizes["head_dim"]
    mlps = 3 * hidden * (sum(mlp) if isinstance(mlp, tuple) else layers * mlp)
    return 2 * (tokens * (layers * projections + mlps) + hidden * sizes["vocab_size"])


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
            replace(row, share=_ratio(row.attention_flops, whole), dense_share=_ratio(row.dense_attention_flops, dense))
            for row in counted.layers
        ),
    )


def _dense_flops(row: LayerExplanation, of_tile: int) -> int | None:
    """What the layer costs in the unpatched model: its own attention where it keeps that."""
    tiles = row.tiles if row.runs == "own" else row.model_tiles or row.dense_tiles
    return None if tiles is None else tiles * of_tile


def _total(values: Iterable[int | None]) -> int | None:
    known = list(values)
    return None if any(value is None for value in known) else sum(value for value in known if value is not None)


def _ratio(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


# ---- words


def _alike(rows: Iterable[LayerExplanation]) -> Iterator[tuple[list[int], LayerExplanation]]:
    """Neighbouring layers that differ in nothing but their number."""
    group: list[LayerExplanation] = []
    for row in rows:
        if group and replace(row, layer=group[0].layer) != group[0]:
            yield [same.layer for same in group], group[0]
            group = []
        group.append(row)
    if group:
        yield [same.layer for same in group], group[0]


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{value:.3%}" if value < 0.1 else f"{value:.1%}"


def _amount(value: int | None, unit: str) -> str:
    """12345 -> 12.3 k, three digits."""
    if value is None:
        return "?"
    thousands = 0
    while value >= 999.5 * 1000**thousands and thousands < len(PREFIXES) - 1:
        thousands += 1
    return f"{value / 1000**thousands:.3g} {PREFIXES[thousands]}{unit}".strip()
