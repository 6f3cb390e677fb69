"""What a measurement is of, and where it was made.

What is measured is kept, and found again by the content of all that its value depends on: `content_of_model` digests
weights, config and tokenizer of a loaded model, `content_of_source` the files that a model would be loaded from,
`content_of_code` the code that computes. `measured_on` and `place` say where, for a reader.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import sparsekit
from sparsekit.errors import SparsekitError, named_path
from sparsekit.models import EMBEDDED, parts_found
from sparsekit.patch.state import applied_to
from sparsekit.patterns.crossover import device_name, rows_of_tables
from sparsekit.patterns.fields import AUTO, has_auto

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsekit.config import SparseConfig
    from sparsekit.patterns import Pattern

__all__ = [
    "content_key",
    "content_of_code",
    "content_of_files",
    "content_of_model",
    "content_of_source",
    "content_of_tokenizer",
    "made_on",
    "measured_on",
    "patterns_of",
    "place",
    "tables_of",
    "versions",
]

# ---- digests

COLUMNS = 1 << 14  # words of a weight that one sum is made of
# Sums that are made at a time. On a CPU their products stay in the cache, and one thread makes them: 3.6 GB/s a core,
# where blake2b reads 0.9 and crc32 2.8. More rows would be split over threads, which wait for one another.
ROWS = {"cpu": 2, "cuda": 256}
CHUNK_BYTES = 1 << 20
# Rooms and files of the package that show or store what others computed.
SHOWING = (
    *("cli", "lab/report", "lab/bench", "lab/sweep", "lab/plots.py", "lab/demo.py"),
    *("lab/journal.py", "lab/progress.py", "lab/options.py"),
)

# What a release tells of, rather than its files.
RELEASED = frozenset({"sparsekit", "transformers", "torch", "pydantic", *sys.stdlib_module_names})


def content_key(content: Any) -> str:
    """A short text that is the same for equal contents, in any order of fields."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def content_of_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """Of every byte of a model's parameters and buffers with their names, of its config, tokenizer, and of the code.

    Not of its path or name. Reads 3 GB/s on a CPU's core. Weights that cannot
    be read (offloaded ones) equal none, so that nothing is found under them.

    Raises:
        SparsekitError: a config is applied to the model, so that its own attention is not what would be measured.
    """
    if applied_to(model):
        raise SparsekitError(
            "a config is applied to this model, whose dense attention is measured: handle.remove() first."
        )
    digest = hashlib.blake2b(digest_size=12)
    for name, weight in _tensors(model):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
        digest.update(_sums(weight.detach()))
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    ends = getattr(model.generation_config, "eos_token_id", None)
    code = content_of_code([model])
    said = [config, model.config._attn_implementation, ends, code, _numbers(model), _hooks(model)]
    digest.update(content_key(said).encode())
    if tokenizer is not None:
        digest.update(content_of_tokenizer(tokenizer).encode())
    return digest.hexdigest()


def _numbers(model: PreTrainedModel) -> list[Any]:
    """Plain attributes of modules, as the scale of an attention or the epsilon of a norm; not the model's path."""
    return [
        [name, attribute, value]
        for name, module in model.named_modules()
        for attribute, value in sorted(vars(module).items())
        if type(value) in (int, float, bool, str)
        and attribute[0] != "_"
        and attribute not in ("name_or_path", "training")
    ]


