"""The kernel, timed: correctness first, then medians and spreads beside the best alternatives, in one run on one GPU.

    sparsekit bench kernel -o docs/results/kernel.jsonl

Peers: PyTorch's SDPA on cuDNN and on FlashAttention-2, and compiled FlexAttention on the same static masks, whose mask
is built outside the clock and timed apart, compilation left out. A rate counts what is visited: `2 N^2 D H` for dense,
`4 BM BN D` a tile.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError, nearest
from sparsekit.kernels import attend, choose_call, choose_device, preferred_tile
from sparsekit.lab.bench.kernel_pages import pages_rows
from sparsekit.lab.bench.kernel_peers import LAST, SINK, WINDOW, Shape, peer_call
from sparsekit.lab.bench.timing import Record, rounds, spread
from sparsekit.lab.options import Device, Dtype, Lengths, Rows, device_of, numbers_of, words_of
from sparsekit.lab.provenance import place
from sparsekit.models import check_device
from sparsekit.plan import CAUSAL, BlockPlan, TokenRule, dense_plan, pack, plan_from_rule, stack_heads, unpack

__all__ = ["CASES", "PEERS", "bench_kernel", "command"]

PLANS = ("dense", "triangle", "mixed", "mixed-groups", "random", "columns")
CASES = (*PLANS, "pages", "launch")
PEERS = ("cudnn", "flash", "flex")
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
RANDOM_DENSITY = 0.1
COLUMNS = 1024
DENSE_EVERY = 4  # of the mixed cases: one head, or all heads of one key head, of so many is dense, the others Triangle


@dataclass(frozen=True)
class _Run:
    """Something to time. `flops` counts what a rate is about, where it is known."""

    name: str
    call: Callable[[], Any]
    flops: float | None
    extra: dict[str, Any]


def bench_kernel(
    *,
    lengths: Sequence[int] = LENGTHS,
    heads: int = 32,
    key_heads: int = 8,
    dim: int = 128,
    dtype: str = "bfloat16",
    impls: Sequence[str] | None = None,
    cases: Sequence[str] = CASES,
    peers: Sequence[str] = PEERS,
    million: bool = True,
    repeat_ms: int = 200,
    device: str = "cuda",
    out: Path | str | None = None,
    show: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Time the kernels and their peers on a CUDA device.

    Args:
        lengths: prompt lengths, tokens. `random`, `columns` and the mixed cases run on the longest two, `pages` on the
            longest.
        impls: kernels; default all that run here, out of "triton" and "hopper".
        cases: out of `CASES`. peers: out of `PEERS`.
        million: Triangle at 2^20 tokens too.
        repeat_ms: about so long each row is repeated, in three rounds that alternate with its peers'.
        device: `cuda`, the current one, or `cuda:1`, ...; everything below says "cuda", and runs there.
        out: JSONL file, written row by row.
        show: gets a line for every row.

    Returns:
        One dict a row: case, impl, tokens, ms (median), ms_p20, ms_p80, tflops, times faster than cuDNN's dense, peak
        memory over that of inputs, output and plan, and what it ran on.

    Raises:
        SparsekitError: no CUDA device, an unknown case or peer, or a kernel whose numbers are wrong (nothing is timed).
    """
    if not torch.cuda.is_available():
        raise SparsekitError("bench kernel needs a CUDA device; `sparsekit doctor` says what this machine can run.")
    check_device(device)
    if torch.device(device).type != "cuda":
        raise SparsekitError(f"device {device!r}: bench kernel times CUDA kernels; want cuda, or cuda:1, ...")
    for name, given, allowed in (("cases", cases, CASES), ("peers", peers, PEERS)):
        for value in given:
            if value not in allowed:
                raise SparsekitError(f"{name}={value!r}: out of {', '.join(allowed)}.{nearest(value, allowed)}")
    if not lengths or not cases or min(lengths) < 1:
        raise SparsekitError(f"lengths={list(lengths)}, cases={list(cases)}: at least one of each, of 1 token or more.")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise SparsekitError(f"dtype={dtype!r}: bfloat16 or float16.{nearest(dtype, ('bfloat16', 'float16'))}")
    element = getattr(torch, dtype)
    with torch.cuda.device(torch.device(device)), _Record(out, show) as record:
        impls = _kernels() if impls is None else impls
        for impl in impls:
            record.add(_correctness(impl, heads, key_heads, dim, element))
        for tokens in lengths:
            shape = Shape(tokens, heads, key_heads, dim, element)
            long = tokens in sorted(lengths)[-2:]
            wanted = [case for case in cases if case in PLANS and (long or case in ("dense", "triangle"))]
            for row in _rows(shape, wanted, impls, peers, repeat_ms):
                record.add(row)
        if million and "triangle" in cases:
            for row in _rows(Shape(1 << 20, heads, key_heads, dim, element), ["triangle"], impls, (), repeat_ms):
                record.add(row)
        if "pages" in cases:
            for row in pages_rows(Shape(max(lengths), heads, key_heads, dim, element), impls, repeat_ms):
                record.add(row)
        if "launch" in cases:
            for impl in impls:
                record.add(_launch_cost(impl, heads, key_heads, dim, element))
    return record.rows


