"""What ran, by config: chunks, rows, pairs and time of each layer, and what fell back with the reason.

Each worker counts for itself and writes its counts to a file of its own once a second, where something changed; the
API server's collector reads the files when Prometheus asks. `report()` has the same, for `collective_rpc`.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparsekit.kernels.select.totals import plan_totals
from sparsekit.plan import BlockPlan

__all__ = ["FOLDER", "METER", "LayerCounts", "Meter", "counts_of_workers"]

FOLDER = "SPARSEKIT_METRICS_DIR"  # set by the API server, for its workers
PENDING = 256  # intervals of a layer that may wait to be read


@dataclass
class LayerCounts:
    """One layer under one config, since the start: chunks and rows run here; pairs kept, and those of dense attention.

    `seconds` is the device's time, on a GPU between two events.
    """

    patterns: str = ""
    chunks: int = 0
    rows: int = 0
    kept_pairs: float = 0
    causal_pairs: float = 0
    seconds: float = 0
    pending: deque[Any] = field(default_factory=deque)
    on_device: torch.Tensor | None = None
    summed: Any = None  # the event after which `on_device` is there

    def settle(self) -> None:
        """Add the times that devices have finished."""
        while self.pending and self.pending[0][1].query():
            start, end = self.pending.popleft()
            self.seconds += start.elapsed_time(end) / 1000

    def to_dict(self) -> dict[str, Any]:
        density = self.kept_pairs / self.causal_pairs if self.causal_pairs else None
        return {
            "patterns": self.patterns, "chunks": self.chunks, "rows": self.rows, "kept_pairs": self.kept_pairs,
            "causal_pairs": self.causal_pairs, "density": density, "seconds": self.seconds,
        }  # fmt: skip


class Meter:
    """A worker's counts."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything; the layers of another model follow."""
        with self.lock:
            self.layers: dict[tuple[str, int], LayerCounts] = {}  # by config and layer
            self.fallbacks: Counter[tuple[str, str]] = Counter()  # by config and reason
            self.about: dict[str, Any] = {}
            self.changed = False

    def fall_back(self, config: str, why: str) -> None:
        """A prompt's chunk that is vLLM's in every layer, or in the layers of which `why` tells."""
        self.fallbacks[config, why] += 1
        self.changed = True

    @contextmanager
    def measured(self, config: str, layer: int, device: torch.device) -> Iterator[LayerCounts]:
        """The time of a layer's chunk; what it kept is added to what this yields."""
        counts = self.layers.setdefault((config, layer), LayerCounts())
        if device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            yield counts
            events[1].record()
            with self.lock:
                counts.pending.append(events)
                if len(counts.pending) > PENDING:
                    counts.settle()
        else:
            start = time.perf_counter()
            yield counts
            counts.seconds += time.perf_counter() - start
        counts.chunks += 1
        self.changed = True

    def keep(self, counts: LayerCounts, plan: BlockPlan, pairs: int | None, heads: int) -> None:
        """Add the pairs that a chunk kept: as they were told, or as its plan says, counted where it lies."""
        with self.lock:
            if pairs is not None:
                counts.kept_pairs += pairs
                return
            totals = plan_totals(plan)
            sums = (totals.sums[0].double() + totals.anchors[0]) * (heads / plan.heads)
            counts.on_device = sums if counts.on_device is None else counts.on_device + sums
            if counts.on_device.is_cuda:  # another thread reads it, on another stream
                counts.summed = torch.cuda.Event()
                counts.summed.record()

    def report(self, *, wait: bool = True) -> dict[str, Any]:
        """What is known of this worker, in plain numbers; with `wait`, of all that was started.

        `configs` has `layers` by number and `fallbacks` by reason, for each config that ran or was chosen.
        """
        with self.lock:
            taken = [(counts, counts.on_device, counts.summed) for counts in self.layers.values()]
            last = [counts.pending[-1][1] for counts in self.layers.values() if counts.pending]
            for counts in self.layers.values():
                counts.on_device = counts.summed = None
        # Reading a number waits for the device: without the lock, which the thread that starts the kernels takes.
        for end in [*(summed for *_, summed in taken if summed is not None), *(last if wait else ())]:
            end.synchronize()
        read = [(counts, float(sums)) for counts, sums, _ in taken if sums is not None]
        with self.lock:
            for counts, kept in read:
                counts.kept_pairs += kept
            for counts in self.layers.values():
                counts.settle()
            configs: dict[str, Any] = {}
            for (config, layer), counts in sorted(self.layers.items()):
                _of(configs, config)["layers"][str(layer)] = counts.to_dict()
            for (config, why), chunks in self.fallbacks.items():
                _of(configs, config)["fallbacks"][why] = chunks
            return {**self.about, "configs": configs}

    def publish(self, rank: int) -> None:
        """From now on write the counts for the API server, from a thread that wakes once a second."""
        folder = os.environ.get(FOLDER)
        if folder and not getattr(self, "_thread", None):
            path = Path(folder) / f"{os.getpid()}-{rank}.json"
            self._thread = threading.Thread(target=self._write, args=(path,), daemon=True, name="sparsekit-metrics")
            self._thread.start()

    def _write(self, path: Path) -> None:
        while path.parent.is_dir():
            if self.changed:
                self.changed = False
                part = path.with_suffix(".part")
                part.write_text(json.dumps(self.report(wait=False)), encoding="utf-8")
                part.replace(path)
            time.sleep(1)


