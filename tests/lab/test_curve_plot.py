"""The picture of `calibrate head-curve`, from the committed records and from rows that are hard to draw."""

import json
from pathlib import Path

import pytest

from sparsekit import SparsekitError
from sparsekit.lab.curve_plot import draw_head_curve, head_curve_figure

RECORDS = Path(__file__).parents[2] / "docs" / "results" / "head-curve-qwen2.5-coder-1.5b.jsonl"


def test_panels_hold_the_rows_and_their_intervals(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    rows = [row for row in rows if row["task"] == "needle4" and (row["tokens"], row["samples"]) == (8192, 96)]
    kl, score = head_curve_figure(rows, "model").axes
    assert kl.get_yscale() == "log"
    drawn = {line.get_label(): line for line in (bars[0] for bars in kl.containers)}
    assert [bars.get_label() for bars in kl.containers] == ["by head, gradient", "last layers"]
    by_head = [row for row in rows if row["by"] == "gradient"]
    line = kl.containers[0][0]
    assert list(line.get_ydata()) == [row["kl"] for row in by_head] and len(drawn)
    assert list(line.get_xdata()) == [100 * row["heads_share"] for row in by_head]
    low, high = zip(*(segment[:, 1] for segment in score.containers[1][2][0].get_segments()), strict=True)
    of_layer = [row["score"] for row in rows if row["by"] == "layer"]
    assert low == pytest.approx([one[1] for one in of_layer]) and high == pytest.approx([one[2] for one in of_layer])
    assert draw_head_curve(rows, "model", tmp_path / "curve.png").stat().st_size > 10_000


def test_two_tasks_are_two_lines_and_no_divergence_has_a_linear_axis() -> None:
    whole = [1.0, 0.5, 1.0]
    same = {"share": 0.5, "heads_share": 0.5, "kl": 0.0, "kl_half_width": 0.0, "score": whole, "dense_score": whole}
    rows = [{**same, "task": task, "tokens": 100, "by": by, "samples": 2} for task in "ab" for by in ("layer", "alone")]
    axes = head_curve_figure(rows, "model").axes
    assert len(axes) == 4 and {one.get_yscale() for one in axes} == {"linear"}
    assert all(f": {task}, 100 tokens, 2 prompts" in axes[2 * i].get_title() for i, task in enumerate("ab"))


def test_no_rows_are_refused() -> None:
    with pytest.raises(SparsekitError, match="no rows"):
        head_curve_figure([], "model")


def test_text_has_no_panel_of_scores() -> None:
    row = {"share": 0.5, "heads_share": 0.5, "kl": 0.1, "kl_half_width": 0.01, "score": None, "dense_score": None}
    rows = [{**row, "task": "perplexity", "tokens": 100, "by": by, "samples": 2} for by in ("layer", "gradient")]
    [axes] = head_curve_figure(rows, "model").axes
    assert axes.get_title().startswith("KL from dense, nats a token: perplexity")
