"""Where a request's keys and values are: in two tensors, or in the pages of an engine's cache.

`Keys` is the one type that says so. A page is addressed by a request's row of the block table: position p lies in page
`row[p // size]`, at `p % size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError

__all__ = ["Keys", "Places", "Ranges"]

# [begin, end) in positions, ascending and apart: whose keys a chunk reads.
Ranges = tuple[tuple[int, int], ...]


@dataclass(eq=False)
class Places:
    """Of one request: its row of the block table, and what was derived from it. The layers of a forward share it.

    Attributes:
        row: int (pages,) page numbers, of positions 0 and up, on the pages' device.
        size: tokens of a page.
    """

    row: Tensor
    size: int
    _found: dict[Ranges, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.row.ndim != 1 or self.row.is_floating_point() or self.size < 1:
            raise SparsekitError(
                f"block table row {tuple(self.row.shape)} {self.row.dtype} with pages of {self.size} tokens: one "
                "whole number for each page, and at least 1 token."
            )

    def at(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        """int64 (n,) each: the page of every position in the ranges, and the place in it. The host does not wait.

        Raises:
            SparsekitError: a range beyond the pages.
        """
        found = self._found.get(ranges)
        if found is None:
            last = ranges[-1][1]
            if last > self.row.shape[0] * self.size:
                raise SparsekitError(
                    f"keys to {last} of a request with {self.row.shape[0]} pages of {self.size} tokens: more than "
                    "they hold."
                )
            parts = [torch.arange(a, b, dtype=torch.int64, device=self.row.device) for a, b in ranges]
            position = parts[0] if len(parts) == 1 else torch.cat(parts)
            page = self.row.long().index_select(0, position.div(self.size, rounding_mode="floor"))
            found = self._found[ranges] = page, position % self.size
        return found


@dataclass(frozen=True, eq=False)
class Keys:
    """The keys and values of one request, in one layer.

    Attributes:
        tensors: without `places`, k and v, (n, G, D) each. With them, pages (pages, size, G, W), any strides: one
            tensor whose W = 2 D numbers are a token's key and then its value, or two, keys and values, of W = D.
        places: where positions lie in pages.
    """

    tensors: tuple[Tensor, ...]
    places: Places | None = None

    def __post_init__(self) -> None:
        count, want = len(self.tensors), (3 if self.places is None else 4)
        shapes = [tuple(tensor.shape) for tensor in self.tensors]
        fits = count in ((2,) if self.places is None else (1, 2)) and all(len(shape) == want for shape in shapes)
        if not fits or len(set(shapes)) > 1 or (count == 1 and shapes[0][3] % 2):
            what = "k and v, (n, G, D) each" if self.places is None else "pages (pages, size, G, 2 D), or two of D"
            raise SparsekitError(f"keys {shapes}: want {what}.")
        if self.places is not None and shapes[0][1] != self.places.size:
            raise SparsekitError(f"pages {shapes[0]} of {shapes[0][1]} tokens, but a table for {self.places.size}.")

    def read(self, ranges: Ranges) -> tuple[Tensor, Tensor]:
        """k and v (1, G, n, D) of the positions in the ranges: one range of tensors is a view, all else is copied."""
        if self.places is not None:
            page, place = self.places.at(ranges)
            found = [pages[page, place] for pages in self.tensors]
            k, v = found if len(found) == 2 else found[0].chunk(2, -1)
        else:
            k, v = (self._some(tensor, ranges) for tensor in self.tensors)
        return k.transpose(0, 1)[None], v.transpose(0, 1)[None]

    @staticmethod
    def _some(tensor: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
        if ranges[-1][1] > tensor.shape[0]:
            raise SparsekitError(f"keys to {ranges[-1][1]} of {tensor.shape[0]}: more than there are.")
        parts = [tensor[a:b] for a, b in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
