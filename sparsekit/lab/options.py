"""What command lines have in common: options of benches, and the words of options that hold several values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekit.errors import SparsekitError

__all__ = ["device_of", "numbers_of", "patterns_of", "words_of"]

Lengths = Annotated[str, typer.Option("--tokens", "-n", help="Prompt lengths in tokens, comma-separated.")]
Device = Annotated[str, typer.Option("--device", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")]
Rows = Annotated[Path | None, typer.Option("--output", "-o", help="JSONL file for the rows.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Default bfloat16 on a CUDA device, else float32.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="As for `explain`, with weights; default random weights.")
]
Shape = Annotated[str | None, typer.Option("--shape", help="Of random weights: llama-3.1-8b, llama-3.2-1b, ...")]


def device_of(text: str) -> str:
    """A device; `auto` is CUDA's where there is one."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text


def words_of(text: str) -> list[str]:
    """Words separated by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers_of(text: str, option: str) -> list[int]:
    """Whole numbers separated by commas."""
    words = words_of(text)
    if not words or not all(word.isdecimal() for word in words):
        raise SparsekitError(f"{option} {text!r}: whole numbers separated by commas, such as 1024,2048.")
    return [int(word) for word in words]


def patterns_of(text: str) -> list[Any]:
    """Names, and mappings as in YAML, separated by commas."""
    import yaml

    try:
        found = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        found = None
    if not found or not all(isinstance(one, (str, dict)) for one in found):
        raise SparsekitError(
            f"--patterns {text!r}: names, or mappings such as {{name: triangle, window_tokens: 256}}, separated by "
            "commas."
        )
    return list(found)
