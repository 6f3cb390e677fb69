"""lm-eval's tasks: what it says becomes a record like the others, and the model it asks is the patched one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typer.testing import CliRunner

import sparsekit
from sparsekit import SparsekitError, models
from sparsekit.cli import app
from sparsekit.lab import lm_eval as harness
from sparsekit.lab import lm_eval_scores
from sparsekit.lab.lm_eval import LmEvalTasks, ran_dense, records_kept, run_lm_eval, table
from sparsekit.lab.report import report_data
from sparsekit.lab.stats import Z95
from sparsekit.lab.sweep import read_results
from sparsekit.lab.sweep.results import ResultFile

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # read when lm-eval imports datasets

Smol = tuple[PreTrainedModel, PreTrainedTokenizerBase]
WITHOUT = "needs pip install 'sparsekit-attention[eval]'"
STREAMING = {"version": 1, "default": {"name": "a_shape", "sink_tokens": 4, "window_tokens": 32}}
run = CliRunner()


# ---- without lm-eval


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--harness", "lm-eval"], "--harness lm-eval needs --tasks"),
        (["--harness", "lm-eval", "--tasks", "hellaswag", "--tokens", "512"], "--tokens does not go with --harness"),
        (["--harness", "lm-eval", "--tasks", "hellaswag", "--samples", "24"], "--samples does not go with --harness"),
        (["--harness", "lm-eval", "--tasks", "hellaswag", "--corpus", "pydoc"], "--corpus does not go with --harness"),
        (["--harness", "helm", "--tasks", "hellaswag"], "--harness 'helm': want lm-eval"),
        (["--limit", "3"], "--limit needs --harness lm-eval"),
        (["--num-fewshot", "0"], "--num-fewshot needs --harness lm-eval"),
        (["--include", "."], "--include needs --harness lm-eval"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], says: str) -> None:
    """Said before a model is loaded: there is none of this name."""
    ran = run.invoke(app, ["eval", "model", "--model", "no-such-model", *options])
    assert ran.exit_code == 1 and ran.stderr.startswith(f"error: {says}") and ran.stderr.count("\n") == 1


def test_without_lm_eval_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["eval", "model", "--model", "no-such-model", "--harness", "lm-eval", "--tasks", "hellaswag"]
    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    ran = run.invoke(app, asked)
    assert ran.exit_code == 1
    assert ran.stderr == "error: lm-eval is not installed: pip install 'sparsekit-attention[eval]'\n"

    def broken(_: str) -> ModuleType:
        raise ImportError("No module named 'accelerate'")

    monkeypatch.setattr(harness, "find_spec", lambda _: object())
    monkeypatch.setattr(harness, "import_module", broken)
    assert "cannot be used (ImportError: No module named 'accelerate'): pip install" in run.invoke(app, asked).stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 8}, "batch_size = 8: must be 1; lm-eval pads larger batches without a mask"),
        ({"limit": 0}, "limit = 0: a whole number, at least 1"),
        ({"limit": 0.5}, "limit = 0.5: a whole number"),
        ({"num_fewshot": -1}, "num_fewshot = -1: a whole number, at least 0"),
        ({"configs": {}}, "0 configs"),
    ],
)
def test_what_cannot_be_asked(tiny_llama: PreTrainedModel, change: dict[str, Any], says: str) -> None:
    asked: dict[str, Any] = {"configs": {"model": None}, "tasks": ["hellaswag"], **change}
    with pytest.raises(SparsekitError, match=says):
        list(run_lm_eval(tiny_llama, None, **asked))  # type: ignore[arg-type]


def _known(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """lm-eval's index of names as it is, cut down; `mine` is in `folder`."""

    def entry(kind: str, cfg: dict[str, Any] | None = None, tags: set[str] | None = None, path: str = "/lm") -> Any:
        return SimpleNamespace(kind=SimpleNamespace(name=kind), cfg=cfg, tags=tags or set(), yaml_path=Path(path))

    index = {
        "arc_easy": entry("TASK", {"task": "arc_easy"}),
        "arc_challenge": entry("TASK", {"task": "arc_challenge"}),
        "ai2_arc": entry("TAG", tags={"arc_easy", "arc_challenge"}),
        "mmlu": entry("GROUP", {"task": ["stem"], "aggregate_metric_list": [{"metric": "acc"}]}),
        "both": entry("GROUP", {"task": ["ai2_arc", "mmlu"]}),
        "openllm": entry("GROUP", {"task": [{"task": "arc_challenge", "num_fewshot": 25}, "mmlu"]}),
        "mine": entry("TASK", {"task": "mine", "doc_to_text": "{{q}}"}, path=str(folder / "mine.yaml")),
    }
    module = ModuleType("lm_eval.tasks")
    module.TaskManager = lambda include_path: SimpleNamespace(task_index=index, all_tasks=sorted(index))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", module)
    monkeypatch.setattr(harness, "_import_lm_eval", lambda: None)


