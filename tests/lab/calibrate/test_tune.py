"""Tuning and the gate, on a model built by hand whose deep layer carries retrieval through the middle section."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from adversary import RELAYED, TRIANGLE, WORDS, Words, relay_model

from sparsekit import SparsekitError, load, models
from sparsekit.config import give_back
from sparsekit.lab.calibrate.curve import start_layer_curve
from sparsekit.lab.calibrate.effects import Effect, Judge
from sparsekit.lab.calibrate.gate import gate, write_gated
from sparsekit.lab.calibrate.heads import search_heads
from sparsekit.lab.calibrate.mixture import write_config
from sparsekit.lab.calibrate.probe import Sections, probe
from sparsekit.lab.calibrate.prompts import make_prompts
from sparsekit.lab.calibrate.records import Records
from sparsekit.lab.calibrate.rules import Given, apply_rule, parse_rule
from sparsekit.lab.calibrate.tune import Choice, choose, summary, tune
from sparsekit.patterns import pattern_class, pattern_names

CUT = Sections(sink_tokens=4, window_tokens=64, last_tokens=16)


@pytest.fixture(scope="module")
def adversary():
    return relay_model()


OPTIONS = {"tasks": [RELAYED], "quiet": True}


def test_the_suffix_rule_fails_and_the_gate_catches_it(adversary, tmp_path) -> None:
    model, tokenizer = adversary
    found = probe(model, tokenizer, samples=4, tokens=400, seeds=(0,), sections=CUT, **OPTIONS)
    assert found.relative()[0] == 1 and 0 < found.relative()[1] < 0.1
    layers, said = apply_rule(parse_rule("suffix"), Given(models.facts(model), found))
    assert list(layers) == [1, 2]
    config = write_config(models.facts(model), dict.fromkeys(layers, TRIANGLE), said, dense_below_tokens=100)
    file = tmp_path / "gate.jsonl"
    report = gate(model, tokenizer, config, tokens=[400, 600], samples=6, records=file, **OPTIONS)
    assert [check.dense for check in report.checks] == [1.0, 1.0]
    assert [check.sparse for check in report.checks] == [0.0, 0.0]
    assert not report.passed and report.regained and report.give_back == (1,)
    assert "relayed at 400 tokens: 0.00, dense 1.00; give layers 1 back" in report.why()
    with pytest.raises(SparsekitError, match=r"not written: answers are lost.*give layers 1 back"):
        write_gated(report, tmp_path / "c.yaml")
    assert not (tmp_path / "c.yaml").exists()

    better = give_back(config, report.give_back)
    passed = gate(model, tokenizer, better, tokens=[400, 600], samples=6, records=file, **OPTIONS)
    assert passed.passed and passed.why() == "" and passed.give_back == ()
    written = write_gated(passed, tmp_path / "c.yaml")
    with pytest.raises(SparsekitError, match=r"output '.*c\.yaml/d\.yaml' cannot be written"):
        write_gated(passed, tmp_path / "c.yaml" / "d.yaml")
    assert load(tmp_path / "c.yaml") == written
    assert [layer.dense for layer in written.resolve().layers] == [True, True, False]
    assert written.provenance["given_back_to_dense"] == "1"
    assert [check["verdict"] for check in written.provenance["gate"]["checks"]] == ["held", "held"]
    head, rows = passed.table()
    assert all(len(row) == len(head) for row in rows)

    before = len(Records(file))
    again = gate(model, tokenizer, better, tokens=[400, 600], samples=6, records=file, **OPTIONS)
    assert again.checks == passed.checks and len(Records(file)) == before


def test_the_gate_names_the_one_head_that_was_wrongly_chosen(adversary, tmp_path) -> None:
    """Head 0 of layer 1 alone carries the fact over the middle; heads 3 are left dense, and are not to blame."""
    model, tokenizer = adversary
    config = load({"model": {"num_layers": 3, "num_heads": 4}, "heads": {"0-2": {"0-2": TRIANGLE}}})
    file = tmp_path / "gate.jsonl"
    report = gate(model, tokenizer, config, tokens=[400], samples=4, records=file, **OPTIONS)
    assert not report.passed and report.give_back == (1,) and dict(report.give_back_heads) == {1: (0,)}
    assert report.to_dict()["give_back_heads"] == {"1": [0]}
    assert "0.00, dense 1.00; give layer 1 head 0 back to dense attention" in report.why()
    better = give_back(config, report.give_back, report.give_back_heads)
    assert {k: list(v) for k, v in better.heads.items()} == {"0,2": ["0-2"], "1": ["1-2", "0"]}
    assert better.provenance["heads_given_back_to_dense"] == {"1": "0"}
    passed = gate(model, tokenizer, better, tokens=[400], samples=4, records=file, **OPTIONS)
    assert passed.passed and passed.give_back_heads == {}

    right = load({"model": {"num_layers": 3, "num_heads": 4}, "heads": {"0-2": {"1-3": TRIANGLE}}})
    assert gate(model, tokenizer, right, tokens=[400], samples=4, records=file, **OPTIONS).passed


def test_a_model_that_is_wrong_when_dense_does_not_pass(adversary) -> None:
    model, tokenizer = models.tiny("llama", vocab_size=len(WORDS)), adversary[1]
    report = gate(model, tokenizer, {"layers": {"3": TRIANGLE}}, tokens=[300], samples=3, **OPTIONS)
    assert not report.passed
    assert "dense attention itself is wrong at 300 tokens" in report.why()
    assert report.checks[0].verdict == "dense wrong"


def test_search_rule_measures_what_it_chooses(adversary) -> None:
    model, tokenizer = adversary
    found = probe(model, tokenizer, samples=2, tokens=400, seeds=(0,), sections=CUT, **OPTIONS)
    prompts = make_prompts(model, tokenizer, tasks=[RELAYED], tokens=[400], count=3, seeds=[7])
    judge = Judge(model, tokenizer, prompts)
    from sparsekit.patterns import parse_pattern

    triangle = parse_pattern(TRIANGLE)

    def measure(layers, rule) -> dict[str, Effect]:
        return {"relayed": judge.effect(dict.fromkeys(layers, triangle))}

    layers, said = apply_rule(
        parse_rule("search", {"budget": 1e9, "lost": 0}), Given(models.facts(model), found, measure)
    )
    assert list(layers) == [2]
    assert said["measurements"] == 2


def test_tune_leaves_the_layer_that_matters_dense(adversary, tmp_path) -> None:
    model, tokenizer = adversary
    file = tmp_path / "tune.jsonl"
    run = lambda: tune(  # noqa: E731
        model,
        tokenizer,
        [TRIANGLE, {"name": "a_shape", "sink_tokens": 4, "window_tokens": 64}],
        budget=0.01,
        tokens=[400],
        samples=2,
        verify=4,
        records=file,
        **OPTIONS,
    )
    found = run()
    assert 1 not in found.chosen and set(found.chosen) == {0, 2}
    assert found.chosen[2].name == "triangle"  # a_shape would cut the question from the relay
    assert found.cost < 1 and not found.dense
    assert [round_.holds for round_ in found.rounds].count(True) >= 1
    assert found.config.provenance["verified"]["kl_at_most"] <= 0.01
    assert load(found.config.dump()) == found.config
    assert found.config.provenance["cost"]["attention_flops_of_dense"] == pytest.approx(found.cost, abs=1e-4)
    head, rows = found.table()
    assert len(rows) == 3 and all(len(row) == len(head) for row in rows)
    assert "Attention FLOPs" in summary(found)[-1]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:20])  # interrupted in the fourth measurement
    again = run()
    assert (again.choices, again.chosen, again.rounds) == (found.choices, found.chosen, found.rounds)
    assert len(file.read_text().splitlines()) == len(lines)


def test_tune_stays_dense_rather_than_break(adversary) -> None:
    model, tokenizer = adversary
    found = tune(model, tokenizer, [TRIANGLE], budget=1e-6, layers=[1], tokens=[400], samples=1, verify=2, **OPTIONS)
    assert found.dense and found.cost == 1
    assert "everything is dense" in found.config.provenance["note"]
    assert all(layer.dense for layer in found.config.resolve().layers)
    assert summary(found)[0].startswith("Everything stays dense: no candidate costs less than dense")


@pytest.mark.parametrize("name", sorted(set(pattern_names()) - {"dense", "union", "a_shape", "triangle"}))
def test_every_dynamic_pattern_can_be_a_candidate(adversary, name: str) -> None:
    """Its cost is the tile density of the run, which no cost model knows."""
    if any(field.is_required() for field in pattern_class(name).model_fields.values()):
        pytest.skip(f"{name} has no defaults")
    model, tokenizer = adversary
    found = tune(model, tokenizer, [name], budget=1.0, layers=[2], tokens=[500], samples=1, verify=2, **OPTIONS)
    [choice] = found.choices
    assert choice.pattern.name == name
    assert 0 < choice.cost <= 1


def test_whole_mixtures_are_what_decides(adversary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are harmless alone and not together: the guess is narrowed until the whole holds."""
    model, tokenizer = adversary
    real = Judge.effect

    def harmless_alone(self, patterns):
        effect = real(self, patterns)
        kl = 1e-5 if len(patterns) == 1 else 0.5 if len(patterns) == 3 else 1e-4
        scores = {"score": effect.dense_score}
        return type(effect)(**{**effect.__dict__, "kl": (kl,) * len(effect.kl), **scores})

    monkeypatch.setattr(Judge, "effect", harmless_alone)
    found = tune(model, tokenizer, [TRIANGLE], budget=0.01, tokens=[400], samples=1, verify=2, **OPTIONS)
    assert len(found.chosen) == 2
    assert found.rounds[0].layers == 3 and not found.rounds[0].holds


