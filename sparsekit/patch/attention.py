"""The attention function f: a layer's prompt by sparsekit's kernel, or by the model's own function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.call.softmax import Softmax
from sparsekit.config import LayerPatterns
from sparsekit.errors import SparsekitError
from sparsekit.kernels import attend, choose_call, preferred_tile
from sparsekit.kernels.select.totals import plan_totals
from sparsekit.patch.compiled import attention_in_graph
from sparsekit.patch.mask import call_of, descriptor_width
from sparsekit.patch.model import own_attention
from sparsekit.patch.state import (
    LAYERS,
    Attention,
    Call,
    Layer,
)
from sparsekit.patterns.attention import plan_heads

# A layer's last plan stays for the report up to this size; of a larger one, its totals.
KEPT_PLAN_BYTES = 1 << 24

# Arguments of transformers' attention functions that change the result, and that no kernel here knows.
MISSING_FEATURES = ("position_bias", "sinks", "indices", "block_indices", "cache", "cu_seq_lens_q")


def make_attention(original: str) -> Attention:
    """f for models whose own implementation is `original`.

    It is called in every layer of every token, and what it does there is to stay within a few microseconds: decoding,
    and a prompt that runs dense, leave it at once.
    """

    def sparsekit_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer = LAYERS.get(id(module))
        if layer is not None:
            if query.size(2) < layer.min_queries:
                if attention_mask is None or getattr(attention_mask, "dtype", None) is not torch.int32:  # as in _run
                    return layer.attend(module, query, key, value, attention_mask, **kwargs)
            else:
                dense = getattr(attention_mask, "sparsekit_dense", None)
                if dense is not None and dense.state is layer.handle._state and dense.rows == query.size(2):
                    layer.ran, layer.why = ("own", layer.own) if layer.own else ("dense", dense.why)
                    layer.plan, layer.choice, layer.times = None, None, ()
                    return layer.attend(module, query, key, value, dense.mask, **kwargs)
        if torch.compiler.is_compiling() and descriptor_width(attention_mask):
            return attention_in_graph(outside, module, query, key, value, attention_mask, kwargs)
        call = call_of(module, attention_mask)
        if layer is not None:
            out = _run(layer, module, query, key, value, attention_mask, call, kwargs)
            if out is not None:
                return out
        if call is not None:
            attention_mask = call.original_mask(query.device, query.shape[2])
        attend = layer.attend if layer is not None else own_attention(module, original)
        return attend(module, query, key, value, attention_mask, **kwargs)

    outside = torch.compiler.disable(
        sparsekit_attention, reason="sparsekit: gradients, attention matrices or a copied layer"
    )
    return sparsekit_attention


def _run(
    layer: Layer,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    call: Call | None,
    kwargs: Mapping[str, Any],
) -> tuple[Tensor, None] | None:
    """This layer's attention by sparsekit, or None where the model's own is to run."""
    handle, index = layer.handle, layer.patterns.layer
    _, heads, rows, _ = q.shape
    if rows < handle.config.min_queries and (call is None or rows != call.kwargs["q_length"]):
        return None  # decoding, or the last queries alone: the record of the last prefill stays
    if layer.own:
        _note(layer, "own", layer.own)
        return None
    if heads != len(layer.patterns.pattern_of_head):
        layer.patterns = _patterns_here(layer.patterns, module, heads)
    if call is None:
        if not handle._paused and _wants_kernel(layer):
            got = "no mask" if mask is None else f"a mask of shape {tuple(mask.shape)}"
            raise SparsekitError(
                f"layer {index} should run {layer.patterns}, but it got {got} not made by transformers' "
                "mask functions: custom 4-D masks cannot be combined with a sparse pattern; pass a 2-D padding mask or "
                "none, or use `with handle.pause():`."
            )
        _note(layer, "dense", "paused" if handle._paused else "dense by config")
        return None
    because = handle._dense_because(call)
    if because or not _wants_kernel(layer):
        _note(layer, "dense", because or "dense by config")
        return None
    _check_features(index, layer.patterns, kwargs)
    if k.shape[-1] != v.shape[-1]:
        raise SparsekitError(
            f"layer {index} runs {layer.patterns}, but its keys have size {k.shape[-1]} and its values {v.shape[-1]}, "
            "which no kernel here computes; leave the layer dense."
        )
    if call.window != layer.window:
        got, said = ("full", "sliding") if layer.window else ("sliding", "full")
        raise SparsekitError(f"layer {index} got the mask of a {got} layer, but the model's config says it is {said}.")
    window = call.kwargs.get("local_size")
    if window is not None and call.tokens > window and not layer.patterns.within(window):  # beyond the positions
        raise SparsekitError(
            f"layer {index} runs {layer.patterns} on a prompt of {call.tokens} tokens, from which its window of "
            f"{window} tokens cuts some off; leave the layer dense, or keep to the model's positions."
        )
    geometry = handle._geometry(call)
    if (geometry.q_len, geometry.kv_len) != (rows, k.shape[2]) or geometry.batch != q.shape[0]:
        raise SparsekitError(
            f"layer {index} got q {tuple(q.shape)} and k {tuple(k.shape)}, but the mask was made for {geometry.batch} "
            f"samples of {geometry.q_len} queries and {geometry.kv_len} keys."
        )
    softmax = Softmax(
        kwargs.get("scaling") or getattr(module, "scaling", None) or q.shape[-1] ** -0.5,
        kwargs.get("softcap"),
        kwargs.get("s_aux"),
    )
    with _timed(layer, q.device) as note_planned:
        plan = plan_heads(
            layer.patterns.patterns,
            layer.patterns.pattern_of_head,
            q,
            k,
            geometry.with_tile(*preferred_tile(q.device)),
            softmax,
        )
        note_planned()
        choice = choose_call(q, k, v, plan, softmax)
        out = attend(
            q,
            k,
            v,
            plan,
            scale=softmax.scale,
            softcap=softmax.softcap,
            sink_logits=softmax.sink_logits,
            impl=choice.impl,
        )
    assert isinstance(out, Tensor)
    _note(layer, "sparse" if not layer.patterns.dense else "dense", "")
    layer.plan, layer.choice = plan if plan.nbytes <= KEPT_PLAN_BYTES else plan_totals(plan), choice
    return out.transpose(1, 2).contiguous(), None


def _wants_kernel(layer: Layer) -> bool:
    return layer.handle.config.dense_impl == "kernel" or not layer.patterns.dense


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


def _check_features(index: int, patterns: LayerPatterns, kwargs: Mapping[str, Any]) -> None:
    """Refuse what the model asks of its attention function and no kernel here computes."""
    if kwargs.get("output_attentions"):
        raise SparsekitError(f"output_attentions=True: layer {index} runs {patterns}, which has no attention matrix.")
    if kwargs.get("dropout"):
        raise SparsekitError(
            f"layer {index} runs {patterns}, which has no dropout, and the model asks for {kwargs['dropout']:g}: call "
            "model.eval(), or `with handle.pause():` to train with the model's own attention."
        )
    if kwargs.get("is_causal") is False:
        raise SparsekitError(f"layer {index} runs {patterns}, but the model asks for attention that is not causal.")
    feature = next((name for name in MISSING_FEATURES if kwargs.get(name) is not None), None)
    if feature is not None:
        raise SparsekitError(
            f"layer {index} runs {patterns}, but the model passes {feature!r} to its attention function, which no "
            "kernel here computes; leave the layer dense."
        )


def _note(layer: Layer, ran: str, why: str) -> None:
    layer.ran, layer.why = ran, why
    if why:
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
