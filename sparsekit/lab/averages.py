"""RULER's average: the mean over tasks of each config at each length, and its paired difference from dense."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from sparsekit.errors import SparsekitError
from sparsekit.lab.stats import Z95, standard_error

__all__ = ["average_table", "averages"]

Prompts = dict[tuple[str, int], list[float]]  # (task, seed) -> a score for each prompt


def averages(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each config and length, in the order of the records.

    `score` is the mean over tasks of the means over prompts; `difference` that minus dense's on the same prompts, with
    half its 95% interval, `difference_width` (infinite where a task has one prompt); `tasks`, `prompts`, mean `kl` and
    `density`. A config counts only tasks and seeds that dense has too at that length; `tasks` shows what it lacks.

    Raises:
        SparsekitError: no record of dense at a length.
    """
    cells: dict[tuple[str, str, int], dict[tuple[str, int], Mapping[str, Any]]] = {}
    for record in records:
        if record.get("status", "ok") == "ok":
            known = "dense" if record.get("config") is None else record["label"]  # `sparsekit eval` writes no key
            key = record.get("config_key", known), record["label"], record["tokens"]
            cells.setdefault(key, {})[record["task"], record["seed"]] = record
    dense = {tokens: found for (key, _, tokens), found in cells.items() if key == "dense"}
    rows = []
    for (_, label, tokens), found in cells.items():
        if tokens not in dense:
            raise SparsekitError(f"{label} at {tokens} tokens: there is no record of dense to hold it against.")
        both = {place: (record, dense[tokens][place]) for place, record in found.items() if place in dense[tokens]}
        scores: dict[str, list[float]] = {}
        apart: dict[str, list[float]] = {}
        for (task, _), (mine, other) in both.items():
            scores.setdefault(task, []).extend(mine["scores"])
            pairs = zip(mine["scores"], other["scores"], strict=True)
            apart.setdefault(task, []).extend(a - b for a, b in pairs)
        if not scores:
            continue
        errors = [standard_error(values) for values in apart.values()]
        kls = [mine["kl"] for mine, _ in both.values() if mine.get("kl") is not None]
        rows.append(
            {
                "label": label,
                "tokens": tokens,
                "score": mean(map(mean, scores.values())),
                "difference": mean(map(mean, apart.values())),
                "difference_width": Z95 * math.sqrt(sum(error**2 for error in errors)) / len(errors),
                "tasks": len(scores),
                "prompts": sum(map(len, scores.values())),
                "kl": mean(kls) if kls else None,
                "density": mean(mine["density"] for mine, _ in both.values()),
            }
        )
    return rows


def average_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The same as Markdown: a row for each config; a length's cell has score and difference, in points of 100."""
    rows = averages(records)
    lengths = sorted({row["tokens"] for row in rows})
    most = {tokens: max(row["tasks"] for row in rows if row["tokens"] == tokens) for tokens in lengths}
    found = {(row["label"], row["tokens"]): row for row in rows}

    dense = next((record["label"] for record in records if record.get("config") is None), "dense")

    def cell(label: str, tokens: int) -> str:
        row = found.get((label, tokens))
        if row is None:
            return ""
        text = f"{100 * row['score']:.1f}"
        if label != dense:
            text += f" ({100 * row['difference']:+.1f} ± {100 * row['difference_width']:.1f})"
        return text if row["tasks"] == most[tokens] else f"{text}, {row['tasks']} of {most[tokens]} tasks"

    lines = [["config", *(f"{tokens:,}" for tokens in lengths)], ["---", *["---:"] * len(lengths)]]
    labels = dict.fromkeys(row["label"] for row in rows)
    lines += [[label.replace("|", "\\|"), *(cell(label, tokens) for tokens in lengths)] for label in labels]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
