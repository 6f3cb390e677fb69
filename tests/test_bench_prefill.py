"""bench prefill: every config against the model as it is, in one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsekit import SparsekitError
from sparsekit.bench import bench_prefill
from sparsekit.cli import app
from sparsekit.models import tiny

TRIANGLE = """
version: 1
dense_below_tokens: 0
layers:
  "2-3": {name: triangle, sink_tokens: 8, window_tokens: 32, last_tokens: 16}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "triangle.yaml"
    path.write_text(TRIANGLE)
    return str(path)


def test_rows_and_file(config: str, tmp_path: Path) -> None:
    lines: list[str] = []
    model = tiny("llama")
    rows = bench_prefill(
        [config], model=model, lengths=[300, 1200], device="cpu", out=str(tmp_path / "rows.jsonl"), show=lines.append
    )
    assert rows == [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["tokens"], row["config"]) for row in rows] == [
        (300, "untouched"), (300, config), (1200, "untouched"), (1200, config)
    ]  # fmt: skip
    stock, ours = rows[2:]
    assert stock["sparse_layers"] == 0 and ours["sparse_layers"] == 2
    assert stock["density"] == 1 and 0.5 < ours["density"] < 0.9
    assert ours["faster"] == pytest.approx(stock["ms"] / ours["ms"], rel=1e-3)
    assert len(lines) == 4 and config in lines[1]
    assert model.config._attn_implementation == "sdpa"


def test_command(config: str) -> None:
    result = CliRunner().invoke(
        app, ["bench", "prefill", config, "--shape", "tiny", "--lengths", "200", "--rounds", "1"]
    )
    assert result.exit_code == 0, result.output
    assert "untouched" in result.output and config in result.output


def test_faults(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SparsekitError, match=r"llama-3\.1-8b"):
        bench_prefill([config], shape="llama-3.1-8", device="cpu")
    assert CliRunner().invoke(app, ["bench", "prefill", "nowhere.yaml", "--shape", "tiny"]).exit_code == 1
