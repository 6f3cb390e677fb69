"""Which layer of a loaded model runs what: bound to the layers' implementations, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsekit import __version__
from sparsekit.config import LayerPatterns, ModelFacts
from sparsekit.config.ranges import format_range
from sparsekit.errors import SparsekitError
from sparsekit.serve.vllm.meter import METER, LayerCounts
from sparsekit.serve.vllm.settings import CACHES, E4M3, KEY, WRAPPED, Settings

__all__ = ["Bound", "bind", "line", "rank_of"]


@dataclass(frozen=True, eq=False)
class Bound:
    """What one layer of this process runs.

    Attributes:
        patterns: by config, those of this process's heads, where a layer is not left to vLLM.
        group: layers of one group run the same, and share what is made for a step.
        dense_here: names of configs whose dense layers run here too.
        longest: tokens of the longest prompt.
        page: tokens of the cache's pages, as far as that is known before there is a cache.
    """

    layer: int
    patterns: Mapping[str, LayerPatterns]
    group: int
    dense_here: frozenset[str] = frozenset()
    longest: int = 0
    page: int = 16


def bind(model: Any, vllm_config: Any, settings: Settings, rank: int, tp_rank: int) -> list[str]:
    """Give each attention layer of the target model its patterns; the lines to log.

    Raises:
        SparsekitError: a layer that a config makes sparse, and whose implementation is not sparsekit's or computes what
            no kernel here does; no layer at all.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    found: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, Attention) and getattr(module, "attn_type", "decoder") == "decoder":
            found[extract_layer_index(module.layer_name)] = module
    if not found:
        raise SparsekitError(
            f"{KEY}: {type(model).__name__} has no decoder attention that goes through vLLM's Attention."
        )
    facts, groups = _facts(found, Attention, vllm_config), dict[Any, int]()
    METER.reset()
    lines = []
    own = {name: served.resolved.own_layers(facts) for name, served in settings.configs.items()}
    for index, module in sorted(found.items()):
        mine = {}
        for name, served in settings.configs.items():
            if index >= len(served.resolved.layers):
                raise SparsekitError(f"{KEY}: {module.layer_name} is beyond the {len(served.resolved.layers)} layers.")
            patterns = served.resolved.layers[index]
            runs = not patterns.dense or served.config.dense_impl == "kernel"
            if runs and index not in own[name] and facts.window(index) is None:
                _check(module, patterns)
                if patterns.reused is not None and patterns.reused.layer not in found:
                    raise SparsekitError(
                        f"{KEY}: layer {index} reuses the plan of layer {patterns.reused.layer}, which is in another "
                        "pipeline stage; give this layer a pattern of its own, or start the server without "
                        "--pipeline-parallel-size."
                    )
                mine[name] = _of_rank(patterns, module, tp_rank)
        if mine:
            ran = ((name, p.patterns, p.pattern_of_head, *_place_of_plan(p)) for name, p in mine.items())
            key = (module.kv_cache_dtype, *ran)  # the profiling run takes a group's memory once
            here = frozenset(n for n in mine if settings.configs[n].config.dense_impl == "kernel")
            group, longest = groups.setdefault(key, len(groups)), vllm_config.model_config.max_model_len
            page = vllm_config.cache_config.block_size or Bound.page
            module.impl.sparsekit = Bound(index, mine, group, here, longest, page)
            METER.layers.update({(name, index): LayerCounts(str(patterns)) for name, patterns in mine.items()})
    backend = next(iter(found.values())).attn_backend.get_name()
    METER.about = {"sparsekit": __version__, "rank": rank, "backend": backend, "exact_prefix": settings.exact_prefix}
    for name, served in settings.configs.items():
        lines.append(line(name, backend, {i: m.impl for i, m in found.items()}, own[name], served.config))
        lines += [f"config {name!r}: {said}" for said in served.resolved.settled]
    return lines


def _place_of_plan(patterns: LayerPatterns) -> tuple[Any, ...]:
    """Where a layer keeps its plan for later ones, whose plan it runs, and whether it is the last to run it."""
    reused = patterns.reused
    return patterns.layer if patterns.shared else None, reused, reused is not None and reused.last


