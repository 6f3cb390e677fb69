"""What `explain` found: of each layer, and of all, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparsekit.config.precision import MODEL
from sparsekit.config.ranges import format_range

__all__ = ["Explanation", "LayerExplanation", "ratio", "total"]

PREFIXES = ("", "k", "M", "G", "T", "P", "E")


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
        estimates: whether it has to choose from q and k itself, which costs time that is not predicted.
        plan_of: the layer whose plan it reuses, if it does: then it estimates nothing.
        model_tiles: what the unpatched model visits where its layer has a window; None: `dense_tiles`, or not known.
        pairs, dense_pairs: query-key pairs.
        plan_bytes: of the plan's tensors, which layers of one pattern share.
        attention_flops, dense_attention_flops: 4 * head_dim for each pair of the visited tiles.
        pair_flops: 4 * head_dim for each kept pair: the least that any kernel could do.
        precision: of its products: "model", or what the config gives a layer that sparsekit's kernel runs.
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
    estimates: bool = False
    plan_of: int | None = None
    precision: str = MODEL
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
        drawing: layers x heads, lines of text; empty where no layer mixes patterns.
        settled: of each `dense_below_tokens: auto`, what was counted on the GPU that is here, in bfloat16, and why.
    """

    model: str
    tokens: int
    block_q: int
    block_kv: int
    layers: tuple[LayerExplanation, ...]
    linear_flops: int | None
    plan_bytes: int | None
    missing: tuple[str, ...]
    drawing: tuple[str, ...] = ()
    settled: tuple[str, ...] = ()

    @property
    def density(self) -> float | None:
        """Pairs kept / causal pairs, over all layers."""
        return ratio(total(row.pairs for row in self.layers), sum(row.dense_pairs for row in self.layers))

    @property
    def attention_flops(self) -> int | None:
        return total(row.attention_flops for row in self.layers)

    @property
    def dense_attention_flops(self) -> int | None:
        return total(row.dense_attention_flops for row in self.layers)

    @property
    def prefill_flops(self) -> int | None:
        """Predicted cost of the whole prefill with this config."""
        return total([self.linear_flops, self.attention_flops])

    @property
    def dense_prefill_flops(self) -> int | None:
        return total([self.linear_flops, self.dense_attention_flops])

    @property
    def prefill_ratio(self) -> float | None:
        """Predicted time of the whole prefill / that of the dense prefill."""
        return ratio(self.prefill_flops, self.dense_prefill_flops)

    @property
    def attention_share(self) -> float | None:
        """Share of attention in the predicted prefill with this config."""
        return ratio(self.attention_flops, self.prefill_flops)

    @property
    def dense_attention_share(self) -> float | None:
        """Share of attention in the dense prefill: what there is to win."""
        return ratio(self.dense_attention_flops, self.dense_prefill_flops)

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
        found |= {name: list(found[name]) for name in ("missing", "drawing", "settled")}
        return {**found, **{name: getattr(self, name) for name in totals}, "layers": list(layers)}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, rows) in words, neighbouring layers that are alike in one row."""
        head = ["layers", "pattern", "density", "tile density", "tiles", "plan", "FLOPs", "of dense", "share"]
        rows = []
        for layers, row in _alike(self.layers):
            flops = ratio(row.attention_flops, row.dense_attention_flops)
            why = [f"{row.runs}: {row.why}"] if row.why else []
            why += [row.precision] if row.precision != MODEL else []
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
            *self.drawing,
            f"FLOPs: attention of one layer, 4 x head_dim for each pair of a visited {self.block_q} x {self.block_kv} "
            "tile and query head; share: its part of the whole prefill, linear layers included, all at one rate.",
        ]
        reusing = [row.layer for row in self.layers if row.plan_of is not None]
        if reusing:
            estimating = [row.layer for row in self.layers if row.estimates]
            lines.append(
                f"Layers {format_range(reusing)} reuse plans and have no index cost; "
                + (f"layers {format_range(estimating)} estimate." if estimating else "at this length none estimates.")
            )
        others = [row.layer for row in self.layers if row.precision != MODEL]
        if others:
            words = ", ".join(sorted({row.precision for row in self.layers} - {MODEL}))
            lines.append(f"Layers {format_range(others)} run in {words}, and are counted at the rate of the others.")
        if self.prefill_ratio is not None and self.dense_attention_share is not None:
            lines.append(
                f"Predicted prefill of {self.tokens:,} tokens: {self.prefill_ratio:.3f} of the dense one's time, in "
                f"which attention takes {_percent(self.dense_attention_share)}."
            )
        lines += self.settled
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


def total(values: Iterable[int | None]) -> int | None:
    known = list(values)
    return None if any(value is None for value in known) else sum(value for value in known if value is not None)


def ratio(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


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
