"""The door into transformers: our two functions, registered under one name for each original implementation."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from sparsekit.errors import SparsekitError
from sparsekit.patch.attention import make_attention
from sparsekit.patch.compiled import compilable_mask
from sparsekit.patch.mask import make_mask
from sparsekit.patch.model import switch
from sparsekit.patch.state import DOORS, NAMES, Door

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsekit.patch.handle import Handle

PREFIX = "sparsekit_"


def open_door(model: PreTrainedModel, text_config: Any, handle: Handle) -> None:
    """Switch the text config to sparsekit, and check that it took."""
    door = DOORS.get(id(text_config))
    if door is not None and text_config._attn_implementation == NAMES[door.original]:
        door.handles.append(handle)
        return
    current = text_config._attn_implementation or "eager"
    original = next((was for was, ours in NAMES.items() if ours == current), current)
    name = _register(original)
    switch(model, text_config, name)
    if text_config._attn_implementation != name:
        raise SparsekitError(
            f"{type(model).__name__} does not let its attention implementation be set (it is {current!r}): it is "
            "outside transformers' AttentionInterface, and sparsekit cannot be applied."
        )
    key = id(text_config)
    gone = weakref.ref(text_config, lambda _: DOORS.pop(key, None))
    DOORS[key] = Door(gone, original, text_config is not model.config, [handle])


def _register(original: str) -> str:
    """Our name for `original`: one each, so that a module we do not know (a copy, a shared config) runs its own."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    if original not in NAMES:
        if original != "eager" and original not in AttentionInterface():
            raise SparsekitError(
                f"the model's attention implementation {original!r} is not registered with transformers."
            )
        if original not in AttentionMaskInterface():
            raise SparsekitError(
                f"the model's attention implementation {original!r} has no mask function in transformers."
            )
        name = f"{PREFIX}{len(NAMES)}"
        AttentionInterface.register(name, make_attention(original))
        AttentionMaskInterface.register(name, compilable_mask(original, make_mask(original)))
        NAMES[original] = name
    return NAMES[original]
