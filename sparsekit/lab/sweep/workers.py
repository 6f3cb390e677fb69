"""Workers that do one run at a time: processes of this machine, or actors of a Ray cluster. Each keeps its model.

A worker that dies fails the run it had, and another takes its place. Runs that share prompts go to one worker, which
keeps what dense attention says to them.
"""

from __future__ import annotations

import multiprocessing
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from typing import Any

from sparsekit.errors import SparsekitError
from sparsekit.lab.sweep.runs import Run, groups

__all__ = ["Crew", "Processes", "RayActors", "Runner", "RunnerMaker", "Workers", "do", "said"]

Runner = Callable[[Run], Mapping[str, Any]]  # what `Evaluator.run` gives
RunnerMaker = Callable[[str], Runner]  # of a device


def do(runner: Runner, run: Run) -> dict[str, Any]:
    """A run done, or why not."""
    start = time.perf_counter()
    try:
        return {"status": "ok", **runner(run), "run_s": time.perf_counter() - start}
    except Exception as error:
        return _failure(said(error), start)


def said(error: Exception) -> str:
    """One line of an error: ours as it is, another's with its type."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, SparsekitError) else f"{type(error).__name__}: {text}"


def _failure(why: str, start: float) -> dict[str, Any]:
    return {"status": "failed", "error": why, "run_s": time.perf_counter() - start}


class Died(Exception):
    """A worker that is gone; its text says how it went."""


class Workers(ABC):
    """A kind of worker. A worker is what `start` returns; `device` says where it works."""

    @abstractmethod
    def start(self, device: str) -> Any:
        """A new worker."""

    @abstractmethod
    def send(self, worker: Any, run: Run) -> None:
        """Give it a run."""

    @abstractmethod
    def ready(self, workers: Sequence[Any]) -> list[Any]:
        """Those of several busy ones, at least one, that are done or dead; waits for it."""

    @abstractmethod
    def receive(self, worker: Any) -> dict[str, Any]:
        """What a ready worker gives; raises Died."""

    @abstractmethod
    def stop(self, worker: Any) -> None:
        """End it."""

    @abstractmethod
    def close(self) -> None:
        """After the last of them: leave what they worked in."""


@dataclass
class _Desk:
    """A place where one worker after the other works."""

    device: str
    worker: Any
    group: deque[Run] = field(default_factory=deque)
    run: Run | None = None
    since: float = 0.0


class Crew(AbstractContextManager["Crew"]):
    """One worker for each device, started when there is something to do, and kept from one list of runs to the next.

    Args:
        workers: makes their kind, when the first is started.
    """

    def __init__(self, devices: Sequence[str], workers: Callable[[], Workers]) -> None:
        self.devices, self._kind = devices, workers
        self._workers: Workers | None = None
        self._desks: list[_Desk] = []

    def __call__(self, runs: Sequence[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
        """Every run with what came of it, as they finish."""
        if not runs:
            return
        workers = self._workers = self._workers or self._kind()
        waiting = deque(deque(group) for group in groups(runs))
        for desk in self._desks:
            self._give(desk, waiting, workers)
        for device in self.devices[len(self._desks) : len(runs)]:
            self._desks.append(_Desk(device, workers.start(device)))
            self._give(self._desks[-1], waiting, workers)
        while busy := [desk for desk in self._desks if desk.run is not None]:
            ready = workers.ready([desk.worker for desk in busy])
            for desk in [desk for desk in busy if any(desk.worker is worker for worker in ready)]:
                run = desk.run
                assert run is not None
                try:
                    result = workers.receive(desk.worker)
                except Died as error:
                    result = _failure(f"the worker on {desk.device} died ({error})", desk.since)
                    desk.worker = workers.start(desk.device)
                desk.run = None
                self._give(desk, waiting, workers)
                yield run, result

    def _give(self, desk: _Desk, waiting: deque[deque[Run]], workers: Workers) -> None:
        """The next run of the desk's own group; else a group that nobody has; else one from the longest left."""
        if not desk.group and waiting:
            desk.group = waiting.popleft()
        group = desk.group or max((other.group for other in self._desks), key=len)
        if group:
            desk.run, desk.since = (group.popleft() if group is desk.group else group.pop()), time.perf_counter()
            workers.send(desk.worker, desk.run)

    def __exit__(self, *_: object) -> None:
        if self._workers is not None:
            try:
                for desk in self._desks:
                    self._workers.stop(desk.worker)
            finally:
                self._workers.close()


# ---- processes


@dataclass(eq=False)
class _Process:
    process: Any
    pipe: Connection


