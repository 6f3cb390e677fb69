"""Arguments and options that several commands take, and what their words mean."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekit.cli.printing import busy
from sparsekit.lab.options import device_of

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
Seeds = Annotated[str, typer.Option("--seeds", help="Seeds of the prompts, comma-separated.")]
Tasks = Annotated[str, typer.Option("--tasks", help="Comma-separated.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Prompts.")]
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
    typer.Option("--patterns", help="Candidates, comma-separated: names, or `{name: triangle, window_tokens: 256}`."),
]
GATE_TOKENS = "2048,4096"


def command_line() -> str:
    """What was typed, for records and provenance."""
    return shlex.join(["sparsekit", *sys.argv[1:]])


def load_weights(model: str, device: str, dtype: str | None, *, exact: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer); `exact`: in float32 on a CPU where no dtype was asked for."""
    from sparsekit.models import fast_dtype, load

    device = device_of(device)
    with busy(f"loading {model}"):
        chosen: Any = dtype
        if dtype is None and device == "cpu":
            chosen = "float32" if exact else fast_dtype(device)
        return load(model, dtype=chosen, device=device)
