"""Sweeps: the grid of a question, runs that survive any kill, failures, executors, and the choice among configs."""

from __future__ import annotations

import doctest
import errno
import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from soon import soon
from typer.testing import CliRunner

from sparsekit import SparsekitError, load, models
from sparsekit.cli import app
from sparsekit.lab import journal
from sparsekit.lab.sweep import Question, Run, best, execute, load_question, read_results, results, run_sweep
from sparsekit.lab.sweep import question as question_module
from sparsekit.lab.sweep.best import standings
from sparsekit.lab.sweep.runs import config_key
from sparsekit.models import EMBEDDED
from sparsekit.patterns import DynamicPattern, pattern_names

if TYPE_CHECKING:  # workers import this file
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
BASE = {"layers": {"2-3": {"name": "triangle", "window_tokens": 64}}}
QUESTION: dict[str, Any] = {
    "question": "How wide a window?",
    "model": "smollm2-135m",
    "base": BASE,
    "tasks": ["passkey", "needle4"],
    "lengths": [512, 1024],
    "samples": 2,
    "seeds": [0, 1],
    "axes": {"layers.2-3.window_tokens": [64, 128], "layers.2-3.sink_tokens": [0, 8]},
}


def asked(**changes: Any) -> dict[str, Any]:
    return {**QUESTION, **changes}


# ---- the grid


def test_every_combination_once_dense_first() -> None:
    runs = load_question(QUESTION).runs()
    assert len(runs) == 2 * 2 * 2 * (1 + 4) == len({run.key for run in runs})
    assert [run.label for run in runs[:5]] == [
        "dense",
        "window_tokens=64, sink_tokens=0",
        "window_tokens=64, sink_tokens=8",
        "window_tokens=128, sink_tokens=0",
        "window_tokens=128, sink_tokens=8",
    ]
    assert runs[0].config is None
    config = runs[4].config
    assert config is not None
    assert config.layers["2-3"].model_dump()["window_tokens"] == 128
    assert [run.task for run in runs[:21:20]] == ["passkey", "needle4"]
    assert {(run.tokens, run.seed) for run in runs} == {(512, 0), (512, 1), (1024, 0), (1024, 1)}


def test_named_values_are_called_by_their_names() -> None:
    """Labels, constraints and records hold the name; two names of one config are one run."""
    some = {"0": {"0-2": "triangle"}, "1": {"4": "dense"}}
    axes = {
        "by_head": {"path": "heads", "values": {"none": {}, "some": some, "alike": some}},
        "default": ["dense", "a_shape"],
    }
    question = load_question(
        asked(base={"default": "dense"}, axes=axes, constraints=["by_head == 'none' or default == 'dense'"])
    )
    runs = question.runs(where="task == 'passkey' and tokens == 512 and seed == 0")
    assert [run.label for run in runs] == ["dense", "by_head=none, default=a_shape", "by_head=some, default=dense"]
    assert runs[2].identity()["axes"] == {"by_head": "some", "default": "dense"}
    assert runs[2].config is not None and list(runs[2].config.heads) == ["0", "1"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"": {}, "some": {"0": {"0": "triangle"}}}, "axes.by_head: the name of a value must be a string; got ''."),
        ({1: {}}, "axes.by_head: the name of a value must be a string; got 1."),
        ({"some": {"0": {"0": "triangel"}}}, "axes: by_head=some: .*triangel"),
        ({"lo": 1, "high": 2}, "axes.by_head: .*lo"),
    ],
)
def test_named_values_that_cannot_be(values: Any, message: str) -> None:
    with pytest.raises(SparsekitError, match=message):
        load_question(asked(axes={"by_head": {"path": "heads", "values": values}})).runs()


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({"default": ["dense", {"name": "a_shape", "window_tokens": 32}]}, ["dense", "a_shape"]),
        ({"default.window_tokens": [32, 64]}, ["a_shape", "a_shape"]),
        ({"dense_below_tokens": [0, 2048]}, ["a_shape", "a_shape"]),
        ({"layers": [{}, {"0-1": "triangle"}]}, ["a_shape", "a_shape"]),
        ({"layers.2-3": ["triangle", None]}, ["a_shape", "a_shape"]),
        ({"heads.0.0-1.last_tokens": [16, 32]}, ["a_shape", "a_shape"]),
        ({"layers.1.of.0.window_tokens": [16, 32]}, ["a_shape", "a_shape"]),
    ],
)
def test_axes_reach_every_field(axes: dict[str, Any], expected: list[str]) -> None:
    base = {
        "default": "a_shape",
        "layers": {"2-3": "triangle", "1": {"name": "union", "of": ["a_shape", "triangle"]}},
        "heads": {"0": {"0-1": "triangle"}},
    }
    runs = load_question(asked(base=base, axes=axes, tasks="passkey", lengths=512, seeds=0)).runs()
    configs = [run.config for run in runs if run.config is not None]
    assert [config.default.name for config in configs] == expected
    assert len({config_key(config) for config in configs}) == 2
    for config, value in zip(configs, next(iter(axes.values())), strict=True):
        said: Any = config.model_dump(mode="json", serialize_as_any=True)
        for part in next(iter(axes)).split("."):
            said = None if said is None else said[int(part)] if isinstance(said, list) else said.get(part)
        if isinstance(value, int):
            assert said == value
        elif value is None:
            assert said is None


