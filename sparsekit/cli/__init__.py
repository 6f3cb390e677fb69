"""The commands. Each is a thin wrapper around a Python function, and imports what it needs when it runs.

Results go to stdout, progress and errors to stderr. An error of ours is one line, `error: ...`, and exit code 1; a
mistyped command or option is exit code 2; `sparsekit --debug COMMAND` shows the traceback.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from sparsekit.cli.about import describe_patterns, doctor, validate
from sparsekit.cli.calibrate import calibrate_app, inspect
from sparsekit.cli.evaluate import eval_, report, sweep
from sparsekit.cli.options import (
    Config,
    Json,
    Model,
    Tokens,
    Yaml,
    command_line,
)
from sparsekit.cli.printing import (
    busy,
    mark_first,
    print_doctor,
    print_explanation,
    print_json,
    print_table,
)
from sparsekit.errors import SparsekitError
from sparsekit.lab.options import Device, device_of

if TYPE_CHECKING:
    from sparsekit.config import ArchFacts

__all__ = ["app", "describe_patterns", "doctor", "main", "validate"]

NO_PARAMETER = {"name": "", "default": "", "required": False, "meaning": "", "range": ""}

DEMO_FOLDER = Path("sparsekit-demo")


class _OneLineErrors(TyperGroup):
    """A group that prints a SparsekitError as one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SparsekitError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None


class _Benches(TyperGroup):
    """The commands of `sparsekit.lab.bench`, which import torch and the kernels: read when one of them is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self._read())

    def get_command(self, ctx: Any, name: str) -> Any:
        return self._read().get(name)

    def _read(self) -> Any:
        if not self.commands:
            from sparsekit.lab.bench import BENCHES

            benches = typer.Typer(rich_markup_mode=None)
            for name, command in BENCHES.items():
                benches.command(name)(command)
            self.commands = typer.main.get_group(benches).commands
        return self.commands


app = typer.Typer(
    name="sparsekit",
    cls=_OneLineErrors,
    help="Long prompts made cheap: sparse-attention prefill for Hugging Face language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
plots_app = typer.Typer(help="Draw pictures of a config.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(plots_app, name="plots")
bench_app = typer.Typer(cls=_Benches, help="Time what runs here.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench")

convert_app = typer.Typer(
    help="Write a config from another project's file.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(convert_app, name="convert")


def main() -> None:
    """The `sparsekit` command."""
    app(prog_name="sparsekit")


def _print_version(asked: bool) -> None:
    if asked:
        from sparsekit import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


# ---- the commands


@app.command("demo")
def _demo(
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder for pictures and records.")] = DEMO_FOLDER,
    samples: Annotated[int | None, typer.Option(min=1, help="Four-key prompts; default what the time allows.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    device: Device = "cpu",
    also_from: Annotated[
        list[int] | None, typer.Option(min=0, max=29, help="A further row: triangle from here.")
    ] = None,
) -> None:
    """Dense against sparse prefill on a small real model: answers, time, density."""
    from sparsekit.lab.demo import SETTINGS, run_demo, triangle_from

    settings = (*SETTINGS, *map(triangle_from, also_from or ()))
    run_demo(out, samples=samples, seed=seed, device=device_of(device), settings=settings, command=command_line())


@app.command("patterns")
def _patterns(as_json: Json = False) -> None:
    """List the patterns with their parameters."""
    found = describe_patterns()
    if as_json:
        print_json(found)
        return
    rows = [
        [
            pattern["name"] if first else "",
            parameter["name"],
            "required" if parameter["required"] else parameter["default"],
            parameter["meaning"],
            parameter["range"],
            pattern["source"] if first else "",
        ]
        for pattern in found
        for first, parameter in mark_first(pattern["parameters"] or [NO_PARAMETER])
    ]
    print_table(["pattern", "parameter", "default", "meaning, unit", "range", "source"], rows)


@app.command("explain")
def _explain(config: Config, tokens: Tokens, model: Model = None, as_json: Json = False) -> None:
    """What a config costs at a prompt length, layer by layer. Needs no weights and no GPU."""
    with busy("explaining"):
        from sparsekit.config.costs import explain

        found = explain(config, tokens, _facts(model))
    if as_json:
        print_json(found.to_dict()["layers"])
    else:
        print_explanation(found)


@app.command("validate")
def _validate(config: Config, model: Model = None) -> None:
    """Check a config, and print what each layer runs."""
    with busy("validating"):
        lines = validate(config, _facts(model))
    typer.echo("\n".join(lines))


@app.command("doctor")
def _doctor(as_json: Json = False) -> None:
    """Versions, devices, which implementation runs where and why, and what is missing."""
    with busy("looking around"):
        found = doctor()
    if as_json:
        print_json(found)
    else:
        print_doctor(found)


@plots_app.command("mask")
def _plots_mask(
    config: Config,
    tokens: Tokens,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write: .png, .svg or .pdf.")],
    also: Annotated[int | None, typer.Option("--also", help="A second length whose density is written below.")] = None,
) -> None:
    """Draw which query-key pairs each pattern of a config keeps."""
    with busy("drawing"):
        from sparsekit.lab.plots import draw_masks

        draw_masks(config, tokens, output, also=also)
    typer.echo(str(output))


@convert_app.command("minference")
def _convert_minference(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="Patterns of heads, as in minference/configs.")],
    output: Yaml,
) -> None:
    """MInference's JSON file of head patterns."""
    with busy("converting"):
        from sparsekit.config.convert import convert_minference

        convert_minference(file, output)
    typer.echo(str(output))


@convert_app.command("xattention")
def _convert_xattention(
    file: Annotated[Path, typer.Argument(metavar="TABLE", help="Thresholds, a row a layer: text, JSON or Python.")],
    output: Yaml,
    table: Annotated[str | None, typer.Option("--table", help="Its name, where the file holds several.")] = None,
    stride: Annotated[int | None, typer.Option("--stride", help="What it was made for; default by its name.")] = None,
) -> None:
    """XAttention's table of thresholds."""
    with busy("converting"):
        from sparsekit.config.convert import convert_xattention

        convert_xattention(file, output, table=table, stride=stride)
    typer.echo(str(output))


app.add_typer(calibrate_app, name="calibrate")
for _name, _command in (("inspect", inspect), ("eval", eval_), ("sweep", sweep), ("report", report)):
    app.command(_name)(_command)


def _facts(model: str | None) -> ArchFacts | None:
    if model is None:
        return None
    from sparsekit.models import facts

    return facts(model)
