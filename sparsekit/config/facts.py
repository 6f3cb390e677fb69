"""What is known of a model without its weights: how many layers and heads, of which kinds and sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sparsekit.errors import SparsekitError, shown
from sparsekit.patterns import bounded

__all__ = ["ArchFacts", "ModelFacts", "printable", "rope_theta_of"]

Size = Annotated[int, Field(ge=1, strict=True)]
_LIST = Field(strict=False)  # YAML has lists, and no tuples

# What is compared with the model that a config is applied to.
COMPARED = ("num_layers", "num_heads", "num_key_heads", "head_dim", "hidden_size", "model_type", "rope_theta")
NEEDED = ("name", "num_layers", "num_heads", "num_key_heads")  # of a config that travels; of any model they are known

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def printable(value: Any) -> Any:
    """The value, of a field whose text is printed; an error where it holds what a terminal would obey."""
    for one in value if isinstance(value, list | tuple) else (value,):
        if isinstance(one, str) and _CONTROL.search(one):
            raise SparsekitError(f"{shown(one)} holds a control character")
    return value


class ModelFacts(BaseModel):
    """What a config may say about its model. The numbers are checked against the real one; the name is a label.

    `num_layers` and `num_heads` (query heads) are needed to resolve a config; the kinds of layers say which of them can
    run sparse, and the rest lets `explain` predict time. `sparsekit.models.facts` reads them off a model.

    Attributes:
        model_type: of transformers, of the text part.
        num_heads: query heads, of the layer that has most.
        layer_heads: query heads of each layer, where they differ.
        head_dim: of the keys; not known where layers differ in it.
        intermediate_size: one number, or one a layer.
        rope_theta: base of the rotary embedding, of the layers that are full attention. Models of one shape differ in
            it: Llama 3.1 8B and Mistral 7B v0.3, or a fine-tune for longer prompts.
        layer_types: the kind of each layer, "full_attention", "sliding_attention", or a name of the model's own; not
            given: all are full, or all slide where there is a window.
        sliding_window: of the layers that slide, tokens, the query itself included; or one a layer, null for none. That
            of a full layer cuts nothing off.
        not_computed: of each layer what no kernel here computes, or nothing: it cannot run sparse.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str | None = None
    model_type: str | None = None
    num_layers: int | None = Field(None, ge=1)
    num_heads: int | None = Field(None, ge=1)
    layer_heads: Annotated[tuple[Size, ...], _LIST] | None = None
    num_key_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=1)
    hidden_size: int | None = Field(None, ge=1)
    intermediate_size: Size | Annotated[tuple[Size, ...], _LIST] | None = None
    vocab_size: int | None = Field(None, ge=1)
    rope_theta: float | None = Field(None, gt=0, allow_inf_nan=False)
    layer_types: Annotated[tuple[str, ...], _LIST] | None = None
    sliding_window: Size | Annotated[tuple[Size | None, ...], _LIST] | None = None
    not_computed: Annotated[tuple[str, ...], _LIST] | None = None

    _bounded = field_validator("*", mode="before")(bounded)
    _printable = field_validator("name", "model_type", "layer_types", "not_computed", mode="before")(printable)

    @model_validator(mode="after")
    def _one_a_layer(self) -> ModelFacts:
        for name in ("layer_heads", "intermediate_size", "layer_types", "sliding_window", "not_computed"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.num_layers:
                raise SparsekitError(f"{name} has {len(value)} values; one for each of num_layers is needed")
        return self

    def differs(self, real: ModelFacts) -> str:
        """The first fact of `COMPARED` that both know and in which `real` is another model; or nothing.

        `rope_theta` is compared as float32, which is how a GGUF file has it.
        """
        for name in COMPARED:
            said, is_ = getattr(self, name), getattr(real, name)
            known = said is not None and is_ is not None
            if known and not (math.isclose(said, is_, rel_tol=1e-6) if name == "rope_theta" else said == is_):
                return name
        return ""

    def identity(self) -> dict[str, Any]:
        """Those of `NEEDED` that are known: what a config says of its model at least."""
        return {name: getattr(self, name) for name in NEEDED if getattr(self, name) is not None}

    def missing(self) -> list[str]:
        """Facts of `NEEDED` that are not given: without them nothing tells which model a config fits."""
        return [name for name in NEEDED if getattr(self, name) is None]

    def heads(self, layer: int) -> int:
        """Query heads of the layer, of a model whose counts are known."""
        assert self.num_heads is not None
        return self.num_heads if self.layer_heads is None else self.layer_heads[layer]

    def kind(self, layer: int) -> str:
        """Of the layer's attention."""
        if self.layer_types is not None:
            return self.layer_types[layer]
        return "full_attention" if self.window(layer) is None else "sliding_attention"

    def window(self, layer: int) -> int | None:
        """Of the layer's mask, tokens."""
        if isinstance(self.sliding_window, tuple):
            return self.sliding_window[layer]
        slides = self.layer_types is None or self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if slides else None


class ArchFacts(ModelFacts):
    """Those of a model that is there: what it is called and counts is known."""

    name: str
    model_type: str
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_key_heads: int = Field(ge=1)


def rope_theta_of(text_config: Any) -> float | None:
    """The base of the rotary embedding by a model's text config; None where it has none.

    transformers holds it in `rope_parameters`, or in those of "full_attention" where kinds of layers differ.
    """
    rope: Any = getattr(text_config, "rope_parameters", None)
    if not isinstance(rope, Mapping):
        return None
    rope = rope.get("full_attention", rope)
    theta = rope.get("rope_theta") if isinstance(rope, Mapping) else None
    return float(theta) if isinstance(theta, int | float) else None
