"""AngelSlim's YAML -> a sparsekit config: one method for all layers, under `compression.sparsity`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsekit.config.facts import ModelFacts
from sparsekit.config.foreign import Method, Option, checked_fields, pattern_of, write_config
from sparsekit.config.schema import SparseConfig
from sparsekit.config.strict_yaml import parse_yaml
from sparsekit.errors import SparsekitError, read_text, shown

__all__ = ["METHODS", "convert_angelslim"]

SECTIONS = ("global", "model", "compression", "dataset", "inference")

_SINKS = {"n_init": Option("sink_tokens", 128), "n_local": Option("window_tokens", 3968)}
_BLOCKS = {"block_size": (128, "sparsekit's blocks have 128 tokens")}
_CACHE = Method(differs="is a name that AngelSlim keeps for methods that drop keys from the cache", nearest="a_shape")

METHODS: dict[str, Method] = {
    "a_shape": Method("a_shape", _SINKS, idle=("n_last",)),
    "tri_shape": Method("triangle", {**_SINKS, "n_last": Option("last_tokens", 100)}),
    "minference": Method(
        "vertical_slash",
        only={
            "pattern_path": (
                None,
                "budgets of single heads; of MInference's own files, `sparsekit convert minference` reads them",
            )
        },
        differs="keeps the same columns and diagonals, with other tiles around them",
    ),
    "xattention": Method(
        "xattention",
        {"threshold": Option("threshold", 0.9), "stride": Option("stride", 8)},
        {"norm": (1, "sparsekit divides the logits by nothing more, which is 1"), **_BLOCKS},
        ("chunk_size",),
        "keeps a key block more for each block of queries of its first chunk, and pads a prompt that does not end on a "
        "stride",
    ),
    "flexprefill": Method(
        "flexprefill",
        {
            "gamma": Option("gamma", 0.9),
            "tau": Option("tau", 0.1),
            "min_budget": Option("min_budget_tokens", 1),
            "max_budget": Option("max_budget_tokens", None),
        },
        _BLOCKS,
        differs="adds up masses as floats, which sparsekit compares by 8 significant bits, and puts distances into "
        "blocks from the far end",
    ),
    "flashprefill": Method(
        "flashprefill",
        {
            "alpha": Option("alpha", 0.2),
            "sink": Option("sink_blocks", 256, "sink // 128, at least 1", lambda tokens: max(1, tokens // 128)),
            "window": Option("window_blocks", 512, "window // 128, at least 1", lambda tokens: max(1, tokens // 128)),
            "last_n_block_full": Option("last_blocks", 2),
        },
        _BLOCKS,
        differs="scores a block of queries' own keys by its last query alone, which can lower the threshold",
    ),
    "stem": Method(
        differs="adds the norm of the values to strided scores, and keeps fewer blocks the later a query stands",
        nearest="xattention",
    ),
    "cosa": Method(
        differs="keeps the blocks of every row's maximum before those of the largest mass, and skips some at run time",
        nearest="xattention",
    ),
    "vecattention": Method(
        differs="keeps, for a block of queries, the single keys whose logit is near the largest", nearest="s2o"
    ),
    "snapkv": _CACHE,
    "streamingllm": _CACHE,
    "pyramidkv": _CACHE,
    "quest": _CACHE,
}


def convert_angelslim(
    path: str | Path,
    output: str | Path | None = None,
    *,
    nearest: bool = False,
    model: ModelFacts | None = None,
) -> SparseConfig:
    """The config of an AngelSlim YAML with `compression.name: Sparsity`, also written to `output`.

    `METHODS` says what becomes what. Sections that say nothing of the selection are listed in the config's provenance.

    Args:
        output: also write the config there.
        nearest: of a method whose selection differs from the pattern's, write the pattern that is nearest to it.
        model: whose counts the config is to have.

    Raises:
        SparsekitError: the file, the field, and what does not fit there; or a method that is none of ours.
    """
    where = str(path)
    data = checked_fields(parse_yaml(read_text(path, "file"), where), SECTIONS, where)
    compression = data.get("compression")
    kind = compression.get("name") if isinstance(compression, dict) else None
    if kind not in ("Sparsity", ["Sparsity"]):
        raise SparsekitError(f"{where}: compression.name = {shown(kind)}: only 'Sparsity' says which pairs are kept.")
    within = f"{where}: compression"
    settings = checked_fields(compression, ("name", "sparsity"), within).get("sparsity")
    within = f"{within}.sparsity"
    settings = checked_fields(settings, ("name", "attn_kwargs", "allow_pseudo_sparse", "benchmark"), within)
    name, options = settings.pop("name", None), settings.pop("attn_kwargs", None)
    pattern, idle = pattern_of(name, options, METHODS, within, nearest=nearest)
    source: dict[str, Any] = {"format": "angelslim", "method": name}
    if METHODS[name].differs:
        source["differs"] = f"AngelSlim {METHODS[name].differs}"
    left_out = [key for key in data if key != "compression"]
    left_out += [f"compression.sparsity.{key}" for key in (*settings, *(f"attn_kwargs.{option}" for option in idle))]
    source |= {"left_out": left_out} if left_out else {}
    about = data.get("model")
    label = about.get("model_path") if isinstance(about, dict) else None
    return write_config(
        {"default": pattern.to_yaml()}, source, path, output, model, label if isinstance(label, str) else None
    )
