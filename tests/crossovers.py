"""What tests of `dense_below_tokens: auto` share: a table of the user's own, with rows of a tiny model on this CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekit.patterns import parse_pattern
from sparsekit.patterns.crossover import ENV, Crossover, Measured, Place, device_name, faster_from, subject

HERE = Place(device_name(torch.device("cpu")), 4, 2, 16, "float32")  # of sparsekit.models.tiny("llama")


def row(what: Any, *faster: bool, place: Place = HERE, label: str = "it") -> Crossover:
    """Of a pattern as in YAML, or of a config's fingerprint; `faster` at 100, 200, 300, ... tokens."""
    measured = [Measured(tokens=100 * i, dense="sdpa", times_dense=1.0, faster=one) for i, one in enumerate(faster, 1)]
    key: Any = {"config": what}
    if not (isinstance(what, str) and len(what) == 16 and what.isalnum()):
        key = {"pattern": subject(parse_pattern(what).model_dump(mode="json"))}
    return Crossover(**place._asdict(), **key, label=label, faster_from_tokens=faster_from(measured), measured=measured)


def write(path: Path, *rows: Crossover) -> Path:
    path.write_text(
        "".join(f"{one.model_dump_json(exclude_none=one.faster_from_tokens is not None)}\n" for one in rows)
    )
    return path


def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *rows: Crossover) -> Path:
    """The user's own table has these rows."""
    path = write(tmp_path / "own.jsonl", *rows)
    monkeypatch.setenv(ENV, str(path))
    return path