def _hooks(model: PreTrainedModel) -> list[Any]:
    """What runs around modules' forwards. Hooks from outside torch and transformers hold anything: they equal none."""
    found = []
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            code = hook if hasattr(hook, "__qualname__") else type(hook)
            known = _package(code.__module__) in RELEASED
            found.append([name, code.__module__, code.__qualname__, "" if known else os.urandom(8).hex()])
    return found


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once; and what modules of quantized layers pack into their state."""
    seen = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        seen.add(name)
        yield from _plain(name, tensor)
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            packed = io.BytesIO()
            torch.save(value, packed)
            yield name, torch.frombuffer(packed.getbuffer(), dtype=torch.uint8)


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that a quantized one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        inner, context = tensor.__tensor_flatten__()
        for part in inner:
            yield from _plain(f"{name}.{part} {context}", getattr(tensor, part))
    else:
        yield name, tensor


def _sums(tensor: Tensor) -> bytes:
    """Of all bytes of a tensor: of each row of `COLUMNS` 32-bit words their sum, each times an odd 64-bit number.

    Integers add up to the same in any order, so it is exact on a GPU too. A word that changes always shows; two that
    change places, or several that change, go unseen with a chance of 2^-32.
    """
    if tensor.device.type == "meta":
        return os.urandom(8)
    flat = tensor.contiguous().reshape(-1)
    data = flat.view(torch.uint8) if flat.dtype != torch.bool else flat.to(torch.uint8)
    whole = data.numel() // (4 * COLUMNS) * (4 * COLUMNS)
    last = torch.nn.functional.pad(data[whole:], (0, 4 * COLUMNS - (data.numel() - whole)))
    words = data[:whole] if not data.storage_offset() % 4 else data[:whole].clone()
    weights, rows = _weights(data.device), ROWS["cuda" if data.device.type == "cuda" else "cpu"]
    parts = (*words.view(torch.int32).view(-1, COLUMNS).split(rows), last.view(torch.int32)[None])
    products = torch.empty(rows, COLUMNS, dtype=torch.int64, device=data.device)
    found = [torch.mul(part, weights, out=products[: len(part)]).sum(1) for part in parts]
    return torch.cat(found).cpu().numpy().tobytes()


@lru_cache(maxsize=4)
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**63), 2**63 - 1, (COLUMNS,), generator=generator) | 1).to(device)


def content_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of how it cuts text, and of its chat template."""
    backend, vocabulary = getattr(tokenizer, "backend_tokenizer", None), getattr(tokenizer, "get_vocab", dict)
    cuts = [vocabulary(), _saved(tokenizer)] if backend is None else backend.to_str()
    special = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    return content_key([content_of_code([tokenizer]), cuts, special, tokenizer.chat_template])


