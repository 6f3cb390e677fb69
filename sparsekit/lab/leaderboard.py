"""One table of every committed measurement of a model's answers, or of its time, under a config.

`python -m sparsekit.lab.leaderboard docs/results` prints it. A row comes from a record of `sparsekit eval`, `sweep`,
`calibrate curve`, `calibrate head-curve` or `bench prefill`; other benches measure a kernel or a server, and no config.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.config import SparseConfig, load
from sparsekit.config.reuse import Reuse
from sparsekit.errors import SparsekitError, read_text, shown
from sparsekit.lab.sweep.results import lacking
from sparsekit.models import EMBEDDED
from sparsekit.patterns import parse_pattern

__all__ = ["Row", "leaderboard", "read_rows"]

DENSE = "dense"
# Fields by which records of other commands are told: benches of kernels and servers, inspections, the demo's prompts.
OTHERS = ("case", "part", "setting")
HEADINGS = ("pattern", "setting", "model", "task", "tokens", "prompts", "KL", "score", "dense", "tiles", "time",
            "of dense", "measured on", "record")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What one config did with one task at one length.

    Attributes:
        pattern: names of what its layers and heads run, dense apart, joined by " + "; "dense" for none.
        setting: which config, in its record's words.
        task: "-" where only time was measured.
        kl, kl_width: divergence from dense, nats a token, and half its 95% interval.
        score, low, high: share of the answers, and its 95% interval.
        dense_score: dense attention's, of the same run.
        tile_density: tiles visited / tiles of dense attention, over all layers.
        seconds, of_dense: time to the first token, median, and its ratio to dense of the same run on the same device.
        device, dtype, file: where it was measured, and the name of the record's file.
    """

    pattern: str
    setting: str
    model: str
    task: str
    tokens: int
    file: str
    device: str
    dtype: str
    prompts: int | None = None
    kl: float | None = None
    kl_width: float | None = None
    score: float | None = None
    low: float | None = None
    high: float | None = None
    dense_score: float | None = None
    tile_density: float | None = None
    seconds: float | None = None
    of_dense: float | None = None


def read_rows(files: Sequence[str | Path]) -> list[Row]:
    """The rows of JSONL files, by model, task and length, and then by rising KL; records of other commands have none.

    Raises:
        SparsekitError: a file that cannot be read, or a line that is no record of any command here.
    """
    rows = [row for file in map(Path, files) for row in _rows_of(file, _records(file))]
    return sorted(rows, key=lambda row: (row.model, row.task, row.tokens, row.kl is None, row.kl or 0.0, row.setting))


