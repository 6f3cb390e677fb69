"""The portable FP8 form: who gets it, what it refuses, and that it compiles for each card whose tensor cores take e4m3;
on a card it is as far from the definition as e4m3 is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from card_fp8 import agrees, keeps_most_of_a_part_of_the_mean, keeps_the_mean, leaves_what_is_not_finite_where_it_is
from children import compiled, interpret
from kernel_cases import in_pages, random_plan, rule_plan, tensors, with_columns
from test_compile import LIMITS
from torch import Tensor

from sparsekit import SparsekitError
from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.kernels import attend, choose
from sparsekit.kernels import choose_device as chosen
from sparsekit.kernels.attend import fp8 as host
from sparsekit.kernels.choose import FAMILIES, TABLE, choose_row
from sparsekit.patterns import S2O
from sparsekit.plan import BlockPlan, dense_plan

CUDA = torch.device("cuda")
ROW = next(row for row in TABLE if row.name == "triton_fp8")


def _tiled(*args: Any, **kwargs: Any) -> Geometry:
    return Geometry.of(*args, block_q=128, block_kv=128, **kwargs)


@pytest.mark.parametrize(
    ("capability", "says"),
    [
        ((8, 0), "products of e4m3 need compute capability 8.9 or newer, this device has 8.0"),
        ((8, 6), "this device has 8.6"),
        ((8, 9), ""),
        ((9, 0), ""),
        ((10, 0), ""),
        ((12, 0), ""),
    ],
    ids=str,
)
def test_where_it_runs(capability: tuple[int, int], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "capability_of", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = host.missing(CUDA, True)
    assert says in found and bool(found) == bool(says)
    assert "runs where it is asked for" in host.missing(CUDA, False) or says


def test_amd_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert host.missing(CUDA, True) == "it needs an NVIDIA device: e4m3 is another format on some of AMD's"


def test_without_a_card_it_is_refused_by_name_and_by_family() -> None:
    with pytest.raises(
        SparsekitError, match=r"impl='triton_fp8' cannot run on cpu: it is not a CUDA device \(TRITON_I"
    ):
        choose("cpu", "triton_fp8")
    says = r"^impl='fp8' cannot run on cpu: hopper_fp8: it is not a CUDA device; triton_fp8: it is not a CUDA device \("
    with pytest.raises(SparsekitError, match=says):
        choose("cpu", "fp8")


def test_a_family_is_the_first_that_runs_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    table: Any = sys.modules["sparsekit.kernels.choose"]  # whose name a function has

    def here(**missing: str) -> None:
        reasons = {row.name: missing.get(row.name, "") for row in TABLE}
        rows = (row._replace(missing=lambda *_, why=reasons[row.name]: why) for row in TABLE)
        monkeypatch.setattr(table, "TABLE", tuple(rows))

    assert FAMILIES["fp8"] == ("hopper_fp8", "triton_fp8") == tuple(row.name for row in TABLE[-2:])
    q = torch.empty(1, 4, 256, 64, dtype=torch.bfloat16)
    call = (q, Keys(q, q), dense_plan(_tiled(256)), Softmax(0.1), False, None)
    here()
    assert chosen("cpu", "fp8") == ("hopper_fp8", "asked for")
    assert choose_row(torch.device("cpu"), "fp8", call)[1] == (
        "triton_fp8",
        "asked for; hopper_fp8 does not cover it: head size 64: 128",
    )
    here(hopper_fp8="it is an Ada")
    assert chosen("cpu", "fp8") == ("triton_fp8", "asked for; hopper_fp8: it is an Ada")
    small = (q[..., :16], Keys(q[..., :16], q[..., :16]), *call[2:])
    says = r"impl='fp8' cannot run on cpu: hopper_fp8: it is an Ada; triton_fp8 does not cover it: head size 16: one of"
    with pytest.raises(SparsekitError, match=says):
        choose_row(torch.device("cpu"), "fp8", small)


def test_what_it_covers() -> None:
    def against(q: Tensor, plan: BlockPlan, scale: float = 0.1) -> str:
        return "; ".join(host.covers(q, Keys(q, q), plan, Softmax(scale), True))

    q = torch.empty(1, 4, 256, 128, dtype=torch.bfloat16)
    for geometry in (_tiled(256), Geometry.of(256, block_q=64, block_kv=64), Geometry.of(256, block_q=16, block_kv=32)):
        for plan in (dense_plan(geometry), rule_plan("triangle", geometry), random_plan(geometry, 4)):
            assert against(q, plan) == against(q.half()[..., :64], plan) == ""
    assert against(q, dense_plan(_tiled(256)), 1e-8) == ""
    assert against(q, dense_plan(_tiled(256)), 1e-9) == "scale 1e-09: 1e-08 or more"
    assert "dtype float32: float16 or bfloat16" in against(q.float(), dense_plan(_tiled(256)))
    assert "head size 96: one of 64, 128, 256" in against(q[..., :96], dense_plan(_tiled(256)))
    assert "tiles of 256 keys: one of 32, 64, 128" in against(q, dense_plan(Geometry.of(256, block_kv=256)))
    assert "tiles of 16 keys" in against(q, dense_plan(Geometry.of(256, block_q=16, block_kv=16)))
    loose = replace(random_plan(_tiled(256), 4), on_grid=False)
    assert "128 keys, counted from the first, share a scale" in against(q, loose)
    assert "single key columns" in against(q, with_columns(rule_plan("triangle", _tiled(256)), 40))
    assert "every 64th query alone" in against(q[:, :, :4], dense_plan(_tiled(256).anchors(64)))
    assert "corrected by every 64th row" in against(q, rule_plan("triangle", _tiled(256)).corrected(64))
    small = tensors(Geometry.of(1024), torch.float32, dim=64)
    ranked = S2O().select(small[0], small[1], Geometry.of(1024), Softmax(0.1))
    assert "ranked keys with an early stop" in against(q, ranked)


def test_a_call_without_keys_has_a_block() -> None:
    """The copy engine takes no descriptor of 0 rows, nor one of no memory."""
    assert host.key_blocks(_tiled(100, batch=2, kv_start=(100, 100))) == 1
    assert host.key_blocks(_tiled(100, batch=2, kv_end=(0, 100))) == 1
    assert host.key_blocks(_tiled(129)) == 2


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    interpret("attend/interpreted_triton_fp8.py")


# ---- it compiles, without a card

CARDS = ((8, 9), (9, 0), (10, 0), (12, 0))
COMPILED = [
    *((card, kind, 128, "") for card in CARDS for kind in ("dense", "triangle")),
    *((card, "triangle", dim, "cap sinks lse") for card in CARDS for dim in (64, 256)),
    *((card, "tiles of 64", 128, "lse") for card in ((8, 9), (9, 0))),
]
# On the newest two `quantise` of head size 256 spills up to 184 bytes a thread, stores and loads.
SIZES = {(8, 9): 256, (10, 0): 128, (12, 0): 128}
BEFORE = [(card, name, dim, page) for card, dim in SIZES.items() for name, page in (("in_common", 0), ("quantise", 64))]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of them takes; one child process compiles them all."""
    return compiled("attend/compile_triton_fp8.py", tmp_path_factory.mktemp("triton"), json.dumps([*COMPILED, *BEFORE]))


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiles(case: tuple[tuple[int, int], str, int, str], offline: list[dict[str, Any]]) -> None:
    made = offline[COMPILED.index(case)]
    assert made["shared"] <= LIMITS["NVIDIA sm_{}{}".format(*case[0])]
    assert made["products"] == made["of e4m3"] > 0
    assert set(made["sums"]) == {"nothing"}  # a tile's sum is added to the others' in float32
    assert made["spilled"] <= made["spilled in 16 bits"]
    assert made["serialised"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", BEFORE, ids=str)
def test_what_runs_before_compiles(case: tuple[tuple[int, int], str, int, int], offline: list[dict[str, Any]]) -> None:
    made = offline[len(COMPILED) + BEFORE.index(case)]
    assert made["shared"] <= LIMITS["NVIDIA sm_{}{}".format(*case[0])]
    assert made["spilled"] == 0


# ---- on a card

PLANS: dict[str, Callable[[], BlockPlan]] = {
    "dense": lambda: dense_plan(_tiled(1000)),
    "dense, short": lambda: dense_plan(_tiled(77)),
    "dense, long": lambda: dense_plan(_tiled(3000)),
    "dense, padded": lambda: dense_plan(_tiled(700, batch=3, kv_start=(0, 37, 600))),
    "dense, ragged": lambda: dense_plan(_tiled(700, batch=3, kv_end=(700, 37, 250))),
    "dense, without keys": lambda: dense_plan(_tiled(100, batch=2, kv_end=(0, 0))),
    "dense, chunk": lambda: dense_plan(_tiled(300, 1000, q_offset=450)),
    "triangle": lambda: rule_plan("triangle", _tiled(2000), 150),
    "triangle, padded": lambda: rule_plan("triangle", _tiled(900, batch=2, kv_start=(0, 137)), 150),
    "tiles a head": lambda: random_plan(_tiled(2000), 4),
    "tiles of 64": lambda: random_plan(Geometry.of(2000, block_q=64, block_kv=64), 4),
    "tiles a key head, padded": lambda: random_plan(_tiled(700, batch=2, kv_start=(0, 40)), 2),
}


@pytest.fixture
def card() -> None:
    if why := ROW.missing(CUDA, True):
        pytest.skip(why)


def _inputs(geometry: Geometry, dtype: torch.dtype = torch.bfloat16, dim: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tensors(geometry, dtype, dim=dim)
    return q.cuda(), k.cuda(), v.cuda()


_agrees = partial(agrees, "triton_fp8")


@pytest.mark.gpu
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", PLANS)
def test_card(name: str, dim: int) -> None:
    plan = PLANS[name]()
    _agrees(plan, _inputs(plan.geometry, dim=dim))


@pytest.mark.gpu
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sink_logits": (0.5, -1.0, 2.0, 0.0)}, {"scale": 0.03}])
def test_card_softmax(options: dict[str, Any]) -> None:
    options = {key: torch.tensor(x, device="cuda") if isinstance(x, tuple) else x for key, x in options.items()}
    for plan in (dense_plan(_tiled(1000)), rule_plan("triangle", _tiled(1000), 150)):
        _agrees(plan, _inputs(plan.geometry, torch.float16), **options)


@pytest.mark.gpu
@pytest.mark.usefixtures("card")
def test_card_pages() -> None:
    for plan in (dense_plan(_tiled(300, batch=2, kv_end=(300, 130))), rule_plan("triangle", _tiled(900), 150)):
        q, k, v = _inputs(plan.geometry)
        _agrees(plan, (q, k, v), in_pages(k, v, plan.geometry, 48))


@pytest.mark.gpu
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("options", [{}, {"sink_logits": (0.5, -1.0, 2.0, 12.0)}, {"softcap": 5.0}], ids=str)
def test_card_keeps_the_mean_of_the_values(options: dict[str, Any]) -> None:
    """Whatever tensor cores keep of a sum, of many keys and of rows that are cut over them."""
    options = {key: torch.tensor(x, device="cuda") if isinstance(x, tuple) else x for key, x in options.items()}
    for geometry in (_tiled(128, 32768), _tiled(1000)):
        keeps_the_mean("triton_fp8", geometry, _inputs(geometry), **options)


@pytest.mark.gpu
@pytest.mark.usefixtures("card")
def test_card_keeps_the_mean_of_some_values() -> None:
    """What half of the values have in common and the other half have not: each tile's sum is added in float32."""
    keeps_most_of_a_part_of_the_mean("triton_fp8", _inputs(_tiled(128, 32768)))


@pytest.mark.gpu
@pytest.mark.usefixtures("card")
def test_card_what_is_not_finite() -> None:
    leaves_what_is_not_finite_where_it_is("triton_fp8", _inputs(_tiled(1000)))


@pytest.mark.gpu
@pytest.mark.usefixtures("card")
def test_card_as_far_as_the_form_for_hopper() -> None:
    hopper = next(row for row in TABLE if row.name == "hopper_fp8")
    if why := hopper.missing(CUDA, True):
        pytest.skip(why)
    for plan in (dense_plan(_tiled(1000)), rule_plan("triangle", _tiled(2000), 150)):
        q, k, v = _inputs(plan.geometry)
        wide: Any = attend(q.double(), k.double(), v.double(), plan.to("cuda"), impl="reference")
        outs: Any = [attend(q, k, v, plan.to("cuda"), impl=impl) for impl in ("triton_fp8", "hopper_fp8")]
        ours, theirs = (float((out.double() - wide).norm()) for out in outs)
        assert ours <= 1.05 * theirs