def test_the_curve_of_harm_against_start_layer(adversary) -> None:
    model, tokenizer = adversary
    found = start_layer_curve(model, tokenizer, [TRIANGLE], [0, 1, 2], samples=3, tokens=800, **OPTIONS)
    assert [row["start"] for row in found.rows] == [2, 1, 0]
    deep, middle, _ = found.rows
    assert deep["kl"] < 1e-3 < middle["kl"] and deep["score"][0] == 1 and middle["score"][0] == 0
    assert deep["same"][0] == 1 and middle["same"][0] == 0 and 0 < deep["tile_density"] < 1
    head, rows = found.table()
    assert len(rows) == 3 and all(len(row) == len(head) for row in rows)
    with pytest.raises(SparsekitError, match=r"starts \[3\]"):
        start_layer_curve(model, tokenizer, [TRIANGLE], [3], samples=1, tokens=400, **OPTIONS)


def test_choose_is_the_cheapest_by_brute_force() -> None:
    """Against every combination, on random effects and costs that are whole steps of the allowance."""
    generator = torch.Generator().manual_seed(0)
    patterns = [pattern_class("triangle")(window_tokens=w) for w in (1, 2, 3)]
    for _ in range(20):
        kls = torch.randint(1, 12, (4, 3), generator=generator)
        costs = torch.randint(1, 100, (4, 3), generator=generator) / 100
        choices = [
            Choice(layer, patterns[i], kls[layer, i].item() / 20, costs[layer, i].item())
            for layer, i in product(range(4), range(3))
        ]
        found = choose(choices, 1.0)
        assert sum(choice.kl for choice in found.values()) <= 1 + 1e-9
        best = min(
            sum(1 if i == 3 else costs[layer, i].item() for layer, i in enumerate(combination))
            for combination in product(range(4), repeat=4)
            if sum(0 if i == 3 else int(kls[layer, i]) for layer, i in enumerate(combination)) <= 20
        )
        cost = 4 - len(found) + sum(choice.cost for choice in found.values())
        assert cost == pytest.approx(best)
    assert choose(choices, 0.0) == {}


