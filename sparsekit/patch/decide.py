"""Whether a layer of a call runs sparse, and why not: decided here alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import SparsekitError
from sparsekit.patch.state import Applied, Call, Layer, Prompt, Settled, Verdict

DECODING = Verdict("", "decoding")


def verdict(layer: Layer, rows: int, mask: Any, call: Call | None) -> Verdict:
    """Of a layer that got `rows` queries and `mask`, which is the descriptor of `call`, or anything else.

    Raises:
        SparsekitError: the layer should run sparse, and the call cannot; or it contradicts `Handle.prompt`.
    """
    applied = layer.applied
    if rows < layer.min_queries and (call is None or rows != call.kwargs["q_length"]):  # or the last queries alone
        return DECODING
    whole = None if call is None else verdict_of_call(applied, call)
    if layer.own or whole is not None:
        return of_layer(layer, whole)
    if applied.paused:
        return Verdict("dense", "paused")
    if layer.patterns.dense and applied.resolved.config.dense_impl == "model":
        return Verdict("dense", layer.given_back or "dense by config")
    if call is None:
        got = "no mask" if mask is None else f"a mask of shape {tuple(mask.shape)}"
        raise SparsekitError(
            f"layer {layer.patterns.layer} should run {layer.patterns}, but it got {got} not made by transformers' "
            "mask functions (or sparsekit was applied while this forward ran): custom 4-D masks cannot be combined "
            "with a sparse pattern; pass a 2-D padding mask or none, or use `with handle.pause():`."
        )
    if call.window != layer.window:
        got, is_a = ("full", "sliding") if layer.window else ("sliding", "full")
        raise SparsekitError(
            f"layer {layer.patterns.layer} got the mask of a {got} layer, but the model's config says it is {is_a}."
        )
    return Verdict("dense" if layer.patterns.dense else "sparse", "")


def decodes(layer: Layer, rows: int, mask: Any) -> bool:
    """What `verdict` says of few queries without a descriptor, known at a glance: every token of every layer asks."""
    return rows < layer.min_queries and (mask is None or getattr(mask, "dtype", None) is not torch.int32)


def of_layer(layer: Layer, whole: Verdict | None) -> Verdict:
    """A layer's verdict in a call that runs dense as a whole, or of a layer that keeps its own attention."""
    if layer.own:
        return Verdict("own", layer.own)
    assert whole is not None
    return whole


def verdict_of_call(applied: Applied, call: Call) -> Verdict | None:
    """Of a call that runs dense in every layer, or None where each layer is to be asked; found once a call."""
    if applied.epoch not in call.verdicts:
        why = _why_dense(applied, call)
        call.verdicts[applied.epoch] = Verdict("dense", why) if why else None
    return call.verdicts[applied.epoch]


def settle(applied: Applied, call: Call) -> Settled | None:
    """What every layer of a call that runs dense needs, or None."""
    found, rows = verdict_of_call(applied, call), call.kwargs["q_length"]
    if found is None:
        return None
    return Settled(applied.epoch, rows, call.original_mask(call.kwargs["device"], rows), found)


def keeps_own(applied: Applied, mask: Mapping[str, Any]) -> bool:
    """Whether the call of these arguments of a mask function is surely dense, so that it needs no descriptor."""
    if applied.paused:
        return True
    queries, offset, prompt = mask["q_length"], mask["q_offset"], applied.prompt
    if queries >= applied.resolved.config.min_queries:
        return False
    if prompt is None or (queries == 1 and isinstance(offset, Tensor)):  # a token in a StaticCache: do not wait
        return True
    return bool(offset + queries > prompt.end)


def _why_dense(applied: Applied, call: Call) -> str:
    if applied.paused:
        return "paused"
    if call.why:
        return call.why
    config, prompt, queries = applied.resolved.config, applied.prompt, call.kwargs["q_length"]
    if prompt is None:
        return config.why_dense(queries, call.tokens)
    is_chunk = _is_chunk(prompt, call, config.min_queries)
    geometry = call.geometry_in(prompt)
    assert geometry is not None
    tokens = max(geometry.prompt_tokens)
    return config.why_dense(tokens if is_chunk else queries, tokens)


def _is_chunk(prompt: Prompt, call: Call, min_queries: int) -> bool:
    """Whether the call is a chunk of the prompt that was told, rather than decoding.

    Fewer than min_queries queries are one where they are as many as the chunk before had, or end the prompt; one query
    never is. Candidates of speculative decoding may follow the prompt in a call, and without a cache the decoded tokens
    do, a few more in each call.

    Raises:
        SparsekitError: the call and what was told do not fit.
    """
    assert call.bounds is not None
    queries, offset = call.kwargs["q_length"], call.kwargs["q_offset"]
    told = f"handle.prompt(tokens={list(prompt.tokens) if isinstance(prompt.tokens, tuple) else prompt.tokens})"
    starts, ends = call.bounds
    columns = prompt.columns(len(starts))
    if len(columns) != len(starts):
        raise SparsekitError(f"{told}: {len(columns)} numbers for a batch of {len(starts)} samples; give one for each.")
    if queries < min_queries and offset + queries > prompt.end:
        return False
    over = max([end - n for start, end, n in zip(starts, ends, columns, strict=True) if end > start], default=0)
    if over - max(prompt.over, 0) >= min_queries:
        raise SparsekitError(
            f"{told}: this call ends {over} columns after that; give the columns of the whole prompt, padding counted."
        )
    if queries < min_queries and offset > 0 and queries != prompt.chunk and offset + queries != prompt.end:
        raise SparsekitError(
            f"{told}: {queries} queries at column {offset} neither end that prompt nor are a chunk as long as the one "
            f"before ({prompt.chunk}); they look like decoding, so the prompt was shorter."
        )
    if prompt.chunk:  # in the first chunk a sample's padding tells its end; by now rows before it took the told one
        for sample, (end, n) in enumerate(zip(ends, columns, strict=True)):
            if offset <= end < offset + queries and n > end > starts[sample]:
                raise SparsekitError(
                    f"{told}: sample {sample} ends at column {end}, not {n}; chunks padded on the right need one "
                    "number for each sample."
                )
    prompt.chunk, prompt.over = queries, over
    return queries > 1
