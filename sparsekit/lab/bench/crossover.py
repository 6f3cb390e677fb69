"""`sparsekit bench crossover`: from which prompt length patterns and configs are faster than dense attention, measured
into the table that `dense_below_tokens: auto` reads.
"""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import torch
import typer

from sparsekit.call.caches import clear_caches
from sparsekit.call.geometry import MAX_TOKENS
from sparsekit.config import LayerPatterns, ModelFacts, SparseConfig, load
from sparsekit.config.ranges import MOST
from sparsekit.config.settle import Machine, fingerprint, settle
from sparsekit.errors import SparsekitError, named_path, nearest, shown, writable, writing
from sparsekit.lab.bench.crossover_layers import Kind, Layers, attends, dense_calls, layers_of
from sparsekit.lab.bench.dynamic import DTYPES
from sparsekit.lab.bench.dynamic_rows import Setting, check_size, checked
from sparsekit.lab.bench.inputs import Inputs, structured
from sparsekit.lab.bench.shapes import SHAPES
from sparsekit.lab.bench.timing import Record, rounds, spread
from sparsekit.lab.options import Device, Dtype, device_of, numbers_of, patterns_of
from sparsekit.lab.provenance import place
from sparsekit.models import check_device, tiny
from sparsekit.models import facts as model_facts
from sparsekit.patterns import DynamicPattern, Pattern, parse_pattern, pattern_class, pattern_names
from sparsekit.patterns.crossover import Crossover, Measured, device_name, faster_from, own_table, read_table, subject

__all__ = ["bench_crossover", "command"]

DEFAULT_SHAPE = "llama-3.1-8b"
LENGTHS = {"cuda": (4096, 8192, 16384, 32768), "cpu": (1024, 2048, 4096)}
Size = tuple[int, int, int]  # heads, key heads, head size


@dataclass
class _Subject:
    """A pattern alone in a layer, or a config, and what was measured of it."""

    label: str
    key: dict[str, Any]  # of its row: {"pattern": ...} or {"config": ...}
    layers: Layers
    size: Size
    measured: list[Measured] = field(default_factory=list)
    failed: str = ""


