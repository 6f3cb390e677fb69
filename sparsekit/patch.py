"""apply / remove: sparsekit's attention under any Hugging Face model, and the model exactly as it was again.

The door is transformers' own: one attention and one mask function are registered under one name, and the model's text
config is switched to it. The mask function g is called once a forward and kind of mask; for a prompt chunk it returns a
small DESCRIPTOR in place of a mask and remembers the call. The attention function f then decides layer by layer:
sparsekit's kernel, or the model's original attention function with the mask that the original mask function would have
given.
"""

from __future__ import annotations

import inspect
import re
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from sparsekit.config import LayerPatterns, ModelFacts, ResolvedConfig, SparseConfig, load
from sparsekit.errors import SparsekitError
from sparsekit.functional import plan_heads
from sparsekit.geometry import Geometry
from sparsekit.kernels import Choice, Softmax, attend, choose_call, preferred_tile
from sparsekit.kernels.totals import plan_totals
from sparsekit.plan import BlockPlan, PlanTotals

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Handle", "LayerReport", "Report", "apply", "remove"]

PREFIX = "sparsekit_"

# A layer's last plan stays for the report up to this size; of a larger one, its totals.
KEPT_PLAN_BYTES = 1 << 24

# Width of the descriptors of a compiled model's calls; one more for those of sliding layers.
COMPILED_WIDTH = 7

# Arguments of transformers' attention functions that change the result, and that no kernel here knows.
MISSING_FEATURES = ("position_bias", "sinks", "indices", "block_indices", "cache", "cu_seq_lens_q")

# Arguments that the custom op passes on, or that change nothing in an attention function.
OP_ARGUMENTS = {"scaling", "softcap", "s_aux", "sliding_window", "position_ids", "is_causal", "dropout"} | {
    "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"
}  # fmt: skip
# They keep Python's state: not to be folded into a constant, nor captured in a CUDA graph.
OP_TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe)

# How a model's file branches on the implementation's name. In these files it was looked at, and they compute the same
# under ours: GPT-2 (but for `reorder_and_upcast_attn`), Gemma 4 (which rows its last layers run), Qwen2.5-Omni (audio).
BRANCH = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b)")
REVIEWED_FILES = {"modeling_gpt2", "modeling_gemma4", "modeling_gemma4_unified", "modeling_qwen2_5_omni"}


# ---- what is remembered: layers, models, and the call in progress of each config


@dataclass
class _Layer:
    """One attention module of a patched model."""

    handle: Handle
    module: weakref.ref[nn.Module]
    patterns: LayerPatterns
    own: str | None  # why the layer keeps its own attention, or None
    window: bool  # a sliding layer of the model, which a rule runs here
    ran: str = "not run"
    why: str = ""
    plan: BlockPlan | PlanTotals | None = None
    choice: Choice | None = None
    times: tuple[Any, ...] = ()  # begun, planned, done: seconds, or events of a GPU


@dataclass
class _Call:
    """One forward of a model, as its mask function saw it."""

    kwargs: dict[str, Any]  # of the mask function, without the config, which must not be kept alive
    config: weakref.ref[Any]
    original: str
    geometry: Geometry | None  # None: not a plain causal prompt chunk, nor a plain window
    why: str = ""
    tokens: int = 0  # of the longest sample so far, those that a sliding cache has dropped included
    masks: dict[tuple[torch.device, bool], Tensor | None] = field(default_factory=dict)

    @property
    def window(self) -> bool:
        """Whether it is the mask of sliding layers."""
        return self.kwargs.get("local_size") is not None

    def original_mask(self, device: torch.device, rows: int) -> Tensor | None:
        """The mask that the model's own implementation would have got; built once, and only if a layer asks.

        Its last `rows` rows: some models run their last layers for the last queries alone. No mask then means all keys,
        which is right for one query and not for several.
        """
        whole = rows in (1, self.kwargs["q_length"])
        if (device, whole) not in self.masks:
            kwargs = {**self.kwargs, "config": self.config(), "device": device}
            kwargs["allow_is_causal_skip"] = kwargs.get("allow_is_causal_skip", True) and whole
            self.masks[device, whole] = _mask_functions()[self.original](**kwargs)
        mask = self.masks[device, whole]
        return mask[:, :, -rows:] if isinstance(mask, Tensor) and mask.ndim == 4 else mask


