"""What a model is called: embedded models, hub ids, folders and files; and errors about them in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsekit.config.ranges import MOST
from sparsekit.errors import SparsekitError, named_path, nearest, shown
from sparsekit.models.embedded import EMBEDDED

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def local_path(model: str) -> Path | None:
    """The path that `model` names, or None when it is a hub id; an error when it is neither."""
    path = named_path(model, "model")
    if path.is_dir() and not (path / "config.json").is_file():
        raise SparsekitError(f"model {model!r} is a folder without config.json; give the one that holds it.")
    if path.exists():
        return path
    if path.suffix in (".gguf", ".json") or model.startswith((".", "/", "~")):
        raise SparsekitError(f"model {model!r}: there is no such file or folder.")
    if not _HUB_ID.fullmatch(model):
        raise SparsekitError(
            f"unknown model {model!r}: give one of {', '.join(EMBEDDED)}, a hub id such as HuggingFaceTB/SmolLM2-135M, "
            f"a folder, or a .gguf file.{nearest(model, EMBEDDED)}"
        )
    return None


def label(source: str) -> str:
    """A hub id as it is; of a path, the last name that says something."""
    path = named_path(source, "model")
    if not path.exists():
        return source
    return path.resolve().parent.name if path.name == "config.json" else path.resolve().name


@contextmanager
def one_line_errors(model: str) -> Iterator[None]:
    """transformers' errors about a checkpoint, of any kind, run over many lines; the first says what is wrong."""
    try:
        yield
    except SparsekitError:
        raise
    except Exception as error:  # whatever the code of 400 families raises at values that it does not expect
        raise SparsekitError(f"model {model!r} cannot be loaded: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Of an error's message that says something; with the next one where it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


# How configs of transformers call the layers and heads that a model is built of, one module or more each.
_COUNTS = (
    *("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
    *("num_attention_heads", "num_heads", "n_heads", "n_head", "num_key_value_heads"),
)


def check_counts(config: Mapping[str, Any], model: str) -> None:
    """That a config's layers and heads, also of its parts, are numbers that a model can have: before one is built.

    Raises:
        SparsekitError: fewer than 1, or more than `MOST`.
    """
    for name, value in config.items():
        if isinstance(value, Mapping) and name.endswith("_config"):
            check_counts(value, model)
        elif name in _COUNTS and isinstance(value, int) and not 1 <= value <= MOST:
            raise SparsekitError(f"model {shown(model)}: {name} = {shown(value)}: it should be from 1 to {MOST:,}.")