def test_ranges_move_a_rule_after_its_fields_are_set() -> None:
    axes = {
        "start": {"path": "ranges.2-3", "values": ["0-3", "2-3", None]},
        "layers.2-3.window_tokens": [64, 128],
    }
    runs = load_question(asked(axes=axes, tasks="passkey", lengths=512, seeds=0)).runs()
    assert [run.label for run in runs[1:]] == [
        f"start={a}, window_tokens={w}" for a in ("0-3", "2-3") for w in (64, 128)
    ]
    found = [list(run.config.layers.items()) for run in runs if run.config is not None]
    assert [(rules[0][0], rules[0][1].model_dump()["window_tokens"]) for rules in found] == [
        ("0-3", 64), ("0-3", 128), ("2-3", 64), ("2-3", 128)
    ]  # fmt: skip


def test_constraints_leave_runs_out() -> None:
    rules = ["window_tokens * 4 < tokens or sink_tokens == 0", "not (task == 'passkey' and seed in [1])"]
    runs = load_question(asked(constraints=rules, lengths=[512, 1024])).runs()
    assert {(run.task, run.seed) for run in runs if run.label != "dense"} == {
        ("passkey", 0), ("needle4", 0), ("needle4", 1)
    }  # fmt: skip
    for run in runs:
        assert not run.axes or run.axes["window_tokens"] * 4 < run.tokens or run.axes["sink_tokens"] == 0
    kinds = {"kind": {"path": "default", "values": ["dense", "triangle", {"name": "a_shape", "window_tokens": 9}]}}
    runs = load_question(asked(axes=kinds, constraints=["kind != 'a_shape'"])).runs()
    assert {run.label for run in runs} == {"dense", "kind=dense", "kind=triangle"}


def test_equal_work_has_one_key_and_other_work_another() -> None:
    [first, *_], again = load_question(QUESTION).runs(), load_question(json.loads(json.dumps(QUESTION))).runs()
    assert first.key == again[0].key
    assert [run.key for run in again] == [run.key for run in load_question(QUESTION).runs()]
    spelled = [
        {"layers": {"0-1": "triangle"}},
        {"layers": {"0,1": {"name": "triangle", "window_tokens": 512}}, "dense_below_tokens": 0},
    ]
    assert len({config_key(load(config)) for config in spelled}) == 1
    assert config_key(load({"layers": {"0-1": "dense"}})) == config_key(None) == "dense"
    assert config_key(load({"dense_impl": "kernel"})) != "dense"
    keys = {first.key}
    for change in ({"samples": 3}, {"dtype": "float32"}, {"model": "other"}):
        keys.add(load_question(asked(**change)).runs()[0].key)
    keys.add(load_question(QUESTION).runs(device="cuda:1")[0].key)
    assert len(keys) == 5
    assert load_question(QUESTION).runs(device="cuda:0")[0].key in keys


def test_a_corpus_counts_by_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three")
    question = load_question(asked(tasks=["passkey", "perplexity"], corpus=str(tmp_path)))
    runs = {run.task: run for run in question.runs()}
    assert runs["passkey"].corpus is None
    assert runs["perplexity"].corpus == str(tmp_path)
    (tmp_path / "a.txt").write_text("one two four")
    changed = {run.task: run for run in question.runs()}
    assert changed["passkey"].key == runs["passkey"].key
    assert changed["perplexity"].key != runs["perplexity"].key


