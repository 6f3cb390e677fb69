"""Run what is missing of a sweep, here, in processes or on a Ray cluster; every record is kept at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sparsekit.errors import SparsekitError, nearest
from sparsekit.lab.evaluate import Evaluator
from sparsekit.lab.progress import Bar, progress
from sparsekit.lab.provenance import content_of_source
from sparsekit.lab.sweep.question import Question, load_question
from sparsekit.lab.sweep.results import ResultFile, lacking
from sparsekit.lab.sweep.runs import Run
from sparsekit.lab.sweep.search import check_optuna, search
from sparsekit.lab.sweep.workers import Crew, Processes, RayActors, Runner, RunnerMaker, do, said
from sparsekit.lab.tasks import task

__all__ = ["EXECUTORS", "Runner", "Summary", "make_runner", "run_sweep"]

EXECUTORS = ("inline", "processes", "ray")


@dataclass
class Summary:
    """What a call of `run_sweep` did.

    Attributes:
        question: the sweep.
        path: the result file.
        runs: all runs of the sweep, in order; of a search dense's, and those of its trials.
        records: run key -> its record, of this call and of earlier ones.
        done: how many runs this call did.
        tried: how many configs a search tried, of this call and of earlier ones.
        failed: records of runs that failed, of this call and of earlier ones.
    """

    question: Question
    path: Path
    runs: list[Run]
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    done: int = 0
    tried: int = 0

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
    where: str | None = None,
    retry_failed: bool = False,
    address: str | None = None,
    gpus: float = 0.0,
    maker: RunnerMaker | None = None,
    quiet: bool = False,
) -> Summary:
    """Do every run of a sweep that the result file does not have yet; of a search, those that it comes to.

    Killed at any point, the same call goes on where it was: finished runs are on the disk, and a run that was not
    finished is done anew. A run that raises is recorded as failed, and the others go on.

    Args:
        source: a path to the YAML file, its text, a mapping, or a Question.
        out: the result file, JSONL.
        executor: "inline", in this process on one device; "processes", one for each device; or "ray", an actor of
            a cluster for each.
        devices: "cpu", "cuda:0", ...; of processes "cpu" may stand several times, of Ray's actors "cuda" too.
        address, gpus: of a Ray cluster (None starts one here), and of each actor: 0.5 puts two on a GPU.
        samples: prompts for each run, instead of the file's.
        where: do the part of the runs that fulfils this constraint too.
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
    if executor == "inline" and len(devices) > 1:
        raise SparsekitError(
            f"devices {', '.join(devices)}: executor 'inline' runs on one; 'processes' on each of several."
        )
    if maker is None and executor != "ray":
        from sparsekit.models import check_device

        for device in devices:
            check_device(device)
    question = load_question(source)
    runs = question.runs(device=devices[0], samples=samples, where=where)
    trials = question.search.trials if question.search else 0
    if question.search is not None:
        check_optuna()
        _check_busy(question.search.batch, len(runs), executor, devices)
    file = ResultFile(out)
    with file.writing() as known:
        summary = Summary(question, file.path, [], known)
        maker = maker or (partial(make_runner, kept=len(runs)) if trials else make_runner)
        with (
            _crew(executor, maker, devices, address, gpus) as finish,
            progress("", sum(map(_weight, runs)) * (1 + trials), quiet=quiet) as bar,
        ):
            shown = _Shown(bar, len(runs) * (1 + trials))

            def answer(runs: Sequence[Run]) -> list[dict[str, Any]]:
                had = {run.key for run in summary.runs}
                new = [run for run in runs if run.key not in had]
                summary.runs += new
                todo = [run for run in new if _is_open(known.get(run.key), retry_failed)]
                shown.starts(todo, sum(map(_weight, runs)) - sum(map(_weight, todo)), len(runs) - len(todo))
                for run, result in finish(todo):
                    record = {**run.identity(), **result, "question": question.question}
                    if why := lacking(record):  # a KL that is not finite
                        failed = {"status": "failed", "error": f"no measurement: {why}"}
                        record = {**run.identity(), **failed, "question": question.question}
                    file.append(record)
                    known[run.key] = record
                    summary.done += 1
                    shown.finished(run, record)
                return [{**known[run.key], **run.identity()} for run in runs]

            if trials:
                summary.tried = search(question, answer, device=devices[0], samples=samples)
            else:
                answer(runs)
    return summary


def _is_open(record: Mapping[str, Any] | None, retry_failed: bool) -> bool:
    return record is None or (retry_failed and record["status"] == "failed")


