"""No verdict over an empty set: where nothing was measured, nothing is concluded."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_row import change_row, half
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import sparsekit
from sparsekit import SparsekitError, models
from sparsekit.config import ModelFacts
from sparsekit.lab import demo
from sparsekit.lab.bench import bench_dynamic, bench_overhead, bench_prefill
from sparsekit.lab.bench.timing import Record
from sparsekit.lab.calibrate.curve import start_layer_curve
from sparsekit.lab.calibrate.effects import Effect, Judge
from sparsekit.lab.calibrate.gate import GateReport, gate
from sparsekit.lab.calibrate.heads import search_heads
from sparsekit.lab.calibrate.inspection import Inspection, LayerSinks
from sparsekit.lab.calibrate.probe import SECTIONS, LayerProbe, Probe, Sections, probe
from sparsekit.lab.calibrate.rules import Given, parse_rule
from sparsekit.lab.calibrate.sinks import inspect_model
from sparsekit.lab.calibrate.tune import summary, tune
from sparsekit.lab.evaluate import evaluate, read_on
from sparsekit.lab.report import markdown_report, write_report
from sparsekit.lab.stats import mean_interval, mean_of_known, quantile, share_interval, standard_error
from sparsekit.lab.sweep import best
from sparsekit.lab.tasks import Sample, task

Smol = tuple[PreTrainedModel, PreTrainedTokenizerBase]
TRIANGLE = {"name": "triangle", "sink_tokens": 4, "window_tokens": 32, "last_tokens": 16}
SHORT: dict[str, Any] = {"tokens": 300, "samples": 1, "quiet": True}
CUT = Sections(4, 32, 16)


@pytest.fixture(scope="module")
def windows(smollm2: Smol) -> Smol:
    """A model none of whose layers is full causal attention."""
    return models.tiny("mistral", vocab_size=49152, sliding_window=64), smollm2[1]


@pytest.fixture(scope="module")
def small(smollm2: Smol) -> Smol:
    return models.tiny("llama", vocab_size=49152), smollm2[1]


def test_a_model_without_a_layer_to_measure(windows: Smol) -> None:
    refused = pytest.raises(SparsekitError, match=r"every layer of .* keeps its own attention .*nothing to measure")
    with refused:
        inspect_model(*windows, **SHORT)
    with refused:
        probe(*windows, sections=CUT, **SHORT)
    with refused:
        gate(*windows, {"default": "triangle"}, tokens=[300], samples=1, quiet=True)
    with refused:
        tune(*windows, [TRIANGLE], tokens=[300], quiet=True)
    with refused:
        search_heads(*windows, [TRIANGLE], flops=0.9, **SHORT)
    with refused:
        start_layer_curve(*windows, [TRIANGLE], [0], **SHORT)
    with pytest.raises(SparsekitError, match="every layer"):
        list(evaluate(*windows, {"t": {"default": TRIANGLE}}, tasks=["passkey"], lengths=[300], samples=1))


def test_what_an_inspection_says_of_layers_that_were_not_measured() -> None:
    own = tuple(LayerSinks(i, own="sliding_attention layer") for i in range(2))
    inspection = Inspection("m", 1, {}, 0.3, 64, "", {}, own)
    assert inspection.answer() == ["No layer was measured, so nothing can be said of sinks."]
    assert inspection.sink_tokens is None and inspection.to_dict()["sink_tokens"] is None
    some = replace(inspection, layers=(*own, LayerSinks(2, score=(0.1,))))
    assert some.sink_tokens == 0
    assert some.answer()[-1] == "Layers 0-1 keep their own attention and were not measured."


@pytest.mark.parametrize("gradients", [(), (0.0, 0.0), (math.nan, 1.0), (math.inf, 1.0), (None, None)])
def test_no_rule_on_gradients_that_say_nothing(gradients: tuple[float | None, ...]) -> None:
    layers = [
        LayerProbe(i, "own")
        if g is None
        else LayerProbe(i, gradient=(of := dict.fromkeys(SECTIONS, g)), heads=(of,), head_signed=(of,), head_mass=(of,))
        for i, g in enumerate(gradients)
    ]
    found = Probe("m", CUT, 1, {}, {}, tuple(layers))
    for rule in (parse_rule("suffix"), parse_rule("lowest_k", {"k": 0}), parse_rule("head_share", {"share": 0.5})):
        with pytest.raises(SparsekitError, match=r"no (layer|head) can be told from another|no layer was probed"):
            rule.heads(Given(ModelFacts(num_heads=1), found))


def test_a_probe_without_a_middle(small: Smol) -> None:
    with pytest.raises(SparsekitError, match=r"tokens = 300: .* leave no Middle section"):
        probe(*small, sections=Sections(4, 300, 16), **SHORT)


def test_a_gate_that_checked_nothing(small: Smol) -> None:
    for config, options, says in (
        ({"layers": {"1": TRIANGLE}}, {"tasks": []}, "tasks: at least one"),
        ({"layers": {"1": TRIANGLE}}, {"samples": 0}, "samples = 0"),
        ({"layers": {"1": TRIANGLE}}, {"tokens": []}, "tokens = 0"),
        ({"layers": {"1": "dense"}}, {}, "no layer of this model sparse or in FP8, so there is nothing to check"),
    ):
        with pytest.raises(SparsekitError, match=says):
            gate(*small, config, **{"tokens": [300], "samples": 1, "quiet": True, **options})
    empty = GateReport(sparsekit.load({}), 0.1, (), (), False, {})
    assert not empty.passed and empty.why() == "nothing was checked."


def test_a_gate_of_dense_layers_in_fp8(small: Smol, monkeypatch: pytest.MonkeyPatch) -> None:
    """They answer otherwise than the model's own, so there is something to check; and something to blame."""
    change_row(monkeypatch, run=half, covers=lambda *call: [], selects_in_triton=False)
    config = {"dense_impl": "kernel", "precision": "fp8", "dense_below_tokens": 0}
    found = gate(*small, config, tokens=[300], samples=1, quiet=True)
    assert found.checks and all(check.kl > 1e-4 for check in found.checks)


