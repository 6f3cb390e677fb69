"""apply and remove, and the handle that they give and take."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparsekit.call.geometry import Geometry
from sparsekit.config import ResolvedConfig, SparseConfig, load
from sparsekit.patch.door import open_door
from sparsekit.patch.model import (
    attention_modules,
    facts_of,
    own_attention,
    switch,
)
from sparsekit.patch.report import Report, report_layer
from sparsekit.patch.state import (
    DOORS,
    HANDLES,
    LAYERS,
    NAMES,
    Call,
    DenseCall,
    Layer,
    forgetter,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    modules = attention_modules(model, text_config)
    facts = facts_of(model, text_config, modules)
    resolved = config.resolve(facts)
    own, windows = resolved.own_layers(facts), resolved.window_layers(facts)

    previous = HANDLES.get(model)
    if previous is not None:
        previous.remove()
    handle = Handle(model, text_config, resolved)
    handle._windows = bool(windows)
    open_door(model, text_config, handle)
    HANDLES[model] = handle
    for module in modules:
        index: int = module.layer_idx  # type: ignore[assignment]
        gone = weakref.ref(module, forgetter(id(module)))
        LAYERS[id(module)] = Layer(
            handle,
            gone,
            resolved.layers[index],
            own.get(index),
            index in windows,
            own_attention(module, DOORS[id(text_config)].original),
            config.min_queries,
        )
    handle._modules = [LAYERS[id(module)].module for module in modules]
    return handle


def remove(model: PreTrainedModel) -> None:
    """Take sparsekit off `model`; a model without it is left alone."""
    handle = HANDLES.get(model)
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
        self._state = object()  # another one whenever those two change: by it a Call remembers what they made of it

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
                LAYERS.pop(id(module), None)
        if model is not None:
            HANDLES.pop(model, None)
        if model is None or text_config is None:
            return
        door = DOORS.get(id(text_config))
        if door is None or self not in door.handles:  # another model switched the shared config anew
            return
        door.handles.remove(self)
        if not door.handles:
            del DOORS[id(text_config)]
            if text_config._attn_implementation == NAMES[door.original]:
                switch(model, text_config, door.original)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within this block the model runs as if sparsekit were not there."""
        self._paused += 1
        self._state = object()
        try:
            yield
        finally:
            self._paused -= 1
            self._state = object()

    @contextmanager
    def prompt(self, tokens: int | Sequence[int]) -> Iterator[None]:
        """Within this block prompts have `tokens` columns (one number, or one per sample; left padding counted).

        Tells patterns where the prompt ends when it comes in chunks: Triangle's dense last rows are then the prompt's,
        not every chunk's, and a chunk shorter than min_queries is known from decoding.
        """
        before, self._prompt = self._prompt, tokens
        self._state = object()
        try:
            yield
        finally:
            self._prompt = before
            self._state = object()

    def report(self) -> Report:
        """What each layer did in the last prefill, and why."""
        door = DOORS.get(id(self._text_config()))
        switched_off = ""
        text_config = self._text_config()
        if not self.active:
            switched_off = "sparsekit was removed from this model"
        elif door is None or text_config is None or text_config._attn_implementation != NAMES[door.original]:
            now = getattr(text_config, "_attn_implementation", None)
            switched_off = (
                f"the model's attention implementation was set to {now!r} after apply: sparsekit does not run"
            )
        rows = []
        for ref in self._modules:
            module = ref()
            layer = LAYERS.get(id(module)) if module is not None else None
            if layer is not None:
                rows.append(report_layer(layer))
        return Report(tuple(rows), switched_off)

    def _renew(self, original: str) -> None:
        """Once a prompt: the model's own function may have been registered anew."""
        for ref in self._modules:
            module = ref()
            layer = LAYERS.get(id(module))
            if module is None or layer is None:
                continue
            now = own_attention(module, original)
            if now is layer.attend:  # so it is in the others
                return
            layer.attend = now

    def _keeps_own(self, mask: Mapping[str, Any]) -> bool:
        """Whether the call of these arguments of a mask function runs sparse in no layer: decoding, or all paused."""
        return self._paused > 0 or self._decodes(mask)

    def _dense_because(self, call: Call) -> str:
        """Why this call runs the model's own attention in every layer, or nothing; found once a call."""
        state = self._state
        if state not in call.dense_because:
            call.dense_because[state] = self._find_dense_because(call)
        return call.dense_because[state]

    def _dense_call(self, call: Call) -> DenseCall | None:
        """What every layer of a call that runs dense needs, or None."""
        because, rows = self._dense_because(call), call.kwargs["q_length"]
        if not because:
            return None
        return DenseCall(self._state, rows, call.original_mask(call.kwargs["device"], rows), because)

    def _find_dense_because(self, call: Call) -> str:
        if self._paused:
            return "paused"
        if call.why:
            return call.why
        if self._decodes(call.kwargs):
            return f"{call.kwargs['q_length']} queries, fewer than min_queries {self.config.min_queries}"
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

    def _geometry(self, call: Call) -> Geometry:
        assert call.geometry is not None
        return call.geometry if self._prompt is None else call.geometry.with_prompt(self._prompt)
