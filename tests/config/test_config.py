"""SparseConfig: reading, precedence, round trip. What it refuses is in test_bad_input.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from soon import soon

from sparsekit import SparseConfig, SparsekitError, load, models
from sparsekit.config import Budget, ModelFacts, format_range, give_back, parse_range
from sparsekit.patterns import AShape, Dense, Pattern, Triangle, Union

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


@pytest.mark.parametrize(
    ("said", "real", "differs"),
    [  # as on the hub: Mistral 7B v0.3 has the shape of Llama 3.1 8B, OLMo 7B that of Llama 2 7B
        ({"rope_theta": 5e5}, {"rope_theta": 1e6}, "rope_theta"),
        ({"model_type": "llama"}, {"model_type": "olmo"}, "model_type"),
        ({"num_key_heads": 8}, {"num_key_heads": 32}, "num_key_heads"),
        ({"rope_theta": 283461213.0}, {"rope_theta": 283461216.0}, ""),  # the same in float32, as in a GGUF file
        ({"rope_theta": 5e5, "model_type": "llama"}, {}, ""),
        ({"name": "a", "vocab_size": 1}, {"name": "b", "vocab_size": 2}, ""),
    ],
)
def test_another_model_of_the_same_shape_is_told(said: dict[str, Any], real: dict[str, Any], differs: str) -> None:
    shape = {"num_layers": 32, "num_heads": 32}
    config, facts = load({"model": {**shape, **said}, "default": "triangle"}), ModelFacts(**{**shape, **real})
    if not differs:
        config.resolve(facts)
        return
    with pytest.raises(SparsekitError) as error:
        config.resolve(facts)
    words = f"model.{differs}: this config is for a model with {differs} = {said[differs]}, but the model has "
    assert str(error.value) == f"{words}{real[differs]}; use that model's config."


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_a_models_own_facts_fit_it_and_come_back_from_yaml(model_type: str) -> None:
    facts = models.facts(models.tiny(model_type))
    config = load(load({"model": facts.model_dump(exclude_none=True), "default": "dense"}).dump())
    assert config.model.differs(facts) == "" and config.model.missing() == []
    assert config.model.model_type == model_type
    assert config.model.rope_theta == {"llama": 1e4, "gemma3_text": 1e6, "gpt2": None}[model_type]


@pytest.mark.parametrize("field", ["model: {name: ", "model: {num_layers: 1, not_computed: ["])
def test_what_is_printed_holds_nothing_that_a_terminal_obeys(field: str) -> None:
    close = "]}" if "[" in field else "}"
    with pytest.raises(SparsekitError, match=r"x1b\]0;gone\\x07' holds a control character"):
        load(f'{field}"\\e]0;gone\\a"{close}\ndefault: dense\n')


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


# ---- one key in two spellings, and what is larger than any config


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ('{0: triangle, "0": dense}', "'0' and 0 overlap at 0"),
        ('{"0": triangle, 0: dense}', "0 and '0' overlap at 0"),
        ("{0-0: triangle, 0: dense}", "0 and '0-0' overlap at 0"),
        ("{1: triangle, 01: dense}", "'01' and 1 overlap at 1"),
        ('{"1-3": triangle, "2,5": dense}', "'2,5' and '1-3' overlap at 2"),
        ('{"1 - 3": triangle, " 3": dense}', "' 3' and '1 - 3' overlap at 3"),
        ("{+1: triangle, 1: dense}", "line 1: 1 is written twice"),
        ("{0: triangle, 0: dense}", "line 1: 0 is written twice"),
        ("{0: triangle, 0.0: dense}", r"line 1: 0\.0 is written twice"),
        ('{"0,0": triangle}', "'0,0' holds 0 twice"),
        ('{"1 0": triangle}', "'1 0' is not a range"),
        ("{0x10: triangle}", "'0x10' is not a range"),
        ("{1:30: triangle}", "'1:30' is not a range"),
        ("{٣: triangle}", "'٣' is not a range"),
        ("{true: triangle}", "True: write a number"),
        ("{1.0: triangle}", r"1\.0: write a number"),
        ("{-1: triangle}", "'-1' is not a range"),
        ("{1023: triangle, 1024: dense}", "1024: layers and heads are numbered from 0 to 1,023"),
    ],
)
def test_no_rule_is_lost_to_the_spelling_of_its_key(layers: str, says: str) -> None:
    for text in (f"layers: {layers}\n", f'heads: {{"0-5": {layers}}}\n'):
        with pytest.raises(SparsekitError, match=says):
            load(text)


def test_a_mapping_from_python_is_as_strict() -> None:
    with pytest.raises(SparsekitError, match="layers: '0' and 0 overlap"):
        load({"layers": {0: "triangle", "0": "dense"}})
    with pytest.raises(SparsekitError, match="heads: '0' and 0 overlap"):
        load({"heads": {0: {0: "triangle"}, "0": {1: "dense"}}})
    with pytest.raises(SparsekitError, match="heads: '3': '01' and 1 overlap at 1"):
        load({"heads": {3: {1: "triangle", "01": "dense"}}})
    assert load({"layers": {"01": "triangle"}}).resolve(ModelFacts(num_layers=2, num_heads=1)).layers[1].patterns


@pytest.mark.parametrize("key", ["0-" + "9" * 5000, "0," * 100_000, "0-999999999", "9" * 5000, "1-2-3", "", "-", ","])
def test_a_range_is_bounded_before_it_is_spelled_out(key: str) -> None:
    def refused() -> str:
        with pytest.raises(SparsekitError) as caught:
            parse_range(key)
        with pytest.raises(SparsekitError, match="layers: "):
            load({"layers": {key: "triangle"}})
        return str(caught.value)

    assert len(soon(refused, 0.5)) < 300


def test_numbers_are_decimal_and_dates_are_texts() -> None:
    config = load("provenance: {a: 010, b: 1e-3, c: 2026-11-28, d: 1_000, e: 0x10, f: 1:30}\n")
    assert config.provenance == {"a": "010", "b": 1e-3, "c": "2026-11-28", "d": 1000, "e": "0x10", "f": "1:30"}
    assert load(config.dump()) == config
    with pytest.raises(SparsekitError, match="window_tokens = '010': it should be a valid integer"):
        load("default: {name: triangle, window_tokens: 010}\n")


LAUGHS = "provenance:\n  a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  {b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('layers: {"0-300000000": triangle}', "'0-300000000': layers and heads are numbered from 0 to 1,023"),
        ('heads: {0: {"0-999999999": triangle}}', "numbered from 0 to 1,023"),
        ("model: {num_layers: 1000000000, num_heads: 4}", r"num_layers = 1000000000: it should be from 1 to 1,024"),
        ("model: {num_layers: 4, num_heads: 1000000000}", r"num_heads = 1000000000: it should be from 1 to 1,024"),
        (f"model: {{num_layers: {10**30}, num_heads: 4}}", "is too large; numbers go up to 2,147,483,647"),
        (f"model: {{num_layers: 2, num_heads: 4, hidden_size: {10**30}}}", "hidden_size: 1000.* is too large"),
        (f"min_queries: {10**30}", "min_queries: 1000.* is too large"),
        (f"default: {{name: triangle, window_tokens: {10**30}}}", "window_tokens: 1000.* is too large"),
        ("default: " + "{name: union, of: [" * 20 + "dense", "nested more than 40 deep"),
        ("[" * 100_000, "line 1: nested more than 40 deep"),
        (LAUGHS, "line 6: more than 100,000 values"),
        ("provenance: &a {x: *a}", r"line 1: '\*a' holds itself"),
        ("provenance: !!python/name:os.system x", "the tag .* is not allowed"),
        ("version: !!int x", "the tag .* is not allowed"),
        (f"default: '{'x' * 1_000_000}'", "too long: at most 1,000,000 characters"),
        (f"default: '{'x' * 900_000}'", r"unknown pattern 'x+\.\.\.x+'"),
    ],
)
def test_what_is_larger_than_any_config_is_refused_before_it_is_built(text: str, says: str) -> None:
    def refused() -> str:
        with pytest.raises(SparsekitError, match=says) as caught:
            load(text + "\n").resolve()
        return str(caught.value)

    assert len(soon(refused, 2)) < 500


def test_the_largest_config_resolves_soon() -> None:
    text = 'model: {num_layers: 1024, num_heads: 1024}\nheads: {"0-1023": {"0-1022": triangle}}\n'
    layers = soon(lambda: load(text).resolve().layers, 1)
    assert len(layers) == 1024 and layers[7].pattern_of_head == (0,) * 1023 + (1,)


def test_unions_of_unions_are_read_once_each() -> None:
    """A wrong one at the bottom is not read twice at every level."""
    wrong: Any = "trianlge"
    for _ in range(18):
        wrong = {"name": "union", "of": [wrong]}

    def refused() -> None:
        with pytest.raises(SparsekitError, match="Did you mean 'triangle'"):
            load({"default": wrong})

    soon(refused, 1)
    endless: dict[str, Any] = {"name": "union"}
    endless["of"] = [endless]
    with pytest.raises(SparsekitError, match="more than 40 deep"):
        load({"default": endless})


@pytest.mark.parametrize("source", [None, 5, b"default: dense", ["default: dense"]])
def test_what_is_no_config_is_told(source: Any) -> None:
    with pytest.raises(SparsekitError, match="want a path, hub:owner/name, YAML text, a mapping or a SparseConfig"):
        load(source)


def test_what_a_budget_was_held_on_goes_with_its_config() -> None:
    """Of the config with other layers dense it says nothing; the bound stays."""
    prompts = {"source": "p.jsonl", "count": 3, "tokens": [100, 200], "kl": 0.003}
    config = load({"default": "triangle", "budget": {"kl": 0.005, "prompts": prompts}})
    for other in (give_back(config, [1]), give_back(config, [], {0: (1,)})):
        assert other.budget == Budget(kl=0.005)
    assert give_back(config, []) == config


def test_what_was_given_back_before_is_still_said() -> None:
    """Layers and heads that an earlier measurement gave back are dense in the config, and stay in its provenance."""
    config = load("version: 1\nmodel: {num_layers: 6, num_heads: 4}\ndefault: a_shape\n")
    twice = give_back(give_back(config, [0, 1]), [3])
    assert twice.provenance["given_back_to_dense"] == "0-1,3"
    assert [layer.dense for layer in twice.resolve().layers] == [True, True, False, True, False, False]
    heads = give_back(give_back(config, [], {2: [0], 4: [1]}), [], {2: [3]})
    assert heads.provenance["heads_given_back_to_dense"] == {"2": "0,3", "4": "1"}
