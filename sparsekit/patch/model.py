"""Finding our way into a model: its attention modules, the facts of its layers, and its own function.

`facts_of` is the one reader of a model's facts: `apply` reads them off the model, `explain`, `validate` and calibration
off the same model without its weights (`sparsekit.models.facts`).
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError
from torch import nn

from sparsekit.config import ArchFacts, rope_theta_of
from sparsekit.config.settle import Machine
from sparsekit.errors import SparsekitError
from sparsekit.patch.call import KNOWN_ARGUMENTS
from sparsekit.patch.state import Attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How a model's file branches on the implementation's name. In these files it was looked at, and they compute the same
# under ours: GPT-2 (but for `reorder_and_upcast_attn`), Gemma 4 (which rows its last layers run), Qwen2.5-Omni (audio).
BRANCH = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b)")
REVIEWED_FILES = {"modeling_gpt2", "modeling_gemma4", "modeling_gemma4_unified", "modeling_qwen2_5_omni"}

# What transformers calls a layer of causal attention. A hybrid one has another mixer beside it, which stays as it is.
FULL_KINDS = {"full_attention", "attention", "hybrid"}
SLIDING_KINDS = {"sliding_attention", "hybrid_sliding"}


def attention_modules(model: PreTrainedModel, text_config: Any) -> list[nn.Module]:
    """The decoder's attention modules, in layer order: those that name a layer and read the text config.

    Raises:
        SparsekitError: a model that sparsekit cannot be applied to, whatever the config.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise SparsekitError(f"{name} is an encoder-decoder model; sparsekit is for the prompts of decoders alone.")
    readers = [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx")
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
        raise SparsekitError(
            f"{name}: its attention is not causal (an encoder's), or does not say that it is; sparsekit cannot be "
            "applied to it."
        )
    _check_numbers(model, found, num_layers(text_config))
    _check_files(model, text_config, found)
    for module in found:
        eager_attention(module)  # or raises
    return sorted(found, key=lambda module: module.layer_idx)  # type: ignore[arg-type,return-value]


def _check_numbers(model: PreTrainedModel, modules: list[nn.Module], layers: int) -> None:
    """Refuse a model whose attention modules are not one for each layer: which layer runs could not be told."""
    whole = "so its layers cannot be told apart; sparsekit cannot be applied to this architecture."
    name, numbers = type(model).__name__, Counter[Any](module.layer_idx for module in modules)
    for module in modules:
        number: Any = module.layer_idx
        kind = type(module).__name__
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < layers:
            raise SparsekitError(f"{name}: a {kind} has layer_idx {number!r}, out of 0-{layers - 1}, {whole}")
        if numbers[number] > 1:
            raise SparsekitError(f"{name}: {numbers[number]} attention modules have layer_idx {number}, {whole}")
    ours = {id(module) for module in modules}
    parents = Counter(id(child) for parent in model.modules() for child in parent.children() if id(child) in ours)
    shared = next((module for module in modules if parents[id(module)] > 1), None)
    if shared is not None:
        raise SparsekitError(f"{name}: one {type(shared).__name__} serves {parents[id(shared)]} layers, {whole}")


def _check_files(model: PreTrainedModel, text_config: Any, modules: list[nn.Module]) -> None:
    """Refuse a model whose code computes something else by the implementation's name, or looks into its mask."""
    name, reordered = type(model).__name__, getattr(text_config, "reorder_and_upcast_attn", False)
    for cls in dict.fromkeys((type(model), *map(type, modules))):
        file = cls.__module__
        if file.rpartition(".")[2] in REVIEWED_FILES and not reordered:
            continue
        line = next((line for line in _source(file).splitlines() if BRANCH.search(line)), None)
        if line is not None:
            raise SparsekitError(
                f"{name}: {file} decides by the name of the attention implementation what to compute "
                f"({line.split('#')[0].strip()!r}); sparsekit cannot be applied to this architecture."
            )
        if cls is not type(model) and (reads := _forward(cls).reads_mask):
            raise SparsekitError(
                f"{name}: {cls.__name__} looks into its attention mask ({reads!r}), which sparsekit does not make; "
                "sparsekit cannot be applied to this architecture."
            )


@lru_cache(256)
def _source(module: str) -> str:
    """A module's source; nothing where it was written in a notebook, or compiled."""
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError):
        return ""


class _Forward(NamedTuple):
    """What the code of an attention module's forward says."""

    passes: frozenset[str] = frozenset()  # the keywords with which it calls the attention function
    reads_mask: str = ""  # a line that does more with the mask than to hand it on


