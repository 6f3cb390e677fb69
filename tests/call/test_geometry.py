"""Positions: offsets, padding, prompt ends, and what does not fit."""

from __future__ import annotations

import pytest

from sparsekit import Geometry, SparsekitError
from sparsekit.call.geometry import Span


def test_defaults() -> None:
    g = Geometry.of(300)
    assert g.spans == (Span(0, 300, 300, 300),)
    assert g.spans[0].causal_pairs == 300 * 301 // 2
    assert g.rows == 3


def test_chunk_counts_from_the_start() -> None:
    g = Geometry.of(100, 300, block_q=64)
    assert g.spans == (Span(200, 300, 300, 300),)
    assert g.rows == 2  # tiles 192..255 and 256..319
    assert g.q_index(0, 200) == 0
    assert g.q_index(0, 192) == -8


def test_padding_moves_the_origin() -> None:
    g = Geometry.of(100, batch=3, kv_start=(0, 30, 100), kv_end=(100, 100, 100))
    assert g.spans == (Span(0, 100, 100, 100), Span(0, 70, 70, 70), Span(0, 0, 0, 0))
    assert not g.uniform
    assert g.q_index(1, 0) == 30


def test_static_cache_has_spare_keys() -> None:
    g = Geometry.of(64, 4096, q_offset=100)
    assert g.spans == (Span(100, 164, 164, 164),)


def test_prompt_of_padded_columns() -> None:
    g = Geometry.of(100, batch=2, kv_start=(0, 30)).with_prompt(500)
    assert g.prompt_tokens == (500, 470)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"q_len": 10, "kv_len": 5}, "q_offset=-5"),
        ({"q_len": 10, "kv_len": 20, "q_offset": 11}, r"0 <= q_offset <= kv_len - q_len = 10"),
        ({"q_len": 0}, "at least one query"),
        ({"q_len": 10, "kv_start": (11,)}, r"kv_start=\(11,\)"),
        ({"q_len": 10, "kv_start": (5,), "kv_end": (4,)}, "must end after they start"),
        ({"q_len": 10, "batch": 2, "kv_end": (10,)}, "for each of 2 samples"),
        ({"q_len": 10, "prompt_len": 0}, "prompt_len=0"),
        ({"q_len": 10, "block_q": 100}, "block_q=100: a tile is one of 16, 32, 64, 128, 256"),
    ],
)
def test_what_does_not_fit(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(SparsekitError, match=message):
        Geometry.of(**kwargs)  # type: ignore[arg-type]