BAD: list[tuple[dict[str, Any], str]] = [
    ({"axes": {"layers.2-3.window_token": [1]}}, r"triangle has no field 'window_token'.*mean 'window_tokens'\?"),
    ({"axes": {"layers.2-4.window_tokens": [1]}}, r"no rule '2-4' under `layers`; it has 2-3\. Did you mean '2-3'\?"),
    ({"axes": {"ranges.2-4": ["0-3"]}}, r"no rule '2-4' .* Did you mean '2-3'\?"),
    ({"axes": {"defualt": ["triangle"]}}, r"unknown field 'defualt': .* Did you mean 'default'\?"),
    ({"axes": {"dense_impl.x": [1]}}, "'dense_impl' has no fields of its own"),
    ({"axes": {"precision.2-3": ["fp8"]}}, "'precision' has no fields of its own"),
    ({"axes": {"layers.2-3.sink_tokens.0": [1]}}, "triangle has no field 'sink_tokens.0'"),
    ({"axes": {"layers.2-3": ["triangle"], "layers.2-3.sink_tokens": [0]}}, "two values for one key: 'layers.2-3' and"),
    ({"axes": {"layers": [{}], "ranges.2-3": ["0-3"]}}, "two values for one key"),
    ({"axes": {"a": {"path": "default", "values": ["dense"]}, "default": ["triangle"]}}, "two values for one key"),
    ({"axes": {"layers.2-3.sink_tokens": []}}, "empty grid: an axis needs at least one value"),
    ({"axes": {"layers.2-3.sink_tokens": [8, 8]}}, "8 is listed twice"),
    ({"axes": {"layers.2-3.sink_tokens": 8}}, "= 8: a list of values is needed"),
    ({"axes": {"lengths": [8]}}, "write `lengths` beside `axes`"),
    ({"axes": {"w": {"values": [1]}}}, "{path: ..., values: "),
    ({"tasks": []}, "tasks: empty grid"),
    ({"lengths": [512, 512]}, "lengths: 512 is listed twice"),
    ({"lengths": [0]}, r"lengths\.0 = 0: it should be greater than or equal to 1"),
    ({"question": None}, "question = None"),
    ({"task": "passkey"}, r"unknown field 'task' .* Did you mean 'tasks'\?"),
    ({"base": "nowhere.yaml"}, "config 'nowhere.yaml': no such file"),
    ({"base": {"default": "trianlge"}}, r"Did you mean 'triangle'\?"),
]  # fmt: skip
BAD_RUNS: list[tuple[dict[str, Any], str]] = [
    ({"tasks": ["passky"]}, r"unknown task 'passky'.*Did you mean 'passkey'\?"),
    ({"axes": {"layers.2-3.window_tokens": [0]}}, "axes: window_tokens=0: .*window_tokens = 0"),
    ({"axes": {}, "base": {}}, "empty grid: nothing differs from dense"),
    ({"constraints": ["tokens > 9999"]}, "empty grid: no combination fulfils the constraints"),
    ({"constraints": ["window > 3"]}, r"unknown name 'window': one of .* Did you mean 'window_tokens'\?"),
    ({"constraints": ["window_tokens >"]}, "is not a valid expression; for example"),
    ({"constraints": ["task > 3"]}, "not supported between"),
    ({"constraints": ["tokens / 0 > 3"]}, r"'tokens / 0 > 3': division by zero\."),
    ({"constraints": ["open('x')"]}, "only comparisons and arithmetic"),
    ({"constraints": ["task.upper == 3"]}, "only comparisons and arithmetic"),
    ({"corpus": "/nowhere"}, "no such folder"),
    ({"tasks": ["passkey", "perplexity"]}, "tasks: perplexity reads a text: write `corpus: FOLDER`"),
]


