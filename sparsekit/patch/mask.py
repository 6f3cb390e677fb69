"""The mask function g: reads a forward's call, remembers it, and gives its descriptor in place of a mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from sparsekit.geometry import Geometry
from sparsekit.patch.state import DOORS, Call, Door, mask_functions

# Width of the descriptors of a compiled model's calls; one more for those of sliding layers.
COMPILED_WIDTH = 7


def make_mask(original: str) -> Callable[..., Tensor | None]:
    """g for models whose own implementation is `original`."""

    def sparsekit_mask(**kwargs: Any) -> Tensor | None:
        door = DOORS.get(id(kwargs.get("config")))
        own = mask_functions()[original]
        if door is None or is_for_others(kwargs, door):
            return own(**kwargs)
        if is_own(kwargs, door):
            door.calls.clear()
            return own(**kwargs)
        geometry, why, tokens = read_call(kwargs)
        kept = {name: value for name, value in kwargs.items() if name != "config"}
        kept["q_offset"] = int(kept["q_offset"])  # a StaticCache counts on in its own tensor, layer by layer
        call = Call(kept, door.config, original, geometry, why, tokens)
        descriptor = descriptor_of(call)
        door.calls[descriptor.shape[-1]] = call
        return descriptor

    return sparsekit_mask


def is_for_others(kwargs: Mapping[str, Any], door: Door) -> bool:
    """A mask for layers that sparsekit does not run: cross-attention, chunks, windows that no rule names."""
    from transformers.masking_utils import bidirectional_mask_function

    if kwargs.get("local_size") is None:
        return kwargs.get("mask_function") is bidirectional_mask_function
    return not any(handle._windows for handle in door.handles)


def is_own(kwargs: Mapping[str, Any], door: Door) -> bool:
    """A call that no layer runs sparse: decoding, or everything paused."""
    return all(handle._paused or handle._decodes(kwargs) for handle in door.handles)


def _is_plain(kwargs: Mapping[str, Any]) -> bool:
    """Whether the mask is causal and nothing else, or causal with the window that `local_size` tells."""
    from transformers.masking_utils import causal_mask_function, sliding_window_overlay

    mask, window = kwargs.get("mask_function"), kwargs.get("local_size")
    if window is None:
        return mask is causal_mask_function
    parts = _closed_over(mask).get("mask_functions")
    if not isinstance(parts, tuple) or len(parts) != 2 or parts[1] is not causal_mask_function:
        return False
    same = getattr(parts[0], "__code__", None) is sliding_window_overlay(window).__code__
    return same and _closed_over(parts[0]).get("sliding_window") == window


def _closed_over(function: Any) -> dict[str, Any]:
    """The variables of the enclosing function that a nested one uses."""
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def read_call(kwargs: Mapping[str, Any]) -> tuple[Geometry | None, str, int]:
    """The geometry of a plain call or why there is none, and its tokens so far. Reads the padding mask once.

    A window counts from any key alike, so that the keys which a sliding cache has dropped need not be counted.
    """
    dropped = int(kwargs.get("kv_offset", 0))
    if not _is_plain(kwargs):
        return None, "the mask is not plain causal (packed sequences, or a custom mask function)", 0
    if torch.device(kwargs["device"]).type == "meta":
        return None, "the meta device holds no data", 0
    if dropped and kwargs.get("local_size") is None:
        return None, "the cache has dropped its first keys", 0
    batch, q_len, kv_len = kwargs["batch_size"], int(kwargs["q_length"]), int(kwargs["kv_length"])
    offset = int(kwargs["q_offset"])
    starts, ends = [0] * batch, [offset + q_len] * batch
    padding = kwargs.get("attention_mask")
    if padding is not None:
        at = torch.arange(padding.shape[-1], device=padding.device)
        first = torch.where(padding, at, padding.shape[-1]).amin(-1)
        last = torch.where(padding, at, -1).amax(-1) + 1
        read = torch.stack([first, last, padding.sum(-1)], 1).tolist()
        if any(count != end - start and count for start, end, count in read):
            return None, "the attention mask has holes", 0
        starts = [start if count else 0 for start, _, count in read]
        ends = [min(end, offset + q_len) if count else 0 for _, end, count in read]
    tokens = max(end - start for start, end in zip(starts, ends, strict=True))
    geometry = Geometry.of(
        q_len,
        kv_len,
        batch=batch,
        q_offset=offset - dropped,
        kv_start=[max(start - dropped, 0) for start in starts],
        kv_end=[max(end - dropped, 0) for end in ends],
    )
    return geometry, "", tokens


def descriptor_of(call: Call, width: int = 0) -> Tensor:
    """int32 (B, 1, 1, 3 to 8): q_offset, kv_start, kv_end, and zeros, whose number tells the calls of a forward apart.

    4-D, because `generate` with a StaticCache makes masks before the forward and only 4-D ones pass through untouched.
    """
    batch, geometry = call.kwargs["batch_size"], call.geometry
    rows = [(0, 0, 0)] * batch
    if geometry is not None:
        rows = [(geometry.q_offset, a, b) for a, b in zip(geometry.kv_start, geometry.kv_end, strict=True)]
    zeros = (0,) * (width - 3 if width else call.window + 2 * (geometry is None))
    told = [(*row, *zeros) for row in rows]
    return torch.tensor(told, dtype=torch.int32, device=call.kwargs.get("device")).view(batch, 1, 1, -1)


def is_descriptor(mask: Tensor | None) -> TypeGuard[Tensor]:
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.int32
        and mask.ndim == 4
        and mask.shape[1:3] == (1, 1)
        and 3 <= mask.shape[3] <= COMPILED_WIDTH + 1
    )
