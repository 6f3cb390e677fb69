"""The FP8 form for Hopper: nobody gets it who did not ask, its device code compiles as it must to be fast, and on a
card it is as far from the definition as e4m3 is."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from card_fp8 import agrees, keeps_most_of_a_part_of_the_mean, keeps_the_mean, leaves_what_is_not_finite_where_it_is
from children import compiled, interpret
from gluon_in_python import device_code, hosted
from kernel_cases import in_pages, random_plan, with_columns
from torch import Tensor

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend, choose
from sparsekit.kernels.attend.hopper import fp8 as host
from sparsekit.kernels.attend.hopper import host as hopper
from sparsekit.kernels.attend.hopper import items as item
from sparsekit.kernels.attend.hopper import worklist
from sparsekit.kernels.choose import TABLE
from sparsekit.plan import BlockPlan, TokenRule, dense_plan, plan_from_rule

SHARED_MEMORY = 232448  # bytes a block may have on sm_90


def _tiled(*args: Any, **kwargs: Any) -> Geometry:
    return Geometry.of(*args, block_q=128, block_kv=128, **kwargs)


def _triangle(geometry: Geometry) -> BlockPlan:
    return plan_from_rule([TokenRule(8, 150, max(s.prompt_tokens - 100, 0)) for s in geometry.spans], geometry)


def test_it_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(row for row in TABLE if row.name == "hopper_fp8")
    monkeypatch.setattr(hopper, "missing", lambda device: "")
    assert row.missing(torch.device("cuda"), True) == ""
    assert "runs where it is asked for" in row.missing(torch.device("cuda"), False)
    monkeypatch.undo()
    assert choose("cpu") == "torch"
    assert TABLE.index(row) > TABLE.index(next(row for row in TABLE if row.name == "torch"))  # which runs any call
    with pytest.raises(SparsekitError, match="impl='hopper_fp8' cannot run on cpu: it is not a CUDA device"):
        choose("cpu", "hopper_fp8")


def test_what_it_covers() -> None:
    def against(q: Tensor, plan: BlockPlan, scale: float = 0.1) -> str:
        return "; ".join(host.covers(q, Keys(q, q), plan, Softmax(scale), True))

    q = torch.empty(1, 4, 256, 128, dtype=torch.bfloat16)
    assert against(q, dense_plan(_tiled(256))) == ""
    assert against(q.half(), _triangle(_tiled(256))) == ""
    assert against(q, dense_plan(_tiled(256)), 1e-8) == ""
    assert against(q, dense_plan(_tiled(256)), 1e-9) == "scale 1e-09: 1e-08 or more"
    assert "float32" in against(q.float(), dense_plan(_tiled(256)))
    assert "head size 64: 128" in against(q[..., :64], dense_plan(_tiled(256)))
    assert "tile 128 x 64: 128 x 128" in against(q, dense_plan(Geometry.of(256, block_q=128, block_kv=64)))
    loose = random_plan(_tiled(256), 4)
    loose = replace(loose, on_grid=False)
    assert "128 keys, counted from the first, share a scale" in against(q, loose)
    assert "single key columns" in against(q, with_columns(_triangle(_tiled(256)), 40))
    assert "every 64th query alone" in against(q[:, :, :4], dense_plan(_tiled(256).anchors(64)))
    assert "corrected by every 64th row" in against(q, _triangle(_tiled(256)).corrected(64))
    assert against(q[..., :96], dense_plan(_tiled(256))).count("head size") == 1
    assert "strides" in against(q[:, :1].expand(-1, 4, -1, -1), dense_plan(_tiled(256)))


class _Recorded:
    """A kernel that notes the modes of its launches."""

    def __init__(self) -> None:
        self.modes: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, stream: self.modes.append(arguments[host.MODE_ARGUMENT])


@pytest.mark.parametrize("least", [1, 1 << 60])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modes_of_a_call(dtype: torch.dtype, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are e4m3, whatever q is."""
    code = device_code("fp8_device")
    names = list(inspect.signature(code.attention).parameters)
    assert names[host.SCALES_ARGUMENT : host.MODE_ARGUMENT + 1] == [
        "p_scales", "p_common", "p_out", "p_lse", "p_sinks", "p_part", "p_part_lse", "p_marks", "mode",
    ]  # fmt: skip
    monkeypatch.setattr(hopper, "FIXED_FROM", least)
    q, k = torch.empty(1, 4, 300, 128, dtype=dtype), torch.empty(1, 2, 300, 128, dtype=dtype)
    for plan in (dense_plan(_tiled(300)), _triangle(_tiled(300))):
        with hosted(host, code):
            (launch,) = host._prepare(q, k, plan, Softmax(0.1), False)
            assert len(launch.arguments[names.index("p_marks")]) == hopper.room(len(launch.work.items))
            launch = replace(launch, kernel=_Recorded())
            # Descriptors look at nothing but where tensors lie.
            launch.run(q, (k, k, torch.empty(1), torch.empty(1)), torch.empty_like(q), None, None, 0)
        assert launch.kernel.modes == ([item.FIXED, item.AGAIN] if least == 1 else [item.RUNNING])


