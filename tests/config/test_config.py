"""SparseConfig: reading, precedence, round trip. What it refuses is in test_bad_input.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekit import SparseConfig, SparsekitError, load
from sparsekit.config import ModelFacts, format_range, parse_range
from sparsekit.patterns import (
    AShape,
    Dense,
    Pattern,
    Triangle,
    Union,
)

TEXT = """
version: 1
model: {name: some/model, num_layers: 30, num_heads: 9}
dense_below_tokens: 1024
default: dense
layers:
  "0-15": {name: a_shape, window_tokens: 100}
  20: triangle
heads:
  "3,20": {"0-1": dense, 8: {name: triangle, last_tokens: 7}}
"""


def test_explicit_head_over_layer_over_default() -> None:
    layers = load(TEXT).resolve().layers
    assert len(layers) == 30
    assert layers[29].patterns == (Dense(),)
    assert layers[0].patterns == (AShape(window_tokens=100),)
    assert layers[20].pattern_of_head == (0, 0, 1, 1, 1, 1, 1, 1, 2)
    assert layers[20].patterns == (Dense(), Triangle(), Triangle(last_tokens=7))
    assert layers[3].patterns == (Dense(), AShape(window_tokens=100), Triangle(last_tokens=7))
    assert str(layers[20]).startswith("heads 0-1: dense; heads 2-7: triangle(")


def test_from_path_text_mapping_and_config(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(TEXT)
    config = load(TEXT)
    assert load(path) == load(str(path)) == SparseConfig.load(config.to_dict()) == load(config) == config


def test_dump_reads_back(tmp_path: Path) -> None:
    config = load(TEXT)
    text = config.dump(tmp_path / "c.yaml")
    assert load(text) == config
    assert load(tmp_path / "c.yaml").dump() == text
    assert load(config.to_dict()).to_dict() == config.to_dict()


PATTERNS: st.SearchStrategy[Pattern] = st.recursive(
    st.one_of(
        st.just(Dense()),
        st.builds(AShape, sink_tokens=st.integers(0, 99), window_tokens=st.integers(1, 9999)),
        st.builds(Triangle, sink_tokens=st.integers(0, 99), last_tokens=st.integers(1, 999)),
    ),
    lambda inner: st.builds(Union, of=st.lists(inner, min_size=1, max_size=3)),
    max_leaves=4,
)


@given(
    layers=st.dictionaries(st.integers(0, 29), PATTERNS, max_size=4),
    heads=st.dictionaries(
        st.integers(0, 29), st.dictionaries(st.integers(0, 8), PATTERNS, min_size=1, max_size=3), max_size=2
    ),
    default=PATTERNS,
)
def test_any_config_round_trips(
    layers: dict[int, Pattern], heads: dict[int, dict[int, Pattern]], default: Pattern
) -> None:
    facts = ModelFacts(num_layers=30, num_heads=9)
    config = load({"version": 1, "default": default, "layers": layers, "heads": heads})
    again = load(config.dump())
    assert again == config
    assert again.to_dict() == config.to_dict()
    resolved = again.resolve(facts).layers
    for layer in range(30):
        for head in range(9):
            want = heads.get(layer, {}).get(head, layers.get(layer, default))
            assert resolved[layer].patterns[resolved[layer].pattern_of_head[head]] == want


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_round_trip(numbers: set[int]) -> None:
    assert parse_range(format_range(sorted(numbers))) == sorted(numbers)


def test_resolved_config_is_spelled_out() -> None:
    row = load(TEXT).resolve().to_dict()[3]
    assert row["layer"] == 3
    assert row["patterns"][1] == {"name": "a_shape", "sink_tokens": 8, "window_tokens": 100, "heads": "2-7"}


def test_facts_are_needed() -> None:
    with pytest.raises(SparsekitError, match="num_layers and num_heads are needed"):
        load({"default": "dense"}).resolve()


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(TEXT).default = Triangle()  # type: ignore[misc]


def test_yaml_merges_anchors_and_refuses_what_cannot_be_a_key() -> None:
    merged = load(
        """
layers:
  "0-1": &wide {name: triangle, sink_tokens: 4, window_tokens: 64}
  "2-3": {<<: *wide, window_tokens: 128}
"""
    )
    assert str(merged.layers["2-3"]) == str(
        load({"default": {"name": "triangle", "sink_tokens": 4, "window_tokens": 128}}).default
    )
    for text, says in (
        ("default: dense\nlayers: {[0, 4]: triangle}\n", r"line 2: \[0, 4\] cannot be a key; write a text"),
        ("default: dense\nversion: 2024-13-45\n", "version = '2024-13-45': it should be 1"),
        ("default: dense\ndefault: dense\n", "line 2: 'default' is written twice"),
    ):
        with pytest.raises(SparsekitError, match=says):
            load(text)
