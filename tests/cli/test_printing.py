"""What commands print and write is JSON that any reader takes."""

import json
import math
from pathlib import Path

import pytest

from sparsekit.cli.printing import show
from sparsekit.lab.calibrate.inspection import read_inspection


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_what_is_not_finite_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The interval of one prompt is infinite, and so is a ratio to a median of 0."""
    found = {"kl": 0.1, "width": math.inf, "rows": ({"nll": math.nan, "pair": [1, -math.inf]},), "at": tmp_path}
    show(found, ([], []), True, tmp_path / "found.json")
    want = {"kl": 0.1, "width": None, "rows": [{"nll": None, "pair": [1, None]}], "at": str(tmp_path)}
    for text in (capsys.readouterr().out, (tmp_path / "found.json").read_text()):
        assert json.loads(text, parse_constant=refuse) == want


def test_an_infinite_ratio_is_read_back(tmp_path: Path) -> None:
    committed = Path(__file__).parents[2] / "docs" / "results" / "inspect-smollm2-135m.json"
    record = json.loads(committed.read_text(), parse_constant=refuse)
    record["layers"][3]["massive"][0]["ratio"] = math.inf
    show(record, ([], []), True, tmp_path / "found.json")
    assert read_inspection(tmp_path / "found.json").layers[3].massive[0]["ratio"] == math.inf
