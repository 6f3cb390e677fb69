"""What a server was told under `sparsekit` in vLLM's `--additional-config`, checked against its model and its options.

Three forms: a config (a path, YAML text or a mapping with `version`); `{config: ..., exact_prefix: true}`; or
`{configs: {NAME: ...}, default: NAME or off}`, out of which each request may choose.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch

from sparsekit.config import ModelFacts, ResolvedConfig, SparseConfig, load, rope_theta_of
from sparsekit.config.precision import asked_precision
from sparsekit.config.settle import Machine, settle
from sparsekit.errors import SparsekitError, nearest, shown
from sparsekit.patterns import Pattern
from sparsekit.patterns.crossover import device_name
from sparsekit.serve.prompts import dense_tail

__all__ = [
    "CACHES",
    "DEFAULT",
    "E4M3",
    "KEY",
    "OFF",
    "TESTED",
    "WRAPPED",
    "Served",
    "Settings",
    "machine_of",
    "refuse",
    "settings_of",
    "source_of",
    "version_refusal",
]

# vLLM's names of caches of such numbers. AMD's gfx942 has others by these names, of half the value.
E4M3 = () if torch.version.hip else ("fp8", "fp8_e4m3")
CACHES = ", ".join(("auto", *E4M3))  # what --kv-cache-dtype may be, beside the model's dtype
KEY = "sparsekit"  # in additional_config, and in a request's extra arguments
OFF = "off"
DEFAULT = "default"  # what a single config is called
ENV = "SPARSEKIT_CONFIG"  # the same as the key, for containers
ANY_VERSION = "SPARSEKIT_ANY_VLLM"
TESTED = ((0, 26), (0, 33))  # first and last release, both included
WRAPPED = ("FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION", "CPU_ATTN")  # backends, each a file of that name
# KV connectors that know a page by vLLM's own hash of its block, which holds the request's cache salt, or by that salt,
# or that hand a request's pages over to this request alone.
SALTED = (
    "LMCacheMPConnector", "MoRIIOConnector", "MooncakeConnector", "MooncakeStoreConnector", "NixlConnector",
    "NixlPullConnector", "NixlPushConnector", "OffloadingConnector", "SimpleCPUOffloadConnector",
)  # fmt: skip
FIELDS = ("config", "configs", "default", "exact_prefix")
TAIL_TOKENS = 1 << 20  # a prompt long enough that its dense last rows are a part of it


@dataclass(frozen=True)
class Served:
    """One config of a server.

    Attributes:
        digest: of all that it says: pages of two configs with the same one hold the same.
        tail: last rows of a prompt that it makes dense; None: a dynamic pattern, whose rows depend on later ones, or a
            correction, by which a chunk's first rows depend on where it begins.
    """

    name: str
    resolved: ResolvedConfig
    digest: str
    tail: int | None

    @property
    def config(self) -> SparseConfig:
        return self.resolved.config

    def why_dense(self, queries: int, prompt: int) -> str:
        """Why a chunk of a prompt is vLLM's in every layer, or nothing.

        vLLM says itself what is decoding, so static patterns run in chunks of any size, and a prompt's result does not
        depend on how it was cut. From fewer than `min_queries` queries, dynamic ones would estimate little.
        """
        if prompt < self.config.dense_below:
            return "the prompt is below dense_below_tokens"
        return "a chunk below min_queries" if self.tail is None and queries < self.config.min_queries else ""


@dataclass(frozen=True)
class Settings:
    """The configs of a server, one of which runs where a request does not say otherwise."""

    configs: Mapping[str, Served]
    default: str
    exact_prefix: bool = False
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", (OFF, *self.configs))

    def choose(self, extra_args: Mapping[str, Any] | None) -> Served | None:
        """What a request runs by its extra arguments; None: vLLM alone.

        Raises:
            SparsekitError: a name that the server does not have.
        """
        name = (extra_args or {}).get(KEY, self.default)
        if not isinstance(name, str) or name not in self.names:
            raise SparsekitError(
                f"{KEY}={shown(name)}: this server has {', '.join(self.names)}.{nearest(name, self.names)}"
            )
        return self.configs.get(name)

    def salt(self, served: Served | None, prompt: int, given: str | None) -> str | None:
        """A request's cache salt: pages that different configs filled are never shared.

        Under `exact_prefix`, a prompt that is dense for its length has those of `off`.
        """
        if served is None or (self.exact_prefix and prompt < served.config.dense_below):
            return given
        return f"sparsekit-{served.digest}{'' if given is None else f'-{given}'}"


def source_of(vllm_config: Any) -> Any:
    """What the server was told, as it was told; None: nothing.

    Raises:
        SparsekitError: a field whose name is nearly sparsekit's, which vLLM would not read.
    """
    extra = vllm_config.additional_config
    check_spelling(extra, "additional_config")
    return (extra.get(KEY) if isinstance(extra, Mapping) else None) or os.environ.get(ENV) or None


def check_spelling(fields: Any, where: str) -> None:
    """One of others' fields that is nearly `sparsekit`: it would be nobody's, and what it says would not be done.

    Nearer than a word that may be another plugin's, such as `sparse_kv`.

    Raises:
        SparsekitError: there is one.
    """
    if isinstance(fields, Mapping) and KEY not in fields:
        for name in fields:
            if get_close_matches(str(name).lower(), [KEY], cutoff=0.85):
                raise SparsekitError(f"{where}: unknown field {shown(name)}. Did you mean {KEY!r}?")


def nowhere() -> Machine:
    """A device of which no table has a row."""
    return Machine("", "")


def settings_of(source: Any, facts: ModelFacts, machine: Callable[[], Machine] = nowhere) -> Settings:
    """The settings of a source for a model. `machine` is asked where a config says `dense_below_tokens: auto`.

    Raises:
        SparsekitError: a field or config that is wrong, or for another model.
    """
    if not isinstance(source, Mapping) or "version" in source:
        return Settings({DEFAULT: _served(DEFAULT, source, facts, machine)}, DEFAULT)
    unknown = [name for name in source if name not in FIELDS]
    if unknown:
        raise SparsekitError(
            f"{KEY}: unknown field {shown(unknown[0])}; allowed: {', '.join(FIELDS)}, or a config itself, with "
            f"`version`.{nearest(unknown[0], FIELDS)}"
        )
    exact = source.get("exact_prefix", False)
    if not isinstance(exact, bool):
        raise SparsekitError(f"{KEY}.exact_prefix = {shown(exact)}: true or false.")
    if ("config" in source) == ("configs" in source):
        raise SparsekitError(f"{KEY}: one of `config` and `configs` is needed, not both.")
    if "config" in source:
        if "default" in source:
            raise SparsekitError(f"{KEY}.default goes with `configs`; a single config is called {DEFAULT!r}.")
        settings = Settings({DEFAULT: _served(DEFAULT, source["config"], facts, machine)}, DEFAULT, exact)
    else:
        settings = _several(source, facts, machine, exact)
    if exact and (dynamic := [name for name, served in settings.configs.items() if served.tail is None]):
        raise SparsekitError(
            f"{KEY}.exact_prefix: {dynamic[0]!r} has patterns whose choice depends on later rows, or whose correction "
            "depends on where chunks begin, so that no prefix of theirs is exact; leave exact_prefix out, or "
            "vLLM's prefix cache (--no-enable-prefix-caching)."
        )
    return settings


def _several(source: Mapping[str, Any], facts: ModelFacts, machine: Callable[[], Machine], exact: bool) -> Settings:
    named = source["configs"]
    if not isinstance(named, Mapping) or not named or not all(isinstance(name, str) and name for name in named):
        raise SparsekitError(f"{KEY}.configs = {shown(named)}: a mapping of names to configs, one at least.")
    if OFF in named:
        raise SparsekitError(f"{KEY}.configs: {OFF!r} is vLLM alone; give the config another name.")
    allowed = (*named, OFF)
    if "default" not in source and len(named) > 1:
        raise SparsekitError(f"{KEY}.default is missing: one of {', '.join(allowed)}.")
    default = source.get("default", next(iter(named)))
    if default not in allowed:
        raise SparsekitError(
            f"{KEY}.default = {shown(default)}: one of {', '.join(allowed)}.{nearest(default, allowed)}"
        )
    return Settings({name: _served(name, each, facts, machine) for name, each in named.items()}, str(default), exact)


def _served(name: str, source: Any, facts: ModelFacts, machine: Callable[[], Machine]) -> Served:
    try:
        resolved = settle(load(source).resolve(facts), facts, machine)
        if asked_precision(resolved.config.precision) is not None:
            raise SparsekitError(
                f"precision = {shown(resolved.config.precision)}: vLLM's layers run in the model's; leave it out."
            )
    except SparsekitError as error:
        raise SparsekitError(f"{KEY}{'' if name == DEFAULT else f'.configs.{name}'}: {error}") from None
    config = resolved.config
    said = f"{resolved.to_dict()} {config.dense_below} {config.min_queries} {config.dense_impl}"
    patterns: set[Pattern] = {pattern for layer in resolved.layers for pattern in layer.patterns}
    tail = dense_tail(tuple(patterns), TAIL_TOKENS)
    return Served(name, resolved, hashlib.sha256(said.encode()).hexdigest()[:16], tail)


def facts_of(vllm_config: Any) -> ModelFacts:
    """What vLLM knows of the model before it is loaded."""
    model = vllm_config.model_config
    text = model.hf_text_config
    return ModelFacts(
        name=model.model,
        model_type=getattr(text, "model_type", None),
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_key_heads=model.get_total_num_kv_heads(),
        head_dim=model.get_head_size(),
        hidden_size=model.get_hidden_size(),
        rope_theta=rope_theta_of(text),
    )


def machine_of(vllm_config: Any) -> Machine:
    """What the server's processes run on. vLLM asks NVML: starting CUDA here would keep it from forking workers."""
    from vllm.platforms import current_platform

    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    name = device_name(torch.device("cpu")) if current_platform.is_cpu() else current_platform.get_device_name()
    return Machine(name, dtype, vllm_config.parallel_config.tensor_parallel_size)


