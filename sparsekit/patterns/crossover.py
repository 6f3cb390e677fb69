"""From which length a pattern, or a config, beats dense attention: tables by device and head shape, and who reads them.

`sparsekit bench crossover` measures and writes such a table; `dense_below_tokens: auto` takes its number from one. A
table is JSONL, a `Crossover` a line. A user's own is read before the one that comes with sparsekit.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from sparsekit.call.geometry import MAX_TOKENS
from sparsekit.errors import SparsekitError, cache_folder, named_path, one_line, read_text, shown

__all__ = [
    "ENV", "NEVER", "SHIPPED", "Crossover", "Found", "Measured", "Place", "device_name", "device_type",
    "faster_from", "find", "own_table", "read_table", "rows_of_tables", "settled_tokens", "subject",
]  # fmt: skip

ENV = "SPARSEKIT_CROSSOVER"  # names the user's own table
FILE = "crossover.jsonl"  # its name in the user's cache folder
SHIPPED = Path(__file__).with_name(FILE)
NEVER = MAX_TOKENS + 1  # no prompt is as long


class Place(NamedTuple):
    """What a crossover depends on, besides what runs. `str` is how errors and reports call it.

    Attributes:
        device: its name, as `device_name` gives it.
        heads, key_heads: of one layer, in one process.
        dim: size of a head.
        dtype: of q, k and v: "bfloat16".
    """

    device: str
    heads: int
    key_heads: int
    dim: int
    dtype: str

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> Place:
        """Of a call with q (B, H, Q, D) and k (B, G, K, D)."""
        dtype = str(q.dtype).removeprefix("torch.")
        return cls(device_name(q.device), q.shape[1], k.shape[1], q.shape[3], dtype)

    def __str__(self) -> str:
        heads, key_heads, dim = (number or "?" for number in (self.heads, self.key_heads, self.dim))
        return f"{self.device or 'an unknown device'}, {heads} heads over {key_heads} of size {dim}, {self.dtype}"


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Measured(_Row):
    """One length.

    Attributes:
        dense: the fastest dense kernel there: "sdpa", "sdpa-cudnn", "hopper", ...
        times_dense: its time through that of what was measured, medians.
        faster: whether the two are apart by more than they spread.
    """

    tokens: int = Field(ge=1, le=MAX_TOKENS)
    dense: str
    times_dense: float = Field(gt=0, allow_inf_nan=False)
    faster: bool


class Crossover(_Row):
    """One row of a table: what was measured where, and from which length it is faster than the best dense kernel.

    Attributes:
        device, heads, key_heads, dim, dtype: as in `Place`.
        pattern: its name and all its fields but `dense_below_tokens`, alone in a layer; or
        config: the fingerprint of a config (`sparsekit.config.settle.fingerprint`).
        label: for reading: what was set of the pattern, or the config's file.
        faster_from_tokens: the least length that was measured from which it is faster at all longer ones; null: none.
        measured: by length, the shortest first.
        by: versions and date of the measurement.
    """

    device: str
    heads: int = Field(ge=1)
    key_heads: int = Field(ge=1)
    dim: int = Field(ge=1)
    dtype: str
    pattern: dict[str, Any] | None = None
    config: str | None = None
    label: str
    faster_from_tokens: int | None
    measured: list[Measured] = Field(min_length=1)
    by: dict[str, str | None] = {}

    @model_validator(mode="after")
    def _is_what_was_measured(self) -> Crossover:
        if (self.pattern is None) == (self.config is None):
            raise SparsekitError("one of `pattern` and `config` is needed, not both")
        lengths = [one.tokens for one in self.measured]
        if lengths != sorted(set(lengths)):
            raise SparsekitError(f"measured: lengths {shown(lengths)}: each once, the shortest first")
        if self.faster_from_tokens != (least := faster_from(self.measured)):
            raise SparsekitError(
                f"faster_from_tokens = {self.faster_from_tokens}, but by `measured` it is {least}: measure again, "
                "or write a number of your own into the config"
            )
        return self

    @property
    def place(self) -> Place:
        return Place(self.device, self.heads, self.key_heads, self.dim, self.dtype)

    @property
    def key(self) -> tuple[Place, str]:
        """By which a table has one row."""
        return self.place, self.config or _text(self.pattern or {})


class Found(NamedTuple):
    """What a table says. `tokens`: shorter prompts are to run dense. `said`: where that comes from."""

    tokens: int
    said: str


def faster_from(measured: Sequence[Measured]) -> int | None:
    """The least length that is faster, and all longer ones too; None: not even the longest is."""
    least = None
    for one in sorted(measured, key=lambda one: -one.tokens):
        if not one.faster:
            break
        least = one.tokens
    return least


def subject(pattern: Mapping[str, Any]) -> dict[str, Any]:
    """By which a table knows a pattern: all that it says, but from which length it runs."""

    def rest(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: rest(one) for key, one in value.items() if key != "dense_below_tokens"}
        return [rest(one) for one in value] if isinstance(value, list | tuple) else value

    return {key: rest(value) for key, value in pattern.items() if key != "dense_below_tokens"}


def device_name(device: torch.device) -> str:
    """By which tables and records know a device: a GPU's own name; of a CPU its architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})" if device.type == "cpu" else device.type


