"""Layer rules on made-up probes: what each chooses, what the config says of it, and what is refused."""

from __future__ import annotations

import pytest

from sparsekit import SparsekitError, load, models
from sparsekit.lab.calibrate.probe import SECTIONS, LayerProbe, Probe, Sections
from sparsekit.lab.calibrate.rules import apply_rule, from_list, lowest_k, search, suffix, write_config

# TriangleMix's plot of Llama-3.1-8B, as far as its markers can be read.
LLAMA = [0.33, 0.89, 0.74, 0.74, 1.20, 0.94, 0.50, 1.18, 0.41, 0.36, 0.19, 0.12, 0.09, 0.12, 0.09, 0.02, 0.05, 0.0]


def made_up(middle: list[float | None]) -> Probe:
    layers = [
        LayerProbe(i, "sliding_attention layer of the model")
        if value is None
        else LayerProbe(i, gradient=dict.fromkeys(SECTIONS, value), signed=dict.fromkeys(SECTIONS, -value))
        for i, value in enumerate(middle)
    ]
    return Probe("made-up", Sections(), 4, {"tokens": 1024}, {"date": "2026-01-01"}, tuple(layers))


def test_suffix_is_the_run_that_ends_with_the_last_layer() -> None:
    assert suffix(made_up(LLAMA), 0.2) == list(range(10, 18))
    assert suffix(made_up([1, 0.1, 0.5, 0.1, 0.1]), 0.2) == [3, 4]
    assert suffix(made_up([1, 0.1, 0.5, 0.1, 0.1]), 0.6) == [1, 2, 3, 4]
    assert suffix(made_up([0.1, 0.1, 1]), 0.2) == []
    assert suffix(made_up([1, 0.2, 0]), 0.2) == [2]  # below, not at
    assert suffix(made_up([1, 0.1, None, 0.1, None]), 0.2) == [1, 3]


def test_lowest_k_and_list() -> None:
    assert lowest_k(made_up([1, 0.1, None, 0.5, 0.2]), 2) == [1, 4]
    assert lowest_k(made_up([0.1, 0.1, 0.1]), 2) == [1, 2]
    assert lowest_k(made_up([1, 2]), 0) == []
    assert from_list("5,1-3", 6) == [1, 2, 3, 5]
    assert from_list([3, 1], 6) == [1, 3]


@pytest.mark.parametrize("most", range(5))
def test_search_finds_the_most_layers_that_are_borne(most: int) -> None:
    asked: list[list[int]] = []

    def bears(layers):
        asked.append(list(layers))
        return len(layers) <= most

    found, count = search(made_up([1, 0.1, 0.5, None, 0.2]), bears)
    assert found == sorted([1, 4, 2, 0][:most])
    assert count == len(asked) <= 3
    assert found in asked or not found


def test_the_config_says_what_chose_it(tmp_path) -> None:
    arch = models.facts(models.tiny("llama"))
    layers, said = apply_rule("suffix", made_up([1, 0.5, 0.1, 0]), num_layers=4, epsilon=0.3)
    config = write_config(arch, dict.fromkeys(layers, "triangle"), said)
    again = load(config.dump(tmp_path / "c.yaml"))
    assert again == config == load(tmp_path / "c.yaml")
    assert again.provenance["rule"] == "suffix" and again.provenance["epsilon"] == 0.3
    assert "no publication" in again.provenance["note"]
    assert again.provenance["probe"]["middle_gradient_of_max"] == [1.0, 0.5, 0.1, 0.0]
    assert [layer.dense for layer in again.resolve().layers] == [True, True, False, False]
    assert again.model.num_key_heads == 2
    assert apply_rule("list", None, num_layers=4, layers="1")[1]["rule"] == "list"
    assert apply_rule("lowest_k", made_up([1, 0, 0, 0]), num_layers=4, k=1)[1]["k"] == 1
    assert apply_rule("search", made_up([1, 0, 0, 0]), num_layers=4, bears=lambda _: True)[1]["measurements"] == 3


def test_layers_of_one_pattern_share_a_rule_and_dense_ones_have_none() -> None:
    arch = models.facts(models.tiny("llama"))
    wide = {"name": "triangle", "window_tokens": 256}
    config = write_config(arch, {0: "dense", 1: wide, 2: "triangle", 3: wide}, {})
    assert list(config.layers) == ["1,3", "2"]
    assert [layer.dense for layer in config.resolve().layers] == [True, False, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "sufix"}, r"rule 'sufix'.*suffix"),
        ({"rule": "suffix", "epsilon": 0.0}, "epsilon = 0.0"),
        ({"rule": "lowest_k", "k": 9}, "k = 9: from 0 to 4"),
        ({"rule": "lowest_k"}, "needs k"),
        ({"rule": "list"}, "needs the layers"),
        ({"rule": "list", "layers": "2-7"}, "the model has 0-3"),
        ({"rule": "search"}, "needs a measurement"),
        ({"rule": "suffix", "probe": None}, "needs a probe"),
        ({"rule": "suffix", "num_layers": 5}, "a model of 4 layers, this one has 5"),
    ],
)
def test_what_is_refused(options: dict, message: str) -> None:
    with pytest.raises(SparsekitError, match=message):
        apply_rule(**{"probe": made_up([1, 0.5, 0.1, 0]), "num_layers": 4, **options})
