"""Finding our way into a model: its attention modules, what is known of it, and its implementation's switch."""

from __future__ import annotations

import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsekit.config import ModelFacts
from sparsekit.errors import SparsekitError
from sparsekit.patch.state import Attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How a model's file branches on the implementation's name. In these files it was looked at, and they compute the same
# under ours: GPT-2 (but for `reorder_and_upcast_attn`), Gemma 4 (which rows its last layers run), Qwen2.5-Omni (audio).
BRANCH = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b)")
REVIEWED_FILES = {"modeling_gpt2", "modeling_gemma4", "modeling_gemma4_unified", "modeling_qwen2_5_omni"}


def attention_modules(model: PreTrainedModel, text_config: Any) -> list[nn.Module]:
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


def facts_of(model: PreTrainedModel, text_config: Any, modules: list[nn.Module]) -> ModelFacts:
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


def own_attention(module: nn.Module, original: str) -> Attention:
    """The function that the module's own file would have called for `original`."""
    for cls in type(module).__mro__:
        home = sys.modules[cls.__module__]
        if hasattr(home, "eager_attention_forward"):
            found: Attention = home.ALL_ATTENTION_FUNCTIONS.get_interface(original, home.eager_attention_forward)
            return found
    raise SparsekitError(
        f"{type(module).__name__}: its file has no eager_attention_forward; is it outside the interface?"
    )


def switch(model: PreTrainedModel, text_config: Any, name: str) -> None:
    """Set the text config's implementation and leave a vision or audio part alone."""
    if text_config is model.config:
        model.set_attn_implementation(name)
        return
    key = next((k for k in model.config.sub_configs if getattr(model.config, k, None) is text_config), None)
    if key is None:
        raise SparsekitError(f"{type(model).__name__}: its text config is none of {list(model.config.sub_configs)}.")
    model.set_attn_implementation({key: name})