def rank_of(parallel: Any) -> int:
    """A worker's among those of all engines of a server: under data parallelism each engine counts its own from 0."""
    engine = getattr(parallel, "data_parallel_index", parallel.data_parallel_rank)
    return int(engine * parallel.world_size + parallel.rank)


def line(name: str, backend: str, impls: Mapping[int, Any], own: Mapping[int, str], config: Any) -> str:
    """What runs where under a config, in one line."""
    by_pattern: dict[str, list[int]] = {}
    for index, impl in sorted(impls.items()):
        bound = getattr(impl, "sparsekit", None)
        patterns = bound.patterns.get(name) if bound is not None else None
        said = str(patterns) if patterns is not None else f"vLLM ({own.get(index, 'dense')})"
        by_pattern.setdefault(said, []).append(index)
    where = "; ".join(f"layers {format_range(layers)}: {said}" for said, layers in by_pattern.items())
    below = f"; prompts below {config.dense_below} tokens: vLLM" if config.dense_below else ""
    return f"sparsekit {__version__} over {backend}, config {name!r}: {where}{below}; decoding: vLLM"


def _facts(found: Mapping[int, Any], plain: type, vllm_config: Any) -> ModelFacts:
    """The kind of each layer, by what its module does; layers of other processes count as full.

    Subclasses of vLLM's `plain` attention hand their backend other keys than a prompt's so far: chunks of them
    (Llama 4), or sinks of the model's own before them.
    """
    count = max(vllm_config.model_config.hf_text_config.num_hidden_layers, max(found) + 1)
    windows = [getattr(found.get(i), "sliding_window", None) or None for i in range(count)]
    kinds = ["full_attention" if w is None else "sliding_attention" for w in windows]
    others = {i: type(module).__name__ for i, module in found.items() if type(module) is not plain}
    return ModelFacts(
        num_layers=count,
        layer_types=tuple(others.get(i, kind) for i, kind in enumerate(kinds)),
        sliding_window=tuple(windows),
    )


def _check(module: Any, patterns: LayerPatterns) -> None:
    """That a layer may run sparse."""
    impl, backend = module.impl, module.attn_backend.get_name()
    where = f"layer {patterns.layer} is to run {patterns}, but"
    if not hasattr(type(impl), "sparsekit"):
        raise SparsekitError(
            f"{where} vLLM chose the backend {backend} for it; sparsekit serves {', '.join(WRAPPED)}: start the server "
            f"with --attention-backend {WRAPPED[0]}."
        )
    if getattr(impl, "alibi_slopes", None) is not None:
        raise SparsekitError(f"{where} it adds ALiBi biases, which no kernel here computes; leave the layer dense.")
    dtype = str(module.dtype).removeprefix("torch.")
    if module.kv_cache_dtype not in ("auto", dtype, *E4M3):
        raise SparsekitError(
            f"{where} its KV cache is {module.kv_cache_dtype}; such keys are not read: use --kv-cache-dtype {CACHES} "
            f"or {dtype}."
        )
    for name in ("_q_scale", "_k_scale", "_v_scale") if module.kv_cache_dtype in E4M3 else ():
        if (scales := getattr(module, name).numel()) > 1:
            raise SparsekitError(
                f"{where} its KV cache has {scales} numbers in {name}; one a layer is read: leave the layer dense, or "
                "use --kv-cache-dtype auto."
            )
    sizes = (module.head_size, getattr(module, "head_size_v", module.head_size))
    if len(set(sizes)) > 1:
        raise SparsekitError(f"{where} its keys have size {sizes[0]} and its values {sizes[1]}; leave the layer dense.")


def _of_rank(patterns: LayerPatterns, module: Any, tp_rank: int) -> LayerPatterns:
    """Those of this process's query heads, which are consecutive."""
    heads, total = module.num_heads, len(patterns.pattern_of_head)
    if total % heads or (tp_rank + 1) * heads > total:
        raise SparsekitError(
            f"layer {patterns.layer}: the config has {total} query heads, and rank {tp_rank} has {heads}, which is no "
            "equal part of them."
        )
    return patterns if heads == total else patterns.of_heads(tp_rank * heads, heads)
