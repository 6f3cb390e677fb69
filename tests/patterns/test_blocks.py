"""BlockPattern: what a pattern that scores blocks gets from its base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.kernels.select import block_scores, topk_bits
from sparsekit.patterns import BlockPattern, Blocks
from sparsekit.patterns import base as registry
from sparsekit.testing import GEOMETRIES, check_pattern, inputs_for

SOFTMAX = Softmax(0.25)


class Given(BlockPattern):
    """Scores that say where they belong, and as many of the best as asked for."""

    name: Literal["given"] = "given"
    asked: ClassVar[list[tuple[int, int]]] = []
    most: int = 1
    bounded: bool = True
    size: int = 128

    def block_size(self) -> int:
        return self.size

    def blocks_at_most(self) -> int | None:
        return self.most if self.bounded else None

    def score(self, blocks: Blocks, first: int, rows: int) -> Tensor:
        self.asked.append((first, rows))
        assert blocks.grid.rows >= first + rows
        column = torch.arange(blocks.grid.columns, dtype=torch.float32)
        return column.expand(*blocks.q.shape[:2], rows, -1).contiguous()

    def choose(self, scores: Tensor, lengths: Tensor) -> Tensor:
        assert scores.shape[:3] == lengths.shape
        return topk_bits(scores, self.most, lengths=lengths)


del registry._REGISTRY["given"]  # other files look at the whole registry


@pytest.fixture(autouse=True)
def asked() -> Iterator[list[tuple[int, int]]]:
    Given.asked.clear()
    yield Given.asked
    Given.asked.clear()


def _blocks_of(geometry: Geometry, pattern: Given) -> Tensor:
    """bool (H, rows, columns): the key blocks that each block of queries keeps a pair of; one sample, whole blocks."""
    q, k, _ = inputs_for(geometry)
    mask = pattern.select(q, k, geometry, SOFTMAX).to_mask()[0]
    return mask.unflatten(1, (-1, pattern.size)).unflatten(3, (-1, pattern.size)).any(4).any(2)


@pytest.mark.parametrize("size", [64, 128])
def test_a_row_keeps_its_own_block_and_what_is_chosen_before_it(size: int) -> None:
    """The best score of every row is its own block's, the second best the block's before it."""
    kept = _blocks_of(Geometry.of(size * 6, block_q=size, block_kv=64), Given(most=2, size=size))
    row, column = torch.arange(6)[:, None], torch.arange(6)[None]
    assert torch.equal(kept, ((column <= row) & (row - column < 2)).expand_as(kept))


def test_rows_are_scored_in_groups(monkeypatch: pytest.MonkeyPatch, asked: list[tuple[int, int]]) -> None:
    geometry, pattern = Geometry.of(64 * 40, block_q=64, block_kv=64), Given(most=3, size=64)
    whole = _blocks_of(geometry, pattern)
    assert asked == [(0, 40)]
    asked.clear()
    monkeypatch.setattr(block_scores, "SCRATCH_BYTES", 4 * 40 * 4 * 16)  # 16 rows of 40 scores in 4 heads
    assert torch.equal(_blocks_of(geometry, pattern), whole)
    assert asked == [(0, 16), (16, 16), (32, 8)]


def test_a_budget_that_covers_the_prompt_scores_nothing(asked: list[tuple[int, int]]) -> None:
    geometry = Geometry.of(500, block_q=128, block_kv=64)
    q, k, _ = inputs_for(geometry)
    assert Given(most=4).select(q, k, geometry, SOFTMAX).all_dense and not asked
    assert not Given(most=3).select(q, k, geometry, SOFTMAX).all_dense and asked
    assert not Given(most=4, bounded=False).select(q, k, geometry, SOFTMAX).all_dense


@pytest.mark.parametrize("block_q", [64, 128, 256])
@pytest.mark.parametrize("size", [64, 128])
def test_keys_at_most_bounds_what_a_row_computes(size: int, block_q: int) -> None:
    geometry, pattern = Geometry.of(size * 9, block_q=block_q, block_kv=64), Given(most=2, size=size)
    q, k, _ = inputs_for(geometry)
    most = pattern.keys_at_most(geometry)
    assert most is not None
    assert int(pattern.select(q, k, geometry, SOFTMAX).to_mask().sum(-1).max()) <= most
    assert Given(bounded=False).keys_at_most(geometry) is None


def test_the_contract() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._REGISTRY, "given", Given)
        check_pattern(Given(most=2, size=64), GEOMETRIES)
        check_pattern(Given(bounded=False), GEOMETRIES[4:])
