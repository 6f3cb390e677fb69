"""`sparsekit convert`: a config from another project's file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsekit.cli.options import STREAMING, Group, Model, Yaml, facts_of
from sparsekit.cli.printing import busy, print_table
from sparsekit.errors import shown

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


@convert_app.command("angelslim")
def _convert_angelslim(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="A config with `compression.name: Sparsity`.")],
    output: Yaml,
    nearest: Annotated[
        bool, typer.Option("--nearest", help="Write the nearest pattern where its selection is another one.")
    ] = False,
    model: Model = None,
) -> None:
    """Convert AngelSlim's YAML of a sparse method."""
    with busy("converting"):
        from sparsekit.config.angelslim import convert_angelslim

        config = convert_angelslim(file, output, nearest=nearest, model=facts_of(model))
    _say_source(config)
    typer.echo(str(output))


@convert_app.command("vllm-ascend")
def _convert_vllm_ascend(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="`additional_config` with trianglemix, JSON or YAML.")],
    output: Yaml,
    model: Model = None,
) -> None:
    """Convert the TriangleMix layers of vllm-ascend's additional_config."""
    with busy("converting"):
        from sparsekit.config.vllm_ascend import convert_vllm_ascend

        config = convert_vllm_ascend(file, output, model=facts_of(model))
    _say_source(config)
    typer.echo(str(output))


@convert_app.command("model-optimizer")
def _read_model_optimizer(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A checkpoint's config.json, or `sparse_cfg`, JSON or YAML.")
    ],
) -> None:
    """Say field by field why Model-Optimizer's sparse attention becomes no config."""
    from sparsekit.config.model_optimizer import read_model_optimizer

    rows, reason = read_model_optimizer(file)
    print_table(
        ["field", "value", "meaning, and what to write"], [[name, shown(value), said] for name, value, said in rows]
    )
    typer.echo(reason)


def _say_source(config: SparseConfig) -> None:
    """What of the file is not in the config: where its selection differs, and fields that do not touch it."""
    differs, left_out = config.provenance.get("differs"), config.provenance.get("left_out")
    if differs:
        typer.echo(f"another selection: {differs}", err=True)
    if left_out:
        typer.echo(f"left out, without effect on what is kept: {', '.join(left_out)}", err=True)


def _say_shape(config: SparseConfig, model: str | None) -> None:
    """What only a model can tell: whether the file's columns are its query heads."""
    if model is None:
        layers, heads = config.model.num_layers, config.model.num_heads
        typer.echo(f"for a model of {layers} layers and {heads} query heads; --model checks it", err=True)
