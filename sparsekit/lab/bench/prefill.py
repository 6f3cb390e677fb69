"""`sparsekit bench prefill`: time to the first token and peak memory of configs, against the untouched model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

from sparsekit.config import SparseConfig, load
from sparsekit.errors import SparsekitError, nearest
from sparsekit.lab.bench.inputs import structured
from sparsekit.lab.bench.shapes import model_or_shape
from sparsekit.lab.bench.timing import Record, spread, synchronize
from sparsekit.lab.options import Device, Dtype, Lengths, Model, Rows, Shape, device_of, numbers_of
from sparsekit.lab.provenance import place
from sparsekit.models import facts as model_facts
from sparsekit.patch import apply
from sparsekit.patch.capture import wrap_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["bench_prefill", "command"]

STOCK = "untouched"
ATTENDS = ("weights", "structured")


@torch.inference_mode()
def bench_prefill(
    configs: Sequence[str | SparseConfig],
    *,
    model: PreTrainedModel | str | None = None,
    shape: str | None = None,
    lengths: Sequence[int] = (8192, 32768, 131072),
    rounds: int = 2,
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
        rounds: in each every config reads the prompt once, after one reading that is not timed.
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
        `tile_density` (visited tiles over dense attention's, mean over the layers that do not keep their own),
        `sparse_layers`, `plan_ms` (of all layers' plans together, in the last reading); on a CUDA device `peak_bytes`,
        all that the process held at its highest, weights included.

    Raises:
        SparsekitError: an unknown shape, a config that does not fit the model, or `fused` where it cannot be.
    """
    if not configs or not lengths or min(lengths) < 1 or rounds < 1:
        raise SparsekitError(
            f"{len(configs)} configs, lengths = {list(lengths)}, rounds = {rounds}: at least one of each, and "
            "no length below 1 token."
        )
    if attends not in ATTENDS:
        raise SparsekitError(f"attends = {attends!r} is not one of {', '.join(ATTENDS)}.{nearest(attends, ATTENDS)}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    release = _liger(model, where) if fused else None
    loaded = [(str(config) if isinstance(config, str) else f"config {i}", load(config))
              for i, config in enumerate(configs)]  # fmt: skip
    name, found = model_or_shape(model, shape, dtype, where)
    vocab = found.config.get_text_config().vocab_size
    dtype = str(found.dtype).removeprefix("torch.")
    facts = {"case": "prefill", "model": name, "dtype": dtype, "rounds": rounds, "attends": attends}
    if release is not None:
        _fuse(found)
        facts["layers"] = f"liger-kernel {release}"
    with Record(out, place(where)) as record:
        for tokens in lengths:
            prompt = torch.randint(3, vocab, (1, tokens), generator=torch.Generator().manual_seed(0)).to(where)
            given = None if attends == "weights" else _given(found, tokens)
            times: dict[str, list[float]] = {STOCK: [], **{label: [] for label, _ in loaded}}
            seen: dict[str, dict[str, Any]] = {}
            for n in range(rounds + 1):
                ms, memory = _timed(found, prompt, where, given)
                times[STOCK] += [ms] * (n > 0)
                seen[STOCK] = {**memory, "tile_density": 1.0, "sparse_layers": 0}
                for label, config in loaded:
                    with apply(found, config) as handle:
                        ms, memory = _timed(found, prompt, where, given)
                        layers = handle.report().layers
                    times[label] += [ms] * (n > 0)
                    tiles = [layer.tile_density for layer in layers if layer.tile_density is not None]
                    density = round(mean(tiles), 4) if tiles else 1.0
                    sparse = sum(layer.sparse for layer in layers)
                    plans = round(sum(layer.plan_ms or 0.0 for layer in layers), 4)
                    seen[label] = {**memory, "tile_density": density, "sparse_layers": sparse, "plan_ms": plans}
            stock = spread(times[STOCK])["ms"]
            for label, all_ms in times.items():
                row = {**facts, "config": label, "tokens": tokens, **spread(all_ms), **seen[label]}
                row["faster"] = round(stock / row["ms"], 4)
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


def _given(model: PreTrainedModel, tokens: int) -> tuple[Tensor, Tensor]:
    """Structured q (1, H, N, D) and k (1, G, N, D) of the model's heads."""
    arch = model_facts(model)
    if arch.num_key_heads is None or arch.head_dim is None or arch.layer_heads is not None:
        raise SparsekitError(f"attends = 'structured': layers of {arch.name} differ in their heads.")
    made = structured(
        tokens, heads=arch.num_heads, key_heads=arch.num_key_heads, dim=arch.head_dim, device=model.device,
        dtype=model.dtype,
    )  # fmt: skip
    return made.q, made.k


@contextmanager
def _attending(model: PreTrainedModel, given: tuple[Tensor, Tensor] | None) -> Iterator[None]:
    """Within this block attention is given these q and k, in every layer; None: the layers' own."""
    if given is None:
        yield
        return

    def run(own: Any, module: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(module, *given, *args, **kwargs)

    with wrap_attention(model, run):
        yield


def _timed(
    model: PreTrainedModel, prompt: Tensor, device: torch.device, given: tuple[Tensor, Tensor] | None
) -> tuple[float, dict[str, int]]:
    """Milliseconds by the host's clock from the prompt to the first token, and the peak of allocated memory."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _attending(model, given):
        start = time.perf_counter()
        int(model(prompt, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        ms = (time.perf_counter() - start) * 1e3
    return ms, {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def _line(row: dict[str, Any]) -> str:
    memory = f", peak {row['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in row else ""
    plans = f", plans {row['plan_ms']:.2f} ms" if "plan_ms" in row else ""
    return (
        f"{row['tokens']:>9,} tokens  {row['ms']:10.1f} ms  {row['faster']:.3f} x  "
        f"tile density {row['tile_density']:.3f}{plans}{memory}  {row['config']}"
    )


def command(
    configs: Annotated[list[str], typer.Argument(metavar="CONFIG...", help="YAML files.")],
    tokens: Lengths = "8192,32768,131072",
    rounds: Annotated[int, typer.Option(min=1, help="Timed readings of each.")] = 2,
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
        configs, model=model, shape=shape, lengths=numbers_of(tokens, "--tokens"), rounds=rounds, attends=attends,
        fused=fused, dtype=dtype, device=device_of(device), out=output, show=typer.echo,
    )  # fmt: skip
