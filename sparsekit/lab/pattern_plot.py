"""The picture of one pattern: which pairs of a short prompt it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError
from sparsekit.kernels import attend
from sparsekit.lab.bench.inputs import Inputs, structured
from sparsekit.lab.plots import (
    EXACT_TOKENS,
    INK,
    SECTIONS,
    colours,
    label_sections,
    need_matplotlib,
    plain_axes,
    save,
    section_image,
)
from sparsekit.patterns import Pattern, StaticPattern, parse_pattern, pattern_class
from sparsekit.plan import BlockPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_pattern", "drawn_at", "pattern_figure", "pattern_images"]

TOKENS = 3072  # where patterns choose among 24 blocks of 128
HEADS, KEY_HEADS, DIM = 4, 2, 64
COLUMNS = 32  # heavy keys of each key head
SHOWN = (0, HEADS - 1)  # of different key heads
SHARE = 0.3  # of the causal pairs, in the picture of a bare name


def drawn_at(pattern: Pattern | str | Mapping[str, Any], tokens: int = TOKENS) -> Pattern:
    """The pattern; for a bare name, at that bench, sweep or test point which keeps nearest to `SHARE` of the pairs.

    A pattern's own settings are for long prompts, and may keep everything of a short one.

    Raises:
        SparsekitError: an unknown name, or fields that the pattern does not have.
    """
    if not isinstance(pattern, str):
        return parse_pattern(pattern)
    cls = pattern_class(pattern)
    points = [point for own in (cls.bench_points, cls.sweep_points, cls.test_points) for point in own]
    found = list(dict.fromkeys(parse_pattern({"name": pattern, **point}) for point in points if _whole(cls, point)))
    return min(found, key=lambda one: abs(_plan(one, tokens).density() - SHARE))


def _whole(cls: type[Pattern], point: Mapping[str, Any]) -> bool:
    """Whether the point gives every field that the pattern requires."""
    return all(name in point or not field.is_required() for name, field in cls.model_fields.items())


def _plan(pattern: Pattern, tokens: int, seed: int = 0) -> BlockPlan:
    """Its plan for the synthetic inputs, after it ran where only running it decides what is visited."""
    x = _inputs(tokens, seed)
    plan = pattern.plan(x.q, x.k, Geometry.of(tokens), Softmax(DIM**-0.5))
    if plan.ranked is not None:
        attend(x.q, x.k, x.v, plan)
    return plan


@cache
def _inputs(tokens: int, seed: int) -> Inputs:
    return structured(tokens, heads=HEADS, key_heads=KEY_HEADS, dim=DIM, columns=COLUMNS, seed=seed)


def pattern_images(pattern: Pattern, tokens: int = TOKENS, *, seed: int = 0) -> list[tuple[str, Tensor, float]]:
    """A panel each: (what it is of, uint8 (tokens, tokens) of indices into `SECTIONS`, pairs kept / causal pairs).

    A static pattern has one, for all heads. A dynamic one has two, of two query heads of the synthetic inputs that
    `sparsekit bench dynamic` measures on, with `COLUMNS` heavy keys.
    """
    causal = tokens * (tokens + 1) / 2
    if isinstance(pattern, StaticPattern):
        image, _ = section_image(pattern, tokens)
        kept = int((image >= SECTIONS.index("kept")).sum())
        return [("every head", image, kept / causal)]
    plan = _plan(pattern, tokens, seed)
    mask = plan.to_mask()[0].expand(HEADS, -1, -1)
    past = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    skipped, kept = SECTIONS.index("skipped"), SECTIONS.index("kept")
    return [
        (f"head {head}", past.to(torch.uint8) * skipped + mask[head].to(torch.uint8) * (kept - skipped),
         float(mask[head].sum()) / causal)
        for head in SHOWN
    ]  # fmt: skip


def pattern_figure(pattern: Pattern | str | Mapping[str, Any], tokens: int = TOKENS, *, seed: int = 0) -> Figure:
    """A figure of any registered pattern, a panel for each of `pattern_images`: queries downwards, keys to the right.

    Args:
        pattern: a pattern, what YAML says of one, or a bare name, which is drawn as `drawn_at` says.
        tokens: length of the prompt, 16 to 4,096.
        seed: of the synthetic inputs that a dynamic pattern chooses from.

    Raises:
        SparsekitError: matplotlib is not installed, the pattern is wrong, or tokens is out of range.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    if not 16 <= tokens <= EXACT_TOKENS:
        raise SparsekitError(f"tokens = {tokens}: a pattern is drawn pair by pair, of 16 to {EXACT_TOKENS} tokens.")
    found = drawn_at(pattern, tokens)
    panels = pattern_images(found, tokens, seed=seed)
    figure = Figure(figsize=(3.9 * len(panels), 4.3), facecolor="white", layout="constrained")
    for index, (of, image, density) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        axes.imshow(colours(image), interpolation="antialiased", extent=(0, tokens, tokens, 0))
        axes.set_xlabel(f"keys\n{of}: {density:.1%} of the causal pairs", fontsize=10, color=INK)
        if index == 0:
            axes.set_ylabel("queries", fontsize=10, color=INK)
        if isinstance(found, StaticPattern):
            label_sections(axes, found, tokens)
        plain_axes(axes, tokens)
    figure.suptitle(fill(str(found), 46 * len(panels)), fontsize=10, color=INK, fontweight="bold")
    return figure


def draw_pattern(
    pattern: Pattern | str | Mapping[str, Any], out: str | Path, *, tokens: int = TOKENS, seed: int = 0, dpi: int = 120
) -> Path:
    """Write `pattern_figure` to `out` (.png, .svg or .pdf), and return the path.

    Raises:
        SparsekitError: as `pattern_figure`; or a suffix that is not one of these, or a folder that cannot be written.
    """
    return save(out, lambda: pattern_figure(pattern, tokens, seed=seed), dpi)