def make_runner(device: str, kept: int = 1) -> Runner:
    """Loads the model of a run, keeps it until a run has another, and asks it.

    Args:
        kept: of how many tasks, lengths and seeds it keeps what dense attention says. A grid asks all configs of one
            before the next; a search asks one config of all.
    """
    return _ModelRunner(device, kept)


class _ModelRunner:
    """One model at a time; one that could not be loaded is not tried again."""

    def __init__(self, device: str, kept: int = 1) -> None:
        self.device, self.kept = device, kept
        self._loaded: tuple[tuple[str, str | None], Callable[[], Evaluator]] | None = None
        self._evaluators: dict[tuple[Any, ...], Evaluator] = {}
        self._refused: dict[tuple[str, str | None], str] = {}

    def __call__(self, run: Run) -> dict[str, Any]:
        kind = task(run.task, run.corpus)
        return self._evaluator(run).run(run.config, kind, run.tokens, samples=run.samples, seed=run.seed)

    def _evaluator(self, run: Run) -> Evaluator:
        make, prompts = self._load(run), (run.task, run.corpus, run.tokens, run.samples, run.seed)
        if prompts not in self._evaluators:
            full = len(self._evaluators) >= self.kept
            # one that has answered others is used again: it knows what is warm
            self._evaluators[prompts] = self._evaluators.pop(next(iter(self._evaluators))) if full else make()
        return self._evaluators[prompts]

    def _load(self, run: Run) -> Callable[[], Evaluator]:
        from sparsekit.models import fast_dtype, load

        wanted = (run.model, run.dtype)
        if wanted in self._refused:
            raise SparsekitError(self._refused[wanted])
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None  # before the next one takes its memory
            self._evaluators.clear()
            dtype = fast_dtype(self.device) if run.dtype is None and self.device == "cpu" else run.dtype
            try:
                if None not in (run.source, now := content_of_source(run.model)) and now != run.source:
                    raise SparsekitError(f"model {run.model!r} has changed since the sweep began: start it again.")
                model, tokenizer = load(run.model, dtype=dtype, device=self.device)
            except Exception as error:
                self._refused[wanted] = said(error)
                raise
            self._loaded = wanted, partial(Evaluator, model, tokenizer, name=run.model)
        return self._loaded[1]


# ---- executors

Finisher = Callable[[Sequence[Run]], Iterator[tuple[Run, dict[str, Any]]]]


def _crew(
    executor: str, maker: RunnerMaker, devices: Sequence[str], address: str | None, gpus: float
) -> AbstractContextManager[Finisher]:
    """What finishes runs, list after list, with the same workers. Ray says which GPU "cuda" is."""
    if executor == "inline":
        return nullcontext(_Inline(maker, devices[0]))
    if executor == "processes":
        return Crew(devices, partial(Processes, maker))
    return Crew(devices, partial(RayActors, maker, address=address, gpus=gpus, count=len(devices)))


class _Inline:
    """Runs done here, by a runner that is made for the first."""

    def __init__(self, maker: RunnerMaker, device: str) -> None:
        self.maker, self.device = maker, device
        self.runner: Runner | None = None

    def __call__(self, runs: Sequence[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
        for run in runs:
            self.runner = self.runner or self.maker(self.device)
            yield run, do(self.runner, run)


def _check_busy(batch: int, runs: int, executor: str, devices: Sequence[str]) -> None:
    if executor != "inline" and len(devices) > batch * runs:
        enough = -(-len(devices) // runs)
        raise SparsekitError(
            f"search.batch = {batch}: trials of {runs} run{'s' if runs > 1 else ''} keep {batch * runs} of "
            f"{len(devices)} workers busy; write `batch: {enough}` (trials that are suggested together), or give "
            "fewer devices."
        )


# ---- progress


class _Shown:
    """How far a sweep is, by tokens that were read; the count is of runs."""

    def __init__(self, bar: Bar, runs: int) -> None:
        self.bar, self.runs, self.count = bar, runs, 0

    def starts(self, todo: Sequence[Run], weight: int, count: int) -> None:
        """The next runs; and how many there are besides that need not be done, and what they weigh."""
        self.count += count
        left = (self.bar.total or 0) - weight
        self.bar.shows(str(todo[0]) if todo else None, self._counted(), total=left)

    def finished(self, run: Run, record: Mapping[str, Any]) -> None:
        self.count += 1
        self.bar(_weight(run), str(run), self._counted())
        failed = record["status"] == "failed"
        told = f"failed: {record['error']}" if failed else f"{record.get('score', 0):.3f}"
        self.bar.says(f"{self._counted()} {run}: {told}", always=failed)

    def _counted(self) -> str:
        return f"{self.count}/{self.runs}"


def _weight(run: Run) -> int:
    return run.tokens * run.samples
