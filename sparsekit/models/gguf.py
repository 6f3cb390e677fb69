"""GGUF files: de-quantised once, and kept as safetensors in the user's cache folder.

On two cores SmolLM2-135M takes 15 to 25 s the first time and 0.6 s afterwards.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsekit.errors import SparsekitError, cache_folder
from sparsekit.models.embedded import EMBEDDED, joined, parts
from sparsekit.models.names import one_line_errors
from sparsekit.patch.model import facts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COMPLETE = "sparsekit.json"  # written last: a cache folder without it is half-written
_CACHE_FORMAT = 1  # counts up when what is written below changes
_ABANDONED_SECONDS = 3600.0  # a temporary folder this old was left by a killed process


def check_embedded(name: str, loaded: PreTrainedModel) -> None:
    """A converter that loses a fact gives a model that runs and answers badly: compare with what is published."""
    embedded, config = EMBEDDED[name], loaded.config
    found = (
        facts_of(loaded).model_copy(update={"name": name}),
        config.max_position_embeddings,
        config.tie_word_embeddings,
    )
    if found != (embedded.facts, embedded.max_positions, embedded.tied):
        raise SparsekitError(f"model {name!r}: this version of transformers misreads its GGUF file: {found}.")


def need_gguf(file: str) -> None:
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise SparsekitError(f"reading {file} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def dequantised(file: Path, check: Callable[[PreTrainedModel], None] = lambda _: None) -> Path:
    """The folder in the cache that holds `file` as safetensors with its tokenizer, converted now if it is not there."""
    with file.open("rb") as stream:
        fingerprint = _fingerprint(iter(lambda: stream.read(1 << 20), b""))
    return _cached(f"{file.stem}-{fingerprint}", file.name, lambda target: _convert(file, target, check))


def dequantised_embedded(name: str) -> Path:
    """The same of an embedded model. One that is known by its sha256 is joined and checked when it is converted; its
    parts need not be there afterwards.
    """
    model, check = EMBEDDED[name], partial(check_embedded, name)
    if not model.sha256:
        return dequantised(parts(name)[0], check)

    def make(target: Path) -> None:
        with joined(name, target) as file:
            _convert(file, target, check)

    return _cached(embedded_folder(name), name, make)


def embedded_folder(name: str) -> str:
    """What the folder in the cache is called, of an embedded model that is known by its sha256."""
    return f"{name}-{_fingerprint([EMBEDDED[name].sha256.encode()])}"


def is_converted(name: str) -> bool:
    """Whether an embedded model that is known by its sha256 is in the cache."""
    return bool(EMBEDDED[name].sha256) and (cache_folder() / embedded_folder(name) / _COMPLETE).is_file()


def _cached(name: str, source: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache; where it is not there, `make` fills it first."""
    root = cache_folder()
    folder = root / name
    if (folder / _COMPLETE).is_file():
        return folder
    need_gguf(source)
    root.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(root)
    partly = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
    try:
        make(partly)
        _publish(partly, folder)
    finally:
        shutil.rmtree(partly, ignore_errors=True)
    return folder


def _fingerprint(content: Iterable[bytes]) -> str:
    """Of a whole content (a file's at about 1 GB/s), the transformers version that converts it, and our own format."""
    from transformers import __version__ as transformers_version

    digest = hashlib.blake2b(f"{_CACHE_FORMAT} {transformers_version}".encode(), digest_size=8)
    for chunk in content:
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
