"""The rows of `sparsekit bench dynamic`: a method's correctness, and what it keeps, loses and costs on one input."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sparsekit.call.geometry import Geometry
from sparsekit.call.softmax import Softmax
from sparsekit.errors import SparsekitError
from sparsekit.kernels import attend, choose_call, geometry_for
from sparsekit.lab.bench.inputs import Inputs, structured
from sparsekit.lab.bench.peers import PeerRun, Prepare, prepare
from sparsekit.lab.bench.quality import RECALL_SLACK, dense_lse, output_error, recall, recall_bound, sampled_rows
from sparsekit.lab.bench.timing import ROUNDS, milliseconds, spread, synchronize
from sparsekit.patterns import Pattern
from sparsekit.patterns.attention import tiled_for
from sparsekit.patterns.base import DynamicPattern
from sparsekit.plan import BlockPlan, dense_plan

__all__ = ["Row", "Setting", "check_size", "checked", "given_of", "input_facts", "rows_of"]

CHECK_TOKENS = (333, 1000)
HOST_REPEATS = 21


@dataclass(frozen=True)
class Setting:
    """How a run measures."""

    device: torch.device
    impl: str | None
    repeat_ms: float


@dataclass
class Row:
    """A row in the making: what is known, and what is still to be timed under which name."""

    known: dict[str, Any]
    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)


def _named(pattern: Pattern) -> dict[str, Any]:
    """What a row says about its pattern: `label` names what was set, `parameters` holds everything."""
    said = ", ".join(f"{name} {value}" for name, value in given_of(pattern).items())
    parameters = {name: value for name, value in pattern.model_dump(mode="json").items() if name != "name"}
    return {
        "method": pattern.name,
        "label": f"{pattern.name} ({said})" if said else pattern.name,
        "parameters": parameters,
    }


def given_of(pattern: Pattern) -> dict[str, Any]:
    """The parameters that were set, as YAML has them."""
    given = pattern.to_yaml()
    return {} if isinstance(given, str) else {key: value for key, value in given.items() if key != "name"}


# ---- correctness


def check_size(heads: int, key_heads: int, dim: int) -> tuple[int, int, int]:
    """Heads, key heads and head size of the check: two key heads, and no more query heads than there are to each."""
    return (heads // key_heads * 2, 2, dim) if key_heads > 0 and heads % key_heads == 0 else (heads, key_heads, dim)


def checked(
    pattern: Pattern,
    sparsest: Pattern,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    setting: Setting,
    seen: dict[Any, dict[str, float]],
) -> dict[str, Any]:
    """A row "correctness" with the largest errors of the pattern and of its `sparsest` point, or a row "failed".

    `seen` remembers, so that the points of a sweep do not check their sparsest one again.
    """
    worst: dict[str, float] = {"error": 0.0, "sdpa_error": 0.0, "recall_error": 0.0}
    try:
        for tokens in CHECK_TOKENS:
            for point in (pattern, sparsest):
                key = tokens, json.dumps(point.to_yaml(), sort_keys=True)
                if key not in seen:
                    seen[key] = _check(point, tokens, size, dtype, setting)
                worst = {name: max(worst[name], value) for name, value in seen[key].items()}
    except Exception as error:  # a wrong plan must not end the measurement of the others
        return _failed(pattern, error)
    head, key_heads, dim = size
    return {
        "case": "correctness", **_named(pattern), "tokens": max(CHECK_TOKENS),
        "heads": head, "key_heads": key_heads, "dim": dim, **worst,
    }  # fmt: skip


def _check(
    pattern: Pattern, tokens: int, size: tuple[int, int, int], dtype: torch.dtype, setting: Setting
) -> dict[str, float]:
    """Errors of one plan on a short prompt: its execution against float32, and its recall against its own mask.

    Raises:
        SparsekitError: pairs outside the causal ones, kept twice, or a query that does not keep itself; or errors
            larger than those of PyTorch's attention in the same dtype under the same mask allow.
    """
    heads, key_heads, dim = size
    x = structured(tokens, heads=heads, key_heads=key_heads, dim=dim, device=setting.device, dtype=dtype)
    q, k, v = x.q, x.k, x.v
    plan = _select(pattern, q, k, geometry_for(q, k)).corrected(0)  # a mask says nothing of the correction
    where = f"{pattern} at {tokens} tokens"
    timed = attend(q, k, v, plan, impl=setting.impl)
    assert isinstance(timed, Tensor)
    mask = _mask(plan, where)
    error, plain, _ = _errors(x, timed, mask)
    got, lse = _attend_lse(q, k, v, plan, setting.impl)
    mask = mask if plan.ranked is None else _mask(plan, where)  # a ranked plan keeps what this execution visited
    error_too, plain_too, weights = _errors(x, got, mask)
    error, plain = max(error, error_too), max(plain, plain_too)
    if not error <= max(1.5 * plain, 1e-5):
        raise SparsekitError(f"{where}: error {error:.1e} against float32, SDPA's own {plain:.1e}.")
    rows, mask = sampled_rows(tokens).to(q.device), mask.to(q.device)
    share = (weights[:, :, rows] * mask[:, :, rows]).sum(-1)
    off = float((recall(lse[:, :, rows], dense_lse(q, k, rows, dim**-0.5)) - share).abs().max())
    if not off <= RECALL_SLACK:
        raise SparsekitError(f"{where}: recall is {off:.1e} off the share of the mask.")
    return {"error": error, "sdpa_error": plain, "recall_error": off}


def _mask(plan: BlockPlan, where: str) -> Tensor:
    """bool (1, P, N, N): the pairs of a plan that was executed; an error if they are no plan's."""
    often = plan.multiplicity()
    causal = torch.ones(often.shape[-2:], dtype=torch.bool).tril()
    if int(often.max()) > 1 or bool((often.bool() & ~causal).any()):
        raise SparsekitError(f"{where}: the plan keeps a pair twice, or one outside the causal ones.")
    if not bool(often.diagonal(dim1=2, dim2=3).all()):
        raise SparsekitError(f"{where}: a query does not keep itself.")
    return often.bool()