def device_type(name: str) -> str:
    """PyTorch's type of the device that `device_name` calls so."""
    try:
        return torch.device(name.split(" (")[0]).type
    except RuntimeError:  # no type of PyTorch: a GPU's own name
        return "cuda"


# ---- tables


def own_table() -> Path:
    """The user's: what `$SPARSEKIT_CROSSOVER` names, else `crossover.jsonl` in the cache folder; it need not be there.

    Raises:
        SparsekitError: a path that cannot be looked for.
    """
    named = os.environ.get(ENV)
    return named_path(named, ENV) if named else named_path(cache_folder() / FILE, "crossover table")


def rows_of_tables() -> Iterator[tuple[Crossover, Path]]:
    """All rows with their table, the user's own first.

    Raises:
        SparsekitError: `$SPARSEKIT_CROSSOVER` names no file, or a line of a table is no row.
    """
    own = own_table()
    for path in (own, SHIPPED) if os.environ.get(ENV) or own.exists() else (SHIPPED,):
        yield from ((row, path) for row in read_table(path))


def read_table(path: Path) -> tuple[Crossover, ...]:
    """The rows of a file.

    Raises:
        SparsekitError: it cannot be read, a line is no row, or two are of the same.
    """
    try:
        stat = path.stat()
        return _read(path, stat.st_size, stat.st_mtime_ns)
    except OSError:
        return _read(path, -1, -1)  # which says why


@lru_cache(maxsize=8)
def _read(path: Path, size: int, written: int) -> tuple[Crossover, ...]:
    rows: dict[tuple[Place, str], Crossover] = {}
    for number, line in enumerate(read_text(path, "crossover table").splitlines(), 1):
        where = f"crossover table {shown(str(path))}, line {number}"
        try:
            row = Crossover.model_validate_json(line)
        except ValidationError as error:
            raise SparsekitError(f"{where}: {one_line(error, Crossover)}") from None
        if row.key in rows:
            raise SparsekitError(f"{where}: {row.label} on {row.place} is there already.")
        rows[row.key] = row
    return tuple(rows.values())


def find(place: Place, what: Mapping[str, Any] | str) -> Found | None:
    """What the first table says that has a row of exactly that: a pattern's `subject`, or a config's fingerprint.

    Another device, head shape or dtype is another row: nothing is taken from a near one.

    Raises:
        SparsekitError: as `rows_of_tables`.
    """
    key = place, _text(what)
    for row, path in rows_of_tables():
        if row.key == key:
            version, date = (row.by.get(name) or "?" for name in ("sparsekit", "date"))
            source = f"measured on {place}, with sparsekit {version}, {date}, in {path}"
            if row.faster_from_tokens is not None:
                return Found(row.faster_from_tokens, f"{row.faster_from_tokens:,} ({source})")
            return Found(
                NEVER,
                f"above every length: up to {row.measured[-1].tokens:,} tokens none was faster than dense ({source})",
            )
    return None


def settled_tokens(fields: Mapping[str, Any], place: Place, default: int) -> Found:
    """What `auto` is of a pattern with these fields; where no table has it, what its class says by itself."""
    return find(place, subject(fields)) or Found(
        default,
        f"{default:,}, the pattern's default (no table has it on {place}; `sparsekit bench crossover` measures it)",
    )


def _text(what: Mapping[str, Any] | str) -> str:
    return what if isinstance(what, str) else json.dumps(what, sort_keys=True)
