"""The leaderboard: a row for every committed record of a config, and ratios only within one run on one device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsekit import SparsekitError
from sparsekit.lab.leaderboard import HEADINGS, leaderboard, main, read_rows

RESULTS = Path(__file__).parents[2] / "docs" / "results"
TRIANGLE = {"layers": {"21-29": "triangle"}}


def record(config: Any, **fields: Any) -> dict[str, Any]:
    """As `sparsekit eval` writes one."""
    return {
        "label": "model" if config is None else "c.yaml", "model": "m", "task": "needle4", "tokens": 2048, "seed": 0,
        "samples": 24, "config": config, "score": 0.5, "score_low": 0.3, "score_high": 0.7, "density": 0.5, "kl": 0.01,
        "kl_width": 0.002, "tile_density": 0.6, "ttft_s": 3.0, "device": "card A", "dtype": "float32", "command": "one",
        **fields,
    }  # fmt: skip


def written(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def test_every_committed_record_of_a_config_has_a_row() -> None:
    files = sorted(RESULTS.glob("*.jsonl"))
    rows = read_rows(files)
    count = 0
    for file in files:
        found = [json.loads(line) for line in file.read_text().splitlines()]
        count += sum(1 for one in found if ("score" in one and "setting" not in one) or one.get("case") == "prefill")
    assert len(rows) == count > 250
    assert {"triangle", "a_shape", "xattention + triangle", "dense"} <= {row.pattern for row in rows}
    assert all(row.setting and row.device and row.tokens > 0 for row in rows)
    curve = next(row for row in rows if row.file == "start-layer-smollm2.jsonl" and "from layer 25 on" in row.setting)
    assert curve.tile_density is not None and 0.9 < curve.tile_density < 1  # 25 of 30 layers are dense


def test_a_row(tmp_path: Path) -> None:
    file = written(tmp_path / "r.jsonl", record(None, kl=0.0, ttft_s=4.0, score=0.75), record(TRIANGLE))
    dense, triangle = read_rows([file])
    assert (dense.pattern, dense.of_dense) == ("dense", None)
    assert (triangle.pattern, triangle.dense_score, triangle.of_dense) == ("triangle", 0.75, 0.75)
    lines = leaderboard([dense, triangle]).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == list(HEADINGS)
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == [
        *(
            "triangle",
            "c.yaml",
            "m",
            "needle4",
            "2048",
            "24",
            "0.01 ± 0.002",
            "0.50 (0.30-0.70)",
            "0.75",
            "0.60",
            "3 s",
        ),
        *("0.75", "card A, float32", "r.jsonl"),
    ]


@pytest.mark.parametrize("other", ["device", "dtype", "command", "tokens", "task", "model", "seed", "samples"])
def test_times_of_different_runs_are_not_divided(tmp_path: Path, other: str) -> None:
    dense = record(None, **{other: 4096 if other in ("tokens", "seed", "samples") else "another"})
    rows = read_rows([written(tmp_path / "r.jsonl", dense, record(TRIANGLE))])
    assert [row.of_dense for row in rows] == [None, None]


def test_patterns_of_heads_and_of_the_rest_are_named(tmp_path: Path) -> None:
    config = {"default": "dense", "layers": {"0-3": "xattention"}, "heads": {"5": {"0-2": "triangle"}}}
    [row] = read_rows([written(tmp_path / "r.jsonl", record(config))])
    assert row.pattern == "xattention + triangle"
    [row] = read_rows([written(tmp_path / "r.jsonl", record({"layers": {"0": "xattention", "1-3": {"reuse": 0}}}))])
    assert row.pattern == "xattention + reuse"


def test_failed_runs_and_other_commands_have_no_row(tmp_path: Path) -> None:
    failed = {**record(TRIANGLE), "status": "failed", "error": "out of memory"}
    kernel = {"case": "dense", "impl": "triton", "tokens": 4096, "ms": 1.0}
    assert read_rows([written(tmp_path / "r.jsonl", failed, kernel, {"part": "start"})]) == []


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparsekitError, match=r"r.jsonl line 2: no record of a command of sparsekit \(without label"):
        read_rows([written(tmp_path / "r.jsonl", record(TRIANGLE), {"tokens": 3})])
    (tmp_path / "r.jsonl").write_text('{"label": ')
    with pytest.raises(SparsekitError, match=r"r.jsonl' line 1: '{.label.: ' is no JSON"):
        read_rows([tmp_path / "r.jsonl"])
    prefill = {"case": "prefill", "config": "no/such.yaml", "model": "m", "tokens": 9, "ms": 1.0, "tile_density": 0.5}
    with pytest.raises(SparsekitError, match=r"line 1: its config has to be in the repository: .*no/such.yaml"):
        read_rows([written(tmp_path / "r.jsonl", prefill)])


def test_a_folder_is_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SparsekitError, match=r"no \.jsonl file in"):
        main([str(tmp_path)])
    written(tmp_path / "b.jsonl", record(TRIANGLE))
    written(tmp_path / "a.jsonl", record(None))
    main([str(tmp_path)])
    assert len(capsys.readouterr().out.splitlines()) == 4
