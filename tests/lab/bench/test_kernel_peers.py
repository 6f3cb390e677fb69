"""Peers of bench kernel: fakes of their packages, on disk as an installer leaves them, compute what they are told."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekit.errors import SparsekitError
from sparsekit.lab.bench import kernel, kernel_peers
from sparsekit.lab.bench.kernel_cases import PLANS, WINDOW, Shape, inputs, plan_of
from sparsekit.lab.bench.kernel_peers import PEERS, Peer, Prepared, check, prepare

SHAPE = Shape(1024, 4, 2, 16, torch.float32, "cpu")

FAKES = {
    "recorded.py": """
import torch

CALLS = []
SHIFT = [0.0]

def attention(q, k, v, keep):  # by token: (B, N, heads, D)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
    return out.transpose(1, 2) + SHIFT[0]

def positions(q):
    at = torch.arange(q.shape[1])
    return at[:, None], at[None, :]
""",
    "fa3_fwd_interface.py": """
from recorded import CALLS, attention, positions

def flash_attn_func(q, k, v, causal=False):
    CALLS.append((q, k, v))
    i, j = positions(q)
    assert causal
    return attention(q, k, v, j <= i)
""",
    "fa3_fwd-0.0.3.dist-info/METADATA": "Metadata-Version: 2.1\nName: fa3_fwd\nVersion: 0.0.3\n",
    "cutlass/__init__.py": "Int32 = int\n",
    "cutlass/cute.py": "def jit(function):\n    return function\n",
    "flash_attn/cute/utils.py": "def scalar_to_ssa(number, dtype):\n    return dtype(number)\n",
    "flash_attn/cute/block_sparsity.py": """
from typing import Any, NamedTuple

class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Any
    mask_block_idx: Any
    full_block_cnt: Any = None
    full_block_idx: Any = None
    block_size: Any = None
""",
    "flash_attn/cute/__init__.py": """
import torch
from recorded import CALLS, attention, positions

def listed(counts, columns, rows):  # (heads, rows, rows)
    tiles = torch.zeros(columns.shape[1], rows, rows, dtype=torch.bool)
    for head in range(columns.shape[1]):
        for row in range(rows):
            tiles[head, row, columns[0, head, row, : counts[0, head, row]].long()] = True
    return tiles

