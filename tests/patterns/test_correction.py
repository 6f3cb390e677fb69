"""`correct_every`: any pattern takes it, alone, in heads and unions; outputs are the formula on masks, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparsekit
from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.patterns import Pattern, parse_pattern, pattern_class, pattern_names
from sparsekit.patterns.attention import plan_heads
from sparsekit.testing import GEOMETRIES, check_pattern, inputs_for

TRIANGLE: dict[str, Any] = {"name": "triangle", "sink_tokens": 8, "window_tokens": 40, "last_tokens": 20}
A_SHAPE: dict[str, Any] = {"name": "a_shape", "sink_tokens": 8, "window_tokens": 40}
SPARSE = [name for name in pattern_names() if name != "dense"]


def _corrected(name: str, every: int = 64, point: int = 0) -> Pattern:
    return parse_pattern({"name": name, **pattern_class(name).test_points[point], "correct_every": every})


@pytest.mark.parametrize("name", SPARSE)
def test_every_pattern_takes_it_and_keeps_the_contract(name: str) -> None:
    pattern = _corrected(name)
    assert str(pattern).endswith("correct_every=64)")
    some = (GEOMETRIES[4], GEOMETRIES[8], GEOMETRIES[10], GEOMETRIES[12])  # whole, a chunk, padding on the left
    check_pattern(pattern, some)


# ---- against masks


def _softmax(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Attention of q (H, n, D) over k, v (G, n, D) under a mask (n, n), as one writes it on paper."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    z = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~keep, -torch.inf)
    return z.softmax(-1) @ v


def _by_formula(q: Tensor, k: Tensor, v: Tensor, every: int, last: int = 20) -> Tensor:
    """The corrected triangle of one whole prompt: q (H, n, D)."""
    n = q.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    causal, late = j <= i, i >= n - last
    sparse = _softmax(q, k, v, causal & ((j < 8) | (i - j < 40) | late))
    dense = _softmax(q, k, v, causal)
    anchor = torch.arange(n) // every * every
    return sparse + (dense - sparse)[:, anchor].masked_fill(late, 0)


def _random(tokens: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(batch, heads, tokens, 16, generator=g, dtype=torch.float64) for heads in (6, 2, 2))
    return q, k, v


@pytest.mark.parametrize("every", [2, 16, 64, 100])
@pytest.mark.parametrize("tokens", [1, 65, 300, 517])
def test_outputs_are_the_formula_on_masks(tokens: int, every: int) -> None:
    q, k, v = _random(tokens)
    got = sparsekit.attention(q, k, v, {**TRIANGLE, "correct_every": every})
    expected = _by_formula(q[0], k[0], v[0], every)
    assert (got[0] - expected).abs().max() < 1e-12  # type: ignore[index]


def test_anchors_are_dense_and_rows_before_the_next_one_move_with_them() -> None:
    q, k, v = _random(300)
    dense = sparsekit.attention(q, k, v, "dense")
    sparse = sparsekit.attention(q, k, v, TRIANGLE)
    got = sparsekit.attention(q, k, v, {**TRIANGLE, "correct_every": 64})
    assert (got - dense)[:, :, :280:64].abs().max() < 1e-12  # type: ignore[operator]
    assert (got - sparse)[:, :, 280:].abs().max() == 0  # type: ignore[operator]
    moved = (got - sparse)[:, :, 128:192]  # type: ignore[operator]
    assert (moved - moved[:, :, :1]).abs().max() < 1e-12


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_sample_is_corrected_as_alone(side: str) -> None:
    lengths, tokens = (300, 231, 70), 300
    q, k, v = _random(tokens, batch=3)
    bounds: dict[str, Any] = {"kv_start": [tokens - n for n in lengths]} if side == "left" else {"kv_end": lengths}
    geometry = Geometry.of(tokens, batch=3, **bounds)
    got = sparsekit.attention(q, k, v, {**TRIANGLE, "correct_every": 64}, geometry=geometry)
    for b, n in enumerate(lengths):
        here = slice(tokens - n, None) if side == "left" else slice(n)
        expected = _by_formula(q[b, :, here], k[b, :, here], v[b, :, here], 64)
        assert (got[b, :, here] - expected).abs().max() < 1e-12  # type: ignore[index]


@pytest.mark.parametrize("size", [64, 128, 192])
@pytest.mark.parametrize("pad", [0, 37])
def test_chunks_that_begin_with_a_block_are_the_whole(size: int, pad: int) -> None:
    """Positions count from the first real token, so of a padded sample other chunks are such."""
    tokens = 517
    q, k, v = _random(tokens)
    expected = _by_formula(q[0, :, pad:], k[0, :, pad:], v[0, :, pad:], 64)
    for first in range(pad, tokens, size):
        last = min(first + size, tokens)
        geometry = Geometry.of(last - first, last, kv_start=[pad], prompt_len=tokens - pad)
        some = q[:, :, first:last], k[:, :, :last], v[:, :, :last]
        got = sparsekit.attention(*some, {**TRIANGLE, "correct_every": 64}, geometry=geometry)
        assert (got[0] - expected[:, first - pad : last - pad]).abs().max() < 1e-12  # type: ignore[index]


def test_a_chunk_that_begins_within_a_block_begins_with_an_anchor() -> None:
    """Up to the next block its first row corrects; from there on it is the whole prompt's."""
    q, k, v = _random(300)
    first, block = 100, 128
    whole, dense, sparse = (
        sparsekit.attention(q, k, v, pattern) for pattern in ({**TRIANGLE, "correct_every": 64}, "dense", TRIANGLE)
    )
    geometry = Geometry.of(200, 300, prompt_len=300)
    got = sparsekit.attention(q[:, :, first:], k, v, {**TRIANGLE, "correct_every": 64}, geometry=geometry)
    assert (got[:, :, block - first :] - whole[:, :, block:]).abs().max() < 1e-12  # type: ignore[index]
    change = (dense - sparse)[:, :, first : first + 1]  # type: ignore[operator]
    expected = sparse[:, :, first:block] + change  # type: ignore[index]
    assert (got[:, :, : block - first] - expected).abs().max() < 1e-12  # type: ignore[index]


