"""Where queries and keys sit: lengths, offsets, padding, the prompt's end, and the tile that a plan is cut into.

Everything a pattern decides is counted in POSITIONS, from a sample's first valid key, so that a padded sample means the
same as alone, and a prompt chunk or second turn the same as the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import index
from typing import Any, NamedTuple

from sparsekit.errors import SparsekitError, shown

__all__ = ["MAX_TOKENS", "TILES", "Geometry", "Span", "whole"]

TILES = (16, 32, 64, 128, 256)
MAX_TOKENS = 1 << 29  # a plan's int32 entries hold a position and two flags
MAX_SAMPLES = 1 << 20


class Span(NamedTuple):
    """One sample of a call, in positions: all that a static pattern may know.

    Queries are the positions `[q_first, q_end)`, keys `[0, keys)`; the prompt ends at `prompt_tokens`, which lies
    beyond `q_end` for a chunk that is not the last one.
    """

    q_first: int
    q_end: int
    keys: int
    prompt_tokens: int

    @property
    def causal_pairs(self) -> int:
        """Query-key pairs of dense causal attention over this sample's queries."""
        return (self.q_end * (self.q_end + 1) - self.q_first * (self.q_first + 1)) // 2

    def tiles(self, block_q: int) -> int:
        """Query tiles of the grid from position 0 that hold this sample's queries."""
        return -(-self.q_end // block_q) - self.q_first // block_q if self.q_first < self.q_end else 0

    def anchor(self, row: int, every: int) -> int:
        """The first query of this call in the row-th of its blocks of `every` positions; the last block's and beyond
        may lie past `q_end`."""
        return max((self.q_first // every + row) * every, self.q_first)

    def anchor_pairs(self, every: int) -> int:
        """Query-key pairs of dense causal attention over the anchors alone."""
        count, base = self.tiles(every), self.q_first // every
        late = self.anchor(0, every) - base * every if count else 0
        return every * (count * base + count * (count - 1) // 2) + count + late


@dataclass(frozen=True)
class Geometry:
    """One attention call, in host integers. Build it with `Geometry.of`, which fills in and checks.

    Query row r sits at key index `q_offset + r`; sample b's valid keys are the indices `[kv_start[b], kv_end[b])`; its
    positions are key indices minus `kv_start[b]`. `prompt_tokens[b]` counts its prompt in positions. `block_q` and
    `block_kv` (tokens) are the tile of the plans made for this call; the grid of query tiles starts at position 0.

    `q_step` above 1: q holds the call's anchors alone. Positions are cut into blocks of `q_step`; row r of a sample is
    the first query of its r-th block in this call (`Span.anchor`). Query tiles are then tiles of rows, from row 0 on.
    """

    q_len: int
    kv_len: int
    q_offset: int
    kv_start: tuple[int, ...]
    kv_end: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    block_q: int = 128
    block_kv: int = 64
    q_step: int = 1

    @classmethod
    def of(
        cls,
        q_len: int,
        kv_len: int | None = None,
        *,
        batch: int = 1,
        q_offset: int | None = None,
        kv_start: Sequence[int] | None = None,
        kv_end: Sequence[int] | None = None,
        prompt_len: int | Sequence[int] | None = None,
        block_q: int = 128,
        block_kv: int = 64,
    ) -> Geometry:
        """A checked geometry. Defaults: the queries are the last of the keys, nothing is padded, this call ends the
        prompt.

        Args:
            q_len, kv_len: rows of q and of k (k may be longer than what is valid: a StaticCache).
            q_offset: key index of query row 0; default `kv_len - q_len`.
            kv_start, kv_end: per sample, the valid key indices; default all up to the last query.
            prompt_len: tokens of the whole prompt, one number or one per sample, padding not counted; default: the
                prompt ends where this call ends.

        Raises:
            SparsekitError: what is no whole number, or past `MAX_TOKENS`; an offset or a bound that does not fit the
                lengths.
        """
        q_len = _whole("q_len", q_len)
        kv_len = q_len if kv_len is None else _whole("kv_len", kv_len)
        q_offset = kv_len - q_len if q_offset is None else _whole("q_offset", q_offset)
        batch = _whole("batch", batch)
        if not 1 <= batch <= MAX_SAMPLES:
            raise SparsekitError(f"batch={batch}: 1 to {MAX_SAMPLES} samples.")
        last = q_offset + q_len
        starts = (0,) * batch if kv_start is None else _wholes("kv_start", kv_start)
        ends = (last,) * batch if kv_end is None else _wholes("kv_end", kv_end)
        if q_len < 1 or q_offset < 0 or last > kv_len:
            raise SparsekitError(
                f"q_offset={q_offset} with {q_len} queries and {kv_len} keys: the queries must sit on keys "
                f"(0 <= q_offset <= kv_len - q_len = {kv_len - q_len}, at least one query)."
            )
        for name, bounds in (("kv_start", starts), ("kv_end", ends)):
            if len(bounds) != batch or not all(0 <= bound <= kv_len for bound in bounds):
                raise SparsekitError(
                    f"{name}={shown(bounds)}: one key index in 0..{kv_len} for each of {batch} samples."
                )
        spans = [min(last, end) - start for start, end in zip(starts, ends, strict=True)]
        if min(spans) < 0:
            raise SparsekitError(
                f"kv_start={shown(starts)}, kv_end={shown(ends)}: a sample's keys must end after they start."
            )
        if prompt_len is None:
            prompts = tuple(spans)
        else:
            many = isinstance(prompt_len, Iterable)
            prompts = _wholes("prompt_len", prompt_len) if many else (_whole("prompt_len", prompt_len),) * batch
            if len(prompts) != batch or min(prompts) < 1:
                raise SparsekitError(
                    f"prompt_len={shown(prompt_len)}: at least 1 token, one number or one for each sample."
                )
        block_q, block_kv = _whole("block_q", block_q), _whole("block_kv", block_kv)
        for name, block in (("block_q", block_q), ("block_kv", block_kv)):
            if block not in TILES:
                raise SparsekitError(f"{name}={block}: a tile is one of {', '.join(map(str, TILES))} tokens.")
        return cls(q_len, kv_len, q_offset, starts, ends, prompts, block_q, block_kv)

    @property
    def batch(self) -> int:
        return len(self.kv_start)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Each sample in positions. A sample that is all padding here has no queries (`q_first == q_end`)."""
        out = []
        for start, end, prompt in zip(self.kv_start, self.kv_end, self.prompt_tokens, strict=True):
            first = max(self.q_offset - start, 0)
            q_end = max(min(self.q_offset + self.q_len, end) - start, first)
            out.append(Span(first, q_end, end - start, prompt))
        return tuple(out)

    @cached_property
    def uniform(self) -> bool:
        """Whether one plan serves every sample."""
        return len(set(self.spans)) == 1

    def q_index(self, sample: int, position: int) -> int:
        """The row of q that holds `position` of `sample`; negative before this call's first query."""
        return position + self.kv_start[sample] - self.q_offset

    @cached_property
    def q_rows(self) -> int:
        """Rows of q."""
        return self.q_len if self.q_step == 1 else max(span.tiles(self.q_step) for span in self.spans)

    @cached_property
    def padded(self) -> bool:
        """Whether some row of q is no query."""
        return any(span.tiles(self.q_step) != self.q_rows for span in self.spans)

    @cached_property
    def rows(self) -> int:
        """Query tiles a sample has at most: the row count of a plan."""
        if self.q_step > 1:
            return -(-self.q_rows // self.block_q)
        return max(-(-span.q_end // self.block_q) - span.q_first // self.block_q for span in self.spans)

    def with_tile(self, block_q: int, block_kv: int) -> Geometry:
        """The same call, cut into other tiles."""
        return replace(self, block_q=block_q, block_kv=block_kv)

    def anchors(self, every: int) -> Geometry:
        """The call of this one's anchors alone, one for each block of `every` positions, in tiles of 128 x 128."""
        return replace(self, q_step=every, block_q=128, block_kv=128)

    def with_prompt(self, tokens: int | Sequence[int]) -> Geometry:
        """The same call, as a part of a prompt of `tokens` columns (padding counted, as a batch is written).

        A sample whose keys end before the last query is padded on the right: its prompt ends there.
        """
        columns = (tokens,) * self.batch if isinstance(tokens, int) else tuple(tokens)
        if len(columns) != self.batch:
            raise SparsekitError(f"prompt tokens={tokens}: one number, or one for each of {self.batch} samples.")
        last = self.q_offset + self.q_len
        prompts = tuple(
            max((min(n, end) if end < last else n) - start, 1)
            for n, start, end in zip(columns, self.kv_start, self.kv_end, strict=True)
        )
        return replace(self, prompt_tokens=prompts)


def whole(value: Any) -> int:
    """A whole number of any library as an int; a tensor of one is whole too, and a truth value is none.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        raise TypeError(f"{value!r} is no number")
    try:
        return index(value)
    except RuntimeError as error:  # of tensors that hold no data
        raise TypeError(str(error)) from None


def _whole(name: str, value: Any) -> int:
    try:
        number = whole(value)
    except TypeError:
        raise SparsekitError(f"{name}={shown(value)}: a whole number of tokens or samples.") from None
    if abs(number) > MAX_TOKENS:
        raise SparsekitError(f"{name}={shown(value)}: at most {MAX_TOKENS}.")
    return number


def _wholes(name: str, values: Any) -> tuple[int, ...]:
    try:
        listed = tuple(values)
    except TypeError:
        raise SparsekitError(f"{name}={shown(values)}: a sequence, one whole number for each sample.") from None
    return tuple(_whole(name, value) for value in listed)