WIDTH = "layers.2-3.window_tokens"
MANY_VALUES = {WIDTH: list(range(1, 900)), "layers.2-3.sink_tokens": list(range(900))}
LARGE: list[tuple[dict[str, Any], str]] = [
    ({"axes": MANY_VALUES, "seeds": list(range(900))}, "axes: .* combinations of axes, models, tasks"),
    ({"axes": {WIDTH: list(range(1, 5000))}}, "4,999 values; an axis has at most 1,000"),
    ({"seeds": list(range(100_000))}, "seeds: 100,000 are listed; at most 1,000"),
    ({"axes": {WIDTH: list(range(1, 1000))}, "seeds": list(range(12))}, "axes: .* runs; at most 10,000"),
    ({"seeds": [10**30]}, "seeds.0 = 1000.*less than"),
    ({"lengths": [10**30]}, "lengths.0 = 1000.*less than"),
    ({"samples": 10**30}, "samples = 1000.*less than"),
    ({"constraints": ["'a' * 999999999 == task"]}, "arithmetic is for numbers, not 'a' and 999999999"),
    ({"constraints": ["'%9999999999d' % 1 == task"]}, "arithmetic is for numbers"),
    ({"constraints": ["[1] * 999999999 == task"]}, "arithmetic is for numbers"),
    ({"constraints": ["not " * 1000 + "1"]}, "is longer than 500 characters"),
    ({"axes": {"w" * 5000: [1]}}, "unknown field 'w+\\.\\.\\.w+'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "says"), LARGE)
def test_a_sweep_is_bounded_before_it_is_expanded(change: dict[str, Any], says: str) -> None:
    def refused() -> str:
        with pytest.raises(SparsekitError, match=says) as error:
            load_question(asked(**change)).runs()
        return str(error.value)

    assert len(soon(refused, 2)) < 800


def test_constraints_come_before_configs() -> None:
    """A combination that is no config is no error where a constraint leaves it out."""
    axes = {"layers.2-3.window_tokens": [0, 64]}
    runs = load_question(asked(axes=axes, constraints=["window_tokens > 0"])).runs()
    assert {run.label for run in runs} == {"dense", "window_tokens=64"}


@pytest.mark.parametrize(("change", "says"), BAD)
def test_a_wrong_question_is_told_in_one_line(change: dict[str, Any], says: str) -> None:
    with pytest.raises(SparsekitError, match=says) as error:
        load_question(asked(**change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("change", "says"), BAD_RUNS)
def test_a_wrong_grid_is_told_in_one_line(change: dict[str, Any], says: str) -> None:
    with pytest.raises(SparsekitError, match=says) as error:
        load_question(asked(**change)).runs()
    assert "\n" not in str(error.value)


def test_files_are_read_with_their_base_beside_them(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text('layers: {"2-3": triangle}\n')
    (tmp_path / "q.yaml").write_text(
        "question: q\nmodel: m\nbase: base.yaml\ntasks: passkey\nlengths: 512\naxes: {layers.2-3.sink_tokens: [1]}\n"
    )
    assert load_question(tmp_path / "q.yaml").base.layers["2-3"].name == "triangle"
    with pytest.raises(SparsekitError, match=r"no such file\. Did you mean"):
        load_question(tmp_path / "p.yaml")
    (tmp_path / "q.yaml").write_text("question: q\nquestion: p\n")
    with pytest.raises(SparsekitError, match="'question' is written twice"):
        load_question(tmp_path / "q.yaml")
    (tmp_path / "q.yaml").write_text("- 1\n")
    with pytest.raises(SparsekitError, match="a mapping is needed"):
        load_question(tmp_path / "q.yaml")


# ---- running


def fake(device: str) -> Callable[[Run], Mapping[str, Any]]:
    """A run that knows its answer at once."""
    return lambda run: {"score": run.tokens / 2048, "density": 0.5, "config": None, "ttft_s": 1.0, "at": device}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_not_finite_fails_and_leaves_a_file_that_can_be_read(tmp_path: Path) -> None:
    def broken(device: str) -> Callable[[Run], Mapping[str, Any]]:
        return lambda run: {**fake(device)(run), "kl": float("nan")}

    summary = run_sweep(QUESTION, tmp_path / "r.jsonl", maker=broken, quiet=True)
    assert len(summary.failed) == 40 and summary.failed[0]["error"] == "no measurement: kl = nan"
    assert len(read_results([tmp_path / "r.jsonl"])[0]) == 40


def test_again_nothing_is_left_to_do(tmp_path: Path) -> None:
    out = tmp_path / "new" / "r.jsonl"
    first = run_sweep(QUESTION, out, maker=fake, quiet=True)
    assert first.done == len(first.runs) == 40 and not first.failed
    before = out.read_bytes()
    again = run_sweep(QUESTION, out, maker=fake, quiet=True)
    assert again.done == 0 and out.read_bytes() == before
    assert [record["key"] for record in again.of_runs()] == [run.key for run in first.runs]
    more = run_sweep(asked(lengths=[512, 1024, 2048]), out, maker=fake, quiet=True)
    assert more.done == 20 and out.read_bytes().startswith(before)
    assert {row["question"] for row in lines(out)} == {"How wide a window?"}


MANY = asked(seeds=list(range(8)))  # 160 runs


def _sweep_in_child(out: Path, log: Path) -> None:
    """A sweep whose runs take 6 ms, each told in `log` when it begins, and whose records take as long to be written."""
    real = os.write

    def slowly(fd: int, data: bytes) -> int:
        time.sleep(0.001)
        return real(fd, data[:50])

    journal.os.write = slowly

    def maker(device: str) -> Callable[[Run], Mapping[str, Any]]:
        def run(run: Run) -> Mapping[str, Any]:
            with log.open("a") as file:
                print(run.key, file=file)
            time.sleep(0.006)
            return fake(device)(run)

        return run

    run_sweep(MANY, out, maker=maker, quiet=True)


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], bytes]:
    """Records of a file that may end in the middle of a line, and that end."""
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    return [json.loads(line) for line in data[:whole].splitlines()], data[whole:]


def _told(path: Path) -> dict[str, Any]:
    return {row["key"]: {k: v for k, v in row.items() if k != "run_s"} for row in lines(path)}


def test_killed_twenty_times_and_resumed(tmp_path: Path) -> None:
    """The same records as without a kill, none twice, no broken line; and nothing that was recorded is done again."""
    out, whole, log = tmp_path / "r.jsonl", tmp_path / "whole.jsonl", tmp_path / "log"
    expected = run_sweep(MANY, whole, maker=fake, quiet=True)
    context, rng, sizes, in_a_line = multiprocessing.get_context("fork"), random.Random(0), [], 0
    for attempt in range(20):
        had, _ = _whole_lines(out)
        log.write_text("")
        child = context.Process(target=_sweep_in_child, args=(out, log))
        child.start()
        # Every other one anywhere, while it starts too; the others while it is at work, however slow the machine.
        while attempt % 2 and not log.stat().st_size and child.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0.005, 0.08))
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL, "the sweep ended before the kill: give it more runs"
        now, rest = _whole_lines(out)
        assert now[: len(had)] == had
        assert not {row["key"] for row in had} & set(log.read_text().split())
        sizes.append(len(now))
        in_a_line += bool(rest)
    assert 0 < sizes[-1] < len(expected.runs) and len(set(sizes)) > 5 and in_a_line
    last = run_sweep(MANY, out, maker=fake, quiet=True)
    assert last.done == len(expected.runs) - sizes[-1]
    assert set(Counter(row["key"] for row in lines(out)).values()) == {1}
    assert _told(out) == _told(whole)


def test_cut_off_anywhere_in_a_line_and_resumed(tmp_path: Path) -> None:
    """What a power failure may leave: a file that ends anywhere. The cut run is done again, and no other."""
    out, rng = tmp_path / "r.jsonl", random.Random(0)
    run_sweep(QUESTION, out, maker=fake, quiet=True)
    whole, expected = out.read_bytes(), _told(out)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in [rng.randrange(len(whole)) for _ in range(20)] + ends[:2] + [ends[3] - 1, 1]:
        out.write_bytes(whole[:cut] + (b"\0" * 100 if cut % 3 == 0 else b""))  # room that was made, and not filled
        whole_but_for_its_end = cut % 3 and cut + 1 in ends
        kept = sum(end <= cut for end in ends) + bool(whole_but_for_its_end)
        assert run_sweep(QUESTION, out, maker=fake, quiet=True).done == 40 - kept
        assert out.read_bytes().startswith(whole[: ends[kept - 1] if kept else 0])
        assert len(lines(out)) == 40 and _told(out) == expected


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    with (
        results.ResultFile(out).writing(),
        pytest.raises(SparsekitError, match="being written by another process"),
    ):
        run_sweep(QUESTION, out, maker=fake, quiet=True)
    assert run_sweep(QUESTION, out, maker=fake, quiet=True).done == 40


