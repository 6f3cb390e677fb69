"""One reading of a prompt, at once or in chunks into one cache: its time, its memory, and what the layers did."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.lab.bench.timing import synchronize
from sparsekit.patch import Handle, LayerReport
from sparsekit.patch.caches import cache_argument
from sparsekit.patch.capture import wrap_attention
from sparsekit.plan import causal_tiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "WARM_TOKENS",
    "Given",
    "chunks_of",
    "kinds_of",
    "read_at_once",
    "read_in_chunks",
    "static_cache",
    "warm_up_chunks",
]

Given = tuple[Tensor, Tensor] | None  # q (1, H, N, D) and k (1, G, N, D) in every layer; None: the layers' own

WARM_TOKENS = 8192  # of a call that compiles kernels


def chunks_of(tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """Where the chunks of a prompt begin and end, in tokens."""
    return [(at, min(at + chunk_tokens, tokens)) for at in range(0, tokens, chunk_tokens)]


def read_at_once(
    model: PreTrainedModel, prompt: Tensor, handle: Handle | None, given: Given
) -> tuple[float, dict[str, Any]]:
    """Milliseconds from the prompt (1, N) to the first token, and what a row says of the reading."""
    _forget_peak(model.device)
    ms = _call(model, prompt, None, given, 0)
    parts = [] if handle is None else [(1, handle.report().layers)]
    return ms, {**_peak(model.device), **_of_layers(parts)}


def read_in_chunks(
    model: PreTrainedModel,
    prompt: Tensor,
    chunk_tokens: int,
    handle: Handle | None,
    given: Given,
    step: Callable[[int, float], None],
) -> tuple[float, dict[str, Any]]:
    """The same in chunks: the milliseconds of all, and `cache_bytes` beside the rest.

    The cache is transformers' StaticCache of N tokens, exact and made once: a DynamicCache copies what it holds in each
    chunk, and has a layer's keys twice meanwhile. A chunk's time ends when the device is done with it.

    Args:
        step: called after each chunk with its last token's place and its milliseconds.
    """
    tokens, total = prompt.shape[1], 0.0
    _forget_peak(model.device)
    cache = static_cache(model, tokens)
    parts: list[tuple[int, Sequence[LayerReport]]] = []
    before: Sequence[LayerReport] = ()
    with nullcontext() if handle is None else handle.prompt(tokens):
        for at, end in chunks_of(tokens, chunk_tokens):
            ms = _call(model, prompt[:, at:end], cache, given, at)
            total += ms
            if handle is not None:  # its layers tell of the last chunk alone; a last one of one token is decoding
                dense = int(causal_tiles(Geometry.of(end - at, tokens, q_offset=at), 1).sum())
                layers = handle.report().layers
                parts.append((dense, () if layers == before else layers))
                before = layers
            step(end, ms)
    return total, {**_peak(model.device), "cache_bytes": _held(cache), **_of_layers(parts)}


def warm_up_chunks(
    model: PreTrainedModel, prompt: Tensor, chunk_tokens: int, handle: Handle | None, given: Given
) -> None:
    """Compile what the chunks run, without reading the prompt: a few tokens at the end of one chunk of each kind.

    A model with sliding or linear layers reads all of it: their cache cannot be moved.
    """
    from transformers.cache_utils import StaticLayer

    tokens = prompt.shape[1]
    cache, rows = static_cache(model, tokens), min(WARM_TOKENS, chunk_tokens, tokens)
    with nullcontext() if handle is None else handle.prompt(tokens):
        _call(model, prompt[:, :rows], cache, given, 0)
        if handle is None:
            return
        if any(type(layer) is not StaticLayer for layer in cache.layers):
            read_in_chunks(model, prompt, chunk_tokens, handle, given, lambda end, ms: None)
            return
        for end in kinds_of(tokens, chunk_tokens):
            for layer in cache.layers:
                layer.cumulative_length.fill_(end - rows)
            _call(model, prompt[:, end - rows : end], cache, given, end - rows)


def kinds_of(tokens: int, chunk_tokens: int) -> list[int]:
    """Where chunks end, one of each kind for which kernels are compiled; the prompt's end is the last of them.

    They are compiled for blocks of keys up to a power of two, and by whether these are a multiple of 16, of 64 tokens
    or of 128.
    """
    found: dict[tuple[int | bool, ...], int] = {}
    for _, end in chunks_of(tokens, chunk_tokens):
        found[((end - 1).bit_length(), *(-(-end // size) % 16 == 0 for size in (64, 128)))] = end
    return sorted(found.values())


def static_cache(model: PreTrainedModel, tokens: int) -> Any:
    """An empty StaticCache of so many tokens; it takes memory with its first call."""
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=tokens)


def _held(cache: Any) -> int:
    """Bytes of keys and values, and of the states of linear layers."""
    found = [value for layer in cache.layers for value in vars(layer).values()]
    found += [state for value in found if isinstance(value, dict) for state in value.values()]
    return sum(value.nbytes for value in found if isinstance(value, Tensor) and value.ndim)  # a length has no axis


def _call(model: PreTrainedModel, ids: Tensor, cache: Any, given: Given, at: int) -> float:
    """Milliseconds by the host's clock of tokens that begin at place `at`; the logits of the last one are computed."""
    synchronize(model.device)
    with _attending(model, given, at, ids.shape[1]):
        start = time.perf_counter()
        int(model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        return (time.perf_counter() - start) * 1e3


@contextmanager
def _attending(model: PreTrainedModel, given: Given, at: int, rows: int) -> Iterator[None]:
    """Within this block attention is given these q, of a call that begins at place `at`, and k."""
    if given is None:
        yield
        return
    q, k = given

    def run(own: Any, module: Any, _q: Tensor, _k: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(module, q[:, :, at : at + rows], k, *args, **kwargs)

    with wrap_attention(model, run):
        yield


def _of_layers(parts: Sequence[tuple[int, Sequence[LayerReport]]]) -> dict[str, Any]:
    """What the layers did in all chunks, each with the tiles that dense attention visits in it."""
    if not parts:
        return {"tile_density": 1.0, "sparse_layers": 0}
    visited, dense = 0.0, sum(count for count, _ in parts)
    for count, layers in parts:
        told = [layer.tile_density for layer in layers if layer.tile_density is not None]
        visited += (mean(told) if told else 1.0) * count
    every = [layer for _, layers in parts for layer in layers]
    return {
        "tile_density": round(visited / dense, 4),
        "sparse_layers": len({layer.layer for layer in every if layer.sparse}),
        "plan_ms": round(sum(layer.plan_ms or 0.0 for layer in every), 4),
        "plan_bytes": max(layer.plan_bytes for layer in every),
    }


def _forget_peak(device: torch.device) -> None:
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> dict[str, int]:
    return {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