def _kernels() -> list[str]:
    names = []
    for impl in ("triton", "hopper"):
        try:
            choose_device("cuda", impl)
        except SparsekitError:
            continue
        names.append(impl)
    return names


class _Record(Record):
    """Rows so far, each beside cuDNN's dense of its length, and shown as it comes."""

    def __init__(self, path: Path | str | None, show: Callable[[str], None] | None) -> None:
        super().__init__(path, place(torch.device("cuda")))
        self.show = show

    def add(self, row: dict[str, Any]) -> None:
        base = next(
            (
                r["ms"]
                for r in self.rows
                if (r["case"], r["impl"], r.get("tokens")) == ("dense", "cudnn", row.get("tokens"))
            ),
            None,
        )
        if base is not None and row.get("ms"):
            row["times_cudnn_dense"] = round(base / row["ms"], 3)
        super().add(row)
        if self.show is not None:
            self.show("  ".join(f"{key}={value}" for key, value in row.items() if value is not None))


# ---- inputs, plans


def _inputs(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q (1, H, N, D), k, v (1, G, N, D) as transformers hands them over: (1, N, heads, D) in memory."""
    g = torch.Generator("cuda").manual_seed(seed)

    def one(count: int) -> Tensor:
        full = (1, shape.tokens, count, shape.dim)
        return torch.randn(full, device="cuda", dtype=shape.dtype, generator=g).transpose(1, 2)

    return one(shape.heads), one(shape.key_heads), one(shape.key_heads)


def _plan(case: str, shape: Shape, tile: tuple[int, int]) -> BlockPlan:
    geometry = Geometry.of(shape.tokens, block_q=tile[0], block_kv=tile[1])
    if case == "dense":
        return dense_plan(geometry)
    if case == "random":
        return _random_plan(geometry, shape.heads)
    triangle = plan_from_rule(TokenRule(SINK, WINDOW, shape.tokens - LAST), geometry, "cuda")
    if case in ("mixed", "mixed-groups"):
        return stack_heads([triangle, dense_plan(geometry).to("cuda")], _dense_heads(case, shape))
    return triangle if case == "triangle" else _with_columns(triangle, shape.heads)


def _dense_heads(case: str, shape: Shape) -> tuple[int, ...]:
    """1 of each dense head, 0 of the others: a quarter of the heads, scattered over key heads or in whole groups."""
    group = 1 if case == "mixed" else shape.heads // shape.key_heads
    return tuple(int(head // group % DENSE_EVERY == 0) for head in range(shape.heads))


def _random_plan(geometry: Geometry, heads: int) -> BlockPlan:
    """Other tiles for every head: a tenth of the causal tiles of 128 keys, the diagonal's included."""
    rows, parts = geometry.rows, 128 // min(geometry.block_kv, 128)
    g = torch.Generator("cuda").manual_seed(0)
    score = torch.rand(heads, rows, rows, device="cuda", generator=g)
    at = torch.arange(rows, device="cuda")
    score.masked_fill_(at > at[:, None], -1).diagonal(dim1=1, dim2=2).fill_(2)
    keep = ((at + 1) * RANDOM_DENSITY).long().clamp(min=1)
    rank = score.argsort(-1, descending=True).argsort(-1)
    mask = (rank < keep[None, :, None]).repeat_interleave(parts, -1)
    column = torch.arange(mask.shape[-1], device="cuda") * geometry.block_kv
    start = at[:, None] * geometry.block_q
    flags = (column + geometry.block_kv - 1 > start) * CAUSAL
    counts = mask.sum(-1).flatten()
    ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    entries = pack(column, flags).int().expand_as(mask)[mask]
    order = torch.argsort(counts.view(heads, rows).sum(0), descending=True, stable=True).int()
    return BlockPlan(geometry, heads=heads, row_ptr=ptr, entries=entries, order=order, on_grid=True)


def _with_columns(plan: BlockPlan, heads: int) -> BlockPlan:
    """A plan shared by all heads, and 1024 columns a head; bits off where a tile holds the column, or it is ahead.

    Triangle's listed rows hold the sink tile and the window's tiles.
    """
    g, device = plan.geometry, "cuda"
    assert plan.row_ptr is not None and plan.entries is not None and plan.dense_rows is not None
    assert plan.rule is not None and plan.order is not None
    tokens = torch.stack([torch.randperm(g.kv_len, device=device)[:COLUMNS].sort().values for _ in range(heads)])
    end = (torch.arange(plan.rows, device=device) + 1) * g.block_q
    low = plan.entries.new_full((plan.rows,), g.kv_len, dtype=torch.int64)
    owner = torch.repeat_interleave(torch.arange(plan.rows, device=device), plan.row_ptr.diff().long())
    key = unpack(plan.entries)[0].long()
    low.scatter_reduce_(0, owner, torch.where(key >= SINK, key, g.kv_len), "amin")
    held = (tokens[:, None] < g.block_kv) | (tokens[:, None] >= low[:, None]) | plan.dense_rows[:, None]
    needed = ~held & (tokens[:, None] < end[:, None])
    bits = (needed.unflatten(-1, (-1, 32)).long() << torch.arange(32, device=device)).sum(-1).int()
    counts = plan.row_ptr.diff().repeat(heads)
    return replace(
        plan,
        heads=heads,
        row_ptr=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
        entries=plan.entries.repeat(heads),
        dense_rows=plan.dense_rows.repeat(heads),
        tokens=tokens.int()[None],
        token_bits=bits.flatten(0, 1),
    )


def _flops(plan: BlockPlan, shape: Shape) -> float:
    """Multiplications and additions counted for a rate."""
    if plan.all_dense:
        return 2.0 * shape.tokens**2 * shape.dim * shape.heads
    tile = plan.geometry.block_q * plan.geometry.block_kv * 4.0 * shape.dim
    return plan.visited_tiles() * shape.heads / plan.heads * tile


# ---- correctness


def _correctness(impl: str, heads: int, key_heads: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Every case on 1000 and 4096 tokens against float32, relative to SDPA's own error; an error stops the bench."""
    worst, own = 0.0, 0.0
    for tokens in (1000, 4096):
        shape = Shape(tokens, heads, key_heads, dim, dtype)
        q, k, v = _inputs(shape)
        for case in PLANS:
            if case == "columns" and tokens < COLUMNS:
                continue
            plan = _plan(case, shape, preferred_tile("cuda", impl))
            got = attend(q, k, v, plan, impl=impl)
            assert isinstance(got, Tensor)
            error, plain = _errors(q, k, v, plan, got)
            worst, own = max(worst, error), max(own, plain)
            if not error <= 1.5 * plain:
                raise SparsekitError(
                    f"impl={impl!r}, {case} at {tokens} tokens: error {error:.1e}, SDPA's own {plain:.1e}."
                )
    return {"case": "correctness", "impl": impl, "dim": dim, "dtype": str(dtype)[6:], "error": worst, "sdpa_error": own}


def _errors(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, got: Tensor) -> tuple[float, float]:
    """Relative errors of `got`, and of SDPA in the same dtype under the same mask, against float32."""
    group, head = q.shape[1] // k.shape[1], 0
    mask = plan.to_mask().to(q.device)
    found, plain, norm = 0.0, 0.0, 0.0
    for head in range(0, q.shape[1], max(q.shape[1] // 4, 1)):
        one = mask[0, head * plan.heads // q.shape[1]]
        qh, kh, vh = q[:, head, None], k[:, head // group, None], v[:, head // group, None]
        scores = (qh.float() @ kh.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
        exact = scores.masked_fill(~one, float("-inf")).softmax(-1) @ vh.float()
        low = torch.nn.functional.scaled_dot_product_attention(qh, kh, vh, attn_mask=one)
        found += float((got[:, head, None].float() - exact).square().sum())
        plain += float((low.float() - exact).square().sum())
        norm += float(exact.square().sum())
    return (found / norm) ** 0.5, (plain / norm) ** 0.5


# ---- times


def _rows(
    shape: Shape, cases: Sequence[str], impls: Sequence[str], peers: Sequence[str], repeat_ms: int
) -> Iterator[dict[str, Any]]:
    q, k, v = _inputs(shape)
    for case in cases:
        runs: list[_Run] = []
        for peer in peers:
            run, extra = peer_call(peer, case, shape, q, k, v)
            if run is not None:
                flops = 2.0 * shape.tokens**2 * shape.dim * shape.heads if case == "dense" else None
                runs.append(_Run(peer, run, flops, extra))
        for impl in impls:
            torch.cuda.synchronize()
            start = time.perf_counter()
            plan = _plan(case, shape, preferred_tile("cuda", impl))
            torch.cuda.synchronize()
            extra = {"plan_ms": round((time.perf_counter() - start) * 1e3, 3), "plan_bytes": plan.nbytes}
            ran = choose_call(q, k, v, plan, Softmax(shape.dim**-0.5), impl=impl).impl
            extra["block_kv"] = plan.block_kv
            extra["memory"] = _memory(q, k, v, plan, impl)
            runs.append(_Run(ran, _attend(q, k, v, plan, impl), _flops(plan, shape), extra))
        yield from _timed(case, shape, runs, repeat_ms)
        del runs
    gc.collect()
    torch.cuda.empty_cache()


def _memory(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, impl: str) -> float:
    """Peak memory of `attend` with a schedule made, of what its inputs, output and plan take."""
    attend(q, k, v, plan, impl=impl)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(q, k, v, plan, impl=impl)
    torch.cuda.synchronize()
    needed = 2 * q.nbytes + k.nbytes + v.nbytes + plan.nbytes
    return round((torch.cuda.max_memory_allocated() - before - q.nbytes + needed) / needed, 4)


def _attend(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, impl: str) -> Callable[[], Any]:
    return lambda: attend(q, k, v, plan, impl=impl)


def _timed(case: str, shape: Shape, runs: Sequence[_Run], repeat_ms: int) -> Iterator[dict[str, Any]]:
    """One row a run."""
    for run, all_ms in zip(runs, rounds([run.call for run in runs], torch.device("cuda"), repeat_ms), strict=True):
        yield {**_row(case, run.name, shape, all_ms, run.flops), **run.extra}


def _row(case: str, impl: str, shape: Shape, all_ms: Sequence[float], flops: float | None) -> dict[str, Any]:
    times = spread(all_ms)
    return {
        "case": case,
        "impl": impl,
        "tokens": shape.tokens,
        "heads": shape.heads,
        "key_heads": shape.key_heads,
        "dim": shape.dim,
        "dtype": str(shape.dtype).removeprefix("torch."),
        **times,
        "repeats": len(all_ms),
        "tflops": None if flops is None else round(flops / times["ms"] / 1e9, 1),
    }


def _launch_cost(impl: str, heads: int, key_heads: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Host microseconds of one `attend` with a cached plan, while the device keeps up (256 tokens)."""
    shape = Shape(256, heads, key_heads, dim, dtype)
    q, k, v = _inputs(shape)
    run = _attend(q, k, v, _plan("triangle", replace(shape, tokens=256), preferred_tile("cuda", impl)), impl)
    times = []
    for _ in range(7):
        for _ in range(20):
            run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            run()
        times.append((time.perf_counter() - start) / 100 * 1e6)
        torch.cuda.synchronize()
    times.sort()
    return {
        "case": "launch", "impl": impl, "tokens": 256, "heads": heads, "key_heads": key_heads, "dim": dim,
        "host_us": round(times[3], 1), "host_us_low": round(times[0], 1), "host_us_high": round(times[-1], 1),
    }  # fmt: skip


def command(
    tokens: Lengths = "4096,8192,16384,32768,65536,131072",
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    key_heads: Annotated[int, typer.Option(min=1, help="Key heads.")] = 8,
    dim: Annotated[int, typer.Option(min=1, help="Head size.")] = 128,
    dtype: Dtype = "bfloat16",
    impls: Annotated[str | None, typer.Option(help="triton,hopper; default all that run here.")] = None,
    cases: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(CASES),
    peers: Annotated[str, typer.Option(help="Comma-separated; may be empty.")] = "cudnn,flash,flex",
    million: Annotated[bool, typer.Option(help="Triangle at 2^20 tokens too.")] = True,
    repeat_ms: Annotated[int, typer.Option(min=1, help="Of each row.")] = 200,
    device: Device = "auto",
    output: Rows = None,
) -> None:
    """The CUDA kernels against cuDNN, FlashAttention-2 and FlexAttention; correctness first."""
    bench_kernel(
        lengths=numbers_of(tokens, "--tokens"), heads=heads, key_heads=key_heads, dim=dim, dtype=dtype or "bfloat16",
        impls=None if impls is None else words_of(impls), cases=words_of(cases), peers=words_of(peers), million=million,
        repeat_ms=repeat_ms, device=device_of(device), out=output, show=typer.echo,
    )  # fmt: skip
