"""The records of a real model are measured by one command, which goes on where it was, and collected by another."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from sparsekit import SparsekitError
from sparsekit.cli import app
from sparsekit.lab.sweep import load_question
from sparsekit.patterns import parse_pattern

ROOT = Path(__file__).parents[1]


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "website")
    import evidence

    return evidence


def test_every_command_is_one_of_ours(evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model that there is not: that is all they say."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "docs" / "results" / f"probe-{evidence.MODEL}.json", "probe.json")
    other = {evidence.MODEL: "no-such-model", "cuda": "cpu"}
    todo = evidence.jobs()
    assert len({job.name for job in todo}) == len(todo)
    for job in todo:
        said = CliRunner().invoke(app, [other.get(word, word) for word in job.command])
        assert said.exit_code == 1 and "no-such-model" in said.output, (str(job), said.output)
    said = CliRunner().invoke(app, [*evidence.sweep(["cuda:0", "cuda:1"], 2, [0]).command, "--dry-run"])
    assert said.exit_code == 0 and "924 runs of 8 prompts" in said.output
    names = [job.name for job in todo]
    assert all(names.index(job.after) < names.index(job.name) for job in todo if job.after)
    assert [job.after for job in todo if "probe.json" in job.command and job.name != "probe"] == ["probe"]
    lengths = [int(name.split("-")[1]) for name in names if name.startswith("curve")]
    assert lengths == sorted(lengths, reverse=True)  # the longest first, lest one of them runs alone at the end


def test_the_patterns_are_the_sweeps(evidence: Any) -> None:
    values = load_question(evidence.SWEEP).axes["below"]["values"][1:]
    told = [parse_pattern(yaml.safe_load(text)) for text in evidence.patterns().values()]
    assert told == [parse_pattern(value) for value in values]


def test_the_command_of_a_row_is_the_one_that_makes_it(evidence: Any) -> None:
    for row in evidence.gains.rows(f"start-layer-{evidence.MODEL}"):
        words = shlex.split(row["command"])
        of = {name: value for name, value in itertools.pairwise(words) if name.startswith("-")}
        assert words[:4] == ["sparsekit", "calibrate", "curve", row["model"]]
        assert str(parse_pattern(yaml.safe_load(of["--patterns"]))) == row["pattern"]
        assert str(row["start"]) in of["--starts"].split(",")
        assert (int(of["--tokens"]), int(of["--samples"])) == (row["prompts"]["tokens"], row["samples"])
        assert of["--dtype"] == row["dtype"] and row["device"] == "NVIDIA H200" and of["--device"] == "cuda"


def test_it_goes_on_where_it_was(
    evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def fake(command: list[str], cwd: Path, **streams: Any) -> Any:
        ran.append(command[4:])
        if command[4] != "break":
            (cwd / f"{command[4]}.json").write_text("{}")
        return subprocess.CompletedProcess(command, command[4] == "break")

    monkeypatch.setattr(subprocess, "run", fake)
    todo = [evidence.Job(f"{name}.json", (name, "--device", "cuda")) for name in ("one", "break", "two")]
    assert evidence.run(tmp_path, todo, ["cuda:3"]) == ["break"]
    assert ran == [[name, "--device", "cuda:3"] for name in ("one", "break", "two")]
    assert "break: failed, see break.log" in capsys.readouterr().out
    assert evidence.run(tmp_path, todo, ["cuda:3"]) == ["break"]
    assert len(ran) == 4  # what has its file is not run again
    told = [(row["name"], row["device"], row["code"]) for row in evidence.Times(tmp_path).journal.read()[0]]
    assert told == [(name, "cuda:3", int(name == "break")) for name in ("one", "break", "two", "break")]

    ran.clear()
    todo = [evidence.Job("break.json", ("break",)), evidence.Job("four.json", ("four",), after="break")]
    assert evidence.run(tmp_path, todo, ["cuda:3"]) == ["break", "four"]
    assert ran == [["break"]]
    assert "four: not run, for break failed" in capsys.readouterr().out

    ran.clear()
    monkeypatch.setattr(evidence, "jobs", list)
    assert not evidence.main([str(tmp_path), "--device", "cuda", "--workers", "1"])
    assert [words[words.index("--device") + 1] for words in ran] == ["cuda"]
    assert capsys.readouterr().out.endswith(" GPU-minutes in all\n")


def test_without_room_for_times_it_ends(evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of a job whose end cannot be written is free for the next, and the job runs no longer."""
    ran: list[str] = []
    running: list[int] = []

    class Soon(SimpleQueue[str]):
        def get(self, block: bool = True, timeout: float | None = 10.0) -> str:
            return super().get(block, timeout)

    def full(times: Any, name: str, code: int | None) -> None:
        running.append(len(times.running))
        raise SparsekitError(f"{name}: no space left")

    def fake(command: list[str], **streams: Any) -> Any:
        ran.append(command[4])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(evidence, "SimpleQueue", Soon)
    monkeypatch.setattr(evidence.Times, "_add", full)
    monkeypatch.setattr(subprocess, "run", fake)
    with pytest.raises(SparsekitError, match="one: no space left"):
        evidence.run(tmp_path, [evidence.Job(f"{name}.json", (name,)) for name in ("one", "two")], ["cuda:3"])
    assert ran == ["one", "two"]
    assert running == [1, 1]


