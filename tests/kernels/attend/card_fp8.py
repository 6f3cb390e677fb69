"""What both FP8 forms are held to on a card. `inputs`: q, k and v there."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from kernel_cases import poisoned_memory
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.kernels import attend
from sparsekit.kernels.attend.hopper import host
from sparsekit.plan import BlockPlan, dense_plan

Inputs = tuple[Tensor, Tensor, Tensor]


def agrees(impl: str, plan: BlockPlan, inputs: Inputs, keys: Keys | None = None, **options: Any) -> None:
    """As far from float64 as four roundings to three bits are (`hopper_fp8`, H200: 4.4% to 5.4%, and 0.11 of a row's
    LSE at most)."""
    q, k, v = inputs
    wide = (q.double(), k.double(), v.double())
    expected, expected_lse = attend(*wide, plan.to("cuda"), impl="reference", return_lse=True, **options)
    k, v, table = keys or Keys(k, v)
    for first in (0, 1 << 60):  # of `hopper_fp8`: rows keep the maximum of their first step, and find the running one
        with patch.object(host, "FIXED_FROM", first):
            with poisoned_memory():
                out, lse = attend(q, k, v, plan.to("cuda"), impl=impl, table=table, return_lse=True, **options)
                alone: Any = attend(q, k, v, plan.to("cuda"), impl=impl, table=table, **options)
            # With and without an LSE are two kernels, which Triton may round apart: 1e-5 seen, a row in 300 (H200).
            assert float((out - alone).norm()) <= (0.0 if impl == "hopper_fp8" else 1e-4) * float(out.norm())
            seen = expected_lse.isfinite()
            assert float((out.double() - expected).norm()) <= 0.06 * float(expected.norm())
            assert not out[~seen].any()
            assert torch.equal(lse.isfinite(), seen)
            assert bool(((lse.double() - expected_lse)[seen].abs() < 0.2).all())


def leaves_what_is_not_finite_where_it_is(impl: str, inputs: Inputs) -> None:
    """A key is NaN to those that see it, a value where it is; nothing else of their blocks changes. 1,000 tokens."""
    q, k, v = inputs
    plan = dense_plan(Geometry.of(1000, block_q=128, block_kv=128)).to("cuda")
    k[0, 0, 500, 3] = v[0, 1, 600, 5] = 0
    expected: Any = attend(q, k, v, plan, impl=impl)
    k[0, 0, 500, 3], v[0, 1, 600, 5] = torch.inf, torch.nan
    out: Any = attend(q, k, v, plan, impl=impl)
    assert torch.equal(out[:, :2, :500], expected[:, :2, :500])
    assert out[:, :2, 500:].isnan().all()
    assert out[:, 2:, 600:, 5].isnan().all()
    expected[:, 2:, 512:, 5] = out[:, 2:, 512:, 5] = 0  # 0 * NaN is NaN to earlier rows of the tile
    assert torch.equal(out[:, 2:], expected[:, 2:])


def keeps_the_mean(impl: str, geometry: Geometry, inputs: Inputs, **options: Any) -> None:
    """Of values, where it is 1. What is not the mean is rounded as ever, to 4.5%."""
    q, k, v = inputs
    plan = dense_plan(geometry).to("cuda")
    out: Any = attend(q, k, v + 1, plan, impl=impl, **options)
    expected, rest = (attend(q.double(), k.double(), x.double(), plan, impl="reference", **options) for x in (v + 1, v))
    off = out.double() - expected
    assert abs(float(off.mean())) < 0.0025 * float(expected.mean())
    assert float(off.norm()) < 0.0025 * float(expected.norm()) + 0.05 * float(rest.norm())


def keeps_most_of_a_part_of_the_mean(impl: str, inputs: Inputs) -> None:
    """What half of the values have in common and the other half have not. 128 queries over 32,768 keys."""
    q, k, v = inputs
    plan = dense_plan(Geometry.of(128, 32768, block_q=128, block_kv=128)).to("cuda")
    v = torch.cat((v[:, :, :16384] + 1, v[:, :, 16384:] - 1), 2)
    k[:, :, :16384] += q[:, ::2, -1:] * 0.2  # so that the last row sees more of the first half
    out: Any = attend(q, k, v, plan, impl=impl)
    wide: Any = attend(q.double(), k.double(), v.double(), plan, impl="reference")
    expected = float(wide[:, ::2, -1].mean())
    assert expected > 0.5
    assert abs(float(out[:, ::2, -1].double().mean()) - expected) < expected / 25
