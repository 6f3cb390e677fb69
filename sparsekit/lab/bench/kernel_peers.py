"""What others run on the shapes and masks of `sparsekit bench kernel`: their kernels, where they are installed.

None is needed. A peer is a row of `PEERS`: the package that it comes with, the cases that it has, and how it is called.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError
from sparsekit.lab.bench.kernel_cases import LAST, SINK, WINDOW, Shape, errors, inputs, plan_of
from sparsekit.lab.bench.timing import synchronize
from sparsekit.plan import BlockPlan, plan_from_block_mask
from sparsekit.plan.flex import to_flex

__all__ = ["CHECK_TOKENS", "PEERS", "TILE", "Peer", "Prepared", "check", "prepare"]

T = TypeVar("T")

TILE = (128, 128)  # of block lists that are handed to others
CHECK_TOKENS = 4096
# FlexAttention's mask is evaluated pair by pair, and its dense form runs at half the rate: longer ones are left out.
FLEX_DENSE_TOKENS = 32768
WORKSPACE_BYTES = 128 << 20  # FlashInfer's advice


@dataclass(frozen=True)
class Prepared:
    """A peer's call on one input, ready to be timed.

    Attributes:
        call: gives out (1, H, N, D).
        extra: what its row says besides.
        plan: the tiles that it walks, which a rate counts. None: not known, and the pairs are those of the case.
    """

    call: Callable[[], Tensor]
    extra: dict[str, Any] = field(default_factory=dict)
    plan: BlockPlan | None = None


@dataclass(frozen=True)
class Peer:
    """Somebody else's kernel.

    Attributes:
        cases: those that it can run, out of `kernel_cases.PLANS`.
        prepare: (case, shape, q, k, v) to its call; copies and lists are made here, outside the clock.
        package: its name on the Python index.
        longest: the most tokens of a case, where there is a limit.
    """

    cases: tuple[str, ...]
    prepare: Callable[[str, Shape, Tensor, Tensor, Tensor], Prepared]
    package: str = "torch"
    longest: dict[str, int] = field(default_factory=dict)

    def version(self) -> str:
        """Package and version.

        Raises:
            SparsekitError: it is not installed.
        """
        try:
            return f"{self.package} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:
            raise SparsekitError(f"{self.package} is not installed: pip install {self.package}") from None

    def runs(self, case: str, tokens: int) -> bool:
        return case in self.cases and tokens <= self.longest.get(case, tokens)


def prepare(name: str, case: str, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
    """A peer's call, made once: what it compiles is compiled.

    Raises:
        SparsekitError: it is not installed, or does not run here; one line says why.
    """
    version = PEERS[name].version()
    try:
        made = PEERS[name].prepare(case, shape, q, k, v)
        got = made.call()
        if got.shape != q.shape:
            raise SparsekitError(f"it returned {tuple(got.shape)}, not {tuple(q.shape)}")
        synchronize(q.device)
    except Exception as error:  # theirs may fail in any way
        line = (str(error).strip().splitlines() or [""])[0]
        raise SparsekitError(f"{version}: {type(error).__name__}: {line}") from error
    return Prepared(made.call, {"version": version, **made.extra}, made.plan)


def check(name: str, cases: Sequence[str], shape: Shape) -> list[dict[str, Any]]:
    """Rows of `case` correctness: a peer on each of the cases that it has, `of` says which, against float32.

    A row has `error` and `sdpa_error`, that of PyTorch's SDPA under the same mask. `missing` says why the peer is not
    to be timed: it is not installed (one row, of no case), it fails, or its numbers are wrong.
    """
    try:
        version = PEERS[name].version()
    except SparsekitError as error:
        return [{"case": "correctness", "impl": name, "missing": str(error)}]
    rows: list[dict[str, Any]] = []
    q, k, v = inputs(shape)
    for case in (case for case in cases if PEERS[name].runs(case, shape.tokens)):
        row: dict[str, Any] = {"case": "correctness", "impl": name, "of": case, "version": version}
        row |= {"dim": shape.dim, "dtype": str(shape.dtype).removeprefix("torch.")}
        try:
            made = prepare(name, case, shape, q, k, v)
            plan = plan_of(case, shape, TILE) if made.plan is None else made.plan
            row["error"], row["sdpa_error"] = errors(q, k, v, plan, made.call())
            if not row["error"] <= 1.5 * row["sdpa_error"]:
                row["missing"] = f"wrong: error {row['error']:.1e}, SDPA's own {row['sdpa_error']:.1e}"
        except SparsekitError as error:
            row["missing"] = str(error)
        rows.append(row)
    return rows


# ---- with torch


def _cudnn(case: str, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
    from torch.nn.attention import SDPBackend

    return Prepared(_sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v), {"cudnn": torch.backends.cudnn.version()})


def _flash(case: str, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
    from torch.nn.attention import SDPBackend

    return Prepared(_sdpa(SDPBackend.FLASH_ATTENTION, q, k, v))


def _sdpa(backend: Any, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    from torch.nn.attention import sdpa_kernel

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def _flex(case: str, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    last = shape.tokens - LAST

    def dense(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < WINDOW)

    def triangle(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((j < SINK) | (i - j < WINDOW) | (i >= last))

    def build() -> BlockMask:
        return create_block_mask(rule, None, None, shape.tokens, shape.tokens, device=q.device.type, _compile=True)

    torch._dynamo.reset()
    rule = {"dense": dense, "window": window, "triangle": triangle}[case]
    build()  # compiles
    mask, ms = _clocked(build, q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return Prepared(lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True), {"plan_ms": ms})


def _clocked(build: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What `build` gives, and its milliseconds."""
    synchronize(device)
    start = time.perf_counter()
    made = build()
    synchronize(device)
    return made, round((time.perf_counter() - start) * 1e3, 3)


