"""What is known of a model without its weights: how many layers and heads, of which kinds and sizes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sparsekit.errors import SparsekitError
from sparsekit.patterns import bounded

__all__ = ["ArchFacts", "ModelFacts"]

Size = Annotated[int, Field(ge=1, strict=True)]
_LIST = Field(strict=False)  # YAML has lists, and no tuples


class ModelFacts(BaseModel):
    """What a config may say about its model. The numbers are checked against the real one; the name is a label.

    `num_layers` and `num_heads` (query heads) are needed to resolve a config; the kinds of layers say which of them can
    run sparse, and the rest lets `explain` predict time. `sparsekit.models.facts` reads them off a model.

    Attributes:
        num_heads: query heads, of the layer that has most.
        layer_heads: query heads of each layer, where they differ.
        head_dim: of the keys; not known where layers differ in it.
        intermediate_size: one number, or one a layer.
        layer_types: the kind of each layer, "full_attention", "sliding_attention", or a name of the model's own; not
            given: all are full, or all slide where there is a window.
        sliding_window: of the layers that slide, tokens, the query itself included; or one a layer, null for none. That
            of a full layer cuts nothing off.
        not_computed: of each layer what no kernel here computes, or nothing: it cannot run sparse.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str | None = None
    num_layers: int | None = Field(None, ge=1)
    num_heads: int | None = Field(None, ge=1)
    layer_heads: Annotated[tuple[Size, ...], _LIST] | None = None
    num_key_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=1)
    hidden_size: int | None = Field(None, ge=1)
    intermediate_size: Size | Annotated[tuple[Size, ...], _LIST] | None = None
    vocab_size: int | None = Field(None, ge=1)
    layer_types: Annotated[tuple[str, ...], _LIST] | None = None
    sliding_window: Size | Annotated[tuple[Size | None, ...], _LIST] | None = None
    not_computed: Annotated[tuple[str, ...], _LIST] | None = None

    _bounded = field_validator("*", mode="before")(bounded)

    @model_validator(mode="after")
    def _one_a_layer(self) -> ModelFacts:
        for name in ("layer_heads", "intermediate_size", "layer_types", "sliding_window", "not_computed"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.num_layers:
                raise SparsekitError(f"{name} has {len(value)} values; one for each of num_layers is needed")
        return self

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
    model_type: str = Field(exclude=True)  # of transformers; a config file has no such field
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_key_heads: int = Field(ge=1)