def version_refusal(version: tuple[Any, ...]) -> str:
    """Why a release of vLLM is not served, or nothing."""
    first, last = (".".join(map(str, end)) for end in TESTED)
    if TESTED[0] <= tuple(version[:2]) <= TESTED[1] or os.environ.get(ANY_VERSION) == "1":
        return ""
    return (
        f"vLLM {'.'.join(map(str, version[:3]))}: sparsekit was tested with {first} to {last}; install one, or "
        f"set {ANY_VERSION}=1 to try."
    )


def unsalted(transfer: Any) -> str:
    """A KV connector by which configs would share pages, or nothing."""
    if transfer is None or transfer.kv_connector is None:
        return ""
    extra = transfer.kv_connector_extra_config or {}
    parts = extra.get("connectors", ()) if transfer.kv_connector == "MultiConnector" else (vars(transfer),)
    own = (each for each in parts if each["kv_connector"] not in SALTED or each.get("kv_connector_module_path"))
    return str(next((each["kv_connector"] for each in own), ""))


def refuse(vllm_config: Any) -> None:
    """Refuse a server whose options sparsekit does not serve.

    Raises:
        SparsekitError: the first of them, in one line.
    """
    import vllm

    wrong = version_refusal(vllm.__version_tuple__)
    if wrong:
        raise SparsekitError(wrong)
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    dtype = str(model.dtype).removeprefix("torch.")
    reasons = (
        (model.use_mla, "this model's attention is MLA, whose cache holds no keys that a pattern could choose"),
        (model.is_encoder_decoder, "this is an encoder-decoder model; sparsekit is for the prompts of decoders alone"),
        (model.is_mm_prefix_lm, "this model's images attend in both directions, which no pattern here computes"),
        (model.rswa_window is not None, "this model runs R-SWA attention, which no pattern here computes"),
        (parallel.decode_context_parallel_size > 1, "--decode-context-parallel-size: each rank has a part of the keys"),
        (parallel.prefill_context_parallel_size > 1, "--prefill-context-parallel-size: each rank has a part of them"),
        (
            getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 1,
            "--enable-dbo: a step is cut in two, and the attention metadata of a half does not tell its prompts",
        ),
        (
            cache.cache_dtype not in ("auto", dtype, *E4M3),
            f"--kv-cache-dtype {cache.cache_dtype}: such keys are not read; use {CACHES} or {dtype}",
        ),
        (
            shared := unsalted(vllm_config.kv_transfer_config),
            f"--kv-transfer-config {shared}: it is not known to tell pages of different configs apart, as these are: "
            f"{', '.join(SALTED)}",
        ),
        (cache.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill: layers drop the prompt's rows"),
        (os.environ.get("VLLM_BATCH_INVARIANT") == "1", "VLLM_BATCH_INVARIANT: a chunk's result depends on its size"),
    )
    for applies, why in reasons:
        if applies:
            raise SparsekitError(f"{KEY} with {why}. Start the server without it, or without {KEY}.")