def flash_attn_func(q, k, v, causal=False, window_size=(None, None), mask_mod=None, block_sparse_tensors=None):
    CALLS.append((causal, window_size, mask_mod, block_sparse_tensors))
    i, j = positions(q)
    keep = j <= i if causal else torch.ones(q.shape[1], q.shape[1], dtype=torch.bool)
    if window_size[0] is not None:
        keep = keep & (i - j <= window_size[0])
    if block_sparse_tensors is not None:
        lists, size = block_sparse_tensors, block_sparse_tensors.block_size[0]
        def grown(tiles):
            return tiles.repeat_interleave(size, 1).repeat_interleave(size, 2)
        partial = grown(listed(lists.mask_block_cnt, lists.mask_block_idx, q.shape[1] // size))
        whole = grown(listed(lists.full_block_cnt, lists.full_block_idx, q.shape[1] // size))
        assert not (partial & whole).any()
        keep = whole | partial & mask_mod(0, 0, i, j, None, None)
    return attention(q, k, v, keep), None
""",
    "flash_attn_4-4.0.0b36.dist-info/METADATA": "Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0b36\n",
    "flashinfer.py": """
import torch
from recorded import CALLS, attention, positions

def single_prefill_with_kv_cache(q, k, v, causal=False, window_left=-1):
    CALLS.append(window_left)
    i, j = positions(q[None])
    assert causal
    return attention(q[None], k[None], v[None], (j <= i) & ((i - j <= window_left) | (window_left < 0)))[0]

class BlockSparseAttentionWrapper:
    def __init__(self, workspace):
        assert workspace.dtype == torch.uint8

    def plan(self, ends, columns, tokens, keys, rows, wide, heads, key_heads, dim, causal, **dtypes):
        assert causal and tokens == keys and set(dtypes.values()) == {torch.float32}
        CALLS.append((rows, wide, heads, key_heads, dim))
        tiles = torch.zeros(tokens // rows, keys // wide, dtype=torch.bool)
        for row in range(tokens // rows):
            tiles[row, columns[ends[row] : ends[row + 1]].long()] = True
        self.tiles = tiles.repeat_interleave(rows, 0).repeat_interleave(wide, 1)

    def run(self, q, k, v):
        i, j = positions(q[None])
        return attention(q[None], k[None], v[None], self.tiles & (j <= i))[0]
""",
    "flashinfer_python-0.7.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: flashinfer-python\nVersion: 0.7.2\n",
}
MODULES = ("recorded", "fa3_fwd_interface", "cutlass", "flash_attn", "flashinfer")


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The packages installed; gives the module that holds their calls."""

    def forget() -> None:
        for name in list(sys.modules):
            if name.split(".")[0] in MODULES or name.endswith(".kernel_fa4"):
                del sys.modules[name]

    for name, text in FAKES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    forget()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("recorded")
    forget()


@pytest.mark.parametrize(
    ("peer", "package"), [("fa3", "fa3-fwd"), ("fa4", "flash-attn-4"), ("flashinfer", "flashinfer-python")]
)
def test_what_is_not_installed_is_named_with_what_installs_it(
    peer: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(kernel_peers.metadata, "version", nothing)
    missing = f"{package} is not installed: pip install {package}"
    assert check(peer, PLANS, SHAPE) == [{"case": "correctness", "impl": peer, "missing": missing}]


@pytest.mark.parametrize(
    ("peer", "version", "cases"),
    [
        ("fa3", "fa3-fwd 0.0.3", ["dense"]),
        ("fa4", "flash-attn-4 4.0.0b36", ["dense", "window", "triangle", "random"]),
        ("flashinfer", "flashinfer-python 0.7.2", ["dense", "window", "triangle"]),
    ],
)
@pytest.mark.usefixtures("recorded")
def test_a_peer_is_right_on_each_case_that_it_has(peer: str, version: str, cases: list[str]) -> None:
    rows = check(peer, PLANS, SHAPE)
    assert [row["of"] for row in rows] == cases
    for row in rows:
        assert row["version"] == version and row["dtype"] == "float32"
        assert "missing" not in row, row
        assert row["error"] <= 1.5 * row["sdpa_error"]
    assert [row["of"] for row in check(peer, ["columns", "dense"], SHAPE)] == ["dense"]


def test_fa3_gets_the_tensors_as_they_lie(recorded: Any) -> None:
    q, k, v = inputs(SHAPE)
    prepare("fa3", "dense", SHAPE, q, k, v)
    given = recorded.CALLS[-1]
    for tensor, mine in zip(given, (q, k, v), strict=True):
        assert tensor.is_contiguous() and tensor.data_ptr() == mine.data_ptr()
    assert [tuple(tensor.shape) for tensor in given] == [(1, 1024, 4, 16), (1, 1024, 2, 16), (1, 1024, 2, 16)]


def test_fa4_gets_a_window_or_lists_of_whole_and_of_cut_tiles(recorded: Any) -> None:
    q, k, v = inputs(SHAPE)
    assert prepare("fa4", "window", SHAPE, q, k, v).plan is None
    assert recorded.CALLS[-1] == (True, (WINDOW - 1, 0), None, None)
    made = prepare("fa4", "random", SHAPE, q, k, v)
    causal, _, mask, lists = recorded.CALLS[-1]
    assert not causal and mask is not None and lists.block_size == (128, 128)
    assert lists.mask_block_cnt.shape == (1, 4, 8)  # other tiles for each head, the diagonal's among those that are cut
    assert int(lists.mask_block_cnt.sum() + lists.full_block_cnt.sum()) == made.plan.visited_tiles()  # type: ignore[union-attr]


def test_flashinfer_walks_whole_tiles_of_triangle_and_says_so(recorded: Any) -> None:
    q, k, v = inputs(SHAPE)
    prepare("flashinfer", "window", SHAPE, q, k, v)
    prepare("flashinfer", "dense", SHAPE, q, k, v)
    assert recorded.CALLS == [WINDOW - 1, -1]
    made = prepare("flashinfer", "triangle", SHAPE, q, k, v)
    assert recorded.CALLS[-1] == (128, 128, 4, 2, 16)
    assert made.extra["mask"] == "whole tiles" and made.extra["plan_ms"] >= 0
    exact = plan_of("triangle", SHAPE, (128, 128))
    assert made.plan is not None and made.plan.kept_pairs() > exact.kept_pairs()
    assert made.plan.visited_tiles() == exact.visited_tiles()


def test_wrong_numbers_and_failures_are_said_and_not_timed(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "SHIFT", [0.01])
    (row,) = check("fa3", ["dense"], SHAPE)
    assert row["missing"].startswith("wrong: error ") and row["error"] > row["sdpa_error"]

    def broken(case: str, shape: Shape, *tensors: Any) -> Prepared:
        raise ImportError("libcudart.so.13: cannot open\nmore")

    monkeypatch.setitem(PEERS, "fa3", Peer(("dense",), broken, "fa3-fwd"))
    (row,) = check("fa3", ["dense"], SHAPE)
    assert row["missing"] == "fa3-fwd 0.0.3: ImportError: libcudart.so.13: cannot open"
    monkeypatch.setitem(PEERS, "fa3", Peer(("dense",), lambda *given: Prepared(lambda: torch.zeros(3)), "fa3-fwd"))
    with pytest.raises(SparsekitError, match=r"it returned \(3,\), not \(1, 4, 1024, 16\)"):
        prepare("fa3", "dense", SHAPE, *inputs(SHAPE))


def test_flexattentions_dense_form_has_a_longest_length() -> None:
    assert PEERS["flex"].runs("dense", 32768) and not PEERS["flex"].runs("dense", 65536)
    assert PEERS["flex"].runs("triangle", 131072) and not PEERS["flex"].runs("random", 4096)


def test_a_case_is_timed_with_the_peers_that_were_right(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_memory", lambda *given: 1.0)
    sound = {("fa3", "dense"), ("fa4", "triangle"), ("cudnn", "dense")}
    dense, triangle = kernel._rows(SHAPE, ["dense", "triangle"], ["torch"], sound, 1)
    assert [row["impl"] for row in dense] == ["fa3", "torch", "cudnn"]
    assert dense[0]["version"] == "fa3-fwd 0.0.3" and dense[0]["ms"] > 0 and dense[0]["tflops"] is not None
    assert "ms" not in dense[2] and dense[2]["missing"].startswith("torch ")  # there is no cuDNN on a CPU
    assert [row["impl"] for row in triangle] == ["fa4", "torch"]


def test_rows_stand_beside_the_best_dense_kernel_of_their_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "place", lambda device: {})

    def row(case: str, impl: str, ms: float, tokens: int = 4096) -> dict[str, Any]:
        return {"case": case, "impl": impl, "tokens": tokens, "ms": ms}

    missing = {"case": "dense", "impl": "flash", "tokens": 4096, "missing": "why"}
    with kernel._Record(None, None) as record:
        assert isinstance(record, kernel._Record)
        record.add_case([row("dense", "cudnn", 4.0), row("dense", "fa3", 3.0), row("dense", "hopper", 3.2), missing])
        record.add_case([row("triangle", "hopper", 0.1)])
        record.add_case([row("triangle", "hopper", 0.1, tokens=8192)])
        record.add(row("pages", "hopper", 0.1))  # a chunk: the dense kernels ran on whole prompts
    ratios = [(row.get("times_cudnn_dense"), row.get("of_best_dense")) for row in record.rows]
    assert ratios == [(1.0, 0.75), (1.333, 1.0), (1.25, 0.938), (None, None), (40.0, 30.0), (None, None), (None, None)]


def test_the_bench_times_no_peer_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def checked(peer: str, cases: list[str], shape: Shape) -> list[dict[str, Any]]:
        assert (cases, shape.tokens) == (["dense", "window", "triangle"], 4096)
        rows: list[dict[str, Any]] = [{"case": "correctness", "impl": peer, "of": case} for case in cases]
        return rows if peer == "fa4" else [{**rows[0], "missing": "wrong"}, *rows[1:2]]

    def timed(shape: Shape, cases: list[str], impls: Any, peers: Any, repeat_ms: int) -> Iterator[Any]:
        asked.append((shape.tokens, cases, set(peers)))
        yield from ()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(kernel, "check_device", lambda device: None)
    monkeypatch.setattr(kernel, "place", lambda device: {})
    monkeypatch.setattr(kernel, "check", checked)
    monkeypatch.setattr(kernel, "_rows", timed)
    rows = kernel.bench_kernel(
        lengths=(4096, 8192, 16384), impls=(), cases=("triangle", "dense", "window"), peers=("fa4", "fa3")
    )
    assert [row.get("missing") for row in rows] == [None, None, None, "wrong", None]
    sound = {("fa4", "dense"), ("fa4", "window"), ("fa4", "triangle"), ("fa3", "window")}
    assert asked == [
        (4096, ["dense", "triangle"], sound),
        (8192, ["dense", "window", "triangle"], sound),
        (16384, ["dense", "window", "triangle"], sound),
        (1 << 20, ["triangle"], set()),
    ]


def test_the_bench_refuses_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 too: it would stop at the error that 16 bits allow."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel, "check_device", lambda device: None)
    with pytest.raises(SparsekitError, match=r"impls='hopper_fp8': out of triton, hopper\."):
        kernel.bench_kernel(impls=("hopper_fp8",))
    with pytest.raises(SparsekitError, match=r"cases='dens': out of dense, .* Did you mean 'dense'\?"):
        kernel.bench_kernel(cases=("dens",))
