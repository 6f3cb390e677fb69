"""apply / remove: sparsekit's attention under any Hugging Face model, and the model exactly as it was again.

The door is transformers' own: one attention and one mask function are registered under one name, and the model's text
config is switched to it. The mask function g is called once a forward; for a prompt chunk it returns a small DESCRIPTOR
in place of a mask and remembers the call. The attention function f then decides layer by layer: sparsekit's kernel, or
the model's original attention function with the mask that the original mask function would have given.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsekit.config import LayerPatterns, ModelFacts, ResolvedConfig, SparseConfig, load
from sparsekit.errors import SparsekitError
from sparsekit.functional import plan_heads
from sparsekit.geometry import Geometry
from sparsekit.kernels import Choice, Softmax, attend, choose_call, preferred_tile
from sparsekit.plan import BlockPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Handle", "LayerReport", "Report", "apply", "remove"]

PREFIX = "sparsekit_"


# ---- what is remembered: layers, models, and the call in progress of each config


@dataclass
class _Layer:
    """One attention module of a patched model."""

    handle: Handle
    patterns: LayerPatterns
    own: str | None  # why the layer keeps its own attention, or None
    ran: str = "not run"
    why: str = ""
    plan: BlockPlan | None = None
    choice: Choice | None = None
    seconds: float = 0.0
    events: tuple[Any, Any] | None = None


@dataclass
class _Call:
    """One forward of a model, as its mask function saw it."""

    kwargs: dict[str, Any]  # of the mask function, without the config, which must not be kept alive
    config: weakref.ref[Any]
    original: str
    geometry: Geometry | None  # None: not a plain causal prompt chunk
    why: str = ""
    masks: dict[torch.device, Tensor | None] = field(default_factory=dict)

    def original_mask(self, device: torch.device) -> Tensor | None:
        """The mask that the model's own implementation would have got; built once, and only if a layer asks."""
        if device not in self.masks:
            kwargs = {**self.kwargs, "config": self.config(), "device": device}
            self.masks[device] = _mask_functions()[self.original](**kwargs)
        return self.masks[device]


@dataclass
class _Door:
    """A config object that is switched to sparsekit. Several models may share one."""

    config: weakref.ref[Any]
    original: str
    handles: list[Handle] = field(default_factory=list)
    call: _Call | None = None


_LAYERS: weakref.WeakKeyDictionary[nn.Module, _Layer] = weakref.WeakKeyDictionary()
_HANDLES: weakref.WeakKeyDictionary[nn.Module, Handle] = weakref.WeakKeyDictionary()
_DOORS: dict[int, _Door] = {}  # by id(config): configs cannot be hashed
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
    own = resolved.own_layers(text_config)

    previous = _HANDLES.get(model)
    if previous is not None:
        previous.remove()
    handle = Handle(model, text_config, resolved)
    _open_door(model, text_config, handle)
    _HANDLES[model] = handle
    for module in modules:
        index: int = module.layer_idx  # type: ignore[assignment]
        _LAYERS[module] = _Layer(handle, resolved.layers[index], own.get(index))
    handle._modules = [weakref.ref(module) for module in modules]
    return handle


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
                _LAYERS.pop(module, None)
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
        not every chunk's.
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
            layer = _LAYERS.get(module) if module is not None else None
            if layer is not None:
                rows.append(_report_layer(layer))
        return Report(tuple(rows), switched_off)

    def _dense_because(self, call: _Call) -> str:
        """Why this call runs the model's own attention in every layer, or nothing."""
        if self._paused:
            return "paused"
        if call.geometry is None:
            return call.why
        if call.geometry.q_len < self.config.min_queries:
            return f"{call.geometry.q_len} queries, fewer than min_queries {self.config.min_queries}"
        prompt = self._prompt if isinstance(self._prompt, int) else max(self._prompt or [0])
        tokens = prompt or max(span.keys for span in call.geometry.spans)
        if tokens < self.config.dense_below_tokens:
            return f"{tokens} tokens, fewer than dense_below_tokens {self.config.dense_below_tokens}"
        return ""

    def _geometry(self, call: _Call) -> Geometry:
        assert call.geometry is not None
        return call.geometry if self._prompt is None else call.geometry.with_prompt(self._prompt)


# ---- the attention function