def bench_crossover(
    configs: Sequence[str | SparseConfig] = (),
    *,
    patterns: Sequence[Pattern | str | Mapping[str, Any]] | None = None,
    model: str | None = None,
    shape: str | None = None,
    heads: int | None = None,
    key_heads: int | None = None,
    dim: int | None = None,
    lengths: Sequence[int] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    repeat_ms: float = 100,
    seed: int = 0,
    table: Path | str | None = None,
    out: Path | str | None = None,
    show: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure single attention layers, and write what follows into a table.

    A pattern is faster at a length where its layer is faster than the fastest dense kernel, by more than both spread:
    its 80th percentile is below the dense one's 20th. A dynamic pattern plans in every call; a static one's plan is
    there, as in all layers of a prompt but the first.

    A config is faster where the layers that it makes sparse are, added up: each kind of layer as often as there are
    such, and once what a kind costs more where nothing is kept from prompts before (its plan, its lists of work).
    Layers that it leaves dense are the same on both sides; those with a window, or of another kind, are left out. A
    pattern in it runs dense below its own `dense_below_tokens`, as in use, and its `auto` is what the tables say so
    far: measure patterns first. The config's own is not looked at.

    The crossover is the least length from which all longer ones are faster.

    Args:
        configs: files, or `SparseConfig`s.
        patterns: as in YAML, or a Pattern. Default: without configs all that need no parameter, else none.
        model: whose facts `configs` are resolved with, as `sparsekit.models.facts` takes it.
        shape: the same, one of `sparsekit.lab.bench.shapes.SHAPES`. Default: what each config says of its model, and
            llama-3.1-8b where there is no config.
        heads, key_heads, dim: of the patterns' layer, in place of the shape's; not with configs.
        lengths: prompt lengths, tokens; default `LENGTHS`.
        dtype, device: default bfloat16 and the GPU, or float32 and the CPU.
        repeat_ms: about so long each call is repeated, in three rounds that alternate with the others'.
        seed: of the inputs, which are `sparsekit.lab.bench.inputs.structured`.
        table: the table to write, default the user's own: rows of the same are replaced, others stay.
        out: JSONL file for the rows.
        show: called with each row's line.

    Returns:
        One dict a row; `case` is "correctness", "dense", "layer", "crossover", or "failed".

    Raises:
        SparsekitError: an unknown pattern, shape, device or dtype, a config for another model, a table that is none.
    """
    if device is not None:
        check_device(device)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    if dtype not in DTYPES:
        raise SparsekitError(f"dtype={dtype!r}: one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    lengths = LENGTHS.get(where.type, LENGTHS["cpu"]) if lengths is None else lengths
    if not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
        raise SparsekitError(f"lengths={list(lengths)}: at least one prompt length, each once and of 1 token or more.")
    if max(lengths) > MAX_TOKENS:
        raise SparsekitError(f"lengths={list(lengths)}: a prompt has at most {MAX_TOKENS:,} tokens.")
    if not 0 < repeat_ms < math.inf:
        raise SparsekitError(f"repeat_ms={repeat_ms}: more than 0, and finite.")
    path = own_table() if table is None else named_path(table, "crossover table")
    machine = Machine(device_name(where), dtype)
    base, own_size = _facts(model, shape), (heads, key_heads, dim)
    if configs and own_size != (None, None, None):
        raise SparsekitError("heads, key_heads and dim are of patterns; a config's are those of its model.")
    of_configs = [_config(config, i, base, machine) for i, config in enumerate(configs)]
    sizes = list(dict.fromkeys(one.size for one in of_configs)) or [
        _size(base or _facts(None, DEFAULT_SHAPE), *own_size)
    ]
    if patterns is None:
        patterns = [] if configs else _all_patterns()
    alone = [_pattern(parse_pattern(pattern, "patterns"), size) for size in sizes for pattern in patterns]
    subjects = [*alone, *of_configs]
    if not subjects:
        raise SparsekitError("patterns: at least one, or a config.")
    _check_table(path)
    say = show or (lambda line: None)
    element, setting = getattr(torch, dtype), Setting(where, None, repeat_ms)
    with torch.no_grad(), Record(out, {"dtype": dtype, "seed": seed, **place(where)}) as record:
        for row in _correctness(subjects, element, setting):
            record.add(row)
            if row["case"] == "failed":
                say(f"failed: {row['label']}: {row['why']}")
        for size in dict.fromkeys(one.size for one in subjects):
            for tokens in lengths:
                head, key, d = size
                own = [one for one in subjects if one.size == size]
                for row in _length(tokens, size, own, setting, seed=seed, dtype=element):
                    record.add({**row, "heads": head, "key_heads": key, "dim": d})
                    say(_line(record.rows[-1]))
                gc.collect()
        by = {name: record.place[name] for name in ("sparsekit", "torch", "triton", "date")}
        made = [_row(one, machine, by) for one in subjects if not one.failed and one.measured]
        for found in made:
            record.add({"case": "crossover", **found.model_dump(mode="json", exclude={"by", "device", "dtype"})})
            say(_line(record.rows[-1]))
    if made:
        kept = {row.key: row for row in (*_rows_in(path), *made)}  # others may have written meanwhile
        with writing(path, "crossover table") as part:
            part.write_text("".join(f"{_text(row)}\n" for row in kept.values()), encoding="utf-8")
    return record.rows


def _rows_in(path: Path) -> tuple[Crossover, ...]:
    """Of a table that may not be there yet. A pipe is only written."""
    return read_table(path) if path.is_file() or path.is_dir() else ()


def _check_table(path: Path) -> None:
    """That it can be read and its folder written, before anything is measured."""
    _rows_in(path)
    if path.is_file() or not path.exists():
        with writable(path, "crossover table"):
            path.parent.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=path.resolve().parent).close()


# ---- what is measured


def _facts(model: str | None, shape: str | None) -> ModelFacts | None:
    """Of the model, or of a shape; None: neither is given."""
    if model is not None:
        if shape is not None:
            raise SparsekitError(f"model = {model!r} and shape = {shape!r}: one of them.")
        return model_facts(model)
    if shape is None:
        return None
    if shape not in SHAPES:
        raise SparsekitError(f"shape {shape!r} is not one of {', '.join(SHAPES)}.{nearest(shape, SHAPES)}")
    fields = SHAPES[shape]
    if not fields:
        return model_facts(tiny()).model_copy(update={"name": shape})
    count = fields["num_attention_heads"]
    return ModelFacts(
        name=shape, num_layers=fields["num_hidden_layers"], num_heads=count, hidden_size=fields["hidden_size"],
        num_key_heads=fields["num_key_value_heads"], head_dim=fields.get("head_dim", fields["hidden_size"] // count),
    )  # fmt: skip


def _size(
    facts: ModelFacts | None, heads: int | None = None, key_heads: int | None = None, dim: int | None = None
) -> Size:
    """Heads, key heads and head size of a model's layers, or those given."""
    assert facts is not None
    if facts.layer_heads is not None:
        raise SparsekitError(f"{facts.name}: its layers differ in their heads; one head shape is measured.")
    found = []
    for name, given, of_model in (("heads", heads, "num_heads"), ("key_heads", key_heads, "num_key_heads"),
                                  ("dim", dim, "head_dim")):  # fmt: skip
        value = getattr(facts, of_model) if given is None else given
        if value is None:
            raise SparsekitError(
                f"model.{of_model} of {facts.name or 'the config'} is not known; give --shape or --model."
            )
        if not 1 <= value <= MOST:
            raise SparsekitError(f"{name}={shown(value)}: it should be from 1 to {MOST:,}.")
        found.append(value)
    if found[0] % found[1]:
        raise SparsekitError(f"heads={found[0]}, key_heads={found[1]}: heads are a multiple of key heads.")
    return found[0], found[1], found[2]


def _all_patterns() -> list[Pattern]:
    """Those that need no parameter."""
    names = (name for name in pattern_names() if name != "dense")
    return [parse_pattern(name) for name in names
            if not any(info.is_required() for info in pattern_class(name).model_fields.values())]  # fmt: skip


def _pattern(pattern: Pattern, size: Size) -> _Subject:
    given = pattern.to_yaml()
    label = given if isinstance(given, str) else ", ".join(
        str(value) if key == "name" else f"{key} {value}" for key, value in given.items() if key != "dense_below_tokens"
    )  # fmt: skip
    if pattern.name == "dense":
        raise SparsekitError("patterns: dense is what the others are measured against.")
    key = {"pattern": subject(pattern.model_dump(mode="json"))}
    if isinstance(pattern, DynamicPattern):
        pattern = pattern.model_copy(update={"dense_below_tokens": 0})
    layer = LayerPatterns(0, (pattern,), (0,) * size[0])
    return _Subject(label, key, Layers(Counter([Kind(layer)])), size)


def _config(source: str | SparseConfig, number: int, base: ModelFacts | None, machine: Machine) -> _Subject:
    config, label = load(source), source if isinstance(source, str) else f"config {number}"
    facts = config.model
    if base is not None:
        missing = (name for name in ModelFacts.model_fields if getattr(base, name) is None)
        facts = base.model_copy(update={name: getattr(config.model, name) for name in missing})
    try:
        without = config.model_copy(update={"dense_below_tokens": 0}).resolve(facts)
        resolved = settle(without, facts, lambda: machine)
        return _Subject(label, {"config": fingerprint(resolved, facts)}, layers_of(resolved, facts), _size(facts))
    except SparsekitError as error:
        raise SparsekitError(f"{label}: {error}") from None


def _correctness(subjects: Sequence[_Subject], dtype: torch.dtype, setting: Setting) -> Iterator[dict[str, Any]]:
    """A row for each pattern; what holds one that is wrong is not measured."""
    seen: dict[Any, dict[str, float]] = {}
    done: dict[tuple[Pattern, Size], dict[str, Any]] = {}
    for one in subjects:
        size = check_size(*one.size)
        for pattern in (p for kind in one.layers.sparse for p in kind.patterns if p.name != "dense"):
            given = pattern.of_heads(range(size[0])).to_yaml()
            part = parse_pattern(given if isinstance(given, str) else subject(given))  # from which length: no matter
            if (part, size) not in done:
                done[part, size] = row = checked(part, part, size, dtype, setting, seen)
                yield row
            if done[part, size]["case"] == "failed":
                one.failed = done[part, size]["why"]


# ---- one length


def _length(
    tokens: int, size: Size, subjects: Sequence[_Subject], setting: Setting, *, seed: int, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """Rows of one length. One that does not fit into memory is said, and what was measured at others stays."""
    head, key, d = size
    try:
        x = structured(tokens, heads=head, key_heads=key, dim=d, seed=seed, device=setting.device, dtype=dtype)
        yield from _measured(x, subjects, setting)
    except RuntimeError as error:
        why = f"{tokens:,} tokens: {str(error).strip().splitlines()[0]}"
        yield {"case": "failed", "label": "dense attention", "tokens": tokens, "why": why}


def _measured(x: Inputs, subjects: Sequence[_Subject], setting: Setting) -> Iterator[dict[str, Any]]:
    """Rows of one length. Everything at it is timed in the same rounds."""
    calls: dict[tuple[str, Any], Callable[[], Any]] = {("dense", name): call for name, call in dense_calls(x).items()}
    for one in subjects:
        for kind in one.layers.sparse if not one.failed else ():
            if ("layer", kind) not in calls:
                try:
                    call = attends(kind, x)
                    call()
                except (
                    SparsekitError,
                    RuntimeError,
                ) as error:  # the others are measured, and the row says what happened
                    one.failed = f"{x.tokens:,} tokens: {str(error).strip().splitlines()[0]}"
                    yield {"case": "failed", "label": one.label, "tokens": x.tokens, "why": one.failed}
                    break
                calls["layer", kind] = call
            if kind.anchor is None and "config" in one.key:
                calls["first", kind] = _first(calls["layer", kind])
    times = {name: spread(ms) for name, ms in zip(
        calls, rounds(list(calls.values()), setting.device, setting.repeat_ms), strict=True)}  # fmt: skip
    dense = {name: ms for (case, name), ms in times.items() if case == "dense"}
    fastest = min(dense, key=lambda name: dense[name]["ms"])
    for name, ms in dense.items():
        yield {"case": "dense", "impl": name, "tokens": x.tokens, **ms}
    for (case, kind), ms in times.items():
        if case == "layer":
            first = times.get(("first", kind), {})
            more = {f"first_{name}": value for name, value in first.items()}
            ratio = round(dense[fastest]["ms"] / ms["ms"], 4)
            said = {"case": "layer", "layer": kind.layer.in_words, "tokens": x.tokens}
            yield {**said, **ms, **more, "times_dense": ratio}
    for one in subjects:
        if not one.failed:
            one.measured.append(_compared(one, x.tokens, fastest, dense, times))


def _first(call: Callable[[], Any]) -> Callable[[], Any]:
    def first() -> Any:
        clear_caches()
        return call()

    return first


def _compared(
    one: _Subject, tokens: int, fastest: str, dense: Mapping[str, Mapping[str, float]], times: Mapping[Any, Any]
) -> Measured:
    """A subject beside dense attention in all of its layers."""
    best, ours = dense[fastest], list(dense.values())[-1]
    middle = high = 0.0  # of the layers that it changes
    for kind, count in one.layers.sparse.items():
        ms, first = times["layer", kind], times.get(("first", kind)) if "config" in one.key else None
        middle, high = middle + count * ms["ms"], high + count * ms["ms_p80"]
        if first is not None:
            middle, high = middle + max(first["ms"] - ms["ms"], 0), high + max(first["ms_p80"] - ms["ms"], 0)
    middle, high = middle + one.layers.kernel * ours["ms"], high + one.layers.kernel * ours["ms_p80"]
    changed = one.layers.count - one.layers.own
    whole = one.layers.own * best["ms"] + middle
    ratio = round(one.layers.count * best["ms"] / whole, 4) if whole else 1.0
    return Measured(tokens=tokens, dense=fastest, times_dense=ratio, faster=high < changed * best["ms_p20"])


# ---- what is written


def _row(one: _Subject, machine: Machine, by: dict[str, str | None]) -> Crossover:
    head, key_heads, dim = one.size
    measured = sorted(one.measured, key=lambda at: at.tokens)
    return Crossover(
        device=machine.device, heads=head, key_heads=key_heads, dim=dim, dtype=machine.dtype, label=one.label,
        faster_from_tokens=faster_from(measured), measured=measured, by=by, **one.key,
    )  # fmt: skip


def _text(row: Crossover) -> str:
    left_out = {name for name in ("pattern", "config") if getattr(row, name) is None}
    return json.dumps(row.model_dump(mode="json", exclude=left_out))  # ASCII: a label may hold what ends a line


def _line(row: Mapping[str, Any]) -> str:
    if row["case"] == "crossover":
        least = row["faster_from_tokens"]
        said = "at none of these lengths" if least is None else f"from {least:,} tokens"
        ratios = ", ".join(f"{one['tokens']:,}: {one['times_dense']:.2f} x" for one in row["measured"])
        return f"{row['label']}: faster {said} ({ratios})"
    if row["case"] == "failed":
        return f"failed: {row['label']}: {row['why']}"
    name = f"dense ({row['impl']})" if row["case"] == "dense" else row["layer"]
    ratio = f"{row['times_dense']:6.2f} x  " if "times_dense" in row else " " * 10
    return f"{row['tokens']:>9,} tokens  {row['ms']:10.3f} ms  {ratio}{name}"


def command(
    configs: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG]...", help="YAML files.")] = None,
    patterns: Annotated[
        str | None,
        typer.Option(help="Comma-separated: names, or mappings as in YAML; default all, or with configs none."),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens", "-n", help="Prompt lengths, comma-separated; default 4096 to 32768, on a CPU to 4096."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="As for `explain`: whose facts configs get.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="The same, by a shape: llama-3.1-8b, llama-3.2-1b, ...")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads of the patterns' layer.")] = None,
    key_heads: Annotated[int | None, typer.Option(min=1, help="Key heads.")] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Head size.")] = None,
    dtype: Dtype = None,
    device: Device = "auto",
    repeat_ms: Annotated[float, typer.Option(help="Of each call.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    table: Annotated[
        Path | None, typer.Option("--output", "-o", help="Table to write; default your own, which `auto` reads first.")
    ] = None,
    rows: Annotated[Path | None, typer.Option("--rows", help="JSONL file for all times.")] = None,
) -> None:
    """From which length patterns and configs beat dense attention: the table of `dense_below_tokens: auto`."""
    found = bench_crossover(
        configs or [], patterns=None if patterns is None else patterns_of(patterns), model=model, shape=shape,
        heads=heads, key_heads=key_heads, dim=dim, lengths=None if tokens is None else numbers_of(tokens, "--tokens"),
        dtype=dtype, device=device_of(device), repeat_ms=repeat_ms, seed=seed, table=table, out=rows, show=typer.echo,
    )  # fmt: skip
    if any(row["case"] == "failed" for row in found):
        raise typer.Exit(1)