@dataclass
class _Door:
    """A config object that is switched to sparsekit. Several models may share one."""

    config: weakref.ref[Any]
    original: str
    composed: bool  # of a model with other parts, whose masks may hold blocks of pictures
    handles: list[Handle] = field(default_factory=list)
    calls: dict[int, _Call] = field(default_factory=dict)  # by the width of their descriptors


# By id: configs cannot be hashed, and a graph that torch.compile keeps for one module is not run for another where it
# looked up an id, but is where it looked into a weak dictionary. An object that goes takes its entry along.
_LAYERS: dict[int, _Layer] = {}
_DOORS: dict[int, _Door] = {}
_HANDLES: weakref.WeakKeyDictionary[nn.Module, Handle] = weakref.WeakKeyDictionary()
_NAMES: dict[str, str] = {}  # original implementation -> our name for it


def apply(model: PreTrainedModel, cfg: SparseConfig | Mapping[str, Any] | str | Path) -> Handle:
    """Run the prefill of `model` as `cfg` says, from now on; decoding stays the model's own.

    Args:
        model: any Hugging Face model whose attention goes through transformers' AttentionInterface.
        cfg: a path to a YAML file, YAML text, a mapping, or a SparseConfig.

    Returns:
        A handle: `report()`, `pause()`, `prompt(tokens=)`, `remove()`; also a context manager that removes at its end.
        Applying to a model that is already patched replaces.

    Raises:
        SparsekitError: a config that is wrong or is for another model, or a model outside the interface. Nothing is
        changed.
    """
    config = load(cfg)
    text_config = model.config.get_text_config(decoder=True)
    modules = _attention_modules(model, text_config)
    facts = _facts(model, text_config, modules)
    resolved = config.resolve(facts)
    own, windows = resolved.own_layers(text_config), resolved.window_layers(text_config)

    previous = _HANDLES.get(model)
    if previous is not None:
        previous.remove()
    handle = Handle(model, text_config, resolved)
    handle._windows = bool(windows)
    _open_door(model, text_config, handle)
    _HANDLES[model] = handle
    for module in modules:
        index: int = module.layer_idx  # type: ignore[assignment]
        gone = weakref.ref(module, _forget(id(module)))
        _LAYERS[id(module)] = _Layer(handle, gone, resolved.layers[index], own.get(index), index in windows)
    handle._modules = [_LAYERS[id(module)].module for module in modules]
    return handle


def _forget(key: int) -> Callable[[Any], None]:
    """What a layer's weak reference calls when its module goes."""

    def forget(_: object) -> None:
        _LAYERS.pop(key, None)

    return forget


def remove(model: PreTrainedModel) -> None:
    """Take sparsekit off `model`; a model without it is left alone."""
    handle = _HANDLES.get(model)
    if handle is not None:
        handle.remove()