def test_give_back_takes_heads_ranges_and_defaults() -> None:
    config = load(
        {
            "model": {"num_layers": 6, "num_heads": 4},
            "default": "triangle",
            "layers": {"0-3": "a_shape"},
            "heads": {"2-4": {"0-1": {"name": "a_shape", "window_tokens": 9}}},
        }
    )
    dense = [layer.dense for layer in give_back(config, [2, 4, 5]).resolve().layers]
    assert dense == [False, False, True, False, True, True]
    assert list(give_back(config, [2, 3, 4]).heads) == []
    some = give_back(config, [4], {0: (1, 2), 3: (0,)}).resolve()
    assert [[str(p).partition("(")[0], h] for p, h in some.layers[0].groups()] == [
        ["a_shape", (0, 3)],
        ["dense", (1, 2)],
    ]
    assert [h for p, h in some.layers[3].groups() if p.name == "dense"] == [(0,)] and some.layers[4].dense
    assert some.layers[2] == config.resolve().layers[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": []}, "0 candidates"),
        ({"patterns": ["dense"]}, "0 candidates"),
        ({"budget": 0}, "budget = 0"),
        ({"layers": [9]}, "layer 9: the model has 0-2"),
        ({"tokens": [5000]}, "the model has 4096 positions"),
        ({"patterns": ["triangel"]}, "unknown pattern 'triangel'.*triangle"),
        (
            {"patterns": [{"name": "block_topk", "top_k": 2, "dense_below_tokens": 512}]},
            "block_topk.* runs dense below 512 tokens on cpu, so prompts of 400 say nothing of it",
        ),
    ],
)
def test_what_tune_refuses(adversary, options: dict, message: str) -> None:
    with pytest.raises(SparsekitError, match=message):
        tune(*adversary, **{"patterns": [TRIANGLE], "tokens": [400], **OPTIONS, **options})


