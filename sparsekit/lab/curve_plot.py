"""The picture of `calibrate head-curve`: KL and scores against the share of sparse heads, by head and by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.errors import SparsekitError
from sparsekit.lab.plots import COLOURS, INK, need_matplotlib, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_head_curve", "head_curve_figure"]

LOOKS = ((COLOURS["window"], "o"), (COLOURS["last"], "^"), ("#5b8c5a", "v"), ("#7a5195", "D"), ("#8d6e63", "P"))
BY_LAYER = (COLOURS["sink"], "s")


def head_curve_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """A line of two panels for each task and length: KL from dense (logarithmic), and the score beside dense's,
    where there are answers.

    Args:
        rows: of `HeadCurve`; bars are 95% intervals.

    Raises:
        SparsekitError: there are no rows.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys((row["task"], row["tokens"]) for row in rows))
    if not cases:
        raise SparsekitError("the curve has no rows to draw.")
    figure = Figure(figsize=(11, 3.9 * len(cases)), facecolor="white", layout="constrained")
    for line, (task, tokens) in enumerate(cases):
        own = [row for row in rows if (row["task"], row["tokens"]) == (task, tokens)]
        ways = sorted({row["by"] for row in own}, key=lambda way: (way == "layer", way))
        answers = own[0]["score"] is not None
        panels = [figure.add_subplot(len(cases), 2, 2 * line + column + 1) for column in range(1 + answers)]
        for way, (colour, marker) in zip(ways, [*LOOKS[: len(ways) - ("layer" in ways)], BY_LAYER], strict=False):
            shown = sorted((row for row in own if row["by"] == way), key=lambda row: row["heads_share"])
            label = "last layers" if way == "layer" else f"by head, {way}"
            looks: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.6, "capsize": 2}
            share = [100 * row["heads_share"] for row in shown]
            low = [min(row["kl_half_width"], 0.95 * row["kl"]) for row in shown]  # a logarithm's axis has no zero
            high = [row["kl_half_width"] for row in shown]
            panels[0].errorbar(share, [row["kl"] for row in shown], yerr=[low, high], label=label, **looks)
            if not answers:
                continue
            score, least, most = zip(*(row["score"] for row in shown), strict=True)
            below = [max(a - b, 0.0) for a, b in zip(score, least, strict=True)]
            above = [max(b - a, 0.0) for a, b in zip(score, most, strict=True)]
            panels[1].errorbar(share, score, yerr=[below, above], label=label, **looks)
        if any(row["kl"] > 0 for row in own):
            panels[0].set_yscale("log")
        if answers:
            panels[1].axhline(own[0]["dense_score"][0], color=INK, linewidth=1, linestyle=":", label="dense")
            panels[1].set_ylim(0, 1.05)
        said = f"{task}, {tokens:,} tokens, {own[0]['samples']} prompts"
        for axes, what in zip(panels, ("KL from dense, nats a token", "score"), strict=False):
            axes.set_title(f"{what}: {said}", fontsize=10, color=INK)
            axes.set_xlabel("share of heads that run the pattern, %", color=INK)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
    figure.suptitle(title, fontsize=12, color=INK, fontweight="bold")
    return figure


def draw_head_curve(rows: Sequence[Mapping[str, Any]], title: str, out: str | Path, *, dpi: int = 130) -> Path:
    """Write `head_curve_figure` to `out` (.png, .svg or .pdf), and return the path."""
    return save(out, lambda: head_curve_figure(rows, title), dpi)