class Handle:
    """sparsekit on one model. Made by `apply`.

    Attributes:
        config: the SparseConfig as given.
        resolved: the same, spelled out for this model.
    """

    def __init__(self, model: PreTrainedModel, text_config: Any, resolved: ResolvedConfig) -> None:
        self.config = resolved.config
        self.resolved = resolved
        self.active = True
        self._model = weakref.ref(model)
        self._text_config = weakref.ref(text_config)
        self._modules: list[weakref.ref[nn.Module]] = []
        self._paused = 0
        self._windows = False  # whether sliding layers run here
        self._prompt: int | Sequence[int] | None = None

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Make the model exactly what it was. A second call does nothing."""
        if not self.active:
            return
        self.active = False
        model, text_config = self._model(), self._text_config()
        for ref in self._modules:
            module = ref()
            if module is not None:
                _LAYERS.pop(id(module), None)
        if model is not None:
            _HANDLES.pop(model, None)
        if model is None or text_config is None:
            return
        door = _DOORS[id(text_config)]
        door.handles.remove(self)
        if not door.handles:
            del _DOORS[id(text_config)]
            if text_config._attn_implementation == _NAMES[door.original]:
                _switch(model, text_config, door.original)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within this block the model runs as if sparsekit were not there."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    @contextmanager
    def prompt(self, tokens: int | Sequence[int]) -> Iterator[None]:
        """Within this block prompts have `tokens` columns (one number, or one per sample; left padding counted).

        Tells patterns where the prompt ends when it comes in chunks: Triangle's dense last rows are then the prompt's,
        not every chunk's, and a chunk shorter than min_queries is known from decoding.
        """
        before, self._prompt = self._prompt, tokens
        try:
            yield
        finally:
            self._prompt = before

    def report(self) -> Report:
        """What each layer did in the last prefill, and why."""
        door = _DOORS.get(id(self._text_config()))
        switched_off = ""
        text_config = self._text_config()
        if not self.active:
            switched_off = "sparsekit was removed from this model"
        elif door is None or text_config is None or text_config._attn_implementation != _NAMES[door.original]:
            now = getattr(text_config, "_attn_implementation", None)
            switched_off = (
                f"the model's attention implementation was set to {now!r} after apply: sparsekit does not run"
            )
        rows = []
        for ref in self._modules:
            module = ref()
            layer = _LAYERS.get(id(module)) if module is not None else None
            if layer is not None:
                rows.append(_report_layer(layer))
        return Report(tuple(rows), switched_off)

    def _dense_because(self, call: _Call) -> str:
        """Why this call runs the model's own attention in every layer, or nothing."""
        if self._paused:
            return "paused"
        if call.geometry is None:
            return call.why
        if self._decodes(call.kwargs):
            return f"{call.geometry.q_len} queries, fewer than min_queries {self.config.min_queries}"
        tokens = self._prompt_columns() or call.tokens
        if tokens < self.config.dense_below_tokens:
            return f"{tokens} tokens, fewer than dense_below_tokens {self.config.dense_below_tokens}"
        return ""

    def _decodes(self, mask: Mapping[str, Any]) -> bool:
        """Whether the call of these arguments of a mask function is decoding, and not a part of the prompt."""
        q_len, offset = mask["q_length"], mask["q_offset"]
        if q_len >= self.config.min_queries:
            return False
        if not self._prompt or (q_len == 1 and isinstance(offset, Tensor)):  # a token in a StaticCache: do not wait
            return True
        return bool(offset + q_len > self._prompt_columns())

    def _prompt_columns(self) -> int:
        """Columns of the longest prompt, or 0 where nobody told."""
        return self._prompt if isinstance(self._prompt, int) else max(self._prompt or [0])

    def _geometry(self, call: _Call) -> Geometry:
        assert call.geometry is not None
        return call.geometry if self._prompt is None else call.geometry.with_prompt(self._prompt)


# ---- the attention function


