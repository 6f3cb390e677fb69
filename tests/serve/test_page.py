"""docs/serving.md agrees with the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sparsekit.config import ModelFacts
from sparsekit.serve.vllm import meter, requests, steps
from sparsekit.serve.vllm.settings import FIELDS, SALTED, TESTED, WRAPPED, settings_of

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def _cells(section: str) -> list[list[str]]:
    lines = PAGE[PAGE.index(f"## {section}") :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_fields_backends_and_releases() -> None:
    assert [row[0].strip("`") for row in _cells("Several configs")] == list(FIELDS)
    first, last = (".".join(map(str, end)) for end in TESTED)
    assert f"Tested releases: vLLM {first} to {last}." in PAGE
    heading = next(line for line in PAGE.splitlines() if line.startswith("| feature |"))
    assert [re.sub(r"\[.*", "", cell.strip()) for cell in heading.strip("|").split("|")][1:] == list(WRAPPED)
    notes = set(re.findall(r"\[\^(\w+)\]:", PAGE))
    assert notes == set(re.findall(r"\[\^(\w+)\](?!:)", PAGE))


def test_connectors() -> None:
    named = PAGE[PAGE.index("## Prefill and decode apart") : PAGE.index("## Chunks")]
    assert {name for name in re.findall(r"`(\w+Connector)`", named) if name != "MultiConnector"} == set(SALTED)


def test_the_error_of_a_request_is_quoted() -> None:
    text = "version: 1\ndefault: triangle\n"
    found = settings_of(
        {"configs": {"careful": text, "fast": text}, "default": "careful"}, ModelFacts(num_layers=2, num_heads=2)
    )
    with pytest.raises(ValueError, match="this server has") as error:
        found.choose({"sparsekit": "fsat"})
    assert f"\n{error.value}\n" in PAGE


def test_every_metric_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client", reason="comes with vLLM: `make test-vllm` runs this")
    worker: dict[str, Any] = {
        "rank": 1,
        "configs": {
            name: {
                "layers": {"3": meter.LayerCounts(name, 1, 2, kept, 4.0, 5.0).to_dict()}, "fallbacks": {"short": 2},
            }
            for name, kept in (("a", 3.0), ("b", 1.0))
        },
    }  # fmt: skip
    monkeypatch.setattr(meter, "counts_of_workers", lambda: [worker])
    samples = [sample for family in meter._Collector().collect() for sample in family.samples]
    assert {sample.name for sample in samples} == {row[0].strip("`") for row in _cells("Seen from outside")}
    density = {x.labels["config"]: (x.labels["patterns"], x.value) for x in samples if x.name == "sparsekit:density"}
    assert density == {"a": ("a", 0.75), "b": ("b", 0.25)}
    assert all(
        {"rank", "config", "layer", "patterns", "reason"} >= set(sample.labels) > {"config"} for sample in samples
    )


def test_hooks_are_counted() -> None:
    for module, pattern, count in ((steps, r"hook\(V[12], ", 5), (requests, r"hook\([A-Z]", 4)):
        source = Path(str(module.__file__)).read_text()
        assert len(re.findall(rf"^ +{pattern}", source, re.MULTILINE)) == count
    assert "five methods of the two model runners; and in `requests.py`:\nfour of" in PAGE
