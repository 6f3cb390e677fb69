"""The commands. Each is a thin wrapper around a Python function, and imports what it needs when it runs.

Results go to stdout, progress and errors to stderr. An error of ours is one line, `error: ...`, and exit code 1; a
mistyped command or option is exit code 2; `sparsekit --debug COMMAND` shows the traceback.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sparsekit.cli.about import common_parameters, describe_patterns, doctor, named_models, validate
from sparsekit.cli.calibrate import calibrate_app
from sparsekit.cli.check import check
from sparsekit.cli.configs import configs_app
from sparsekit.cli.convert import convert_app
from sparsekit.cli.evaluate import eval_, report, sweep
from sparsekit.cli.head_choice import agreement, duo_attention, head_curve
from sparsekit.cli.inspect import inspect
from sparsekit.cli.options import Config, Json, Model, Seed, Tokens, command_line, facts_of
from sparsekit.cli.printing import busy, mark_first, print_doctor, print_explanation, print_json, print_table
from sparsekit.errors import SparsekitError, shown
from sparsekit.lab.options import Device, device_of

__all__ = ["app", "describe_patterns", "doctor", "main", "named_models", "validate"]

NO_PARAMETER = {"name": "", "default": "", "required": False, "meaning": "", "range": ""}

DEMO_FOLDER = Path("sparsekit-demo")


class _OneLineErrors(TyperGroup):
    """A group that prints a SparsekitError, what the system refuses, and a GPU that is full, as one line; a warning of
    ours too."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if sys.stdout is None:
            _print_error("error: stdout is closed; redirect it to /dev/null if its content is not wanted.")
            sys.exit(1)
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # of `--help` and `--version`, which run before any command
            sys.exit(_system_error(error))

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _print_warning
                found = super().invoke(ctx)
                sys.stdout.flush()
                return found
        except BrokenPipeError:  # `sparsekit ... | head`: typer ends quietly
            raise
        except SparsekitError as error:
            if ctx.params.get("debug"):
                raise
            _print_error(f"error: {' '.join(str(error).split())}")
            raise typer.Exit(1) from None
        except OSError as error:
            if ctx.params.get("debug"):
                raise
            raise typer.Exit(_system_error(error)) from None
        except RuntimeError as error:
            if ctx.params.get("debug") or not _is_out_of_memory(error):
                raise
            said = re.split(r" (?:Process|Including|Of the allocated) ", " ".join(str(error).split()))[0]
            _print_error(
                f"error: {said} Take shorter prompts, or another device or dtype; `--debug` says where it was."
            )
            raise typer.Exit(1) from None