@lru_cache(256)
def _forward(cls: Any) -> _Forward:
    try:
        text = textwrap.dedent(inspect.getsource(cls.forward))
        tree = ast.parse(text)
    except (OSError, TypeError, SyntaxError):
        return _Forward()
    nodes = list(ast.walk(tree))
    calls = [node for node in nodes if isinstance(node, ast.Call) and _name(node.func) == "attention_interface"]
    handed = {id(node) for call in calls for node in ast.walk(call)}
    looked = [
        node
        for parent in nodes
        if id(parent) not in handed
        for node in _operands(parent)
        if _name(node) == "attention_mask" and id(node) not in handed
    ]
    reads = text.splitlines()[min(node.lineno for node in looked) - 1].strip() if looked else ""
    return _Forward(frozenset(word.arg for call in calls for word in call.keywords if word.arg), reads)


def _passes(module: Any) -> frozenset[str]:
    cls: Any = type(module)
    return _forward(cls).passes


def _operands(node: ast.AST) -> list[ast.expr]:
    """What an expression computes with: of an index or an attribute its base, of a call its arguments."""
    if isinstance(node, ast.Subscript | ast.Attribute):
        return [node.value]
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.Call):
        return [*node.args, *(word.value for word in node.keywords)]
    return []


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


# ---- facts


def facts_of(model: PreTrainedModel, text_config: Any = None, modules: Sequence[nn.Module] | None = None) -> ArchFacts:
    """What is known of a model, its weights aside. The arguments behind it save finding them again.

    Raises:
        SparsekitError: a model that sparsekit cannot be applied to, whatever the config.
    """
    text = model.config.get_text_config(decoder=True) if text_config is None else text_config
    modules = attention_modules(model, text) if modules is None else modules
    count = num_layers(text)
    heads = _heads(text, modules, count)
    kinds, windows = _kinds(text, modules, count)
    window = _windows(kinds, windows)
    feed_forward = (_get(text, name) for name in ("decoder_ffn_dim", "intermediate_size", "ffn_dim", "n_inner"))
    hidden = _get(text, "hidden_size")
    try:
        return ArchFacts(
            name=_get(text, "name_or_path") or _get(model.config, "name_or_path") or type(model).__name__,
            model_type=text.model_type,
            num_layers=count,
            num_heads=max(heads),
            layer_heads=tuple(heads) if len(set(heads)) > 1 else None,
            num_key_heads=_most(_get(text, "num_key_value_heads")) or max(heads),
            head_dim=_head_dim(modules, text, max(heads)),
            hidden_size=hidden,
            intermediate_size=next((_per_layer(size) for size in feed_forward if size), hidden and 4 * hidden),
            vocab_size=_get(text, "vocab_size"),
            rope_theta=rope_theta_of(text),
            layer_types=None if _told_by_window(kinds, window) else tuple(kinds),
            sliding_window=window,
            not_computed=_not_computed(modules, count),
        )
    except ValidationError as error:
        what = error.errors()[0]
        field, value = ".".join(map(str, what["loc"])), str(what["input"])[:80]
        raise SparsekitError(f"{type(model).__name__}: its config has {field} = {value}: {what['msg']}.") from None


def _get(config: Any, name: str) -> Any:
    """A field; None where there is none, or where each layer has one of its own."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # of a config whose layers differ in it
        return None


def _per_layer(value: Any) -> Any:
    """A list of one value a layer as a tuple, or as that value where all are the same."""
    if not isinstance(value, list | tuple):
        return value
    return value[0] if len(set(value)) == 1 else tuple(value)


def num_layers(text: Any) -> int:
    """Of the decoder: the config of a family with both halves gives the encoder's as `num_hidden_layers`."""
    count: int = _get(text, "decoder_layers") or _get(text, "num_hidden_layers")
    return count


def _heads(text: Any, modules: Sequence[Any], count: int) -> list[int]:
    """Query heads of each layer, as its module says or else the config."""
    told = _get(text, "decoder_attention_heads") or _get(text, "num_attention_heads")
    heads = list(told) if isinstance(told, list | tuple) else [told] * count
    for module in modules:
        own = (getattr(module, name, None) for name in ("num_heads", "num_attention_heads"))
        heads[module.layer_idx] = next((n for n in own if isinstance(n, int)), heads[module.layer_idx])
    known = [heads[module.layer_idx] for module in modules]
    if not all(isinstance(n, int) for n in known):
        raise SparsekitError(
            f"{text.model_type}: neither its layers nor its config say how many query heads they have."
        )
    return [n if isinstance(n, int) else max(known) for n in heads]


def _most(value: Any) -> Any:
    return max(value) if isinstance(value, list | tuple) else value


def _head_dim(modules: Sequence[nn.Module], text: Any, heads: int) -> int | None:
    """The layers' size of keys, where they have one in common and tell it."""
    sizes = {key_size(module) for module in modules}
    if sizes != {None}:
        return sizes.pop() if len(sizes) == 1 else None
    hidden = _get(text, "hidden_size")
    return hidden and hidden // heads


