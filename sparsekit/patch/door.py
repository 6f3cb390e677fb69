"""The door into transformers: our two functions, registered under one name for each original implementation."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

from sparsekit.errors import SparsekitError
from sparsekit.patch.attention import make_attention
from sparsekit.patch.compiled import compilable_mask
from sparsekit.patch.mask import make_mask
from sparsekit.patch.state import DOORS, NAMES, Applied, Door

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "sparsekit_"


class Name(str):
    """Our name for an original implementation, in this process: a pickle holds the original's instead."""

    original: str

    def __deepcopy__(self, memo: Any) -> Name:
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        warnings.warn(
            "a pickle of a model does not hold what sparsekit applied to it: what is loaded runs its own attention "
            "until sparsekit.apply",
            stacklevel=2,
        )
        return str, (self.original,)


def original_of(text_config: Any) -> str:
    """The model's own implementation, behind our name for it or not."""
    current = text_config._attn_implementation or "eager"
    return next((original for original, name in NAMES.items() if name == current), current)


def name_for(model: PreTrainedModel, text_config: Any) -> str:
    """Our name for the model's own implementation, registered: one each, so that a sibling that shares the config runs
    its own.

    Raises:
        SparsekitError: transformers does not let the implementation be set, or does not know it.
    """
    from transformers import PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    original = original_of(text_config)
    readers = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is text_config]
    if not all(type(part)._can_set_attn_implementation() for part in readers):
        raise SparsekitError(
            f"{type(model).__name__} does not let its attention implementation be set (it is {original!r}): it is "
            "outside transformers' AttentionInterface, and sparsekit cannot be applied."
        )
    if original not in NAMES:
        if original != "eager" and original not in AttentionInterface():
            raise SparsekitError(
                f"the model's attention implementation {original!r} is not registered with transformers."
            )
        if original not in AttentionMaskInterface():
            raise SparsekitError(
                f"the model's attention implementation {original!r} has no mask function in transformers."
            )
        name = Name(f"{PREFIX}{len(NAMES)}")
        name.original = original
        AttentionInterface.register(name, make_attention(original))
        AttentionMaskInterface.register(name, compilable_mask(original, make_mask(original)))
        NAMES[original] = name
    return NAMES[original]


def is_open(text_config: Any) -> bool:
    """Whether the config runs sparsekit: a caller may have set another implementation since."""
    door = DOORS.get(id(text_config))
    return door is not None and text_config._attn_implementation == NAMES[door.original]


def open_door(model: PreTrainedModel, text_config: Any, name: str, applied: Applied) -> None:
    """Switch the text config to our `name`: one attribute of one object, a vision or audio part is left alone."""
    composed = text_config is not model.config
    if is_open(text_config):
        door = DOORS[id(text_config)]
        door.applied.append(applied)
        door.composed |= composed
        return
    key = id(text_config)
    gone = weakref.ref(text_config, lambda _: DOORS.pop(key, None))
    DOORS[key] = Door(gone, original_of(text_config), composed, [applied])
    text_config._attn_implementation_internal = name


def close_door(text_config: Any, applied: Applied) -> None:
    """Switch the text config back when the last that was applied goes."""
    door = DOORS.get(id(text_config))
    if door is None or applied not in door.applied:  # another model switched the shared config anew
        return
    door.applied.remove(applied)
    if not door.applied:
        if is_open(text_config):
            text_config._attn_implementation_internal = door.original
        del DOORS[id(text_config)]
