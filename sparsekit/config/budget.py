"""What a config promises: how far it may take the model's next tokens from dense attention's, and where it was held."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sparsekit.config.facts import printable
from sparsekit.errors import SparsekitError
from sparsekit.patterns import bounded

__all__ = ["Budget", "MeasuredOn"]

Count = Annotated[int, Field(ge=1, strict=True)]


class MeasuredOn(BaseModel):
    """The prompts that a budget was measured on, and what was found there. `sparsekit check -o` writes it.

    Attributes:
        source: where they are: files, or a few words.
        count: how many.
        tokens: lengths of the shortest and of the longest.
        next_tokens: tokens after each prompt that were compared, at most.
        kl: their mean KL from dense, nats a token.
        half_width: of the 95% interval of `kl`, to either side; not known of one prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str = Field(min_length=1)
    count: Count
    tokens: Annotated[tuple[Count, Count], Field(strict=False)]
    next_tokens: Count | None = None
    kl: float | None = Field(None, ge=0, allow_inf_nan=False)
    half_width: float | None = Field(None, ge=0, allow_inf_nan=False)

    _bounded = field_validator("count", "tokens", "next_tokens", mode="before")(bounded)
    _printable = field_validator("source", mode="before")(printable)

    @field_validator("tokens")
    @classmethod
    def _ascending(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] > value[1]:
            raise SparsekitError(f"tokens = {list(value)}: the shortest prompt comes first, then the longest")
        return value


class Budget(BaseModel):
    """An accuracy contract: `sparsekit check` holds a config to it on prompts of your own.

    Attributes:
        kl: mean KL from dense of the tokens that follow a prompt, nats a token, at most.
        prompts: what it was measured on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kl: float = Field(gt=0, allow_inf_nan=False, description="mean KL from dense, nats a token, at most")
    prompts: MeasuredOn | None = None
