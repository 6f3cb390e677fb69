"""Rows of the curve: the same share of the heads costs the same, whichever way they were chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsekit.lab.calibrate.effects import Effect
from sparsekit.lab.calibrate.head_curve import HeadCurve, _row

RECORDS = Path(__file__).parents[3] / "docs" / "results" / "head-curve-qwen2.5-coder-1.5b.jsonl"


def test_tiles_are_those_of_all_layers() -> None:
    """Half of the heads in each of four layers, against all heads of two: 0.2 of the tiles in a sparse head."""
    ones = (1.0, 1.0)
    by_head, by_layer = (
        Effect(ones, ones, ones, ones, tiles) for tiles in (dict.fromkeys(range(4), 0.6), {2: 0.2, 3: 0.2})
    )
    assert _row(by_head, by_layer, 4)["tile_density"] == pytest.approx(0.6)
    assert _row(by_layer, None, 4)["tile_density"] == pytest.approx(0.6)
    assert _row(Effect(ones, ones, ones, ones, {}), None, 4)["tile_density"] == 1


def test_tiles_of_the_records_follow_the_share_of_the_heads() -> None:
    rows = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    saved: dict[tuple[str, int], set[float]] = {}
    for row in rows:
        saved.setdefault((row["task"], row["tokens"]), set()).add((1 - row["tile_density"]) / row["heads_share"])
    for each in saved.values():
        assert max(each) == pytest.approx(min(each), abs=1e-5)


def test_text_has_no_score() -> None:
    row = _row(Effect((1.0, 1.0), (0.0, 0.0), (0.0, 0.0), (1.0, 1.0), {}), None, 4, answers=False)
    assert row["score"] is None and row["dense_score"] is None and row["kl"] == 1.0
    where = {"task": "perplexity", "tokens": 100, "share": 0.5, "by": "layer", "heads_share": 0.5}
    head, [cells] = HeadCurve("model", {}, {}, ({**where, **row},)).table()
    assert len(cells) == len(head) and cells[head.index("score")] == cells[head.index("dense")] == ""