def test_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _known(monkeypatch, tmp_path)
    assert LmEvalTasks(["ai2_arc", "arc_easy", "mmlu"]).names == ["arc_challenge", "arc_easy", "mmlu"]
    assert LmEvalTasks(["both"]).names == ["arc_challenge", "arc_easy", "mmlu"]
    for names, says in (
        (["arc_esay"], "task 'arc_esay': lm-eval has none. Did you mean 'arc_easy'?"),
        (["openllm"], "task 'openllm': a group without a score of its own.*name them: arc_challenge, mmlu"),
        ([], "tasks: at least one"),
    ):
        with pytest.raises(SparsekitError, match=says):
            LmEvalTasks(names)
    with pytest.raises(SparsekitError, match="include 'nowhere': no such folder"):
        LmEvalTasks(["mmlu"], "nowhere")
    own = LmEvalTasks(["mine"], tmp_path)
    said, read = own.definition("mine")
    assert said == {"task": "mine", "doc_to_text": "{{q}}"} and read is None and own.definition("mmlu") is None
    seen = {read}
    (tmp_path / "data.json").write_text("1")
    said["dataset_kwargs"] = {"data_files": {"test": [str(tmp_path / "data.json")]}, "cache_dir": str(tmp_path)}
    for data, code in (("1", ""), ("2", ""), ("2", "def f(): ..."), ("2", "def f(): pass")):
        (tmp_path / "data.json").write_text(data)
        (tmp_path / "code.py").write_text(code)
        seen.add(own.definition("mine")[1])
    assert len(seen) == 5


def _results(
    metrics: dict[str, Any], values: list[dict[str, Any]], *, rises: dict[str, bool], listed: list[str], filtered: str
) -> dict[str, Any]:
    """As `lm_eval.evaluator.evaluate` gives them, of one task `door`; keys that nobody reads are left out."""
    samples = [
        {"doc_id": n, "filter": filtered, "filtered_resps": [("red", "blue")[n % 2]], "metrics": list(value), **value}
        for n, value in enumerate(values)
    ]
    return {
        "results": {"door": {"name": "door", "alias": "door", "sample_len": len(values), **metrics}},
        "group_subtasks": {},
        "configs": {"door": {"task": "door", "metric_list": [{"metric": name} for name in listed]}},
        "versions": {"door": 1.0},
        "n-shot": {"door": 0},
        "higher_is_better": {"door": rises},
        "n-samples": {"door": {"original": 4, "effective": len(values)}},
        "samples": {"door": samples},
    }


def test_a_score_with_its_interval() -> None:
    said = {"acc,none": 0.75, "acc_stderr,none": 0.25, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.2886751}
    values = [{"acc": float(n > 0), "acc_norm": float(n > 1)} for n in range(4)]
    rises = {"acc": True, "acc_norm": True}
    results = _results(said, values, rises=rises, listed=["acc_norm", "acc"], filtered="none")
    found = lm_eval_scores.scores_of(results, "door")
    assert (found["metric"], found["score"], found["samples"]) == ("acc_norm", 0.5, 4)
    assert found["scores"] == [0, 0, 1, 1]
    assert found["score_low"] == 0 and found["score_high"] == 1  # 0.5 +- 0.566, of a share
    assert found["metrics"]["acc"] == {"value": 0.75, "stderr": 0.25, "higher_is_better": True}
    results["results"]["door"]["acc_norm_stderr,none"] = 0.1
    found = lm_eval_scores.scores_of(results, "door")
    assert found["score_low"] == pytest.approx(0.5 - Z95 * 0.1) and found["score_high"] == pytest.approx(
        0.5 + Z95 * 0.1
    )
    results["results"]["door"]["acc_norm_stderr,none"] = "N/A"  # a single document
    assert lm_eval_scores.scores_of(results, "door")["score_low"] is None


