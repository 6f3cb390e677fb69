"""The kernel, timed: correctness first, then medians and spreads beside the best alternatives, in one run on one GPU.

    sparsekit bench kernel -o docs/results/kernel.jsonl

Peers: PyTorch's SDPA on cuDNN and on FlashAttention-2, compiled FlexAttention on the same static masks, and where they
are installed FlashAttention-3, FlashAttention-4 and FlashInfer. Masks and lists are made outside the clock; those that
a peer makes itself are timed apart, compilation left out. A rate counts what is visited.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError, nearest
from sparsekit.kernels import attend, choose_call, choose_device, preferred_tile
from sparsekit.lab.bench.kernel_cases import COLUMNS, PLANS, Shape, errors, flops, inputs, plan_of
from sparsekit.lab.bench.kernel_pages import pages_rows
from sparsekit.lab.bench.kernel_peers import CHECK_TOKENS, PEERS, TILE, check, prepare
from sparsekit.lab.bench.timing import Record, rounds, spread, synchronize
from sparsekit.lab.options import Device, Dtype, Lengths, Rows, device_of, numbers_of, words_of
from sparsekit.lab.provenance import place
from sparsekit.models import check_device
from sparsekit.plan import BlockPlan

__all__ = ["CASES", "PEERS", "bench_kernel", "command"]

CASES = (*PLANS, "pages", "launch")
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
KERNELS = ("triton", "hopper")  # they round to 16 bits, and are held to it: no FP8 form is one of them


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
    peers: Sequence[str] = tuple(PEERS),
    million: bool = True,
    repeat_ms: int = 200,
    device: str = "cuda",
    out: Path | str | None = None,
    show: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Time the kernels and their peers on a CUDA device.

    Args:
        lengths: prompt lengths, tokens. `window`, `random`, `columns` and the mixed cases run on the longest two,
            `pages` on the longest.
        impls: kernels, out of `KERNELS`; default all that run here.
        cases: out of `CASES`.
        peers: out of `PEERS`. What is not installed, or wrong, has a row with `missing` and is not timed.
        million: Triangle at 2^20 tokens too.
        repeat_ms: about so long each row is repeated, in three rounds that alternate with its peers'.
        device: `cuda`, the current one, or `cuda:1`, ...; everything below says "cuda", and runs there.
        out: JSONL file, written row by row.
        show: gets a line for every row.

    Returns:
        One dict a row: case, impl, tokens, ms (median), ms_p20, ms_p80, tflops, times faster than cuDNN's dense and
        than the best dense kernel of the run at this length, peak memory over that of inputs, output and plan, and what
        it ran on.

    Raises:
        SparsekitError: no CUDA device, an unknown kernel, case or peer, or a kernel whose numbers are wrong (nothing is
            timed).
    """
    if not torch.cuda.is_available():
        raise SparsekitError("bench kernel needs a CUDA device; `sparsekit doctor` says what this machine can run.")
    check_device(device)
    if torch.device(device).type != "cuda":
        raise SparsekitError(f"device {device!r}: bench kernel times CUDA kernels; want cuda, or cuda:1, ...")
    for name, given, allowed in (("impls", impls or (), KERNELS), ("cases", cases, CASES), ("peers", peers, PEERS)):
        for value in given:
            if value not in allowed:
                raise SparsekitError(f"{name}={value!r}: out of {', '.join(allowed)}.{nearest(value, allowed)}")
    if not lengths or not cases or min(lengths) < 1:
        raise SparsekitError(f"lengths={list(lengths)}, cases={list(cases)}: at least one of each, of 1 token or more.")
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise SparsekitError(f"dtype={dtype!r}: bfloat16 or float16.{nearest(dtype, ('bfloat16', 'float16'))}")
    element = getattr(torch, dtype)
    with torch.cuda.device(torch.device(device)), (record := _Record(out, show)):
        impls = _kernels() if impls is None else impls
        for impl in impls:
            record.add(_correctness(impl, heads, key_heads, dim, element))
        plans = [case for case in PLANS if case in cases]
        sound: set[tuple[str, str]] = set()
        for peer in peers:
            for row in check(peer, plans, Shape(CHECK_TOKENS, heads, key_heads, dim, element)):
                record.add(row)
                if "missing" not in row:
                    sound.add((peer, row["of"]))
        for tokens in lengths:
            shape = Shape(tokens, heads, key_heads, dim, element)
            long = tokens in sorted(lengths)[-2:]
            wanted = [case for case in plans if long or case in ("dense", "triangle")]
            for rows in _rows(shape, wanted, impls, sound, repeat_ms):
                record.add_case(rows)
        if million and "triangle" in cases:
            for rows in _rows(Shape(1 << 20, heads, key_heads, dim, element), ["triangle"], impls, (), repeat_ms):
                record.add_case(rows)
        if "pages" in cases:
            for row in pages_rows(Shape(max(lengths), heads, key_heads, dim, element), impls, repeat_ms):
                record.add(row)
        if "launch" in cases:
            for impl in impls:
                record.add(_launch_cost(impl, heads, key_heads, dim, element))
    return record.rows


