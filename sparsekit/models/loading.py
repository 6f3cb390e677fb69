"""Load a model and its tokenizer, in a dtype that its device computes fast."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import torch

from sparsekit.errors import SparsekitError, nearest
from sparsekit.models.embedded import EMBEDDED
from sparsekit.models.gguf import dequantised, dequantised_embedded
from sparsekit.models.names import check_counts, local_path, one_line_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    model: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode, and its tokenizer.

    Args:
        model: a hub id (`owner/name`), a local folder, a `.gguf` file, or an embedded name (`smollm2-135m`,
            `qwen2.5-coder-1.5b`; `sparsekit models` lists them).
        dtype: of the weights, `torch.bfloat16` or `"bfloat16"`; None keeps the checkpoint's (bfloat16 for GGUF).
        device: where the model goes; None leaves it on the CPU.

    Raises:
        SparsekitError: a model, dtype or device that there is not, in one line.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

    wanted, name = _dtype(dtype), os.fspath(model)
    if device is not None:
        check_device(device)
    source = _weights_source(name)
    with one_line_errors(name):
        check_counts(PretrainedConfig.get_config_dict(source)[0], name)
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto" if wanted is None else wanted)
    return loaded.to(device).eval() if device is not None else loaded.eval(), tokenizer


def check_device(device: torch.device | str) -> None:
    """Whether tensors can be put there.

    Raises:
        SparsekitError: there is no such device, in one line that says which there are.
    """
    try:
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as error:  # an AssertionError where PyTorch was built without CUDA
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        why = str(error).partition("\n")[0].rstrip(".")
        raise SparsekitError(f"device {str(device)!r}: {why}; this machine has {', '.join(there)}.") from None


def _weights_source(model: str) -> str:
    """What transformers can load: a hub id, or a folder (of the cache, for a GGUF file)."""
    if model in EMBEDDED:
        return str(dequantised_embedded(model))
    path = local_path(model)
    if path is None:
        return model
    if path.suffix == ".gguf":
        return str(dequantised(path))
    if path.is_file():
        raise SparsekitError(f"model {model!r} is a file, but not a .gguf one; give the folder that holds config.json.")
    return str(path)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    value = getattr(torch, dtype, None)
    if not isinstance(value, torch.dtype):
        allowed = ["float32", "bfloat16", "float16"]
        raise SparsekitError(f"dtype {dtype!r} is not one of {', '.join(allowed)}.{nearest(dtype, allowed)}")
    return value


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


def can_shorten(cache: Any) -> bool:
    """Whether a cache gives up its last tokens at any length: a window's and a recurrent layer's does not."""
    from transformers.cache_utils import DynamicLayer

    plain = all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None]))
    return plain and bool(getattr(cache, "is_croppable", True))  # MiniMax keeps recurrent states beside its layers
