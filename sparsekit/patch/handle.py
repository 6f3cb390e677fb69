"""put_on and remove, and the handle that they give and take."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from sparsekit.call.caches import clear_caches
from sparsekit.call.geometry import whole
from sparsekit.config import ResolvedConfig, SparseConfig, load
from sparsekit.config.settle import settle
from sparsekit.errors import SparsekitError, shown
from sparsekit.patch.check_report import CheckReport
from sparsekit.patch.door import Name, close_door, is_open, name_for, open_door, original_of
from sparsekit.patch.model import attention_modules, facts_of, machine_of, own_attention
from sparsekit.patch.precision import check_precision
from sparsekit.patch.report import Report, report_layer
from sparsekit.patch.state import CHANGES, DOORS, LAYERS, Applied, Layer, Prompt, applied_to, forgetter
from sparsekit.patch.switch import guard, guards_of, restore_guards, unguard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def put_on(
    model: PreTrainedModel,
    cfg: SparseConfig | Mapping[str, Any] | str | Path,
    given_back: Mapping[int, str] = MappingProxyType({}),
    check: CheckReport | None = None,
) -> Handle:
    """`sparsekit.apply`, of a config that was checked, or is not to be.

    Args:
        model: any Hugging Face model whose attention goes through transformers' AttentionInterface.
        cfg: a path to a YAML file, YAML text, a mapping, or a SparseConfig.
        given_back: why the config runs these layers dense, where a check found them to exceed its budget.
        check: what the check found.

    Raises:
        SparsekitError: a config that is wrong or is for another model, or has a `precision` that cannot run there; a
        model outside the interface, or one that runs a forward just now. After any exception the model is as it was.
    """
    config = load(cfg)
    text_config = _text_config(model)
    modules = attention_modules(model, text_config)
    facts = facts_of(model, text_config, modules)
    resolved = settle(config.resolve(facts), facts, lambda: machine_of(model))
    own, windows = resolved.own_layers(facts), resolved.window_layers(facts)
    check_precision(resolved, modules, facts)
    name, original = name_for(model, text_config), original_of(text_config)
    applied = Applied(config, resolved, weakref.ref(text_config), bool(windows))
    for module in modules:
        index: int = module.layer_idx  # type: ignore[assignment]
        layer = Layer(
            applied,
            weakref.ref(module, forgetter(id(module))),
            module._forward_hooks,
            resolved.layers[index],
            own.get(index),
            index in windows,
            own_attention(module, original),
            config.min_queries,
            given_back.get(index, ""),
        )
        applied.layers.append(layer)

    with CHANGES:
        replaced = applied_to(model)
        for old in replaced:
            _check_replaced(old, modules, type(model).__name__)
        _check_idle(text_config, "apply")
        with _all_or_nothing(model, text_config, modules, replaced):
            open_door(model, text_config, name, applied)
            LAYERS.update((id(module), layer) for module, layer in zip(modules, applied.layers, strict=True))
            for old in replaced:
                _take_off(old, "another config was applied to this model's layers")
            applied.guarded = guard(model, text_config)
    return Handle(applied, check)


@contextmanager
def left_alone(model: PreTrainedModel) -> Iterator[None]:
    """Whatever is put on and taken off within this block, the model is then as before, and so is what was applied."""
    text_config = _text_config(model)
    with CHANGES:
        restore = _restorer(model, text_config, attention_modules(model, text_config), applied_to(model))
    try:
        yield
    finally:
        with CHANGES:
            restore()


def remove(model: PreTrainedModel) -> None:
    """Take sparsekit off `model`; a model without it is left alone.

    A copy of a patched model gets its own attention back.

    Raises:
        SparsekitError: a forward of the model is running.
    """
    text_config = _text_config(model)
    with CHANGES:
        for applied in applied_to(model):
            _remove(applied)
        if isinstance(text_config._attn_implementation, Name) and id(text_config) not in DOORS:
            text_config._attn_implementation_internal = original_of(text_config)


class Handle:
    """sparsekit on one model. Made by `apply`.

    Attributes:
        config: the SparseConfig as given.
        resolved: the same, spelled out for this model and its device: a `dense_below_tokens: auto` is a number there.
        check: what `apply(check=)` found; None without.
    """

    def __init__(self, applied: Applied, check: CheckReport | None = None) -> None:
        self._applied = applied
        self.check = check

    @property
    def config(self) -> SparseConfig:
        return self._applied.given

    @property
    def resolved(self) -> ResolvedConfig:
        return self._applied.resolved

    @property
    def active(self) -> bool:
        """Whether it is still applied: neither removed nor replaced."""
        return not self._applied.ended

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __copy__(self) -> NoReturn:
        raise SparsekitError(
            "a handle cannot be copied or pickled: it stands for sparsekit on one model; sparsekit.apply(copy, "
            "handle.config) makes that of a copy."
        )

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__copy__()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self.__copy__()

    def remove(self) -> None:
        """Make the model exactly what it was. A second call does nothing.

        Raises:
            SparsekitError: a forward of the model is running.
        """
        with CHANGES:
            _remove(self._applied)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within this block the model runs as if sparsekit were not there.

        Raises:
            SparsekitError: the handle was removed or replaced.
        """
        applied = self._active("pause()")
        applied.paused += 1
        applied.epoch = object()
        try:
            yield
        finally:
            applied.paused -= 1
            applied.epoch = object()

    @contextmanager
    def prompt(self, tokens: int | Sequence[int]) -> Iterator[None]:
        """Within this block prompts have `tokens` columns (one number, or one per sample; padding counted).

        Tells patterns where the prompt ends when it comes in chunks: Triangle's dense last rows are then the prompt's,
        not every chunk's, and a chunk shorter than min_queries is known from decoding. Samples that are padded on the
        right and come in chunks need a number each.

        Raises:
            SparsekitError: the handle was removed or replaced; no positive whole numbers; in a forward, a call that
            cannot belong to such a prompt.
        """
        applied = self._active("prompt(tokens=)")
        before, applied.prompt = applied.prompt, Prompt(_columns(tokens))
        applied.epoch = object()
        try:
            yield
        finally:
            applied.prompt = before
            applied.epoch = object()

    def report(self) -> Report:
        """What each layer did in the last prefill, and why."""
        text_config, warning = self._applied.text_config(), ""
        if self._applied.ended:
            warning = f"sparsekit was removed from this model: {self._applied.ended}"
        elif not is_open(text_config):
            now = getattr(text_config, "_attn_implementation", None)
            warning = f"the model's attention implementation was set to {now!r} after apply: sparsekit does not run"
        layers = [] if self._applied.ended else self._applied.layers
        gone = [str(layer.patterns.layer) for layer in layers if layer.module() is None]
        if gone and not warning:
            warning = (
                f"the attention of layers {', '.join(gone)} was replaced or deleted after apply: what stands there "
                "runs its own attention; sparsekit.apply the config again"
            )
        said = () if self.check is None else self.check.lines()
        settled = tuple(line for line in self._applied.resolved.settled if line not in said)
        return Report(tuple(map(report_layer, layers)), warning, said, settled)

    def _active(self, method: str) -> Applied:
        if self._applied.ended:
            raise SparsekitError(
                f"handle.{method}: sparsekit was removed from this model: {self._applied.ended}; this handle has no "
                "effect on it any more, that of a new sparsekit.apply has."
            )
        return self._applied