def _is_out_of_memory(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")  # not imported for this: where it is not, it has not raised
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _print_error(line: str) -> None:
    with suppress(OSError):  # a closed or full stderr: the exit code says it
        typer.echo(line.encode("utf-8", "backslashreplace").decode(), err=True)


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    _print_error(f"warning: {' '.join(str(message).split())}")


def _system_error(error: OSError) -> int:
    """One line for what the system refused; 1, the exit code.

    What stdout could not take is dropped, or Python would try again, with a traceback, when it ends.
    """
    _print_error(f"error: {shown(error.filename) if error.filename else 'stdout'}: {error.strerror or error}.")
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    return 1


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
plots_app = typer.Typer(help="Draw pictures of a config, or of a pattern.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(plots_app, name="plots")
bench_app = typer.Typer(cls=_Benches, help="Time what runs here.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench")

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
    samples: Annotated[
        int | None, typer.Option(min=1, help="Four-key prompts (default: what the time allows).")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    also_from: Annotated[
        list[int] | None, typer.Option(min=0, max=29, help="Another row: triangle from this layer on; may be repeated.")
    ] = None,
) -> None:
    """Compare dense and sparse prefill on a small real model: answers, time, density."""
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
    rows += [
        ["any but dense", parameter["name"], parameter["default"], parameter["meaning"], parameter["range"], ""]
        for parameter in common_parameters()
    ]
    print_table(["pattern", "parameter", "default", "meaning, unit", "range", "source"], rows)


@app.command("explain")
def _explain(config: Config, tokens: Tokens, model: Model = None, as_json: Json = False) -> None:
    """Show what a config costs at a prompt length, layer by layer; needs no weights and no GPU."""
    with busy("explaining"):
        from sparsekit.config.costs import explain

        found = explain(config, tokens, facts_of(model))
    if as_json:
        print_json(found.to_dict()["layers"])
        typer.echo("".join(f"{line}\n" for line in found.settled), nl=False, err=True)
    else:
        print_explanation(found)


@app.command("validate")
def _validate(config: Config, model: Model = None) -> None:
    """Check a config and print what each layer runs."""
    with busy("validating"):
        lines = validate(config, facts_of(model))
    typer.echo("\n".join(lines))


@app.command("doctor")
def _doctor(as_json: Json = False) -> None:
    """Show versions, devices, which implementation runs where and why, and what is missing."""
    with busy("checking"):
        found = doctor()
    if as_json:
        print_json(found)
    else:
        print_doctor(found)


@app.command("models")
def _models(as_json: Json = False) -> None:
    """List the models that have a name here, what is installed of them, and how to install the rest."""
    found = named_models()
    if as_json:
        print_json(found)
        return
    head = ["name", "model", "layers", "heads", "head size", "positions", "download", "installed", "install"]
    print_table(head, [_named_row(model) for model in found])


def _named_row(model: dict[str, Any]) -> list[object]:
    if model["converted"]:
        state = "in the cache"
    elif model["parts"] > 1 and not model["installed"]:
        state = f"{model['parts_installed']} of {model['parts']} parts"
    else:
        state = "yes" if model["installed"] else "no"
    heads = f"{model['heads']} over {model['key_heads']}"
    size = f"{model['download_bytes'] / 2**20:,.0f} MiB"
    return [model["name"], model["title"], model["layers"], heads, model["head_dim"], f"{model['positions']:,}", size,
            state, "" if model["installed"] else model["install"]]  # fmt: skip


@plots_app.command("mask")
def _plots_mask(
    config: Config,
    tokens: Tokens,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write: .png, .svg or .pdf.")],
    also: Annotated[int | None, typer.Option("--also", help="Second prompt length, for its density.")] = None,
) -> None:
    """Draw which query-key pairs each pattern of a config keeps."""
    with busy("drawing"):
        from sparsekit.lab.plots import draw_masks

        draw_masks(config, tokens, output, also=also)
    typer.echo(str(output))


@plots_app.command("pattern")
def _plots_pattern(
    pattern: Annotated[
        str, typer.Argument(help="A name, drawn at settings for a short prompt, or a mapping as in YAML.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write: .png, .svg or .pdf.")],
    tokens: Annotated[
        int | None, typer.Option("--tokens", "-n", help="Prompt length in tokens, 16 to 4096 (default: 3072).")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Draw which query-key pairs one pattern keeps, a dynamic one of synthetic heads."""
    with busy("drawing"):
        from sparsekit.config import parse_yaml
        from sparsekit.lab.pattern_plot import TOKENS, draw_pattern

        draw_pattern(parse_yaml(pattern, "PATTERN"), output, tokens=TOKENS if tokens is None else tokens, seed=seed)
    typer.echo(str(output))


for _name, _measured in (("head-curve", head_curve), ("agreement", agreement), ("duo-attention", duo_attention)):
    calibrate_app.command(_name)(_measured)
app.add_typer(calibrate_app, name="calibrate")
app.add_typer(configs_app, name="configs")
for _name, _command in (
    ("check", check),
    ("inspect", inspect),
    ("eval", eval_),
    ("sweep", sweep),
    ("report", report),
):
    app.command(_name)(_command)
