"""`sparsekit bench prefill`: time to the first token and peak memory of configs, against the untouched model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.config import SparseConfig, load
from sparsekit.lab.bench.command import add_model_arguments, finished
from sparsekit.lab.bench.shapes import model_or_shape
from sparsekit.lab.bench.timing import (
    Record,
    place,
    spread,
    synchronize,
)
from sparsekit.patch import apply

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["bench_prefill", "main"]

STOCK = "untouched"


@torch.inference_mode()
def bench_prefill(
    configs: Sequence[str | SparseConfig],
    *,
    model: PreTrainedModel | str | None = None,
    shape: str | None = None,
    lengths: Sequence[int] = (8192, 32768, 131072),
    rounds: int = 2,
    dtype: str | None = None,
    device: str | None = None,
    out: str | None = None,
    show: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """A row for each length and config, and one for the untouched model: a prompt into a fresh cache, one token out.

    The prompt is random tokens. Weights of a `shape` are random too: what static patterns cost does not depend on that,
    but a dynamic pattern selects by what it reads, so time those with real weights.

    Args:
        configs: files, or `SparseConfig`s.
        model: loaded, or what `sparsekit.models.load` takes; default: random weights of `shape`.
        shape: one of `sparsekit.lab.bench.shapes.SHAPES`; default llama-3.2-1b on a CUDA device, else smollm2-135m.
        lengths: of the prompt, tokens.
        rounds: in each every config reads the prompt once, after one reading that is not timed.
        dtype, device: default bfloat16 and the card, or float32 and the CPU.
        out: JSONL file for the rows.
        show: called with each row's line.

    Returns:
        `config`, `tokens`, `ms` (median, p20, p80), `faster` (the untouched model's median over this one's),
        `tile_density` (visited tiles over dense attention's, mean over the layers that do not keep their own),
        `sparse_layers`; on a CUDA device `peak_bytes`, all that the process held at its highest, weights included.

    Raises:
        SparsekitError: an unknown shape, or a config that does not fit the model.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = [(str(config) if isinstance(config, str) else f"config {i}", load(config))
              for i, config in enumerate(configs)]  # fmt: skip
    name, found = model_or_shape(model, shape, dtype, where)
    record = Record(out, place(where))
    vocab = found.config.get_text_config().vocab_size
    facts = {"case": "prefill", "model": name, "dtype": str(found.dtype).removeprefix("torch."), "rounds": rounds}
    for tokens in lengths:
        prompt = torch.randint(3, vocab, (1, tokens), generator=torch.Generator().manual_seed(0)).to(where)
        times: dict[str, list[float]] = {STOCK: [], **{label: [] for label, _ in loaded}}
        seen: dict[str, dict[str, Any]] = {}
        for n in range(rounds + 1):
            ms, memory = _timed(found, prompt, where)
            times[STOCK] += [ms] * (n > 0)
            seen[STOCK] = {**memory, "tile_density": 1.0, "sparse_layers": 0}
            for label, config in loaded:
                with apply(found, config) as handle:
                    ms, memory = _timed(found, prompt, where)
                    layers = handle.report().layers
                times[label] += [ms] * (n > 0)
                tiles = [layer.tile_density for layer in layers if layer.tile_density is not None]
                density = round(mean(tiles), 4) if tiles else 1.0
                sparse = sum(layer.sparse for layer in layers)
                seen[label] = {**memory, "tile_density": density, "sparse_layers": sparse}
        stock = spread(times[STOCK])["ms"]
        for label, all_ms in times.items():
            row = {**facts, "config": label, "tokens": tokens, **spread(all_ms), **seen[label]}
            row["faster"] = round(stock / row["ms"], 4)
            record.add(row)
            if show is not None:
                show(_line(row))
    return record.rows


def _timed(model: PreTrainedModel, prompt: Tensor, device: torch.device) -> tuple[float, dict[str, int]]:
    """Milliseconds by the host's clock from the prompt to the first token, and the peak of allocated memory."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    int(model(prompt, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
    ms = (time.perf_counter() - start) * 1e3
    return ms, {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def _line(row: dict[str, Any]) -> str:
    memory = f", peak {row['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in row else ""
    return (
        f"{row['tokens']:>9,} tokens  {row['ms']:10.1f} ms  {row['faster']:.3f} x  "
        f"tile density {row['tile_density']:.3f}{memory}  {row['config']}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`sparsekit bench prefill`."""
    parser = argparse.ArgumentParser(
        prog="sparsekit bench prefill",
        description="Time to the first token and peak memory of configs, against the untouched model, in one run.",
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="a YAML file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072], help="of the prompt, tokens")
    parser.add_argument("--rounds", type=int, default=2)
    add_model_arguments(parser)
    given = vars(parser.parse_args(argv))
    return finished(lambda: bench_prefill(**given, show=lambda line: print(line, flush=True)))