def _columns(tokens: Any) -> int | tuple[int, ...]:
    several = (isinstance(tokens, Sequence) and not isinstance(tokens, str)) or getattr(tokens, "ndim", 0) == 1
    listed = list(tokens) if several else [tokens]
    try:
        numbers = [whole(number) for number in listed]
    except TypeError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise SparsekitError(
            f"handle.prompt(tokens={shown(tokens)}): a whole number of at least 1 is needed, or one for each sample."
        )
    return tuple(numbers) if several else numbers[0]


def _text_config(model: Any) -> Any:
    from transformers import PreTrainedModel

    get = getattr(getattr(model, "config", None), "get_text_config", None)
    parts = model.modules() if isinstance(model, nn.Module) else ()
    if get is None or not any(isinstance(part, PreTrainedModel) for part in parts):  # wrappers have its config too
        inside = getattr(model, "module", None)
        hint = f"; it holds one: give {type(model).__name__}.module" if hasattr(inside, "config") else ""
        raise SparsekitError(f"{type(model).__name__} is not a Hugging Face model{hint}.")
    return get(decoder=True)


def _check_replaced(old: Applied, modules: list[nn.Module], name: str) -> None:
    """Whatever is replaced is replaced whole."""
    alive = {id(layer.module()) for layer in old.layers if layer.module() is not None}
    if not alive <= {id(module) for module in modules}:
        raise SparsekitError(
            f"{name} shares some of its layers with a model that sparsekit is applied to, and which has others too: "
            "remove it there first."
        )


def _check_idle(text_config: Any, what: str) -> None:
    door = DOORS.get(id(text_config))
    if door is not None and any(forward.runs() for forward in door.forwards):
        raise SparsekitError(
            f"{what}: a forward of this model is running, and its layers would run two configs; wait until it is done."
        )


@contextmanager
def _all_or_nothing(
    model: nn.Module, text_config: Any, modules: list[nn.Module], replaced: list[Applied]
) -> Iterator[None]:
    """If this block raises, whatever it is, the model is as before, and what was applied to it still is."""
    restore = _restorer(model, text_config, modules, replaced)
    try:
        yield
    except BaseException:
        restore()
        raise


def _restorer(
    model: nn.Module, text_config: Any, modules: list[nn.Module], replaced: list[Applied]
) -> Callable[[], None]:
    """What makes the model, and what is applied to it, again what they are."""
    texts = {id(text): text for text in (text_config, *(old.text_config() for old in replaced)) if text is not None}
    names = {key: text._attn_implementation_internal for key, text in texts.items()}
    doors = {key: (door, list(door.applied), door.composed) for key in texts if (door := DOORS.get(key)) is not None}
    layers = {id(module): LAYERS.get(id(module)) for module in modules}
    guards = guards_of(model, replaced)

    def restore() -> None:
        for key, text in texts.items():
            text._attn_implementation_internal = names[key]
            DOORS.pop(key, None)
        for key, (door, applied, composed) in doors.items():
            door.applied, door.composed, DOORS[key] = applied, composed, door
        for key, layer in layers.items():
            LAYERS.pop(key, None)
            if layer is not None:
                LAYERS[key] = layer
        for old in replaced:
            old.ended = ""
        restore_guards(guards)

    return restore


def _remove(applied: Applied) -> None:
    if not applied.ended:
        _check_idle(applied.text_config(), "remove")
        _take_off(applied, "by remove()")


def _take_off(applied: Applied, why: str) -> None:
    applied.ended = why
    for layer in applied.layers:
        module = layer.module()
        if module is not None and LAYERS.get(id(module)) is layer:
            del LAYERS[id(module)]
    unguard(applied.guarded)
    text_config = applied.text_config()
    if text_config is not None:
        close_door(text_config, applied)
    if not LAYERS:  # the last one: nobody is left to use what was kept
        clear_caches()