def _make_attention(original: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def sparsekit_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        door = _door_of(module)
        call = None
        if _is_descriptor(attention_mask):
            call = door.calls.get(attention_mask.shape[-1]) if door is not None else None
            if call is None:
                raise SparsekitError(
                    f"{type(module).__name__}: a sparsekit mask reached a model that sparsekit does not know."
                )
        layer = _LAYERS.get(id(module))
        if layer is not None:
            out = _run(layer, module, query, key, value, attention_mask, call, kwargs)
            if out is not None:
                return out
        if call is not None:
            attention_mask = call.original_mask(query.device, query.shape[2])
        return _original_attention(module, original)(module, query, key, value, attention_mask, **kwargs)

    return _compilable_attention(sparsekit_attention)


def _run(
    layer: _Layer,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    call: _Call | None,
    kwargs: Mapping[str, Any],
) -> tuple[Tensor, None] | None:
    """This layer's attention by sparsekit, or None where the model's own is to run."""
    handle, index = layer.handle, layer.patterns.layer
    if q.shape[2] < handle.config.min_queries and (call is None or q.shape[2] != call.kwargs["q_length"]):
        return None  # decoding, or the last queries alone: the record of the last prefill stays
    if layer.own:
        _note(layer, "own", layer.own)
        return None
    if q.shape[1] != len(layer.patterns.pattern_of_head):
        layer.patterns = _patterns_here(layer.patterns, module, q.shape[1])
    wants_kernel = not layer.patterns.dense or handle.config.dense_impl == "kernel"
    if call is None:
        if wants_kernel and not handle._paused:
            got = "no mask" if mask is None else f"a mask of shape {tuple(mask.shape)}"
            raise SparsekitError(
                f"layer {index} should run {layer.patterns}, but it got {got} not made by transformers' "
                "mask functions: custom 4-D masks cannot be combined with a sparse pattern; pass a 2-D padding mask or "
                "none, or use `with handle.pause():`."
            )
        _note(layer, "dense", "paused" if handle._paused else "dense by config")
        return None
    because = handle._dense_because(call)
    if because or not wants_kernel:
        _note(layer, "dense", because or "dense by config")
        return None
    _check_features(index, layer.patterns, kwargs)
    if k.shape[-1] != v.shape[-1]:
        raise SparsekitError(
            f"layer {index} runs {layer.patterns}, but its keys have size {k.shape[-1]} and its values {v.shape[-1]}, "
            "which no kernel here computes; leave the layer dense."
        )
    if call.window != layer.window:
        got, said = ("full", "sliding") if layer.window else ("sliding", "full")
        raise SparsekitError(f"layer {index} got the mask of a {got} layer, but the model's config says it is {said}.")
    geometry = handle._geometry(call)
    if (geometry.q_len, geometry.kv_len) != (q.shape[2], k.shape[2]) or geometry.batch != q.shape[0]:
        raise SparsekitError(
            f"layer {index} got q {tuple(q.shape)} and k {tuple(k.shape)}, but the mask was made for {geometry.batch} "
            f"samples of {geometry.q_len} queries and {geometry.kv_len} keys."
        )
    softmax = Softmax(
        kwargs.get("scaling") or getattr(module, "scaling", None) or q.shape[-1] ** -0.5,
        kwargs.get("softcap"),
        kwargs.get("s_aux"),
    )
    with _timed(layer, q.device) as note_planned:
        plan = plan_heads(
            layer.patterns.patterns,
            layer.patterns.pattern_of_head,
            q,
            k,
            geometry.with_tile(*preferred_tile(q.device)),
            softmax,
        )
        note_planned()
        choice = choose_call(q, k, v, plan, softmax)
        out = attend(
            q,
            k,
            v,
            plan,
            scale=softmax.scale,
            softcap=softmax.softcap,
            sink_logits=softmax.sink_logits,
            impl=choice.impl,
        )
    assert isinstance(out, Tensor)
    _note(layer, "sparse" if not layer.patterns.dense else "dense", "")
    layer.plan, layer.choice = plan if plan.nbytes <= KEPT_PLAN_BYTES else plan_totals(plan), choice
    return out.transpose(1, 2).contiguous(), None


def _patterns_here(patterns: LayerPatterns, module: nn.Module, heads: int) -> LayerPatterns:
    """Those of the `heads` query heads that this process has of a layer under tensor parallelism.

    They are consecutive: process r of n has the r-th of n equal parts. A layer whose heads are alike need not know r.
    """
    total = len(patterns.pattern_of_head)
    shards = total // heads
    if shards * heads == total:
        parts = range(shards) if len(patterns.patterns) == 1 else _parts_of_weights(module, shards)
        if len(patterns.patterns) == 1 or len(parts) == 1:
            return patterns.of_heads(min(parts) * heads, heads)
    raise SparsekitError(
        f"layer {patterns.layer} has {total} query heads that run {patterns}, and {heads} of them came here, but its "
        "weights do not tell which: shard them as DTensors (transformers' tp_plan does, in equal parts)."
    )


def _parts_of_weights(module: nn.Module, shards: int) -> set[int]:
    """Which of `shards` parts of its sharded weights a module has; several where a mesh has two such dimensions."""
    from torch.distributed.tensor import DTensor

    return {
        weight.device_mesh.get_local_rank(dim)
        for weight in module.parameters()
        if isinstance(weight, DTensor)
        for dim, placement in enumerate(weight.placements)
        if placement.is_shard() and weight.device_mesh.size(dim) == shards
    }


def _check_features(index: int, patterns: LayerPatterns, kwargs: Mapping[str, Any]) -> None:
    """Refuse what the model asks of its attention function and no kernel here computes."""
    if kwargs.get("output_attentions"):
        raise SparsekitError(f"output_attentions=True: layer {index} runs {patterns}, which has no attention matrix.")
    if kwargs.get("dropout"):
        raise SparsekitError(
            f"layer {index} runs {patterns}, which has no dropout, and the model asks for {kwargs['dropout']:g}: call "
            "model.eval(), or `with handle.pause():` to train with the model's own attention."
        )
    if kwargs.get("is_causal") is False:
        raise SparsekitError(f"layer {index} runs {patterns}, but the model asks for attention that is not causal.")
    feature = next((name for name in MISSING_FEATURES if kwargs.get(name) is not None), None)
    if feature is not None:
        raise SparsekitError(
            f"layer {index} runs {patterns}, but the model passes {feature!r} to its attention function, which no "
            "kernel here computes; leave the layer dense."
        )


def _note(layer: _Layer, ran: str, why: str) -> None:
    layer.ran, layer.why = ran, why
    if why:
        layer.plan, layer.choice, layer.times = None, None, ()


@contextmanager
def _timed(layer: _Layer, device: torch.device) -> Iterator[Callable[[], None]]:
    """Plan and kernel time of a layer: by events on CUDA, so that nothing waits; read when the report is asked for.

    Yields what is to be called when the plan is there.
    """
    times: list[Any] = []
    if device.type != "cuda":
        times.append(time.perf_counter())
        yield lambda: times.append(time.perf_counter())
        layer.times = (*times, time.perf_counter())
        return

    def mark() -> None:
        times.append(torch.cuda.Event(enable_timing=True))
        times[-1].record()

    with torch.cuda.device(device):
        mark()
        yield mark
        mark()
    layer.times = tuple(times)


# ---- the mask function


def _make_mask(original: str) -> Callable[..., Tensor | None]:
    def sparsekit_mask(**kwargs: Any) -> Tensor | None:
        door = _DOORS.get(id(kwargs.get("config")))
        own = _mask_functions()[original]
        if door is None or _is_for_others(kwargs, door):
            return own(**kwargs)
        if _is_own(kwargs, door):
            door.calls.clear()
            return own(**kwargs)
        geometry, why, tokens = _read_call(kwargs)
        kept = {name: value for name, value in kwargs.items() if name != "config"}
        kept["q_offset"] = int(kept["q_offset"])  # a StaticCache counts on in its own tensor, layer by layer
        call = _Call(kept, door.config, original, geometry, why, tokens)
        descriptor = _descriptor(call)
        door.calls[descriptor.shape[-1]] = call
        return descriptor

    return _compilable_mask(original, sparsekit_mask)


def _is_for_others(kwargs: Mapping[str, Any], door: _Door) -> bool:
    """A mask for layers that sparsekit does not run: cross-attention, chunks, windows that no rule names."""
    from transformers.masking_utils import bidirectional_mask_function

    if kwargs.get("local_size") is None:
        return kwargs.get("mask_function") is bidirectional_mask_function
    return not any(handle._windows for handle in door.handles)


def _is_own(kwargs: Mapping[str, Any], door: _Door) -> bool:
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


def _read_call(kwargs: Mapping[str, Any]) -> tuple[Geometry | None, str, int]:
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


def _descriptor(call: _Call, width: int = 0) -> Tensor:
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


def _is_descriptor(mask: Tensor | None) -> TypeGuard[Tensor]:
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.int32
        and mask.ndim == 4
        and mask.shape[1:3] == (1, 1)
        and 3 <= mask.shape[3] <= COMPILED_WIDTH + 1
    )


