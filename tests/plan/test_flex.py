"""Plans as FlexAttention BlockMasks, and back."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.kernels import attend
from sparsekit.patterns import AShape, Dense, StaticPattern, Triangle, static_plan
from sparsekit.plan import BlockPlan, TokenRule, stack_heads
from sparsekit.plan.flex import from_flex, to_flex
from sparsekit.testing import inputs_for

CPU = torch.device("cpu")
PATTERNS = [Triangle(sink_tokens=8, window_tokens=40, last_tokens=20), AShape(sink_tokens=3, window_tokens=70), Dense()]
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def _plan(pattern: StaticPattern, q_len: int, kv_len: int) -> BlockPlan:
    return static_plan(pattern, Geometry.of(q_len, kv_len, block_q=64, block_kv=64), CPU)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 300), (256, 512), (108, 300)])
def test_there_and_back(pattern: StaticPattern, q_len: int, kv_len: int) -> None:
    plan = _plan(pattern, q_len, kv_len)
    block_mask, (q, k, v) = to_flex(plan), inputs_for(plan.geometry)
    out = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    assert torch.allclose(out, attend(q, k, v, plan, impl="reference"), atol=1e-5)
    back = from_flex(block_mask, rule=pattern.rule(plan.geometry.spans[0]))
    assert torch.equal(back.to_mask(), plan.to_mask())


def test_tile_lists_say_the_same_as_the_mask_function() -> None:
    """A compiled FlexAttention reads the lists, an uncompiled one the function."""
    plan = _plan(PATTERNS[0], 300, 300)  # type: ignore[arg-type]
    block_mask = to_flex(plan)
    listed = block_mask.to_dense().bool()[0, 0].repeat_interleave(64, 0).repeat_interleave(64, 1)[:300, :300]
    assert bool((listed | ~plan.to_mask()[0, 0]).all())
    partial = plan.tile_density() * 15 - int(block_mask.full_kv_num_blocks.sum())
    assert int(block_mask.kv_num_blocks.sum()) == round(partial)


def test_heads_of_their_own() -> None:
    plans = [_plan(pattern, 300, 300) for pattern in PATTERNS]  # type: ignore[arg-type]
    plan = stack_heads(plans, [0, 1, 2, 0])
    q, k, v = inputs_for(plan.geometry)
    out = flex_attention(q, k, v, block_mask=to_flex(plan), enable_gqa=True)
    assert torch.allclose(out, attend(q, k, v, plan, impl="reference"), atol=1e-5)


def test_masks_made_by_flexattention() -> None:
    sliding = create_block_mask(
        lambda b, h, q, k: (k <= q) & (q - k < 100), 1, 1, 300, 300, device="cpu", BLOCK_SIZE=64
    )
    plan = from_flex(sliding, rule=TokenRule(0, 100, 300))
    assert torch.equal(
        plan.to_mask(), static_plan(AShape(sink_tokens=0, window_tokens=100), plan.geometry, CPU).to_mask()
    )
    causal = create_block_mask(lambda b, h, q, k: k <= q, 1, 1, 300, 300, device="cpu", BLOCK_SIZE=64)
    assert from_flex(causal).all_dense


def test_what_does_not_fit() -> None:
    dilated = create_block_mask(
        lambda b, h, q, k: (k <= q) & ((q - k) % 2 == 0), 1, 1, 128, 128, device="cpu", BLOCK_SIZE=64
    )
    with pytest.raises(SparsekitError, match="cut neither by causality nor by rule"):
        from_flex(dilated)
    full = create_block_mask(lambda b, h, q, k: q >= 0, 1, 1, 128, 128, device="cpu", BLOCK_SIZE=64)
    with pytest.raises(SparsekitError, match="not causal"):
        from_flex(full)
    with pytest.raises(SparsekitError, match="off the grid"):
        to_flex(_plan(Triangle(), 100, 300))
    padded = Geometry.of(300, batch=2, kv_start=(0, 10), block_q=64)
    with pytest.raises(SparsekitError, match="kv_start"):
        to_flex(static_plan(Triangle(), padded, CPU))
    causal = create_block_mask(lambda b, h, q, k: k <= q, 1, 1, 300, 300, device="cpu", BLOCK_SIZE=64)
    for start in (64, 10):
        with pytest.raises(SparsekitError, match=rf"from_flex: kv_start=\({start},\): .*padding on the left"):
            from_flex(causal, geometry=Geometry.of(300, kv_start=(start,), block_q=64, block_kv=64))
