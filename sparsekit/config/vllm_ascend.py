"""vllm-ascend's `additional_config` -> a sparsekit config: TriangleMix, and why its other sparse settings are none."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsekit.config.facts import ModelFacts
from sparsekit.config.foreign import (
    LARGEST,
    Method,
    Option,
    checked_fields,
    is_number,
    pattern_of,
    refusal,
    write_config,
)
from sparsekit.config.ranges import format_range, parse_range
from sparsekit.config.schema import SparseConfig
from sparsekit.config.strict_yaml import parse_yaml
from sparsekit.errors import SparsekitError, read_text, shown

__all__ = ["METHODS", "convert_vllm_ascend"]

_OPERATOR = "its operator has 8, 512 and 128 alone, and runs dense with any other"
_DECODING = Method(differs="chooses keys for decoding", nearest="none, since decoding is left to the model")
_OWN = Method(differs="belongs to sparse attention that a model brings along (DSA)", nearest="none")

METHODS: dict[str, Method] = {
    "trianglemix": Method(
        "triangle",
        {
            "sink_tokens": Option("sink_tokens", 8),
            "local_window": Option("window_tokens", 512, "local_window + 1", lambda tokens: tokens + 1),
            "last_rows": Option("last_tokens", 128),
        },
        {"sink_tokens": (8, _OPERATOR), "local_window": (512, _OPERATOR), "last_rows": (128, _OPERATOR)},
        ("strict", "stats_recent_capacity", "stats_log_interval"),
    ),
    "hamming_sparse": _DECODING,
    "ucm_sparse_config": Method(
        differs="chooses keys for decoding (ESA, GSAOnDevice, KVStarMultiStep) or mends a cache (Blend)",
        nearest=_DECODING.nearest,
    ),
    "enable_sparse_c8": _OWN,
    "enable_sparse_sfa_c8": _OWN,
    "enable_sparse_li_c8": _OWN,
    "sparse_kv_offload_config": _OWN,
}
# What a prompt must reach to run sparse there: its tokens, the rows that drop something, and the pairs that they drop.
GATES = {
    "min_seq_len": 0,
    "min_sparse_rows": 128,
    "min_saved_qk": 913_152,
    "split_min_sparse_rows": 192,
    "split_min_saved_qk": 1_299_264,
}
# Settings of 0.23 that say nothing of attention, or how it is computed and not over which keys.
OTHERS = (
    "ascend_compilation_config", "ascend_fusion_config", "ascend_log_path", "c8_enable_reshape_optim", "dump_config",
    "dump_config_path", "dynamic_spec_config", "enable_async_exponential", "enable_balance_scheduling",
    "enable_cpu_binding", "enable_dsa_cp", "enable_flashcomm1", "enable_fused_mc2", "enable_kv_nz",
    "enable_matmul_allreduce", "enable_mc2_hierarchy_comm", "enable_mlapo", "enable_prefill_mc2",
    "enable_reduce_sample", "enable_shared_expert_dp", "enable_sleep_mode_extra_cleanup",
    "enable_transpose_kv_cache_by_block", "eplb_config", "finegrained_tp_config", "flashcomm2_parallel_size",
    "layer_sharding", "mega_moe_max_tokens", "mix_placement", "msmonitor_use_daemon", "multistream_dsv4_dsa_overlap",
    "multistream_overlap_gate", "multistream_overlap_shared_expert", "pa_shape_list", "profiling_chunk_config",
    "recompute_scheduler_enable", "refresh", "rejection_sampler_config", "rl_config", "scheduler_config",
    "short_request_first_config", "SLO_limits_for_dynamic_batch", "weight_nz_mode", "weight_prefetch_config",
    "xlite_graph_config",
)  # fmt: skip


def convert_vllm_ascend(
    path: str | Path, output: str | Path | None = None, *, model: ModelFacts | None = None
) -> SparseConfig:
    """The config of the TriangleMix layers in vllm-ascend's `additional_config`, also written to `output`.

    The file is its JSON or YAML, alone or under `additional_config`. TriangleMix there keeps 8 sinks, the query and the
    512 keys before it, which is a window of 513 here, and the last 128 rows. Prompts that its gates send to dense
    attention are those below `dense_below_tokens`; in chunks, its gates look at each chunk.

    Args:
        output: also write the config there.
        model: whose counts the config is to have, and whose layers the file may name.

    Raises:
        SparsekitError: the file, the field, and what does not fit there; or nothing in it is TriangleMix.
    """
    where = str(path)
    data = parse_yaml(read_text(path, "file"), where)
    if isinstance(data, Mapping) and "additional_config" in data:
        data = checked_fields(data, ("additional_config",), where)["additional_config"]
    data = checked_fields(data, (*METHODS, *OTHERS), where)
    for name in METHODS:
        if name != "trianglemix" and _is_on(data.get(name)):
            raise SparsekitError(refusal(name, METHODS[name], where))
    at = f"{where}: trianglemix"
    section = checked_fields(data.get("trianglemix"), ("enabled", "layers", *GATES, *_options()), at)
    if section.get("enabled") is not True:
        raise SparsekitError(f"{at}: enabled = {shown(section.get('enabled'))}: without true no layer runs it.")
    layers = _layers(section.get("layers"), at)
    gates = {name: section.get(name, default) for name, default in GATES.items()}
    options = {name: value for name, value in section.items() if name in _options()}
    pattern, idle = pattern_of("trianglemix", options, METHODS, where)
    left_out = [*(name for name in data if name != "trianglemix"), *(f"trianglemix.{name}" for name in idle)]
    source = {"format": "vllm-ascend", **({"left_out": left_out} if left_out else {})}
    rules = {"dense_below_tokens": _shortest(gates, at), "default": "dense", "layers": {layers: pattern.to_yaml()}}
    return write_config(rules, source, path, output, model)


def _options() -> tuple[str, ...]:
    method = METHODS["trianglemix"]
    return (*method.options, *method.idle)


def _is_on(value: Any) -> bool:
    """Whether a setting is more than absent, empty, or off."""
    return bool(value) and not (isinstance(value, Mapping) and value.get("enabled") is False)


def _layers(value: Any, at: str) -> str:
    """The range of layers, which a list may spell out; a layer that is named twice counts once, as there."""
    parts = value if isinstance(value, list) else str(value).split(",") if isinstance(value, str | int) else []
    try:
        named = {layer for part in parts if str(part).strip() for layer in parse_range(str(part))}
    except SparsekitError as error:
        raise SparsekitError(f"{at}.layers: {error}.") from None
    if not named or isinstance(value, bool):
        raise SparsekitError(f'{at}: layers = {shown(value)}: want the layers that run it, such as "5,7,15-35".')
    return format_range(sorted(named))


def _shortest(gates: Mapping[str, Any], at: str) -> int:
    """Tokens of the shortest whole prompt that passes the gates.

    In a prompt of n tokens the rows from 521 to n - 129 drop something, row q as many as q - 520 pairs.
    """
    for name, value in gates.items():
        if not is_number(value) or not isinstance(value, int) or value < 0:
            raise SparsekitError(f"{at}: {name} = {shown(value)}: it should be a whole number from 0 to {LARGEST:,}.")
    least_rows = max(1, gates["min_sparse_rows"], gates["split_min_sparse_rows"])
    least_pairs = max(gates["min_saved_qk"], gates["split_min_saved_qk"])

    def passes(tokens: int) -> bool:
        rows = max(0, tokens - 128 - 521)
        return tokens >= gates["min_seq_len"] and rows >= least_rows and rows * (rows + 1) // 2 >= least_pairs

    shortest = bisect_left(range(LARGEST), True, key=passes)
    if shortest == LARGEST:
        raise SparsekitError(f"{at}: min_sparse_rows = {gates['min_sparse_rows']:,}: no prompt would run sparse.")
    return shortest