def test_interrupted_it_starts_no_further_job(evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    interrupted = Event()

    def fake(command: list[str], **streams: Any) -> Any:
        ran.append(command[4])
        interrupted.wait(10)
        time.sleep(0.2)
        return subprocess.CompletedProcess(command, -signal.SIGKILL)

    def beat(times: Any) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(evidence, "BEAT", 0.1)
    monkeypatch.setattr(evidence.Times, "beat", beat)
    with pytest.raises(KeyboardInterrupt):
        evidence.run(tmp_path, [evidence.Job(f"{name}.json", (name,)) for name in ("one", "two")], ["cuda:3"])
    assert ran == ["one"]


def test_gpu_minutes_are_of_a_gpu_not_of_its_jobs(
    evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two jobs at once on one GPU count once, a job on two GPUs twice; of one that was killed what it last said."""
    rows = [
        {"name": "one", "device": "cuda:0", "started": 1000.0, "seconds": 60.0, "code": 0},
        {"name": "two", "device": "cuda:0", "started": 1030.0, "seconds": 10.0, "code": None},
        {"name": "two", "device": "cuda:0", "started": 1030.0, "seconds": 60.0, "code": None},
        {"name": "two", "device": "cuda:0", "started": 2000.0, "seconds": 30.0, "code": 0},
        {"name": "ruler", "device": "cuda:0,cuda:1", "started": 2015.0, "seconds": 60.0, "code": 1},
    ]
    assert evidence.gpu_minutes(rows) == pytest.approx((90 + 75 + 60) / 60)
    assert evidence.gpu_minutes([]) == 0
    unfinished = json.dumps(rows[0])[:20]
    (tmp_path / "times.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + unfinished)
    monkeypatch.setattr(evidence, "collect", lambda *_: None)
    assert not evidence.main([str(tmp_path), "--collect"])
    assert capsys.readouterr().out == "3.8 GPU-minutes in all\n"
    assert (tmp_path / "times.jsonl").read_text().endswith(unfinished)  # another process may be writing it


DRIVER = """
import sys
sys.path.insert(0, {website!r})
import evidence
evidence.BEAT = 0.1
evidence.run(evidence.Path({folder!r}), [evidence.Job("never.json", ("never",))], ["cuda:0"])
"""
PACKAGE = """
import multiprocessing, os, time

def work(name):
    open(f"{name}.pid", "w").write(str(os.getpid()))
    time.sleep(600)

def main():
    multiprocessing.get_context("spawn").Process(target=work, args=("worker",)).start()
    work("job")
"""


@pytest.mark.skipif(not hasattr(os, "setpgid"), reason="groups of processes are POSIX's")
def test_killed_it_takes_its_jobs_along_and_their_time_is_known(evidence: Any, tmp_path: Path) -> None:
    """A job and the process that the job started, as a sweep starts its workers."""
    (tmp_path / "sparsekit").mkdir()
    (tmp_path / "sparsekit" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "sparsekit" / "__main__.py").write_text("from sparsekit import main\nif __name__ == '__main__': main()")
    code = DRIVER.format(website=str(ROOT / "website"), folder=str(tmp_path))
    ours = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    files, times = [tmp_path / f"{name}.pid" for name in ("job", "worker")], tmp_path / "times.jsonl"
    pids: list[int] = []
    try:
        _until(lambda: all(path.exists() and path.read_text() for path in files))
        pids = [int(path.read_text()) for path in files]
        _until(lambda: times.exists() and times.read_text().count("\n") > 1)
        ours.send_signal(signal.SIGKILL)
        ours.wait()
        _until(lambda: not any(_runs(pid) for pid in pids))
    finally:
        ours.kill()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    rows = evidence.Times(tmp_path).journal.read()[0]
    assert {(row["name"], row["code"]) for row in rows} == {("never", None)}
    assert evidence.gpu_minutes(rows) == pytest.approx(rows[-1]["seconds"] / 60) and rows[-1]["seconds"] > 0.1


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether there is such a process that has not ended; an ended one may wait for a parent that asks for it."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_what_is_finished_is_collected(evidence: Any, tmp_path: Path) -> None:
    """New rows beside old ones, and in place of those of the same work; failed ones and other numbers of prompts are
    left out, and so is the line that a kill cut short."""
    results, folder = tmp_path / "results", tmp_path / "folder"
    results.mkdir()
    folder.mkdir()
    names = (evidence.gains.RULER, *evidence.gains.RULER_DYNAMIC, f"start-layer-{evidence.MODEL}")
    before = {}
    for name in names:
        path = ROOT / "docs" / "results" / f"{name}.jsonl"
        before[name] = path.read_bytes()
        (results / path.name).write_bytes(before[name])
    evidence.collect(folder, results)
    assert {name: (results / f"{name}.jsonl").read_bytes() for name in names} == before  # already in its order

    static, long = (json.loads(before[name].splitlines()[0]) for name in (names[0], names[2]))
    rows = [
        {**static, "score": 0.125, "ttft_s": 1.0}, {**long, "seed": 7}, {**static, "seed": 8, "status": "failed"},
        {**static, "samples": 2, "score": 0.25},
    ]  # fmt: skip
    unfinished = json.dumps({**static, "seed": 9})[:-9]
    (folder / "ruler.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + unfinished)
    curve = json.loads(before[names[3]].splitlines()[0])
    kept = ("pattern", "start", "kl", "kl_half_width", "score", "dense_score", "same", "tile_density", "samples")
    said = {key: value for key, value in curve.items() if key not in (*kept, "command")}
    said |= {"prompts": {**said["prompts"], "tokens": 16384}, "rows": [{key: curve[key] for key in kept}]}
    (folder / "curve-16384-triangle.json").write_text(json.dumps(said))
    evidence.collect(folder, results)
    with pytest.raises(SystemExit):
        evidence.main([str(tmp_path / "no-such"), "--collect"])
    after = {
        name: [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()] for name in names
    }
    assert after[names[0]][0] == {**static, "score": 0.125}
    assert len(after[names[0]]) == len(before[names[0]].splitlines())
    assert [row["seed"] for row in after[names[2]]].count(7) == 1
    assert after[names[1]] == [json.loads(line) for line in before[names[1]].splitlines()]
    told = (16384, curve["pattern"], curve["start"])
    [new] = [row for row in after[names[3]] if (row["prompts"]["tokens"], row["pattern"], row["start"]) == told]
    assert len(after[names[3]]) == len(before[names[3]].splitlines())
    assert "--tokens 16384" in new["command"]
    assert {**new, "prompts": curve["prompts"], "command": curve["command"]} == curve