@pytest.mark.slow
def test_quantised() -> None:
    interpret("attend/interpreted_fp8.py")


# ---- the device code compiles for sm_90, without a card

COMPILED = [("dense", ""), ("triangle", ""), ("tiles", "lse"), ("triangle", "cap sinks lse")]
BEFORE = [("in_common", 0), ("in_common", 64), ("quantise", 0), ("quantise", 64)]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of them takes; one child process compiles them all."""
    return compiled("attend/compile_fp8.py", tmp_path_factory.mktemp("triton"), json.dumps([*COMPILED, *BEFORE]))


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiles_for_sm_90(case: tuple[str, str], offline: list[dict[str, Any]]) -> None:
    made = offline[COMPILED.index(case)]
    assert made["shared"] <= SHARED_MEMORY
    assert made["steps"] == 4  # the step loops of the two consumers, with either maximum
    assert made["bytes_moved"] == 0  # P is the operand where it is made, but for its type
    assert made["shuffles"] == [4, 4, 4, 4]  # of rows' maxima, or of their sums where P outgrows e4m3
    assert max(made["late"]) <= 4  # the exponentials run beside P V
    assert "C75" not in made["said"]  # ptxas: wgmma serialised, or register reallocation ignored
    assert made["spilled"] == 0  # in a step
    # What only a tile's end needs, once a tile: none with Triton 3.6, 4 to 24 bytes with the ptxas of 3.9.
    once = {int(n) for n in re.findall(r"(\d+) bytes spill stores", made["said"])}
    assert max(once) <= (0 if case[0] == "tiles" else 24)


@pytest.mark.slow
@pytest.mark.parametrize("case", BEFORE, ids=str)
def test_what_runs_before_compiles_for_sm_90(case: tuple[str, int], offline: list[dict[str, Any]]) -> None:
    made = offline[len(COMPILED) + BEFORE.index(case)]
    assert made["shared"] <= SHARED_MEMORY
    assert "0 bytes spill stores, 0 bytes spill loads" in made["said"]


# ---- on a card

PLANS: dict[str, Callable[[], BlockPlan]] = {
    "dense": lambda: dense_plan(_tiled(1000)),
    "dense, short": lambda: dense_plan(_tiled(77)),
    "dense, long": lambda: dense_plan(_tiled(3000)),
    "dense, padded": lambda: dense_plan(_tiled(700, batch=3, kv_start=(0, 37, 600))),
    "dense, ragged": lambda: dense_plan(_tiled(700, batch=3, kv_end=(700, 37, 250))),
    "dense, chunk": lambda: dense_plan(_tiled(300, 1000, q_offset=450)),
    "triangle": lambda: _triangle(_tiled(2000)),
    "triangle, padded": lambda: _triangle(_tiled(900, batch=2, kv_start=(0, 137))),
    "tiles a head": lambda: random_plan(_tiled(2000), 4),
    "tiles a key head, padded": lambda: random_plan(_tiled(700, batch=2, kv_start=(0, 40)), 2),
}


def _inputs(geometry: Geometry, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in (B, N, heads, 128) memory."""
    g = torch.Generator().manual_seed(0)
    shapes = ((geometry.q_len, 4), (geometry.kv_len, 2), (geometry.kv_len, 2))
    q, k, v = (torch.randn(geometry.batch, n, heads, 128, generator=g).to("cuda", dtype) for n, heads in shapes)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


