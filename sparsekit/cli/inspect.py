"""`sparsekit inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsekit.cli.options import Dtype, Json, JsonFile, Length, Picture, Samples, Seeds, Tasks, Weights, load_weights
from sparsekit.cli.printing import show
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
    output: JsonFile = None,
    picture: Picture = None,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure attention sinks: where they are, how strong, and how many sink tokens the model needs."""
    from sparsekit.lab.calibrate.sinks import inspect_model

    found = inspect_model(
        *load_weights(model, device, dtype),
        config,
        samples=samples,
        tokens=tokens,
        seeds=numbers_of(seeds, "--seeds"),
        tasks=words_of(tasks),
        epsilon=epsilon,
        gradient=gradient,
    )
    said = {**found.to_dict(), "model": model}
    if picture is not None:
        from sparsekit.lab.plots import draw_sinks

        draw_sinks(said, picture)
    show(said, found.table(), as_json, output)
    if not as_json:
        typer.echo("\n".join(found.answer()))
