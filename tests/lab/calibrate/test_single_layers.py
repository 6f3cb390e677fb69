"""One sparse layer at a time: each row is that layer's own effect, and the correlation is Spearman's."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsekit import SparsekitError, models
from sparsekit.lab.calibrate.effects import Judge
from sparsekit.lab.calibrate.probe import Sections, probe
from sparsekit.lab.calibrate.prompts import make_prompts
from sparsekit.lab.calibrate.single_layers import single_layers
from sparsekit.lab.stats import rank_correlation
from sparsekit.patterns import parse_pattern

TRIANGLE = {"name": "triangle", "window_tokens": 32, "last_tokens": 16}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 400], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),  # 1 - 6 * 2 / (4 * 15)
        ([1, 1, 2], [5, 5, 7], 1.0),
        ([1, 2, 3], [5, 5, 5], 0.0),
        ([0, 1, 2, 3, 4], [0, 0, 2, 3, 4], 9.5 / 95**0.5),
    ],
)
def test_rank_correlation(a: list[float], b: list[float], expected: float) -> None:
    assert rank_correlation(a, b) == pytest.approx(expected)


def test_each_layer_alone(smollm2, tmp_path: Path) -> None:
    model, tokenizer = models.tiny("llama", vocab_size=49152, max_position_embeddings=1024), smollm2[1]
    sections = Sections(sink_tokens=4, window_tokens=16, last_tokens=16)
    probed = probe(model, tokenizer, samples=2, tokens=300, seeds=[0], sections=sections, quiet=True)
    said = {"samples": 3, "tokens": 300, "records": tmp_path / "r.jsonl", "quiet": True}
    found = single_layers(model, tokenizer, probed, TRIANGLE, **said)
    assert [row["layer"] for row in found.rows] == [0, 1, 2, 3]
    assert [row["gradient"] for row in found.rows] == probed.relative()
    prompts = make_prompts(model, tokenizer, tasks=["needle4"], tokens=[300], count=3, seeds=[0])
    alone = Judge(model, tokenizer, prompts).effect({2: parse_pattern(TRIANGLE)})
    assert found.rows[2]["kl"] == pytest.approx(alone.mean_kl, rel=1e-6) and alone.mean_kl > 0
    value, low, high = found.correlation
    assert -1 <= low <= value <= high <= 1
    assert value == rank_correlation([row["gradient"] for row in found.rows], [row["kl"] for row in found.rows])
    again = single_layers(model, tokenizer, probed, TRIANGLE, **said)
    assert again.rows == found.rows and f"{value:.2f}" in found.summary()
    with pytest.raises(SparsekitError, match="4 layers; the model has 5"):
        single_layers(models.tiny("llama", num_hidden_layers=5, vocab_size=49152), tokenizer, probed, samples=2)