def key_size(module: nn.Module) -> int | None:
    """Size of a head's keys; `qk_head_dim` is that of latent attention, whose values may have another."""
    names = ("qk_head_dim", "head_dim", "attention_head_size")
    return next((size for name in names if isinstance(size := getattr(module, name, None), int)), None)


def _kinds(text: Any, modules: Sequence[Any], count: int) -> tuple[list[str], list[int | None]]:
    """The kind of each layer, and the window of its mask.

    What a layer does decides: a config's `layer_types` counts where the model's file reads it, and its `sliding_window`
    where the layer hands one on. A window of at least as many tokens as the model has positions cuts nothing off.
    """
    named = _get(text, "layer_types")
    kinds = list(named) if named else ["other"] * count
    kinds = [kind if kind not in FULL_KINDS | SLIDING_KINDS else "other" for kind in kinds]  # without a module
    windows: list[int | None] = [None] * count
    positions = _get(text, "max_position_embeddings")
    for module in modules:
        i: int = module.layer_idx
        told = named[i] if named and "layer_types" in _source(type(module).__module__) else ""
        if told and told not in FULL_KINDS | SLIDING_KINDS:
            kinds[i] = told
            continue
        slides = told in SLIDING_KINDS if told else "sliding_window" in _passes(module)
        windows[i] = window = _window(module, text) if slides else None
        cuts = window is not None and not (isinstance(positions, int) and window >= positions)
        kinds[i] = "sliding_attention" if cuts else "full_attention"
    return kinds, windows


def _window(module: nn.Module, text: Any) -> int | None:
    """Tokens of a sliding layer's window, the query itself included."""
    names = ("sliding_window", "sliding_window_size", "attention_window_size", "local_attention")
    value = next((found for owner in (module, text) for name in names if (found := _get(owner, name))), None)
    return value[module.layer_idx] if isinstance(value, list | tuple) else value  # type: ignore[index]


def _windows(kinds: list[str], windows: list[int | None]) -> Any:
    """One window where that of all sliding layers is the same and no other layer has one, else one a layer."""
    sliding = {window for kind, window in zip(kinds, windows, strict=True) if kind == "sliding_attention"}
    others = {window for kind, window in zip(kinds, windows, strict=True) if kind != "sliding_attention"}
    if others <= {None} and len(sliding) <= 1:
        return sliding.pop() if sliding else None
    return tuple(windows)


def _told_by_window(kinds: list[str], window: Any) -> bool:
    """Whether one window, or none, says of every layer what it is."""
    return not isinstance(window, tuple) and set(kinds) == {"sliding_attention" if window else "full_attention"}


def _not_computed(modules: Sequence[Any], count: int) -> tuple[str, ...] | None:
    """For each layer, what in its attention no kernel here computes; None where there is no such layer."""
    found = [""] * count
    for module in modules:
        keys, values = key_size(module), getattr(module, "v_head_dim", None)
        strange = sorted(_passes(module) - KNOWN_ARGUMENTS - {"attention_mask"})
        if isinstance(values, int) and keys is not None and keys != values:
            found[module.layer_idx] = f"its keys have size {keys} and its values {values}"
        elif strange:
            found[module.layer_idx] = f"the model passes {strange[0]!r} to its attention function"
    return tuple(found) if any(found) else None


def machine_of(model: nn.Module) -> Machine:
    """What a model is on, as tables of crossovers know it."""
    from transformers import PreTrainedModel

    whole = next(part for part in model.modules() if isinstance(part, PreTrainedModel))  # of a wrapper, what it holds
    return Machine.of(whole.device, whole.dtype)


# ---- the model's own function


def check_positions(model: PreTrainedModel, tokens: int, what: str = "") -> None:
    """An error where prompts of that length leave the positions that the model was made for."""
    config: Any = model.config.get_text_config(decoder=True)
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and tokens > most:
        raise SparsekitError(
            f"{what or f'tokens = {tokens}'}: the model has {most} positions, and its answers beyond them say nothing."
        )


def own_attention(module: nn.Module, original: str) -> Attention:
    """The function that the module's own file would have called for `original`."""
    home = _home(module)
    found: Attention = home.ALL_ATTENTION_FUNCTIONS.get_interface(original, home.eager_attention_forward)
    return found


def eager_attention(module: nn.Module) -> Attention:
    """The eager function of the module's own file, or else of its base classes' files."""
    found: Attention = _home(module).eager_attention_forward
    return found


def _home(module: nn.Module) -> Any:
    for cls in type(module).__mro__:
        home = sys.modules[cls.__module__]
        if hasattr(home, "eager_attention_forward"):
            return home
    raise SparsekitError(
        f"{type(module).__name__}: its file has no eager_attention_forward; is it outside the interface?"
    )