def test_filters_and_texts() -> None:
    said = {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.5, "exact_match,flexible": 1.0}
    values = [{"exact_match": 1.0}, {"exact_match": 0.0}]
    results = _results(said, values, rises={"exact_match": True}, listed=["exact_match"], filtered="strict")
    results["samples"]["door"] += [{**sample, "filter": "flexible"} for sample in results["samples"]["door"]]
    found = lm_eval_scores.scores_of(results, "door")
    assert (found["metric"], found["score"], found["scores"]) == ("exact_match,strict", 0.5, [1, 0])
    assert found["texts"] == ["red", "blue"] and list(found["metrics"]) == [
        "exact_match,strict",
        "exact_match,flexible",
    ]


@pytest.mark.parametrize(
    ("metric", "stderr", "expected"),
    [
        ("word_perplexity", "N/A", ("1/word_perplexity", 0.125, None, None)),
        ("perplexity", 1.0, ("1/perplexity", 0.125, 1 / (8 + Z95), 1 / (8 - Z95))),
        ("perplexity", 5.0, ("1/perplexity", 0.125, 1 / (8 + 5 * Z95), 1.0)),
        ("brier_score", 1.0, ("-brier_score", -8, -8 - Z95, -8 + Z95)),
        ("bits_per_byte", "N/A", ("-bits_per_byte", -8, None, None)),
    ],
)
def test_a_score_grows_with_quality(metric: str, stderr: Any, expected: tuple[Any, ...]) -> None:
    said = {f"{metric},none": 8.0, f"{metric}_stderr,none": stderr}
    values = [{metric: (-177.0, 370)}] * 2
    found = lm_eval_scores.scores_of(
        _results(said, values, rises={metric: False}, listed=[metric], filtered="none"), "door"
    )
    assert tuple(found[name] for name in ("metric", "score", "score_low", "score_high")) == pytest.approx(expected)
    assert found["metrics"][metric]["value"] == 8 and found["scores"] == []


def test_a_group_has_a_score_of_its_tasks() -> None:
    said = {"acc,none": 0.5, "acc_stderr,none": 0.5}
    one = _results(said, [{"acc": 1.0}, {"acc": 0.0}], rises={"acc": True}, listed=["acc"], filtered="none")
    one["results"]["window"] = {**one["results"]["door"], "name": "window", "exact_match,none": 1.0}
    one["samples"]["window"] = one["samples"]["door"]
    one["higher_is_better"]["house"] = {"acc": True}
    one["group_subtasks"] = {"house": ["inner", "door"], "inner": ["window", "door"]}
    one["results"]["house"] = {"alias": "house", "sample_len": 9, "acc,none": 0.5, "sample_count": {"acc,none": 4}}
    found = lm_eval_scores.scores_of(one, "house")
    assert (found["metric"], found["score"], found["samples"], found["scores"]) == ("acc", 0.5, 4, [1, 0, 1, 0])
    assert list(found["subtasks"]) == ["window", "door"] and found["subtasks"]["window"]["exact_match"]["value"] == 1
    one["results"]["house"] = {"alias": "house", "sample_len": 9, "acc,none": float("nan")}
    with pytest.raises(SparsekitError, match="task 'house': lm-eval gives no number"):
        lm_eval_scores.scores_of(one, "house")


def test_one_file_for_both_kinds_of_tasks(tmp_path: Path) -> None:
    """A record without a key, and one that was not finished, are no obstacle; what is not a record is."""
    out = tmp_path / "out.jsonl"
    both: dict[str, Any] = {"model": "m", "tokens": 8, "seed": 0, "score": 1.0, "density": 1.0, "config": None}
    own = {"label": "model", "task": "passkey", **both}
    theirs = {"key": "a", "label": "model", "harness": "lm-eval", "task": "door", **both}
    out.write_text(f'{json.dumps(own)}\n{json.dumps(theirs)}\n{{"key": "b", "la')
    with ResultFile(out, shared=True).writing() as known:
        assert known == {"a": theirs}
    assert out.read_text() == f"{json.dumps(own)}\n{json.dumps(theirs)}\n"
    assert records_kept(out) == f"{json.dumps(theirs)}\n" and records_kept(tmp_path / "none.jsonl") == ""
    out.write_text("layers: dense\n")
    with pytest.raises(SparsekitError, match="line 1: no record"), ResultFile(out, shared=True).writing():
        pass
    assert out.read_text() == "layers: dense\n" and records_kept(out) == ""


