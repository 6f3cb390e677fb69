"""A patched model's own switch of implementations: it refuses what would take sparsekit off without its handle."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsekit.errors import SparsekitError
from sparsekit.patch.state import Applied

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "set_attn_implementation"


class _Guard:
    """In place of the method, on the model object alone: copies and pickles have the method of their class."""

    def __init__(self, model: PreTrainedModel, text_config: Any) -> None:
        self._model, self._text_config = weakref.ref(model), weakref.ref(text_config)

    def __call__(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        model, text_config = self._model(), self._text_config()
        assert model is not None and text_config is not None
        configs = [*{id(part.config): part.config for part in _models(model)}.values(), text_config]
        before = [(config, config._attn_implementation_internal) for config in configs]
        ours = text_config._attn_implementation_internal
        _method(model)(attn_implementation, *args, **kwargs)
        if text_config._attn_implementation_internal == ours:  # that of another part alone
            return
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        raise SparsekitError(
            f"{METHOD}({attn_implementation!r}) would take sparsekit off this model, and its handle would not know: "
            "handle.remove() first. Continuous batching (generate_batch) does so where flash attention is installed."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return _method(memo.get(id(self._model()), self._model()))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._model(), METHOD)


def guard(model: PreTrainedModel, text_config: Any) -> list[weakref.ref[nn.Module]]:
    """Set the guard on `model` and on the models inside it that read the text config; returns where it stands."""
    parts = [part for part in _models(model) if part is model or part.config is text_config]
    for part in parts:
        part.__dict__[METHOD] = _Guard(part, text_config)
    return [weakref.ref(part) for part in parts]


def unguard(parts: list[weakref.ref[nn.Module]]) -> None:
    for ref in parts:
        part = ref()
        if part is not None:
            part.__dict__.pop(METHOD, None)


def guards_of(model: nn.Module, applied: Iterable[Applied]) -> list[tuple[nn.Module, Any]]:
    """The guard, or None, of each model inside `model` and of those that `applied` has guarded."""
    guarded = (part for each in applied for ref in each.guarded if (part := ref()) is not None)
    return [(part, part.__dict__.get(METHOD)) for part in (*_models(model), *guarded)]


def restore_guards(guards: list[tuple[nn.Module, Any]]) -> None:
    for part, before in guards:
        part.__dict__.pop(METHOD, None)
        if before is not None:
            part.__dict__[METHOD] = before


def _models(model: nn.Module) -> Iterator[PreTrainedModel]:
    from transformers import PreTrainedModel

    return (part for part in model.modules() if isinstance(part, PreTrainedModel))


def _method(model: Any) -> Callable[..., Any]:
    return MethodType(getattr(type(model), METHOD), model)
