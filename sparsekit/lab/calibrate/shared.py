"""What mixtures share: the layers below the first sparse one do what they do when all is dense, so they run once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparsekit.lab.calibrate.probe import own_layers
from sparsekit.models import facts
from sparsekit.patch.caches import cache_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SharedLayers"]

ROOM = 4 << 30  # bytes that all prompts' hidden states and keys may take


@dataclass
class _Kept:
    """Of one prompt: what each layer was given, its keys and values, and whether a layer's result is a tuple."""

    hidden: list[Tensor] = field(default_factory=list)
    cached: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    tupled: bool = False

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self.hidden) + sum(k.nbytes + v.nbytes for k, v in self.cached)


class SharedLayers:
    """Dense runs of prompts, whose lower layers later runs take over: the same bits, without the work.

    Only for models in which every layer is full causal attention over a plain cache; elsewhere, and for prompts beyond
    `room` bytes, every layer runs each time.
    """

    def __init__(self, model: PreTrainedModel, room: int = ROOM) -> None:
        self.layers = [] if own_layers(model) else _decoder_layers(model)
        self.room = room
        self._kept: dict[str, _Kept] = {}

    @contextmanager
    def keep(self, prompt: str) -> Iterator[None]:
        """Within this block the first forward, a dense prefill, is kept under that name."""
        kept = _Kept()

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(kept.hidden) < len(self.layers):
                kept.hidden.append(args[0] if args else kwargs["hidden_states"])

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            i = len(kept.cached)
            if i < len(self.layers):
                layers = getattr(cache_in(kwargs), "layers", [])
                if i < len(layers) and type(layers[i]).__name__ == "DynamicLayer":  # no window, no fixed size
                    kept.cached.append((layers[i].keys, layers[i].values))
                kept.tupled = isinstance(out, tuple)

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self.layers]
        hooks += [layer.register_forward_hook(after, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        whole = self.layers and len(kept.hidden) == len(kept.cached) == len(self.layers)
        if whole and sum(other.bytes for other in self._kept.values()) + kept.bytes <= self.room:
            self._kept[prompt] = kept

    def drop(self, prompt: str) -> None:
        """Its run is kept no longer: there is room for another's."""
        self._kept.pop(prompt, None)

    @contextmanager
    def from_layer(self, first: int, prompt: str) -> Iterator[bool]:
        """Within this block the first forward, a prefill of that prompt, begins at layer `first`; whether it does."""
        kept = self._kept.get(prompt)
        if kept is None or first == 0:
            yield False
            return
        before = [layer.__dict__.get("forward") for layer in self.layers[:first]]
        for i, layer in enumerate(self.layers[:first]):
            layer.forward = _taken_over(kept, i, first, layer.forward)
        try:
            yield True
        finally:
            for layer, own in zip(self.layers, before, strict=False):
                if own is None:
                    del layer.forward
                else:
                    layer.forward = own


def _taken_over(kept: _Kept, i: int, first: int, own: Any) -> Any:
    """Layer i's forward: the first time what it once cached and the hidden state of layer `first`, then its own."""
    ran = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal ran
        if ran:
            return own(*args, **kwargs)
        ran = True
        cache_in(kwargs).update(*kept.cached[i], i)
        hidden = kept.hidden[first]
        return (hidden,) if kept.tupled else hidden

    return forward


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The list of the model's decoder layers, in order; empty where there is none that holds one attention each."""
    count = facts(model).num_layers
    for found in model.modules():
        if isinstance(found, nn.ModuleList) and len(found) == count:
            each = [[m.layer_idx for m in layer.modules() if isinstance(getattr(m, "layer_idx", None), int)]
                    for layer in found]  # fmt: skip
            if all(numbers and set(numbers) == {i} for i, numbers in enumerate(each)):
                return list(found)
    return []
