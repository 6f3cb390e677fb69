"""Head rules on a probe written out by hand: what each order chooses, how it is written, and what is refused."""

from __future__ import annotations

import pytest

from sparsekit import SparsekitError, load
from sparsekit.config import ModelFacts
from sparsekit.lab.calibrate.agreement import compare, dense_overlap
from sparsekit.lab.calibrate.effects import Effect
from sparsekit.lab.calibrate.mixture import write_heads
from sparsekit.lab.calibrate.probe import SECTIONS, LayerProbe, Probe, Sections
from sparsekit.lab.calibrate.ranking import head_scores, in_order
from sparsekit.lab.calibrate.rules import Given, apply_rule, parse_rule
from sparsekit.patterns import parse_pattern

ARCH = ModelFacts(num_layers=3, num_heads=4, num_key_heads=2)
GRADIENT = [[1.0, 0.1, 0.2, 0.9], [], [0.3, 0.05, 0.6, 0.0]]  # layer 1 slides
SIGNED = [[0.1, -0.1, 0.2, -0.9], [], [0.3, -0.05, 0.0, 0.0]]
MASS = [[0.1, 1.0, 2.0, 1.0], [], [1.0, 1.0, 0.1, 1.0]]


def probe_of() -> Probe:
    def named(values):
        return tuple(dict.fromkeys(SECTIONS, value) for value in values)

    layers = [
        LayerProbe(i, gradient=dict.fromkeys(SECTIONS, 1.0), heads=named(g), head_signed=named(s), head_mass=named(m))
        if g
        else LayerProbe(i, "sliding_attention layer of the model")
        for i, (g, s, m) in enumerate(zip(GRADIENT, SIGNED, MASS, strict=True))
    ]
    return Probe("made-up", Sections(), 4, {"tokens": 1024}, {"date": "2026-01-01"}, tuple(layers))


def harm(kl: float) -> Effect:
    return Effect((kl, kl), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), {})


def choose(rule: str, measure=None, **constants) -> dict[int, tuple[int, ...]]:
    return dict(apply_rule(parse_rule(rule, constants), Given(ARCH, probe_of(), measure))[0])


@pytest.mark.parametrize(
    ("rank", "heads"),
    [
        ("gradient", {0: (1, 2), 2: (1, 3)}),
        ("signed", {0: (0,), 2: (1, 2, 3)}),  # of 0.1 twice in layer 0, the lower head
        ("gradient_mass", {0: (0, 1), 2: (1, 2, 3)}),
    ],
)
def test_the_lowest_heads_by_each_number_of_the_probe(rank: str, heads: dict) -> None:
    share = sum(map(len, heads.values())) / 8
    assert choose("head_share", rank=rank, share=share) == heads


def test_whole_groups_are_chosen_by_the_sum_of_their_heads() -> None:
    assert choose("head_share", share=0.5, whole_groups=True) == {2: (0, 1, 2, 3)}
    # Of layer 0 both groups sum to 1.1: the lower key head.
    assert choose("head_share", share=0.75, whole_groups=True) == {0: (0, 1), 2: (0, 1, 2, 3)}
    units = in_order(head_scores(probe_of()), ARCH, whole_groups=True)
    assert units[0] == ((2, 0), (2, 1)) and all(len(unit) == 2 for unit in units)


def test_alone_and_refined_ask_the_model() -> None:
    asked = []

    def measure(chosen, rule):
        asked.append(chosen)
        return {"needle4": harm(5.0 if 1 in chosen.get(0, ()) else 0.1 * sum(h for hs in chosen.values() for h in hs))}

    assert choose("head_share", measure, rank="alone", share=0.25) == {0: (0,), 2: (0,)}
    assert len(asked) == 8 and all(sum(map(len, chosen.values())) == 1 for chosen in asked)
    asked.clear()
    # The gradient chooses (2,3), (2,1), (0,1), (0,2); at the cut (0,1) gives way to (0,2), which harms less.
    assert choose("head_share", measure, share=3 / 8) == {0: (1,), 2: (1, 3)}
    assert choose("head_share", measure, rank="refined", band=0.25, share=3 / 8) == {0: (2,), 2: (1, 3)}
    assert len(asked) == 2 and all({(2, 1), (2, 3)} <= {(k, h) for k, hs in c.items() for h in hs} for c in asked)


