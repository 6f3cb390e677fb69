"""Measures what docs/gains.md says of Qwen2.5-Coder-1.5B anew: the three findings, the sinks and RULER.

    make evidence
    python website/evidence.py FOLDER --device cuda:0,cuda:1 --workers 6
    python website/evidence.py FOLDER --collect
    python website/gains.py

Each job is a `sparsekit` command that runs in FOLDER, where its records and its log are; `--list` prints them.
Killed at any point, its jobs end with it, and the same call goes on; what failed is tried again. FOLDER/times.jsonl
says what the GPUs were busy with, over all calls. `--collect` puts what is finished into docs/results.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, NamedTuple

import gains
import yaml

from sparsekit.lab.journal import Journal

ROOT = Path(__file__).resolve().parents[1]
MODEL = "qwen2.5-coder-1.5b"
SWEEP = ROOT / "configs" / MODEL / "sweeps" / "ruler.yaml"
STARTS, LENGTHS, SAMPLES = "0,7,14,18,21,25", (8192, 16384), 96
BEAT = 10.0  # seconds between two rows of a job that runs
# In the group of processes that its first argument names, which sparsekit's own workers are then in too.
IN_GROUP = """
import os, runpy, sys
os.setpgid(0, int(sys.argv.pop(1)))
runpy.run_module("sparsekit", run_name="__main__", alter_sys=True)
"""
GROUP = "import os, signal, sys; os.setpgid(0, 0); print(flush=True); sys.stdin.read(); os.killpg(0, signal.SIGKILL)"
# Of a sweep's records: what does not depend on who else was on the GPU.
KEPT = (
    "key", "label", "axes", "config_key", "model", "task", "tokens", "seed", "samples", "status", "metric", "score",
    "score_low", "score_high", "kl", "kl_width", "same_text", "density", "tile_density", "layer_density", "scores",
    "depths", "config", "device", "dtype", "versions", "time",
)  # fmt: skip


class Job(NamedTuple):
    """A command, the file that is there when it is done, and the name of the job whose file it reads."""

    result: str
    command: tuple[str, ...]
    after: str = ""

    @property
    def name(self) -> str:
        return Path(self.result).stem

    def __str__(self) -> str:
        return shlex.join(("sparsekit", *self.command))


def patterns() -> dict[str, str]:
    """Name -> pattern as in YAML, on one line: those of the sweep."""
    [_, *values] = yaml.safe_load(SWEEP.read_text())["axes"]["below"]["values"]
    texts = [
        yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).split("\n")[0] for value in values
    ]
    return {
        value["name"] if isinstance(value, dict) else value: text for value, text in zip(values, texts, strict=True)
    }


def jobs() -> list[Job]:
    """In the order in which they start: what another one reads, then the longest."""
    of_all = ("--device", "cuda", "--dtype", "bfloat16")
    probe = Job("probe.json", (
        "calibrate", "probe", MODEL, "--samples", "8", "--tokens", "2048", "--seeds", "10,11", "--corpus", "pydoc",
        "--tasks", "needle4,vt,cwe,fwe,kv_retrieval,perplexity", *of_all, "-o", "probe.json",
    ))  # fmt: skip
    sinks = Job(
        "inspect.json", ("inspect", MODEL, "--tokens", "32768", "--samples", "4", *of_all, "-o", "inspect.json")
    )
    short, long = (
        [
            _recorded(f"curve-{tokens}-{name}", of_all, "calibrate", "curve", MODEL, "--patterns", text, "--starts",
                      STARTS, "--tokens", str(tokens))
            for name, text in patterns().items()
        ]
        for tokens in LENGTHS
    )  # fmt: skip
    layers = _recorded("layers", of_all, "calibrate", "layers", MODEL, "--probe", "probe.json", "--tokens", "8192")
    return [probe, *long, layers._replace(after="probe"), *short, sinks]


def _recorded(name: str, of_all: Sequence[str], *command: str) -> Job:
    kept = ("--samples", str(SAMPLES), *of_all, "--records", f"{name}.records.jsonl", "-o", f"{name}.json")
    return Job(f"{name}.json", (*command, *kept))


def sweep(devices: Sequence[str], workers: int, seeds: Sequence[int]) -> Job:
    """Never done: it finds out itself what is missing."""
    at = ",".join(device for device in devices for _ in range(workers))
    where = f"seed in {list(seeds)}"
    told = ("--executor", "processes", "--device", at, "--where", where, "--retry-failed", "-o", "ruler.jsonl")
    return Job("ruler", ("sweep", str(SWEEP), *told))


class Times:
    """What the GPUs were busy with, in FOLDER/times.jsonl: a row when a job ends, and one every `BEAT` seconds before.

    A row has the job's `name`, its `device` or devices, when it `started` (Unix time), the `seconds` since, and its
    exit `code`, null while it runs.
    """

    def __init__(self, folder: Path) -> None:
        self.journal = _times(folder)
        self.journal.mended()
        self.running: dict[str, tuple[str, float]] = {}  # name -> device, since when
        self._lock = Lock()

    def start(self, name: str, device: str) -> None:
        with self._lock:
            self.running[name] = device, time.time()

    def beat(self) -> None:
        with self._lock:
            for name in self.running:
                self._add(name, None)

    def end(self, name: str, code: int | None) -> None:
        with self._lock:
            try:
                self._add(name, code)
            finally:
                del self.running[name]

    def _add(self, name: str, code: int | None) -> None:
        device, started = self.running[name]
        seconds = round(time.time() - started, 3)
        self.journal.append({"name": name, "device": device, "started": started, "seconds": seconds, "code": code})


def _times(folder: Path) -> Journal:
    return Journal(folder / "times.jsonl", "times", "`website/evidence.py`")


def gpu_minutes(rows: Iterable[Mapping[str, Any]]) -> float:
    """Minutes in which at least one job ran on a GPU, added over the GPUs; of the rows of `Times`."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for device in row["device"].split(","):
            spans.setdefault(device, []).append((row["started"], row["started"] + row["seconds"]))
    busy = 0.0
    for of_device in spans.values():
        until = 0.0
        for start, end in sorted(of_device):
            busy += max(end - max(start, until), 0.0)
            until = max(until, end)
    return busy / 60