def _of(configs: dict[str, Any], config: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = configs.setdefault(config, {"layers": {}, "fallbacks": {}})
    return found


METER = Meter()


def counts_of_workers() -> list[dict[str, Any]]:
    """What the workers of this server have written."""
    folder = os.environ.get(FOLDER)
    return [json.loads(path.read_text("utf-8")) for path in sorted(Path(folder).glob("*.json"))] if folder else []


class _Collector:
    """Prometheus' view of the workers' counts."""

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        layered = {
            "chunks": "Prompt chunks that sparsekit ran in a layer.",
            "rows": "Query rows that sparsekit ran in a layer.",
            "kept_pairs": "Query-key pairs that a layer's patterns kept, all heads.",
            "causal_pairs": "Query-key pairs of dense attention over the same rows, all heads.",
            "seconds": "Device time of sparsekit in a layer.",
        }
        configs = [
            ([str(worker.get("rank", 0)), config], counts)
            for worker in counts_of_workers()
            for config, counts in worker["configs"].items()
        ]
        labels = ["rank", "config", "layer", "patterns"]
        for name, text in layered.items():
            family = CounterMetricFamily(f"sparsekit:{name}", text, labels=labels)
            for where, config in configs:
                for layer, counts in config["layers"].items():
                    family.add_metric([*where, layer, counts["patterns"]], counts[name])
            yield family
        density = GaugeMetricFamily(
            "sparsekit:density", "Kept pairs over causal pairs, since the start.", labels=labels
        )
        fell = CounterMetricFamily(
            "sparsekit:fallback_chunks", "Prompt chunks that ran dense, by reason.", labels=["rank", "config", "reason"]
        )
        for where, config in configs:
            for layer, counts in config["layers"].items():
                if counts["density"] is not None:
                    density.add_metric([*where, layer, counts["patterns"]], counts["density"])
            for reason, count in config["fallbacks"].items():
                fell.add_metric([*where, reason], count)
        yield density
        yield fell


@cache
def expose() -> None:
    """Show the workers' counts beside this process's Prometheus metrics; once. A server that starts another one hands
    its environment on: the folder in it is not this server's."""
    from prometheus_client import REGISTRY

    folder = tempfile.mkdtemp(prefix="sparsekit-metrics-")
    os.environ[FOLDER] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    REGISTRY.register(_Collector())
