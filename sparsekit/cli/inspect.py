"""`sparsekit inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsekit.cli.options import (
    ExactDtype,
    Json,
    JsonFile,
    Length,
    Picture,
    Samples,
    Seeds,
    Tasks,
    Weights,
    command_line,
    load_weights,
)
from sparsekit.cli.printing import print_table, show
from sparsekit.lab.options import Device, numbers_of, words_of


def inspect(
    model: Weights,
    config: Annotated[str | None, typer.Option("--config", help="Also measure what this config drops.")] = None,
    gradient: Annotated[bool, typer.Option("--gradient", help="Also the gradient that the config drops.")] = False,
    samples: Samples = 4,
    tokens: Length = 1024,
    seeds: Seeds = "0,1",
    tasks: Tasks = "needle4,passkey",
    epsilon: Annotated[float, typer.Option("--epsilon", help="Sink score above which a token is a sink.")] = 0.3,
    kept_sinks: Annotated[
        str,
        typer.Option("--kept-sinks", help="Sink tokens kept while KL is measured, comma-separated; empty: it is not."),
    ] = "0,1,4,8",
    output: JsonFile = None,
    picture: Picture = None,
    device: Device = "auto",
    dtype: ExactDtype = None,
    as_json: Json = False,
) -> None:
    """Measure attention sinks: where and how strong they are, what they do, and how many sink tokens a model needs."""
    from sparsekit.lab.calibrate.sinks import inspect_model

    found = inspect_model(
        *load_weights(model, device, dtype, exact=True),
        config,
        samples=samples,
        tokens=tokens,
        seeds=numbers_of(seeds, "--seeds"),
        tasks=words_of(tasks),
        epsilon=epsilon,
        gradient=gradient,
        kept_sinks=numbers_of(kept_sinks, "--kept-sinks") if kept_sinks else (),
    )
    said = {**found.to_dict(), "model": model, "command": command_line()}
    if picture is not None:
        from sparsekit.lab.plots import draw_sinks

        draw_sinks(said, picture)
    show(said, found.table(), as_json, output)
    if as_json:
        return
    for title, (head, rows) in found.more_tables():
        typer.echo(title)
        print_table(head, rows, right=frozenset(range(1, len(head))))
    typer.echo("\n".join(found.answer()))