def _make_attention(original: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def sparsekit_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        door = _door_of(module)
        described = _is_descriptor(attention_mask)
        if described and (door is None or door.call is None):
            raise SparsekitError(
                f"{type(module).__name__}: a sparsekit mask reached a model that sparsekit does not know."
            )
        call = door.call if described and door is not None else None
        layer = _LAYERS.get(module)
        if layer is not None:
            out = _run(layer, module, query, key, value, attention_mask, call, kwargs)
            if out is not None:
                return out
        if call is not None:
            attention_mask = call.original_mask(query.device)
        return _original_attention(module, original)(module, query, key, value, attention_mask, **kwargs)

    return sparsekit_attention


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
    if q.shape[2] < handle.config.min_queries:
        return None  # decoding: the record of the last prefill stays
    if layer.own:
        _note(layer, "own", layer.own)
        return None
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
    if kwargs.get("output_attentions"):
        raise SparsekitError(
            f"output_attentions=True: layer {index} runs {layer.patterns}, which has no attention matrix."
        )
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
    with _timed(layer, q.device):
        plan = plan_heads(
            layer.patterns.patterns,
            layer.patterns.pattern_of_head,
            q,
            k,
            geometry.with_tile(*preferred_tile(q.device)),
            softmax,
        )
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
    layer.plan, layer.choice = plan, choice
    return out.transpose(1, 2).contiguous(), None


def _note(layer: _Layer, ran: str, why: str) -> None:
    layer.ran, layer.why = ran, why
    if why:
        layer.plan, layer.choice, layer.seconds, layer.events = None, None, 0.0, None


@contextmanager
def _timed(layer: _Layer, device: torch.device) -> Iterator[None]:
    """Plan and kernel time of a layer: by events on CUDA, so that nothing waits; read when the report is asked for."""
    if device.type != "cuda":
        start = time.perf_counter()
        yield
        layer.seconds, layer.events = time.perf_counter() - start, None
        return
    with torch.cuda.device(device):
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        yield
        events[1].record()
    layer.events = events


# ---- the mask function


def _make_mask(original: str) -> Callable[..., Tensor | None]:
    def sparsekit_mask(**kwargs: Any) -> Tensor | None:
        door = _DOORS.get(id(kwargs.get("config")))
        own = _mask_functions()[original]
        if door is None or kwargs.get("local_size") is not None:
            return own(**kwargs)
        if kwargs["q_length"] < min(handle.config.min_queries for handle in door.handles):
            door.call = None
            return own(**kwargs)
        geometry, why = _read_call(kwargs)
        kept = {name: value for name, value in kwargs.items() if name != "config"}
        door.call = _Call(kept, door.config, original, geometry, why)
        return _descriptor(kwargs, geometry)

    return sparsekit_mask


def _read_call(kwargs: Mapping[str, Any]) -> tuple[Geometry | None, str]:
    """The geometry of a plain causal call, or why there is none. Reads the padding mask once."""
    from transformers.masking_utils import causal_mask_function

    if kwargs.get("mask_function") is not causal_mask_function:
        return None, "the mask is not plain causal (packed sequences, or a custom mask function)"
    if int(kwargs.get("kv_offset", 0)):
        return None, "the cache has dropped its first keys"
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
            return None, "the attention mask has holes"
        starts = [start if count else 0 for start, _, count in read]
        ends = [min(end, offset + q_len) if count else 0 for _, end, count in read]
    geometry = Geometry.of(q_len, kv_len, batch=batch, q_offset=offset, kv_start=starts, kv_end=ends)
    return geometry, ""


def _descriptor(kwargs: Mapping[str, Any], geometry: Geometry | None) -> Tensor:
    """int32 (B, 1, 1, 3): q_offset, kv_start, kv_end.

    4-D, because `generate` with a StaticCache makes masks before the forward and only 4-D ones pass through untouched.
    """
    batch = kwargs["batch_size"]
    rows = [(0, 0, 0)] * batch
    if geometry is not None:
        rows = [(geometry.q_offset, a, b) for a, b in zip(geometry.kv_start, geometry.kv_end, strict=True)]
    return torch.tensor(rows, dtype=torch.int32, device=kwargs.get("device")).view(batch, 1, 1, 3)


def _is_descriptor(mask: Tensor | None) -> bool:
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.ndim == 4 and mask.shape[1:] == (1, 1, 3)


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
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "is_causal")
        and getattr(module, "config", None) is text_config
    ]
    if not found:
        raise SparsekitError(
            f"{type(model).__name__}: no attention layer goes through transformers' AttentionInterface; sparsekit "
            "cannot be applied to this architecture."
        )
    return sorted(found, key=lambda module: module.layer_idx)  # type: ignore[arg-type,return-value]


def _facts(model: PreTrainedModel, text_config: Any, modules: list[nn.Module]) -> ModelFacts:
    get = lambda name: getattr(text_config, name, None)  # noqa: E731
    heads = get("num_attention_heads")
    return ModelFacts(
        name=get("name_or_path") or type(model).__name__,
        num_layers=get("num_hidden_layers"),
        num_heads=heads,
        num_key_heads=get("num_key_value_heads") or heads,
        head_dim=get("head_dim") or (get("hidden_size") // heads if heads and get("hidden_size") else None),
        hidden_size=get("hidden_size"),
    )


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
    _DOORS[key] = _Door(weakref.ref(text_config, lambda _: _DOORS.pop(key, None)), original, [handle])


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
    causal pairs and tiles, `plan_bytes` the plan's tensors, `ms` plan and kernel together; `impl_why` says why `impl`.
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
        lines.append(f"{'layer':>5}  {'ran':8}{'density':>8}{'tiles':>8}{'plan':>10}{'ms':>9}  {'by':10}pattern")
        for row in self.layers:
            ms = "" if row.ms is None else f"{row.ms:.2f}"
            what = row.pattern + (f" ({row.why})" if row.why else "")
            lines.append(
                f"{row.layer:>5}  {row.ran:8}{row.density:>8.3f}{row.tile_density:>8.3f}{row.plan_bytes:>8} B{ms:>9}  "
                f"{row.impl:10}{what}"
            )
        reasons = dict.fromkeys((row.impl, row.impl_why) for row in self.layers if row.impl_why)
        lines += [f"{impl}: {why}" for impl, why in reasons]
        return "\n".join(lines)


def _report_layer(layer: _Layer) -> LayerReport:
    index, pattern = layer.patterns.layer, str(layer.patterns)
    if layer.plan is None or layer.choice is None:
        return LayerReport(index, layer.ran, layer.why, pattern)
    if layer.events is not None:
        layer.events[1].synchronize()
        ms = layer.events[0].elapsed_time(layer.events[1])
    else:
        ms = layer.seconds * 1e3
    plan = layer.plan
    return LayerReport(
        index,
        layer.ran,
        layer.why,
        pattern,
        layer.choice.impl,
        plan.density(),
        plan.tile_density(),
        plan.nbytes,
        ms,
        layer.choice.why,
    )