def leaderboard(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table; empty cells are what was not measured."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *map(_cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Row) -> list[str]:
    score = "" if row.score is None else f"{row.score:.2f}"
    if row.low is not None and row.high is not None:
        score += f" ({row.low:.2f}-{row.high:.2f})"
    kl = "" if row.kl is None else f"{row.kl:.2g}"
    if row.kl and row.kl_width is not None:
        kl += f" ± {row.kl_width:.1g}"
    return [
        row.pattern,
        row.setting.replace("|", "\\|"),
        row.model,
        row.task,
        str(row.tokens),
        "" if row.prompts is None else str(row.prompts),
        kl,
        score,
        "" if row.dense_score is None else f"{row.dense_score:.2f}",
        "" if row.tile_density is None else f"{row.tile_density:.2f}",
        "" if row.seconds is None else f"{row.seconds:.3g} s",
        "" if row.of_dense is None or row.device.startswith("cpu") else f"{row.of_dense:.2f}",
        f"{row.device}, {row.dtype}",
        row.file,
    ]


# ---- records


def _records(file: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(read_text(file, "records").splitlines(), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError:
                raise SparsekitError(f"records {str(file)!r} line {number}: {shown(line)} is no JSON.") from None
    return records


def _rows_of(file: Path, records: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    dense = {_run(record): record for record in records if _is_dense(record)}
    for number, record in enumerate(records, 1):
        where = f"{file} line {number}"
        beside = dense.get(_run(record))
        if record.get("kind") == "curve":
            yield _of_curve(record, file.name)
        elif "heads_share" in record:
            yield _of_head_curve(record, file.name)
        elif record.get("case") == "prefill":
            yield _of_prefill(record, beside, file.name, where)
        elif any(name in record for name in OTHERS):
            continue
        elif why := lacking(record):
            raise SparsekitError(f"{where}: no record of a command of sparsekit ({why}).")
        elif record.get("status", "ok") == "ok":
            yield _of_eval(record, beside, file.name)


def _run(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two records have to share for one's time to be divided by the other's."""
    names = ("command", "case", "model", "task", "tokens", "seed", "device", "dtype", "threads", "samples")
    return tuple(str(record.get(name)) for name in names)


def _is_dense(record: Mapping[str, Any]) -> bool:
    return record.get("config", "") in (None, "untouched") and record.get("status", "ok") == "ok"


def _of_eval(record: Mapping[str, Any], dense: Mapping[str, Any] | None, file: str) -> Row:
    config = record["config"]
    return Row(
        pattern=DENSE if config is None else _patterns(load(config)),
        setting=DENSE if config is None else record["label"],
        **_common(record, file),
        task=record["task"],
        prompts=record.get("samples"),
        kl=record.get("kl"),
        kl_width=record.get("kl_width"),
        score=record["score"],
        low=record.get("score_low"),
        high=record.get("score_high"),
        dense_score=None if dense is None else dense["score"],
        tile_density=record.get("tile_density"),
        seconds=record.get("ttft_s"),
        of_dense=_ratio(record, dense, "ttft_s"),
    )


def _of_curve(record: Mapping[str, Any], file: str) -> Row:
    name, start, model = record["pattern"].split("(")[0], record["start"], EMBEDDED.get(record["model"])
    density = None
    if model is not None:  # the record's is over the layers that run the pattern
        layers = model.facts.num_layers
        density = (start + record["tile_density"] * (layers - start)) / layers
    prompts = record["prompts"]
    return Row(
        pattern=name,
        setting=f"{record['pattern']} from layer {start} on",
        **_common({**record, "tokens": prompts["tokens"]}, file),
        task=", ".join(prompts["tasks"]),
        prompts=record["samples"],
        **_kl_and_scores(record),
        tile_density=density,
    )


def _of_head_curve(record: Mapping[str, Any], file: str) -> Row:
    runs = parse_pattern(record.get("pattern", "triangle"))
    how = "the last layers" if record["by"] == "layer" else f"heads by {record['by']}"
    measured = record["gates"] if record["by"] == "scores" and "gates" in record else record["probe"]
    return Row(
        pattern=runs.name,
        setting=f"{runs.name} in {record['heads_share']:.0%} of the heads: {how}; {measured}",
        **_common(record, file),
        task=record["task"],
        prompts=record["samples"],
        **_kl_and_scores(record),
        tile_density=record.get("tile_density"),
    )


def _of_prefill(record: Mapping[str, Any], dense: Mapping[str, Any] | None, file: str, where: str) -> Row:
    untouched = record["config"] == "untouched"
    try:
        pattern = DENSE if untouched else _patterns(load(Path(record["config"])))
    except SparsekitError as error:
        raise SparsekitError(f"{where}: its config has to be in the repository: {error}") from None
    return Row(
        pattern=pattern,
        setting=DENSE if untouched else record["config"],
        **_common(record, file),
        task="-",
        tile_density=record["tile_density"],
        seconds=record["ms"] / 1000,
        of_dense=_ratio(record, dense, "ms"),
    )


def _common(record: Mapping[str, Any], file: str) -> dict[str, Any]:
    return {**{name: record[name] for name in ("model", "tokens", "device", "dtype")}, "file": file}


def _kl_and_scores(record: Mapping[str, Any]) -> dict[str, Any]:
    kl = {"kl": record["kl"], "kl_width": record["kl_half_width"]}
    if record["score"] is None:  # of text, which has no answer that is right or wrong
        return kl
    score, low, high = record["score"]
    return {**kl, "score": score, "low": low, "high": high, "dense_score": record["dense_score"][0]}


def _ratio(record: Mapping[str, Any], dense: Mapping[str, Any] | None, name: str) -> float | None:
    if dense is None or dense is record or not record.get(name) or not dense.get(name):
        return None
    return float(record[name]) / float(dense[name])


def _patterns(config: SparseConfig) -> str:
    """Names of what a config runs beside dense attention, in the order of its layers; its heads' after them.

    Layers that run another one's plan are "reuse".
    """
    of_heads = [pattern for by_head in config.heads.values() for pattern in by_head.values()]
    rules = (config.default, *config.layers.values(), *of_heads)
    names = dict.fromkeys("reuse" if isinstance(rule, Reuse) else rule.name for rule in rules)
    return " + ".join(name for name in names if name != DENSE) or DENSE


def main(paths: Sequence[str]) -> None:
    """Print the table of files, and of the JSONL files of folders."""
    files = [file for path in map(Path, paths) for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    if not files:
        raise SparsekitError(f"no .jsonl file in {shown(list(paths))}: name the files, or a folder that has them.")
    print(leaderboard(read_rows(files)), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
