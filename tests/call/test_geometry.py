"""Positions: offsets, padding, prompt ends, and what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsekit import Geometry, SparsekitError
from sparsekit.call.geometry import MAX_TOKENS, Span


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


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"q_len": 10.0}, r"q_len=10\.0: a whole number"),
        ({"q_len": True}, "q_len=True: a whole number"),
        ({"q_len": "10"}, "q_len='10': a whole number"),
        ({"q_len": float("nan")}, "q_len=nan: a whole number"),
        ({"q_len": 10**30}, f"q_len={10**30}: at most {MAX_TOKENS}"),
        ({"q_len": 10, "kv_len": 10**5000}, f"kv_len=.*: at most {MAX_TOKENS}"),
        ({"q_len": 10, "prompt_len": 10**30}, "prompt_len=1000.*: at most"),
        ({"q_len": 10, "prompt_len": 7.5}, r"prompt_len=7\.5: a whole number"),
        ({"q_len": 10, "prompt_len": []}, r"prompt_len=\[\]"),
        ({"q_len": 10, "q_offset": 0.0}, r"q_offset=0\.0: a whole number"),
        ({"q_len": 10, "kv_start": 3}, "kv_start=3: a sequence"),
        ({"q_len": 10, "kv_start": (1.5,)}, r"kv_start=1\.5: a whole number"),
        ({"q_len": 10, "batch": 0}, "batch=0: 1 to"),
        ({"q_len": 10, "batch": 10**9}, "batch=1000000000: at most"),
        ({"q_len": 10, "batch": None}, "batch=None: a whole number"),
        ({"q_len": 10, "block_kv": 64.0}, r"block_kv=64\.0: a whole number"),
    ],
)
def test_what_is_no_whole_number(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(SparsekitError, match=message):
        Geometry.of(**kwargs)  # type: ignore[arg-type]


def test_whole_numbers_of_other_kinds() -> None:
    made = Geometry.of(
        np.int64(100), np.int32(300), batch=np.int64(2), kv_start=np.array([0, 3]), prompt_len=torch.tensor([400, 500])
    )
    assert made == Geometry.of(100, 300, batch=2, kv_start=(0, 3), prompt_len=(400, 500))
    assert {type(n) for n in (made.q_len, made.kv_len, *made.kv_start, *made.prompt_tokens)} == {int}
    assert Geometry.of(5, prompt_len=np.int64(9)).prompt_tokens == (9,)


def test_a_message_stays_short() -> None:
    with pytest.raises(SparsekitError) as error:
        Geometry.of(10, batch=5000, kv_start=tuple(range(4000)))
    assert len(str(error.value)) < 200
