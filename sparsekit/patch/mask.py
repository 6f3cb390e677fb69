"""The mask function g: reads a forward's call, remembers it, and gives its descriptor in place of a mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.errors import SparsekitError
from sparsekit.patch.state import (
    DOORS,
    Bounds,
    Call,
    Door,
    mask_functions,
    masking,
)

# Width of the descriptors of a compiled model's calls; one more for those of sliding layers.
COMPILED_WIDTH = 7


def make_mask(original: str) -> Callable[..., Tensor | None]:
    """g for models whose own implementation is `original`."""
    functions = mask_functions()

    def sparsekit_mask(**kwargs: Any) -> Tensor | None:
        door = DOORS.get(id(kwargs.get("config")))
        if door is None:
            return functions[original](**kwargs)
        if is_own(kwargs, door):
            door.calls.clear()
            return functions[original](**kwargs)
        for handle in door.handles:
            handle._renew(original)
        if is_for_others(kwargs, door):
            return functions[original](**kwargs)
        del kwargs["config"]
        kwargs["q_offset"] = int(kwargs["q_offset"])  # a StaticCache counts on in its own tensor, layer by layer
        call = Call(kwargs, door.config, original, *read_call(kwargs))
        descriptor = descriptor_of(call)
        door.calls[descriptor.shape[-1]] = call
        descriptor.sparsekit_call = call  # type: ignore[attr-defined]
        if len(door.handles) == 1:
            descriptor.sparsekit_dense = door.handles[0]._dense_call(call)  # type: ignore[attr-defined]
        return descriptor

    return sparsekit_mask


def is_for_others(kwargs: Mapping[str, Any], door: Door) -> bool:
    """A mask for layers that sparsekit does not run: cross-attention, chunks, windows that no rule names."""
    if kwargs.get("local_size") is None:
        return kwargs.get("mask_function") is masking().bidirectional_mask_function
    return not any(handle._windows for handle in door.handles)


def is_own(kwargs: Mapping[str, Any], door: Door) -> bool:
    """A call that no layer runs sparse: decoding, or everything paused."""
    handles = door.handles
    return handles[0]._keeps_own(kwargs) if len(handles) == 1 else all(each._keeps_own(kwargs) for each in handles)


def _is_plain(kwargs: Mapping[str, Any]) -> bool:
    """Whether the mask is causal and nothing else, or causal with the window that `local_size` tells."""
    mask, window, causal = kwargs.get("mask_function"), kwargs.get("local_size"), masking().causal_mask_function
    if window is None:
        return mask is causal
    parts = _closed_over(mask).get("mask_functions")
    if not isinstance(parts, tuple) or len(parts) != 2 or parts[1] is not causal:
        return False
    same = getattr(parts[0], "__code__", None) is masking().sliding_window_overlay(window).__code__
    return same and _closed_over(parts[0]).get("sliding_window") == window


def _closed_over(function: Any) -> dict[str, Any]:
    """The variables of the enclosing function that a nested one uses."""
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def read_call(kwargs: Mapping[str, Any]) -> tuple[Bounds | None, str, int]:
    """Each sample's keys in a plain call or why it is none, and its tokens so far. Reads the padding mask once.

    A window counts from any key alike, so that the keys which a sliding cache has dropped need not be counted.
    """
    dropped = int(kwargs.get("kv_offset", 0))
    if not _is_plain(kwargs):
        return None, "the mask is not plain causal (packed sequences, or a custom mask function)", 0
    device = kwargs["device"]
    if (device.type if isinstance(device, torch.device) else torch.device(device).type) == "meta":
        return None, "the meta device holds no data", 0
    if dropped and kwargs.get("local_size") is None:
        return None, "the cache has dropped its first keys", 0
    batch, last = kwargs["batch_size"], int(kwargs["q_offset"]) + int(kwargs["q_length"])
    padding = kwargs.get("attention_mask")
    if padding is None:
        return ([0] * batch, [last] * batch), "", last
    valid = padding.cpu().numpy()  # the one wait for a device; there, each of these steps would be a launch
    counts, starts = valid.sum(1).tolist(), valid.argmax(1).tolist()
    ends = [valid.shape[1] - after for after in valid[:, ::-1].argmax(1).tolist()]
    if any(count and count != end - start for start, end, count in zip(starts, ends, counts, strict=True)):
        return None, "the attention mask has holes", 0
    starts = [start if count else 0 for start, count in zip(starts, counts, strict=True)]
    ends = [min(end, last) if count else 0 for end, count in zip(ends, counts, strict=True)]
    return (starts, ends), "", max(end - start for start, end in zip(starts, ends, strict=True))


def descriptor_of(call: Call, width: int = 0) -> Tensor:
    """int32 zeros (B, 1, 1, 3 to 8): the width tells the calls of a forward apart. Zeros are made without a wait.

    4-D, because `generate` with a StaticCache makes masks before the forward and only 4-D ones pass through untouched.
    """
    width = width or 3 + call.window + 2 * (call.bounds is None)
    return torch.zeros(call.kwargs["batch_size"], 1, 1, width, dtype=torch.int32, device=call.kwargs.get("device"))


def descriptor_width(mask: Tensor | None) -> int:
    """Of a descriptor; 0 where `mask` is not one."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.int32 or mask.ndim != 4:
        return 0
    _, heads, rows, width = mask.shape
    return width if heads == rows == 1 and 3 <= width <= COMPILED_WIDTH + 1 else 0


def call_of(module: nn.Module, mask: Tensor | None) -> Call | None:
    """The call whose descriptor `mask` is, or None where it is not one.

    A descriptor has its call with it; a copy on another device and a graph's have their width alone, which tells the
    call among those of this thread.
    """
    if mask is None:
        return None
    call: Call | None = getattr(mask, "sparsekit_call", None)
    config = getattr(module, "config", None)
    if call is not None and call.config() is config:
        return call
    width = descriptor_width(mask)
    if not width:
        return None
    door = DOORS.get(id(config))
    call = door.calls.get(width) if door is not None else None
    if call is None:
        raise SparsekitError(f"{type(module).__name__}: a sparsekit mask reached a model that sparsekit does not know.")
    return call
