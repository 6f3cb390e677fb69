"""`sparsekit bench dynamic`: options in, tables out."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from sparsekit.config import parse_range
from sparsekit.errors import SparsekitError
from sparsekit.lab.bench.dynamic import LENGTHS, bench_dynamic
from sparsekit.lab.bench.dynamic_rows import input_facts
from sparsekit.lab.bench.inputs import captured
from sparsekit.lab.bench.inputs import save_inputs as write_inputs
from sparsekit.lab.options import Device, Dtype, Rows, device_of, numbers_of, patterns_of, words_of
from sparsekit.models import EMBEDDED

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["command", "table"]

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("pairs", "pair_density", "{:.4f}"),
    ("tiles", "tile_density", "{:.4f}"),
    ("oracle", "oracle_tile_density", "{:.4f}"),
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


def command(
    patterns: Annotated[
        str | None, typer.Option(help="Comma-separated: names, or mappings as in YAML; default all dynamic ones.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", "-n", help="Prompt lengths in tokens, comma-separated.")
    ] = None,
    inputs: Annotated[
        str, typer.Option(help="structured, a model, a .safetensors file; comma-separated.")
    ] = "structured",
    layers: Annotated[str | None, typer.Option(help="Of the model: `5,7,10-20`; default all.")] = None,
    prompt: Annotated[
        Path | None, typer.Option(help="A text file for the model to read; default a four-key needle prompt.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Query heads of structured inputs.")] = 32,
    key_heads: Annotated[int, typer.Option(min=1, help="Key heads.")] = 8,
    dim: Annotated[int, typer.Option(min=1, help="Head size.")] = 128,
    dtype: Dtype = None,
    device: Device = "auto",
    impl: Annotated[str | None, typer.Option(help="The attention kernel; default the best here.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    sweep: Annotated[bool, typer.Option("--sweep", help="Vary the main knob: error against density.")] = False,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Selection alone; default at 2^20 tokens.")] = False,
    peers: Annotated[
        Path | None, typer.Option(help="Folder with a peers.py: the methods' own code, in the same rounds.")
    ] = None,
    repeat_ms: Annotated[float, typer.Option(help="Of each call; 0: no times.")] = 200,
    with_oracle: Annotated[
        bool, typer.Option("--oracle", help="Also the least tile density that any selector could have had.")
    ] = False,
    output: Rows = None,
    save_inputs: Annotated[
        Path | None, typer.Option(help="Capture from the one model given, write, measure nothing.")
    ] = None,
) -> None:
    """Dynamic patterns: what they keep and lose, what estimating and attending cost; correctness first."""
    where = device_of(device)
    lengths = None if tokens is None else numbers_of(tokens, "--tokens")
    of_model: dict[str, Any] = {
        "layers": None if layers is None else parse_range(layers), "seed": seed, "prompt": prompt
    }  # fmt: skip
    if save_inputs is not None:
        _save(save_inputs, words_of(inputs), lengths or LENGTHS["cpu"], where, of_model)
        return
    rows = bench_dynamic(
        methods=None if patterns is None else patterns_of(patterns), lengths=lengths, inputs=words_of(inputs),
        heads=heads, key_heads=key_heads, dim=dim, dtype=dtype, device=where, impl=impl, sweep=sweep,
        plan_only=plan_only, peers=peers, repeat_ms=repeat_ms, with_oracle=with_oracle, out=output, show=_print,
        **of_model,
    )  # fmt: skip
    failed = [row for row in rows if row["case"] == "failed"]
    for row in failed:
        typer.echo(f"failed: {_label(row)}", err=True)
    if failed:
        raise typer.Exit(1)


def _save(path: Path, inputs: Sequence[str], lengths: Sequence[int], device: str, options: Mapping[str, Any]) -> None:
    models = [name for name in inputs if name != "structured" and not name.endswith(".safetensors")]
    if len(models) != 1:
        raise SparsekitError(f"--save-inputs captures from one model: --inputs {', '.join(EMBEDDED)}, say.")
    found = [one for n in lengths for one in captured(models[0], n, device=device, **options)]
    write_inputs(path, [one.to(torch.device("cpu"), torch.bfloat16) for one in found])
    typer.echo(json.dumps([input_facts(one) for one in found]))


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 220, highlight=False)
    console.print(table(rows))
    console.file.flush()
