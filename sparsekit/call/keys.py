"""Where the keys and values of a call are: in one piece, or in pages that a table numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.errors import SparsekitError

__all__ = ["Keys", "Ranges", "pages_of"]

# [begin, end) in positions, ascending and apart.
Ranges = tuple[tuple[int, int], ...]


class Keys(NamedTuple):
    """Keys and values, where they are.

    Attributes:
        k, v: without `table` (B, G, K, D). With it the pages of all requests, (pages, G, size, D), of any strides: an
            engine's cache with a token's key beside its value is `cache.split(D, -1)`.
        table: int32 (B, n): the pages of each sample, of which the i-th holds its keys from `i * size` on.
    """

    k: Tensor
    v: Tensor
    table: Tensor | None = None

    @property
    def page(self) -> int:
        """Tokens of a page; 0: in one piece."""
        return 0 if self.table is None else self.k.shape[2]

    @property
    def tokens(self) -> int:
        """Keys that a sample has room for."""
        return self.k.shape[2] * (1 if self.table is None else self.table.shape[1])

    def at(self, ranges: Ranges) -> Keys:
        """The keys at some positions, side by side. In pages nothing is copied but the table, and a range begins and
        ends with a page, but for the last end.

        Raises:
            SparsekitError: positions beyond the keys; a range that ends within a page.
        """
        if ranges[-1][1] > self.tokens:
            raise SparsekitError(f"keys to {ranges[-1][1]} of {self.tokens}: more than there are.")
        if self.table is not None:
            return self._replace(table=pages_of(self.table, self.page, ranges))
        return Keys(*(_joined([x[:, :, a:b] for a, b in ranges], 2) for x in (self.k, self.v)))

    def gathered(self, geometry: Geometry) -> Keys:
        """The keys and values of a call in one piece: of those in pages a copy, with zeros behind a sample's last."""
        return Keys(self.gathered_k(geometry), self.gathered_v(geometry))

    def gathered_k(self, geometry: Geometry) -> Tensor:
        """(B, G, K, D): the keys of `gathered`, without values."""
        return self.k if self.table is None else _gathered(self.k, self.table, geometry)

    def gathered_v(self, geometry: Geometry) -> Tensor:
        """(B, G, K, D): the values of `gathered`, without keys."""
        return self.v if self.table is None else _gathered(self.v, self.table, geometry)


def pages_of(table: Tensor, size: int, ranges: Ranges) -> Tensor:
    """int32 (B, m): of a table (B, n) the pages that hold some positions, side by side. The host does not wait.

    Raises:
        SparsekitError: a range that begins within a page, or, unless it is the last one, ends within one.
    """
    inner = [begin for begin, _ in ranges] + [end for _, end in ranges[:-1]]
    if any(at % size for at in inner):
        raise SparsekitError(f"keys at {ranges} in pages of {size} tokens: ranges are to be whole pages.")
    return _joined([table[:, a // size : -(-b // size)] for a, b in ranges], 1)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _gathered(pages: Tensor, table: Tensor, g: Geometry) -> Tensor:
    size, tokens = pages.shape[2], g.kv_len
    table = table[:, : -(-tokens // size)]
    if any(end < tokens for end in g.kv_end):  # what stands behind a sample's last page may be no page
        table = table.clone()
        for b, end in enumerate(g.kv_end):
            table[b, -(-end // size) :] = 0
    found = pages.transpose(1, 2)[table].flatten(1, 2)[:, :tokens]
    for b, end in enumerate(g.kv_end):
        found[b, end:] = 0
    return found.transpose(1, 2)
