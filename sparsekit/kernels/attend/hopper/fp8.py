"""The shared kernel in FP8 on sm_90: the same plans with q, k, v and the softmax in e4m3, for calls that ask for it.

`fp8_device.py` is the device code. Here is what it covers, and the launch. Nothing here synchronises with the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsekit.call.keys import Keys
from sparsekit.call.softmax import Softmax
from sparsekit.call.tensors import output
from sparsekit.kernels.attend.fp8 import BLOCK_KEYS, against, asked_for, key_blocks
from sparsekit.kernels.attend.hopper import host as hopper
from sparsekit.kernels.attend.hopper.descriptors import box, layout, put_descriptors
from sparsekit.kernels.attend.hopper.items import RUNNING
from sparsekit.kernels.attend.hopper.worklist import BLOCK_Q, _merge, _Pair, _Work, _works, _workspace
from sparsekit.plan import BlockPlan
from sparsekit.plan.memo import FP8_LAUNCHES

__all__ = ["attend_fp8", "compile_form", "covers", "missing", "tile"]

HEAD_SIZE = 128
STAGES, Q_STAGES = 3, 2  # 96 KiB of K and V, 64 of q; and 64 of sums, where the output is staged


def missing(device: torch.device, asked: bool) -> str:
    """Why the FP8 form does not run on `device`, or ""."""
    return hopper.missing(device) or asked_for(asked)


def tile(q: Tensor | None, narrow: bool) -> tuple[int, int]:
    """128 x 128."""
    return BLOCK_Q, BLOCK_KEYS


def covers(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, out: Tensor | None = None
) -> list[str]:
    """Why the FP8 form cannot run this call, each reason in a clause; none where it runs it."""
    shared = hopper.covers(q, keys, plan, softmax, return_lse, out)
    return [*_against(q, plan, softmax), *(reason for reason in shared if not reason.startswith(("head size", "tile")))]


def _against(q: Tensor, plan: BlockPlan, softmax: Softmax) -> Iterator[str]:
    g = plan.geometry
    if q.shape[3] != HEAD_SIZE:
        yield f"head size {q.shape[3]}: {HEAD_SIZE}"
    if (g.block_q, g.block_kv) != (BLOCK_Q, BLOCK_KEYS):
        yield f"tile {g.block_q} x {g.block_kv}: {BLOCK_Q} x {BLOCK_KEYS}"
    yield from against(plan, softmax)


def attend_fp8(
    q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention over the pairs of `plan` with e4m3 products, for calls that `covers` has no word against.

    Args:
        q: (B, H, Q, 128), float16 or bfloat16. keys: likewise, in one piece or in pages; quantised here, in each call.
        out: (B, H, Q, 128), laid out (B, Q, H, 128).

    Returns:
        `out`, or a new (B, H, Q, 128) of q's type, laid out (B, Q, H, 128), and lse (B, H, Q) float32 where asked for.
    """
    from sparsekit.kernels.attend.triton_e4m3 import quantised

    if q.device.index != torch.cuda.current_device():  # launches go to the current device
        with torch.cuda.device(q.device):
            return attend_fp8(q, keys, plan, softmax, return_lse, out)
    k, sinks = keys.k, softmax.sink_logits
    stream = hopper._driver().get_current_stream(q.device.index)
    key = (
        FP8_LAUNCHES, q.device, q.dtype, q.shape, k.shape, q.stride(), softmax.scale, softmax.softcap,
        None if sinks is None else sinks.dtype, return_lse, stream,
    )  # fmt: skip
    launches: tuple[_Launch, ...] | None = plan.memo.get(key)
    if launches is None:
        launches = plan.memo.keep(key, _prepare(q, k, plan, softmax, return_lse, stream))
    batch, heads, q_len, _ = q.shape
    out = output(q, out, plan.geometry.padded)
    lse = q.new_empty((batch, heads, q_len), dtype=torch.float32) if return_lse else None
    if plan.geometry.padded and lse is not None:
        lse.fill_(float("-inf"))
    rounded = quantised(keys, plan.geometry, softmax.softcap is None, False)
    for launch in launches:
        launch.run(q, rounded, out, lse, sinks, stream)
    return out, lse


# ---- the launch
@dataclass(frozen=True)
class _Launch:
    """One launch with all that stays the same from call to call: a call puts its own tensors in.

    boxes: descriptor contents of q, k, v, out, and of k and v for sinks.
    """

    kernel: Any
    work: _Work
    arguments: tuple[Any, ...]
    descriptor: type
    boxes: tuple[dict[str, Any], ...]
    fixed: bool  # as in host.py

    def run(
        self, q: Tensor, quantised: tuple[Tensor, ...], out: Tensor, lse: Tensor | None,
        sinks: Tensor | None, stream: int,
    ) -> None:  # fmt: skip
        arguments, partial = self.fill(q, quantised, out, lse, sinks)
        hopper.launch_by_mode(self.kernel, self.work.blocks, arguments, MODE_ARGUMENT, self.fixed, stream)
        if self.work.slots:
            _merge(self.work, partial, out, lse, sinks)

    def fill(
        self, q: Tensor, quantised: tuple[Tensor, ...], out: Tensor, lse: Tensor | None,
        sinks: Tensor | None,
    ) -> tuple[list[Any], _Pair]:  # fmt: skip
        """The call's arguments, and its workspace."""
        k8, v8, scales, common = quantised
        arguments = list(self.arguments)
        put_descriptors(arguments, self.descriptor, self.boxes, (q, k8, v8, out, k8, v8))
        partial = _workspace(self.work, q)
        arguments[SCALES_ARGUMENT : SCALES_ARGUMENT + 7] = (scales, common, out, lse, sinks, *partial)
        return arguments, partial