def _saved(tokenizer: Any) -> str | None:
    """Of the files that a tokenizer without a backend is saved as: its merges or its model, beside the vocabulary."""
    if not hasattr(tokenizer, "save_pretrained"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return content_of_files(file for file in Path(folder).rglob("*") if file.is_file())


def content_of_source(model: str) -> str | None:
    """Of the files that `sparsekit.models.load(model)` reads, or their revision on the hub; None where there is no such
    model.
    """
    if model in EMBEDDED:
        if EMBEDDED[model].sha256:  # what is loaded was checked against it
            return content_key(EMBEDDED[model].sha256)
        return content_of_files(file for file in parts_found(model).values() if file is not None)
    path = named_path(model, "model")
    if path.exists():
        return content_of_files(_of_a_model(path) if path.is_dir() else [path])
    return _revision(model)


@lru_cache(maxsize=64)
def _revision(model: str) -> str | None:
    """The commit of a model of the hub: the newest, or without a network the one in the cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json")).parent.name
    except (OSError, ValueError):  # who loads the model says why
        return None


def content_of_files(files: Iterable[str | Path]) -> str | None:
    """Of the names and bytes of files, about 1 GB/s the first time; None of no file."""
    found = sorted(Path(file) for file in files)
    if not found:
        return None
    # A file is read again where its size or a time says that it was written; the clock of a write is nanoseconds.
    stats = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file in found]
    return content_key([[file.name, _digest_of_file(*stat)] for file, stat in zip(found, stats, strict=True)])


def _of_a_model(folder: Path) -> Iterator[Path]:
    """The files that a model may be loaded from: not hidden files and pages; below, what an index of weights names."""
    found = {file for file in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")) if file.is_file()}
    for index in [file for file in found if file.name.endswith(".index.json")]:
        with suppress(
            OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError
        ):  # who loads the model says why
            shards = {folder / name for name in json.loads(index.read_bytes())["weight_map"].values()}
            found |= {shard for shard in shards if shard.is_file()}
    return (file for file in found if not file.name.startswith(".") and file.suffix != ".md")


@lru_cache(maxsize=4096)
def _digest_of_file(path: str, size: int, written: int, changed: int) -> str:
    digest = hashlib.blake2b(digest_size=12)
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def content_of_code(used: Iterable[object] = ()) -> str:
    """Of the code that values depend on: this package's (not what shows or stores them), torch's and transformers'
    releases, and the loaded packages of what is `used` from outside, and of what that is derived from: patterns, tasks
    and models of one's own.
    """
    packages = {_package(base.__module__) for one in used for base in type(one).__mro__}
    theirs = sorted(package for package in packages if package.partition(".")[0] not in RELEASED)
    modules = [name for package in theirs for name in sorted({package, *_loaded(package)})]
    return content_key([_own_code(), *map(_code_of, modules)])


def _package(module: str) -> str:
    """The outermost package of a module; of code that came with a model, that model's own."""
    top = module.partition(".")[0]
    return module.rpartition(".")[0] if top == "transformers_modules" else top


def _loaded(package: str) -> list[str]:
    return [name for name in tuple(sys.modules) if name.startswith(f"{package}.")]


@lru_cache(maxsize=1)
def _own_code() -> str:
    root = Path(sparsekit.__file__).parent
    files = [(file.relative_to(root).as_posix(), file) for file in sorted(root.rglob("*.py"))]
    read = [(name, file.read_text(encoding="utf-8")) for name, file in files if not name.startswith(SHOWING)]
    return content_key([sparsekit.__version__, versions("torch", "transformers", "triton"), read])


def _code_of(module: str) -> str:
    try:
        return content_key([module, inspect.getsource(sys.modules[module])])
    except (KeyError, OSError, TypeError):  # typed in, or compiled: its name is all that there is
        return module


def patterns_of(config: SparseConfig | None) -> list[Pattern]:
    """All that a config names, those of a union too."""
    if config is None:
        return []
    heads = (pattern for rule in config.heads.values() for pattern in rule.values())
    from sparsekit.config import Reuse

    whole = (rule for rule in config.layers.values() if not isinstance(rule, Reuse))
    named = [config.default, *whole, *heads]
    return [*named, *(inner for pattern in named for inner in getattr(pattern, "of", ()))]


def tables_of(config: SparseConfig) -> dict[str, str]:
    """What a config's results depend on beside it, where it says `dense_below_tokens: auto`: all rows of the tables."""
    if config.dense_below_tokens != AUTO and not any(map(has_auto, patterns_of(config))):
        return {}
    return {"crossovers": content_key([row.model_dump_json() for row, _ in rows_of_tables()])}


# ---- where it was made


def versions(*packages: str) -> dict[str, str | None]:
    """The releases of packages; None where one is not installed."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return str(torch.__version__) if package == "torch" else version(package)
    except PackageNotFoundError:
        return None


def measured_on(model: PreTrainedModel) -> dict[str, Any]:
    """Device, dtype, threads, versions and time of a measurement of a model."""
    return {**_run_by(model), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def made_on(model: PreTrainedModel) -> dict[str, Any]:
    """The same with the date, of what was made from many measurements."""
    return {"date": time.strftime("%Y-%m-%d", time.gmtime()), **_run_by(model)}


def _run_by(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {
            "sparsekit": sparsekit.__version__,
            **versions("torch", "transformers"),
            "python": platform.python_version(),
        },
    }


def place(device: torch.device) -> dict[str, Any]:
    """Where the rows of a bench are measured: device, versions, date, and this process' command."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "sparsekit": sparsekit.__version__,
        **versions("torch", "triton"),
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "command": shlex.join(["sparsekit", *sys.argv[1:]]),
    }