def _errors(x: Inputs, got: Tensor, mask: Tensor) -> tuple[float, float, Tensor]:
    """Relative L2 errors against float32: of `got`, and of SDPA in the same dtype under the same mask.

    And the dense softmax itself, float32 (1, H, N, N).
    """
    heads, device = x.q.shape[1], x.q.device
    mask = mask.to(device).repeat_interleave(heads // mask.shape[1], 1)
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (x.k, x.v))
    scores = x.q.float() @ key.float().transpose(-1, -2) * x.q.shape[-1] ** -0.5
    exact = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value.float()
    low = torch.nn.functional.scaled_dot_product_attention(x.q, key, value, attn_mask=mask)
    causal = torch.ones_like(mask).tril()
    weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    return output_error(got, exact)[1], output_error(low, exact)[1], weights


def _failed(pattern: Pattern, error: Exception) -> dict[str, Any]:
    why = str(error) if isinstance(error, SparsekitError) else _line(error)
    return {"case": "failed", **_named(pattern), "why": why}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


# ---- one input


def _select(pattern: Pattern, q: Tensor, k: Tensor, geometry: Geometry) -> BlockPlan:
    softmax = Softmax(q.shape[-1] ** -0.5)
    estimate = pattern.select if isinstance(pattern, DynamicPattern) else pattern.plan
    return estimate(q, k, tiled_for(pattern, geometry, q), softmax).corrected(pattern.correct_every)


def _attend_lse(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, impl: str | None) -> tuple[Tensor, Tensor]:
    """out and lse; by another kernel than `impl` where that one gives no lse."""
    try:
        found = attend(q, k, v, plan, impl=impl, return_lse=True)
    except SparsekitError:
        found = attend(q, k, v, plan, return_lse=True)
    assert isinstance(found, tuple)
    return found


def input_facts(x: Inputs) -> dict[str, Any]:
    """What a row says about its input."""
    return {
        "input": x.name, "layer": x.layer, "prompt": x.prompt, "tokens": x.tokens, "heads": x.q.shape[1],
        "key_heads": x.k.shape[1], "dim": x.q.shape[3],
    }  # fmt: skip


