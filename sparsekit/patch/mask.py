"""The mask function g: reads a forward's call, remembers it, and gives its descriptor in place of a mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekit.errors import SparsekitError
from sparsekit.patch.decide import keeps_own, settle
from sparsekit.patch.model import own_attention
from sparsekit.patch.state import DOORS, Applied, Bounds, Call, Door, mask_functions, masking

# Width of the descriptors of a compiled model's calls; one more for those of sliding layers.
COMPILED_WIDTH = 7
COPIED = (
    "this is a copy of a model, or of its config, that sparsekit was applied to, and sparsekit does not run in copies: "
    "sparsekit.apply(copy, config) runs it there, sparsekit.remove(copy) leaves the copy its own attention."
)


def make_mask(original: str) -> Callable[..., Tensor | None]:
    """g for models whose own implementation is `original`."""
    functions = mask_functions()

    def sparsekit_mask(**kwargs: Any) -> Tensor | None:
        door = DOORS.get(id(kwargs.get("config")))
        if door is None:
            raise SparsekitError(COPIED)
        if is_own(kwargs, door):
            door.calls.clear()
            return functions[original](**kwargs)
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise SparsekitError(
                "torch.jit.trace would keep what each layer does in this one call for good: use torch.export, which "
                "decides at run time, or trace within `with handle.pause():` for the model's own attention."
            )
        for applied in door.applied:
            _renew(applied, original)
        if is_for_others(kwargs, door):
            return functions[original](**kwargs)
        shape = shape_of(kwargs)
        del kwargs["config"]
        kwargs["q_offset"] = int(kwargs["q_offset"])  # a StaticCache counts on in its own tensor, layer by layer
        call = Call(kwargs, door.config, original, shape.window is not None, *read_call(kwargs, shape))
        descriptor = descriptor_of(call)
        door.calls[descriptor.shape[-1]] = call
        door.begin(descriptor, call)
        descriptor.sparsekit_call = call  # type: ignore[attr-defined]
        if len(door.applied) == 1:
            descriptor.sparsekit_settled = settle(door.applied[0], call)  # type: ignore[attr-defined]
        return descriptor

    return sparsekit_mask


def _renew(applied: Applied, original: str) -> None:
    """Once a prompt: the model's own function may have been registered anew."""
    for layer in applied.layers:
        module = layer.module()
        if module is None:
            continue
        now = own_attention(module, original)
        if now is layer.attend:  # so it is in the others
            return
        layer.attend = now


def is_for_others(kwargs: Mapping[str, Any], door: Door) -> bool:
    """A mask for layers that sparsekit does not run: cross-attention, chunks, windows that no rule names."""
    if kwargs.get("local_size") is None:
        return kwargs.get("mask_function") is masking().bidirectional_mask_function
    return not any(applied.windows for applied in door.applied)


def is_own(kwargs: Mapping[str, Any], door: Door) -> bool:
    """A call that no layer runs sparse: decoding, or everything paused."""
    applied = door.applied
    return keeps_own(applied[0], kwargs) if len(applied) == 1 else all(keeps_own(each, kwargs) for each in applied)


class Shape(NamedTuple):
    """What a mask function lets through, whatever it is composed of.

    Attributes:
        causal: no key behind its query.
        window: that many keys up to the query, or None.
        known: nothing else; False where a part of the function is not understood.
        empty: no pair at all.
    """

    causal: bool = False
    window: int | None = None
    known: bool = True
    empty: bool = False


CAUSAL, UNKNOWN, EMPTY = Shape(causal=True), Shape(known=False), Shape(empty=True)


def shape_of(kwargs: Mapping[str, Any]) -> Shape:
    """Of the mask function in the rows of its call. It looks into transformers' compositions, and at their tensors."""
    mask, window = kwargs.get("mask_function"), kwargs.get("local_size")
    shape = CAUSAL if mask is masking().causal_mask_function else _shape(mask, kwargs)
    if window is not None and shape.window != window:  # chunks
        return UNKNOWN._replace(window=window)
    return shape


def _shape(mask: Any, kwargs: Mapping[str, Any]) -> Shape:
    masks, held, code = masking(), _closed_over(mask), getattr(mask, "__code__", None)
    causal = masks.causal_mask_function
    if mask is causal:
        return CAUSAL
    if code is masks.sliding_window_overlay(1).__code__:
        return Shape(window=held["sliding_window"])
    if "block_sequence_ids" in held and code is masks.blockwise_overlay(None).__code__:  # not in every version
        return UNKNOWN if _has_blocks(held["block_sequence_ids"], kwargs) else EMPTY
    parts = [_shape(part, kwargs) for part in held.get("mask_functions", ())]
    if parts and code is masks.and_masks(causal).__code__:
        windows = [part.window for part in parts if part.window is not None]
        return Shape(
            any(part.causal for part in parts),
            min(windows, default=None),
            all(part.known for part in parts),
            any(part.empty for part in parts),
        )
    if parts and code is masks.or_masks(causal).__code__:
        rest = {part for part in parts if not part.empty}
        if len(rest) <= 1:
            return rest.pop() if rest else EMPTY
    return UNKNOWN


def _has_blocks(ids: Tensor, kwargs: Mapping[str, Any]) -> bool:
    """Whether a query of the call is in a block of pictures, whose tokens see each other; waits for the device."""
    first = int(kwargs["q_offset"])
    return bool((ids[:, first : first + kwargs["q_length"]] >= 0).any())


def _closed_over(function: Any) -> dict[str, Any]:
    """The variables of the enclosing function that a nested one uses."""
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def read_call(kwargs: Mapping[str, Any], shape: Shape) -> tuple[Bounds | None, str, int]:
    """Each sample's keys in a plain call or why it is none, and its tokens so far. Reads the padding mask once.

    A window counts from any key alike, so that the keys which a sliding cache has dropped need not be counted.
    """
    dropped = int(kwargs.get("kv_offset", 0))
    if not shape.known or not shape.causal or shape.empty:
        return None, "the mask is not plain causal (packed sequences, or a custom mask function)", 0
    device = kwargs["device"]
    if (device.type if isinstance(device, torch.device) else torch.device(device).type) == "meta":
        return None, "the meta device holds no data", 0
    if dropped and shape.window is None:
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


def check_call(module: nn.Module, mask: Tensor | None, call: Call) -> None:
    """That `call_of` cannot have taken one forward's call for another's, whose plans a layer would then reuse.

    Raises:
        SparsekitError: several forwards of this thread are in progress, and the mask is a copy, which tells its width
            alone.
    """
    if getattr(mask, "sparsekit_call", None) is call:
        return
    door, width = DOORS[id(module.config)], descriptor_width(mask)
    if door.in_progress(width) > 1:
        raise SparsekitError(
            "a layer reuses a plan, and several forwards of this model are in progress in one thread, whose masks were "
            "copied (to another device), so that they cannot be told apart: run them one after another, or give the "
            "layer a pattern of its own."
        )
