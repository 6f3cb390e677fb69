"""Every recipe under configs/: loads, says what it is, resolves, comes back from YAML, and can be explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsekit import SparseConfig, explain, load, models
from sparsekit.config import format_range
from sparsekit.patterns import DynamicPattern, pattern_names

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "sweeps")

# Layers that run triangle, of how many; prompts below the last number run dense.
TRIANGLEMIX = {
    "llama-3.1-8b": ("16-31", 32, 4096),
    "llama-3-8b-262k": ("16-31", 32, 4096),
    "qwen2.5-7b": ("20-27", 28, 4096),
    "qwen2.5-coder-1.5b": ("21-27", 28, 4096),
    "smollm2-135m": ("21-29", 30, 1024),
}
# TriangleMix with another pattern below the triangle.
COMBINED = [path for path in FILES if path.stem.startswith("trianglemix-")]


def test_there_is_one_for_each_published_model() -> None:
    assert {path.parent.name for path in FILES} >= set(TRIANGLEMIX)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_recipe(path: Path) -> None:
    config = load(path)
    assert load(config.dump()) == config
    assert SparseConfig.load(config.to_dict()) == config
    resolved = config.resolve()
    assert len(resolved.layers) == config.model.num_layers
    found = explain(config, 131072)
    dynamic = {p.name: None for layer in resolved.layers for p in layer.patterns if isinstance(p, DynamicPattern)}
    if dynamic:
        assert found.missing == tuple(f"what {name} keeps depends on the prompt" for name in dynamic)
        assert found.prefill_ratio is None and found.dense_attention_share is not None
    else:
        assert found.missing == ()
        assert found.prefill_ratio is not None and 0 < found.prefill_ratio < 1


@pytest.mark.parametrize("path", COMBINED, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_trianglemix_with_a_dynamic_pattern_below(path: Path) -> None:
    name = path.stem.removeprefix("trianglemix-")
    assert name in pattern_names(DynamicPattern)
    config, alone = load(path), load(path.parent / "trianglemix.yaml")
    assert (config.model, config.dense_below_tokens) == (alone.model, alone.dense_below_tokens)
    for layer, of_triangle in zip(config.resolve().layers, alone.resolve().layers, strict=True):
        if of_triangle.dense:
            assert [pattern.name for pattern in layer.patterns] == [name]
        else:
            assert layer == of_triangle


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_recipe_opens_with_what_it_is_its_source_and_a_command(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert path.read_text().startswith("# ")
    assert any(line.startswith("# Source: ") for line in head)
    assert any(f"sparsekit explain {path.relative_to(ROOT)} --tokens" in line for line in head)


@pytest.mark.parametrize("name", TRIANGLEMIX)
def test_trianglemix_is_as_published(name: str) -> None:
    layers, count, short = TRIANGLEMIX[name]
    config = load(ROOT / "configs" / name / "trianglemix.yaml")
    resolved = config.resolve().layers
    assert len(resolved) == count
    assert format_range([layer.layer for layer in resolved if not layer.dense]) == layers
    triangle = resolved[-1].patterns[0]
    assert triangle.model_dump() == {"name": "triangle", "sink_tokens": 8, "window_tokens": 512, "last_tokens": 128}
    assert config.dense_below_tokens == short


@pytest.mark.parametrize("name", models.EMBEDDED)
def test_the_embedded_models_recipe_fits_the_embedded_model(name: str) -> None:
    config, facts = load(ROOT / f"configs/{name}/trianglemix.yaml"), models.facts(name)
    for field in type(config.model).model_fields:
        if field != "name":
            assert getattr(config.model, field) == getattr(facts, field), field