def rows_of(
    x: Inputs, patterns: Sequence[Pattern], peers: Mapping[str, Prepare], plan_only: bool, setting: Setting
) -> Iterator[dict[str, Any]]:
    """All rows of one input. Everything on it is timed in the same rounds."""
    rows: list[Row] = []
    if plan_only:
        rows += [_guarded(pattern, x, lambda p: _plan_row(p, x, setting)) for pattern in patterns]
    else:
        name, call = _dense(x)
        dense = call()
        own = dense_plan(geometry_for(x.q, x.k))
        rows.append(Row({"case": "dense", "impl": name}, {"ms": call}))
        rows.append(_own_dense_row(x, own, dense, setting))
        at = sampled_rows(x.tokens)
        lse = dense_lse(x.q, x.k, at, x.q.shape[-1] ** -0.5)
        for pattern in patterns:
            rows.append(_guarded(pattern, x, lambda p: _method_row(p, x, dense, at, lse, setting)))
        rows += [_peer_row(name, peer, x, dense) for name, peer in peers.items()]
        del dense
    if setting.repeat_ms > 0:
        _time(rows, setting)
    _compare(rows)
    yield from ({**_case_first(row.known), **input_facts(x), **row.known} for row in rows)
    rows.clear()
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def _case_first(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("case", "method", "label", "parameters", "peer", "impl") if name in row}


def _guarded(pattern: Pattern, x: Inputs, make: Callable[[Pattern], Row]) -> Row:
    try:
        return make(pattern)
    except Exception as error:  # the others are still measured, and the row says what happened
        return Row(_failed(pattern, error))


def _time(rows: Sequence[Row], setting: Setting) -> None:
    """Medians into the rows. Every call ran before, so one that fails now does so beside the others: out of memory."""
    calls = [(row, name, call) for row in rows for name, call in row.calls.items()]
    times: dict[int, list[float]] = {i: [] for i in range(len(calls))}
    for i in [*range(len(calls))] * ROUNDS:
        row, name, call = calls[i]
        if f"{name}_missing" not in row.known:
            try:
                times[i] += milliseconds(call, setting.device, setting.repeat_ms)
            except RuntimeError as error:
                row.known[f"{name}_missing"] = _line(error)
    for i, (row, name, _) in enumerate(calls):
        if f"{name}_missing" not in row.known:
            row.known |= spread(times[i], name)
            row.known["repeats"] = min(row.known.get("repeats", len(times[i])), len(times[i]))


def _compare(rows: Sequence[Row]) -> None:
    """How many times faster than PyTorch's dense, than our own, and than the method's own code, in the same rounds."""
    dense = [row.known for row in rows if row.known["case"] == "dense"]
    for name, base in zip(("times_dense", "times_own_dense"), dense, strict=False):
        for row in rows:
            if "ms" in base and row.known.get("ms"):
                row.known[name] = round(base["ms"] / row.known["ms"], 3)
    for row in rows:
        for other in rows:
            if _same_setting(row.known, other.known):
                for name, ratio in (("ms", "times_peer"), ("index_ms", "times_peer_index")):
                    if name in row.known and name in other.known:
                        row.known[ratio] = round(other.known[name] / row.known[name], 3)


def _same_setting(row: Mapping[str, Any], peer: Mapping[str, Any]) -> bool:
    """Whether a peer ran this row's method with this row's parameters, as far as it names any."""
    if row["case"] != "dynamic" or peer["case"] != "peer" or peer.get("method") != row["method"]:
        return False
    return all(row["parameters"].get(name) == value for name, value in peer["parameters"].items())


def _dense(x: Inputs) -> tuple[str, Callable[[], Tensor]]:
    """PyTorch's dense causal attention: cuDNN's on a CUDA device that has it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def plain() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=True)

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return plain()

    if x.q.device.type == "cuda":
        with suppress(RuntimeError):
            cudnn()
            return "sdpa-cudnn", cudnn
    return "sdpa", plain


def _own_dense_row(x: Inputs, plan: BlockPlan, dense: Tensor, setting: Setting) -> Row:
    """Our kernel on everything; its difference from PyTorch's dense is rounding, the floor of all errors below."""

    def call() -> Tensor:
        got = attend(x.q, x.k, x.v, plan, impl=setting.impl)
        assert isinstance(got, Tensor)
        return got

    ran = choose_call(x.q, x.k, x.v, plan, Softmax(x.q.shape[-1] ** -0.5), impl=setting.impl).impl
    l1, l2 = output_error(call(), dense)
    return Row({"case": "dense", "impl": ran, "error_l1": l1, "error_l2": l2}, {"ms": call})


