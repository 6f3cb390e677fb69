"""The demo's path end to end, on a tiny random model of 30 layers that reads the real tokenizer's prompts."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsekit import models
from sparsekit.lab import demo
from sparsekit.lab.evaluate import Answer, kl_divergence
from sparsekit.lab.stats import mean_interval, share_interval


def test_demo_end_to_end(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = models.tiny("llama", num_hidden_layers=30, vocab_size=49152)
    monkeypatch.setattr(models, "load", lambda *_, **__: (small, smollm2[1]))
    monkeypatch.setattr(demo, "TIMED_TOKENS", (1024, 2048))
    monkeypatch.setattr(demo, "PASSKEY_TOKENS", (512,))
    monkeypatch.setattr(demo, "NEEDLE_TOKENS", 700)
    text = StringIO()
    outcomes = demo.run_demo(tmp_path, samples=2, console=Console(file=text, width=200), command="demo --samples 2")

    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * (3 + 2)
    assert {row["command"] for row in rows} == {"demo --samples 2"}
    dense, mix, everywhere, streaming = outcomes
    assert [len(outcome.passkey) for outcome in outcomes] == [3] * 4
    assert dense.kl == [0.0, 0.0]
    assert 0 < mix.kl[0] < everywhere.kl[0]
    assert 1.0 == dense.density > mix.density > everywhere.density > streaming.density
    assert mix.density == pytest.approx(0.7 + 0.3 * everywhere.density)
    shown = text.getvalue()
    assert "(from layer 21)" in shown
    assert "at 1K" in shown
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "mask-trianglemix-from-layer-21.png",
        "mask-triangle-every-layer.png",
        "mask-streaming-every-layer.png",
    }
    assert small.config._attn_implementation == "sdpa"


def test_divergence_of_known_distributions() -> None:
    """KL((1/2, 1/2) || (1/4, 3/4)) = ln 2 - ln 3 / 2 nats."""
    p, q = (Answer("", 0, 0, 0, torch.tensor([row]).log()) for row in ([0.5, 0.5], [0.25, 0.75]))
    assert kl_divergence(p, q) == pytest.approx(0.6931472 - 1.0986123 / 2, abs=1e-6)
    assert kl_divergence(p, p) == 0


def test_intervals() -> None:
    mean, low, high = share_interval([1.0] * 8 + [0.0] * 2)
    assert (mean, round(low, 3), round(high, 3)) == (0.8, 0.490, 0.943)  # Wilson, 95%
    assert share_interval([1.0] * 4)[2] == pytest.approx(1.0)
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(1.959964 / 3**0.5))
    assert mean_interval([1.0])[1] == float("inf")
