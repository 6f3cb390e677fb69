"""What commands print: results on stdout, progress on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sparsekit.errors import writing

if TYPE_CHECKING:
    from rich.console import Console

    from sparsekit.config.costs import Explanation

# Tables that are piped into a file keep their columns; on a terminal they fit its width.
PIPE_WIDTH = 200


def stdout() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner on stderr while this runs; nothing where stderr is not a terminal."""
    from rich.console import Console

    with Console(stderr=True).status(f"{what} ..."):
        yield


def as_json_text(value: Any, indent: int | None = None) -> str:
    """JSON, which has no infinity and no NaN: null stands for them, as for the interval of a single prompt."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def print_json(value: Any) -> None:
    typer.echo(as_json_text(value, indent=2))


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]], right: frozenset[int] = frozenset()) -> None:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    stdout().print(table)


def print_explanation(found: Explanation) -> None:
    head, rows = found.table()
    typer.echo(f"{found.model or 'model'}, {found.tokens:,} tokens")
    print_table(head, rows, right=frozenset(range(2, len(head))))
    typer.echo("\n".join(found.summary()))


def print_doctor(found: dict[str, Any]) -> None:
    print_table(["package", "version"], [[name, got or "not installed"] for name, got in found["versions"].items()])
    rows = []
    for device in found["devices"]:
        capability = device["compute_capability"]
        label = f"{device['device']}: {device['name']}" + (f", compute capability {capability}" if capability else "")
        for first, (impl, can) in mark_first(list(device["implementations"].items())):
            why = f": {device['why']}" if impl == device["implementation"] else ""
            rows.append([label if first else "", impl, can + why])
    print_table(["device", "implementation", "runs?"], rows)
    targets = [[one["name"], ", ".join(one["implementations"]), one["proved"]] for one in found["targets"]]
    print_table(["kernels on", "implementation", "proved"], targets)
    for model in found["models"]:
        typer.echo(f"model {model['name']}: {'' if model['installed'] else 'not '}installed")
    for item in found["missing"]:
        typer.echo(f"missing {item['what']}, for {item['for']}: {item['fix']}")


def mark_first(items: Sequence[Any]) -> Iterator[tuple[bool, Any]]:
    return ((i == 0, item) for i, item in enumerate(items))


def show(found: dict[str, Any], table: tuple[list[str], list[list[str]]], as_json: bool, output: Path | None) -> None:
    if output is not None:
        with writing(output, folders=True) as part:
            part.write_text(as_json_text(found) + "\n", encoding="utf-8")
    if as_json:
        print_json(found)
    else:
        head, rows = table
        print_table(head, rows, right=frozenset(range(1, len(head))))
