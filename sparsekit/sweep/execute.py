"""Run what is missing of a sweep, here, in processes or on a Ray cluster; every record is kept at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsekit.errors import SparsekitError, nearest
from sparsekit.evaluate import Evaluator
from sparsekit.sweep.grid import Question, Run, load_question
from sparsekit.sweep.results import ResultFile
from sparsekit.sweep.workers import Processes, RayActors, Runner, RunnerMaker, dispatch, do, said
from sparsekit.tasks import task

__all__ = ["EXECUTORS", "Runner", "Summary", "make_runner", "run_sweep"]

EXECUTORS = ("inline", "processes", "ray")


@dataclass
class Summary:
    """What a call of `run_sweep` did.

    Attributes:
        question: the sweep.
        path: the result file.
        runs: all runs of the sweep, in order.
        records: run key -> its record, of this call and of earlier ones.
        done: how many runs this call did.
        failed: records of runs that failed, of this call and of earlier ones.
    """

    question: Question
    path: Path
    runs: list[Run]
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    done: int = 0

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [record for record in self.of_runs() if record["status"] == "failed"]

    def of_runs(self) -> list[dict[str, Any]]:
        """The records of this sweep's runs, in their order, called as the runs are called now."""
        return [{**self.records[run.key], **run.identity()} for run in self.runs if run.key in self.records]


def run_sweep(
    source: Question | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    executor: str = "inline",
    devices: Sequence[str] = ("cpu",),
    samples: int | None = None,
    retry_failed: bool = False,
    address: str | None = None,
    gpus: float = 0.0,
    maker: RunnerMaker | None = None,
    quiet: bool = False,
) -> Summary:
    """Do every run of a sweep that the result file does not have yet.

    Killed at any point, the same call goes on where it was: finished runs are on the disk, and a run that was not
    finished is done anew. A run that raises is recorded as failed, and the others go on.

    Args:
        source: a path to the YAML file, its text, a mapping, or a Question.
        out: the result file, JSONL.
        executor: "inline", in this process on the first device; "processes", one for each device; or "ray", an actor of
            a cluster for each.
        devices: "cpu", "cuda:0", ...; of processes "cpu" may stand several times, of Ray's actors "cuda" too.
        address, gpus: of a Ray cluster (None starts one here), and of each actor: 0.5 puts two on a card.
        samples: prompts for each run, instead of the file's.
        retry_failed: do runs again that are recorded as failed.
        maker: device -> what does a run; default loads the model and asks an `Evaluator`. With processes and
            actors it must be a function of a module.
        quiet: show no progress.

    Raises:
        SparsekitError: a question that is wrong, or a result file that cannot be used. Nothing that is done gets lost.
    """
    if executor not in EXECUTORS:
        raise SparsekitError(f"executor {executor!r}: one of {', '.join(EXECUTORS)}.{nearest(executor, EXECUTORS)}")
    if not devices or len({device.partition(":")[0] for device in devices}) > 1:
        raise SparsekitError(f"devices {', '.join(devices) or 'none'}: at least one, and all of one kind.")
    question = load_question(source)
    runs = question.runs(device=devices[0], samples=samples)
    file = ResultFile(out)
    with file.writing() as known:
        summary = Summary(question, file.path, runs, known)
        todo = [run for run in runs if _is_open(known.get(run.key), retry_failed)]
        maker = maker or make_runner
        if executor == "inline":
            finish = _inline(todo, maker, devices[0])
        elif executor == "processes":
            finish = dispatch(todo, devices, Processes(maker))
        else:
            finish = _on_cluster(todo, maker, devices, address, gpus)
        with _Shown(runs, todo, quiet) as shown:
            for run, result in finish:
                record = {**run.identity(), **result, "question": question.question}
                file.append(record)
                known[run.key] = record
                summary.done += 1
                shown.finished(run, record)
    return summary


def _is_open(record: Mapping[str, Any] | None, retry_failed: bool) -> bool:
    return record is None or (retry_failed and record["status"] == "failed")


def make_runner(device: str) -> Runner:
    """Loads the model of a run, keeps it until a run has another, and asks it."""
    return _ModelRunner(device)


class _ModelRunner:
    """One model at a time; one that could not be loaded is not tried again."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._loaded: tuple[tuple[str, str | None], Evaluator] | None = None
        self._refused: dict[tuple[str, str | None], str] = {}

    def __call__(self, run: Run) -> dict[str, Any]:
        kind = task(run.task, run.corpus)
        return self._evaluator(run).run(run.config, kind, run.tokens, samples=run.samples, seed=run.seed)

    def _evaluator(self, run: Run) -> Evaluator:
        from sparsekit.models import fast_dtype, load

        wanted = (run.model, run.dtype)
        if wanted in self._refused:
            raise SparsekitError(self._refused[wanted])
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None  # before the next one takes its memory
            dtype = fast_dtype(self.device) if run.dtype is None and self.device == "cpu" else run.dtype
            try:
                self._loaded = wanted, Evaluator(*load(run.model, dtype=dtype, device=self.device), name=run.model)
            except Exception as error:
                self._refused[wanted] = said(error)
                raise
        return self._loaded[1]


# ---- executors


def _inline(runs: Sequence[Run], maker: RunnerMaker, device: str) -> Iterator[tuple[Run, dict[str, Any]]]:
    runner = maker(device) if runs else None
    for run in runs:
        assert runner is not None
        yield run, do(runner, run)


def _on_cluster(
    runs: Sequence[Run], maker: RunnerMaker, devices: Sequence[str], address: str | None, gpus: float
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """One actor for each device; Ray says which card "cuda" is."""
    if runs:
        actors = RayActors(maker, address=address, gpus=gpus, count=len(devices))
        try:
            yield from dispatch(runs, devices, actors)
        finally:
            actors.close()


# ---- progress


class _Shown(AbstractContextManager["_Shown"]):
    """A bar with the time left on a terminal's stderr, a line for each run elsewhere. Time goes by tokens read."""

    def __init__(self, runs: Sequence[Run], todo: Sequence[Run], quiet: bool) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal or not todo,
        )
        self.quiet = quiet
        self.lines = not quiet and not self.console.is_terminal
        self.total, self.count, self.todo = len(runs), len(runs) - len(todo), sum(map(_weight, todo))
        self.read, self.start = 0, time.monotonic()
        first = str(todo[0]) if todo else ""
        self.id = self.bar.add_task(first, total=self.todo, count=self._counted())

    def __enter__(self) -> _Shown:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def finished(self, run: Run, record: Mapping[str, Any]) -> None:
        self.count += 1
        self.read += _weight(run)
        self.bar.update(self.id, advance=_weight(run), description=str(run), count=self._counted())
        said = f"failed: {record['error']}" if record["status"] == "failed" else f"{record.get('score', 0):.3f}"
        if self.lines:
            left = (time.monotonic() - self.start) / self.read * (self.todo - self.read)
            print(f"{self._counted()} {run}: {said} ({left / 60:.0f} min left)", file=sys.stderr, flush=True)
        elif record["status"] == "failed" and not self.quiet:
            self.bar.console.print(f"{run}: {said}", markup=False)

    def _counted(self) -> str:
        return f"{self.count}/{self.total}"


def _weight(run: Run) -> int:
    return run.tokens * run.samples
