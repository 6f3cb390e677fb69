"""Layer rules on made-up probes: what each chooses, what the config says of it, and what is refused."""

from __future__ import annotations

import pytest

from sparsekit import SparsekitError, load, models
from sparsekit.lab.calibrate.effects import Effect
from sparsekit.lab.calibrate.probe import SECTIONS, LayerProbe, Probe, Sections
from sparsekit.lab.calibrate.rules import Given, apply_rule, parse_rule, write_config

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


def layers(rule: str, middle: list[float | None], **constants) -> list[int]:
    return apply_rule(parse_rule(rule, constants), Given(len(middle), made_up(middle)))[0]


def test_suffix_is_the_run_that_ends_with_the_last_layer() -> None:
    assert layers("suffix", LLAMA) == layers("suffix", LLAMA, epsilon=0.2) == list(range(10, 18))
    assert layers("suffix", [1, 0.1, 0.5, 0.1, 0.1]) == [3, 4]
    assert layers("suffix", [1, 0.1, 0.5, 0.1, 0.1], epsilon=0.6) == [1, 2, 3, 4]
    assert layers("suffix", [0.1, 0.1, 1]) == []
    assert layers("suffix", [1, 0.2, 0]) == [2]  # below, not at
    assert layers("suffix", [1, 0.1, None, 0.1, None]) == [1, 3]


def test_lowest_k_and_list() -> None:
    assert layers("lowest_k", [1, 0.1, None, 0.5, 0.2], k=2) == [1, 4]
    assert layers("lowest_k", [0.1, 0.1, 0.1], k=2) == [1, 2]
    assert layers("lowest_k", [1, 2], k=0) == []
    assert apply_rule(parse_rule("list", {"layers": "5,1-3"}), Given(6))[0] == [1, 2, 3, 5]


@pytest.mark.parametrize("most", range(5))
@pytest.mark.parametrize("bad", ["kl", "lost"])
def test_search_finds_the_most_layers_that_are_borne(most: int, bad: str) -> None:
    asked: list[list[int]] = []

    def measure(layers, rule) -> Effect:
        assert (rule.samples, rule.tokens) == (2, "300")
        asked.append(list(layers))
        fails = len(layers) > most
        kl, score = 0.2 if fails and bad == "kl" else 0.1, 0.0 if fails and bad == "lost" else 1.0
        return Effect((kl, kl), (score, score), (1.0, 1.0), (1.0, 1.0), {})

    rule = parse_rule("search", {"budget": 0.1, "samples": 2, "tokens": "300"})
    found, said = apply_rule(rule, Given(5, made_up([1, 0.1, 0.5, None, 0.2]), measure))
    assert found == sorted([1, 4, 2, 0][:most])
    assert said["measurements"] == len(asked) <= 3
    assert found in asked or not found


def test_the_config_says_what_chose_it(tmp_path) -> None:
    arch = models.facts(models.tiny("llama"))
    chosen, said = apply_rule(parse_rule("suffix", {"epsilon": 0.3}), Given(4, made_up([1, 0.5, 0.1, 0])))
    config = write_config(arch, dict.fromkeys(chosen, "triangle"), said)
    again = load(config.dump(tmp_path / "c.yaml"))
    assert again == config == load(tmp_path / "c.yaml")
    assert again.provenance["rule"] == "suffix" and again.provenance["epsilon"] == 0.3
    assert "no publication" in again.provenance["note"]
    assert again.provenance["probe"]["middle_gradient_of_max"] == [1.0, 0.5, 0.1, 0.0]
    assert [layer.dense for layer in again.resolve().layers] == [True, True, False, False]
    assert again.model.num_key_heads == 2
    assert apply_rule(parse_rule("list", {"layers": "1"}), Given(4))[1] == {"rule": "list", "layers": "1"}


def test_layers_of_one_pattern_share_a_rule_and_dense_ones_have_none() -> None:
    arch = models.facts(models.tiny("llama"))
    wide = {"name": "triangle", "window_tokens": 256}
    config = write_config(arch, {0: "dense", 1: wide, 2: "triangle", 3: wide}, {})
    assert list(config.layers) == ["1,3", "2"]
    assert [layer.dense for layer in config.resolve().layers] == [True, False, False, False]


@pytest.mark.parametrize(
    ("rule", "constants", "message"),
    [
        ("sufix", {}, r"rule 'sufix': one of suffix, .*Did you mean 'suffix'"),
        ("suffix", {"epsilon": 0.0}, "rule 'suffix': epsilon = 0.0: it should be greater than 0"),
        ("suffix", {"k": 3}, "rule 'suffix': unknown field 'k' = 3; allowed: name, epsilon"),
        ("lowest_k", {"k": 9}, "k = 9: from 0 to 4"),
        ("lowest_k", {}, "rule 'lowest_k': k is missing: number of layers"),
        ("list", {}, "rule 'list': layers is missing"),
        ("list", {"layers": "2-7"}, "layers 2-7: the model has 0-3"),
        ("search", {"samples": 1}, "samples = 1"),
        ("search", {}, "needs a measurement"),
    ],
)
def test_what_is_refused(rule: str, constants: dict, message: str) -> None:
    with pytest.raises(SparsekitError, match=message):
        layers(rule, [1, 0.5, 0.1, 0], **constants)


def test_a_probe_of_this_model_is_needed() -> None:
    with pytest.raises(SparsekitError, match="'suffix' needs a probe"):
        apply_rule(parse_rule("suffix"), Given(4))
    with pytest.raises(SparsekitError, match="a model of 2 layers, this one has 5"):
        apply_rule(parse_rule("suffix"), Given(5, made_up([1, 0])))
