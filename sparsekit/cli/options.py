"""Arguments and options that several commands take, and what their words mean."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekit.cli.printing import busy
from sparsekit.errors import SparsekitError

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A sparsekit YAML file.")]
Tokens = Annotated[int, typer.Option("--tokens", "-n", help="Length of the prompt, in tokens.")]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Check against a model: its folder, config.json, hub id, or `smollm2-135m`."),
]
Yaml = Annotated[Path, typer.Option("--output", "-o", help="Config to write, .yaml.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for machines.")]
Weights = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a folder, a .gguf file, or `smollm2-135m`; weights are read.")
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Default: the checkpoint's; on a CPU bfloat16 or float32, by a measurement."),
]
ExactDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="Default: the checkpoint's; on a CPU float32, since bfloat16's rounding hides small KL."
    ),
]
Seeds = Annotated[str, typer.Option("--seeds", help="Of the prompts, parted by commas.")]
Tasks = Annotated[str, typer.Option("--tasks", help="Parted by commas.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Prompts.")]
Lengths = Annotated[str, typer.Option("--tokens", "-n", help="Lengths of the prompts, tokens, parted by commas.")]
RecordFile = Annotated[
    Path | None, typer.Option("--records", help="JSONL file of what was measured; an interrupted run goes on from it.")
]
Picture = Annotated[Path | None, typer.Option("--picture", help="Draw it: .png, .svg or .pdf.")]
JsonFile = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")]
GateTokens = Annotated[str, typer.Option("--gate-tokens", help="Lengths that the gate checks, tokens.")]
GateSamples = Annotated[int, typer.Option("--gate-samples", min=1, help="Prompts for each task and length.")]
Bound = Annotated[float, typer.Option("--bound", help="Share of the answers that the config may lose against dense.")]
GiveBack = Annotated[
    bool, typer.Option("--give-back", help="Where the gate names layers: make them dense, and try once more.")
]
Below = Annotated[int, typer.Option("--dense-below", min=0, help="Shorter prompts run dense, tokens.")]
PatternList = Annotated[
    str,
    typer.Option("--patterns", help="Candidates, parted by commas: names, or `{name: triangle, window_tokens: 256}`."),
]
GATE_TOKENS = "2048,4096"


def command_line() -> str:
    """What was typed, for records and provenance."""
    return shlex.join(["sparsekit", *sys.argv[1:]])


def load_weights(model: str, device: str, dtype: str | None, *, exact: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer); `exact`: in float32 on a CPU where no dtype was asked for."""
    from sparsekit.models import fast_dtype, load

    with busy(f"loading {model}"):
        chosen: Any = dtype
        if dtype is None and device == "cpu":
            chosen = "float32" if exact else fast_dtype(device)
        return load(model, dtype=chosen, device=device)


def words_of(text: str) -> list[str]:
    """Words parted by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers_of(text: str, option: str) -> list[int]:
    """Whole numbers parted by commas."""
    words = words_of(text)
    if not words or not all(word.isdecimal() for word in words):
        raise SparsekitError(f"{option} {text!r}: whole numbers parted by commas, such as 1024,2048.")
    return [int(word) for word in words]


def patterns_of(text: str) -> list[Any]:
    """Names, and mappings as in YAML, parted by commas."""
    import yaml

    try:
        found = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        raise SparsekitError(
            f"--patterns {text!r}: names, or mappings such as {{name: triangle, window_tokens: 256}}, parted by commas."
        ) from None
    return list(found)