def test_failures_are_recorded_and_retried_on_demand(tmp_path: Path) -> None:
    out, broken = tmp_path / "r.jsonl", True

    def maker(device: str) -> Callable[[Run], Mapping[str, Any]]:
        def run(run: Run) -> Mapping[str, Any]:
            if broken and run.task == "needle4" and run.label != "dense":
                raise RuntimeError("out of\n memory")
            return fake(device)(run)

        return run

    first = run_sweep(QUESTION, out, maker=maker, quiet=True)
    assert first.done == 40 and len(first.failed) == 16
    assert {record["error"] for record in first.failed} == {"RuntimeError: out of memory"}
    assert run_sweep(QUESTION, out, maker=maker, quiet=True).done == 0
    broken = False
    retried = run_sweep(QUESTION, out, maker=maker, quiet=True, retry_failed=True)
    assert retried.done == 16 and not retried.failed
    kept, _ = read_results([out])
    assert len(kept) == 40 and all(record["status"] == "ok" for record in kept)


def test_a_model_that_cannot_be_loaded_fails_its_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]
) -> None:
    small, real, tries = models.tiny("llama", vocab_size=49152), models.load, Counter[str]()

    def load_one(model: str, **options: Any) -> Any:
        tries[model] += 1
        return (small, smollm2[1]) if model == "smollm2-135m" else real(model, **options)

    monkeypatch.setattr(models, "load", load_one)
    question = asked(
        model=[str(tmp_path / "nowhere"), "smollm2-135m"], tasks="passkey", lengths=300, seeds=0, dtype="float32",
        axes={"layers.2-3.window_tokens": [64, 128]},
    )  # fmt: skip
    found = run_sweep(question, tmp_path / "r.jsonl", quiet=True)
    failed, done = found.of_runs()[:3], found.of_runs()[3:]
    assert [record["status"] for record in failed + done] == ["failed"] * 3 + ["ok"] * 3
    assert all("no such file or folder" in record["error"] for record in failed)
    assert set(tries.values()) == {1}
    assert [record["density"] < 1 for record in done] == [False, True, True]
    assert done[0]["kl"] == 0 and done[1]["kl"] > 0
    assert {"resolved", "versions", "device", "dtype", "peak_memory_bytes", "ttft_s_p80", "plan_ms"} <= done[1].keys()