def _kernels() -> list[str]:
    names = []
    for impl in KERNELS:
        try:
            choose_device("cuda", impl)
        except SparsekitError:
            continue
        names.append(impl)
    return names


class _Record(Record):
    """Rows so far, those of the cases beside the dense kernels of their length, and shown as they come."""

    def __init__(self, path: Path | str | None, show: Callable[[str], None] | None) -> None:
        super().__init__(path, place(torch.device("cuda")))
        self.show = show
        self.dense: dict[int, dict[str, float]] = {}  # milliseconds, by tokens and implementation

    def add_case(self, rows: Sequence[dict[str, Any]]) -> None:
        """All rows of a case at a length. Those of `dense` come before the others'."""
        for row in rows:
            if row["case"] == "dense" and "ms" in row:
                self.dense.setdefault(row["tokens"], {})[row["impl"]] = row["ms"]
        for row in rows:
            dense = self.dense.get(row["tokens"], {})
            if "ms" in row and "cudnn" in dense:
                row["times_cudnn_dense"] = round(dense["cudnn"] / row["ms"], 3)
            if "ms" in row and dense:
                row["of_best_dense"] = round(min(dense.values()) / row["ms"], 3)
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        super().add(row)
        if self.show is not None:
            self.show("  ".join(f"{key}={value}" for key, value in row.items() if value is not None))


# ---- correctness


def _correctness(impl: str, heads: int, key_heads: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Every case on 1000 and 4096 tokens against float32, relative to SDPA's own error; an error stops the bench."""
    worst, own = 0.0, 0.0
    for tokens in (1000, 4096):
        shape = Shape(tokens, heads, key_heads, dim, dtype)
        q, k, v = inputs(shape)
        for case in PLANS:
            if case == "columns" and tokens < COLUMNS:
                continue
            plan = plan_of(case, shape, preferred_tile("cuda", impl))
            got = attend(q, k, v, plan, impl=impl)
            assert isinstance(got, Tensor)
            error, plain = errors(q, k, v, plan, got)
            worst, own = max(worst, error), max(own, plain)
            if not error <= 1.5 * plain:
                raise SparsekitError(
                    f"impl={impl!r}, {case} at {tokens} tokens: error {error:.1e}, SDPA's own {plain:.1e}."
                )
    return {"case": "correctness", "impl": impl, "dim": dim, "dtype": str(dtype)[6:], "error": worst, "sdpa_error": own}


# ---- times


def _rows(
    shape: Shape, cases: Sequence[str], impls: Sequence[str], peers: Collection[tuple[str, str]], repeat_ms: int
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case. `peers`: (peer, case) that were found right."""
    q, k, v = inputs(shape)
    for case in cases:
        runs: list[_Run] = []
        missing: list[dict[str, Any]] = []
        for peer in (peer for peer in PEERS if (peer, case) in peers and PEERS[peer].runs(case, shape.tokens)):
            try:
                made = prepare(peer, case, shape, q, k, v)
            except SparsekitError as error:
                missing.append({"case": case, "impl": peer, "tokens": shape.tokens, "missing": str(error)})
                continue
            walked = plan_of(case, shape, TILE) if case == "dense" else made.plan
            runs.append(_Run(peer, made.call, None if walked is None else flops(walked, shape), made.extra))
        for impl in impls:
            synchronize(q.device)
            start = time.perf_counter()
            plan = plan_of(case, shape, preferred_tile(q.device, impl))
            synchronize(q.device)
            extra = {"plan_ms": round((time.perf_counter() - start) * 1e3, 3), "plan_bytes": plan.nbytes}
            ran = choose_call(q, k, v, plan, Softmax(shape.dim**-0.5), impl=impl).impl
            extra["block_kv"] = plan.block_kv
            extra["memory"] = _memory(q, k, v, plan, impl)
            runs.append(_Run(ran, _attend(q, k, v, plan, impl), flops(plan, shape), extra))
        times = rounds([run.call for run in runs], q.device, repeat_ms)
        rows = [
            {**_row(case, run.name, shape, ms, run.flops), **run.extra} for run, ms in zip(runs, times, strict=True)
        ]
        yield rows + missing
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
    q, k, v = inputs(shape)
    run = _attend(q, k, v, plan_of("triangle", shape, preferred_tile("cuda", impl)), impl)
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
    peers: Annotated[str, typer.Option(help="Comma-separated; may be empty.")] = ",".join(PEERS),
    million: Annotated[bool, typer.Option(help="Triangle at 2^20 tokens too.")] = True,
    repeat_ms: Annotated[int, typer.Option(min=1, help="Of each row.")] = 200,
    device: Device = "auto",
    output: Rows = None,
) -> None:
    """The CUDA kernels against cuDNN, FlashAttention 2 to 4, FlashInfer and FlexAttention; correctness first."""
    bench_kernel(
        lengths=numbers_of(tokens, "--tokens"), heads=heads, key_heads=key_heads, dim=dim, dtype=dtype or "bfloat16",
        impls=None if impls is None else words_of(impls), cases=words_of(cases), peers=words_of(peers), million=million,
        repeat_ms=repeat_ms, device=device_of(device), out=output, show=typer.echo,
    )  # fmt: skip
