"""Dynamic patterns, measured: what they keep, what they lose, what estimating costs; correctness first.

    sparsekit bench dynamic --tokens 8192,32768 -o docs/results/dynamic.jsonl

Each method stands beside PyTorch's dense attention (cuDNN's, on a CUDA device), our own dense, and, where a folder with
it is given, its authors' code: the same inputs, one run, one device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsekit.config.ranges import MOST
from sparsekit.errors import SparsekitError, nearest, shown
from sparsekit.kernels import choose_device
from sparsekit.kernels.choose import FAMILIES
from sparsekit.lab.bench.dynamic_rows import Setting, check_size, checked, given_of, rows_of
from sparsekit.lab.bench.inputs import Inputs, captured, load_inputs, structured
from sparsekit.lab.bench.oracle import oracle
from sparsekit.lab.bench.peers import load_peers
from sparsekit.lab.bench.timing import Record
from sparsekit.lab.provenance import place
from sparsekit.models import EMBEDDED
from sparsekit.patterns import DynamicPattern, Pattern, parse_pattern, pattern_class, pattern_names

__all__ = ["DTYPES", "LENGTHS", "bench_dynamic"]

LENGTHS = {"cuda": (8192, 16384, 32768, 131072), "cpu": (2048,)}
PLAN_ONLY_LENGTHS = (1 << 20,)
DTYPES = ("bfloat16", "float16", "float32")


def bench_dynamic(
    *,
    methods: Sequence[Pattern | str | Mapping[str, Any]] | None = None,
    lengths: Sequence[int] | None = None,
    inputs: Sequence[str] = ("structured",),
    layers: Sequence[int] | None = None,
    prompt: Path | str | None = None,
    heads: int = 32,
    key_heads: int = 8,
    dim: int = 128,
    dtype: str | None = None,
    device: str | None = None,
    impl: str | None = None,
    seed: int = 0,
    sweep: bool = False,
    plan_only: bool = False,
    peers: Path | str | None = None,
    repeat_ms: float = 200,
    with_oracle: bool = False,
    out: Path | str | None = None,
    show: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure dynamic patterns.

    Args:
        methods: patterns, as a Pattern, a name (measured at its `bench_points`), or a mapping as in YAML. Default all
            dynamic patterns.
        lengths: prompt lengths, tokens; of structured inputs and of captured prompts.
        inputs: "structured"; a model, whose q, k and v are captured; or a `.safetensors` file of captured ones.
        layers: of the model, default all. prompt: a text file for it to read, default a four-key needle prompt.
        heads, key_heads, dim: of structured inputs.
        dtype: default bfloat16 on a CUDA device, float32 elsewhere.
        device: default the CUDA device where there is one.
        impl: the attention kernel, as `attend` takes it.
        sweep: vary the main knob of each method (its `sweep_points`).
        plan_only: select and measure that alone, without attention; by default at 2^20 tokens.
        peers: a folder with a `peers.py` (docs/results): the methods' own code, timed in the same rounds.
        repeat_ms: about so long each call is repeated, in three rounds that alternate with the others'. 0: no times.
        with_oracle: `oracle_tile_density` in each row with a recall: the least density of 128 x 128 tiles with which
            any selector could have had it.
        out: JSONL file, written row by row.
        show: gets the rows of each input when it is done.

    Returns:
        One dict a row; `case` is "correctness", "dense", "dynamic", "plan", "peer", or "failed". A method whose
        correctness fails is not timed. docs/results says what the fields mean.

    Raises:
        SparsekitError: an unknown method, input, device, dtype or impl, or a folder of peers that cannot be used.
    """
    place_on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place_on.type == "cuda" and not torch.cuda.is_available():
        raise SparsekitError(f"device={device!r}: there is no CUDA device; `sparsekit doctor` says what can run here.")
    for name, value in (("heads", heads), ("key_heads", key_heads), ("dim", dim)):
        if not 1 <= value <= MOST:
            raise SparsekitError(f"{name}={shown(value)}: it should be from 1 to {MOST:,}.")
    if impl in ("fp8", *FAMILIES["fp8"]):
        raise SparsekitError(f"impl={impl!r}: it rounds to 8 bits, and this bench holds a kernel to 16.")
    choose_device(place_on, impl)
    dtype = dtype or ("bfloat16" if place_on.type == "cuda" else "float32")
    if dtype not in DTYPES:
        raise SparsekitError(f"dtype={dtype!r}: one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    if not 0 <= repeat_ms < math.inf:
        raise SparsekitError(f"repeat_ms={repeat_ms}: 0 (no times) or more, and finite.")
    patterns = _patterns(methods, sweep)
    if not patterns:
        raise SparsekitError("methods: at least one pattern.")
    if lengths is None:
        lengths = PLAN_ONLY_LENGTHS if plan_only else LENGTHS.get(place_on.type, LENGTHS["cpu"])
    if not lengths or min(lengths) < 1:
        raise SparsekitError(f"lengths={list(lengths)}: at least one prompt length, each at least 1 token.")
    found_peers = load_peers(peers) if peers is not None else {}
    element = getattr(torch, dtype)
    known, captures = _known_inputs(inputs), {}
    for name in known:  # first, so that what cannot be loaded is told before anything is measured
        if name.endswith(".safetensors"):
            captures[name] = load_inputs(name)
        elif name != "structured":
            captures[name] = [
                one.to(torch.device("cpu"), one.q.dtype)
                for n in lengths
                for one in captured(name, n, layers=layers, seed=seed, prompt=prompt, device=place_on)
            ]

    setting = Setting(place_on, impl, repeat_ms)

    def everything() -> Iterator[Inputs]:
        for name in known:
            if name == "structured":
                for n in lengths:
                    size = {"heads": heads, "key_heads": key_heads, "dim": dim}
                    yield structured(n, seed=seed, device=place_on, dtype=element, **size)
            else:
                yield from (one.to(place_on, element) for one in captures[name])

    with torch.no_grad(), Record(out, {"dtype": dtype, "seed": seed, **place(place_on)}) as record:
        size = check_size(heads, key_heads, dim)
        if "structured" not in known:
            first = captures[known[0]][0]
            size = check_size(first.q.shape[1], first.k.shape[1], first.q.shape[3])
        good: list[Pattern] = []
        seen: dict[Any, dict[str, float]] = {}
        for pattern in patterns:
            row = checked(pattern, _swept(pattern)[0], size, element, setting, seen)
            record.add(row)
            if row["case"] == "correctness":
                good.append(pattern)
        if show is not None:
            show(record.rows[:])
        for one in everything():
            before = len(record.rows)
            best = oracle(one.q, one.k) if with_oracle else None
            for row in rows_of(one, good, found_peers, plan_only, setting):
                if best is not None and row.get("recall") is not None:
                    row["oracle_tile_density"] = round(best.tile_density(min(row["recall"], 1.0)), 6)
                record.add(row)
            if show is not None:
                show(record.rows[before:])
    return record.rows


def _patterns(methods: Sequence[Pattern | str | Mapping[str, Any]] | None, sweep: bool) -> list[Pattern]:
    found: list[Pattern] = []
    for method in pattern_names(DynamicPattern) if methods is None else methods:
        if isinstance(method, str):
            given = [parse_pattern({"name": method, **one}, "methods") for one in pattern_class(method).bench_points]
        else:
            given = [parse_pattern(method, "methods")]
        if sweep:
            given = [point for base in given[:1] for point in _swept(base)]
        found += [pattern for pattern in given if pattern not in found]
    return found


def _swept(pattern: Pattern) -> list[Pattern]:
    """The pattern with its main knob turned; itself where it names no sweep."""
    given = given_of(pattern)
    return [parse_pattern({"name": pattern.name, **given, **point}, "sweep") for point in pattern.sweep_points]


def _known_inputs(inputs: Sequence[str]) -> list[str]:
    if not inputs:
        raise SparsekitError("inputs: at least one of structured, a model, a .safetensors file.")
    names = ("structured", *EMBEDDED)
    for name in inputs:
        if name not in names and not Path(name).exists() and "/" not in name:
            raise SparsekitError(
                f"inputs={name!r}: structured, a model ({', '.join(EMBEDDED)}, a hub id, a folder), or a .safetensors "
                f"file.{nearest(name, names)}"
            )
    return list(inputs)