# ---- with lm-eval


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks on four documents of 470 tokens, each with a fact in its middle."""
    folder = tmp_path_factory.mktemp("doors")
    noise = "The grass is green. The sky is blue. The sun is yellow. " * 15
    colours = ["red", "blue", "green", "black"]
    rows = [
        {"text": f"{noise}The colour of door {n} is {colour}. {noise}The colour of door {n} is", "answer": n}
        for n, colour in enumerate(colours)
    ]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    both = {
        "tag": "doors",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "rows.json")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    choose = {
        "task": "door_choose",
        "output_type": "multiple_choice",
        "doc_to_choice": colours,
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    say = {
        "task": "door_say",
        "output_type": "generate_until",
        "doc_to_target": f"{{{{{colours}[answer]}}}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 4, "do_sample": False},
        "filter_list": [
            {
                "name": "word",
                "filter": [{"function": "regex", "regex_pattern": "([a-z]+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choose, say):
        (folder / f"{task['task']}.yaml").write_text(json.dumps({**both, **task}))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def tasks(doors: Path) -> LmEvalTasks:
    pytest.importorskip("lm_eval.models.huggingface", reason=WITHOUT)
    return LmEvalTasks(["doors"], doors)


def _rows(doors: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (doors / "rows.json").read_text().splitlines()]


@torch.inference_mode()
def _right(smollm2: Smol, doors: Path) -> list[float]:
    """Of each document whether the model, as it is now, holds the right colour for the likeliest."""
    model, tokenizer = smollm2
    colours = [tokenizer(f" {c}")["input_ids"] for c in ("red", "blue", "green", "black")]
    assert all(len(ids) == 1 for ids in colours)
    said = [model(tokenizer(row["text"], return_tensors="pt")["input_ids"]).logits[0, -1] for row in _rows(doors)]
    best = [max(range(4), key=lambda n: float(logits[colours[n][0]])) for logits in said]
    return [float(n == row["answer"]) for n, row in zip(best, _rows(doors), strict=True)]


@pytest.mark.slow
def test_tasks_of_ones_own_on_a_real_model(smollm2: Smol, tasks: LmEvalTasks, doors: Path, tmp_path: Path) -> None:
    """Scores are those of the patched model, dense and `model` are one run, and nothing stays on the model."""
    model, out = smollm2[0], tmp_path / "out.jsonl"
    before = model.config._attn_implementation
    configs: dict[str, Any] = {"model": None, "dense": {"version": 1}, "streaming": STREAMING}
    rows = list(run_lm_eval(*smollm2, configs, tasks=tasks, output=out, name="smollm2-135m", command="x"))
    assert [(row["task"], row["label"]) for row in rows] == [
        (task, label) for task in ("door_choose", "door_say") for label in configs
    ]
    assert model.config._attn_implementation == before and not model._forward_hooks and not model._forward_pre_hooks
    own, dense, streaming = rows[:3]
    assert own["metric"] == "acc" and own["scores"] == _right(smollm2, doors)
    with sparsekit.apply(model, STREAMING):
        assert streaming["scores"] == _right(smollm2, doors)
    assert own["score"] == 1 > streaming["score"]  # the fact is far behind the window
    assert streaming["score_low"] <= streaming["score"] <= streaming["score_high"]
    assert rows[3]["metric"] == "exact_match,word" and rows[3]["texts"] == ["red", "blue", "green", "black"]
    assert rows[3]["score"] == 1 > rows[5]["score"]
    for own, dense, streaming in (rows[:3], rows[3:]):
        assert {**dense, "label": "model"} == own and own["config"] is None and own["config_key"] == "dense"
        assert own["density"] == 1 > 0.3 > streaming["density"] > 0
        assert (own["sparse_prompts"], streaming["sparse_prompts"]) == (0, 1)
        assert own["tokens"] == max(own["prompt_tokens"]) == streaming["tokens"] > 400
        assert streaming["resolved"][0]["patterns"][0]["window_tokens"] == 32
        assert own["samples"] == 4 and own["versions"]["lm_eval"] and own["num_fewshot"] == 0
    assert not ran_dense(rows) and "exact_match,word" in table(rows)[1][-1]
    high = {**STREAMING, "dense_below_tokens": 4096}
    [short] = run_lm_eval(*smollm2, {"high": high}, tasks=["door_say"], include=doors, limit=1, name="smollm2-135m")
    assert short["samples"] == 1 and short["score"] == 1 and short["sparse_prompts"] == 0
    assert ran_dense([short]) == [
        f"door_say, high: no prompt ran sparse; the longest has {short['tokens']} tokens, dense_below_tokens is 4096."
    ]

    lines = out.read_text().splitlines(keepends=True)
    assert len(lines) == 4 and len(report_data(read_results([out])[0])["records"]) == 4
    out.write_text("".join(lines[:3]) + lines[3][:50])  # killed while it wrote
    again = list(run_lm_eval(*smollm2, configs, tasks=tasks, output=out, name="smollm2-135m"))
    assert again[:5] == rows[:5] and again[5]["time"] >= rows[5]["time"]
    assert out.read_text().splitlines(keepends=True)[:3] == lines[:3] and len(out.read_text().splitlines()) == 4


@pytest.mark.parametrize(("least", "why"), [(4096, "dense_below_tokens is 4096"), (64, "of which every pair was kept")])
def test_a_score_that_is_dense_attentions_is_remarked(least: int, why: str) -> None:
    record = {"task": "door", "label": "t", "tokens": 200, "config_key": "1", "sparse_prompts": 0.0}
    said = ran_dense([{**record, "config": {"dense_below_tokens": least}}, {**record, "sparse_prompts": 0.5}])
    assert said == [f"door, t: no prompt ran sparse; the longest has 200 tokens, {why}."]


def test_another_task_of_the_same_name_is_another_run(smollm2: Smol, tasks: LmEvalTasks) -> None:
    asker = harness._Harness(*smollm2, tasks, "smollm2-135m")
    with pytest.raises(SparsekitError, match="include 'here': goes with names"):
        list(run_lm_eval(*smollm2, {"model": None}, tasks=tasks, include="here"))
    asked: dict[str, Any] = {"task": "door_say", "seed": 0, "limit": None, "num_fewshot": None}
    keys = {asker.key(None, asked), asker.key(None, {**asked, "limit": 1}), asker.key(sparsekit.load(STREAMING), asked)}
    entry = tasks.manager.task_index["door_say"]
    text = entry.cfg["doc_to_text"]
    try:
        entry.cfg["doc_to_text"] = "{{text}} the"
        keys.add(asker.key(None, asked))
    finally:
        entry.cfg["doc_to_text"] = text
    assert len(keys) == 4


@pytest.mark.slow
def test_the_command(
    smollm2: Smol, tasks: LmEvalTasks, doors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside our tasks in one file, in either order; what lm-eval prints is not on stdout."""
    monkeypatch.setattr(models, "load", lambda *_, **__: smollm2)
    out, config = tmp_path / "out.jsonl", tmp_path / "streaming.yaml"
    config.write_text(json.dumps(STREAMING))
    given = ["eval", "model", str(config), "--model", "smollm2-135m", "-o", str(out), "--json"]
    theirs = ["--harness", "lm-eval", "--tasks", "door_choose", "--include", str(doors), "--limit", "1"]
    ours = ["--tasks", "passkey", "--tokens", "300", "--samples", "1"]
    assert run.invoke(app, [*given, *ours]).exit_code == 0
    ran = run.invoke(app, [*given, *theirs])
    assert ran.exit_code == 0, ran.stderr
    rows = json.loads(ran.stdout)
    assert [row["task"] for row in read_results([out])[0]] == ["passkey"] * 2 + ["door_choose"] * 2
    assert [json.loads(line) for line in out.read_text().splitlines()[2:]] == rows and rows[0]["limit"] == 1
    assert run.invoke(app, [*given, *ours]).exit_code == 0
    assert [row["task"] for row in read_results([out])[0]] == ["door_choose"] * 2 + ["passkey"] * 2
    unknown = run.invoke(app, [*given, *theirs[:3], "door_chose", *theirs[4:]])
    assert unknown.exit_code == 1 and "Did you mean 'door_choose'?" in unknown.stderr


@pytest.mark.slow
def test_a_task_that_cannot_be_run_is_one_line(smollm2: Smol, tasks: LmEvalTasks, doors: Path, tmp_path: Path) -> None:
    text = (doors / "door_say.yaml").read_text()
    broken = json.loads(text) | {"task": "door_lost", "doc_to_text": "{{text.nothing.there}}"}
    (tmp_path / "lost.yaml").write_text(json.dumps(broken))
    with pytest.raises(SparsekitError, match=r"^task 'door_lost', by lm-eval: UndefinedError: "):
        list(run_lm_eval(*smollm2, {"streaming": STREAMING}, tasks=["door_lost"], include=tmp_path))
    assert not smollm2[0]._forward_hooks
