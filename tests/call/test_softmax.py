"""The softmax's fields: one door for every implementation."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from sparsekit import Geometry, SparsekitError, attention
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend
from sparsekit.plan import dense_plan

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("scale", [0, 0.0, -1.0, NAN, INF, -INF, True, "0.1", 10**400, Decimal("0.1"), torch.ones(2)])
def test_a_scale_is_a_finite_number_above_0(scale: Any) -> None:
    with pytest.raises(SparsekitError, match=r"^scale=.*: a finite number above 0; by default 1 / sqrt"):
        Softmax(scale)


@pytest.mark.parametrize("softcap", [-1.0, NAN, INF, -INF, True, False, "30", [30.0]])
def test_a_softcap_is_a_finite_number_above_0(softcap: Any) -> None:
    with pytest.raises(SparsekitError, match=r"^softcap=.*: a finite number above 0; None or 0 is none\.$"):
        Softmax(0.1, softcap)


def test_numbers_of_other_kinds() -> None:
    for scale in (1, np.float32(1.0), np.int64(1), Fraction(1)):
        made = Softmax(scale, scale)  # type: ignore[arg-type]
        assert (made.scale, made.softcap) == (1.0, 1.0)
        assert type(made.scale) is type(made.softcap) is float
    for off in (None, 0, 0.0, -0.0, np.float32(0)):
        assert Softmax(0.1, off).softcap is None  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_the_doors(impl: str) -> None:
    q, plan = torch.randn(1, 2, 100, 16), dense_plan(Geometry.of(100))
    plain = attend(q, q, q, plan, impl=impl)
    for softcap in (0, 0.0, None):
        assert torch.equal(plain, attend(q, q, q, plan, impl=impl, softcap=softcap))  # type: ignore[arg-type]
    for bad in (
        {"scale": 0.0},
        {"scale": NAN},
        {"softcap": -3.0},
        {"softcap": NAN},
        {"sink_logits": torch.tensor([1.0, NAN])},
    ):
        with pytest.raises(SparsekitError, match="finite number"):
            attend(q, q, q, plan, impl=impl, **bad)  # type: ignore[arg-type]
        for pattern in ("triangle", "xattention", "vertical_slash", "flexprefill", "s2o"):
            with pytest.raises(SparsekitError, match="finite number"):
                attention(q, q, q, pattern, impl=impl, **bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_sink_of_minus_infinity_is_none(impl: str) -> None:
    q, plan = torch.randn(1, 2, 100, 16), dense_plan(Geometry.of(100))
    out, lse = attend(q, q, q, plan, impl=impl, sink_logits=torch.tensor([-INF, 1.0]), return_lse=True)
    plain, plain_lse = attend(q, q, q, plan, impl=impl, return_lse=True)
    assert torch.allclose(out[:, 0], plain[:, 0], atol=1e-6) and torch.allclose(lse[:, 0], plain_lse[:, 0])
    assert not torch.allclose(out[:, 1], plain[:, 1], atol=1e-3)


def test_sinks_are_a_floating_point_tensor() -> None:
    for sinks in ([0.5], torch.zeros(2, dtype=torch.int64), 3.0):
        with pytest.raises(SparsekitError, match=r"sink_logits=.*: a floating-point tensor \(H,\), or None"):
            Softmax(0.1, None, sinks)  # type: ignore[arg-type]
    with pytest.raises(SparsekitError, match="NaN or inf"):
        Softmax(0.1, None, torch.tensor([0.0, INF]))


def test_logits_and_join() -> None:
    dots = torch.randn(1, 2, 5, 7, dtype=torch.float64)
    made = Softmax(0.3, 2.0, torch.tensor([0.5, -1.0]))
    assert torch.equal(made.logits(dots), 2.0 * torch.tanh(dots * 0.3 / 2.0))
    lse = made.logits(dots).logsumexp(-1)
    want = torch.cat([made.logits(dots), torch.tensor([0.5, -1.0]).view(1, 2, 1, 1).expand(1, 2, 5, 1)], -1).logsumexp(
        -1
    )
    assert torch.allclose(made.join(lse), want)
    assert Softmax(0.3).join(lse) is lse
