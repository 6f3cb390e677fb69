"""`sparsekit check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekit.cli.options import Config, ExactDtype, Json, Weights, command_line, load_weights
from sparsekit.cli.printing import print_json, print_table
from sparsekit.errors import SparsekitError
from sparsekit.lab.options import LARGEST, Device


def check(
    model: Weights,
    config: Config,
    prompts: Annotated[
        list[Path],
        typer.Option(
            "--prompts",
            "-p",
            help="Prompts: a .jsonl file, a text, token ids or chat messages a line; or a text file, one prompt. May "
            "be repeated.",
        ),
    ],
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="Mean KL from dense, nats a token, at most (default: the config's `budget`)."),
    ] = None,
    next_tokens: Annotated[
        int, typer.Option("--next-tokens", min=1, max=LARGEST, help="Tokens after each prompt that are compared.")
    ] = 16,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Config to write, .yaml: what holds the budget, and what it was held on."),
    ] = None,
    device: Device = "auto",
    dtype: ExactDtype = None,
    as_json: Json = False,
) -> None:
    """Hold a config to its accuracy budget on your own prompts, and name the layers that exceed it."""
    import sparsekit
    from sparsekit.config import load
    from sparsekit.lab.progress import progress
    from sparsekit.lab.provenance import made_on
    from sparsekit.patch.user_prompts import read_prompts

    asked = load(config)
    if budget is not None:
        asked = load({**asked.to_dict(), "budget": {"kl": budget}})
    if output is not None and asked.budget is None:
        raise SparsekitError(
            "--output needs a budget that the config is to hold: --budget, or `budget:` in the config."
        )
    read = [prompt for file in prompts for prompt in read_prompts(file)]
    loaded, tokenizer = load_weights(model, device, dtype, exact=True)
    with progress("check", None) as bar:
        found = sparsekit.check(loaded, asked, read, tokenizer=tokenizer, next_tokens=next_tokens, step=bar)
    if as_json:
        print_json({**found.to_dict(), "model": model, "command": command_line(), **made_on(loaded)})
    else:
        for head, rows in filter(lambda table: table[1], (found.table(), found.layers_table())):
            print_table(head, rows, right=frozenset(range(1, len(head))))
        typer.echo("\n".join(found.lines()))
    useful = found.kept and not found.nothing_left
    if found.held is False and (output is None or not useful):
        how = "; --output FILE writes the config with them dense" if useful else "; nothing is written" * bool(output)
        raise SparsekitError(f"{found.verdict().removesuffix('.')}{how}.")
    if output is not None:
        made: dict[str, Any] = {"command": command_line(), **made_on(loaded)}
        provenance = {**found.config.provenance, "check": made}
        load({**found.config.to_dict(), "provenance": provenance}).dump(output, folders=True)
        if found.held is False:
            typer.echo(f"warning: {found.verdict()}", err=True)
        typer.echo(f"written to {output}")
