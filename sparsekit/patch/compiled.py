"""Under torch.compile: two custom ops, opaque to it, that do at run time what an uncompiled model does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.errors import SparsekitError
from sparsekit.patch.call import in_common_dtype, unknown_argument
from sparsekit.patch.mask import COMPILED_WIDTH, Shape, descriptor_of, is_for_others, is_own, read_call
from sparsekit.patch.state import DOORS, LAYERS, Call, mask_functions, masking

# They keep Python's state: not to be folded into a constant, nor captured in a CUDA graph.
OP_TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe)


def attention_in_graph(
    outside: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    descriptor: Tensor | None,
    kwargs: Mapping[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """A layer's attention for a prompt chunk: a custom op, or `outside` the graph what no op does."""
    known = id(module) in LAYERS
    tracked = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not known or tracked or unknown_argument(kwargs) or kwargs.get("output_attentions"):
        return outside(module, query, key, value, descriptor, **kwargs)
    told = {name: kwargs.get(name) for name in ("scaling", "softcap", "s_aux", "sliding_window", "position_ids")}
    causal, dropout = kwargs.get("is_causal"), kwargs.get("dropout", 0.0)
    query, key, value = in_common_dtype(query, key, value)  # a graph runs without autocast, which is traced into it
    out = torch.ops.sparsekit.attention(query, key, value, descriptor, id(module), *told.values(), causal, dropout)
    return out, None


@torch.library.custom_op("sparsekit::attention", mutates_args=(), tags=OP_TAGS)
def _attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    descriptor: Tensor,
    layer: int,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
    sliding_window: int | None,
    position_ids: Tensor | None,
    is_causal: bool | None,
    dropout: float,
) -> Tensor:
    """(B, Q, H, D): what a layer's attention gives for a prompt chunk. `layer` is its module's id."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found = LAYERS.get(layer)
    module = None if found is None else found.module()
    if module is None:
        raise SparsekitError("a compiled model runs with sparsekit, which was removed from it: compile it again.")
    kwargs: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "position_ids": position_ids}
    given = {"softcap": softcap, "s_aux": s_aux, "sliding_window": sliding_window, "is_causal": is_causal}
    kwargs |= {name: value for name, value in given.items() if value is not None}
    name = module.config._attn_implementation  # type: ignore[union-attr]
    out, _ = ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, descriptor, **kwargs)
    return out.contiguous()


@_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, descriptor: Tensor, layer: int, *_: Any) -> Tensor:
    batch, heads, rows, _dim = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1])


def compilable_mask(original: str, make_mask: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """`make_mask`, which a graph calls through a custom op wherever a prompt chunk comes."""
    outside = torch.compiler.disable(
        make_mask, reason="sparsekit: a mask function of the caller's, pictures, or a copy"
    )

    def sparsekit_mask(**kwargs: Any) -> Tensor | None:
        if not torch.compiler.is_compiling():
            return make_mask(**kwargs)
        door = DOORS.get(id(kwargs.get("config")))
        if door is None:
            return outside(**kwargs)
        if is_for_others(kwargs, door) or is_own(kwargs, door):
            return mask_functions()[original](**kwargs)
        probe = _probe(kwargs)
        if probe is not None and (door.composed or kwargs.get("use_vmap")):
            return outside(**kwargs)
        offset = kwargs["q_offset"]
        descriptor: Tensor = torch.ops.sparsekit.prompt_call(
            id(kwargs["config"]),
            kwargs.get("attention_mask"),
            probe,
            offset if isinstance(offset, Tensor) else None,
            0 if isinstance(offset, Tensor) else offset,
            [kwargs["batch_size"], kwargs["q_length"], kwargs["kv_length"], kwargs.get("kv_offset", 0)],
            kwargs.get("local_size"),
            kwargs.get("allow_is_causal_skip", True),
            kwargs["dtype"],
            torch.device(kwargs["device"]),
        )
        return descriptor

    return sparsekit_mask


def _probe(kwargs: Mapping[str, Any]) -> Tensor | None:
    """bool (4, B, Q), all true where the mask is plain causal or a plain window; None: it is plain causal for certain.

    A graph cannot look into a function that is made while it is traced, but it can call it: row i must see the token
    before it, which a packed sequence and a chunk do not at their start, and the last of its window, and must see
    neither the one before that, nor the one that follows, which a block of pictures does.
    """
    mask, window = kwargs["mask_function"], kwargs.get("local_size")
    if window is None and mask is masking().causal_mask_function:
        return None
    first, device = kwargs.get("kv_offset", 0), kwargs["device"]
    sample = torch.arange(kwargs["batch_size"], device=device)[:, None]
    rows = torch.arange(kwargs["q_length"], device=device)[None] + kwargs["q_offset"]
    reach = window or kwargs["kv_length"]

    def sees(ahead: int, want: bool) -> Tensor:
        keys = rows + ahead
        there = (keys >= first) & (keys < first + kwargs["kv_length"])
        seen = mask(sample, torch.zeros_like(sample), rows, torch.where(there, keys, rows))
        return ((seen == want) | ~there).expand(kwargs["batch_size"], kwargs["q_length"])

    return torch.stack([sees(-1, window != 1), sees(1 - reach, True), sees(-reach, False), sees(1, False)])


@torch.library.custom_op("sparsekit::prompt_call", mutates_args=(), tags=OP_TAGS)
def _prompt_call(
    config: int,
    padding: Tensor | None,
    probe: Tensor | None,
    offset_tensor: Tensor | None,
    offset: int,
    lengths: Sequence[int],
    window: int | None,
    allow_is_causal_skip: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The mask function of a compiled model: remembers the call for its layers, and gives the call's descriptor.

    Args:
        config: its id.
        probe: see `_probe`.
        offset_tensor: a StaticCache's count, in place of `offset`.
        lengths: batch_size, q_length, kv_length, kv_offset.
        window: `local_size` of a sliding layer's mask. The rest are the mask function's own.
    """
    door = DOORS.get(config)
    if door is None:
        raise SparsekitError("a compiled model runs with sparsekit, which was removed from it: compile it again.")
    if probe is not None and not bool(probe.all()):
        raise SparsekitError(
            "a compiled model got packed sequences, or a mask that is not plain causal: run it uncompiled, or compile "
            "it within `with handle.pause():`; the model's own attention does them."
        )
    batch, q_length, kv_length, kv_offset = lengths
    masks = masking()
    kwargs: dict[str, Any] = {
        "batch_size": batch,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": offset if offset_tensor is None else int(offset_tensor),
        "kv_offset": kv_offset,
        "mask_function": masks.causal_mask_function
        if window is None
        else masks.sliding_window_causal_mask_function(window),
        "attention_mask": padding,
        "allow_is_causal_skip": allow_is_causal_skip,
        "use_vmap": False,
        "dtype": dtype,
        "device": device,
    }
    kwargs |= {} if window is None else {"local_size": window}
    shape = Shape(causal=True, window=window)  # which `probe` made sure of
    call = Call(kwargs, door.config, door.original, window is not None, *read_call(kwargs, shape))
    descriptor = descriptor_of(call, COMPILED_WIDTH + call.window)
    door.calls[COMPILED_WIDTH + call.window] = call
    door.begin(descriptor, call)
    return descriptor


@_prompt_call.register_fake
def _(
    number: int,
    padding: Any,
    probe: Any,
    offset_tensor: Any,
    offset: int,
    lengths: Sequence[int],
    window: int | None,
    allow_is_causal_skip: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty(lengths[0], 1, 1, COMPILED_WIDTH + (window is not None), dtype=torch.int32, device=device)