def _busy(folder: Path) -> str:
    return f"{gpu_minutes(_times(folder).read()[0]):.1f} GPU-minutes in all"


@contextmanager
def group_of_processes() -> Iterator[int]:
    """The id of a group that is killed when this block ends, or this process in whatever way.

    Its leader reads a pipe that ends with the only process that can write to it, this one.
    """
    leader = subprocess.Popen([sys.executable, "-c", GROUP], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert leader.stdout is not None
    leader.stdout.readline()  # the group is there
    try:
        yield leader.pid
    finally:
        leader.communicate()


def run(folder: Path, todo: Iterable[Job], devices: Sequence[str]) -> list[str]:
    """Each job on the next free of the devices, one of which may stand there several times -> names that failed."""
    free: SimpleQueue[str] = SimpleQueue()
    for device in devices:
        free.put(device)
    times = Times(folder)

    def do(job: Job, before: Future[str | None] | None, group: int) -> str | None:
        if (folder / job.result).exists():
            return None
        if before is not None and before.result() is not None:
            print(f"{job.name}: not run, for {job.after} failed", flush=True)
            return job.name
        device = free.get()
        command = [device if word == "cuda" else word for word in job.command]
        code = None
        times.start(job.name, device)
        try:
            with (folder / f"{job.name}.log").open("a") as log:
                code = subprocess.run(
                    [sys.executable, "-c", IN_GROUP, str(group), *command],
                    cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                ).returncode  # fmt: skip
        finally:
            free.put(device)
            times.end(job.name, code)
        print(f"{job.name}: {'done' if not code else f'failed, see {job.name}.log'}", flush=True)
        return job.name if code else None

    futures: dict[str, Future[str | None]] = {}
    with ThreadPoolExecutor(len(devices)) as pool, group_of_processes() as group:
        try:
            for job in todo:
                futures[job.name] = pool.submit(do, job, futures.get(job.after), group)
            while wait(futures.values(), BEAT).not_done:
                times.beat()
        except BaseException:
            for future in futures.values():
                future.cancel()
            raise
    return [name for future in futures.values() if (name := future.result()) is not None]


# ---- into docs/results


def collect(folder: Path, results: Path) -> None:
    """What the jobs measured, beside the rows that are in `results` and were not measured anew.

    Of the sweep's file not: runs that failed, runs of other numbers of prompts, and a last line that is unfinished.
    """
    for found, name in (("probe", "probe"), ("inspect", "inspect"), ("layers", "layers")):
        if (folder / f"{found}.json").exists():
            shutil.copyfile(folder / f"{found}.json", results / f"{name}-{MODEL}.json")
    made = {job.name: job for job in jobs()}
    rows = [row for path in sorted(folder.glob("curve-*.json")) for row in _curve(path, str(made[path.stem]))]
    _merge(results / f"start-layer-{MODEL}.jsonl", rows, _of_curve)
    ruler: dict[str, list[dict[str, Any]]] = {gains.RULER: [], **{name: [] for name in gains.RULER_DYNAMIC}}
    samples = yaml.safe_load(SWEEP.read_text())["samples"]
    for row in Journal(folder / "ruler.jsonl", "results", "`sparsekit sweep`").read()[0]:
        if row["status"] == "ok" and row["samples"] == samples:
            ruler[_file_of(row)].append({key: row[key] for key in KEPT if key in row})
    for name, measured in ruler.items():
        _merge(results / f"{name}.jsonl", measured, _of_ruler)


def _curve(path: Path, command: str) -> Iterator[dict[str, Any]]:
    said = json.loads(path.read_text())
    for row in said.pop("rows"):
        yield {**said, **row, "command": command}


def _of_curve(row: Mapping[str, Any]) -> tuple[Any, ...]:
    name = row["pattern"].split("(")[0]
    return row["prompts"]["tokens"], [*patterns()].index(name), -row["start"]


def _of_ruler(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["tokens"], row["seed"], *gains.mixture_of(row), row["task"]


def _file_of(row: Mapping[str, Any]) -> str:
    below, *_ = gains.mixture_of(row)
    if below in ("dense", "triangle", "a_shape"):
        return gains.RULER
    return gains.RULER_DYNAMIC[row["tokens"] > 8192]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _merge(path: Path, measured: Sequence[dict[str, Any]], identity: Any) -> None:
    rows = {identity(row): row for row in (*_read(path), *measured)}
    path.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda:0", help="the GPUs, comma-separated; default cuda:0")
    parser.add_argument("--workers", type=int, default=6, help="jobs at once on each GPU, of 18 GiB each; default 6")
    parser.add_argument("--seeds", default="0", help="of RULER's prompts, comma-separated; default 0")
    parser.add_argument("--list", action="store_true", help="print the commands, run none")
    parser.add_argument("--collect", action="store_true", help="put what is finished into docs/results, run none")
    given = parser.parse_args(arguments)
    devices = given.device.split(",")
    last = sweep(devices, given.workers, [int(seed) for seed in given.seeds.split(",")])
    if given.list:
        print(*jobs(), last, sep="\n")
        return 0
    if given.collect:
        if not given.folder.is_dir():
            parser.error(f"folder {str(given.folder)!r}: there is none; give the one that the jobs ran in")
        collect(given.folder, ROOT / "docs" / "results")
        print(_busy(given.folder))
        return 0
    given.folder.mkdir(parents=True, exist_ok=True)
    try:
        failed = run(given.folder, jobs(), devices * given.workers)
        failed += run(given.folder, [last], [given.device])
    finally:
        print(_busy(given.folder), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