@pytest.mark.parametrize("most", range(9))
def test_the_budget_takes_the_most_heads_that_every_task_bears(most: int) -> None:
    def measure(chosen, rule):
        count = sum(map(len, chosen.values()))
        return {"needle4": harm(0.0), "vt": harm(0.01 if count > most else 0.001)}

    rule = parse_rule("head_budget", {"budget": 0.002, "tasks": "needle4,vt"})
    found, said = apply_rule(rule, Given(ARCH, probe_of(), measure))
    order = sorted(head_scores(probe_of()), key=lambda head: (head_scores(probe_of())[head], -head[0], head[1]))
    assert {(layer, head) for layer, heads in found.items() for head in heads} == set(order[:most])
    assert said["measurements"] <= 4 and said["budget"] == 0.002 and said["rank"] == "gradient"
    assert said.get("measured_kl") == ({"needle4": 0.0, "vt": 0.001} if most else None)


def test_the_config_is_short_and_exact(tmp_path) -> None:
    """Whole layers under `layers`; layers of the same heads share a line; the rest runs what is said."""
    runs, rest = parse_pattern("triangle"), parse_pattern({"name": "flexprefill", "gamma": 0.9})
    arch = ModelFacts(num_layers=6, num_heads=4, num_key_heads=2)
    chosen = {0: (1, 3), 2: (0, 1, 2, 3), 4: (1, 3), 5: (0,)}
    config = write_heads(arch, chosen, runs, {"by": "hand"}, rest=rest)
    text = config.dump(tmp_path / "c.yaml")
    assert load(tmp_path / "c.yaml") == config
    assert "heads:\n  0,4:\n    1,3: triangle\n" in text or "0,4: {" in text
    for layer in config.resolve().layers:
        for pattern, heads in layer.groups():
            assert (pattern == runs) == (set(heads) <= set(chosen.get(layer.layer, ()))) and pattern in (runs, rest)
    _, said = apply_rule(parse_rule("head_share", {"share": 0.5}), Given(ARCH, probe_of()))
    assert said["rule"] == "head_share" and said["share"] == 0.5 and "tasks" not in said
    assert said["probe"]["heads"] == 8 and said["probe"]["tokens"] == 1024


def test_agreement_of_probes() -> None:
    scores = {(0, h): float(h) for h in range(5)}
    turned = {head: -value for head, value in scores.items()}
    assert (dense_overlap(scores, scores, 0.6), dense_overlap(scores, turned, 0.6)) == (1, 0)
    rows = compare({("a", 1, 0): scores, ("a", 1, 1): turned, ("b", 1, 0): scores, ("b", 2, 1): scores}, 0.6)
    assert [(row["axis"], row["one"], row["other"], row["correlation"]) for row in rows] == [
        ("seed", 0, 1, pytest.approx(-1)),
        ("task", "a", "b", pytest.approx(1)),
    ]


@pytest.mark.parametrize(
    ("rule", "constants", "message"),
    [
        ("head_share", {}, "rule 'head_share': share is missing"),
        ("head_share", {"share": 0}, "share = 0"),
        ("head_share", {"share": 0.01}, r"share = 0.01: none of 8; the least is 0.1250"),
        ("head_share", {"share": 0.5, "rank": "gradients"}, "rank = 'gradients'"),
        ("head_share", {"share": 0.5, "rank": "alone"}, "needs a measurement"),
        ("head_budget", {}, "needs a measurement"),
    ],
)
def test_what_is_refused(rule: str, constants: dict, message: str) -> None:
    with pytest.raises(SparsekitError, match=message):
        choose(rule, **constants)


def test_a_probe_without_numbers_of_heads_is_refused() -> None:
    bare = Probe("old", Sections(), 1, {}, {}, (LayerProbe(0, gradient=dict.fromkeys(SECTIONS, 1.0)),))
    with pytest.raises(SparsekitError, match="no numbers of heads for 'gradient'; probe once more"):
        head_scores(bare)
