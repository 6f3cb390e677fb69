"""GGUF files: de-quantised once, and kept as safetensors in the user's cache folder.

SmolLM2-135M takes 15 to 25 s the first time on two cores and 0.6 s afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsekit.errors import SparsekitError, named_path
from sparsekit.models.names import EMBEDDED, one_line_errors
from sparsekit.patch.model import facts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COMPLETE = "sparsekit.json"  # written last: a cache folder without it is half-written
_CACHE_FORMAT = 1  # counts up when what is written below changes
_ABANDONED_SECONDS = 3600.0  # a temporary folder this old was left by a killed process


def cache_folder() -> Path:
    """For de-quantised models: `$SPARSEKIT_CACHE`, else `$XDG_CACHE_HOME/sparsekit`, else `~/.cache/sparsekit`."""
    own = os.environ.get("SPARSEKIT_CACHE")
    if own:
        return named_path(own, "SPARSEKIT_CACHE")
    return named_path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "XDG_CACHE_HOME") / "sparsekit"


def embedded_file(name: str) -> Path:
    """The GGUF file of an embedded model. Its package is found but not imported: importing needs further packages."""
    embedded = EMBEDDED[name]
    spec = find_spec(embedded.package)
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not files:
        raise SparsekitError(f"model {name!r} comes in a package that is not installed: {embedded.install}")
    return files[0]


def check_embedded(name: str, loaded: PreTrainedModel) -> None:
    """A converter that loses a fact gives a model that runs and answers badly: compare with what is published."""
    embedded, config = EMBEDDED[name], loaded.config
    found = (
        facts_of(loaded).model_copy(update={"name": name}),
        config.max_position_embeddings,
        config.rope_parameters["rope_theta"],
    )
    if found != (embedded.facts, embedded.max_positions, embedded.rope_theta) or not config.tie_word_embeddings:
        raise SparsekitError(f"model {name!r}: this version of transformers misreads its GGUF file: {found}.")


def need_gguf(file: Path) -> None:
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise SparsekitError(f"reading {file.name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def dequantised(file: Path, check: Callable[[PreTrainedModel], None] = lambda _: None) -> Path:
    """The folder in the cache that holds `file` as safetensors with its tokenizer, converted now if it is not there."""
    root = cache_folder()
    folder = root / f"{file.stem}-{_fingerprint(file)}"
    if (folder / _COMPLETE).is_file():
        return folder
    need_gguf(file)
    root.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(root)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
    try:
        _convert(file, partial, check)
        _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _fingerprint(file: Path) -> str:
    """Of the file's whole content (about 1 GB/s), the transformers version that converts it, and our own format."""
    from transformers import __version__ as transformers_version

    digest = hashlib.blake2b(f"{_CACHE_FORMAT} {transformers_version}".encode(), digest_size=8)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _convert(file: Path, target: Path, check: Callable[[PreTrainedModel], None]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with one_line_errors(str(file)):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),  # without it the model cannot be saved
            dtype=torch.bfloat16,
        )
    check(model)
    _restore_tokenizer(tokenizer, file, model.config.max_position_embeddings)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / _COMPLETE).write_text(json.dumps({"source": file.name, "format": _CACHE_FORMAT}) + "\n")


def _restore_tokenizer(tokenizer: PreTrainedTokenizerBase, file: Path, max_positions: int) -> None:
    """Put back what transformers (5.23) drops when it builds a tokenizer from GGUF.

    `model_max_length` comes out as 1e30. The pre-tokenizer comes out as plain byte level, where the `smollm` kind cuts
    every digit off first: `"  12"` is then `["Ġ", "Ġ", "1", "2"]` instead of the trained `["ĠĠ", "1", "2"]`.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    tokenizer.model_max_length = max_positions
    kind = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":
        fast: Any = tokenizer
        fast.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _publish(partial: Path, folder: Path) -> None:
    """Rename `partial` to `folder` in one step. Another process may have been faster; then its work stands."""
    try:
        partial.rename(folder)
    except OSError:
        if (folder / _COMPLETE).is_file():
            return
        shutil.rmtree(folder, ignore_errors=True)  # half-written, by something other than this function
        partial.rename(folder)


def _remove_abandoned(root: Path) -> None:
    for old in root.glob(".partial-*"):
        if time.time() - old.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
