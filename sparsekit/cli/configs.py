"""`sparsekit configs`: those that come with sparsekit, and a folder of one's own as a repository of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekit.cli.options import Json, Model, facts_of
from sparsekit.cli.printing import busy, print_json, print_table
from sparsekit.errors import SparsekitError, nearest, read_text, shown, writing

__all__ = ["configs_app", "shipped_configs"]

configs_app = typer.Typer(
    help="Configs: those that come with sparsekit, and your own on the Hugging Face Hub.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def shipped_configs() -> dict[str, Path]:
    """The configs that come with sparsekit, by name: `smollm2-135m/trianglemix`."""
    import sparsekit

    package = Path(sparsekit.__file__).parent
    folder = next((path for path in (package / "configs", package.parent / "configs") if path.is_dir()), package)
    files = (path for path in folder.glob("*/*.yaml") if path.parent.name != "sweeps")
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(files)}


@configs_app.command("list")
def _list(as_json: Json = False) -> None:
    """List the configs that come with sparsekit: the model of each, what its layers run, what its gate found."""
    with busy("reading"):
        rows = [_described(name, path) for name, path in shipped_configs().items()]
    if as_json:
        print_json(rows)
        return
    head = ["name", "model", "layers", "heads", "patterns", "dense below", "gate"]
    print_table(head, [list(row.values()) for row in rows], right=frozenset({2, 3, 5}))


def _described(name: str, path: Path) -> dict[str, Any]:
    from sparsekit.config import load

    config = load(path)
    patterns = (pattern.name for layer in config.resolve().layers for pattern in layer.patterns)
    gate = config.provenance.get("gate", {})
    return {
        "name": name,
        "model": config.model.name,
        "layers": config.model.num_layers,
        "heads": config.model.num_heads,
        "patterns": ", ".join(dict.fromkeys(patterns)),
        "dense_below_tokens": config.dense_below_tokens,
        "gate": {True: "passed", False: "not passed"}.get(gate.get("passed"), ""),
    }


@configs_app.command("copy")
def _copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of `sparsekit configs list`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write (default: its own name, here).")
    ] = None,
) -> None:
    """Copy a config that comes with sparsekit, to be changed."""
    there = shipped_configs()
    if name not in there:
        raise SparsekitError(
            f"no config {shown(name)} comes with sparsekit; `sparsekit configs list` has their names."
            f"{nearest(name, there)}"
        )
    target = Path(there[name].name) if output is None else output
    if target.exists():
        raise SparsekitError(f"output {shown(str(target))} is there already; give another name with --output.")
    text = read_text(there[name], "config")
    with writing(target, folders=True) as part:
        part.write_text(text, encoding="utf-8")
    typer.echo(str(target))


@configs_app.command("push")
def _push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder whose .yaml files are configs of one model.")
    ],
    repo: Annotated[str, typer.Argument(metavar="owner/name", help="Repository of the hub, made if there is none.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card; upload nothing.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    model: Model = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Prompt length that the card explains.")] = 32768,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="The model's repository (default: the configs' `model.name`, if it is one)."),
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="Licence of the configs, as the hub calls it: apache-2.0.")
    ] = None,
) -> None:
    """Upload a folder's configs to the Hugging Face Hub with a generated card, once all of them are valid."""
    from sparsekit.config.publish import pack, push

    with busy("checking"):
        parcel = pack(folder, repo, model=facts_of(model), tokens=tokens, base_model=base_model, license=license)
    if parcel.left:
        typer.echo(f"stays here: {', '.join(map(shown, parcel.left))}", err=True)
    if "base_model" not in parcel.card.split("---")[1]:
        typer.echo("the card links no model, since model.name is no repository; --base-model gives it", err=True)
    if dry_run:
        typer.echo(f"to upload to {repo}: {', '.join(parcel.files)}", err=True)
        typer.echo(parcel.card, nl=False)
        return
    with busy(f"uploading to {repo}"):
        done = push(parcel, private=private)
    for name in done.older:
        typer.echo(f"warning: {repo} also holds {shown(name)}, which is not in {folder}", err=True)
    typer.echo(done.url)