SCALES_ARGUMENT = 10  # place of p_scales, which p_common, p_out, p_lse, p_sinks, p_part and p_part_lse follow
MODE_ARGUMENT = 18  # of the mode, behind p_marks
_FORMS: dict[tuple[Any, ...], Any] = {}


def _prepare(
    q: Tensor, k: Tensor, plan: BlockPlan, softmax: Softmax, return_lse: bool, stream: int = 0
) -> tuple[_Launch, ...]:
    """Work lists, descriptor contents, scalars and compiled kernels of such a call."""
    return tuple(_launch(q, k, plan, softmax, return_lse, work, stream) for work in _works(plan, q, k))


def _launch(
    q: Tensor, k: Tensor, plan: BlockPlan, softmax: Softmax, return_lse: bool, work: _Work, stream: int
) -> _Launch:
    batch, heads, q_len, dim = q.shape
    key_heads, g, half = k.shape[1], plan.geometry, BLOCK_Q // 2
    blocks, e4m3 = key_blocks(g), torch.float8_e4m3fn
    rule, cap, sinks = plan.rule, softmax.softcap, softmax.sink_logits
    k_shape, v_shape = (batch, key_heads, blocks * BLOCK_KEYS, dim), (batch, key_heads, dim, blocks * BLOCK_KEYS)
    few = int(_device_code().FEW.value)
    boxes = (
        box(q.shape, q.stride(), q_len, half, q.dtype),
        *_key_boxes(k_shape, v_shape, BLOCK_KEYS),
        box(q.shape, (q_len * heads * dim, dim, heads * dim, 1), q_len, half, q.dtype),
        *_key_boxes(k_shape, v_shape, few),
    )
    rule_sample = rule_head = 0
    if rule is not None:
        rule_sample = rule.shape[1] * 3 if rule.shape[0] > 1 else 0
        rule_head = 3 if rule.shape[1] > 1 else 0
    flags = (
        STAGES, Q_STAGES, plan.row_ptr is not None, rule is not None, cap is not None, return_lse, sinks is not None,
        work.slots > 0, hopper.starts_early(g), rule is not None,
    )  # fmt: skip
    scale = float(softmax.scale)
    arguments = (
        *boxes,
        work.items, work.entries, hopper._counters(q.device, stream), rule, *[None] * 7,
        hopper._marks(q.device, stream, hopper.room(len(work.items))), RUNNING,
        scale if cap is None else float(cap), 0.0 if cap is None else 2 * math.log2(math.e) * scale / cap,
        len(work.items), heads, heads // key_heads, blocks, q_len, g.q_offset, rule_sample, rule_head,
        heads // plan.heads, *flags,
    )  # fmt: skip
    fixed = hopper.keeps_maximum(len(work.items), work.kv_end)
    launch = _Launch(None, work, arguments, layout(half, dim, q.dtype)[0], boxes, fixed)
    form = (q.device, q.dtype, None if sinks is None else sinks.dtype, *flags)
    if form not in _FORMS:
        out = q.new_empty((batch, q_len, heads, dim)).transpose(1, 2)
        lse = q.new_empty((1,), dtype=torch.float32) if return_lse else None
        k8, v8 = (q.new_empty(shape, dtype=e4m3) for shape in (k_shape, v_shape))
        floats = q.new_empty((1,), dtype=torch.float32)
        filled, _ = launch.fill(q, (k8, v8, floats, floats.bfloat16()), out, lse, sinks)
        # Compiled once, then launched directly, as host.py does and with the same registers.
        _FORMS[form] = _device_code().attention.warmup(*filled, grid=(1,), num_warps=4, maxnreg=168)
    return replace(launch, kernel=_FORMS[form])


def _key_boxes(
    k_shape: Sequence[int], v_shape: Sequence[int], keys: int
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """What the descriptors of K (B, G, N, D) and V (B, G, D, N) in e4m3 hold, in boxes of so many keys."""
    e4m3, (_, heads, tokens, dim) = torch.float8_e4m3fn, k_shape
    k_steps, v_steps = ((heads * tokens * dim, tokens * dim, last, 1) for last in (dim, tokens))
    return box(k_shape, k_steps, tokens, keys, e4m3), box(v_shape, v_steps, dim, dim, e4m3, keys)


@lru_cache(maxsize=1)
def _device_code() -> Any:
    from sparsekit.kernels.attend.hopper import fp8_device

    return fp8_device


def compile_form(q: Tensor, keys: Keys, plan: BlockPlan, softmax: Softmax, return_lse: bool = False) -> Any:
    """Triton's compiled kernel for such a call, not launched; tensors may lie on the CPU where a driver is mocked."""
    return _prepare(q, keys.k, plan, softmax, return_lse)[0].kernel