def test_a_tuning_that_measured_no_mixture(small: Smol) -> None:
    for options, says in (
        ({"layers": []}, "layers: at least one"),
        ({"verify": 1}, "verify = 1: at least 2 prompts"),
        ({"tokens": []}, "0 lengths"),
    ):
        with pytest.raises(SparsekitError, match=says):
            tune(*small, [TRIANGLE], **{"tokens": [300], "samples": 1, "quiet": True, **options})
    wide = {"name": "triangle", "window_tokens": 4096}
    found = tune(*small, [wide], tokens=[300], layers=[1], samples=1, verify=2, quiet=True)
    assert not found.rounds and found.dense
    assert (
        "no mixture was measured" in summary(found)[0] and "no mixture was measured" in found.config.provenance["note"]
    )
    with pytest.raises(SparsekitError, match="patterns: at least one"):
        start_layer_curve(*small, [], [0], **SHORT)
    with pytest.raises(SparsekitError, match="no prompts"):
        Judge(*small, [])


def test_one_prompt_has_no_standard_error() -> None:
    assert Effect((0.0,), (1.0,), (1.0,), (1.0,), {}).kl_at_most == math.inf
    assert Effect((0.0,) * 2, (1.0,) * 2, (1.0,) * 2, (1.0,) * 2, {}).kl_at_most == 0
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0) and mean_interval([1.0]) == (1.0, math.inf)
    assert mean_of_known([None, 1.0, 3.0]) == 2 and mean_of_known([None]) is None
    assert quantile([1.0, 2.0], 0.5) == 1.5
    for measure in (mean_interval, share_interval, standard_error, lambda values: quantile(values, 0.5)):
        with pytest.raises(SparsekitError, match="no measurements"):
            measure([])


def test_a_sample_that_any_text_answers(small: Smol) -> None:
    for answers in ((), ("a", "")):
        with pytest.raises(SparsekitError, match=r"answers = .*at least one"):
            Sample("q", answers)
    with pytest.raises(SparsekitError, match="a prompt of 1 tokens has no row"):
        read_on(*small, task("perplexity", "pydoc"), Sample("a", ("b c",), raw=True))


