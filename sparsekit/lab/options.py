"""What command lines have in common: options of benches, and the words of options that hold several values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekit.errors import SparsekitError, shown

__all__ = ["device_of", "numbers_of", "patterns_of", "shares_of", "tasks_of", "words_of"]

LARGEST = 2**31 - 1
MOST_NUMBERS = 1000  # of a list that is typed

Lengths = Annotated[str, typer.Option("--tokens", "-n", help="Prompt lengths in tokens, comma-separated.")]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto: a CUDA GPU if there is one, else the CPU.")
]
Rows = Annotated[Path | None, typer.Option("--output", "-o", help="JSONL file for the rows.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Default bfloat16 on a CUDA device, else float32.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="As for `explain`, with weights; default random weights.")
]
Shape = Annotated[str | None, typer.Option("--shape", help="Of random weights: llama-3.1-8b, llama-3.2-1b, ...")]


def device_of(text: str, *, elsewhere: bool = False) -> str:
    """The device that `--device` names: `auto` is a CUDA GPU if there is one, else the CPU.

    Args:
        elsewhere: whether it may be another machine's. It is not looked for then.

    Raises:
        SparsekitError: there is no such device here.
    """
    import torch

    from sparsekit.models import check_device

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not elsewhere:
        check_device(text)
    return text


def words_of(text: str) -> list[str]:
    """Words separated by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def tasks_of(text: str, corpus: str | None = None) -> list[Any]:
    """Tasks by their names, separated by commas, over a corpus where they read one."""
    from sparsekit.lab.tasks import task

    return [task(word, corpus) for word in words_of(text)]


def numbers_of(text: str, option: str) -> list[int]:
    """Whole numbers separated by commas."""
    words = words_of(text)
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise SparsekitError(f"{option} {shown(text)}: want whole numbers, comma-separated, such as 1024,2048.")
    if len(words) > MOST_NUMBERS:
        raise SparsekitError(f"{option}: {len(words):,} numbers; at most {MOST_NUMBERS:,}.")
    large = next((word for word in words if len(word) > 10 or int(word) > LARGEST), None)
    if large is not None:
        raise SparsekitError(f"{option}: {shown(large)[1:-1]} is too large; numbers go up to {LARGEST:,}.")
    return [int(word) for word in words]


def shares_of(text: str, option: str) -> list[float]:
    """Numbers from 0 to 1, separated by commas."""
    try:
        found = [float(word) for word in words_of(text)]
    except ValueError:
        found = []
    if not found or not all(0 <= share <= 1 for share in found):
        raise SparsekitError(f"{option} {shown(text)}: want shares from 0 to 1, comma-separated, such as 0.5,0.75.")
    return found


def patterns_of(text: str, option: str = "--patterns") -> list[Any]:
    """Names, and mappings as in YAML, separated by commas; read as strictly as a config."""
    from sparsekit.config import parse_yaml

    try:
        if "#" in text:  # what follows would be a comment
            raise SparsekitError(f"{option} {shown(text)}: '#' is not allowed")
        return list(parse_yaml(f"[{text}]", f"{option} {shown(text)}"))
    except SparsekitError as error:
        raise SparsekitError(
            f"{str(error).removesuffix('.')}; want names, or mappings such as {{name: triangle, window_tokens: 256}}, "
            "comma-separated."
        ) from None
