"""NVIDIA Model-Optimizer's sparse attention, field by field: none of its methods is a pattern, and this says why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sparsekit.config.foreign import Method, checked_fields, method_of, refusal
from sparsekit.config.strict_yaml import parse_yaml
from sparsekit.errors import SparsekitError, read_text, shown

__all__ = ["FIELDS", "METHODS", "FieldRead", "read_model_optimizer"]

_SKIP = Method(
    differs="skips a tile of keys whose scores are far below the running maximum of its queries, at run time",
    nearest="flashprefill, which compares scores of mean keys with the largest of a row",
)
_NM = Method(
    differs="keeps the N of every M neighbouring keys whose scores are largest",
    nearest="s2o, which keeps single keys",
)
METHODS: dict[str, Method] = {
    "flash_skip_softmax": _SKIP,
    "triton_skip_softmax": _SKIP,
    "skip_softmax": _SKIP,
    "triton_sparse_softmax": _NM,
    "sparse_softmax": _NM,
    "vsa": Method(differs="chooses cubes of a video's tokens, and adds a branch of means", nearest="block_topk"),
}

_HOW = "how it is computed there; nothing to write"
_FIT = "how the thresholds were fitted; nothing to write"
_THRESHOLD = "what is skipped at run time; nothing to write, nearest is flashprefill's alpha"
_SHARE = "share of the tiles to skip; `sparsekit calibrate tune` searches by a budget of KL instead"
# Of `sparse_cfg`, by module pattern and under `calibration`; and of the groups of a checkpoint's config.json.
FIELDS: dict[str, str] = {
    "method": "the method of these modules",
    "algorithm": "the method of these modules",
    "enable": "false: these layers are dense; leave them out of `layers`",
    "thresholds": _THRESHOLD,
    "threshold": _THRESHOLD,
    "skip_softmax_threshold": _THRESHOLD,
    "threshold_scale_factor": "a * exp(b * target), over the tokens, is the threshold; nothing to write",
    "target_sparse_ratio": _SHARE,
    "target_sparsity": _SHARE,
    "br": "queries of a tile; the kernel's here",
    "bc": "keys of a tile; the kernel's here",
    "sparsity_n": "keys kept of every M; nothing to write",
    "sparsity_m": "keys of a group; nothing to write",
    "dense_sink_tokens": "first keys that are kept: `sink_tokens` of a_shape and triangle",
    "dense_recent_tokens": "nearest keys that are kept: `window_tokens` of a_shape and triangle",
    "targets": "classes of attention modules; the layers are named in `layers`",
    "ignore": "modules that stay dense; leave their layers out of `layers`",
    "block_size_3d": "a block of a video; nothing to write",
    "top_k_ratio": "share of the blocks; `top_k` of block_topk counts them",
    "video_shape": "a video's; nothing to write",
    "initial_disabled_steps": "steps of a diffusion model; nothing to write",
    **dict.fromkeys(("backend", "collect_stats", "is_causal", "export_sparse_softmax", "export_format"), _HOW),
    **dict.fromkeys(
        (
            "samples",
            "max_seqlen",
            "num_length_bins",
            "chunk_size",
            "num_decode_tokens",
            "threshold_trials",
            "fit_logspace",
            "cache_dir",
            "data_dir",
        ),
        _FIT,
    ),
    "producer": "who wrote it; `provenance`",
}
_EXPORTED = ("config_groups", "producer", "sparse_softmax")


class FieldRead(NamedTuple):
    """A field of the file, its value, and what it is with what to write instead."""

    field: str
    value: Any
    meaning: str


def read_model_optimizer(path: str | Path) -> tuple[list[FieldRead], str]:
    """The fields of Model-Optimizer's sparse attention settings, and why they become no config.

    The file is a checkpoint's `config.json` with `sparse_attention_config`, that object alone, or the dictionary with
    `sparse_cfg` that `mtsa.sparsify` takes, as JSON or YAML.

    Raises:
        SparsekitError: the file, the field, and what does not fit there.
    """
    where = str(path)
    data = parse_yaml(read_text(path, "file"), where)
    if not isinstance(data, Mapping):
        raise SparsekitError(f"{where}: {shown(data)}: want a mapping with sparse_cfg or sparse_attention_config.")
    if "sparse_cfg" in data:
        whole = checked_fields(data, ("sparse_cfg", "export_format"), where)
        groups = _mapping(whole.pop("sparse_cfg"), "sparse_cfg", where)
    else:
        whole = dict(data)
        if "sparse_attention_config" in data:
            whole = _mapping(data["sparse_attention_config"], "sparse_attention_config", where)
        elif not set(data) & set(_EXPORTED):
            raise SparsekitError(f"{where}: neither sparse_cfg nor sparse_attention_config: nothing of it is sparse.")
        whole = checked_fields(whole, _EXPORTED, where)
        groups = _mapping(whole.pop("config_groups", {}), "config_groups", where)
        groups |= {name: whole.pop(name) for name in ("sparse_softmax",) if name in whole}
    rows = [FieldRead(name, value, FIELDS[name]) for name, value in whole.items()]
    reason = f"{where}: no method is enabled in it; `default: dense` says the same."
    for name, group in reversed(groups.items()):
        at = f"{where}: {name}"
        fields = checked_fields(group, FIELDS, at)
        rows = [FieldRead(f"{name}.{key}", value, FIELDS[key]) for key, value in fields.items()] + rows
        if name != "calibration" and fields.get("enable", True):
            default = name if name in METHODS else "flash_skip_softmax"
            method = fields.get("method", fields.get("algorithm", default))
            reason = refusal(method, method_of(method, METHODS, at), at)
    return rows, reason


def _mapping(value: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise SparsekitError(f"{where}: {name} = {shown(value)}: want a mapping.")
    return dict(value)
