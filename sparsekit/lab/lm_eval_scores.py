"""What lm-eval says of a task, as the fields of a record that are about quality."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsekit.errors import SparsekitError
from sparsekit.lab.stats import Z95

__all__ = ["scores_of"]


def scores_of(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The part of a record that is about quality, from lm-eval's results of one task or group."""
    told, metrics = results["results"][task], _metrics(results, task)
    if not metrics:
        raise SparsekitError(f"task {task!r}: lm-eval gives no number for it.")
    listed = [str(entry["metric"]) for entry in results["configs"].get(task, {}).get("metric_list") or []]
    chosen = next((name for first in listed for name in metrics if name.split(",")[0] == first), next(iter(metrics)))
    metric, _, filtered = chosen.partition(",")
    leaves = list(dict.fromkeys(_leaves(results, task)))
    samples = [s for leaf in leaves for s in results["samples"][leaf] if s["filter"] == (filtered or "none")]
    values = [sample[metric] for sample in samples if metric in sample]
    rises = metrics[chosen]["higher_is_better"]
    each = [float(value) for value in values] if rises and all(map(_is_number, values)) else []
    called, score, low, high = _rising(chosen, metrics[chosen])
    if each and low is not None and high is not None and all(0 <= value <= 1 for value in each):
        low, high = max(low, 0.0), min(high, 1.0)
    texts = [sample["filtered_resps"][0] for sample in samples]
    return {
        "samples": int(told.get("sample_count", {}).get(f"{metric},{filtered or 'none'}", told["sample_len"])),
        "metric": called,
        "score": score,
        "score_low": low,
        "score_high": high,
        "metrics": metrics,
        "scores": each,
        **({"texts": texts} if texts and all(isinstance(text, str) for text in texts) else {}),
        **({"subtasks": {leaf: _metrics(results, leaf) for leaf in leaves}} if leaves != [task] else {}),
    }


def _metrics(results: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """`acc`, or `exact_match,strict-match` where a filter stands before it -> value, stderr, higher_is_better."""
    told, found = results["results"][task], {}
    rising = results["higher_is_better"].get(task, {})
    for key, value in told.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr") or not _is_number(value) or not math.isfinite(value):
            continue
        stderr = told.get(f"{name}_stderr,{filtered}")
        known = _is_number(stderr) and math.isfinite(stderr)
        found[name if filtered == "none" else key] = {
            "value": float(value),
            "stderr": float(stderr) if known else None,
            "higher_is_better": rising.get(name) is not False,
        }
    return found


def _rising(name: str, metric: Mapping[str, Any]) -> tuple[str, float, float | None, float | None]:
    """(name, score, low, high) that grow with quality: the metric; 1 / perplexity; or the metric's negative."""
    value, width = metric["value"], None if metric["stderr"] is None else Z95 * metric["stderr"]
    if not metric["higher_is_better"] and name.split(",")[0].endswith("perplexity"):
        low, high = (None, None) if width is None else (1 / (value + width), 1 / max(value - width, 1.0))
        return f"1/{name}", 1 / value, low, high
    if not metric["higher_is_better"]:
        name, value = f"-{name}", -value
    return (name, value, None, None) if width is None else (name, value, value - width, value + width)


def _leaves(results: Mapping[str, Any], task: str) -> list[str]:
    """The tasks of a group, of its groups too; a task itself."""
    if task in results["samples"]:
        return [task]
    return [leaf for child in results["group_subtasks"].get(task, []) for leaf in _leaves(results, child)]


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real | np.bool_)