def test_the_best_of_nothing() -> None:
    cell = {"model": "m", "task": "t", "tokens": 8, "seed": 0, "ttft_s": 1.0, "density": 1.0, "kl": 0.0}
    dense = {**cell, "label": "dense", "config_key": "dense", "config": None, "score": 0.0}
    other = {**cell, "label": "a", "config_key": "a", "config": {"version": 1}, "score": 0.0}
    with pytest.raises(SparsekitError, match="dense attention's own score is 0"):
        best([dense, other], "score within 1% of dense")
    assert best([dense, other], "kl below 0.1").winner.label == "a"
    with pytest.raises(SparsekitError, match="no record of dense"):
        best([], "kl below 0.1")
    with pytest.raises(SparsekitError, match="no config has a record"):
        best([dense], "kl below 0.1")


def test_a_report_of_nothing(tmp_path: Path) -> None:
    failed = {"label": "a", "model": "m", "task": "t", "tokens": 8, "seed": 0, "status": "failed", "error": "boom"}
    with pytest.raises(SparsekitError, match="none of 1 records is of a run that succeeded: boom"):
        markdown_report([failed])
    file = tmp_path / "probe.json"
    layer = {"layer": 0, "own": "a window", "heads": []}
    prompts = {"tokens": 8, "tasks": ["t"]}
    file.write_text(
        json.dumps(
            {
                "kind": "probe",
                "model": "m",
                "sections": {},
                "samples": 1,
                "prompts": prompts,
                "made": {},
                "layers": [layer],
            }
        )
    )
    with pytest.raises(SparsekitError, match="no layer of m was probed"):
        write_report([file], tmp_path / "out.html")
    (tmp_path / "empty.jsonl").write_text("")
    for read in (demo.read_outcomes, demo.markdown_table):
        with pytest.raises(SparsekitError, match="no record in there"):
            read(tmp_path / "empty.jsonl")


@torch.inference_mode()
def test_layers_that_were_never_called_are_told(small: Smol, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsekit.lab.calibrate import sinks

    real = sinks._look
    monkeypatch.setattr(sinks, "_look", lambda *args: {k: v for k, v in real(*args).items() if k != 2})
    with pytest.raises(SparsekitError, match="layers 2 ran no attention"):
        inspect_model(*small, **SHORT)


def test_a_bench_of_nothing(tmp_path: Path) -> None:
    tiny: dict[str, Any] = {"shape": "tiny", "device": "cpu"}
    for call, says in (
        (lambda: bench_prefill([], **tiny), "0 configs"),
        (lambda: bench_prefill([sparsekit.load({})], lengths=[], **tiny), "at least one of each"),
        (lambda: bench_prefill([sparsekit.load({})], rounds=0, **tiny), "rounds = 0"),
        (lambda: bench_overhead(rounds=0, **tiny), "rounds = 0"),
        (lambda: bench_overhead(decode_tokens=0, **tiny), "decode_tokens = 0"),
        (lambda: bench_dynamic(methods=[], device="cpu"), "methods: at least one"),
        (lambda: bench_dynamic(lengths=[], device="cpu"), "at least one prompt length"),
        (lambda: bench_dynamic(inputs=[], device="cpu"), "at least one of structured"),
    ):
        with pytest.raises(SparsekitError, match=says):
            call()


def test_a_bench_that_is_killed_leaves_the_rows_before_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"case": "old"}\n')
    with suppress(KeyboardInterrupt), Record(file, {"device": "cpu"}) as record:
        record.add({"case": "new"})
        raise KeyboardInterrupt
    assert file.read_text() == '{"case": "old"}\n'
    assert (tmp_path / "rows.jsonl.part").read_text() == '{"case": "new", "device": "cpu"}\n'
    with Record(file, {"device": "cpu"}) as record:
        record.add({"case": "new"})
    assert file.read_text() == '{"case": "new", "device": "cpu"}\n' and not (tmp_path / "rows.jsonl.part").exists()
    with Record(None, {}) as record:
        record.add({"case": "new"})
    assert record.rows == [{"case": "new"}]
