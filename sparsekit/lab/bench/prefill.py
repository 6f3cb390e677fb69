"""`sparsekit bench prefill`: time to the first token and peak memory of configs, against the untouched model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

from sparsekit.config import SparseConfig, load
from sparsekit.errors import SparsekitError, nearest
from sparsekit.lab.bench.inputs import structured
from sparsekit.lab.bench.reading import (
    WARM_TOKENS,
    Given,
    chunks_of,
    read_at_once,
    read_in_chunks,
    static_cache,
    warm_up_chunks,
)
from sparsekit.lab.bench.shapes import model_or_shape
from sparsekit.lab.bench.timing import Record, spread
from sparsekit.lab.options import Device, Dtype, Lengths, Model, Rows, Shape, device_of, numbers_of
from sparsekit.lab.progress import progress
from sparsekit.lab.provenance import place
from sparsekit.models import facts as model_facts
from sparsekit.patch import Handle, apply

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["bench_prefill", "command"]

STOCK = "untouched"
ATTENDS = ("weights", "structured")
WHOLE_TOKENS = 131072  # longer prompts are not read by the untouched model before it is timed


@torch.inference_mode()
def bench_prefill(
    configs: Sequence[str | SparseConfig],
    *,
    model: PreTrainedModel | str | None = None,
    shape: str | None = None,
    lengths: Sequence[int] = (8192, 32768, 131072),
    rounds: int = 2,
    chunk_tokens: int | None = None,
    baseline: bool = True,
    attends: str = "weights",
    fused: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    out: Path | str | None = None,
    show: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """A row for each length and config, and one for the untouched model: a prompt into a fresh cache, one token out.

    The prompt is random tokens. Weights of a `shape` are random too: what static patterns cost does not depend on that,
    but a dynamic pattern selects by what it reads, so time those with real weights, or over `structured` inputs.

    Args:
        configs: files, or `SparseConfig`s.
        model: loaded, or what `sparsekit.models.load` takes; default: random weights of `shape`.
        shape: one of `sparsekit.lab.bench.shapes.SHAPES`; default llama-3.2-1b on a CUDA device, else smollm2-135m.
        lengths: of the prompt, tokens.
        rounds: in each every config reads the prompt once. Before them, not timed, every config reads it too, and so
            does the untouched model, but of more than 131,072 tokens the first 8,192; in chunks it reads some of the
            first, and a config a few at the ends of some, one of each kind for which kernels are compiled.
        chunk_tokens: the prompt comes in chunks of so many tokens, into a StaticCache, and its end is told
            (`Handle.prompt`). transformers' SDPA then gets a mask of chunk x N in every layer that is the model's own,
            the untouched model's among them, which is slow and large: `dense_impl: kernel` runs dense layers without.
        baseline: read with the untouched model too; without, no row is `faster` than anything.
        attends: what attention is given: "weights", the layers' own q and k; or "structured", those of heads with the
            structure of real ones (`sparsekit.lab.bench.inputs.structured`), the same in every layer. All else runs as
            it is. Random weights attend flatly, and so tell a dynamic pattern to keep everything.
        fused: norms, rotary embedding and gated MLP by Liger-Kernel in every reading, the untouched model's too. It
            replaces them for the rest of the process, and of a model that is loaded here alone.
        dtype, device: default bfloat16 and the GPU, or float32 and the CPU.
        out: JSONL file for the rows.
        show: called with each row's line.

    Returns:
        `config`, `tokens`, `ms` (median, p20, p80), `faster` (the untouched model's median over this one's),
        `tile_density` (visited tiles over dense attention's, of all chunks; mean over the layers that do not keep their
        own), `sparse_layers`, of the last reading `plan_ms` (of all plans together) and `plan_bytes` (of the largest);
        on a CUDA device `peak_bytes`, all that the process held at its highest, weights included. In chunks
        `chunk_tokens` and `cache_bytes`.

    Raises:
        SparsekitError: an unknown shape, a config that does not fit the model, or `fused` or "structured" where it
            cannot be.
    """
    if not configs or not lengths or min(lengths) < 1 or rounds < 1:
        raise SparsekitError(
            f"{len(configs)} configs, lengths = {list(lengths)}, rounds = {rounds}: at least one of each, and "
            "no length below 1 token."
        )
    if chunk_tokens is not None and not (isinstance(chunk_tokens, int) and chunk_tokens >= 1):
        raise SparsekitError(f"chunk_tokens = {chunk_tokens}: a whole number from 1, or None for the prompt at once.")
    if attends not in ATTENDS:
        raise SparsekitError(f"attends = {attends!r} is not one of {', '.join(ATTENDS)}.{nearest(attends, ATTENDS)}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    release = _liger(model, where) if fused else None
    turns: list[tuple[str, SparseConfig | None]] = [(STOCK, None)] * baseline
    turns += [(str(config) if isinstance(config, str) else f"config {i}", load(config))
              for i, config in enumerate(configs)]  # fmt: skip
    labels = [label for label, _ in turns]
    for label in labels:
        if labels.count(label) > 1:
            raise SparsekitError(f"configs: {label} stands twice; name each config once.")
    name, found = model_or_shape(model, shape, dtype, where)
    vocab = found.config.get_text_config().vocab_size
    dtype = str(found.dtype).removeprefix("torch.")
    facts = {"case": "prefill", "model": name, "dtype": dtype, "rounds": rounds, "attends": attends}
    if release is not None:
        _fuse(found)
        facts["layers"] = f"liger-kernel {release}"
    if chunk_tokens is not None:
        facts["chunk_tokens"] = chunk_tokens
    with Record(out, place(where)) as record:
        for tokens in lengths:
            prompt = torch.randint(3, vocab, (1, tokens), generator=torch.Generator().manual_seed(0)).to(where)
            given = None if attends == "weights" else _given(found, tokens, chunk_tokens)
            times: dict[str, list[float]] = {label: [] for label, _ in turns}
            seen: dict[str, dict[str, Any]] = {}
            for _, config in reversed(turns):  # the untouched model last: its memory is there then
                with nullcontext() if config is None else apply(found, config) as handle:
                    _warm_up(found, prompt, chunk_tokens, handle, given)
            for _ in range(rounds):
                for label, config in turns:
                    with nullcontext() if config is None else apply(found, config) as handle:
                        if chunk_tokens is None:
                            ms, seen[label] = read_at_once(found, prompt, handle, given)
                        else:
                            ms, seen[label] = _in_chunks(
                                label, found, prompt, chunk_tokens, handle, given, quiet=show is None
                            )
                    times[label].append(ms)
            for label, all_ms in times.items():
                row = {**facts, "config": label, "tokens": tokens, **spread(all_ms), **seen[label]}
                if baseline:
                    row["faster"] = round(spread(times[STOCK])["ms"] / row["ms"], 4)
                record.add(row)
                if show is not None:
                    show(_line(row))
    return record.rows


def _liger(model: PreTrainedModel | str | None, device: torch.device) -> str:
    """Liger-Kernel's release.

    Raises:
        SparsekitError: it is not installed or has no GPU, or the model's layers would stay replaced after this.
    """
    if model is not None and not isinstance(model, str):
        raise SparsekitError("fused = True: of a model that is loaded here; give its name, or fuse your own before.")
    if device.type != "cuda":
        raise SparsekitError(f"fused = True on {device}: Liger-Kernel runs on a GPU.")
    try:
        return version("liger-kernel")
    except PackageNotFoundError:
        raise SparsekitError("fused = True needs Liger-Kernel: pip install liger-kernel") from None


def _fuse(model: PreTrainedModel) -> None:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # it would do nothing, and say so in a log
        raise SparsekitError(f"fused = True: Liger-Kernel has no layers of {kind}.")
    apply_liger_kernel(model, None)


def _given(model: PreTrainedModel, tokens: int, chunk_tokens: int | None) -> tuple[Tensor, Tensor]:
    """Structured q (1, H, N, D) and k (1, G, N, D) of the model's heads.

    Raises:
        SparsekitError: its layers differ in their heads, or a chunk would find fewer keys than N in a cache.
    """
    arch = model_facts(model)
    if arch.num_key_heads is None or arch.head_dim is None or arch.layer_heads is not None:
        raise SparsekitError(f"attends = 'structured': layers of {arch.name} differ in their heads.")
    if chunk_tokens is not None and any(static_cache(model, tokens).is_sliding):
        raise SparsekitError(
            f"attends = 'structured' with chunk_tokens = {chunk_tokens}: sliding layers of {arch.name} hold a "
            "window of keys alone; read the prompt at once, or with attends = 'weights'."
        )
    made = structured(
        tokens, heads=arch.num_heads, key_heads=arch.num_key_heads, dim=arch.head_dim, device=model.device,
        dtype=model.dtype,
    )  # fmt: skip
    return made.q, made.k


def _warm_up(
    model: PreTrainedModel, prompt: Tensor, chunk_tokens: int | None, handle: Handle | None, given: Given
) -> None:
    """A reading that nobody times: what it compiles and the memory it takes are there for the next.

    The untouched model too compiles at a new length, where PyTorch's attention is cuDNN's: for less than a second.
    """
    if chunk_tokens is not None:
        warm_up_chunks(model, prompt, chunk_tokens, handle, given)
        return
    tokens = prompt.shape[1]
    rows = tokens if handle is not None or tokens <= WHOLE_TOKENS else WARM_TOKENS
    read_at_once(model, prompt[:, :rows], handle, given and (given[0][:, :, :rows], given[1][:, :, :rows]))


def _in_chunks(
    label: str, model: PreTrainedModel, prompt: Tensor, chunk_tokens: int, handle: Handle | None, given: Given,
    *, quiet: bool,
) -> tuple[float, dict[str, Any]]:  # fmt: skip
    """`read_in_chunks`, with its progress on stderr."""
    tokens = prompt.shape[1]
    with progress(label, len(chunks_of(tokens, chunk_tokens)), quiet=quiet) as bar:

        def step(end: int, ms: float) -> None:
            bar(1, count=f"{end:,} of {tokens:,} tokens")
            bar.says(f"{label}: {end:,} of {tokens:,} tokens, the last chunk in {ms:,.0f} ms")

        return read_in_chunks(model, prompt, chunk_tokens, handle, given, step)


def _line(row: dict[str, Any]) -> str:
    memory = f", peak {row['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in row else ""
    plans = f", plans {row['plan_ms']:.2f} ms" if "plan_ms" in row else ""
    faster = f"{row['faster']:.3f} x  " if "faster" in row else ""
    return (
        f"{row['tokens']:>9,} tokens  {row['ms']:10.1f} ms  {faster}"
        f"tile density {row['tile_density']:.3f}{plans}{memory}  {row['config']}"
    )


def command(
    configs: Annotated[list[str], typer.Argument(metavar="CONFIG...", help="YAML files.")],
    tokens: Lengths = "8192,32768,131072",
    rounds: Annotated[int, typer.Option(min=1, help="Timed readings of each.")] = 2,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="The prompt in chunks of so many tokens; default at once.")
    ] = None,
    baseline: Annotated[bool, typer.Option(help="Time the untouched model too.")] = True,
    model: Model = None,
    shape: Shape = None,
    attends: Annotated[
        str, typer.Option(help="weights: the layers' own q and k; structured: those of real heads, in their place.")
    ] = "weights",
    fused: Annotated[
        bool, typer.Option("--fused", help="Norms, rotary embedding and MLP by Liger-Kernel, in all readings.")
    ] = False,
    dtype: Dtype = None,
    device: Device = "auto",
    output: Rows = None,
) -> None:
    """Time to the first token and peak memory of configs, against the untouched model, in one run."""
    bench_prefill(
        configs, model=model, shape=shape, lengths=numbers_of(tokens, "--tokens"), rounds=rounds,
        chunk_tokens=chunk_tokens, baseline=baseline, attends=attends, fused=fused, dtype=dtype,
        device=device_of(device), out=output, show=typer.echo,
    )  # fmt: skip
