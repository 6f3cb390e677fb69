"""The picture of a pattern is its plan, whatever the pattern."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparsekit import Geometry, SparsekitError, attention
from sparsekit.call.softmax import Softmax
from sparsekit.cli import app
from sparsekit.lab.bench.inputs import structured
from sparsekit.lab.pattern_plot import COLUMNS, DIM, HEADS, KEY_HEADS, SHOWN, drawn_at, pattern_figure, pattern_images
from sparsekit.lab.plots import SECTIONS
from sparsekit.patterns import BlockTopK, StaticPattern, Triangle, pattern_class, pattern_names

TOKENS = 500


@pytest.mark.parametrize("name", pattern_names())
def test_every_pattern_can_be_drawn(name: str) -> None:
    """Causal, each query with itself, and something left out but by dense."""
    pattern = drawn_at(name, TOKENS)
    static = isinstance(pattern, StaticPattern)
    panels = pattern_images(pattern, TOKENS)
    assert [of for of, *_ in panels] == (["every head"] if static else [f"head {head}" for head in SHOWN])
    for _, image, density in panels:
        future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        assert torch.equal(image == SECTIONS.index("future"), future)
        kept = image >= SECTIONS.index("kept")
        assert bool(kept.diagonal().all())
        assert density == pytest.approx(int(kept.sum()) / (TOKENS * (TOKENS + 1) / 2))
        assert (density < 1) == (name != "dense")
    figure = pattern_figure(pattern, TOKENS)
    assert len(figure.axes) == len(panels)
    assert f"{panels[0][2]:.1%} of the causal pairs" in figure.axes[0].get_xlabel()


def test_a_dynamic_picture_is_what_attention_computes() -> None:
    """The drawn mask, given explicitly, is the output of `sparsekit.attention`."""
    x = structured(TOKENS, heads=HEADS, key_heads=KEY_HEADS, dim=DIM, columns=COLUMNS)
    pattern = BlockTopK(top_k=3)
    out = attention(x.q, x.k, x.v, pattern)
    for head, (_, image, _) in zip(SHOWN, pattern_images(pattern, TOKENS), strict=True):
        mask = image >= SECTIONS.index("kept")
        group = head * KEY_HEADS // HEADS
        logits = (x.q[0, head] @ x.k[0, group].T * DIM**-0.5).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(out[0, head], logits.softmax(-1) @ x.v[0, group], rtol=1e-4, atol=1e-4)


def test_what_a_ranked_plan_may_visit_is_not_what_it_visited() -> None:
    pattern = pattern_class("s2o").model_validate({"segment_tokens": 64, "tau": 0.4})
    x = structured(TOKENS, heads=HEADS, key_heads=KEY_HEADS, dim=DIM, columns=COLUMNS)
    at_most = pattern.plan(x.q, x.k, Geometry.of(TOKENS), Softmax(DIM**-0.5)).density()
    assert all(density < at_most for *_, density in pattern_images(pattern, TOKENS))


def test_a_bare_name_is_drawn_where_it_drops_something() -> None:
    assert drawn_at("block_topk", TOKENS) != BlockTopK()  # 100 blocks of 64: everything of a short prompt
    assert drawn_at({"name": "triangle"}) == Triangle()
    assert drawn_at("triangle", 3072) == Triangle()


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "new" / "p.png"
    ran = CliRunner().invoke(
        app, ["plots", "pattern", "{name: triangle, window_tokens: 64}", "-n", "300", "-o", str(out)]
    )
    assert ran.exit_code == 0 and out.stat().st_size > 5000
    wrong = CliRunner().invoke(app, ["plots", "pattern", "trangle", "-o", str(out)])
    assert wrong.exit_code == 1 and "Did you mean 'triangle'?" in wrong.stderr
    for tokens in (15, 4097):
        with pytest.raises(SparsekitError, match=f"tokens = {tokens}: a pattern is drawn pair by pair"):
            pattern_figure("triangle", tokens)
