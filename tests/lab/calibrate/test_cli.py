"""`sparsekit calibrate ...` and `inspect` through the door that a shell uses, on a tiny model; once the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparsekit import load, models
from sparsekit.cli import app
from sparsekit.lab.calibrate import gate as gate_module
from sparsekit.lab.calibrate.probe import read_probe
from sparsekit.lab.evaluate import Answer

run = CliRunner()
CONFIGS = Path(__file__).parents[3] / "configs"
SHORT = ["--sink-tokens", "4", "--window-tokens", "32", "--last-tokens", "16"]
GATE = ["--gate-tokens", "512", "--gate-samples", "1", "--dense-below", "100"]


@pytest.fixture
def tiny(smollm2, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Every MODEL is a tiny random one that reads the real tokenizer's prompts."""
    model = models.tiny("llama", vocab_size=49152)
    monkeypatch.setattr(models, "load", lambda *_, **__: (model, smollm2[1]))
    monkeypatch.chdir(tmp_path)
    return model


@pytest.fixture
def right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is right."""
    answer = Answer("1", 1.0, 0.0, 500, torch.zeros(1, 4))
    monkeypatch.setattr(gate_module._Gate, "_answer", lambda self, prompt: answer)
    monkeypatch.setattr(
        gate_module._Gate,
        "_measure",
        lambda self, config, prompt: {"dense": 1.0, "sparse": 1.0, "same": 1.0, "kl": 0.0},
    )


def out(*args: str, code: int = 0) -> str:
    result = run.invoke(app, args)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_probe_then_rule(tiny, right) -> None:
    common = ["--samples", "2", "--tokens", "300", *SHORT]
    table = out("calibrate", "probe", "m", *common, "-o", "probe.json", "--picture", "probe.png")
    assert "Grad(middle)" in table and len(read_probe("probe.json").layers) == 4
    assert Path("probe.png").stat().st_size > 10_000
    found = json.loads(out("calibrate", "probe", "m", *common, "--records", "r.jsonl", "--json"))
    assert found["samples"] == 2 and len(Path("r.jsonl").read_text().splitlines()) == 2

    pattern = "{name: triangle, window_tokens: 64, last_tokens: 16}"
    common = ["--probe", "probe.json", "--pattern", pattern, "-o", "c.yaml", *GATE]
    assert "written to c.yaml" in out("calibrate", "rule", "m", "--rule", "lowest_k", "--k", "2", *common)
    config = load("c.yaml")
    assert sum(not layer.dense for layer in config.resolve().layers) == 2
    assert config.provenance["rule"] == "lowest_k" and config.provenance["gate"]["passed"]
    assert config.provenance["command"].startswith("sparsekit")
    assert "chose no layer" in out("calibrate", "rule", "m", "--rule", "lowest_k", "--k", "0", *common, code=1)
    search = ["--rule", "search", "--samples", "2", "--tokens", "300", "--budget", "9", "--bound", "0.9"]
    out("calibrate", "rule", "m", *search, *common)
    assert sum(not layer.dense for layer in load("c.yaml").resolve().layers) == 4


def test_reuse(tiny, right) -> None:
    pattern = "{name: block_topk, top_k: 2}"
    common = ["--pattern", pattern, "--samples", "1", "--tokens", "600", "-o", "c.yaml", *GATE]
    text = out("calibrate", "reuse", "m", "--anchors", "2", "--layers", "1-3", "--report", "r.json", *common)
    assert "written to c.yaml" in text and "kept mass" in text
    config = load("c.yaml")
    layers = config.resolve().layers
    anchors = [layer.layer for layer in layers if not (layer.dense or layer.reused)]
    assert json.loads(Path("r.json").read_text())["anchors"] == anchors == config.provenance["anchors"]
    assert anchors[0] == 1 and len(anchors) == 2 and layers[0].dense
    assert config.provenance["by"] == "sparsekit calibrate reuse" and config.provenance["gate"]["passed"]
    assert "one of the two" in out("calibrate", "reuse", "m", "--anchors", "2", "--recall", "0.9", *common, code=1)


def test_heads_by_rule_then_their_curve_and_agreement(tiny, right) -> None:
    out("calibrate", "probe", "m", "--samples", "2", "--tokens", "300", *SHORT, "-o", "probe.json")
    pattern = "{name: triangle, window_tokens: 64, last_tokens: 16}"
    common = ["--probe", "probe.json", "--pattern", pattern]
    rule = ["calibrate", "rule", "m", "-o", "c.yaml", *common, *GATE]
    assert "written to c.yaml" in out(*rule, "--rule", "head_share", "--share", "0.5", "--rest", "block_topk")
    config = load("c.yaml")
    groups = [(p.name, len(heads)) for layer in config.resolve().layers for p, heads in layer.groups()]
    assert (
        sum(n for name, n in groups if name == "triangle") == 8 == sum(n for name, n in groups if name == "block_topk")
    )
    assert config.provenance["rule"] == "head_share" and config.provenance["gate"]["passed"]
    budget = [
        "--rule",
        "head_budget",
        "--budget",
        "9",
        "--samples",
        "2",
        "--tokens",
        "300",
        "--tasks",
        "needle4,passkey",
    ]
    out(*rule, *budget, "--records", "r.jsonl")
    assert load("c.yaml").provenance["measured_kl"].keys() == {"needle4", "passkey"}
    assert all(not layer.dense for layer in load("c.yaml").resolve().layers)

    curve = ["calibrate", "head-curve", "m", *common, "--shares", "0.5,0.75", "--samples", "2", "--tokens", "300"]
    more = ["--tasks", "needle4,perplexity", "--corpus", "pydoc", "--ranks", "gradient,refined", "--rank-samples", "2"]
    found = json.loads(out(*curve, *more, "--records", "curve.jsonl", "--json"))
    assert [(row["task"], row["share"], row["by"]) for row in found["rows"]] == [
        (name, share, by)
        for name in ("needle4", "perplexity")
        for share in (0.5, 0.75)
        for by in ("layer", "gradient", "refined")
    ]
    for row in found["rows"]:
        assert row["heads_share"] == row["share"] and row["samples"] == 2 and row["kl"] > 0
        assert (row["kl_below_layer"] is None) == (row["by"] == "layer")
    layer, head = found["rows"][:2]
    assert head["kl_below_layer"][0] == pytest.approx(layer["kl"] - head["kl"])
    before = len(Path("curve.jsonl").read_text().splitlines())
    again = json.loads(out(*curve, *more, "--records", "curve.jsonl", "--json"))
    assert again["rows"] == found["rows"] and len(Path("curve.jsonl").read_text().splitlines()) == before
    assert "below layer" in out(*curve, "--records", "curve.jsonl")

    agree = ["calibrate", "agreement", "m", "--tasks", "needle4", "--samples", "1", "--json"]
    agreed = json.loads(out(*agree, "--tokens", "400,450", "--seeds", "0,1"))
    assert {row["axis"] for row in agreed["rows"]} == {"tokens", "seed"}
    assert all(-1 <= row["lowest"] <= row["correlation"] <= 1 and 0 <= row["overlap"] <= 1 for row in agreed["rows"])
    assert "two or more" in out(
        "calibrate", "agreement", "m", "--tokens", "400", "--tasks", "vt", "--seeds", "1", code=1
    )
    assert "--shares 'a'" in out(*curve, "--shares", "a", code=1)


def test_gates_of_key_heads_then_what_reads_them(tiny, right) -> None:
    """The table of `duo-attention` is a config by `convert`, an order of `head-curve`, and one of a rule, gated."""
    pattern = "{name: triangle, window_tokens: 64, last_tokens: 16}"
    short = ["--steps", "3", "--tokens", "300,350", "--tasks", "needle4", "--pattern", pattern, "--lr", "0.2"]
    said = out("calibrate", "duo-attention", "m", *short, "--full", "gated", "-o", "gates/a.tsv")
    assert "gates of its key heads" in said and "3 steps: loss " in said
    table = [[float(word) for word in line.split("\t")] for line in Path("gates/a.tsv").read_text().splitlines()]
    assert len(table) == 4 and all(len(row) == 2 and 0 <= min(row) <= max(row) < 1 for row in table)
    made = json.loads(Path("gates/a.json").read_text())
    assert made["kind"] == "duo-attention" and made["model"] == "m" and made["full"] == "gated"
    assert made["gates"] == [pytest.approx(row, abs=1e-6) for row in table]
    assert len(made["steps"]) == 3 and made["loss"]["first"] == pytest.approx(made["loss"]["last"])
    assert made["prompts"] == {"tasks": ["needle4"], "tokens": [300, 350], "seed": 0}
    assert made["pattern"]["window_tokens"] == 64 and made["command"].startswith("sparsekit")

    out("convert", "duo-attention", "gates/a.tsv", "--share", "0.5", "--group", "2", "-o", "c.yaml")
    streaming = [p.name for layer in load("c.yaml").resolve().layers for p, heads in layer.groups() for _ in heads]
    assert streaming.count("a_shape") == 8

    Path("b.tsv").write_text("1 0.5\n1 1\n1 1\n0.2 0.1\n")
    out("calibrate", "probe", "m", "--samples", "1", "--tokens", "300", *SHORT, "-o", "probe.json")
    common = ["--scores", "b.tsv", "--pattern", pattern]
    curve = ["calibrate", "head-curve", "m", "--probe", "probe.json", *common, "--samples", "2", "--tokens", "300"]
    found = json.loads(out(*curve, "--shares", "0.25,0.5", "--json"))
    assert [row["by"] for row in found["rows"]] == ["layer", "gradient", "scores"] * 2 and found["scores"] == "b.tsv"
    by = {(row["by"], row["share"]): row["kl"] for row in found["rows"]}
    assert by["scores", 0.25] == by["layer", 0.25] < 1e-9  # the last layer's heads, either way
    assert by["scores", 0.5] != by["layer", 0.5] > 1e-9

    rule = ["calibrate", "rule", "m", "--rule", "head_share", *common, "-o", "c.yaml", *GATE]
    out(*rule, "--share", "0.375", "--rank", "scores")
    chosen = {i: [h for p, hs in layer.groups() if p.name == "triangle" for h in hs]
              for i, layer in enumerate(load("c.yaml").resolve().layers)}  # fmt: skip
    assert chosen == {0: [2, 3], 1: [], 2: [], 3: [0, 1, 2, 3]}
    assert "--scores 'b.tsv': read by --rank scores alone" in out(*rule, "--share", "0.25", code=1)


def test_what_fails_the_gate_is_not_written(tiny) -> None:
    pattern = "{name: triangle, window_tokens: 64, last_tokens: 16}"
    rule = ["--rule", "list", "--layers", "1-3", "--pattern", pattern, "-o", "c.yaml"]
    said = out("calibrate", "rule", "m", *rule, *GATE, code=1)
    assert said.count("\n") == 1 or "dense attention itself is wrong" in said
    assert "'c.yaml' is not written: dense attention itself is wrong at 512 tokens" in said
    assert not Path("c.yaml").exists()
    Path("d.yaml").write_text(f"layers: {{'3': {pattern}}}\n")
    gate = ["--gate-tokens", "512", "--gate-samples", "1"]
    assert "dense attention itself" in out("calibrate", "gate", "m", "d.yaml", *gate, code=1)


def test_a_gate_says_where_it_saw_little(tiny, right) -> None:
    gate = ["calibrate", "gate", "m", "d.yaml", "--gate-tokens", "512", "--gate-samples", "1"]
    for window, says in ((400, "the sparse layers keep 96% of the pairs"), (64, "")):
        Path("d.yaml").write_text(f"layers: {{'3': {{name: triangle, window_tokens: {window}, last_tokens: 8}}}}\n")
        found = run.invoke(app, gate)
        assert found.exit_code == 0 and found.stdout.endswith("passed\n")
        assert (says in found.stderr) if says else "sparse layers" not in found.stderr


def test_tune_and_heads(tiny, right) -> None:
    patterns = "{name: triangle, window_tokens: 64, last_tokens: 16}, {name: a_shape, window_tokens: 64}"
    short = ["--tokens", "300", "--samples", "1", *GATE]
    said = out(
        "calibrate", "tune", "m", "--patterns", patterns, "--budget", "5", "--lost", "0.9", "--verify", "2", *short,
        "--records", "t.jsonl", "--report", "t.json", "-o", "t.yaml",
    )  # fmt: skip
    assert "Attention FLOPs" in said and "written to t.yaml" in said
    assert len(json.loads(Path("t.json").read_text())["choices"]) >= 4
    assert load("t.yaml").provenance["by"] == "sparsekit calibrate tune"
    failed = out("calibrate", "tune", "m", "--patterns", patterns, "--budget", "1e-12", *short, "-o", "u.yaml", code=1)
    assert "'u.yaml' is not written: no mixture is within the budget" in failed

    said = out("calibrate", "heads", "m", "--patterns", patterns, "--flops", "0.9", *short, "-o", "h.yaml")
    assert "written to h.yaml" in said and load("h.yaml").provenance["mean_cost"] <= 0.9
    said = out("calibrate", "heads", "m", "--patterns", "xattention", "--flops", "0.95", *short, "-o", "x.yaml")
    assert load("x.yaml").provenance["candidates"][0]["name"] == "xattention"


def test_inspect(tiny) -> None:
    Path("c.yaml").write_text("layers: {'2-3': {name: triangle, window_tokens: 64, last_tokens: 16}}\n")
    common = ["--samples", "1", "--tokens", "300"]
    said = out("inspect", "m", "--config", "c.yaml", "--gradient", *common, "--picture", "s.png", "-o", "s.json")
    assert "sink tokens" in said and "c.yaml drops at most" in said and "gradient" in said
    assert "Sink mass in the second half" in said and "KL from dense by sink tokens kept" in said
    assert Path("s.png").stat().st_size > 10_000
    written = json.loads(Path("s.json").read_text())
    assert written["layers"][3]["dropped_gradient"] and written["layers"][3]["output"] and written["idle_heads"] == []
    assert [(row["name"], row["sink_tokens"]) for row in written["kept"]] == [
        (name, n) for name in ("a_shape", "triangle") for n in (0, 1, 4, 8)
    ]
    found = json.loads(out("inspect", "m", *common, "--kept-sinks", "", "--json"))
    assert len(found["layers"]) == 4 and found["sink_tokens"] == 0 and found["kept"] == []
    assert "--kept-sinks 'x'" in out("inspect", "m", *common, "--kept-sinks", "x", code=1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["probe", "m", "--seeds", "a"], "--seeds 'a': want whole numbers, comma-separated"),
        (["probe", "m", "--picture", "x.gif", "--samples", "1", "--tokens", "400"], "must end in .png"),
        (["rule", "m", "--rule", "suffix", "-o", "c.yaml"], "needs a probe"),
        (["rule", "m", "--rule", "head_share", "--share", "0.5", "--rank", "scores", "-o", "c.yaml"], "--scores FILE"),
        (["duo-attention", "m", "-o", "gates.json"], "output 'gates.json': must end in .tsv"),
        (["duo-attention", "m", "-o", "g.tsv", "--pattern", "minference"], "unknown pattern 'minference'"),
        (["duo-attention", "m", "-o", "g.tsv", "--pattern", "flexprefill"], "want a static one"),
        (["duo-attention", "m", "-o", "g.tsv", "--tokens", "9000"], "the model has 4096 positions"),
        (["duo-attention", "m", "-o", "g.tsv", "--tokens", "900"], "passkeys10: tokens = 900 is too small"),
        (["duo-attention", "m", "-o", "g.tsv", "--full", "both"], "full = 'both': one of dense, gated"),
        (["rule", "m", "--pattern", "triangle,a_shape", "--rule", "search", "-o", "c.yaml"], "one pattern for all"),
        (["rule", "m", "--rule", "suffix", "--k", "2", "-o", "c.yaml"], "rule 'suffix': unknown field 'k' = 2"),
        (["tune", "m", "--patterns", "{name: triangle", "-o", "c.yaml"], "--patterns '{name: triangle'"),
        (["tune", "m", "--patterns", "triangle", "--tokens", "9000", "-o", "c.yaml"], "the model has 4096 positions"),
    ],
)
def test_errors_are_one_line(tiny, args: list[str], message: str) -> None:
    said = out("calibrate", *args, code=1)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.slow
def test_the_real_model(smollm2, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M: deep layers' Grad(Middle) is small, key 0 is its sink, and its config passes a short gate."""
    monkeypatch.setattr(models, "load", lambda *_, **__: smollm2)
    monkeypatch.chdir(tmp_path)
    found = json.loads(out("calibrate", "probe", "smollm2-135m", "--samples", "1", "--tokens", "600", "--json"))
    middle = [layer["gradient"]["middle"] for layer in found["layers"]]
    assert max(middle[22:]) < 0.12 * max(middle) and middle[29] == 0
    seen = json.loads(out("inspect", "smollm2-135m", "--samples", "1", "--tokens", "250", "--json"))
    assert seen["sink_tokens"] >= 1 and "0" in seen["layers"][15]["sinks"]
    config = str(CONFIGS / "smollm2-135m/trianglemix.yaml")
    gate = ["--gate-tokens", "1100", "--gate-samples", "1", "--bound", "0.5", "-o", "gated.yaml"]
    result = run.invoke(app, ["calibrate", "gate", "smollm2-135m", config, *gate])
    assert result.exit_code == 0, result.output
    assert load("gated.yaml").provenance["gate"]["checks"][1]["dense"] == 1.0
