"""Pictures. Reads plans (and result files), and computes nothing else.

`mask_figure` draws which query-key pairs each pattern of a config keeps: a panel for each different pattern, queries
downwards, keys to the right. Up to `EXACT_TOKENS` every pair is a cell; above, a cell is a square of tokens and is
coloured where the plan visits it, so that a picture of 128K tokens costs no N x N memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from sparsekit.call.geometry import TILES, Geometry
from sparsekit.config import LayerPatterns, Reuse, SparseConfig, format_range, load
from sparsekit.config.ranges import by_number
from sparsekit.config.reuse import pattern_reused
from sparsekit.errors import SparsekitError, writing
from sparsekit.patterns import Pattern, StaticPattern, static_plan
from sparsekit.plan import BlockPlan, unpack

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "SECTIONS",
    "colours",
    "draw_masks",
    "draw_probe",
    "draw_sinks",
    "label_sections",
    "mask_figure",
    "plain_axes",
    "probe_figure",
    "section_image",
    "sinks_figure",
]

EXACT_TOKENS = 4096
MAX_CELLS = 1024
MAX_TOKENS = 1 << 20
FORMATS = (".png", ".svg", ".pdf")
COLUMNS = 4
# A section thinner than this share of the panel is drawn this wide, or nobody would see it: 8 sinks in 4096 keys.
THIN, THIN_POINTS = 0.011, 3.0
# A section this wide, as a share of the panel, holds a line of text.
WIDE = 0.05

# What a cell shows, and its colour. The order is the value in `section_image`.
SECTIONS = ("future", "skipped", "kept", "window", "sink", "last")
COLOURS = {
    "future": "#ffffff",
    "skipped": "#eef1f5",
    "kept": "#6b8fb5",
    "window": "#2a78b8",
    "sink": "#d1495b",
    "last": "#e9a23b",
}
LABELS = {"window": "#1f6199", "sink": "#b8354a", "last": "#a86a10"}
INK, FAINT = "#1f2933", "#7b8794"


class _Rule(NamedTuple):
    """The token rule of a plan: what its sections are called by."""

    sink: int
    window: int
    dense_from: int


@dataclass(frozen=True)
class _Panel:
    """A pattern and where it runs, in words."""

    pattern: Pattern
    where: str


def mask_figure(
    config: SparseConfig | Mapping[str, Any] | str | Path,
    tokens: int,
    *,
    title: str | None = None,
    also: int | None = None,
) -> Figure:
    """A figure with a panel for each different pattern of a config, at a prompt of `tokens` tokens.

    Args:
        config: a path, YAML text, a mapping or a SparseConfig.
        tokens: length of the prompt, 16 to 2^20.
        title: a heading; default none.
        also: a second length whose density is written below each panel.

    Raises:
        SparsekitError: matplotlib is not installed, the config is wrong, or tokens is out of range.
    """
    need_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    for name, value in (("tokens", tokens), ("also", also)):
        if value is not None and not 16 <= value <= MAX_TOKENS:
            raise SparsekitError(f"{name} = {value}: a picture shows prompts of 16 to {MAX_TOKENS} tokens.")
    panels = _panels(load(config))
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    top = 0.45 if title else 0.0
    spacing = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.08)
    figure = Figure(figsize=(4.7 * columns, 5.0 * rows + top), facecolor="white", layout=spacing)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw(axes, panel, tokens, also, labelled_rows=index % columns == 0)
    if title:
        figure.suptitle(title, fontsize=15, color=INK, fontweight="bold")
    return figure


def draw_masks(
    config: SparseConfig | Mapping[str, Any] | str | Path,
    tokens: int,
    out: str | Path,
    *,
    title: str | None = None,
    also: int | None = None,
    dpi: int = 160,
) -> Path:
    """Write `mask_figure` to `out` (.png, .svg or .pdf), and return the path.

    Raises:
        SparsekitError: as `mask_figure`; or a suffix that is not one of these, or a folder that cannot be written.
    """
    return save(out, lambda: mask_figure(config, tokens, title=title, also=also), dpi)


def probe_figure(probe: Mapping[str, Any]) -> Figure:
    """Mean gradient and attention of each section over the layers, as in TriangleMix's figure 4.

    Args:
        probe: what `sparsekit calibrate probe` found, `Probe.to_dict()`; bars are standard errors over the samples.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), facecolor="white", layout="constrained")
    layers = [layer for layer in probe["layers"] if layer["gradient"] is not None]
    at = [layer["layer"] for layer in layers]
    looks = {"streaming": (COLOURS["window"], "s"), "last": (COLOURS["last"], "^"), "middle": (COLOURS["sink"], "o")}
    for index, (field, title) in enumerate((("gradient", "Grad: |dy / dtheta|"), ("mass", "Att: attention weight"))):
        axes = figure.add_subplot(1, 2, index + 1)
        for name in ("last", "middle"):
            colour, marker = looks[name]
            errors = [(layer["gradient_error"] or {}).get(name, 0.0) for layer in layers]
            axes.errorbar(
                at,
                [layer[field][name] for layer in layers],
                yerr=errors if field == "gradient" else None,
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.4,
                label=name.capitalize(),
            )
        axes.set_ylim(bottom=0)
        axes.set_title(f"{title}, mean over the section's pairs", fontsize=11, color=INK)
        axes.set_xlabel("layer", color=INK)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{probe['model']}: {probe['samples']} prompts", fontsize=12, color=INK, fontweight="bold")
    return figure


