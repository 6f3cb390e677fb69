"""The attention function f: a layer's prompt by sparsekit's kernel, or by the model's own function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.call.geometry import Geometry
from sparsekit.call.keys import Keys
from sparsekit.config import LayerPatterns
from sparsekit.errors import SparsekitError
from sparsekit.kernels import CannotRun, check_gradients, preferred_tile, prepare
from sparsekit.kernels.select.totals import plan_totals
from sparsekit.patch.call import check_arguments, in_common_dtype, outside_autocast, softmax_of
from sparsekit.patch.compiled import attention_in_graph
from sparsekit.patch.decide import decodes, of_layer, verdict
from sparsekit.patch.mask import COPIED, call_of, check_call, descriptor_width
from sparsekit.patch.model import own_attention
from sparsekit.patch.precision import refused
from sparsekit.patch.state import DOORS, LAYERS, Attention, Call, Layer, Verdict, layer_of_copy

# A layer's last plan stays for the report up to this size; of a larger one, its totals.
KEPT_PLAN_BYTES = 1 << 24


def make_attention(original: str) -> Attention:
    """f for models whose own implementation is `original`.

    It is called in every layer of every token, and what it does there is to stay within a few microseconds: decoding,
    and a prompt that runs dense, leave it at once.
    """

    def sparsekit_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer, rows = LAYERS.get(id(module)), query.size(2)
        if layer is not None:
            if decodes(layer, rows, attention_mask):
                return layer.attend(module, query, key, value, attention_mask, **kwargs)
            settled = getattr(attention_mask, "sparsekit_settled", None)
            if settled is not None and settled.epoch is layer.applied.epoch and settled.rows == rows:
                _note(layer, of_layer(layer, settled.verdict))
                return layer.attend(module, query, key, value, settled.mask, **kwargs)
        if torch.compiler.is_compiling() and descriptor_width(attention_mask):
            return attention_in_graph(outside, module, query, key, value, attention_mask, kwargs)
        if layer is None:
            layer = _layer_of_stranger(module)
        call = call_of(module, attention_mask)
        if layer is not None:
            found = verdict(layer, rows, attention_mask, call)
            if found.ran and not found.why:
                assert call is not None
                if layer.patterns.reused is not None:
                    check_call(module, attention_mask, call)
                return _run(layer, module, query, key, value, call, kwargs)
            if found.ran:
                _note(layer, found)
        if call is not None:
            attention_mask = call.original_mask(query.device, rows)
        attend = layer.attend if layer is not None else own_attention(module, original)
        return attend(module, query, key, value, attention_mask, **kwargs)

    outside = torch.compiler.disable(
        sparsekit_attention, reason="sparsekit: gradients, attention matrices, unknown arguments or a copied layer"
    )
    return sparsekit_attention


def _layer_of_stranger(module: nn.Module) -> Layer | None:
    """Of a module that `apply` did not see: a replica runs as its original; a sibling that shares its config, not.

    Raises:
        SparsekitError: a copy, whose config is a copy too.
    """
    door = DOORS.get(id(getattr(module, "config", None)))
    if door is None:
        raise SparsekitError(COPIED)
    return layer_of_copy(module, door)


def _run(
    layer: Layer, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: Call, kwargs: Mapping[str, Any]
) -> tuple[Tensor, None]:
    """This layer's attention by sparsekit: refuse, plan, attend."""
    if q.shape[1] != len(layer.patterns.pattern_of_head):
        layer.patterns = _patterns_here(layer.patterns, module, q.shape[1])
    geometry = _checked(layer, q, k, v, call, kwargs)
    q, k, v = in_common_dtype(q, k, v)
    softmax = softmax_of(module, q, kwargs)
    check_gradients(q, k, v, softmax.sink_logits)  # before planning: a layer replayed alone finds no plan to reuse
    impl = layer.patterns.impl
    with outside_autocast(q.device), _timed(layer, q.device) as note_planned:
        try:
            tiled = geometry.with_tile(*preferred_tile(q.device, impl))
            plan = layer.patterns.plan(q, k, tiled, softmax, call.plans, layer.applied, impl)
            note_planned()
            keys = Keys(k, v)
            run, choice = prepare(q, keys, plan, softmax, impl=impl)
        except CannotRun as error:
            raise refused(layer.patterns, error.why) from None
        out, _ = run(q, keys, plan, softmax, False, None)
    layer.ran, layer.why = ("dense", layer.given_back) if layer.patterns.dense else ("sparse", "")
    layer.plan, layer.choice = plan if plan.nbytes <= KEPT_PLAN_BYTES else plan_totals(plan), choice
    return out.transpose(1, 2).contiguous(), None