_agrees = partial(agrees, "hopper_fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANS)
def test_card(name: str) -> None:
    plan = PLANS[name]()
    _agrees(plan, _inputs(plan.geometry))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sink_logits": (0.5, -1.0, 2.0, 0.0)}, {"scale": 0.03}])
def test_card_softmax(options: dict[str, Any]) -> None:
    options = {key: torch.tensor(x, device="cuda") if isinstance(x, tuple) else x for key, x in options.items()}
    for plan in (dense_plan(_tiled(1000)), _triangle(_tiled(1000))):
        _agrees(plan, _inputs(plan.geometry, torch.float16), **options)


@pytest.mark.gpu
def test_card_pages() -> None:
    for plan in (dense_plan(_tiled(300, batch=2, kv_end=(300, 130))), _triangle(_tiled(900))):
        q, k, v = _inputs(plan.geometry)
        _agrees(plan, (q, k, v), in_pages(k, v, plan.geometry, 64))


@pytest.mark.gpu
def test_card_split_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worklist, "SPLIT_FROM_STEPS", 1)
    monkeypatch.setattr(worklist, "SHORTEST_PIECE", 1)
    for plan in (dense_plan(_tiled(100, 5000)), _triangle(_tiled(3000))):
        _agrees(plan, _inputs(plan.geometry))
        q, k, v = _inputs(plan.geometry)
        q[0, 1, -2] = torch.nan
        out: Any = attend(q, k, v, plan.to("cuda"), impl="hopper_fp8")
        assert out.isnan().nonzero()[:, 1:3].unique(dim=0).tolist() == [[1, plan.geometry.q_len - 2]]


@pytest.mark.gpu
def test_card_zeros() -> None:
    """Of q and k at once, and of v."""
    for plan in (dense_plan(_tiled(1000)), _triangle(_tiled(1000))):
        q, k, v = _inputs(plan.geometry)
        q[:, :2] = k[:, 0] = v[:, 1] = 0
        _agrees(plan, (q, k, v))


@pytest.mark.gpu
def test_card_what_is_not_finite() -> None:
    leaves_what_is_not_finite_where_it_is("hopper_fp8", _inputs(_tiled(1000)))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"sink_logits": (3.5, -1.0, 2.0, 40.0)}], ids=["plain", "sinks"])
def test_card_what_keys_have_in_common(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding knows nothing of it, where it is ten times what tells keys apart."""
    options = {key: torch.tensor(x, device="cuda") for key, x in options.items()}
    monkeypatch.setattr(worklist, "SPLIT_FROM_STEPS", 8)
    for plan in (
        dense_plan(_tiled(700, batch=2, kv_end=(700, 250))),
        _triangle(_tiled(2000)),
        dense_plan(_tiled(100, 5000)),
    ):
        q, k, v = _inputs(plan.geometry)
        common = 10 * torch.randn(k.shape[0], 2, 1, 128, generator=torch.Generator().manual_seed(1))
        k = k + common.to("cuda", k.dtype)
        _agrees(plan, (q, k, v), **options)
        _agrees(plan, (q, k, v), in_pages(k, v, plan.geometry, 64), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"sink_logits": (0.5, -1.0, 2.0, 12.0)}, {"softcap": 5.0}], ids=str)
def test_card_keeps_the_mean_of_the_values(options: dict[str, Any]) -> None:
    """Tensor cores alone lose a third of it at 32K: their sums have 13 bits behind the point. A sink takes its share of
    it, in whole rows as in split ones. What is not the mean is rounded as ever, to 4.5%."""
    options = {key: torch.tensor(x, device="cuda") if isinstance(x, tuple) else x for key, x in options.items()}
    for geometry in (_tiled(128, 32768), _tiled(1000)):
        keeps_the_mean("hopper_fp8", geometry, _inputs(geometry), **options)


@pytest.mark.gpu
def test_card_keeps_most_of_the_mean_of_some_values() -> None:
    """What half of the values have in common and the other half have not is cut by a fortieth, kept every 16 steps."""
    keeps_most_of_a_part_of_the_mean("hopper_fp8", _inputs(_tiled(128, 32768)))