def draw_probe(probe: Mapping[str, Any], out: str | Path, *, dpi: int = 160) -> Path:
    """Write `probe_figure` to `out` (.png, .svg or .pdf), and return the path."""
    return save(out, lambda: probe_figure(probe), dpi)


def sinks_figure(inspection: Mapping[str, Any]) -> Figure:
    """Heat maps over layers and heads of what `sparsekit inspect` found, `Inspection.to_dict()`."""
    need_matplotlib()
    from matplotlib.figure import Figure

    names = {
        "score": f"sink score of key 0, {inspection['score_tokens']} tokens",
        "first": "attention to key 0",
        "sink_mass": "attention to all sinks",
        "learned": "attention to the learned sink",
        "output": "what the head adds, of its layer's",
        "dropped_mass": "attention that the config drops",
        "dropped_gradient": "gradient that the config drops",
    }
    layers = inspection["layers"]
    heads = max((len(layer["score"]) for layer in layers), default=1)
    shown = [name for name in names if any(layer[name] for layer in layers)]
    if not shown:
        raise SparsekitError("the inspection has no layer of full attention to draw.")
    figure = Figure(figsize=(1.0 + 3.2 * len(shown), 5.0), facecolor="white", layout="constrained")
    for index, name in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), index + 1)
        cells = [list(layer[name]) or [float("nan")] * heads for layer in layers]
        most = max(max(layer[name], default=0.0) for layer in layers) if name.startswith("dropped") else 1.0
        image = axes.imshow(cells, vmin=0, vmax=most or 1.0, cmap="magma", aspect="auto", interpolation="nearest")
        axes.set_title(names[name], fontsize=10, color=INK)
        axes.set_xlabel("head", color=INK)
        if index == 0:
            axes.set_ylabel("layer", color=INK)
        figure.colorbar(image, ax=axes)
    figure.suptitle(str(inspection["model"]), fontsize=12, color=INK, fontweight="bold")
    return figure


def draw_sinks(inspection: Mapping[str, Any], out: str | Path, *, dpi: int = 160) -> Path:
    """Write `sinks_figure` to `out` (.png, .svg or .pdf), and return the path."""
    return save(out, lambda: sinks_figure(inspection), dpi)


def save(out: str | Path, make: Callable[[], Figure], dpi: int) -> Path:
    path = Path(out)
    if path.suffix.lower() not in FORMATS:
        raise SparsekitError(f"output {str(path)!r}: the name must end in {', '.join(FORMATS)}.")
    figure = make()
    with writing(path, folders=True) as part:
        figure.savefig(part, dpi=dpi)
    return path


def section_image(pattern: StaticPattern, tokens: int) -> tuple[Tensor, int]:
    """(uint8 (cells, cells) of indices into `SECTIONS`, tokens a cell): rows are queries, columns keys.

    A pair that several sections keep is shown as the first of sink, window, last rows. A cell of more than one token
    shows what its visited tile holds first in that order.
    """
    cell = 1 if tokens <= EXACT_TOKENS else next((t for t in TILES if tokens <= t * MAX_CELLS), TILES[-1])
    tile = 128 if cell == 1 else cell
    plan = _plan(pattern, Geometry.of(tokens, block_q=tile, block_kv=tile))
    kept = _visited(plan) if cell > 1 else _exact(plan)
    first = torch.arange(len(kept)) * cell
    last = (first + cell - 1).clamp(max=tokens - 1)
    q_first, q_last, k_first, k_last = first[:, None], last[:, None], first[None], last[None]
    image = (k_first <= q_last).to(torch.uint8) * SECTIONS.index("skipped")
    rule = _rule(plan)
    if rule is None:
        image[kept] = SECTIONS.index("kept")
    else:
        image[kept] = SECTIONS.index("last")
        image[kept & (q_first - k_last < rule.window)] = SECTIONS.index("window")
        image[kept & (k_first < rule.sink)] = SECTIONS.index("sink")
    return image, cell