def test_heads_of_one_layer() -> None:
    """Head by head what each pattern gives alone; dense heads are as they are."""
    geometry = Geometry.of(300)
    q, k, v = inputs_for(geometry)
    patterns = [parse_pattern({**TRIANGLE, "correct_every": 64}), parse_pattern("dense"), _corrected("block_topk")]
    of_head = (0, 1, 2, 0)
    plan = plan_heads(patterns, of_head, q, k, geometry, Softmax(0.25))
    got = sparsekit.kernels.attend(q, k, v, plan)
    for head, i in enumerate(of_head):
        alone = sparsekit.attention(q, k, v, patterns[i])
        assert (got[:, head] - alone[:, head]).abs().max() < 1e-5  # type: ignore[index]


# ---- what is refused


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ({**TRIANGLE, "correct_every": 1}, "triangle: correct_every = 1: it should be greater than or equal to 2"),
        ({**TRIANGLE, "correct_every": 5000}, "correct_every = 5000: it should be less than or equal to 4096"),
        ({**TRIANGLE, "correct_every": 64.0}, "correct_every = 64.0: it should be a valid integer"),
        ({**TRIANGLE, "correct_evry": 64}, "unknown field 'correct_evry' = 64; .* Did you mean 'correct_every'"),
        ({"name": "dense", "correct_every": 64}, "correct_every = 64: dense rows lack nothing that could be corrected"),
        (
            {"name": "union", "of": [A_SHAPE, {**TRIANGLE, "correct_every": 64}]},
            r"of\[1\]: correct_every = 64 is for the union, not its members",
        ),
    ],
)
def test_what_is_refused(pattern: dict[str, Any], said: str) -> None:
    with pytest.raises(SparsekitError, match=said) as error:
        parse_pattern(pattern)
    assert "\n" not in str(error.value)


def test_a_union_is_corrected_as_one() -> None:
    union = {"name": "union", "of": [A_SHAPE, TRIANGLE], "correct_every": 64}
    q, k, v = _random(300)
    got, expected = (sparsekit.attention(q, k, v, p) for p in (union, {**TRIANGLE, "correct_every": 64}))
    assert (got - expected).abs().max() < 1e-12  # type: ignore[operator]
    assert parse_pattern(union).to_yaml() == union


def test_records_name_it_only_where_it_is_set() -> None:
    assert "correct_every" not in parse_pattern(TRIANGLE).model_dump()
    assert parse_pattern({**TRIANGLE, "correct_every": 64}).model_dump()["correct_every"] == 64
    assert parse_pattern({"name": "union", "of": [TRIANGLE]}).model_dump()["of"][0].get("correct_every") is None