class Processes(Workers):
    """Processes of this machine, each started anew: nothing of this one is copied but what makes runners."""

    def __init__(self, maker: RunnerMaker) -> None:
        self.maker = maker
        self.context = multiprocessing.get_context("spawn")

    def start(self, device: str) -> _Process:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs, self.maker, device), daemon=True)
        process.start()
        theirs.close()
        return _Process(process, ours)

    def send(self, worker: _Process, run: Run) -> None:
        with suppress(OSError):  # a dead one is found by `ready`
            worker.pipe.send(run)

    def ready(self, workers: Sequence[_Process]) -> list[_Process]:
        done = wait([worker.pipe for worker in workers])
        return [worker for worker in workers if worker.pipe in done]

    def receive(self, worker: _Process) -> dict[str, Any]:
        try:
            result: dict[str, Any] = worker.pipe.recv()
        except (EOFError, ConnectionError):
            worker.process.join()
            raise Died(f"exit code {worker.process.exitcode}") from None
        return result

    def stop(self, worker: _Process) -> None:
        worker.pipe.close()
        worker.process.join(timeout=5)
        if worker.process.is_alive():
            worker.process.kill()

    def close(self) -> None:
        """There is nothing but the processes."""


def _serve(pipe: Connection, maker: RunnerMaker, device: str) -> None:
    """A worker process: until the pipe is closed, which the end of the other process does too."""
    runner = maker(device)
    with suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            pipe.send(do(runner, pipe.recv()))


# ---- Ray


@dataclass(eq=False)
class _Actor:
    handle: Any
    answer: Any = None  # reference to what the current run gives


class RayActors(Workers):
    """Actors of a Ray cluster, each with a share of a GPU, or with a CPU. sparsekit must be installed on every node.

    Args:
        maker: device -> runner, of a module.
        address: of the cluster, as `ray.init` takes it ("auto", "ray://host:10001"); None starts one on this machine.
        gpus: of each actor; 0.5 puts two on a GPU.
        count: actors there will be; a cluster that is started here has a CPU for each.

    Raises:
        SparsekitError: ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, maker: RunnerMaker, *, address: str | None = None, gpus: float = 0.0, count: int = 1) -> None:
        if find_spec("ray") is None:
            raise SparsekitError("executor 'ray' needs ray: pip install 'sparsekit-attention[ray]'")
        import ray

        self.ray, self.maker, self.gpus = ray, maker, gpus
        self.ours = not ray.is_initialized()
        if self.ours:
            options = {} if address else {"num_cpus": count, "include_dashboard": False}
            try:
                ray.init(address=address, log_to_driver=False, configure_logging=False, **options)
            except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
                raise SparsekitError(f"ray: no cluster at {address!r}: {said(error)}") from None
        self._check_room(count)

    def _check_room(self, count: int) -> None:
        """An actor that finds no place waits for one for ever, and its runs with it."""
        name, each = ("GPU", self.gpus) if self.gpus else ("CPU", 1.0)
        there = self.ray.cluster_resources().get(name, 0)
        if each * count > there:
            self.close()
            raise SparsekitError(
                f"ray: {count} workers of {each:g} {name} each, but the cluster has {there:g}: fewer --workers"
                f"{' or --gpus' if self.gpus else ''}."
            )

    def start(self, device: str) -> _Actor:
        options = {"num_gpus": self.gpus} if self.gpus else {"num_cpus": 1}
        return _Actor(self.ray.remote(_Served).options(**options).remote(self.maker, device))

    def send(self, worker: _Actor, run: Run) -> None:
        worker.answer = worker.handle.do.remote(run)

    def ready(self, workers: Sequence[_Actor]) -> list[_Actor]:
        done, _ = self.ray.wait([worker.answer for worker in workers], num_returns=1)
        return [worker for worker in workers if worker.answer in done]

    def receive(self, worker: _Actor) -> dict[str, Any]:
        try:
            result: dict[str, Any] = self.ray.get(worker.answer)
        except self.ray.exceptions.RayError as error:
            raise Died(said(error).partition(". ")[0].partition(" class_name")[0]) from None  # the first sentence
        return result

    def stop(self, worker: _Actor) -> None:
        self.ray.kill(worker.handle)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self.ours:
            self.ray.shutdown()


class _Served:
    """What an actor is: a runner, with its model."""

    def __init__(self, maker: RunnerMaker, device: str) -> None:
        self.runner = maker(device)

    def do(self, run: Run) -> dict[str, Any]:
        return do(self.runner, run)