# ---- under torch.compile: two custom ops, opaque to it, that do at run time what an uncompiled model does


def _compilable_attention(
    attention: Callable[..., tuple[Tensor, Tensor | None]],
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`attention`, which a graph calls through a custom op wherever a prompt chunk comes."""
    outside = torch.compiler.disable(attention, reason="sparsekit: gradients, attention matrices or a copied layer")

    def sparsekit_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not torch.compiler.is_compiling() or not _is_descriptor(attention_mask):
            return attention(module, query, key, value, attention_mask, **kwargs)
        known = id(module) in _LAYERS
        tracked = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        strange = any(value is not None and name not in OP_ARGUMENTS for name, value in kwargs.items())
        if not known or tracked or strange or kwargs.get("output_attentions"):
            return outside(module, query, key, value, attention_mask, **kwargs)
        told = {name: kwargs.get(name) for name in ("scaling", "softcap", "s_aux", "sliding_window", "position_ids")}
        causal, dropout = kwargs.get("is_causal"), kwargs.get("dropout", 0.0)
        out = torch.ops.sparsekit.attention(
            query, key, value, attention_mask, id(module), *told.values(), causal, dropout
        )
        return out, None

    return sparsekit_attention


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

    found = _LAYERS.get(layer)
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


def _compilable_mask(original: str, make_mask: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """`make_mask`, which a graph calls through a custom op wherever a prompt chunk comes."""
    outside = torch.compiler.disable(make_mask, reason="sparsekit: a mask function of the caller's, or of pictures")

    def sparsekit_mask(**kwargs: Any) -> Tensor | None:
        if not torch.compiler.is_compiling():
            return make_mask(**kwargs)
        door = _DOORS.get(id(kwargs.get("config")))
        if door is None or _is_for_others(kwargs, door) or _is_own(kwargs, door):
            return _mask_functions()[original](**kwargs)
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
    from transformers.masking_utils import causal_mask_function

    mask, window = kwargs["mask_function"], kwargs.get("local_size")
    if window is None and mask is causal_mask_function:
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
    from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

    door = _DOORS.get(config)
    if door is None:
        raise SparsekitError("a compiled model runs with sparsekit, which was removed from it: compile it again.")
    if probe is not None and not bool(probe.all()):
        raise SparsekitError(
            "a compiled model got packed sequences, or a mask that is not plain causal: run it uncompiled, or compile "
            "it within `with handle.pause():`; the model's own attention does them."
        )
    batch, q_length, kv_length, kv_offset = lengths
    kwargs: dict[str, Any] = {
        "batch_size": batch,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": offset if offset_tensor is None else int(offset_tensor),
        "kv_offset": kv_offset,
        "mask_function": causal_mask_function if window is None else sliding_window_causal_mask_function(window),
        "attention_mask": padding,
        "allow_is_causal_skip": allow_is_causal_skip,
        "use_vmap": False,
        "dtype": dtype,
        "device": device,
    }
    kwargs |= {} if window is None else {"local_size": window}
    call = _Call(kwargs, door.config, door.original, *_read_call(kwargs))
    width = COMPILED_WIDTH + call.window
    door.calls[width] = call
    return _descriptor(call, width)


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


# ---- finding our way into a model


def _mask_functions() -> Any:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS


def _door_of(module: nn.Module) -> _Door | None:
    return _DOORS.get(id(getattr(module, "config", None)))


def _original_attention(module: nn.Module, original: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that the model's own file would have called for `original`."""
    for cls in type(module).__mro__:
        home = sys.modules[cls.__module__]
        if hasattr(home, "eager_attention_forward"):
            found: Callable[..., tuple[Tensor, Tensor | None]]
            found = home.ALL_ATTENTION_FUNCTIONS.get_interface(original, home.eager_attention_forward)
            return found
    raise SparsekitError(
        f"{type(module).__name__}: its file has no eager_attention_forward; is it outside the interface?"
    )


def _attention_modules(model: PreTrainedModel, text_config: Any) -> list[nn.Module]:
    """The decoder's attention modules, in layer order: those that name a layer and read the text config."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise SparsekitError(f"{name} is an encoder-decoder model; sparsekit is for the prompts of decoders alone.")
    readers = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "is_causal")
        and getattr(module, "config", None) is text_config
        and "CrossAttention" not in type(module).__name__
        and not getattr(module, "is_cross_attention", False)
    ]
    if not readers:
        raise SparsekitError(
            f"{name}: no attention layer goes through transformers' AttentionInterface; sparsekit cannot be applied to "
            "this architecture."
        )
    found = [module for module in readers if module.is_causal]
    if not found or not getattr(text_config, "is_causal", True):
        raise SparsekitError(f"{name}: its attention is not causal (an encoder's); sparsekit cannot be applied to it.")
    _check_files(model, text_config, found)
    return sorted(found, key=lambda module: module.layer_idx)  # type: ignore[arg-type,return-value]


def _check_files(model: PreTrainedModel, text_config: Any, modules: list[nn.Module]) -> None:
    """Refuse a model whose file computes something else, or reads the mask, depending on the implementation's name."""
    for file in {cls.__module__ for cls in (type(model), *map(type, modules))}:
        if file.rpartition(".")[2] in REVIEWED_FILES and not getattr(text_config, "reorder_and_upcast_attn", False):
            continue
        try:
            source = inspect.getsource(sys.modules[file])
        except (OSError, TypeError):
            continue  # written in a notebook, or compiled
        line = next((line for line in source.splitlines() if BRANCH.search(line)), None)
        if line is not None:
            raise SparsekitError(
                f"{type(model).__name__}: {file} decides by the name of the attention implementation what to compute "
                f"({line.split('#')[0].strip()!r}); sparsekit cannot be applied to this architecture."
            )


def _facts(model: PreTrainedModel, text_config: Any, modules: list[nn.Module]) -> ModelFacts:
    def get(name: str) -> Any:
        try:
            return getattr(text_config, name, None)
        except RuntimeError:  # layers differ in it
            return None

    heads = get("num_attention_heads")
    return ModelFacts(
        name=get("name_or_path") or type(model).__name__,
        num_layers=get("num_hidden_layers"),
        num_heads=heads,
        num_key_heads=get("num_key_value_heads") or heads,
        head_dim=_head_dim(modules),
        hidden_size=get("hidden_size"),
    )


def _head_dim(modules: list[nn.Module]) -> int | None:
    """The layers' head size, where they have one in common and tell it."""
    sizes = {getattr(module, "head_dim", None) for module in modules}
    return sizes.pop() if len(sizes) == 1 else None


def _open_door(model: PreTrainedModel, text_config: Any, handle: Handle) -> None:
    """Switch the text config to sparsekit, and check that it took."""
    door = _DOORS.get(id(text_config))
    if door is not None and text_config._attn_implementation == _NAMES[door.original]:
        door.handles.append(handle)
        return
    current = text_config._attn_implementation or "eager"
    original = next((was for was, ours in _NAMES.items() if ours == current), current)
    name = _register(original)
    _switch(model, text_config, name)
    if text_config._attn_implementation != name:
        raise SparsekitError(
            f"{type(model).__name__} does not let its attention implementation be set (it is {current!r}): it is "
            "outside transformers' AttentionInterface, and sparsekit cannot be applied."
        )
    key = id(text_config)
    gone = weakref.ref(text_config, lambda _: _DOORS.pop(key, None))
    _DOORS[key] = _Door(gone, original, text_config is not model.config, [handle])


def _register(original: str) -> str:
    """Our name for `original`: one each, so that a module we do not know (a copy, a shared config) runs its own."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    if original not in _NAMES:
        if original != "eager" and original not in AttentionInterface():
            raise SparsekitError(
                f"the model's attention implementation {original!r} is not registered with transformers."
            )
        if original not in AttentionMaskInterface():
            raise SparsekitError(
                f"the model's attention implementation {original!r} has no mask function in transformers."
            )
        name = f"{PREFIX}{len(_NAMES)}"
        AttentionInterface.register(name, _make_attention(original))
        AttentionMaskInterface.register(name, _make_mask(original))
        _NAMES[original] = name
    return _NAMES[original]


def _switch(model: PreTrainedModel, text_config: Any, name: str) -> None:
    """Set the text config's implementation and leave a vision or audio part alone."""
    if text_config is model.config:
        model.set_attn_implementation(name)
        return
    key = next((k for k in model.config.sub_configs if getattr(model.config, k, None) is text_config), None)
    if key is None:
        raise SparsekitError(f"{type(model).__name__}: its text config is none of {list(model.config.sub_configs)}.")
    model.set_attn_implementation({key: name})


# ---- the report


@dataclass(frozen=True)
class LayerReport:
    """What one layer did in the last prefill.

    `ran`: sparse, dense, own (kept its own attention), or "not run". `density` and `tile_density` are shares of the
    causal pairs and tiles, `plan_bytes` the plan's tensors, `ms` plan and kernel together, `plan_ms` the plan alone (a
    static pattern's is made once, and found again); `impl_why` says why `impl`.
    """

    layer: int
    ran: str
    why: str
    pattern: str
    impl: str = "model"
    density: float = 1.0
    tile_density: float = 1.0
    plan_bytes: int = 0
    ms: float | None = None
    plan_ms: float | None = None
    impl_why: str = ""


@dataclass(frozen=True)
class Report:
    """One `LayerReport` a layer; printing it gives a table. `warning` says why sparsekit does not run, or is empty."""

    layers: tuple[LayerReport, ...]
    warning: str = ""

    def to_dicts(self) -> list[dict[str, Any]]:
        return [asdict(layer) for layer in self.layers]

    def __str__(self) -> str:
        lines = [self.warning] if self.warning else []
        lines.append(
            f"{'layer':>5}  {'ran':8}{'density':>8}{'tiles':>8}{'plan':>10}{'ms':>9}{'of plan':>9}  {'by':10}pattern"
        )
        for row in self.layers:
            ms, plan_ms = ("" if value is None else f"{value:.2f}" for value in (row.ms, row.plan_ms))
            what = row.pattern + (f" ({row.why})" if row.why else "")
            lines.append(
                f"{row.layer:>5}  {row.ran:8}{row.density:>8.3f}{row.tile_density:>8.3f}{row.plan_bytes:>8} B{ms:>9}"
                f"{plan_ms:>9}  {row.impl:10}{what}"
            )
        reasons = dict.fromkeys((row.impl, row.impl_why) for row in self.layers if row.impl_why)
        lines += [f"{impl}: {why}" for impl, why in reasons]
        return "\n".join(lines)


def _report_layer(layer: _Layer) -> LayerReport:
    index, pattern = layer.patterns.layer, str(layer.patterns)
    if layer.plan is None or layer.choice is None:
        return LayerReport(index, layer.ran, layer.why, pattern)
    begun, planned, done = layer.times
    if isinstance(done, float):
        plan_ms, ms = (planned - begun) * 1e3, (done - begun) * 1e3
    else:
        done.synchronize()
        plan_ms, ms = begun.elapsed_time(planned), begun.elapsed_time(done)
    return LayerReport(
        index,
        layer.ran,
        layer.why,
        pattern,
        layer.choice.impl,
        layer.plan.density(),
        layer.plan.tile_density(),
        layer.plan.nbytes,
        ms,
        plan_ms,
        layer.choice.why,
    )