def test_a_layer_that_cannot_be_sparse_is_named() -> None:
    model = models.tiny("qwen3", vocab_size=len(WORDS), use_sliding_window=True, sliding_window=8, max_window_layers=2)
    with pytest.raises(SparsekitError, match=r"layer 3 is a sliding_attention layer.*cannot be sparse"):
        tune(model, Words(), [TRIANGLE], layers=[3], tokens=[400], **OPTIONS)


def test_a_model_of_windows_alone_is_refused() -> None:
    model = models.tiny("mistral", vocab_size=len(WORDS), sliding_window=8)
    with pytest.raises(SparsekitError, match=r"keeps its own attention \(layer 0 is a sliding_attention"):
        tune(model, Words(), [TRIANGLE], tokens=[400], **OPTIONS)
    with pytest.raises(SparsekitError, match=r"every layer .* keeps its own attention"):
        search_heads(model, Words(), [TRIANGLE], flops=0.9, tokens=400)


def test_what_the_gate_refuses(adversary) -> None:
    model, tokenizer = adversary
    with pytest.raises(SparsekitError, match="run dense under this config"):
        gate(model, tokenizer, {"dense_below_tokens": 1024}, tokens=[512, 2048], **OPTIONS)
    with pytest.raises(SparsekitError, match="bound = 1"):
        gate(model, tokenizer, {}, tokens=[512], bound=1, **OPTIONS)
    wide = {"layers": {"2": {"name": "triangle", "window_tokens": 4096}}}
    with pytest.raises(SparsekitError, match=r"do not run the config \(the pattern kept every pair\)"):
        gate(model, tokenizer, wide, tokens=[300], samples=1, **OPTIONS)
    with pytest.raises(SparsekitError, match="the model has 4096 positions"):
        gate(model, tokenizer, {}, tokens=[8192], **OPTIONS)