# ---- with packages of their own


def _fa3(case: str, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
    from fa3_fwd_interface import flash_attn_func

    by_token = tuple(x.transpose(1, 2) for x in (q, k, v))
    return Prepared(lambda: flash_attn_func(*by_token, causal=True).transpose(1, 2))


def _fa4(case: str, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
    """Its own block lists for Triangle and random tiles; a function cuts those that are not whole."""
    from flash_attn.cute import flash_attn_func

    options: dict[str, Any] = {"causal": True}
    plan = None
    if case == "window":
        options["window_size"] = (WINDOW - 1, 0)
    elif case != "dense":
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        from sparsekit.lab.bench.kernel_fa4 import causal, triangle

        plan = plan_of(case, shape, TILE)
        lists = to_flex(plan)
        options = {
            "mask_mod": causal if case == "random" else triangle(shape.tokens),
            "block_sparse_tensors": BlockSparseTensorsTorch(
                mask_block_cnt=lists.kv_num_blocks,
                mask_block_idx=lists.kv_indices,
                full_block_cnt=lists.full_kv_num_blocks,
                full_block_idx=lists.full_kv_indices,
                block_size=TILE,
            ),
        }
    by_token = tuple(x.transpose(1, 2) for x in (q, k, v))
    return Prepared(lambda: flash_attn_func(*by_token, **options)[0].transpose(1, 2), {}, plan)


def _flashinfer(case: str, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Prepared:
    """Its block lists are of whole tiles and the same for all heads: more pairs than Triangle's, and `mask` says so."""
    import flashinfer

    by_token = tuple(x[0].transpose(0, 1) for x in (q, k, v))
    if case != "triangle":
        left = WINDOW - 1 if case == "window" else -1
        prefill = flashinfer.single_prefill_with_kv_cache
        return Prepared(lambda: prefill(*by_token, causal=True, window_left=left).transpose(0, 1)[None])
    exact = plan_of(case, shape, TILE)
    tiles = to_flex(exact).to_dense().bool()
    ends = torch.nn.functional.pad(tiles[0, 0].sum(-1).cumsum(0), (1, 0)).int()
    columns = tiles[0, 0].nonzero()[:, 1].int()
    sparse = flashinfer.BlockSparseAttentionWrapper(torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device))

    def plan() -> None:
        sparse.plan(
            ends, columns, shape.tokens, shape.tokens, *TILE, shape.heads, shape.key_heads, shape.dim, causal=True,
            q_data_type=shape.dtype, kv_data_type=shape.dtype, o_data_type=shape.dtype,
        )  # fmt: skip

    plan()  # compiles
    _, ms = _clocked(plan, q.device)
    return Prepared(
        lambda: sparse.run(*by_token).transpose(0, 1)[None],
        {"plan_ms": ms, "mask": "whole tiles"},
        plan_from_block_mask(tiles, exact.geometry),
    )


PEERS: dict[str, Peer] = {
    "cudnn": Peer(("dense",), _cudnn),
    "flash": Peer(("dense",), _flash),
    "flex": Peer(("dense", "window", "triangle"), _flex, longest={"dense": FLEX_DENSE_TOKENS}),
    "fa3": Peer(("dense",), _fa3, "fa3-fwd"),  # its wheel is built without windows
    "fa4": Peer(("dense", "window", "triangle", "random"), _fa4, "flash-attn-4"),
    "flashinfer": Peer(("dense", "window", "triangle"), _flashinfer, "flashinfer-python"),
}
