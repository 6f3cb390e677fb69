"""`sparsekit bench dynamic`: options in, tables out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import yaml

from sparsekit.errors import SparsekitError
from sparsekit.lab.bench.dynamic import (
    DTYPES,
    LENGTHS,
    bench_dynamic,
    input_facts,
)
from sparsekit.lab.bench.inputs import captured, save_inputs
from sparsekit.models import EMBEDDED

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["main", "table"]

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("pairs", "pair_density", "{:.4f}"),
    ("tiles", "tile_density", "{:.4f}"),
    ("recall", "recall", "{:.4f}"),
    ("worst head", "recall_worst_head", "{:.4f}"),
    ("error L1", "error_l1", "{:.4f}"),
    ("error L2", "error_l2", "{:.4f}"),
    ("index ms", "index_ms", "{:.3f}"),
    ("attend ms", "attend_ms", "{:.3f}"),
    ("ms", "ms", "{:.3f}"),
    ("x dense", "times_dense", "{:.2f}"),
    ("x own", "times_own_dense", "{:.2f}"),
    ("x peer", "times_peer", "{:.2f}"),
    ("host ms", "index_host_ms", "{:.3f}"),
)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of one input, or of the correctness check, as a table."""
    from rich.box import SIMPLE
    from rich.table import Table

    first = rows[0]
    checked = all("input" not in row for row in rows)
    layer = f", layer {first['layer']}" if first.get("layer") is not None else ""
    title = "correctness" if checked else f"{first['input']}{layer}, {first['tokens']:,} tokens"
    columns: Sequence[tuple[str, str, str]] = _COLUMNS
    if checked:
        columns = [(name.replace("_", " "), name, "{:.1e}") for name in ("error", "sdpa_error", "recall_error")]
    columns = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    out = Table(box=SIMPLE, pad_edge=False, title=title, title_justify="left")
    out.add_column("", overflow="fold")
    for name, _, _ in columns:
        out.add_column(name, justify="right")
    peak = any(row.get("select_peak_bytes") is not None for row in rows)
    if peak:
        out.add_column("peak MiB", justify="right")
    for row in rows:
        cells = ["" if row.get(key) is None else form.format(row[key]) for _, key, form in columns]
        if peak:
            bytes_ = row.get("select_peak_bytes")
            cells.append("" if bytes_ is None else f"{bytes_ / 2**20:.0f}")
        out.add_row(_label(row), *cells)
    return out


def _label(row: Mapping[str, Any]) -> str:
    if row["case"] == "dense":
        return f"dense ({row['impl']})"
    if row["case"] == "peer":
        said = ", ".join(f"{key} {value}" for key, value in (row.get("parameters") or {}).items())
        name = f"{row['peer']} ({said})" if said else str(row["peer"])
    else:
        name = row["label"]
    tail = [f": {row[key]}" for key in ("missing", "why") if key in row]
    sync = ", waits for the device" if row.get("host_sync") else ""
    return f"{name}{sync}{''.join(tail)}"


def main(argv: Sequence[str] | None = None) -> int:
    """`sparsekit bench dynamic`."""
    parser = argparse.ArgumentParser(
        prog="sparsekit bench dynamic",
        description="Dynamic patterns: what they keep and lose, what estimating and attending cost; correctness first.",
    )
    parser.add_argument("--methods", nargs="+", help="names, or YAML mappings; default all dynamic patterns")
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt lengths, tokens")
    parser.add_argument("--inputs", nargs="+", default=["structured"], help="structured, a model, a .safetensors file")
    parser.add_argument("--layers", type=int, nargs="+", help="of the model; default all")
    parser.add_argument("--prompt", help="a text file for the model to read; default a four-key needle prompt")
    parser.add_argument("--heads", type=int, default=32, help="of structured inputs")
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)}; default bfloat16 on a CUDA device, else float32")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default cuda where there is one")
    parser.add_argument("--impl", help="the attention kernel; default the best here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweep", action="store_true", help="vary each method's main knob: error against density")
    parser.add_argument("--plan-only", action="store_true", help="selection alone; by default at 2^20 tokens")
    parser.add_argument("--peers", metavar="FOLDER", help="with a peers.py: the methods' own code, in the same rounds")
    parser.add_argument("--repeat-ms", type=float, default=200, help="of each call; 0: no times")
    parser.add_argument("--out", metavar="FILE", help="JSONL file for the rows")
    parser.add_argument(
        "--save-inputs", metavar="FILE", help="capture from the one model given, write, measure nothing"
    )
    given = vars(parser.parse_args(argv))
    save = given.pop("save_inputs")
    try:
        if save is not None:
            return _save(save, given)
        methods = given.pop("methods")
        rows = bench_dynamic(methods=methods and [_method(one) for one in methods], show=_print, **given)
    except SparsekitError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    failed = [row for row in rows if row["case"] == "failed"]
    for row in failed:
        print(f"failed: {_label(row)}", file=sys.stderr)
    return 1 if failed else 0


def _method(text: str) -> str | dict[str, Any]:
    """A name, or a mapping that YAML reads."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SparsekitError(f"methods: {text!r} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(found, (str, dict)):
        raise SparsekitError(f"methods: {text!r} is neither a name nor a mapping with `name` and parameters.")
    return found


def _save(path: str, given: Mapping[str, Any]) -> int:
    models = [name for name in given["inputs"] if name != "structured" and not name.endswith(".safetensors")]
    if len(models) != 1:
        raise SparsekitError(f"--save-inputs captures from one model: --inputs {', '.join(EMBEDDED)}, say.")
    options = {name: given[name] for name in ("layers", "seed", "prompt")}
    device = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    found = [
        one for n in given["lengths"] or LENGTHS["cpu"] for one in captured(models[0], n, device=device, **options)
    ]
    save_inputs(path, [one.to(torch.device("cpu"), torch.bfloat16) for one in found])
    print(json.dumps([input_facts(one) for one in found]))
    return 0


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 220, highlight=False)
    console.print(table(rows))
    console.file.flush()