def _checked(layer: Layer, q: Tensor, k: Tensor, v: Tensor, call: Call, kwargs: Mapping[str, Any]) -> Geometry:
    """Where the call's queries and keys sit; refuses what no kernel here computes."""
    index = layer.patterns.layer
    check_arguments(layer.patterns, kwargs)
    if k.shape[-1] != v.shape[-1]:
        raise SparsekitError(
            f"layer {index} runs {layer.patterns}, but its keys have size {k.shape[-1]} and its values {v.shape[-1]}, "
            "which no kernel here computes; leave the layer dense."
        )
    window = call.kwargs.get("local_size")
    if window is not None and call.tokens > window and not layer.patterns.within(window):  # beyond the positions
        raise SparsekitError(
            f"layer {index} runs {layer.patterns} on a prompt of {call.tokens} tokens, from which its window of "
            f"{window} tokens cuts some off; leave the layer dense, or keep to the model's positions."
        )
    geometry = call.geometry_in(layer.applied.prompt)
    assert geometry is not None
    if (geometry.q_len, geometry.kv_len) != (q.shape[2], k.shape[2]) or geometry.batch != q.shape[0]:
        raise SparsekitError(
            f"layer {index} got q {tuple(q.shape)} and k {tuple(k.shape)}, but the mask was made for {geometry.batch} "
            f"samples of {geometry.q_len} queries and {geometry.kv_len} keys."
        )
    return geometry


def _patterns_here(patterns: LayerPatterns, module: nn.Module, heads: int) -> LayerPatterns:
    """Those of the `heads` query heads that this process has of a layer under tensor parallelism.

    They are consecutive: process r of n has the r-th of n equal parts. A layer whose heads are alike need not know r.
    """
    total = len(patterns.pattern_of_head)
    shards = total // heads
    if shards * heads == total:
        parts = range(shards) if patterns.alike else _parts_of_weights(module, shards)
        if patterns.alike or len(parts) == 1:
            return patterns.of_heads(min(parts) * heads, heads)
    raise SparsekitError(
        f"layer {patterns.layer} has {total} query heads that run {patterns}, and {heads} of them came here, but its "
        "weights do not tell which: shard them as DTensors (transformers' tp_plan does, in equal parts)."
    )


def _parts_of_weights(module: nn.Module, shards: int) -> set[int]:
    """Which of `shards` parts of its sharded weights a module has; several where a mesh has two such dimensions."""
    from torch.distributed.tensor import DTensor

    return {
        weight.device_mesh.get_local_rank(dim)
        for weight in module.parameters()
        if isinstance(weight, DTensor)
        for dim, placement in enumerate(weight.placements)
        if placement.is_shard() and weight.device_mesh.size(dim) == shards
    }


def _note(layer: Layer, verdict: Verdict) -> None:
    """A layer's record where the model's own attention runs."""
    layer.ran, layer.why = verdict
    layer.plan, layer.choice, layer.times = None, None, ()


@contextmanager
def _timed(layer: Layer, device: torch.device) -> Iterator[Callable[[], None]]:
    """Plan and kernel time of a layer: by events on CUDA, so that nothing waits; read when the report is asked for.

    Yields what is to be called when the plan is there.
    """
    times: list[Any] = []
    if device.type != "cuda":
        times.append(time.perf_counter())
        yield lambda: times.append(time.perf_counter())
        layer.times = (*times, time.perf_counter())
        return

    def mark() -> None:
        times.append(torch.cuda.Event(enable_timing=True))
        times[-1].record()

    with torch.cuda.device(device):
        mark()
        yield mark
        mark()
    layer.times = tuple(times)