def _exact(plan: BlockPlan) -> Tensor:
    """bool (N, N): the pairs that a plan of one head keeps."""
    return _causal(plan.geometry.q_len) if plan.all_dense else plan.to_mask()[0, 0]


def _visited(plan: BlockPlan) -> Tensor:
    """bool (R, R): the square tiles that a plan of one head visits."""
    rows = plan.rows
    causal = _causal(rows)
    if plan.row_ptr is None or plan.entries is None:
        return causal
    out = torch.zeros_like(causal)
    owner = torch.repeat_interleave(torch.arange(rows), plan.row_ptr.long().diff())
    out[owner, unpack(plan.entries.long())[0] // plan.block_kv] = True
    if plan.dense_rows is not None:
        out[plan.dense_rows] = causal[plan.dense_rows]
    return out


def _causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def _plan(pattern: StaticPattern, geometry: Geometry) -> BlockPlan:
    return static_plan(pattern, geometry, torch.device("cpu"))


def _rule(plan: BlockPlan) -> _Rule | None:
    return None if plan.rule is None else _Rule(*plan.rule[0, 0].tolist())


# ---- panels


def _panels(config: SparseConfig) -> list[_Panel]:
    """The different patterns in the order of the layers that run them, each with where it runs, in words."""
    where: dict[Pattern, list[str]] = {}
    if config.model.num_layers is None or config.model.num_heads is None:
        for place, pattern in _written_rules(config):
            where.setdefault(pattern, []).append(place)
    else:
        for place, pattern in _resolved_rules(config.resolve().layers):
            where.setdefault(pattern, []).append(place)
    return [_Panel(pattern, "; ".join(places)) for pattern, places in where.items()]


def _resolved_rules(layers: Sequence[LayerPatterns]) -> Iterator[tuple[str, Pattern]]:
    found: dict[tuple[Pattern, str], list[int]] = {}
    for layer in layers:
        for pattern, heads in layer.groups():
            some = f", heads {format_range(heads)}" if len(heads) < len(layer.pattern_of_head) else ""
            found.setdefault((pattern, some), []).append(layer.layer)
    for (pattern, some), numbers in found.items():
        yield f"layer{'s' if len(numbers) > 1 else ''} {format_range(numbers)}{some}", pattern


def _written_rules(config: SparseConfig) -> Iterator[tuple[str, Pattern]]:
    """What the config says, where it does not say how many layers its model has."""
    yield "other layers" if config.layers else "every layer", config.default
    rules = by_number(config.layers)
    for key, rule in config.layers.items():
        pattern = pattern_reused(rule, rules, config.default) if isinstance(rule, Reuse) else rule
        yield f"layer{'' if key.isdecimal() else 's'} {key}", pattern
    for key, by_head in config.heads.items():
        for heads, pattern in by_head.items():
            yield f"layer{'' if key.isdecimal() else 's'} {key}, heads {heads}", pattern


def _draw(axes: Axes, panel: _Panel, tokens: int, also: int | None, *, labelled_rows: bool) -> None:
    axes.set_title(
        panel.where[:1].upper() + panel.where[1:] + f": {panel.pattern.name}",
        fontsize=13,
        color=INK,
        fontweight="bold",
        pad=10,
    )
    if isinstance(panel.pattern, StaticPattern):
        image, _ = section_image(panel.pattern, tokens)
        axes.imshow(colours(image), interpolation="antialiased", extent=(0, tokens, tokens, 0))
        label_sections(axes, panel.pattern, tokens)
        axes.set_xlabel("keys\n" + _density_line(panel.pattern, tokens, also), fontsize=11, color=INK, labelpad=6)
    else:
        axes.set(xlim=(0, tokens), ylim=(tokens, 0), aspect="equal")
        axes.text(tokens / 2, tokens / 2, "chosen from the prompt", ha="center", color=FAINT, fontsize=12)
        axes.set_xlabel("keys", fontsize=11, color=INK)
    if labelled_rows:
        axes.set_ylabel("queries", fontsize=11, color=INK)
    plain_axes(axes, tokens)


def colours(image: Tensor) -> Any:
    """The colours of an image of `SECTIONS`, uint8 (n, n, 3), n at most MAX_CELLS: red, green and blue.

    Edges are softened where cells share a dot.
    """
    from matplotlib.colors import to_rgb

    palette = torch.tensor(
        [[round(255 * part) for part in to_rgb(COLOURS[name])] for name in SECTIONS], dtype=torch.uint8
    )
    step = -(-len(image) // MAX_CELLS)
    counts = [avg_pool2d((image == i).float()[None], step, divisor_override=1)[0] for i in range(len(SECTIONS))]
    shares = torch.stack(counts, -1) / step**2
    return (shares @ palette.float()).round().to(torch.uint8).numpy()


def plain_axes(axes: Axes, tokens: int) -> None:
    """Ticks at the quarters of a prompt, and no frame above or on the right."""
    ticks = [0, tokens // 4, tokens // 2, 3 * tokens // 4, tokens]
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.set_yticks(ticks, [f"{t:,}" for t in ticks])
    axes.tick_params(length=3, color=FAINT, labelcolor=FAINT, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#cbd2d9")


def _density_line(pattern: StaticPattern, tokens: int, also: int | None) -> str:
    lengths = [tokens] if also is None else [tokens, also]
    parts = []
    for n in lengths:
        density = _plan(pattern, Geometry.of(n)).density()
        parts.append(f"{density:.2%} of the causal pairs at {n:,} tokens" if density < 1 else "")
    said = [part for part in parts if part]
    return "\n".join(said) if said else "100% of the causal pairs"


def label_sections(axes: Axes, pattern: StaticPattern, tokens: int) -> None:
    """Names and widths of the sections: inside the ones that are wide enough, beside the others."""
    plan = _plan(pattern, Geometry.of(tokens))
    rule = _rule(plan)
    if rule is None:
        if plan.all_dense:
            _label(axes, "all causal pairs", (0.34, 0.66), "#ffffff")
        return
    sink, window, last = (min(n / tokens, 1.0) for n in (rule.sink, rule.window, max(tokens - rule.dense_from, 0)))
    _thicken(axes, tokens, sink, window, last)
    if (room := 1 - last - window - sink) > 0.3:
        _label(axes, "skipped", (sink + 0.3 * room, 1 - last - 0.35 * room), FAINT)
    inside = window >= 2 * WIDE
    shift = window / 4 if inside else -0.045
    _label(axes, f"window of {rule.window:,} keys", (0.5 - shift, 0.5 + shift), "window", inside=inside, turned=-45)
    if sink and room > 0.3:
        inside = sink >= WIDE
        at = (sink / 2 if inside else sink + 0.035, 1 - last - room / 2)
        _label(axes, f"{rule.sink:,} sink keys", at, "sink", inside=inside, turned=90)
    if last:
        inside = last >= WIDE
        at = (sink + 0.3 * max(room, 0.5), 1 - last / 2 if inside else 1 - last - 0.04)
        _label(axes, f"last {tokens - rule.dense_from:,} rows", at, "last", inside=inside)


def _thicken(axes: Axes, tokens: int, sink: float, window: float, last: float) -> None:
    """A line over each section that is too thin to be seen at this scale."""
    lines = {
        "window": (window, [0, tokens], [0, tokens]),
        "last": (last, [0, tokens], [tokens, tokens]),
        "sink": (sink, [0, 0], [0, tokens]),
    }
    for name, (share, x, y) in lines.items():
        if 0 < share < THIN:
            axes.plot(x, y, color=COLOURS[name], linewidth=THIN_POINTS, clip_on=False, zorder=3, solid_capstyle="butt")


def _label(
    axes: Axes, text: str, at: tuple[float, float], colour: str, *, inside: bool = False, turned: float = 0
) -> None:
    """Text at a place given in shares of the panel (right, down), in a section's colour or white inside the section."""
    axes.text(
        at[0],
        1 - at[1],
        text,
        transform=axes.transAxes,
        color="#ffffff" if inside else LABELS.get(colour, colour),
        fontsize=11,
        rotation=turned,
        fontweight="bold",
        ha="center",
        va="center",
    )


def need_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise SparsekitError("pictures need matplotlib: pip install 'sparsekit-attention[plots]'")