def _method_row(pattern: Pattern, x: Inputs, dense: Tensor, at: Tensor, dense_sum: Tensor, setting: Setting) -> Row:
    q, k, v, geometry = x.q, x.k, x.v, geometry_for(x.q, x.k)

    def index() -> BlockPlan:
        return _select(pattern, q, k, geometry)

    known = {"case": "dynamic", **_named(pattern), **_cost(index, setting)}
    plan = index()

    def attention(given: BlockPlan = plan) -> Tensor:
        got = attend(q, k, v, given, impl=setting.impl)
        assert isinstance(got, Tensor)
        return got

    l1, l2 = output_error(attention(), dense)
    _, lse = _attend_lse(q, k, v, plan.corrected(0), setting.impl)
    share = recall(lse[:, :, at.to(lse.device)], dense_sum)
    if bool((share > recall_bound(dense_sum)).any()):
        raise SparsekitError(f"{pattern}: recall {float(share.max()):.4f} of a row: a pair is counted twice.")
    kept = _kept(plan)
    if kept["pair_density"] > 1:
        raise SparsekitError(f"{pattern}: {kept['pair_density']:.4f} of the causal pairs are kept: some twice.")
    known |= {
        "impl": choose_call(q, k, v, plan, Softmax(q.shape[-1] ** -0.5), impl=setting.impl).impl,
        **kept,
        "recall": float(share.mean()),
        "recall_worst_head": float(share.mean(-1).min()),
        "error_l1": l1,
        "error_l2": l2,
    }
    return Row(known, {"index_ms": index, "attend_ms": attention, "ms": lambda: attention(index())})


def _plan_row(pattern: Pattern, x: Inputs, setting: Setting) -> Row:
    geometry = geometry_for(x.q, x.k)

    def index() -> BlockPlan:
        return _select(pattern, x.q, x.k, geometry)

    known = {"case": "plan", **_named(pattern), **_cost(index, setting)}
    return Row({**known, **_kept(index())}, {"index_ms": index})


def _kept(plan: BlockPlan) -> dict[str, Any]:
    return {
        "pair_density": plan.density(),
        "tile_density": plan.tile_density(),
        "block_q": plan.block_q,
        "block_kv": plan.block_kv,
        "plan_bytes": plan.nbytes,
    }


def _cost(index: Callable[[], BlockPlan], setting: Setting) -> dict[str, Any]:
    """What selecting takes beside device time: bytes beyond q and k at the peak, host time, and host waits."""
    if setting.device.type != "cuda":
        return {"select_peak_bytes": None, "index_host_ms": None, "host_sync": None}
    index()  # compiled
    synchronize(setting.device)
    torch.cuda.reset_peak_memory_stats(setting.device)
    before = torch.cuda.memory_allocated(setting.device)
    plan = index()
    synchronize(setting.device)
    peak = torch.cuda.max_memory_allocated(setting.device) - before
    del plan
    host = []
    for _ in range(HOST_REPEATS if setting.repeat_ms > 0 else 1):
        synchronize(setting.device)
        start = time.perf_counter()
        index()
        host.append((time.perf_counter() - start) * 1e3)
    synchronize(setting.device)
    return {
        "select_peak_bytes": peak,
        "index_host_ms": round(median(host), 4),
        "host_sync": _waits(index),
    }


def _waits(call: Callable[[], Any]) -> bool:
    """Whether a call waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _peer_row(name: str, peer: Prepare, x: Inputs, dense: Tensor) -> Row:
    """Somebody else's code; a row that says why where it does not run."""
    try:
        run = prepare(peer, x.q, x.k, x.v)
        known: dict[str, Any] = {
            "case": "peer", "peer": name, "method": run.method, "parameters": dict(run.parameters),
            "source": run.source, "note": run.note or None,
        }  # fmt: skip
        if run.index is not None:
            run.index()
        if run.total is not None:
            got = run.total()
            if got.shape != dense.shape:
                raise SparsekitError(f"it returned {tuple(got.shape)}, not {tuple(dense.shape)}")
            known["error_l1"], known["error_l2"] = output_error(got, dense)
        if run.tile_density is not None:
            known["tile_density"] = float(run.tile_density())
        synchronize(x.q.device)
        return Row(known, _peer_calls(run))
    except Exception as error:  # theirs may fail in any way
        return Row({"case": "peer", "peer": name, "missing": _line(error)})


def _peer_calls(run: PeerRun) -> dict[str, Callable[[], Any]]:
    calls = {"index_ms": run.index, "ms": run.total}
    return {name: call for name, call in calls.items() if call is not None}
