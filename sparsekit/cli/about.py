"""`patterns`, `validate`, `models` and `doctor` as Python functions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.errors import SparsekitError

if TYPE_CHECKING:
    from sparsekit.config import ArchFacts

__all__ = ["common_parameters", "describe_patterns", "doctor", "named_models", "validate"]

PACKAGES = ("torch", "triton", "transformers", "pydantic", "matplotlib", "gguf", "accelerate")


def describe_patterns() -> list[dict[str, Any]]:
    """Every registered pattern: name, summary, source, and its parameters with default, meaning and range.

    Those that every pattern has are `common_parameters`.
    """
    from sparsekit.patterns import Pattern, pattern_class, pattern_names

    return [
        {
            "name": name,
            "summary": (pattern_class(name).__doc__ or "").strip().splitlines()[0],
            "source": pattern_class(name).source,
            "parameters": [
                _describe_field(field_name, field)
                for field_name, field in pattern_class(name).model_fields.items()
                if field_name not in Pattern.model_fields
            ],
        }
        for name in pattern_names()
    ]


def common_parameters() -> list[dict[str, Any]]:
    """The parameters that every pattern has, as `describe_patterns` describes its own."""
    from sparsekit.patterns import Pattern

    return [_describe_field(name, field) for name, field in Pattern.model_fields.items() if name != "name"]


def validate(config: str | Path, model: ArchFacts | None = None) -> tuple[str, ...]:
    """Load and resolve a config, for `model` where it is given; one line for each run of layers that are alike.

    Raises:
        SparsekitError: what is wrong with it.
    """
    from sparsekit.config import format_range, load
    from sparsekit.config.costs import facts_for

    loaded = load(config)
    resolved = loaded.resolve(facts_for(loaded, model))
    own = resolved.own_layers(model)
    runs: list[tuple[str, list[int]]] = []
    before, words = None, ""
    for layer in resolved.layers:
        # Words may hold thousands of numbers: those of layers that are alike are made once.
        if before is None or replace(layer, layer=before.layer) != before:
            before, words = layer, layer.in_words
        what = f"its own attention ({own[layer.layer]})" if layer.layer in own else words
        if not runs or runs[-1][0] != what:
            runs.append((what, []))
        runs[-1][1].append(layer.layer)
    return tuple(f"layer{'s' if len(layers) > 1 else ''} {format_range(layers)}: {what}" for what, layers in runs)


def doctor() -> dict[str, Any]:
    """What is installed, which devices there are, what runs on each and why, on which kinds of device the kernels were
    proved, and what is missing with its fix."""
    import platform

    from sparsekit import __version__
    from sparsekit.kernels.device import TARGETS

    return {
        "versions": {
            "sparsekit": __version__,
            "python": platform.python_version(),
            **{p: _version(p) for p in PACKAGES},
        },
        "devices": [_describe_device(device) for device in _devices()],
        "targets": [target._asdict() for target in TARGETS],
        "models": named_models(),
        "missing": _missing(),
    }


def named_models() -> list[dict[str, Any]]:
    """The models that have a name here: facts, what is installed of them, and the command that installs the rest.

    `installed` also holds of one whose parts are gone but which is in the cache, de-quantised (`converted`).
    """
    from sparsekit.models import EMBEDDED, is_converted, parts_found

    rows = []
    for name, model in EMBEDDED.items():
        found, converted = parts_found(name), is_converted(name)
        there = sum(file is not None for file in found.values())
        rows.append(
            {
                "name": name,
                "title": model.title,
                "layers": model.facts.num_layers,
                "heads": model.facts.num_heads,
                "key_heads": model.facts.num_key_heads,
                "head_dim": model.facts.head_dim,
                "positions": model.max_positions,
                "download_bytes": model.size_bytes,
                "parts": len(found),
                "parts_installed": there,
                "converted": converted,
                "installed": converted or there == len(found),
                "install": model.install,
            }
        )
    return rows


# ---- pieces


def _describe_field(name: str, field: Any) -> dict[str, Any]:
    required = field.is_required()
    return {
        "name": name,
        "default": None if required else field.get_default(call_default_factory=True),
        "required": required,
        "meaning": field.description or "",
        "range": _range_of(field.metadata),
    }


def _range_of(metadata: Sequence[Any]) -> str:
    """Bounds as pydantic holds them: `>= 1`, `at least 1 item`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [f"{sign} {getattr(item, key)}" for item in metadata for key, sign in signs.items() if hasattr(item, key)]
    counts = [f"at least {item.min_length} item" for item in metadata if hasattr(item, "min_length")]
    return ", ".join([*bounds, *counts])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[Any]:
    import torch

    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def _describe_device(device: Any) -> dict[str, Any]:
    """The implementation that runs on a device, and why each other one does or does not."""
    import platform

    import torch

    from sparsekit.kernels import IMPLEMENTATIONS, choose_device

    capability = None
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    chosen, why = choose_device(device)
    implementations = {impl: _can_run(device, impl) for impl in IMPLEMENTATIONS}
    implementations[chosen] = "runs by default"
    return {
        "device": str(device),
        "name": name,
        "compute_capability": capability,
        "implementation": chosen,
        "why": why,
        "implementations": implementations,
    }


def _can_run(device: Any, impl: str) -> str:
    from sparsekit.kernels import choose

    try:
        choose(device, impl)
    except SparsekitError as error:
        return str(error)
    return "can run"


def _missing() -> list[dict[str, str]]:
    """Optional parts that are not installed: what for, and the command that brings them."""
    needs = [
        ("matplotlib", "pictures", "pip install 'sparsekit-attention[plots]'"),
        ("plotly", "reports", "pip install 'sparsekit-attention[report]'"),
        ("lm_eval", "tasks of lm-eval", "pip install 'sparsekit-attention[eval]'"),
        ("optuna", "sweeps that search", "pip install 'sparsekit-attention[optuna]'"),
        ("ray", "sweeps on a cluster", "pip install 'sparsekit-attention[ray]'"),
        ("gguf", "the named models", "pip install 'sparsekit-attention[demo]'"),
        ("accelerate", "the named models", "pip install 'sparsekit-attention[demo]'"),
    ]
    if sys.platform == "linux":
        needs.append(("triton", "the GPU kernel", "pip install triton"))
    missing = [{"what": name, "for": use, "fix": fix} for name, use, fix in needs if find_spec(name) is None]
    models = [model for model in named_models() if not model["installed"]]
    use = {"smollm2-135m": "the demo"}
    return missing + [
        {"what": model["name"], "for": use.get(model["name"], "the evidence"), "fix": model["install"]}
        for model in models
    ]
