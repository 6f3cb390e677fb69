"""`sparsekit convert`: a config from another project's file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsekit.cli.options import STREAMING, Group, Model, Yaml, facts_of
from sparsekit.cli.printing import busy

if TYPE_CHECKING:
    from sparsekit.config import SparseConfig

__all__ = ["convert_app"]

convert_app = typer.Typer(
    help="Write a config from another project's file.", no_args_is_help=True, rich_markup_mode=None
)


@convert_app.command("minference")
def _convert_minference(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="Head patterns, as in minference/configs.")],
    output: Yaml,
    model: Model = None,
) -> None:
    """Convert MInference's JSON file of head patterns."""
    with busy("converting"):
        from sparsekit.config.convert import convert_minference

        config = convert_minference(file, output, model=facts_of(model))
    _say_shape(config, model)
    typer.echo(str(output))


@convert_app.command("xattention")
def _convert_xattention(
    file: Annotated[Path, typer.Argument(metavar="TABLE", help="Thresholds, one row per layer: text, JSON or Python.")],
    output: Yaml,
    table: Annotated[str | None, typer.Option("--table", help="Name of the table, if there are several.")] = None,
    stride: Annotated[int | None, typer.Option("--stride", help="Stride of the thresholds (default: by name).")] = None,
    model: Model = None,
) -> None:
    """Convert XAttention's table of thresholds."""
    with busy("converting"):
        from sparsekit.config.convert import convert_xattention

        config = convert_xattention(file, output, table=table, stride=stride, model=facts_of(model))
    _say_shape(config, model)
    typer.echo(str(output))


@convert_app.command("duo-attention")
def _convert_duo_attention(
    file: Annotated[Path, typer.Argument(metavar="FILE.tsv", help="Scores, a row per layer, a column per key head.")],
    output: Yaml,
    share: Annotated[float, typer.Option("--share", help="Share of the key heads that stream, the lowest scores.")],
    pattern: Annotated[
        str, typer.Option("--pattern", help="What these heads run, as in YAML; DuoAttention's config.json has its own.")
    ] = STREAMING,
    group: Group = None,
    model: Model = None,
) -> None:
    """Convert DuoAttention's scores of key heads."""
    with busy("converting"):
        from sparsekit.config import parse_yaml
        from sparsekit.config.convert import convert_duo_attention

        runs = parse_yaml(pattern, "--pattern")
        config = convert_duo_attention(file, output, share=share, pattern=runs, group=group, model=facts_of(model))
    _say_shape(config, model)
    typer.echo(str(output))


@convert_app.command("kascade")
def _convert_kascade(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.npy", help="A head map, as in kascade's results/head_mappings.")
    ],
    output: Yaml,
    pattern: Annotated[str, typer.Option("--pattern", help="What the anchor layers run, as in YAML.")] = "xattention",
    anchors: Annotated[
        str | None, typer.Option("--anchors", help="Anchor layers, such as `0,2,8` (default: by the file's name).")
    ] = None,
    group: Group = None,
    model: Model = None,
) -> None:
    """Convert Kascade's head map: which layers reuse whose choice."""
    with busy("converting"):
        from sparsekit.config import parse_range, parse_yaml
        from sparsekit.config.kascade import convert_kascade

        runs, own = parse_yaml(pattern, "--pattern"), None if anchors is None else parse_range(anchors)
        config = convert_kascade(file, output, pattern=runs, anchors=own, group=group, model=facts_of(model))
    _say_shape(config, model)
    typer.echo(str(output))


def _say_shape(config: SparseConfig, model: str | None) -> None:
    """What only a model can tell: whether the file's columns are its query heads."""
    if model is None:
        layers, heads = config.model.num_layers, config.model.num_heads
        typer.echo(f"for a model of {layers} layers and {heads} query heads; --model checks it", err=True)