@pytest.mark.parametrize("told_by", ["write", "fsync"])
def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_by: str) -> None:
    """The line that did not fit is taken back; what was done is kept; afterwards the rest is done.

    Some file systems find out only when what was written goes to the disk.
    """
    out, real, room = tmp_path / "r.jsonl", os.write, [3000]

    def write(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(fd, data[: room[0]])
        room[0] -= count
        return count

    def fsync(fd: int) -> None:
        if out.stat().st_size > 3000:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal.os, told_by, {"write": write, "fsync": fsync}[told_by])
    with pytest.raises(SparsekitError, match="No space left on device; make room") as error:
        run_sweep(QUESTION, out, maker=fake, quiet=True)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    kept = len(lines(out))
    assert 0 < kept < 40 and out.read_bytes().endswith(b"\n")
    assert run_sweep(QUESTION, out, maker=fake, quiet=True).done == 40 - kept


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_device(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").symlink_to("/dev/full")
    with pytest.raises(SparsekitError, match="No space left on device"):
        run_sweep(QUESTION, tmp_path / "r.jsonl", maker=fake, quiet=True)


def test_result_files_that_are_broken(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    run_sweep(QUESTION, out, maker=fake, quiet=True)
    whole = out.read_bytes()
    out.write_bytes(whole[:-20])
    records, remarks = read_results([out])
    assert len(records) == 39 and remarks == [f"{out}: the last line is unfinished, and left out."]
    assert out.read_bytes() == whole[:-20]  # reading changes nothing
    assert run_sweep(QUESTION, out, maker=fake, quiet=True).done == 1
    for text, says in (
        (b'{"task": "x"}\n' + whole, "line 1: no record"),
        (whole + b"oops\n" + whole, "line 41: no record"),
        (b"\xff\xfe\n", "line 1: no record"),
    ):
        out.write_bytes(text)
        for act in (lambda: read_results([out]), lambda: run_sweep(QUESTION, out, maker=fake, quiet=True)):
            with pytest.raises(SparsekitError, match=says):
                act()
        assert out.read_bytes() == text
    for text, says in (
        (b'{"task": "passkey", "tokens": 512}\n', r"line 1: no record .* \(without label, model, seed, score, density"),
        (whole + b"[1]\n", r"line 41: no record .* \(no JSON object\)"),
        (whole + whole.replace(b'"density": 0.5', b'"density": null'), r"line 41: no record .* \(density = None\)"),
        (b"[" * 9999 + b"\n", r"line 1: no record .* \(no JSON\)"),
        (whole.replace(b'"key": "', b'"key": ["x"], "was": "', 1), r"line 1: no record .* \(key = \['x'\]\)"),
        (whole.replace(b'"asked": "', b'"asked": {}, "was": "', 1), r"line 1: no record .* \(asked = \{\}\)"),
        (whole + whole.replace(b'"score"', b'"versions": [], "score"'), r"line 41: .*\(versions = \[\]\)"),
        (whole + whole.replace(b'"score"', b'"kl": Infinity, "score"'), r"line 41: .*\(kl = inf\)"),
        (whole + whole.replace(b'"density": 0.5', b'"density": NaN'), r"line 41: .*\(density = nan\)"),
        (re.sub(rb'"score": [0-9.]+', b'"score": -Infinity', whole, count=1), r"line 1: .*\(score = -inf\)"),
        *(
            (re.sub(rb'"tokens": \d+', b'"tokens": ' + n, whole, count=1), rf"line 1: .*\(tokens = {n.decode()}\)")
            for n in (b"0", b"-5", b"1.5")
        ),
    ):
        out.write_bytes(text)
        with pytest.raises(SparsekitError, match=says) as error:
            read_results([out])
        assert "\n" not in str(error.value) and str(out) in str(error.value)
    # A file of another kind that has no line's end is no unfinished line: nothing of it is removed.
    for text in (b'{"kind": "probe", "layers": []}', b"notes", b'{\n  "kind": "probe"\n}'):
        out.write_bytes(text)
        with pytest.raises(SparsekitError, match="line 1: no record"):
            run_sweep(QUESTION, out, maker=fake, quiet=True)
        assert out.read_bytes() == text
    evaluated = {"label": "a", "model": "m", "task": "passkey", "tokens": 512, "seed": 0}
    out.write_text(json.dumps({**evaluated, "score": 1.0, "density": 1, "config": None}) + '\n{"label": "a')
    before = out.read_bytes()
    with pytest.raises(SparsekitError, match="are of `sparsekit eval`"):
        run_sweep(QUESTION, out, maker=fake, quiet=True)
    assert out.read_bytes() == before
    out.write_text("")
    with pytest.raises(SparsekitError, match="no record in there"):
        read_results([out])
    with pytest.raises(SparsekitError, match="cannot be read"):
        read_results([tmp_path])
    with pytest.raises(SparsekitError, match="cannot be read: Is a directory"):
        run_sweep(QUESTION, tmp_path, maker=fake, quiet=True)


def dies_once(device: str) -> Callable[[Run], Mapping[str, Any]]:
    """A worker that is killed by its run at 1024 tokens under seed 1, dense."""

    def run(run: Run) -> Mapping[str, Any]:
        if (run.task, run.tokens, run.seed, run.label) == ("passkey", 1024, 1, "dense"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.03)
        return {"score": 1.0, "density": 1.0, "config": None, "at": device, "pid": os.getpid()}

    return run


def test_a_process_for_each_device(tmp_path: Path) -> None:
    question = asked(axes={"layers.2-3.window_tokens": [64, 128]})
    out = tmp_path / "r.jsonl"
    found = run_sweep(question, out, executor="processes", devices=["cuda:0", "cuda:1"], maker=dies_once, quiet=True)
    assert found.done == len(found.runs) == 24 == len(lines(out))
    [failed] = found.failed
    assert failed["error"].startswith("the worker on cuda:") and "exit code -9" in failed["error"]
    done = [record for record in found.of_runs() if record["status"] == "ok"]
    assert {record["at"] for record in done} == {"cuda:0", "cuda:1"}
    assert len({record["pid"] for record in done}) == 3
    assert os.getpid() not in {record["pid"] for record in done}
    with pytest.raises(SparsekitError, match="all of one kind"):
        run_sweep(question, out, devices=["cpu", "cuda:1"])
    with pytest.raises(SparsekitError, match=r"executor 'process'.*Did you mean 'processes'\?"):
        run_sweep(question, out, executor="process")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed; no cluster was asked")
def test_a_ray_cluster_with_a_worker_killed_in_the_middle(tmp_path: Path) -> None:
    """The same as with processes; afterwards the failed run is done by itself, and nothing else."""
    question, out = asked(axes={"layers.2-3.window_tokens": [64, 128]}), tmp_path / "r.jsonl"
    found = run_sweep(question, out, executor="ray", devices=["cpu", "cpu"], maker=dies_once, quiet=True)
    assert found.done == len(found.runs) == 24 == len(lines(out))
    [failed] = found.failed
    assert failed["error"].startswith("the worker on cpu died (") and failed["tokens"] == 1024
    pids = {record["pid"] for record in found.of_runs() if record["status"] == "ok"}
    assert len(pids) >= 2 and os.getpid() not in pids
    assert run_sweep(question, out, executor="ray", devices=["cpu"], maker=dies_once, quiet=True).done == 0
    with pytest.raises(SparsekitError, match=r"ray: 1 workers of 0\.5 GPU each, but the cluster has 0"):
        run_sweep(
            question, tmp_path / "s.jsonl", executor="ray", devices=["cuda"], gpus=0.5, maker=dies_once, quiet=True
        )
    again = run_sweep(question, out, executor="inline", maker=fake, quiet=True, retry_failed=True)
    assert again.done == 1 and not again.failed


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekit.lab.sweep.workers.find_spec", lambda name: None)
    with pytest.raises(SparsekitError, match=r"needs ray: pip install 'sparsekit-attention\[ray\]'"):
        run_sweep(QUESTION, tmp_path / "r.jsonl", executor="ray", quiet=True)


def test_progress_is_a_line_a_run_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sweep(asked(seeds=0, tasks="passkey"), tmp_path / "r.jsonl", maker=fake)
    shown = capsys.readouterr()
    assert shown.out == ""
    said = [line for line in shown.err.splitlines() if "/10 passkey" in line]
    assert len(said) == 10
    assert said[-1].startswith("10/10 passkey at 1024, window_tokens=128, sink_tokens=8: 0.500 (0 min left)")


# ---- the choice


def record(
    label: str, score: float, ttft: float, *, task: str = "passkey", kl: float = 0.0, **more: Any
) -> dict[str, Any]:
    config = None if label == "dense" else {"default": label}
    return {
        "status": "ok", "label": label, "config": config, "config_key": config_key(config and load(config)),
        "model": "m", "task": task, "tokens": 1, "seed": 0, "score": score, "ttft_s": ttft, "density": ttft, "kl": kl,
        **more,
    }  # fmt: skip


RECORDS = [
    record("dense", 0.9, 2.0), record("dense", 0.5, 1.0, task="needle4"),
    record("triangle", 0.9, 1.0, kl=0.001), record("triangle", 0.49, 0.8, task="needle4", kl=0.003),
    record("a_shape", 0.8, 0.5, kl=0.1), record("a_shape", 0.3, 0.3, task="needle4", kl=0.2),
    record("xattention", 1.0, 0.1),  # lacks needle4
    record("block_topk", 1.0, 0.1), record("block_topk", 1.0, 0.1, task="needle4", status="failed"),
]  # fmt: skip


def test_the_fastest_config_that_keeps_a_rule() -> None:
    assert [s.label for s in standings(RECORDS)] == ["dense", "triangle", "a_shape"]
    found = best(RECORDS, "score within 1% of dense")
    assert found.winner.label == "triangle" and found.winner.time == pytest.approx((0.5 + 0.8) / 2)
    assert found.winner.score == pytest.approx(0.695) and found.winner.dense_score == pytest.approx(0.7)
    assert best(RECORDS, "score within 0.2 of dense").winner.label == "a_shape"
    assert best(RECORDS, "score within 0.2 of dense and kl below 0.01").winner.label == "triangle"
    assert [s.label for s in best(RECORDS, "score within 30% of dense").keep] == ["a_shape", "triangle"]
    config = found.config()
    assert config.default.name == "triangle"
    assert config.provenance["sweep"]["rule"] == "score within 1% of dense"
    assert load(config.dump()) == config


@pytest.mark.parametrize(
    ("records", "rule", "says"),
    [
        (RECORDS, "score within 1 percent", "cannot be read; write `score within 1% of dense`"),
        (RECORDS, "kl below 0.0001", "no config keeps .* the best score is 0.695 .triangle., dense has 0.700"),
        (RECORDS[2:], "kl below 1", "no record of dense"),
        (RECORDS[:2], "kl below 1", "no config has a record for every task"),
        (
            [{k: v for k, v in r.items() if k != "ttft_s"} for r in RECORDS],
            "kl below 1",
            "no time to first token was measured",
        ),
    ],
)
def test_no_choice_is_told_in_one_line(records: list[dict[str, Any]], rule: str, says: str) -> None:
    with pytest.raises(SparsekitError, match=says):
        best(records, rule)


# ---- the command, shipped sweeps, the page


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def maker(device: str) -> Callable[[Run], Mapping[str, Any]]:
        def run(run: Run) -> Mapping[str, Any]:
            if run.config is None:
                return {"score": 0.9, "density": 1.0, "config": None, "ttft_s": 2.0, "kl": 0.0}
            sinks = run.axes["sink_tokens"]
            if sinks == 3:
                raise RuntimeError("out of memory")
            score = 0.9 if sinks == 8 else 0.5
            return {"score": score, "density": 0.5, "config": run.config.to_dict(), "ttft_s": 1.0 + sinks, "kl": 0.1}

        return run

    monkeypatch.setattr(execute, "make_runner", maker)
    monkeypatch.chdir(tmp_path)
    sinks = [0, 8]
    question = asked(axes={"layers.2-3.sink_tokens": sinks}, lengths=512, seeds=0)

    def call(*more: str) -> Any:
        Path("how-many.yaml").write_text(json.dumps(question))
        return CliRunner().invoke(app, ["sweep", "how-many.yaml", *more])

    listed = call("--dry-run", "--samples", "7")
    assert listed.exit_code == 0 and listed.stdout.endswith("6 runs of 7 prompts\n")
    assert not Path("how-many.jsonl").exists()
    ran = call()
    assert ran.exit_code == 0, ran.stderr
    assert "6 runs done now, 0 before; records are in how-many.jsonl" in ran.stdout
    [row] = [line.split() for line in ran.stdout.splitlines() if "sink_tokens=8" in line]
    assert row == ["sink_tokens=8", "0.900", "0.900", "0.1000", "4.50", "0.500"]
    again = call("--best", "score within 1% of dense")
    assert "0 runs done now, 6 before" in again.stdout
    assert "score within 1% of dense: sink_tokens=8, score 0.900 (dense 0.900)" in again.stdout
    written = load("how-many-best.yaml")
    assert written.layers["2-3"].model_dump()["sink_tokens"] == 8
    assert written.provenance["sweep"]["cells"] == 2
    assert [row["label"] for row in json.loads(call("--json").stdout)][::3] == ["dense", "dense"]
    sinks.append(3)
    failed = call()
    assert failed.exit_code == 1 and "2 runs done now, 6 before" in failed.stdout
    assert failed.stderr.splitlines()[-1] == (
        "error: 2 of 8 runs failed (--retry-failed does them again); the first: passkey at 512, sink_tokens=3: "
        "RuntimeError: out of memory"
    )
    nothing = call("--best", "kl below 0.01")
    assert nothing.exit_code == 1 and "error: best: no config keeps 'kl below 0.01'" in nothing.stderr
    assert "2 of 8 runs failed" in nothing.stderr and "sink_tokens=8" in nothing.stdout
    lost = call("--best", "score within 1% of dense", "--best-output", "how-many.jsonl/best.yaml")
    assert lost.exit_code == 1 and "output 'how-many.jsonl/best.yaml' cannot be written" in lost.stderr
    for options, says in (
        (["--best", "the best"], "'the best' cannot be read"),
        (["--best-output", "b.yaml"], "--best-output needs --best"),
        (["--workers", "2"], "--workers needs --executor ray; the executor is inline"),
        (["--gpus", "0.5", "--executor", "processes"], "--gpus needs --executor ray"),
        (["--device", ","], "--device ',': at least one"),
        (["--device", "cuda:0,cuda:1"], "executor 'inline' runs on one"),
    ):
        refused = call(*options)
        assert refused.exit_code == 1 and says in refused.stderr and not refused.stdout, refused.output
    assert call("--dry-run", "--device", "cuda:0,cuda:1").exit_code == 0  # of a machine that has them


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps(path: Path) -> None:
    question, text = load_question(path), path.read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# ") and any(line.startswith("# Source: ") for line in head)
    assert f"# sparsekit sweep configs/sweeps/{path.name}" in head
    assert question.question.endswith("?") and question.model == ["smollm2-135m"] and question.corpus is None
    runs, facts = question.runs(), models.facts("smollm2-135m")
    assert runs[0].label == "dense" and len(runs) * question.samples < 900  # half an hour on two cores
    for run in runs:
        assert run.config is None or len(run.config.resolve(facts).layers) == 30


def test_the_start_layer_sweep_is_the_one_that_is_described() -> None:
    runs = load_question(SHIPPED[0].with_name("start-layer.yaml")).runs()
    assert len({run.label for run in runs}) == 12 and len({run.task for run in runs}) == 3
    assert {run.samples for run in runs} == {24} and {run.tokens for run in runs} == {2048}


def test_examples_on_the_page_load() -> None:
    text = (ROOT / "docs/sweeps.md").read_text()
    blocks = re.findall(r"```yml\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        assert load_question(block).runs()
    for name in Question.model_fields:
        assert f"| `{name}`" in text, name
    for path in SHIPPED:
        assert f"configs/sweeps/{path.name}" in text


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(question_module).failed == 0
    assert execute.EXECUTORS == ("inline", "processes", "ray")


RULER = Path(__file__).parents[3] / "configs/qwen2.5-coder-1.5b/sweeps/ruler.yaml"


def test_the_ruler_sweep_asks_what_the_paper_asks() -> None:
    """Dense, TriangleMix, triangle by head at the shares that are shipped, two patterns everywhere, and each dynamic
    one alone and below the triangle; from its parts the whole."""
    question = load_question(RULER)
    runs = question.runs()
    labels = {run.label for run in runs}
    assert len(labels) == 1 + 1 + 3 + 2 + 2 * len(pattern_names(DynamicPattern))
    assert len(runs) == len(labels) * 11 * 4 * 3
    core = question.runs(where="seed == 0 and below in ['dense', 'triangle', 'a_shape']")
    assert {run.label.count("=") for run in core} == {0, 3} and len(core) == 7 * 11 * 4
    facts = EMBEDDED["qwen2.5-coder-1.5b"].facts
    for share in (50, 65, 75):
        config = next(run.config for run in core if f"by_head={share}%" in run.label)
        shipped = load(RULER.parents[1] / f"by-head-{share}.yaml")
        assert config is not None and config.resolve(facts).layers == shipped.resolve(facts).layers
    parts = [question.runs(where=f"tokens {at} 8192") for at in ("<=", ">")]
    assert {run.key for part in parts for run in part} == {run.key for run in runs}
    with pytest.raises(SparsekitError, match="unknown name 'token'"):
        question.runs(where="token == 8192")
